"""The options of the modern recipe: each against an independent reference, and all with everything else."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from nanogpt_lit.data.datamodule import TokenDataModule
from nanogpt_lit.gpt.attention import KeyValueCache, Rotary
from nanogpt_lit.gpt.generate import generate
from nanogpt_lit.gpt.gpt2 import GPT, GPTConfig
from nanogpt_lit.loops.contract import LoopSettings
from nanogpt_lit.memory.techniques import MemoryConfig, apply_techniques
from nanogpt_lit.module import LitNanoGPT
from nanogpt_lit.optim.adamw import AdamWConfig
from nanogpt_lit.optim.schedule import ScheduleConfig
from nanogpt_lit.parity.record import compare
from nanogpt_lit.parity.runs import LOOPS, OVERFLOWS, Case, quiet

OPTIONS = {
    "rotary": {"positions": "rotary"},
    "qk_norm": {"qk_norm": True},
    "relu2": {"activation": "relu2"},
    "untied": {"tied_head": False},
}
MODERN = GPTConfig(
    block_size=16, vocab_size=53, n_layer=2, n_head=2, n_embd=16, bias=False, tied_head=False,
    positions="rotary", qk_norm=True, activation="relu2",
)  # fmt: skip
MUON = AdamWConfig(lr=0.01, matrices="muon", muon_lr=0.02)


def randomised(config, dtype=torch.float32):
    """With no weight at zero or one, so that a forgotten one shows."""
    torch.manual_seed(0)
    gpt = GPT(config).to(dtype)
    with torch.no_grad():
        for name, p in gpt.named_parameters():
            p.normal_(mean=1.0 if ".ln_" in name else 0.0, std=0.3)
    return gpt


def window(seed=1, B=2, T=16):
    return torch.randint(0, 53, (B, T + 1), generator=torch.Generator().manual_seed(seed)).split([T, 1], dim=1)[0]


def test_rotation_is_that_of_transformers_llama():
    config = LlamaConfig(hidden_size=32, num_attention_heads=2, rope_theta=10_000.0, max_position_embeddings=64)
    q, k = torch.randn(2, 3, 2, 20, 16, generator=torch.Generator().manual_seed(0)).unbind()
    cos, sin = LlamaRotaryEmbedding(config)(q, torch.arange(5, 25)[None])
    theirs = apply_rotary_pos_emb(q, k, cos, sin)
    rotary = Rotary(64, 16)
    for x, expected in zip((q, k), theirs, strict=True):
        # float32 angles of up to 24 radians, each good to 1e-6.
        torch.testing.assert_close(rotary(x, start=5), expected, rtol=0, atol=2e-5)


def written_out(gpt, tokens):
    """Logits of the modern network in complex numbers and explicit sums, in float64."""
    config, weights = gpt.config, dict(gpt.named_parameters())
    T, H, D = tokens.size(1), config.n_head, config.n_embd // config.n_head

    def normed(x):
        x = x - x.sum(-1, keepdim=True) / x.size(-1)
        return x / (x.pow(2).sum(-1, keepdim=True) / x.size(-1) + 1e-5).sqrt()

    def unit(x):
        return x / (x.pow(2).sum(-1, keepdim=True) / D + torch.finfo(x.dtype).eps).sqrt()

    speeds = torch.tensor([10_000.0 ** (-2 * i / D) for i in range(D // 2)])  # float32, as the network keeps its angles
    turns = torch.polar(torch.ones(T, D // 2), torch.arange(T)[:, None] * speeds).to(torch.complex128)

    def turned(x):
        z = torch.complex(x[..., : D // 2], x[..., D // 2 :]) * turns
        return torch.cat([z.real, z.imag], dim=-1)

    x = weights["transformer.wte.weight"][tokens]
    for layer in range(config.n_layer):
        of = {name.split(f".h.{layer}.")[1]: w for name, w in weights.items() if f".h.{layer}." in name}
        qkv = (normed(x) * of["ln_1.weight"]) @ of["attn.c_attn.weight"].T
        heads = []
        for h in range(H):
            q, k, v = (qkv[..., C : C + D] for C in (h * D, (H + h) * D, (2 * H + h) * D))
            scores = turned(unit(q)) @ turned(unit(k)).mT / D**0.5
            scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
            heads.append(scores.softmax(-1) @ v)
        x = x + torch.cat(heads, dim=-1) @ of["attn.c_proj.weight"].T
        inside = (normed(x) * of["ln_2.weight"]) @ of["mlp.c_fc.weight"].T
        x = x + (inside * (inside > 0)) ** 2 @ of["mlp.c_proj.weight"].T
    return (normed(x) * weights["transformer.ln_f.weight"]) @ weights["lm_head.weight"].T


def test_the_modern_network_equals_itself_written_out_in_complex_numbers():
    gpt = randomised(MODERN, torch.float64)
    # The angles are float32 on both sides, made by other functions: 1e-6 in an angle, more in what it turns.
    torch.testing.assert_close(gpt(window()), written_out(gpt, window()), rtol=1e-5, atol=1e-5)


def test_only_the_distance_of_two_tokens_counts_where_positions_are_rotary():
    # One layer: with more, the first token, which has nothing before it, differs from one that has.
    rotary = Rotary(64, 8)
    q, k = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(0)).unbind()
    near, far = ((rotary(q, start + 7) * rotary(k, start)).sum() for start in (0, 40))
    torch.testing.assert_close(near, far, rtol=1e-5, atol=1e-5)
    assert abs((rotary(q, 9) * rotary(k, 0)).sum() - near) > 1e-3


def test_rotary_positions_have_no_parameters_and_nothing_in_a_checkpoint():
    learned, rotary = GPT(replace(MODERN, positions="learned")), GPT(MODERN)
    assert set(learned.state_dict()) - set(rotary.state_dict()) == {"transformer.wpe.weight"}
    assert learned.parameter_count(non_embedding=True) == rotary.parameter_count(non_embedding=True)
    assert learned.parameter_count(non_embedding=False) - 16 * 16 == rotary.parameter_count(non_embedding=False)


@pytest.mark.parametrize("option", [*OPTIONS, "all"])
def test_cached_and_uncached_generation_agree(option):
    base = replace(MODERN, positions="learned", qk_norm=False, activation="gelu", tied_head=True)
    gpt = randomised(MODERN if option == "all" else replace(base, **OPTIONS[option]))
    prompt = window(T=5)
    # 30 tokens: the context of 16 overflows and is read again, twice.
    texts = [
        torch.stack(list(generate(gpt, prompt, 30, temperature=0.0, use_cache=use_cache)))
        for use_cache in (True, False)
    ]
    assert torch.equal(*texts)


def test_a_cache_under_autocast_keeps_16_bits():
    gpt = randomised(MODERN).eval()
    cache = KeyValueCache(2, 16)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        gpt.hidden(window(), cache)
    assert cache.layers[0].keys.dtype == cache.layers[0].values.dtype == torch.bfloat16


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
def test_memory_techniques_change_no_bit_of_the_modern_network(memory, dtype):
    plain, saving = gradients(MODERN, MemoryConfig(), dtype), gradients(MODERN, memory, dtype)
    assert [name for name, value in plain.items() if not torch.equal(value, saving[name])] == []


def test_the_loss_in_chunks_is_that_of_the_modern_network():
    plain, chunked = (gradients(MODERN, MemoryConfig(loss_chunk_tokens=n), None) for n in (None, 6))
    for name, value in plain.items():
        torch.testing.assert_close(value, chunked[name], rtol=1e-4, atol=1e-5, msg=name)  # another order of summation


def test_the_modern_network_compiles_as_one_graph():
    gpt = randomised(MODERN)
    compiled = torch.compile(gpt.loss, fullgraph=True, backend="eager")
    assert torch.equal(compiled(window(), window(2)), gpt.loss(window(), window(2)))


def test_a_checkpoint_from_before_an_option_counts_as_its_default():
    module = LitNanoGPT(GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=2, n_embd=8))
    saved = {name: v for name, v in module.hparams["gpt"].items() if name not in ("positions", "qk_norm")}
    module.on_load_checkpoint({"hyper_parameters": {"gpt": saved}})
    with pytest.raises(ValueError, match=r"model\.gpt\.positions is rotary there and learned here"):
        module.on_load_checkpoint({"hyper_parameters": {"gpt": saved | {"positions": "rotary"}}})


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"positions": "alibi"}, r"model\.gpt\.positions='alibi' .* 'rotary'"),
        ({"activation": "swish"}, r"model\.gpt\.activation='swish' .* 'relu2'"),
        ({"positions": "rotary", "n_embd": 6, "n_head": 2}, r"n_embd=6 over n_head=2 gives each head 3; n_embd=12"),
    ],
)
def test_options_that_cannot_be_are_refused_by_name(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        GPTConfig(**options)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipes")
    (folder / "text.txt").write_text("".join(f"{n} green bottles hanging on the wall.\n" for n in range(80)))
    data = TokenDataModule(
        str(folder / "text.txt"),
        "byte",
        val_fraction=0.1,
        shards_dir=str(folder / "shards"),
        block_size=8,
        batch_size=2,
    )
    data.prepare_data()
    data.setup()
    return data


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_the_three_loops_give_the_same_bits_with_the_modern_recipe(precision, data):
    quiet()
    torch.set_num_threads(1)
    case = Case(
        LoopSettings(4, 2, 0.05, precision, val_check_interval=4, limit_val_batches=2, seed=7),
        replace(MODERN, vocab_size=257, dropout=0.1),
        MUON,
        ScheduleConfig(warmup_steps=1, total_steps=4, decay="cooldown"),
        scaler=OVERFLOWS if precision == "16-mixed" else {},
    )
    runs = {name: run(case, data) for name, run in LOOPS.items()}
    for name in ("accelerate", "reference"):
        assert compare(runs["lightning"].entries, runs[name].entries) is None, name


def test_the_modern_recipe_learns():
    torch.manual_seed(0)
    module = LitNanoGPT(MODERN, MUON, ScheduleConfig(warmup_steps=2, total_steps=40))
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
