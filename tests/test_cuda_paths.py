"""The substitution against PyTorch's own lists, and against its own CUDA kernels where those can be made to speak."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from nanogpt_lit.plan import cuda_paths as substitution
from nanogpt_lit.plan.cuda_paths import cuda_paths

HEADER = Path(torch.__path__[0]) / "include/ATen/autocast_mode.h"


def of_the_header(name):
    """The operations of one of PyTorch's lists, as it ships it."""
    text = HEADER.read_text().replace("\\\n", " ")
    body = re.search(rf"#define {name}\(_\)(.*)", text)[1]
    return {re.sub(r",\s*", ".", entry) for entry in re.findall(r"_\(([^()]*)\)", body)}


def registered(key):
    """The operations that PyTorch's dispatcher has an autocast kernel for."""
    return {
        name.removeprefix("aten::").removesuffix(".")
        for name in torch._C._dispatch_get_registrations_for_dispatch_key(key)
        if name.startswith("aten::")
    }


# What no language model does.
IMAGES = re.compile("upsample|conv|gru|lstm|rnn|scaled_dot_product_flash|linalg_matrix_norm")


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (substitution.FLOAT32, "AT_FORALL_FP32"),
        (substitution.FLOAT32_UNLESS_NAMED, "AT_FORALL_FP32_SET_OPT_DTYPE"),
        (substitution.LOWER_PRECISION, "AT_FORALL_LOWER_PRECISION_FP"),
    ],
)
def test_the_lists_are_those_of_pytorch_less_what_processors_have_too(ours, theirs):
    expected = {name for name in of_the_header(theirs) - registered("AutocastCPU") if not IMAGES.search(name)}
    assert set(ours) == expected
    assert expected <= registered("AutocastCUDA")


def test_what_is_left_alone_is_on_the_list_of_processors_only():
    assert set(substitution.LEFT_ALONE) <= registered("AutocastCPU") - registered("AutocastCUDA")


def test_afterwards_everything_is_as_before():
    def observed():
        x = torch.randn(4, 8, dtype=torch.bfloat16)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            normed = F.layer_norm(x, (8,))
            loss = F.cross_entropy(x, torch.zeros(4, dtype=torch.int64))
        return normed.dtype, loss.dtype, torch.softmax(x, -1).dtype

    before = observed()
    with cuda_paths():
        assert observed() != before
    assert observed() == before


def test_a_cross_entropy_of_16_bit_logits_keeps_a_16_bit_softmax():
    with FakeTensorMode(), cuda_paths(), torch.autocast("cpu", dtype=torch.float16):
        logits = torch.zeros(8, 100, dtype=torch.float16, requires_grad=True)
        loss = F.cross_entropy(logits, torch.zeros(8, dtype=torch.int64))
    assert loss.dtype == torch.float32
    (saved,) = {node.name() for node, _ in loss.grad_fn.next_functions[0][0].next_functions}
    assert saved == "LogSoftmaxBackward0"  # the loss casts what the softmax gave


def test_dropout_keeps_a_mask_of_bytes():
    with FakeTensorMode(), cuda_paths():
        x = torch.zeros(64, 64, requires_grad=True)
        assert F.dropout(x, 0.1).grad_fn._saved_result1.dtype == torch.bool
        assert F.dropout(x, 0.1, training=False) is x


def test_an_rms_norm_of_16_bits_keeps_its_input_and_a_number_a_row():
    with FakeTensorMode(), cuda_paths():
        x = torch.zeros(4, 8, 64, dtype=torch.bfloat16, requires_grad=True)
        y = F.rms_norm(x, (64,))
        kept = [tensor for tensor in y.grad_fn.saved_tensors if tensor is not None]
        assert [(tensor.dtype, tensor.numel()) for tensor in kept] == [(torch.bfloat16, 2048), (torch.float32, 32)]
        assert y.dtype == torch.bfloat16
        y.sum().backward()
        assert x.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("D", [64, 20])
def test_attention_saves_what_flash_attention_saves(D):
    with FakeTensorMode(), cuda_paths(), torch.autocast("cpu", dtype=torch.float16):
        q = torch.zeros(2, 3, 16, D, requires_grad=True)
        y = F.scaled_dot_product_attention(q, q, q, is_causal=True)
        node = y.grad_fn if D == 64 else y.grad_fn.next_functions[0][0]
    assert y.shape == q.shape
    assert node.name() == "ScaledDotProductFlashAttentionBackward0"
    assert node._saved_query.shape[-1] % 8 == 0  # PyTorch pads what the kernel cannot take
    assert node._saved_logsumexp.shape == (2, 3, 16)


def test_float32_attention_is_memory_efficient():
    with FakeTensorMode(), cuda_paths():
        q = torch.zeros(2, 3, 16, 8, requires_grad=True)
        y = F.scaled_dot_product_attention(q, q, q, is_causal=True)
    assert y.grad_fn.name() == "ScaledDotProductEfficientAttentionBackward0"


# PyTorch's CUDA autocast kernels are in builds without CUDA too. With the guard of the Meta device in the place of
# CUDA's, fake CUDA tensors run forward through them; attention's choice of a kernel is missing and is made by hand.
ORACLE = """
import ctypes, sys
from pathlib import Path
import torch, torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from nanogpt_lit.gpt.gpt2 import GPT, GPTConfig
from nanogpt_lit.plan.cuda_paths import cuda_paths

class Log(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.lines = []
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is not torch.ops.prim.device.default:
            outs = [(str(t.dtype), tuple(t.shape)) for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
            self.lines.append(f"{func} {outs}")
        return result

def forward(device, dtype, dropout, loss):
    torch.set_default_device(device)
    with FakeTensorMode():
        gpt = GPT(GPTConfig(block_size=32, vocab_size=100, n_layer=2, n_head=2, n_embd=32, dropout=dropout))
        tokens = torch.zeros(4, 32, dtype=torch.int64)
        torch.set_autocast_enabled(device, True)
        torch.set_autocast_dtype(device, dtype)
        torch.set_autocast_cache_enabled(False)
        with Log() as log:
            loss(gpt, tokens)
        torch.set_autocast_enabled(device, False)
    torch.set_default_device(None)
    return log.lines

def ours(gpt, tokens):
    return gpt.loss(tokens, tokens)

def nanogpt(gpt, tokens):
    return F.cross_entropy(gpt(tokens).flatten(0, 1), tokens.flatten())

cases = [(dtype, dropout, loss) for dtype in (torch.float16, torch.bfloat16) for dropout in (0.0, 0.1)
         for loss in (ours, nanogpt)]
with cuda_paths():
    traced = [forward("cpu", *case) for case in cases]

lib = ctypes.CDLL(str(Path(torch.__path__[0]) / "lib/libc10.so"))
guards = (ctypes.c_void_p * 20).in_dll(lib, "_ZN3c104impl26device_guard_impl_registryE")
guards[1] = guards[14]  # DeviceType CUDA = 1, Meta = 14

def flash(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False):
    dtype = torch.get_autocast_dtype("cuda")
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal)[0]

F.scaled_dot_product_attention = flash
for case, lines in zip(cases, traced):
    truth = forward("cuda", *case)
    ignored = ("aten.slice", "aten.alias")  # views that the hand-made choice does not make
    truth, lines = ([line for line in log if not line.startswith(ignored)] for log in (truth, lines))
    for i, (a, b) in enumerate(zip(truth, lines)):
        if a != b:
            sys.exit(f"{case}: operation {i} is {a} on CUDA and {b} here")
    if len(truth) != len(lines):
        sys.exit(f"{case}: {len(truth)} operations on CUDA, {len(lines)} here")
    print(case[0], len(lines), "operations alike")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reaches into libc10.so")
def test_the_forward_pass_is_operation_for_operation_that_of_cudas_autocast():
    answer = subprocess.run([sys.executable, "-W", "ignore", "-c", ORACLE], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr[-2000:]
    assert answer.stdout.count("operations alike") == 8


@pytest.mark.parametrize("softmax", [F.softmax, F.log_softmax])
def test_softmax_from_float16_to_float32_is_one_kernel(softmax):
    with FakeTensorMode(), cuda_paths():
        x = torch.zeros(8, 16, dtype=torch.float16, requires_grad=True)
        y = softmax(x, dim=-1, dtype=torch.float32)
        assert y.dtype == torch.float32
        (source,) = {node for node, _ in y.grad_fn.next_functions}
        assert source.name() == "torch::autograd::AccumulateGrad"  # no cast between
