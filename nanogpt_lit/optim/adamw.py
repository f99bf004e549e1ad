"""The optimizer of a run: AdamW as nanoGPT uses it, Muon beside it, or any class of torch.optim's kind by its path."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn
from torch.optim import AdamW, Optimizer

from nanogpt_lit.errors import UserError
from nanogpt_lit.untrusted.imports import imported_class


@dataclass(frozen=True)
class AdamWConfig:
    lr: float = 6e-4
    """Peak learning rate, reached after warm-up."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices and embeddings; biases and layer norms have none."""
    decay_vectors: bool = False
    """Decay biases and layer norms too, as AdamW(model.parameters()) does."""
    beta1: float = 0.9
    """Decay of the running mean of the gradients."""
    beta2: float = 0.95
    """Decay of the running mean of their squares; small batches like it nearer to 1 (0.99)."""
    eps: float = 1e-8
    """Added to the denominator of the update."""
    implementation: Literal["for-loop", "foreach", "fused"] = "fused"
    """One kernel for all (fused), one per operation (foreach), or one per tensor and operation (for-loop).
    foreach needs a temporary as large as the parameters; the three agree only up to rounding."""
    matrices: Literal["adamw", "muon"] = "adamw"
    """Optimizer of the matrices of the blocks. muon: see optim/muon.py; it keeps 4 bytes a parameter, not 8."""
    muon_lr: float | None = None
    """Muon's peak learning rate, in AdamW's measure; None takes lr."""
    muon_momentum: float = 0.95
    """Decay of Muon's running mean of the gradients."""

    state_bits: Literal[32, 8] = 32
    """8 changes the numerics: AdamW's moments are rounded to 8 bits a number, each in its block's measure, 2 bytes a
    parameter in place of 8 (Dettmers et al., arXiv:2110.02861). Through bitsandbytes, whose kernel makes implementation
    idle: pip install "nanogpt_lit[eight_bit]"."""

    class_path: str | None = None
    """Another optimizer in place of AdamW, such as torch.optim.SGD; one outside of torch.optim needs --trust PACKAGE.
    It is given lr and the two groups of weight_decay; the other keys above are AdamW's and do nothing."""
    init_args: dict[str, Any] = field(default_factory=dict)
    """Other arguments of class_path, such as {momentum: 0.9}."""

    @property
    def state_moves(self) -> bool:
        """True where its state may live in host memory."""
        return self.class_path is None and self.state_bits == 32

    def __post_init__(self) -> None:
        if self.class_path is None and self.init_args:
            raise UserError(f"model.optim.init_args={self.init_args} is for model.optim.class_path; set that too.")
        if self.class_path is not None and (self.matrices != "adamw" or self.state_bits != 32):
            raise UserError(
                f"model.optim.class_path={self.class_path} replaces AdamW, and matrices and state_bits are AdamW's; "
                "leave them at adamw and 32."
            )
        for name, low, high in (("beta1", 0.0, 1.0), ("beta2", 0.0, 1.0), ("muon_momentum", 0.0, 1.0)):
            if not low <= getattr(self, name) < high:
                raise UserError(f"model.optim.{name}={getattr(self, name)} is outside [0, 1); 0.9 to 0.99 is usual.")
        if self.lr <= 0:
            raise UserError(f"model.optim.lr={self.lr} must be positive; GPT-2 124M trains at 6e-4.")
        if self.matrices not in ("adamw", "muon"):
            raise UserError(f"model.optim.matrices={self.matrices!r} is not known; use adamw or muon.")
        if self.muon_lr is not None and self.muon_lr <= 0:
            raise UserError(f"model.optim.muon_lr={self.muon_lr} must be positive; null takes model.optim.lr.")
        if self.muon_lr is not None and self.matrices != "muon":
            raise UserError(
                f"model.optim.muon_lr={self.muon_lr} does nothing while matrices is {self.matrices}; "
                "set model.optim.matrices=muon."
            )
        if self.state_bits not in (32, 8):
            raise UserError(f"model.optim.state_bits={self.state_bits} is not known; use 32 or 8.")
        if self.state_bits == 8 and self.matrices == "muon":
            raise UserError(
                "model.optim.state_bits=8 is for AdamW alone, and matrices is muon; set model.optim.state_bits=32."
            )
        if self.weight_decay < 0:
            raise UserError(f"model.optim.weight_decay={self.weight_decay} must not be negative; 0.1 is usual.")


# By name and not by shape: a strategy may have cut a matrix into a vector, which Muon then refuses.
IN_BLOCK = re.compile(r"\.\d+\..*weight$")
IN_NORM = re.compile(r"\.ln_|norm\.")


def param_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float, decay_vectors: bool = False
) -> list[dict]:
    """Two groups: tensors of two or more dimensions decay, the rest only where asked. A tied tensor appears once."""
    trainable = [p for _, p in named_parameters if p.requires_grad]
    return [
        {"params": [p for p in trainable if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.dim() < 2], "weight_decay": weight_decay if decay_vectors else 0.0},
    ]


def block_matrices(named_parameters: Iterable[tuple[str, nn.Parameter]]) -> list[nn.Parameter]:
    """Matrices between hidden states, which Muon is for. Embeddings and the head are not: their rows are tokens."""
    return [p for name, p in named_parameters if IN_BLOCK.search(name) and not IN_NORM.search(name)]


def build_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]], config: AdamWConfig, adamw: type[AdamW] = AdamW
) -> Optimizer:
    """Build the optimizer that a configuration describes.

    adamw: a class that does the same with its state elsewhere
    Raises UserError for a class that is none or refuses its arguments, and where bitsandbytes is wanted and missing.
    """
    if config.class_path is not None:
        return _of_class(param_groups(named_parameters, config.weight_decay, config.decay_vectors), config)
    if config.state_bits == 8:
        return _adamw_in_8_bits(param_groups(named_parameters, config.weight_decay, config.decay_vectors), config)
    named = [(name, p) for name, p in named_parameters if p.requires_grad]
    matrices = block_matrices(named) if config.matrices == "muon" else []
    muons = {id(p) for p in matrices}
    optimizer = adamw(
        param_groups([(n, p) for n, p in named if id(p) not in muons], config.weight_decay, config.decay_vectors),
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        foreach=config.implementation == "foreach",
        fused=config.implementation == "fused",
    )
    if config.matrices == "adamw":
        return optimizer
    from nanogpt_lit.optim.muon import MuonBesideAdamW  # late, for AdamW does without

    return MuonBesideAdamW(
        matrices,
        optimizer,
        lr=config.muon_lr or config.lr,
        momentum=config.muon_momentum,
        weight_decay=config.weight_decay,
    )


def _of_class(groups: list[dict], config: AdamWConfig) -> Optimizer:
    found: Any = imported_class(str(config.class_path), "model.optim.class_path")
    if not issubclass(found, Optimizer):
        raise UserError(f"model.optim.class_path={config.class_path} is no optimizer; torch.optim.SGD is one.")
    try:
        return found(groups, lr=config.lr, **config.init_args)
    except (TypeError, ValueError) as error:
        raise UserError(f"model.optim.class_path={config.class_path} refuses its arguments: {error}.") from error


def _adamw_in_8_bits(groups: list[dict], config: AdamWConfig) -> Optimizer:
    try:
        from bitsandbytes.optim.adamw import AdamW8bit
    except ImportError:
        raise UserError(
            'model.optim.state_bits=8 needs bitsandbytes; install it with pip install "nanogpt_lit[eight_bit]", or set '
            "model.optim.state_bits=32."
        ) from None
    # Tensors of fewer than 4096 numbers, such as biases, stay in 32 bits: they weigh little.
    return AdamW8bit(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps)
