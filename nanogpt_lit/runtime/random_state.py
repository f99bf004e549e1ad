"""The random state that dropout draws from, of one process: kept, and put back."""

from collections.abc import Mapping

import torch

RandomState = Mapping[str, torch.Tensor]
"""Device type to the state of its generator, uint8: "cpu", and "cuda" or "mps" where that is trained on."""


def random_state(device: torch.device) -> RandomState:
    """Of the processor's generator, and of the device's where it is another. Waits for no card, whose state is a seed
    and a count that the host keeps."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_random_state(state: RandomState, device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
    elif device.type == "mps":
        torch.mps.set_rng_state(state["mps"])
