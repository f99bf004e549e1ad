"""Runs nanoGPT's own train.py in its folder, and keeps every batch with its loss: python FILE RECORD [its options]."""

import runpy
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path.cwd()))

import model  # type: ignore[import-not-found]  # nanoGPT's

RECORD = Path(sys.argv[1])
sys.argv = ["train.py", *sys.argv[2:]]
torch.set_num_threads(1)
record = []
forward = model.GPT.forward


def kept(self, tokens, targets=None):
    logits, loss = forward(self, tokens, targets)
    if self.training:
        record.append((tokens, targets, loss.item()))
    return logits, loss


model.GPT.forward = kept
runpy.run_path("train.py", run_name="__main__")
torch.save(record, RECORD)
