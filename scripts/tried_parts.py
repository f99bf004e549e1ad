"""Optimizers, schedules and averages that the package does not have, each in the few lines that its paper takes, for
scripts/tried.py."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from ablate import MODERN, SIZES
from torch import Tensor, nn

from nanogpt_lit.loops.contract import Observer, Training
from nanogpt_lit.optim import adamw
from nanogpt_lit.optim.muon import MuonBesideAdamW, orthogonalised
from nanogpt_lit.optim.schedule import ScheduleConfig, warmup_decay


class Parts(MuonBesideAdamW):
    """Muon in parts that a row changes one of."""

    def _step_matrices(self, matrices: list[Tensor], group: dict[str, Any]) -> None:
        lr, momentum = group["lr"], group["momentum"]
        means = torch.stack([self.mean(p, self.state[p], momentum) for p in matrices])
        updates = self.direction(matrices, means)
        scale = self.scale(*matrices[0].shape)
        for p, update in zip(matrices, updates.to(matrices[0].dtype), strict=True):
            p.mul_(1 - lr * group["weight_decay"] * self.decays(p, update)).add_(update, alpha=-lr * scale)

    def mean(self, p: Tensor, state: dict[str, Any], momentum: float) -> Tensor:
        """Of the gradients, with Nesterov's look ahead."""
        assert p.grad is not None
        buffer = state.setdefault("momentum_buffer", torch.zeros_like(p))
        buffer.lerp_(p.grad, 1 - momentum)
        return p.grad.lerp(buffer, momentum)

    def direction(self, matrices: list[Tensor], means: Tensor) -> Tensor:
        return orthogonalised(means)

    def scale(self, rows: int, columns: int) -> float:
        return 0.2 * max(rows, columns) ** 0.5

    def decays(self, p: Tensor, update: Tensor) -> Tensor | float:
        """Where weight decay works: 1, or a mask."""
        return 1.0


class WithoutNesterov(Parts):
    def mean(self, p: Tensor, state: dict[str, Any], momentum: float) -> Tensor:
        super().mean(p, state, momentum)
        return state["momentum_buffer"]


class CautiousDecay(Parts):
    """Weight decay where it goes the way of the update: Chen et al. (arXiv:2510.12402)."""

    def decays(self, p: Tensor, update: Tensor) -> Tensor:
        return p * update > 0


class CautiousUpdates(Parts):
    """No step against the sign of the gradient: Liang et al. (arXiv:2411.16085)."""

    def direction(self, matrices: list[Tensor], means: Tensor) -> Tensor:
        updates = super().direction(matrices, means).float()
        agrees = (updates * torch.stack([p.grad for p in matrices]) > 0).float()  # type: ignore[misc]
        return updates * agrees / agrees.mean(dim=(1, 2), keepdim=True).clamp(min=1e-3)


class NorMuon(Parts):
    """Rows brought to one size by a running mean of their squares: Li et al. (arXiv:2510.05491)."""

    def direction(self, matrices: list[Tensor], means: Tensor) -> Tensor:
        updates = super().direction(matrices, means).float()
        squares = updates.square().mean(2, keepdim=True)
        mean = self.state[matrices[0]].setdefault("row_squares", torch.zeros_like(squares)).lerp_(squares, 0.05)
        normed = updates / (mean.sqrt() + 1e-8)
        # As large as before, whose size the scale below counts on.
        return normed * (updates.norm(dim=(1, 2), keepdim=True) / normed.norm(dim=(1, 2), keepdim=True))


class JordansScale(Parts):
    """The scale of Muon's first publication, at the same size for square matrices."""

    def scale(self, rows: int, columns: int) -> float:
        return 0.2 * min(rows, columns) ** 0.5 * max(1.0, rows / columns) ** 0.5


class PerHead(Parts):
    """Queries, keys and values orthogonalised head by head."""

    def direction(self, matrices: list[Tensor], means: Tensor) -> Tensor:
        updates = torch.empty_like(means)
        of_heads = torch.tensor([getattr(p, "has_heads", False) for p in matrices])
        for which, heads in ((of_heads, SIZES["n_head"]), (~of_heads, 1)):
            if which.any():
                cut = means[which].unflatten(1, (heads, -1)).flatten(0, 1)  # (n * heads, A / heads, B)
                updates[which] = orthogonalised(cut).to(means.dtype).unflatten(0, (-1, heads)).flatten(1, 2)
        return updates


class Soap(MuonBesideAdamW):
    """Adam in the eigenbasis of Shampoo's two factors, in Muon's place: Vyas et al. (arXiv:2409.11321)."""

    BETA1, BETA2, EVERY = 0.9, 0.95, 10

    def _step_matrices(self, matrices: list[Tensor], group: dict[str, Any]) -> None:
        state = self.state[matrices[0]]  # of all of this shape
        gradients = torch.stack([p.grad for p in matrices])  # type: ignore[misc]  # (N, A, B)
        factors = gradients @ gradients.mT, gradients.mT @ gradients
        if not state:
            state["factors"] = list(factors)
            state["bases"] = [torch.linalg.eigh(factor)[1] for factor in factors]
            state["mean"], state["squares"], state["step"] = torch.zeros_like(gradients), torch.zeros_like(gradients), 0
            return
        state["step"] += 1
        for kept, factor in zip(state["factors"], factors, strict=True):
            kept.lerp_(factor, 1 - self.BETA2)
        left, right = state["bases"]
        state["mean"].lerp_(gradients, 1 - self.BETA1)
        state["squares"].lerp_((left.mT @ gradients @ right).square(), 1 - self.BETA2)
        mean = (left.mT @ state["mean"] @ right) / (1 - self.BETA1 ** state["step"])
        squares = state["squares"] / (1 - self.BETA2 ** state["step"])
        updates = left @ (mean / (squares.sqrt() + 1e-8)) @ right.mT
        for p, update in zip(matrices, updates, strict=True):
            p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])
        if state["step"] % self.EVERY == 0:
            pairs = zip(state["factors"], state["bases"], strict=True)
            state["bases"] = [torch.linalg.qr(factor @ basis)[0] for factor, basis in pairs]


class During(Observer):
    """What changes a run while it trains."""

    training: Training

    def on_train_start(self, training: Training) -> None:
        self.training = training

    def weights(self) -> list[Tensor]:
        return [p.data for p in self.training.module.parameters()]


@dataclass
class Beginning(During):
    """Initial values `factor` times as large, of the parameters whose names match."""

    name: str
    factor: float

    def on_train_start(self, training: Training) -> None:
        for name, p in training.module.named_parameters():
            if re.search(self.name, name):
                p.data.mul_(self.factor)


@dataclass
class MomentumWarmup(During):
    """Muon's momentum from `first` to `last` in a straight line over `steps`."""

    first: float
    last: float
    steps: int

    def on_before_step(self, grad_norm: Tensor) -> None:
        done = min(1.0, self.training.step / self.steps)
        self.training.optimizer.param_groups[-1]["momentum"] = self.first + done * (self.last - self.first)


@dataclass
class TailMean(During):
    """The mean of the weights over the last `steps`: Izmailov et al. (arXiv:1803.05407)."""

    steps: int

    def on_step_end(self, step: int, lr: float, grad_norm: Tensor) -> None:
        n = step - (self.training.settings.max_steps - self.steps)  # of the weights in the mean, with these
        if n == 1:
            self.mean = [p.clone() for p in self.weights()]
        elif n > 1:
            for mean, p in zip(self.mean, self.weights(), strict=True):
                mean.lerp_(p, 1 / n)

    def on_validation_start(self) -> None:
        for mean, p in zip(self.mean, self.weights(), strict=True):
            p.copy_(mean)


@dataclass
class Snoo(During):
    """Nesterov's momentum for the way of every `every` steps: Kallusky et al. (arXiv:2510.15830)."""

    every: int
    lr: float
    momentum: float

    def on_train_start(self, training: Training) -> None:
        super().on_train_start(training)
        self.slow = [p.clone() for p in self.weights()]
        self.means = [torch.zeros_like(p) for p in self.slow]

    def on_step_end(self, step: int, lr: float, grad_norm: Tensor) -> None:
        if step % self.every == 0:
            for p, slow, mean in zip(self.weights(), self.slow, self.means, strict=True):
                way = slow - p
                mean.mul_(self.momentum).add_(way)
                p.copy_(slow.sub_(way + self.momentum * mean, alpha=self.lr))


def with_rate(word: str, factor: float) -> Callable[..., list[dict]]:
    """AdamW's groups, with `factor` times the rate for the parameters whose names have the word."""

    def param_groups(named: Iterable[tuple[str, nn.Parameter]], *args: Any) -> list[dict]:
        named = list(named)
        rest = PARAM_GROUPS([(name, p) for name, p in named if word not in name], *args)
        own = PARAM_GROUPS([(name, p) for name, p in named if word in name], *args)
        own = [group | {"lr": factor * MODERN[1].lr} for group in own]
        return [group for group in rest + own if group["params"]]

    return param_groups


PARAM_GROUPS, BLOCK_MATRICES = adamw.param_groups, adamw.block_matrices


def marked_matrices(named: Iterable[tuple[str, nn.Parameter]]) -> list[nn.Parameter]:
    named = list(named)
    for name, p in named:
        p.has_heads = re.search(r"\.[qkv]_proj\.", name) is not None  # type: ignore[attr-defined]
    return BLOCK_MATRICES(named)


POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)
"""Coefficients of five rounds: Amsel et al. (arXiv:2505.16932)."""


def polar_express(matrices: Tensor) -> Tensor:
    x = matrices.mT if matrices.size(1) > matrices.size(2) else matrices
    x = x / (1.01 * x.norm(dim=(1, 2), keepdim=True)).clamp(min=1e-7)
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if matrices.size(1) > matrices.size(2) else x


def root_decay(step: int, config: ScheduleConfig) -> float:
    """The cooldown as 1 - sqrt in place of a straight line: Hägele et al. (arXiv:2405.18392)."""
    straight = warmup_decay(step, config)
    assert config.total_steps is not None
    return straight if step < config.total_steps * (1 - config.cooldown_ratio) else 1 - (1 - straight) ** 0.5
