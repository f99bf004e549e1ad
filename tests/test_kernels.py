"""Which kernels PyTorch takes and what they hold; the numbers are what PyTorch 2.13 allocated on the fake GPU."""

from dataclasses import replace

import pytest
import torch

from nanogpt_lit.plan.kernels import Kernels
from nanogpt_lit.runtime.gpus import GPUS


def kernels(capability=(8, 6), multiprocessors=16, deterministic=False):
    return Kernels(replace(GPUS[0], capability=capability, multiprocessors=multiprocessors), deterministic)


@pytest.mark.parametrize(
    ("capability", "held"),
    [((7, 5), 8_519_680), ((8, 6), 8_519_680), ((8, 9), 8_519_680), ((9, 0), 32 << 20), ((10, 0), 32 << 20),
     ((11, 0), 8_519_680), ((12, 0), 32 << 20)],
)  # fmt: skip
def test_cublas_holds_more_since_hopper(capability, held, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    assert kernels(capability).cublas_bytes() == held


@pytest.mark.parametrize(
    ("setting", "held", "in_fixed_order"),
    [(":4096:8", 32 << 20, 32 << 20), (":16:8", 131_072, 131_072), (":4096:2:16:8", 8_519_680, 32 << 20),
     (":0:0", 0, 32 << 20), ("nonsense", 8_519_680, 32 << 20)],
)  # fmt: skip
def test_cublas_holds_what_the_environment_says_unless_that_does_not_repeat(setting, held, in_fixed_order, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", setting)
    assert kernels().cublas_bytes() == held
    assert kernels(deterministic=True).cublas_bytes() == in_fixed_order


@pytest.mark.parametrize(
    ("capability", "dtype", "D", "kernel"),
    [
        ((7, 5), torch.float16, 64, "efficient"),
        ((7, 5), torch.float32, 64, "efficient"),
        ((7, 5), torch.bfloat16, 64, "math"),
        ((8, 0), torch.float16, 200, "flash"),
        ((8, 6), torch.bfloat16, 64, "flash"),
        ((8, 6), torch.float16, 200, "efficient"),
        ((8, 6), torch.float16, 256, "flash"),
        ((8, 9), torch.float32, 64, "efficient"),
        ((12, 0), torch.float16, 200, "efficient"),
    ],
)
def test_the_kernel_of_attention_follows_from_the_gpu(capability, dtype, D, kernel):
    assert kernels(capability).attention(dtype, D, needs_grad=True) == kernel


def test_without_gradients_wide_heads_are_for_flash_attention():
    assert kernels().attention(torch.float16, 200, needs_grad=False) == "flash"


@pytest.mark.parametrize(
    ("multiprocessors", "deterministic", "held"),
    [(108, False, (196_608, 12_582_912)), (16, True, (196_608, 12_582_912)), (108, True, (196_608, 37_748_736))],
)
def test_a_fixed_order_costs_flash_attention_a_gradient_for_each_part_of_the_keys(multiprocessors, deterministic, held):
    q = torch.empty(4, 12, 1024, 64, dtype=torch.float16, device="meta")
    flash = "_scaled_dot_product_flash_attention_backward"
    assert kernels((8, 0), multiprocessors, deterministic).workspaces(flash, (q, q)) == held


def test_a_fixed_order_leaves_multiprocessors_idle():
    few, many = (torch.empty(B, 6, 256, 64, device="meta") for B in (1, 8))  # 6 and 48 heads
    flash, efficient = (f"_scaled_dot_product_{kind}_attention_backward" for kind in ("flash", "efficient"))
    assert kernels().share_at_work(flash, (few, few)) == 1.0
    ordered = kernels(deterministic=True)
    assert ordered.share_at_work(flash, (few, few)) == 18 / 32  # in 3 parts each
    assert ordered.share_at_work(efficient, (few, few)) == 6 / 16
    assert ordered.share_at_work(flash, (many, many)) == 1.0
    assert ordered.share_at_work("mm", (few, few)) == 1.0
