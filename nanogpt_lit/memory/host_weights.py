"""Weights, gradients and the optimizer in host memory; on the GPU, the copies that it computes with.

The parameters of the network stay in host memory, in float32. Their gradients, the optimizer's state and the
checkpoint are there with them, and clipping, accumulation, a GradScaler and a schedule meet ordinary tensors. For a
product of matrices the GPU gets a copy in the dtype that autocast computes in, the one that autocast would make, and
the gradient leaves the GPU as it is made. A copy is kept on the GPU until the weight changes (2 of 16 bytes a
parameter), or streamed: fetched when it is used, in forward and in backward, the next one while this one is used.

What stays the same to the bit: losses, activations and every gradient but that of the token embedding, which the
CPU sums in its own order. The global norm and the update are computed by the CPU's kernels: the same bits
as a run on the CPU, and up to rounding those of a GPU.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogpt_lit.gpt.layers import RMSNorm, rms_norm
from nanogpt_lit.gpt.loss import ChunkedCrossEntropy, chunked_cross_entropy, cross_entropy
from nanogpt_lit.memory.host import Mark, empty_on_host, lanes, page_lock
from nanogpt_lit.memory.techniques import recomputed


@dataclass
class _Copy:
    tensor: Tensor
    version: int
    """The version of the weight that it was made of."""
    arrived: Mark = field(default_factory=Mark)
    """Event of this copy's arrival on the GPU, or of the latest one made of it."""

    def is_of(self, version: int, dtype: torch.dtype, device: torch.device) -> bool:
        return (self.version, self.tensor.dtype, self.tensor.device) == (version, dtype, device)


class HostWeights:
    """Copies of one network's weights on the GPU."""

    def __init__(self) -> None:
        self._kept: dict[nn.Parameter, _Copy] = {}  # on the GPU
        self._cast: dict[nn.Parameter, _Copy] = {}  # in host memory, in the dtype that is computed in
        self._ahead: tuple[nn.Parameter, _Copy] | None = None  # on its way to the GPU
        self._follows: dict[tuple[nn.Parameter, bool], nn.Parameter] = {}  # as learnt from the last time
        self._latest: tuple[nn.Parameter, bool] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Copies are not copied along with a network: its own are made when it computes."""
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]

    def fetch(self, weight: nn.Parameter, device: torch.device, keep: bool) -> Tensor:
        """The weight on the device, in the dtype that autocast computes with; gradients go to the weight.

        keep: leave the copy on the GPU until the weight changes
        """
        dtype = computed_in(weight, device)
        copy = (self._keep if keep else self._stream)(weight, dtype, device)
        if not (torch.is_grad_enabled() and weight.requires_grad):
            return copy
        return self.bind(weight, copy)

    def bind(self, weight: nn.Parameter, copy: Tensor) -> Tensor:
        """copy, on the GPU and of any dtype, as a stage of the graph: its gradient is sent to the weight."""
        arrival = _Arrival()
        at_host = _HostEnd.apply(weight, copy.dtype, arrival)
        return _DeviceEnd.apply(at_host, copy, arrival)

    def _keep(self, weight: nn.Parameter, dtype: torch.dtype, device: torch.device) -> Tensor:
        copy = self._kept.get(weight)
        if copy is None or not copy.is_of(weight._version, dtype, device):
            alike = copy is not None and (copy.tensor.dtype, copy.tensor.device) == (dtype, device)
            into = copy.tensor if copy is not None and alike else torch.empty(weight.shape, dtype=dtype, device=device)
            arriving, _ = lanes(device)
            arriving.send(empty_on_host(into).copy_(weight.detach()), into).hold_computation()
            self._kept[weight] = copy = _Copy(into, weight._version)
        return copy.tensor

    def _stream(self, weight: nn.Parameter, dtype: torch.dtype, device: torch.device) -> Tensor:
        copy = self._arriving(weight, dtype, device) or self._depart(weight, dtype, device)
        copy.arrived.hold_computation()
        in_backward = torch._C._current_graph_task_id() != -1
        if self._latest is not None:
            self._follows[self._latest] = weight
        self._latest = weight, in_backward
        following = self._follows.get(self._latest)
        if following is not None and following is not weight:  # one that is here need not wait for its next turn
            self._ahead = following, self._depart(following, computed_in(following, device), device)
        return copy.tensor

    def _arriving(self, weight: nn.Parameter, dtype: torch.dtype, device: torch.device) -> _Copy | None:
        if self._ahead is None:
            return None
        (expected, copy), self._ahead = self._ahead, None
        if expected is weight and copy.is_of(weight._version, dtype, device):
            return copy
        copy.arrived.hold_computation()  # or its place on the GPU would be given away while it is written to
        return None

    def _depart(self, weight: nn.Parameter, dtype: torch.dtype, device: torch.device) -> _Copy:
        version = weight._version
        if dtype == weight.dtype:
            page_lock(weight, device)
            return self._send(weight.detach(), version, torch.empty(weight.shape, dtype=dtype, device=device))
        cast = self._cast.get(weight)
        if cast is None or cast.tensor.dtype != dtype:
            cast = self._cast[weight] = _Copy(weight.detach().to(dtype), version)
            page_lock(cast.tensor, device)
        elif cast.version != version:
            cast.arrived.wait()  # what was made of it is still being read
            cast.tensor.copy_(weight.detach())
            cast.version = version
        copy = self._send(cast.tensor, version, torch.empty(weight.shape, dtype=dtype, device=device))
        cast.arrived = copy.arrived
        return copy

    @staticmethod
    def _send(source: Tensor, version: int, into: Tensor) -> _Copy:
        arriving, _ = lanes(into.device)
        return _Copy(into, version, arriving.copy(source, into, after=Mark.now(into.device)))


def computed_in(weight: Tensor, device: torch.device) -> torch.dtype:
    """The dtype that a product on the device takes a matrix in. Vectors are cast on the GPU: it takes both kinds."""
    if weight.dim() < 2 or not torch.is_autocast_enabled(device.type):
        return weight.dtype
    return torch.get_autocast_dtype(device.type)


# The way of a gradient, in two stages of the graph. The engine runs the first on the GPU's thread, which only sends
# the gradient off, and the second on the CPU's, which waits for it: the GPU computes on meanwhile.


@dataclass
class _Arrival:
    mark: Mark = field(default_factory=Mark)


class _HostEnd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, dtype: torch.dtype, arrival: _Arrival) -> Tensor:
        """Stands for the weight in the graph: its shape, the dtype of its gradient, and no memory."""
        ctx.arrival, ctx.dtype = arrival, weight.dtype
        return weight.new_empty((), dtype=dtype).expand(weight.shape)

    @staticmethod
    def backward(ctx: Any, d_weight: Tensor) -> tuple[Tensor | None, ...]:
        ctx.arrival.mark.wait()
        return d_weight.to(ctx.dtype), None, None


class _DeviceEnd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, at_host: Tensor, copy: Tensor, arrival: _Arrival) -> Tensor:
        ctx.arrival = arrival
        return copy.detach()

    @staticmethod
    def backward(ctx: Any, d_copy: Tensor) -> tuple[Tensor | None, ...]:
        at_host = empty_on_host(d_copy)
        _, leaving = lanes(d_copy.device)
        ctx.arrival.mark = leaving.send(d_copy, at_host)
        return at_host, None, None


class _HostResident(nn.Module):
    """A module whose parameters stay in host memory wherever the network is sent."""

    host: HostWeights
    keep: bool
    """True where copies of its matrix stay on the GPU."""

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        return super()._apply(lambda tensor: tensor.to(fn(tensor.new_empty(0)).dtype), recurse)

    def fetch(self, weight: Tensor, device: torch.device) -> Tensor:
        assert isinstance(weight, nn.Parameter)
        return self.host.fetch(weight, device, keep=self.keep or weight.dim() < 2)


class HostLinear(_HostResident, nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.fetch(self.bias, x.device)
        return F.linear(x, self.fetch(self.weight, x.device), bias)


class RefetchLinear(HostLinear):
    """Keeps its input for backward, and fetches its weight from host memory again."""

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return super().forward(x)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return recomputed(super().forward, x)


class HostLayerNorm(_HostResident, nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.fetch(self.bias, x.device)
        return F.layer_norm(x, self.normalized_shape, self.fetch(self.weight, x.device), bias, self.eps)


class HostRMSNorm(_HostResident, RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.fetch(self.weight, x.device), self.eps)


class HostEmbedding(_HostResident, nn.Embedding):
    """The rows are looked up in host memory, in float32, and only they travel."""

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens.to(self.weight.device)).to(tokens.device)


HOST_RESIDENT = {
    nn.Linear: HostLinear,
    nn.LayerNorm: HostLayerNorm,
    RMSNorm: HostRMSNorm,
    nn.Embedding: HostEmbedding,
}


def keep_on_host(module: nn.Module, host: HostWeights, keep: bool) -> None:
    """Makes every part of the module compute with copies of its weights; those stay where they are, in host memory."""
    resident: dict[nn.Parameter, nn.Parameter] = {}  # a tied matrix stays one
    for part in module.modules():
        if type(part) in HOST_RESIDENT or isinstance(part, _HostResident):
            part.__class__ = HOST_RESIDENT.get(type(part), type(part))
            part.host, part.keep = host, keep  # type: ignore[assignment]
            for name, weight in part.named_parameters(recurse=False):
                if hasattr(weight, "fake_device") and not weight.is_meta:  # in a trace: see memory/host.py
                    on_host = nn.Parameter(weight.detach().to("meta"), weight.requires_grad)
                    part.register_parameter(name, resident.setdefault(weight, on_host))


# The loss with a head whose weight is in host memory.


class HostHead:
    """cross_entropy or, given chunk_tokens, chunked_cross_entropy: the same bits."""

    def __init__(self, host: HostWeights, chunk_tokens: int | None) -> None:
        self.host = host
        self.chunk_tokens = chunk_tokens

    def __call__(self, hidden: Tensor, head_weight: Tensor, targets: Tensor) -> Tensor:
        assert isinstance(head_weight, nn.Parameter)
        if self.chunk_tokens is None:
            return cross_entropy(hidden, self.host.fetch(head_weight, hidden.device, keep=False), targets)
        with torch.no_grad():
            copy = self.host.fetch(head_weight, hidden.device, keep=False)
        if not torch.is_grad_enabled():
            return chunked_cross_entropy(hidden, copy, targets, self.chunk_tokens)
        device_type = hidden.device.type
        states = hidden.to(copy.dtype) if torch.is_autocast_enabled(device_type) else hidden
        # Its gradient comes in float32, and autograd wants the dtype of what it is the gradient of: that is not the
        # copy, but a tensor without memory of its own.
        for_gradient = copy.new_empty((), dtype=head_weight.dtype).expand(copy.shape)
        for_gradient = self.host.bind(head_weight, for_gradient)
        with torch.autocast(device_type, enabled=False):
            return _WithCopy.apply(states.flatten(0, 1), for_gradient, targets.flatten(), self.chunk_tokens, copy)


class _WithCopy(ChunkedCrossEntropy):
    """Computes with a copy of the head's weight, and gives the gradient to another tensor."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, states: Tensor, for_gradient: Tensor, targets: Tensor, chunk_tokens: int, copy: Tensor
    ) -> Tensor:
        return ChunkedCrossEntropy.forward(ctx, states, copy, targets, chunk_tokens)

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        return *ChunkedCrossEntropy.backward(ctx, d_loss), None
