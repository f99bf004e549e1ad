"""The Llama family against transformers' own, against itself written out in complex numbers, and its settings."""

import math

import pytest
import torch
import torch.nn.functional as F
from small_networks import randomised
from torch import nn
from transformers import LlamaConfig as TheirLlamaConfig
from transformers import LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from nanogpt_lit.gpt.layers import RopeScaling, Rotary
from nanogpt_lit.gpt.llama import Llama, LlamaConfig

SIZES = {"block_size": 40, "vocab_size": 97, "n_layer": 3}
SHAPES = {
    "as many keys as queries": LlamaConfig(**SIZES, n_head=4, n_embd=32),
    "shared keys, odd widths": LlamaConfig(**SIZES, n_head=6, n_embd=36, n_kv_head=2, n_hidden=51, norm_eps=1e-3),
    "wide heads, untied": LlamaConfig(**SIZES, n_head=3, n_embd=21, n_kv_head=1, head_size=14, tied_head=False),
    "another base": LlamaConfig(**SIZES, n_head=2, n_embd=24, rope_base=500_000.0),
    "stretched as Llama 3": LlamaConfig(**SIZES, n_head=2, n_embd=64, rope_scaling=RopeScaling(8, 1, 4, 16)),
    "Qwen3": LlamaConfig(**SIZES, n_head=4, n_embd=24, n_kv_head=2, head_size=10, qk_norm=True, norm_eps=1e-6),
}


def theirs(config):
    """transformers' network of that shape."""
    options = {
        "vocab_size": config.vocab_size, "hidden_size": config.n_embd, "intermediate_size": config.hidden_channels,
        "num_hidden_layers": config.n_layer, "num_attention_heads": config.n_head,
        "num_key_value_heads": config.kv_heads, "head_dim": config.channels_per_head,
        "max_position_embeddings": config.block_size, "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_head,
    }  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": config.rope_base}
    if config.rope_scaling is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    if config.qk_norm:
        return Qwen3ForCausalLM(Qwen3Config(**options, rope_parameters=rope))
    return LlamaForCausalLM(TheirLlamaConfig(**options, rope_parameters=rope))


def tokens(T, seed=1):
    return torch.randint(0, 97, (2, T), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("T", [1, 37, 40])
@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_logits_loss_and_every_gradient_are_those_of_transformers(config, T):
    gpt, other = randomised(config), theirs(config)
    other.load_state_dict(gpt.state_dict())  # the names too are theirs
    loss = gpt.loss(tokens(T), tokens(T, 2))
    loss.backward()
    logits = other(input_ids=tokens(T)).logits
    F.cross_entropy(logits.flatten(0, 1), tokens(T, 2).flatten()).backward()
    torch.testing.assert_close(gpt(tokens(T)), logits, rtol=1e-5, atol=1e-5)
    named = dict(other.named_parameters())
    for name, parameter in gpt.named_parameters():
        torch.testing.assert_close(parameter.grad, named[name].grad, rtol=1e-5, atol=1e-5, msg=name)


def test_the_mlp_has_as_many_weights_as_that_of_gpt2():
    config = LlamaConfig(n_embd=768)
    assert (config.hidden_channels, 3 * 768 * config.hidden_channels) == (2048, 2 * 768 * 4 * 768)
    assert LlamaConfig(n_embd=128, n_head=4).hidden_channels == 352  # 341 1/3, to a multiple of 32


def test_rotation_is_that_of_transformers():
    config = TheirLlamaConfig(hidden_size=32, num_attention_heads=2, max_position_embeddings=64)
    q, k = torch.randn(2, 3, 2, 20, 16, generator=torch.Generator().manual_seed(0)).unbind()
    cos, sin = LlamaRotaryEmbedding(config)(q, torch.arange(5, 25)[None])
    rotary = Rotary(64, 16, 10_000.0)
    for x, expected in zip((q, k), apply_rotary_pos_emb(q, k, cos, sin), strict=True):
        # float32 angles of up to 24 radians, each good to 1e-6.
        torch.testing.assert_close(rotary(x, start=5), expected, rtol=0, atol=2e-5)


def test_only_the_distance_of_two_tokens_counts():
    # One layer: with more, the first token, which has nothing before it, differs from one that has.
    rotary = Rotary(64, 8, 10_000.0)
    q, k = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(0)).unbind()
    near, far = ((rotary(q, start + 7) * rotary(k, start)).sum() for start in (0, 40))
    torch.testing.assert_close(near, far, rtol=1e-5, atol=1e-5)
    assert abs((rotary(q, 9) * rotary(k, 0)).sum() - near) > 1e-3


def test_rotations_are_one_table_and_nothing_in_a_checkpoint():
    gpt = Llama(SHAPES["Qwen3"])
    assert len({id(block.self_attn.rotary) for block in gpt.blocks}) == 1
    assert not [name for name in gpt.state_dict() if "rotary" in name or "cos" in name]


def written_out(gpt, tokens):
    """Logits in complex numbers and explicit sums, in float64."""
    config, weights = gpt.config, dict(gpt.named_parameters())
    T, D, shared = tokens.size(1), config.channels_per_head, config.n_head // config.kv_heads

    def normed(x, weight):
        return x / (x.pow(2).sum(-1, keepdim=True) / x.size(-1) + config.norm_eps).sqrt() * weight

    speeds = torch.tensor([config.rope_base ** (-2 * i / D) for i in range(D // 2)])  # float32, as the network's
    turns = torch.polar(torch.ones(T, D // 2), torch.arange(T)[:, None] * speeds).to(torch.complex128)

    def turned(x):
        z = torch.complex(x[..., : D // 2], x[..., D // 2 :]) * turns
        return torch.cat([z.real, z.imag], dim=-1)

    x = weights["model.embed_tokens.weight"][tokens]
    for layer in range(config.n_layer):
        of = {name.split(f".layers.{layer}.")[1]: w for name, w in weights.items() if f".layers.{layer}." in name}
        inside = normed(x, of["input_layernorm.weight"])
        q, k, v = (inside @ of[f"self_attn.{name}_proj.weight"].T for name in "qkv")
        heads = []
        for h in range(config.n_head):
            group = h // shared
            query = normed(q[..., h * D : (h + 1) * D], of["self_attn.q_norm.weight"])
            key = normed(k[..., group * D : (group + 1) * D], of["self_attn.k_norm.weight"])
            scores = turned(query) @ turned(key).mT / math.sqrt(D)
            scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
            heads.append(scores.softmax(-1) @ v[..., group * D : (group + 1) * D])
        x = x + torch.cat(heads, dim=-1) @ of["self_attn.o_proj.weight"].T
        inside = normed(x, of["post_attention_layernorm.weight"])
        gate, up = inside @ of["mlp.gate_proj.weight"].T, inside @ of["mlp.up_proj.weight"].T
        x = x + (gate / (1 + (-gate).exp()) * up) @ of["mlp.down_proj.weight"].T
    return normed(x, weights["model.norm.weight"]) @ weights["model.embed_tokens.weight"].T


def test_the_network_equals_itself_written_out_in_complex_numbers():
    gpt = randomised(SHAPES["Qwen3"], torch.float64)
    # The angles are float32 on both sides, made by other functions: 1e-6 in an angle, more in what it turns.
    torch.testing.assert_close(gpt(tokens(37)), written_out(gpt, tokens(37)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("part", ["drop", "layers.0.self_attn.resid_dropout", "layers.2.mlp.dropout"])
def test_embedding_and_branches_drop_and_nothing_inside_attention_does(part):
    gpt = randomised(LlamaConfig(**SIZES, n_head=2, n_embd=24, dropout=0.5)).eval()
    plain = gpt(tokens(37))
    for module in gpt.modules():
        module.training = not isinstance(module, nn.Dropout)
    assert torch.equal(gpt(tokens(37)), plain)
    gpt.model.get_submodule(part).training = True
    assert not torch.equal(gpt(tokens(37)), gpt(tokens(37)))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"n_embd": 10, "n_head": 4}, r"model\.llama\.n_embd=10 does not divide into n_head=4 equal heads; n_head=5"),
        ({"n_head": 6, "n_embd": 36, "n_kv_head": 4}, r"n_kv_head=4 does not divide n_head=6; n_kv_head=3 does"),
        ({"n_head": 2, "n_embd": 6}, r"model\.llama has 3 channels per head; model\.llama\.head_size=4"),
        ({"n_hidden": 0}, r"model\.llama\.n_hidden=0 must be at least 1"),
        ({"rope_base": 1.0}, r"model\.llama\.rope_base=1\.0 must be more than 1"),
        ({"rope_scaling": {"low_freq_factor": 4.0}}, r"low_freq_factor below high_freq_factor"),
        ({"dropout": 1.0}, r"model\.llama\.dropout=1\.0 is not in \[0, 1\)"),
    ],
)
def test_a_shape_that_cannot_be_is_refused_by_its_key(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        LlamaConfig(**options)
