"""Every network, held by the same tests: with each memory technique, the cache, the compiler, the loops and Muon.

What a network computes is compared with transformers' own in test_model.py (GPT-2) and test_llama.py.
"""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from small_networks import randomised
from three_loops import assert_loops_agree, prepared_data

from nanogpt_lit.gpt.attention import KeyValueCache
from nanogpt_lit.gpt.generate import generate
from nanogpt_lit.gpt.gpt2 import GPTConfig
from nanogpt_lit.gpt.layers import RopeScaling
from nanogpt_lit.gpt.llama import LlamaConfig
from nanogpt_lit.gpt.network import HEAD
from nanogpt_lit.gpt.networks import NETWORKS, build, config_of, described
from nanogpt_lit.loops.contract import LoopSettings
from nanogpt_lit.memory.techniques import MemoryConfig, apply_techniques, change_techniques
from nanogpt_lit.module import LitNanoGPT
from nanogpt_lit.optim.adamw import AdamWConfig, block_matrices
from nanogpt_lit.optim.schedule import ScheduleConfig
from nanogpt_lit.parity.runs import OVERFLOWS, Case

SIZES = {"block_size": 16, "vocab_size": 53, "n_layer": 2}
CONFIGS = {
    "gpt2": GPTConfig(**SIZES, n_head=2, n_embd=16),
    "gpt2 without biases, untied": GPTConfig(**SIZES, n_head=2, n_embd=16, bias=False, tied_head=False, gelu="erf"),
    "llama": LlamaConfig(**SIZES, n_head=2, n_embd=16, tied_head=False),
    "qwen3": LlamaConfig(**SIZES, n_head=4, n_embd=24, n_kv_head=2, head_size=10, n_hidden=34, qk_norm=True),
    "llama 3": LlamaConfig(**SIZES, n_head=3, n_embd=24, n_kv_head=1, rope_scaling=RopeScaling(8, 1, 4, 8)),
}
MUON = AdamWConfig(lr=0.01, matrices="muon", muon_lr=0.02)
every_network = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def window(seed=1, B=2, T=16):
    return torch.randint(0, 53, (B, T + 1), generator=torch.Generator().manual_seed(seed)).split([T, 1], dim=1)[0]


@every_network
def test_a_network_is_what_its_description_says_it_is(config):
    assert config_of(described(config)) == config
    gpt = build(config)
    assert type(gpt) is NETWORKS[described(config)["network"]][1]
    assert len(gpt.blocks) == config.n_layer
    assert gpt.state_dict()[gpt.EMBEDDING].shape == gpt.state_dict()[HEAD].shape == (53, config.n_embd)
    assert gpt.embedding.weight is gpt.get_parameter(gpt.EMBEDDING)
    assert (gpt.lm_head.weight is gpt.embedding.weight) == config.tied_head
    assert list(gpt.children())[-1] is gpt.lm_head


@every_network
def test_a_checkpoint_of_the_module_builds_the_same_network(config):
    module = LitNanoGPT(**described(config))
    again = LitNanoGPT(**module.hparams)
    assert again.gpt.config == config
    again.load_state_dict(module.state_dict())
    again.on_load_checkpoint({"hyper_parameters": dict(module.hparams)})
    with pytest.raises(ValueError, match=r"another network: model\.\w+\.n_layer is 3 there and 2 here"):
        again.on_load_checkpoint({"hyper_parameters": described(replace(config, n_layer=3))})


def test_another_kind_of_network_is_another_network():
    module = LitNanoGPT(**described(CONFIGS["llama"]))
    with pytest.raises(ValueError, match=r"model\.network is gpt2 there and llama here"):
        module.on_load_checkpoint({"hyper_parameters": {"gpt": described(CONFIGS["gpt2"])["gpt"]}})


@pytest.mark.parametrize(
    ("saved", "said"),
    [
        ({"network": "mamba"}, r"model\.network='mamba' is not known; use gpt2 or llama"),
        ({"gpt": {"n_experts": 4}}, r"model\.gpt\.n_experts=4, which this version .* does not know"),
        ({"gpt": {"positions": "rotary"}}, r"model\.gpt\.positions=rotary, which nanogpt_lit had before 0\.2"),
        ({"gpt": {"activation": "relu2"}}, r"model\.gpt\.activation=relu2, .* use the version that wrote it"),
    ],
)
def test_what_is_no_network_of_ours_is_refused_in_a_sentence(saved, said):
    with pytest.raises(ValueError, match=said):
        config_of(saved)


def test_a_checkpoint_from_before_there_were_two_networks_counts_as_gpt2():
    before = {"n_layer": 2, "positions": "learned", "qk_norm": False, "activation": "gelu"}
    assert config_of({"gpt": before}) == GPTConfig(n_layer=2)


@every_network
def test_muon_has_the_matrices_of_the_blocks_and_nothing_else(config):
    gpt = build(config)
    expected = [p for p in gpt.blocks.parameters() if p.dim() == 2]
    found = block_matrices([(f"gpt.{name}", p) for name, p in gpt.named_parameters()])
    assert {id(p) for p in found} == {id(p) for p in expected}
    assert len(found) == len(expected)


@every_network
def test_flops_are_six_for_each_weight_that_multiplies_and_twelve_for_each_channel_of_attention(config):
    gpt = build(config)
    multiplied = sum(p.numel() for p in [*gpt.blocks.parameters(), gpt.lm_head.weight])
    norm = sum(p.numel() for name, p in gpt.named_parameters() if "ln_f" in name or name == "model.norm.weight")
    assert gpt.parameter_count(non_embedding=True) == multiplied + norm
    channels = {"qwen3": 40}.get(next(name for name, c in CONFIGS.items() if c is config), config.n_embd)
    assert gpt.flops_per_token(16) == 6 * (multiplied + norm) + 12 * 2 * channels * 16


@every_network
def test_cached_and_uncached_generation_agree(config):
    gpt = randomised(config)
    prompt = window(T=5)
    # 30 tokens: the context of 16 overflows and is read again, twice.
    texts = [
        torch.stack(list(generate(gpt, prompt, 30, temperature=0.0, use_cache=use_cache)))
        for use_cache in (True, False)
    ]
    assert torch.equal(*texts)


@every_network
def test_a_cache_under_autocast_keeps_what_16_bits_hold_in_the_float32_that_a_cpu_attends_in(config):
    gpt = randomised(config).eval()
    cache = KeyValueCache(2, 16)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        gpt.hidden(window(), cache)
    layer = cache.layers[0]
    for kept in (layer.keys[:, :, : layer.length], layer.values[:, :, : layer.length]):
        assert kept.dtype == torch.float32
        assert torch.equal(kept, kept.bfloat16().float())


def gradients(config, memory, dtype):
    gpt = randomised(config)
    apply_techniques(gpt, memory)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None, cache_enabled=False):
        loss = gpt.loss(window(), window(2))
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in gpt.named_parameters()}}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "memory",
    [
        MemoryConfig(recompute="full"),
        MemoryConfig(recompute="full", block_inputs="host"),
        MemoryConfig(recompute="selective", recast_weights=True),
        MemoryConfig(recast_weights=True),
        MemoryConfig(weights="host"),
        MemoryConfig(weights="streamed"),
    ],
    ids=["full", "inputs on host", "selective", "recast", "host weights", "streamed"],
)
@every_network
def test_memory_techniques_change_no_bit(config, memory, dtype):
    plain, saving = gradients(config, MemoryConfig(), dtype), gradients(config, memory, dtype)
    assert [name for name, value in plain.items() if not torch.equal(value, saving[name])] == []


@every_network
def test_techniques_come_and_go_while_it_trains(config):
    gpt = randomised(config)
    kinds = [type(part) for part in gpt.modules()]
    apply_techniques(gpt, MemoryConfig(recompute="full", loss_chunk_tokens=5))
    change_techniques(gpt, MemoryConfig(recompute="selective", recast_weights=True))
    assert all(type(block) is not kind for block, kind in zip(gpt.blocks, kinds, strict=False))
    change_techniques(gpt, MemoryConfig())
    assert [type(part) for part in gpt.modules()] == kinds


@every_network
def test_the_loss_in_chunks_is_the_loss(config):
    plain, chunked = (gradients(config, MemoryConfig(loss_chunk_tokens=n), None) for n in (None, 6))
    for name, value in plain.items():
        torch.testing.assert_close(value, chunked[name], rtol=1e-4, atol=1e-5, msg=name)  # another order of summation


@every_network
def test_it_compiles_as_one_graph(config):
    torch._dynamo.reset()  # it counts the networks that came before against a limit
    gpt = randomised(config)
    compiled = torch.compile(gpt.loss, fullgraph=True, backend="eager")
    assert torch.equal(compiled(window(), window(2)), gpt.loss(window(), window(2)))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepared_data(tmp_path_factory.mktemp("recipes"))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("name", ["qwen3", "llama 3"])
def test_the_three_loops_give_the_same_bits_with_the_llama_family_and_muon(name, precision, data):
    torch.set_num_threads(1)
    case = Case(
        LoopSettings(4, 2, 0.05, precision, val_check_interval=4, limit_val_batches=2, seed=7),
        replace(CONFIGS[name], vocab_size=257, dropout=0.1),
        MUON,
        ScheduleConfig(warmup_steps=1, total_steps=4, decay="cooldown"),
        scaler=OVERFLOWS if precision == "16-mixed" else {},
    )
    assert_loops_agree(case, data)


@every_network
def test_it_learns_by_muon(config):
    torch.manual_seed(0)
    module = LitNanoGPT(**described(config), optim=MUON, schedule=ScheduleConfig(warmup_steps=2, total_steps=40))
    configured = module.configure_optimizers()
    before = copy.deepcopy(module.state_dict())
    losses = []
    for _ in range(40):
        loss = module(window(), window(2))
        loss.backward()
        configured["optimizer"].step()
        configured["lr_scheduler"]["scheduler"].step()
        configured["optimizer"].zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(F.cross_entropy(torch.zeros(1, 53), torch.tensor([0])).item(), abs=0.1)
    assert losses[-1] < 1.0  # two sentences by heart
    assert all(not torch.equal(before[name], value) for name, value in module.state_dict().items())
