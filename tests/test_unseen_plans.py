"""The plan of configurations that are in no YAML, against a trace that shares no code with it."""

import pytest
from cuda_by_hand import MIB, traced

from nanogpt_lit.gpt.gpt2 import GPTConfig
from nanogpt_lit.gpt.llama import LlamaConfig
from nanogpt_lit.gpt.networks import described
from nanogpt_lit.memory.techniques import MemoryConfig
from nanogpt_lit.module import LitNanoGPT
from nanogpt_lit.optim.adamw import AdamWConfig
from nanogpt_lit.plan.step import StepShape, trace_steps
from nanogpt_lit.tune.trials import MODERN


def gpt(block_size, vocab_size, n_layer, n_head, n_embd, kind=GPTConfig, **more):
    return kind(block_size, vocab_size, n_layer, n_head, n_embd, **more)


QWEN3 = {"qk_norm": True, "n_kv_head": 4}
ADAMW, MUON = AdamWConfig(), AdamWConfig(**MODERN["optim"])
FULL, LEAN = {"recompute": "full"}, {"recompute": "full", "block_inputs": "host", "loss_chunk_tokens": 777}

# network, optimizer, memory, batch, accumulation, precision, clips, Lightning drives, validates
QUICK = {
    "one layer, in float32": (
        gpt(96, 257, 1, 10, 640), ADAMW, FULL, 32, 3, "32-true", True, True, True),
    "heads of 40 and dropout": (
        gpt(96, 32000, 2, 16, 640, dropout=0.1), ADAMW, {}, 7, 5, "16-mixed", False, False, True),
    "heads of 160": (
        gpt(2048, 257, 1, 2, 320), ADAMW, FULL, 3, 1, "bf16-mixed", True, True, False),
    "many tokens, the rest in host memory": (
        gpt(512, 8000, 1, 5, 640), ADAMW, LEAN | {"optimizer_state": "host"}, 16, 1, "16-mixed", True, False, False),
    "shared and normed keys in 16 bits": (
        gpt(512, 1000, 2, 8, 512, LlamaConfig, **QWEN3), MUON, {}, 3, 2, "bf16-true", True, True, True),
    "Muon, the fullest": (
        gpt(32, 257, 2, 16, 1024, LlamaConfig, qk_norm=True), MUON, {}, 1, 1, "16-mixed", True, False, True),
    "weights in host memory": (
        gpt(512, 5000, 2, 8, 512), ADAMW, LEAN | {"weights": "host"}, 3, 3, "16-mixed", True, True, True),
}  # fmt: skip
SLOW = {
    "thirty layers, every third recomputed": (
        gpt(512, 32000, 30, 10, 400), ADAMW, FULL | {"recompute_every": 3}, 3, 1, "bf16-mixed", True, True, True),
    "a long block, a wide vocabulary": (
        gpt(2048, 100277, 4, 6, 768, bias=False), ADAMW, {"loss_chunk_tokens": 333}, 1, 16, "16-mixed", True, True,
        True),
    "modern, selective": (
        gpt(1024, 32000, 4, 12, 768, LlamaConfig, rope_base=1e5), MUON,
        {"recompute": "selective", "recast_weights": True, "loss_chunk_tokens": 900}, 4, 3, "16-mixed", True, False,
        True),
    "modern, streamed": (
        gpt(512, 32000, 3, 8, 512, LlamaConfig, **QWEN3), MUON, {"weights": "streamed", "loss_chunk_tokens": 128}, 2, 2,
        "bf16-mixed", False, True, True),
    "untied, in bfloat16": (
        gpt(512, 32000, 3, 8, 512, tied_head=False), ADAMW, {"loss_chunk_tokens": 700}, 7, 3, "bf16-true", False, True,
        True),
    "in float16": (gpt(512, 32000, 3, 8, 512), ADAMW, {}, 3, 1, "16-true", True, True, False),
    "a block of 4096": (gpt(4096, 257, 2, 10, 640), ADAMW, {"recompute": "selective"}, 1, 1, "bf16-mixed", True, True,
        True),
}  # fmt: skip


MARKED = dict.fromkeys(SLOW, pytest.mark.slow) | {
    "thirty layers, every third recomputed": pytest.mark.long,
    "modern, streamed": pytest.mark.long,
}


@pytest.mark.parametrize("case", [*QUICK, *(pytest.param(name, marks=mark) for name, mark in MARKED.items())])
def test_the_peak_its_phase_and_the_host_memory_are_those_of_a_trace_by_hand(case):
    network, optim, memory, batch_size, accumulate, precision, clips, lightning, validates = (QUICK | SLOW)[case]
    shape = StepShape(
        batch_size, network.block_size, network.vocab_size, accumulate, precision, clips, lightning, validates
    )
    planned = trace_steps(lambda: LitNanoGPT(**described(network), optim=optim, memory=MemoryConfig(**memory)), shape)
    by_hand = traced(*(QUICK | SLOW)[case])
    # Single numbers, each a block of 512 bytes, live longer in one of them.
    for phase in ("forward", "backward", "optimizer", *(["validation"] if validates else [])):
        assert planned.peaks[phase].bytes / MIB == pytest.approx(by_hand.peaks[phase] / MIB, rel=0.003), phase
    assert planned.peak.phase == max(by_hand.peaks, key=by_hand.peaks.get)
    weights = planned.peak.bytes_by_category.get("weights", 0)
    assert max(planned.host_peak_bytes, weights) == pytest.approx(by_hand.most_on_host, rel=0.003)
