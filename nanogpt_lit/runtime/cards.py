"""What a card can do at best: the denominator of model FLOPs utilisation (MFU).

A wrong peak gives a wrong MFU, so a card that is not listed has none. Peaks are dense (no sparsity) and, for half
precision, with float32 accumulation, which is what cuBLAS uses under autocast.

GeForce RTX cards, Ampere and Ada alike, do 512 such operations per multiprocessor and clock (NVIDIA's Ampere GA102
and Ada whitepapers: RTX 3090, 82 x 512 x 1.695 GHz = 71 TFLOP/s) and 256 float32 ones. Laptop cards are listed at the
highest boost clock that NVIDIA publishes for them; one that is limited in power runs below it, and its MFU says so.
"""

import re
from dataclasses import dataclass

from nanogpt_lit.runtime.precision import PRECISIONS

PCIE_3_X8, PCIE_4_X8 = 6.2e9, 12.4e9


@dataclass(frozen=True)
class Card:
    name: str
    """As `plan --card` knows it."""
    pattern: str
    """Regular expression found in torch.cuda.get_device_name(), in lower case. Strict: a GTX 1650 is no GTX 1650 Ti."""
    vram_mib: int
    multiprocessors: int
    bandwidth: float
    """Bytes per second to and from its memory."""
    host_bandwidth: float
    """Bytes per second each way between it and the host: what PCIe leaves of its nominal rate, about four fifths."""
    fp32: float
    """Dense FLOP/s by numeric format; None where the card has no unit for it."""
    tf32: float | None
    fp16: float
    bf16: float | None


def _geforce_rtx(
    name: str,
    pattern: str,
    vram_gib: int,
    multiprocessors: int,
    boost_ghz: float,
    bandwidth: float,
    host_bandwidth: float = PCIE_4_X8,
) -> Card:
    clocks = multiprocessors * boost_ghz * 1e9
    return Card(
        name, pattern, vram_gib * 1024, multiprocessors, bandwidth, host_bandwidth,
        fp32=256 * clocks, tf32=256 * clocks, fp16=512 * clocks, bf16=512 * clocks,
    )  # fmt: skip


CARDS = (
    _geforce_rtx("rtx2050", r"\brtx 2050$", 4, 16, 1.477, 112e9, PCIE_3_X8),
    _geforce_rtx("rtx3050-laptop", r"\brtx 3050 laptop gpu$", 4, 16, 1.740, 192e9),
    _geforce_rtx("rtx3050ti-laptop", r"\brtx 3050 ti laptop gpu$", 4, 20, 1.695, 192e9),
    _geforce_rtx("rtx4050-laptop", r"\brtx 4050 laptop gpu$", 6, 20, 2.370, 192e9),
    _geforce_rtx("rtx4060-laptop", r"\brtx 4060 laptop gpu$", 8, 24, 2.370, 256e9),
    # Turing without tensor cores: half precision at twice the float32 rate (TU117).
    Card("gtx1650", r"\bgtx 1650$", 4096, 14, 128e9, 2 * PCIE_3_X8, fp32=2.98e12, tf32=None, fp16=5.97e12, bf16=None),
    Card("t4", r"\btesla t4$", 15360, 40, 320e9, 2 * PCIE_3_X8, fp32=8.1e12, tf32=None, fp16=65e12, bf16=None),
    # The smaller of the two that bear the name.
    Card("a100", r"\ba100\b", 40960, 108, 1555e9, 2 * PCIE_4_X8, fp32=19.5e12, tf32=156e12, fp16=312e12, bf16=312e12),
    Card("h100-pcie", r"\bh100 pcie$", 81559, 114, 2.0e12, 4 * PCIE_4_X8,
         fp32=51e12, tf32=378e12, fp16=756e12, bf16=756e12),
    Card("h100", r"\bh100 80gb hbm3$", 81559, 132, 3.35e12, 4 * PCIE_4_X8,
         fp32=67e12, tf32=494.7e12, fp16=989.4e12, bf16=989.4e12),
)  # fmt: skip


def card_of(device_name: str) -> Card | None:
    """The card of a device name, as torch.cuda.get_device_name() gives it; None when it is not listed."""
    return next((card for card in CARDS if re.search(card.pattern, device_name.lower())), None)


def peak_flops(device_name: str, precision: str, allow_tf32: bool = False) -> float | None:
    """Dense peak in FLOP/s of one card at a Lightning precision such as "16-mixed", or None when it is not known.

    device_name: as torch.cuda.get_device_name() gives it; a processor has no entry
    allow_tf32: whether float32 matrix products run in TF32 (torch.backends.cuda.matmul.fp32_precision == "tf32")
    """
    card = card_of(device_name)
    if card is None:
        return None
    if precision not in PRECISIONS:
        return None
    single = card.tf32 if allow_tf32 else card.fp32
    return {"float16": card.fp16, "bfloat16": card.bf16, "float32": single}[PRECISIONS[precision].multiplies_in]
