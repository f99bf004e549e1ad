"""What a training step holds on a card, traced without nanogpt_lit.plan: CUDA's code paths in Python, by hand.

PyTorch's FakeTensorMode runs the module; what CUDA does otherwise than a processor is put in the place of functions of
torch and torch.nn.functional, from reading PyTorch's CUDA sources: autocast's float32 operations, FlashAttention and
memory-efficient attention with their saved tensors and workspaces, masks of bytes, the fused RMS norm. The numbers are
those of a card since Ampere and before Hopper.
"""

import weakref
from contextlib import contextmanager, nullcontext
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.amp import GradScaler
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nanogpt_lit.gpt.networks import described
from nanogpt_lit.memory.techniques import MemoryConfig
from nanogpt_lit.module import LitNanoGPT
from nanogpt_lit.optim import muon

MIB = 2**20
HALVES = (torch.float16, torch.bfloat16)
DTYPES = {  # of autocast, of weights
    "32-true": (None, torch.float32), "16-mixed": (torch.float16, torch.float32),
    "bf16-mixed": (torch.bfloat16, torch.float32), "16-true": (None, torch.float16),
    "bf16-true": (None, torch.bfloat16),
}  # fmt: skip


class Card(TorchDispatchMode):
    """Bytes on the card ("cpu") and in host memory ("meta"); the fullest moment of each phase."""

    def __init__(self):
        super().__init__()
        self.phase, self.peaks = "setup", {}
        self.on_card = self.on_host = self.most_on_host = 0
        self.alive, self.with_cublas, self.count = {}, set(), 0

    def add(self, size):
        self.on_card += size
        self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), self.on_card)

    def use(self, size):
        """A kernel's own memory, while it runs."""
        size = -(-size // 512) * 512
        self.add(size)
        self.on_card -= size

    def follow(self, tensors):
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key in self.alive or size == 0:
                continue
            self.count += 1
            release = weakref.ref(storage, lambda _, key=key, count=self.count: self.release(key, count))
            if tensor.device.type == "meta":
                self.on_host += size
                self.most_on_host = max(self.most_on_host, self.on_host)
            else:
                size = -(-size // 512) * 512
                self.add(size)
            self.alive[key] = (self.count, size, tensor.device.type, release)

    def release(self, key, count):
        if key in self.alive and self.alive[key][0] == count:
            _, size, place, _ = self.alive.pop(key)
            if place == "meta":
                self.on_host -= size
            else:
                self.on_card -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        if name == "_local_scalar_dense":
            return 1.0
        if name in ("mm", "addmm", "bmm", "baddbmm") and (thread := self.phase == "backward") not in self.with_cublas:
            self.with_cublas.add(thread)
            self.add(8_519_680)
        # The engine adds up gradients in place; under a mode it holds more references, and does not.
        if name == "add" and self.phase == "backward" and not torch.is_grad_enabled() and torch.is_tensor(args[1]):
            same = (args[0].shape, args[0].dtype) == (args[1].shape, args[1].dtype)
            function = torch.ops.aten.add_.Tensor if same and args[0].is_contiguous() else function
        result = function(*args, **(kwargs or {}))
        self.follow(leaf for leaf in tree_leaves(result) if torch.is_tensor(leaf))
        if name == "embedding_dense_backward" and args[0].device.type == "cpu" and (tokens := args[1].numel()) > 3072:
            rows = min(tokens, args[2])
            parts = tokens // 10 + rows
            self.use(4 * parts * args[0].size(-1) + 8 * (3 * tokens + 2 * rows + parts))
        self.add(0)
        return result


def autocasts():
    return torch.is_autocast_enabled("cpu")


def in_float32(function):
    """As autocast runs an operation of its float32 list."""

    def run(*args, **kwargs):
        if not autocasts():
            return function(*args, **kwargs)
        floats = [a.float() if torch.is_tensor(a) and a.is_floating_point() else a for a in args]
        with torch.autocast("cpu", enabled=False):
            return function(*floats, **kwargs)

    return run


def dropout(x, p=0.5, training=True, inplace=False):
    return torch.native_dropout(x, p, True)[0] if training and p > 0 else x


def softmax_of(softmax):
    def run(x, dim=-1, dtype=None):
        one_kernel = (x.dtype, dtype) == (torch.float16, torch.float32)
        return torch.empty_like(x, dtype=dtype) if one_kernel else softmax(x, dim, dtype=dtype)

    return run


class LayerNorm(torch.autograd.Function):
    """Of 16 bits: the statistics are float32."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        statistics = [torch.empty(x.shape[:-1], dtype=torch.float32) for _ in range(2)]
        ctx.save_for_backward(x, weight, bias, *statistics)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, dy):
        return tuple(None if tensor is None else torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def layer_norm_of(layer_norm):
    def run(x, shape, weight=None, bias=None, eps=1e-5):
        if x.dtype in HALVES and not autocasts():
            return LayerNorm.apply(x, weight, bias)
        return in_float32(layer_norm)(x, shape, weight, bias, eps)

    return run


class RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        held = x.contiguous()
        ctx.save_for_backward(x, weight, torch.empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(held)

    @staticmethod
    def backward(ctx, dy):
        x, weight, _ = ctx.saved_tensors
        held = x.contiguous(), dy.contiguous()
        return torch.empty_like(held[0]), torch.empty_like(weight)


def attention_on(card):
    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v):
            B, H, T, D = q.shape
            flash = q.dtype in HALVES
            y = torch.empty_like(q) if flash else torch.empty(B, T, H, D, dtype=q.dtype).transpose(1, 2)
            sums = torch.empty(B, H, T if flash else -(-T // 32) * 32, dtype=torch.float32)
            ctx.save_for_backward(q, k, v, y, sums)
            return y

        @staticmethod
        def backward(ctx, dy):
            q, k, v, *_ = ctx.saved_tensors
            B, H, T, D = q.shape
            if q.dtype in HALVES:
                gradients = [torch.empty_like(tensor) for tensor in (q, k, v)]
                rows, unit = -(-T // 128) * 128, 32 if D <= 128 else 64
                card.use(B * H * rows * (-(-D // unit) * unit + 1) * 4)
            else:
                gradients = [torch.empty(B, T, H, D, dtype=q.dtype).transpose(1, 2) for _ in range(3)]
                card.use(B * H * T * (D + 1) * 4)  # (dy * y).sum(-1)
                card.use(B * H * (T * 4 + -(-T // 64) * -(-D // 64) * (64 * 64 * 4 + 16)))
            return tuple(gradients)

    def attend(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False):
        D = q.size(-1)
        if autocasts():
            q, k, v = (tensor.to(torch.get_autocast_dtype("cpu")) for tensor in (q, k, v))
        if D % 8 and q.dtype in HALVES:
            q, k, v = (F.pad(tensor, (0, 8 - D % 8)) for tensor in (q, k, v))
        y = Attention.apply(q, k, v)
        return y[..., :D] if y.size(-1) != D else y

    return attend


def orthogonalised(matrices):
    """Of Muon, in bfloat16 where they are on the card."""
    on_card = matrices.device.type == "cpu"
    x = matrices.to(torch.bfloat16) if on_card else matrices
    x = x.mT if x.size(1) > x.size(2) else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    oblong = x.size(2) >= 2 * x.size(1)
    x = muon._rounds_in_gram_space(x) if oblong and not on_card else muon._rounds(x)
    return x.mT if matrices.size(1) > matrices.size(2) else x


@contextmanager
def as_on_cuda(card):
    changed = [
        (F, "layer_norm", layer_norm_of(F.layer_norm)),
        (F, "rms_norm", lambda x, shape, weight, eps: RMSNorm.apply(x.float() if autocasts() else x, weight)),
        (F, "dropout", dropout),
        (F, "scaled_dot_product_attention", attention_on(card)),
        (torch, "softmax", softmax_of(torch.softmax)),
        (torch.Tensor, "square", in_float32(torch.Tensor.square)),
        (muon, "orthogonalised", orthogonalised),
    ]
    with FakeTensorMode(allow_non_fake_inputs=True):
        for place, name, function in changed:
            patch = mock.patch.object(place, name, function)
            patch.start()
        try:
            yield
        finally:
            mock.patch.stopall()


def traced(gpt, optim, memory, batch_size, accumulate, precision, clips, lightning, validates):
    """The Card after three steps of two micro-batches at most, and a validation."""
    autocast_dtype, weight_dtype = DTYPES[precision]
    tokens = torch.zeros(batch_size, gpt.block_size, dtype=torch.int64)
    card = Card()

    def loss_of(lit):
        here = nullcontext()
        if autocast_dtype is not None:
            here = torch.autocast("cpu", autocast_dtype, cache_enabled=False)
        with here:
            return lit(torch.zeros_like(tokens), torch.zeros_like(tokens))

    with as_on_cuda(card):
        torch.set_default_dtype(weight_dtype)
        try:
            lit = LitNanoGPT(**described(gpt), optim=optim, memory=MemoryConfig(**memory))
        finally:
            torch.set_default_dtype(torch.float32)
        for part in lit.modules():
            for name, buffer in list(part._buffers.items()):
                part._buffers[name] = buffer.to(weight_dtype)
        with card:
            card.follow([*lit.parameters(), *lit.buffers()])
            card.most_on_host = max(card.on_card, card.on_host)  # a network is made in host memory
            optimizer = lit.configure_optimizers()["optimizer"]
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            for _ in range(3):
                scaler = GradScaler("cpu", enabled=precision == "16-mixed")
                for micro_batch in range(min(accumulate, 2)):
                    card.phase = "forward"
                    loss = loss_of(lit)
                    if lightning and micro_batch == 0:
                        optimizer.zero_grad()
                    card.phase = "backward"
                    scaler.scale(loss / accumulate).backward()
                    loss = loss.detach()
                card.phase = "optimizer"
                scaler.unscale_(optimizer)
                if clips:
                    nn.utils.clip_grad_norm_(parameters, 1.0, foreach=parameters[0].device.type == "cpu")
                optimizer.step()
                if not lightning:
                    optimizer.zero_grad()
            if validates:
                card.phase = "validation"
                lit.eval()
                with torch.no_grad():
                    loss_of(lit)
    return card
