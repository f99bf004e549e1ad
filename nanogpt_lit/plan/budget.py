"""How much of a card's memory a run can have."""

import re
from dataclasses import dataclass, replace
from typing import Literal

import torch

from nanogpt_lit.errors import UserError
from nanogpt_lit.runtime.cards import CARDS, Card, card_of

System = Literal["linux", "windows"]

# What others hold of a 4 GB laptop card, in MiB: driver, display, desktop, and a margin for what no plan can see (the
# libraries' own kernels and workspaces). From what users report of such cards: 3.68 of 4 GiB visible under Linux, 0.82
# GiB of it with the desktop where that is drawn by the card (Robbyant/lingbot-map #73, an RTX A500); all gone at 3.46
# GiB reserved under Windows (invoke-ai/InvokeAI #745), 0.79 and 0.82 GiB beyond what was reserved with a desktop
# (lllyasviel/Fooocus #1316, jhc13/taggui #188).
OTHERS: dict[System | None, int] = {"linux": 530, "windows": 630, None: 830}
"""None is any system, unless Linux draws its desktop on the card."""
DESKTOP: dict[System | None, int] = {"linux": 800, "windows": 200, None: 500}


@dataclass(frozen=True)
class Budget:
    card: Card
    system: System | None = None
    desktop_on_card: bool = False
    measured_mib: int | None = None
    """What the user found to be free, in place of all estimates."""

    @property
    def usable_mib(self) -> int:
        """What PyTorch may reserve."""
        if self.measured_mib is not None:
            return self.measured_mib
        others = OTHERS[self.system] + (DESKTOP[self.system] if self.desktop_on_card else 0)
        return self.card.vram_mib - context_mib(self.card.multiprocessors) - others

    def __post_init__(self) -> None:
        if self.measured_mib is None and self.usable_mib < 256:
            raise UserError(
                f"--vram={self.card.vram_mib}MiB leaves {self.usable_mib} MiB after the driver and the CUDA context; "
                "a card of 2 GiB or more can train."
            )


def choose_budget(
    card: str | None = None,
    vram: str | None = None,
    usable: str | None = None,
    system: System | None = None,
    desktop_on_card: bool = False,
) -> Budget:
    """What the options of `plan` say; without a card among them that of this machine, or else an RTX 2050."""
    chosen = card_named(card) if card is not None else card_here() or CARDS[0]
    if vram is not None:
        # Its speed is not known: that of an RTX 2050 still says what a technique costs against another.
        chosen = replace(CARDS[0], name=f"a card of {vram}", vram_mib=parse_mib("--vram", vram))
    measured = None if usable is None else parse_mib("--usable", usable)
    return Budget(chosen, system, desktop_on_card, measured)


def card_here() -> Card | None:
    """The card that torch sees, with its own size; None without one."""
    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(0)
    listed = card_of(found.name) or replace(CARDS[0], name=found.name)
    return replace(listed, vram_mib=found.total_memory // 2**20, multiprocessors=found.multi_processor_count)


def context_mib(multiprocessors: int) -> int:
    """The CUDA context and its loaded kernels, per process: it grows with the multiprocessors.

    A line through two measurements: 70 MiB on 16 (RTX A500, lingbot-map #73) and 426 MiB on 142 (RTX 6000 Ada, PyTorch
    2.10, unslothai/unsloth-zoo #1053).
    """
    return round(70 + (multiprocessors - 16) * (426 - 70) / (142 - 16))


def card_named(name: str) -> Card:
    """The card of `plan --card`, in any spelling: rtx2050, "RTX 2050". Raises UserError for one that is not listed."""
    plain = re.sub(r"[^a-z0-9]", "", name.lower().removeprefix("nvidia").replace("geforce", ""))
    for card in CARDS:
        if plain == card.name.replace("-", ""):
            return card
    raise UserError(
        f"--card={name} is not known; known are {', '.join(card.name for card in CARDS)}. "
        "For another, give its memory: --vram 4GiB."
    )


def parse_mib(option: str, text: str) -> int:
    """MiB of "4GiB", "4GB", "3200MiB" or "3200": makers of cards write GB for GiB. Raises UserError for others."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(gib|gb|g|mib|mb|m)?\s*", text.lower())
    if match is None or float(match[1]) == 0:
        raise UserError(f"{option}={text} is not an amount of memory; 4GiB or 3200MiB is.")
    if match[2] is None and float(match[1]) < 256:
        raise UserError(f"{option}={text} has no unit and would be MiB; did you mean {option} {match[1]}GiB?")
    if len(text) > 20:
        raise UserError(f"{option}={text[:20]}... is more memory than there is; 4GiB or 3200MiB works.")
    return round(float(match[1]) * (1024 if (match[2] or "m").startswith("g") else 1))
