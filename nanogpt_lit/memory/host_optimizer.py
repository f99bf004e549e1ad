"""AdamW whose moments live in host memory and visit the GPU at the step, a bucket at a time.

8 of the 16 bytes that a parameter costs leave the GPU. The arithmetic stays on it, with the kernels of
torch.optim.AdamW on slices of the same tensors: the same bits. A step moves the moments to the GPU and back, 16 bytes
a parameter, while it computes; gradients stay on the GPU, so that clipping, accumulation and a GradScaler see nothing.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim.adamw import AdamW, adamw

from nanogpt_lit.errors import UserError
from nanogpt_lit.memory.host import Mark, host_of, lanes, page_lock

BUCKET_ELEMENTS = 2**22
"""Parameters whose moments visit the GPU together: 32 MiB of float32 moments."""
SLOTS = 3
"""One bucket arrives, one is computed with, one leaves."""
ALIGNMENT = 64
"""Elements: slices begin where vectors do, so that kernels treat each element as they would in the whole tensor."""

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class _Slice:
    """Elements of a parameter, and where its moments lie in a bucket."""

    parameter: Tensor
    start: int
    stop: int
    offset: int

    @property
    def here(self) -> slice:
        """Its place in the bucket."""
        return slice(self.offset, self.offset + self.stop - self.start)

    @property
    def there(self) -> slice:
        """Its place in the parameter, and in whatever has that shape."""
        return slice(self.start, self.stop)


@dataclass
class _Bucket:
    group: dict[str, Any]
    slices: list[_Slice] = field(default_factory=list)
    elements: int = 0


@dataclass
class _Slot:
    """Room on the GPU for the moments of one bucket."""

    moments: Tensor  # (2, elements)
    emptied: Mark


class HostAdamW(AdamW):
    """torch.optim.AdamW, to the bit, with its moments in host memory. It reads and writes AdamW's state_dict.

    For contiguous, dense parameters of one device; no amsgrad, no capturable.
    """

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options)
        # Not in self.state: what is there, Lightning moves to the GPU when it loads a checkpoint.
        self._moments: dict[Tensor, tuple[Tensor, Tensor]] = {}
        self._left = Mark()  # when the last moments have left the GPU

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._make_state()
        by_place: dict[tuple[torch.device, torch.dtype], list[_Bucket]] = defaultdict(list)
        for bucket in self._buckets():
            parameter = bucket.slices[0].parameter
            by_place[parameter.device, parameter.dtype].append(bucket)
        for (device, dtype), buckets in by_place.items():
            self._stream(buckets, device, dtype)
        return loss

    def _make_state(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None or p in self._moments:
                    continue
                if not p.is_contiguous():
                    raise UserError(
                        f"model.memory.optimizer_state=host takes contiguous parameters and met one of strides "
                        f"{p.stride()}; device takes any."
                    )
                # A fused kernel reads the count where it runs; the others read it in Python.
                device = p.device if group["fused"] else torch.device("cpu")
                self.state[p] = {"step": torch.zeros((), dtype=torch.float32, device=device)}
                self._moments[p] = self._to_host(p, torch.zeros), self._to_host(p, torch.zeros)

    @staticmethod
    def _to_host(p: Tensor, make: Callable[..., Tensor]) -> Tensor:
        moment = make(p.shape, dtype=p.dtype, device=host_of(p))
        page_lock(moment, p.device)
        return moment

    def _buckets(self) -> Iterator[_Bucket]:
        """Slices of parameters that have a gradient; each bucket is of one group and one dtype."""
        for group in self.param_groups:
            bucket = _Bucket(group)
            for p in group["params"]:
                if p.grad is None:
                    continue
                for start in range(0, p.numel(), BUCKET_ELEMENTS):
                    stop = min(start + BUCKET_ELEMENTS, p.numel())
                    first = bucket.slices[0].parameter if bucket.slices else p
                    alike = (first.device, first.dtype) == (p.device, p.dtype)
                    if bucket.slices and (bucket.elements + stop - start > BUCKET_ELEMENTS or not alike):
                        yield bucket
                        bucket = _Bucket(group)
                    bucket.slices.append(_Slice(p, start, stop, bucket.elements))
                    bucket.elements += -(-(stop - start) // ALIGNMENT) * ALIGNMENT
            if bucket.slices:
                yield bucket

    def _stream(self, buckets: list[_Bucket], device: torch.device, dtype: torch.dtype) -> None:
        arriving, leaving = lanes(device)
        size = max(bucket.elements for bucket in buckets)
        slots = [
            _Slot(torch.empty(2, size, dtype=dtype, device=device), Mark.now(device))
            for _ in range(min(SLOTS, len(buckets)))
        ]
        for k, bucket in enumerate(buckets):
            slot = slots[k % len(slots)]
            views = [
                [moments[s.offset : s.offset + s.stop - s.start] for s in bucket.slices] for moments in slot.moments
            ]
            for on_gpu, on_host in self._pairs(bucket, views):
                arrived = arriving.copy(on_host, on_gpu, after=slot.emptied)
            arrived.hold_computation()
            self._update(bucket, *views)
            updated = Mark.now(device)
            for on_gpu, on_host in self._pairs(bucket, views):
                slot.emptied = self._left = leaving.copy(on_gpu, on_host, after=updated)
        self._left.hold_computation()  # or its next tensors would be laid over slots that are still read

    def _pairs(self, bucket: _Bucket, views: list[list[Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        for which, on_gpu in enumerate(views):
            for s, view in zip(bucket.slices, on_gpu, strict=True):
                yield view, self._moments[s.parameter][which].view(-1)[s.there]

    def _update(self, bucket: _Bucket, exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor]) -> None:
        group = bucket.group
        # Each call counts a step: of a parameter in several slices, only that of the last is the parameter's own.
        counts = [
            count if s.stop == s.parameter.numel() else count.clone()
            for s in bucket.slices
            for count in (self.state[s.parameter]["step"],)
        ]
        adamw(
            [s.parameter.view(-1)[s.there] for s in bucket.slices],
            [s.parameter.grad.view(-1)[s.there] for s in bucket.slices],  # type: ignore[union-attr]
            exp_avgs,
            exp_avg_sqs,
            [],
            counts,
            foreach=group["foreach"],
            fused=group["fused"],
            # A fused optimizer is handed these by GradScaler, and skips an overflow inside its kernel.
            grad_scale=getattr(self, "grad_scale", None),
            found_inf=getattr(self, "found_inf", None),
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
        )

    def state_dict(self) -> dict[str, Any]:
        """AdamW's state_dict. The moments in it are the optimizer's own, in host memory."""
        self._left.wait()
        state_dict = super().state_dict()
        for index, p in enumerate(self._parameters()):
            if p in self._moments:
                state_dict["state"][index] |= dict(zip(MOMENTS, self._moments[p], strict=True))
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state_dict of this or of AdamW. No moment touches the GPU."""
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        moments = {index: [state.get(name) for name in MOMENTS] for index, state in state_dict["state"].items()}
        counts = {index: {"step": state["step"]} for index, state in state_dict["state"].items()}
        super().load_state_dict({**state_dict, "state": counts})
        self._left.wait()
        self._moments = {
            p: tuple(self._loaded(p, moment) for moment in moments[index])  # type: ignore[misc]
            for index, p in zip(indices, self._parameters(), strict=True)
            if index in moments
        }

    @staticmethod
    def _loaded(p: Tensor, moment: Tensor) -> Tensor:
        on_host = moment.detach().to(host_of(p), p.dtype).contiguous()
        page_lock(on_host, p.device)
        return on_host

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]


class HostResidentAdamW(HostAdamW):
    """HostAdamW for parameters and gradients that are in host memory themselves: nothing travels.

    Not torch.optim.AdamW, whose state Lightning would move to the GPU when it loads a checkpoint.
    """

    def _stream(self, buckets: list[_Bucket], device: torch.device, dtype: torch.dtype) -> None:
        for bucket in buckets:
            exp_avgs, exp_avg_sqs = (
                [self._moments[s.parameter][which].view(-1)[s.there] for s in bucket.slices] for which in (0, 1)
            )
            self._update(bucket, exp_avgs, exp_avg_sqs)
            # A fused kernel leaves no trace on the weights, whose copies on the GPU are to be made anew.
            increment_version([s.parameter for s in bucket.slices])
