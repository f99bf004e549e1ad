"""scripts/tried_parts.py: what stands beside the recipe where scripts/tried.py compares them."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import Adam, AdamW

from nanogpt_lit.loops.contract import LoopSettings, Training
from nanogpt_lit.optim.muon import MuonBesideAdamW

SHAPES = [(6, 4), (4, 6), (4, 4), (4, 4)]


@pytest.fixture
def parts(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "scripts"))
    import tried_parts

    return tried_parts


def stepped(kind, steps=4, **settings):
    """Matrices after some steps of an optimizer of that kind, and the optimizer."""
    torch.manual_seed(0)
    matrices = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    settings = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.2} | settings
    optimizer = kind(matrices, AdamW([nn.Parameter(torch.zeros(1))]), **settings)
    for _ in range(steps):
        for p in matrices:
            p.grad = torch.randn(p.shape)
        optimizer.step()
    return matrices, optimizer


def test_parts_that_nothing_changes_have_the_bits_of_muon(parts):
    for ours, theirs in zip(stepped(parts.Parts)[0], stepped(MuonBesideAdamW)[0], strict=True):
        assert torch.equal(ours, theirs)


def test_a_single_head_moves_as_the_whole_matrix(parts, monkeypatch):
    monkeypatch.setitem(parts.SIZES, "n_head", 1)
    for ours, theirs in zip(stepped(parts.PerHead)[0], stepped(MuonBesideAdamW)[0], strict=True):
        torch.testing.assert_close(ours, theirs)


def test_soap_in_a_basis_that_does_not_turn_is_adam(parts, monkeypatch):
    monkeypatch.setattr(torch.linalg, "eigh", lambda factor: (None, torch.eye(factor.size(1)).expand_as(factor)))
    ours, _ = stepped(parts.Soap, weight_decay=0.0)
    torch.manual_seed(0)
    theirs = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    adam = Adam(theirs, lr=0.1, betas=(parts.Soap.BETA1, parts.Soap.BETA2))
    for step in range(4):
        for p in theirs:
            p.grad = torch.randn(p.shape)
        if step > 0:  # the first only begins the factors
            adam.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q)


def moved(observer, ways):
    """A weight that an observer watches while it goes the given ways, one a step."""
    module = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(module.weight)
    settings = LoopSettings(len(ways))
    observer.on_train_start(Training(module, None, None, None, settings, torch.device("cpu")))
    for step, way in enumerate(ways, start=1):
        module.weight.data.add_(way)
        observer.on_step_end(step, 0.1, torch.zeros(()))
    observer.on_validation_start()
    return module.weight.item()


def test_the_mean_of_the_tail_is_that_of_its_weights(parts):
    assert moved(parts.TailMean(3), [5.0, 1.0, 2.0, 4.0]) == pytest.approx((6 + 8 + 12) / 3)


def test_snoo_goes_on_in_the_way_of_the_last_steps(parts):
    # Of 1 + 2, then of 3 + 4 beside 0.5 of the first; 0.8 of each, with Nesterov's look ahead.
    first, second = 3.0, 7.0
    expected = 0.8 * (first + 0.5 * first) + 0.8 * (second + 0.5 * (0.5 * first + second))
    assert moved(parts.Snoo(2, 0.8, 0.5), [1.0, 2.0, 3.0, 4.0]) == pytest.approx(expected)
