"""Muon for the matrices of the blocks, AdamW for everything else, as one optimizer.

Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (kellerjordan.github.io/posts/muon), with the
scale and the weight decay of Liu et al., "Muon is Scalable for LLM Training" (arXiv:2502.16982).
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from nanogpt_lit.errors import UserError

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic by Jordan et al.: steepest at zero, so that five rounds bring most singular values near
1. They do not converge: values end between 0.7 and 1.2, which serves as well."""
ROUNDS = 5
TOGETHER_ELEMENTS = 2**22
"""Matrices of one shape are orthogonalised together up to this many numbers: small ones cost a call each otherwise,
large ones need the memory."""


def orthogonalised(matrices: Tensor) -> Tensor:
    """U S' V^T of each matrix U S V^T, with every singular value near 1; (N, A, B), in the dtype it was computed in.

    In bfloat16 on GPUs that compute with it and on CPUs with Intel's AMX, where it is several times as fast, else in
    float32: that is 30 to 80 times as fast on a CPU without bfloat16, which is why torch.optim.Muon, always in
    bfloat16, does not serve here.
    """
    fast = _has_bfloat16(matrices)
    x = matrices.to(torch.bfloat16) if fast else matrices
    tall = x.size(1) > x.size(2)
    if tall:
        x = x.mT  # the smaller of the two Gram matrices
    # The quintic needs singular values of at most 1.
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    # What the Gram matrix gathers of rounding is multiplied in each round: float32 can afford it, bfloat16 cannot.
    oblong = x.size(2) >= 2 * x.size(1)
    x = _rounds_in_gram_space(x) if oblong and not fast else _rounds(x)
    return x.mT if tall else x


def _has_bfloat16(matrices: Tensor) -> bool:
    """Tell whether they lie on a device with units for products of bfloat16 matrices."""
    if matrices.dtype == torch.float64:  # whoever computes in it wants its digits
        return False
    if hasattr(matrices, "fake_device"):  # in a memory trace, whose GPU is "cpu" (memory/host.py) and one since Ampere
        return matrices.device.type == "cpu"
    if matrices.device.type == "cpu":
        # By its flags and not by a measurement, which might say otherwise when a run goes on.
        return torch.cpu._is_amx_tile_supported() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return matrices.is_cuda and torch.cuda.is_bf16_supported(including_emulation=False)


def _rounds(x: Tensor) -> Tensor:
    a, b, c = COEFFICIENTS
    for _ in range(ROUNDS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _rounds_in_gram_space(x: Tensor) -> Tensor:
    """The same numbers with fewer operations: each round multiplies x by a polynomial of its Gram matrix from the left,
    so the polynomials are multiplied first, which are square, and x once. For sides 1 : 4 that is 5/9 of the work."""
    a, b, c = COEFFICIENTS
    gram = x @ x.mT
    factor: Tensor | None = None
    for round_ in range(ROUNDS):
        p = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        p.diagonal(dim1=1, dim2=2).add_(a)
        factor = p if factor is None else p @ factor
        if round_ < ROUNDS - 1:
            gram = p @ (gram @ p)
    assert factor is not None
    return factor @ x


class MuonBesideAdamW(Optimizer):
    """The groups of an AdamW first, with its bits, and then one group of matrices for Muon.

    A loop, a schedule, a GradScaler and a checkpoint meet one optimizer; of a matrix it keeps `momentum_buffer`, as
    torch.optim.Muon does, and of everything else what AdamW keeps.

    adamw:    holds the parameters that are not Muon's, and may keep their moments where it likes
    lr:       per step, in AdamW's measure: an update has the root mean square 0.2 * lr, which is about AdamW's
    Raises UserError for what is no whole matrix.
    """

    def __init__(
        self, matrices: Sequence[Tensor], adamw: AdamW, *, lr: float, momentum: float, weight_decay: float
    ) -> None:
        for matrix in matrices:
            if matrix.dim() != 2:
                raise UserError(
                    f"model.optim.matrices=muon needs whole matrices and met a tensor of shape {tuple(matrix.shape)}, "
                    "as a strategy that divides them leaves; set trainer.strategy=ddp or model.optim.matrices=adamw."
                )
        group = {"params": list(matrices), "lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        self._adamw = adamw
        self._adamw_groups = len(adamw.param_groups)
        super().__init__([*adamw.param_groups, group], {})
        self._share()

    def _share(self) -> None:
        """AdamW works on our groups and state: a schedule, or a checkpoint, that changes one has changed both."""
        self._adamw.param_groups = self.param_groups[: self._adamw_groups]
        self._adamw.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._adamw.step()
        for group in self.param_groups[self._adamw_groups :]:
            for matrices in together([p for p in group["params"] if p.grad is not None]):
                self._step_matrices(matrices, group)
        return loss

    def _step_matrices(self, matrices: list[Tensor], group: dict[str, Any]) -> None:
        """matrices: of one shape"""
        momentum, lr = group["momentum"], group["lr"]
        updates = []
        for p in matrices:
            assert p.grad is not None
            buffer = self.state[p].get("momentum_buffer")
            if buffer is None:
                buffer = torch.zeros_like(p.grad)
            # Lightning moves all state to the GPU when it loads a checkpoint, also that of weights in host memory.
            buffer = self.state[p]["momentum_buffer"] = buffer.to(p.device)
            buffer.lerp_(p.grad, 1 - momentum)
            updates.append(p.grad.lerp(buffer, momentum))  # Nesterov's
        update_rms = 0.2 * max(matrices[0].shape) ** 0.5  # of an orthogonal matrix: 1 / sqrt(the longer side)
        for p, update in zip(matrices, orthogonalised(torch.stack(updates)), strict=True):
            p.mul_(1 - lr * group["weight_decay"]).add_(update.to(p.dtype), alpha=-lr * update_rms)

    def state_dict(self) -> dict[str, Any]:
        state_dict = super().state_dict()
        self._share()
        theirs = {p for group in self._adamw.param_groups for p in group["params"]}
        self._adamw.state = defaultdict(dict, {p: state for p, state in self.state.items() if p in theirs})
        # Its parameters come first here, so they have the same numbers there.
        state_dict["state"] |= self._adamw.state_dict()["state"]
        self._share()
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        theirs = state_dict["param_groups"][: self._adamw_groups]
        numbers = {number for group in theirs for number in group["params"]}
        state = state_dict["state"]
        # Not all of it in one: where AdamW keeps its moments in host memory, they must not pass through the GPU.
        super().load_state_dict({**state_dict, "state": {n: s for n, s in state.items() if n not in numbers}})
        ours = dict(self.state)
        self._adamw.load_state_dict({"state": {n: s for n, s in state.items() if n in numbers}, "param_groups": theirs})
        self.state = defaultdict(dict, {**self._adamw.state, **ours})
        self._share()


def together(matrices: list[Tensor]) -> Iterator[list[Tensor]]:
    """The matrices in lists of one shape, device and dtype, each of TOGETHER_ELEMENTS at most or of one matrix."""
    alike: dict[Any, list[Tensor]] = defaultdict(list)
    for matrix in matrices:
        alike[matrix.shape, matrix.device, matrix.dtype].append(matrix)
    for same in alike.values():
        size = max(1, TOGETHER_ELEMENTS // same[0].numel())
        for start in range(0, len(same), size):
            yield same[start : start + size]
