"""What a card can do at best: the denominator of model FLOPs utilisation (MFU).

A wrong peak gives a wrong MFU, so a card that is not listed has none. Peaks are dense (no sparsity) and, for half
precision, with float32 accumulation, which is what cuBLAS uses under autocast.

GeForce RTX cards, Ampere and Ada alike, do 512 such operations per multiprocessor and clock (NVIDIA's Ampere GA102
and Ada whitepapers: RTX 3090, 82 x 512 x 1.695 GHz = 71 TFLOP/s) and 256 float32 ones. Laptop cards are listed at the
highest boost clock that NVIDIA publishes for them; one that is limited in power runs below it, and its MFU says so.
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    pattern: str
    """Regular expression found in torch.cuda.get_device_name(), in lower case. Strict: a GTX 1650 is no GTX 1650 Ti."""
    fp32: float
    """Dense FLOP/s by numeric format; None where the card has no unit for it."""
    tf32: float | None
    fp16: float
    bf16: float | None


def _geforce_rtx(pattern: str, multiprocessors: int, boost_ghz: float) -> Card:
    clocks = multiprocessors * boost_ghz * 1e9
    return Card(pattern, fp32=256 * clocks, tf32=256 * clocks, fp16=512 * clocks, bf16=512 * clocks)


CARDS = (
    _geforce_rtx(r"\brtx 2050$", 16, 1.477),
    _geforce_rtx(r"\brtx 3050 laptop gpu$", 16, 1.740),
    _geforce_rtx(r"\brtx 3050 ti laptop gpu$", 20, 1.695),
    _geforce_rtx(r"\brtx 4050 laptop gpu$", 20, 2.370),
    _geforce_rtx(r"\brtx 4060 laptop gpu$", 24, 2.370),
    # Turing without tensor cores: half precision at twice the float32 rate (TU117).
    Card(r"\bgtx 1650$", fp32=2.98e12, tf32=None, fp16=5.97e12, bf16=None),
    Card(r"\btesla t4$", fp32=8.1e12, tf32=None, fp16=65e12, bf16=None),
    Card(r"\ba100\b", fp32=19.5e12, tf32=156e12, fp16=312e12, bf16=312e12),
    Card(r"\bh100 pcie$", fp32=51e12, tf32=378e12, fp16=756e12, bf16=756e12),
    Card(r"\bh100 80gb hbm3$", fp32=67e12, tf32=494.7e12, fp16=989.4e12, bf16=989.4e12),
)


def peak_flops(device_name: str, precision: str, allow_tf32: bool = False) -> float | None:
    """Dense peak in FLOP/s of one card at a Lightning precision such as "16-mixed", or None when it is not known.

    device_name: as torch.cuda.get_device_name() gives it; a processor has no entry
    allow_tf32: whether float32 matrix products run in TF32 (torch.backends.cuda.matmul.allow_tf32)
    """
    card = next((card for card in CARDS if re.search(card.pattern, device_name.lower())), None)
    if card is None:
        return None
    if precision.startswith("16"):
        return card.fp16
    if precision.startswith("bf16"):
        return card.bf16
    if precision.startswith("32"):
        return card.tf32 if allow_tf32 else card.fp32
    return None
