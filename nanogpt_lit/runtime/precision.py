"""The one table of precisions: what each means for the weights, for autocast, and in accelerate's words."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the table is also read by commands that do without torch
    import torch


@dataclass(frozen=True)
class Precision:
    autocast: str | None
    """The dtype that autocast computes in; None without autocast."""
    weights: str = "float32"
    accelerate: str | None = None
    """accelerate's mixed_precision; None for what Lightning's Trainer alone runs."""

    @property
    def multiplies_in(self) -> str:
        """The dtype of matrix products."""
        return self.autocast or self.weights

    @property
    def scales(self) -> bool:
        """True where a GradScaler keeps the gradients from vanishing."""
        return self.autocast == "float16"


PRECISIONS = {
    "32-true": Precision(None, accelerate="no"),
    "bf16-mixed": Precision("bfloat16", accelerate="bf16"),
    "16-mixed": Precision("float16", accelerate="fp16"),
    "bf16-true": Precision(None, weights="bfloat16"),
    "16-true": Precision(None, weights="float16"),
}
IN_ACCELERATE = {name: row.accelerate for name, row in PRECISIONS.items() if row.accelerate is not None}
"""The precisions of every loop, and what accelerate calls them."""
OF_ACCELERATE = {theirs: ours for ours, theirs in IN_ACCELERATE.items()}
OTHER_NAMES = {
    None: "32-true", "32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed",  # Lightning reads these as well
    "fp16": "16-mixed", "float16": "16-mixed", "half": "16-mixed", "amp": "16-mixed",
    "bfloat16": "bf16-mixed", "fp32": "32-true", "float32": "32-true", "tf32": "32-true", "no": "32-true",
}  # fmt: skip
LIGHTNINGS_SHORT = (None, "32", "16", "bf16")


def full_precision_name(precision: Any) -> str:
    """ "16-mixed" for 16, as Lightning reads it."""
    name = precision if precision is None else str(precision)
    return OTHER_NAMES[name] if name in LIGHTNINGS_SHORT else str(name)


def dtype_of(name: str | None) -> "torch.dtype | None":
    """The torch.dtype of an entry of the table."""
    import torch

    return None if name is None else getattr(torch, name)


def scales_gradients(precision: str) -> bool:
    return precision in PRECISIONS and PRECISIONS[precision].scales
