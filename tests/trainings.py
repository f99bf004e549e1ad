"""What a loop hands its observers, without a loop."""

import torch

from nanogpt_lit.loops.contract import LoopSettings, Training, optimizer_and_schedule


def training_of(module, scaler=None, device="cpu", processes=1, **settings):
    settings = LoopSettings(**({"max_steps": 1000} | settings))
    parts = *optimizer_and_schedule(module), scaler
    return Training(module, *parts, settings, torch.device(device), processes=processes)
