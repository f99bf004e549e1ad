"""The Llama family in GGUF files, opened by llama.cpp itself; tokenizers of other families, cut by it as by ours."""

import re

import gguf
import numpy as np
import pytest
import torch
from small_networks import LANGUAGES, TEXT, new_tokenizer, saved, trained
from test_checkpoint_gguf import asked, compare, server
from test_llama import theirs
from test_tokenizer_json import AWKWARD, KINDS, written

from nanogpt_lit.__main__ import main
from nanogpt_lit.checkpoint.convert import convert, load_network
from nanogpt_lit.data.tokenizer_files import with_chat_template
from nanogpt_lit.data.tokenizer_json_reader import from_hugging_face
from nanogpt_lit.gpt.layers import RopeScaling
from nanogpt_lit.gpt.llama import LlamaConfig

LOG_PROBABILITY = 5e-4
"""Nothing is taken from a table there, as GPT-2's GELU is: what is left is the order of sums."""
SHAPES = {
    "as many keys as queries": {"n_head": 4, "n_embd": 32},
    "shared keys, odd widths, padded": {
        "n_head": 6, "n_embd": 36, "n_kv_head": 2, "n_hidden": 51, "norm_eps": 1e-3, "vocab_size": 300,
    },
    "wide heads, untied": {"n_head": 3, "n_embd": 21, "n_kv_head": 1, "head_size": 14, "tied_head": False},
    "another base": {"n_head": 2, "n_embd": 48, "rope_base": 500_000.0},
    "stretched as Llama 3": {"n_head": 2, "n_embd": 48, "rope_scaling": RopeScaling(), "rope_base": 50.0},
    "Qwen3": {
        "n_head": 4, "n_embd": 24, "n_kv_head": 2, "head_size": 10, "qk_norm": True, "norm_eps": 1e-6,
        "tied_head": False,
    },
    "Qwen3, tied": {"n_head": 2, "n_embd": 40, "qk_norm": True},
}  # fmt: skip


def llama(tokenizer, **shape):
    return trained(tokenizer, kind=LlamaConfig, **{"block_size": 96, **shape})


@pytest.mark.parametrize("shape", SHAPES)
def test_llama_cpp_says_what_our_network_says_and_the_file_comes_back(tmp_path, shape):
    tokenizer = new_tokenizer("byte")
    gpt = llama(tokenizer, **SHAPES[shape])
    convert(saved(tmp_path / "ours.safetensors", gpt, tokenizer), tmp_path / "there.gguf")
    said = gguf.GGUFReader(tmp_path / "there.gguf").fields["general.architecture"].contents()
    assert said == ("qwen3" if gpt.config.qk_norm else "llama")
    same, worst = compare(gpt, tokenizer, server(tmp_path / "there.gguf", 96), "It's 1,2", 48)
    assert same == 48
    assert worst < LOG_PROBABILITY
    convert(tmp_path / "there.gguf", tmp_path / "back.safetensors")
    back, tokenizer_back = load_network(tmp_path / "back.safetensors")
    weights = gpt.state_dict()
    assert back.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in back.state_dict().items())
    tokens = torch.tensor([tokenizer.encode(TEXT)[:96].tolist()])
    with torch.no_grad():
        assert torch.equal(back(tokens), gpt(tokens))
    assert tokenizer_back.sha256 == tokenizer.sha256


@pytest.mark.parametrize("kind", ["gpt2", "byte", "char", "bpe"])
@pytest.mark.parametrize("tied_head", [True, False])
def test_a_gpt2_comes_back_with_every_tokenizer(tmp_path, kind, tied_head):
    tokenizer = new_tokenizer(kind)
    rows = tokenizer.vocab_size + 7
    gpt = trained(tokenizer, steps=2, n_layer=1, n_head=1, n_embd=16, vocab_size=rows, tied_head=tied_head)
    convert(saved(tmp_path / "ours.safetensors", gpt, tokenizer), tmp_path / "there.gguf")
    convert(tmp_path / "there.gguf", tmp_path / "back.safetensors")
    back, tokenizer_back = load_network(tmp_path / "back.safetensors")
    assert back.config == gpt.config
    assert all(torch.equal(tensor, gpt.state_dict()[name]) for name, tensor in back.state_dict().items())
    assert type(tokenizer_back) is type(tokenizer)
    assert tokenizer_back.encode(TEXT).tolist() == tokenizer.encode(TEXT).tolist()
    assert (tokenizer_back.eot, tokenizer_back.vocab_size) == (tokenizer.eot, tokenizer.vocab_size)


@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_cuts_text_as_the_tokenizers_of_other_families(tmp_path, kind):
    written(tmp_path / kind, kind)
    tokenizer = with_chat_template(from_hugging_face(tmp_path / kind), "{{ messages }}")
    gpt = llama(tokenizer, steps=0, n_head=2, n_embd=8, vocab_size=320)
    convert(saved(tmp_path / "ours.safetensors", gpt, tokenizer), tmp_path / f"{kind}.gguf")
    there = server(tmp_path / f"{kind}.gguf", 64)
    composed = [text for text in AWKWARD if "\u0301" not in text]
    for text in (*composed, *LANGUAGES, "<|im_start|>user\nHi 12<|im_end|>", "a <|eot_id|>b <think>"):
        ids = tokenizer.encode(text).tolist()
        question = {"content": text, "add_special": False, "parse_special": True}
        assert asked(there, "tokenize", question)["tokens"] == ids, text
    begun = asked(there, "tokenize", {"content": "a", "add_special": True})["tokens"]
    before = [tokenizer.id_of("<|begin_of_text|>")] if kind == "llama3" else []
    assert begun == [*before, *tokenizer.encode("a").tolist()]
    convert(tmp_path / f"{kind}.gguf", tmp_path / "back.safetensors")
    back = load_network(tmp_path / "back.safetensors")[1]
    assert back.files() == tokenizer.files()


@pytest.mark.parametrize("dtype", ["f16", "bf16", "q8_0"])
def test_what_is_rounded_is_said_and_read_as_the_package_gguf_reads_it(tmp_path, capsys, dtype):
    tokenizer = new_tokenizer("byte")
    gpt = llama(tokenizer, n_head=2, n_embd=96)
    source = saved(tmp_path / "ours.safetensors", gpt, tokenizer)
    assert main(["convert", str(source), str(tmp_path / "x.gguf"), "--dtype", dtype]) == 0
    said = capsys.readouterr().out
    there, here = map(float, re.search(r"the loss is (\S+) there and (\S+) here", said).groups())
    assert abs(there - here) < 0.01
    assert main(["convert", str(tmp_path / "x.gguf"), str(tmp_path / "back.safetensors")]) == 0
    rounded = "with weights in Q8_0, so that every loss is that of the rounded network"
    assert (rounded in capsys.readouterr().out) == (dtype == "q8_0")
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors}["blk.1.ffn_down.weight"]
    as_read = gguf.quants.dequantize(found.data, found.tensor_type)
    back, _ = load_network(tmp_path / "back.safetensors")
    assert np.array_equal(back.state_dict()["model.layers.1.mlp.down_proj.weight"].numpy(), as_read)
    assert compare(gpt, tokenizer, server(tmp_path / "x.gguf", 64), "It's", 8)[1] < 0.2


def test_the_factors_of_llama_3_s_rotations_are_those_of_transformers(tmp_path):
    shape = {"block_size": 32, "n_layer": 1, "n_head": 1, "n_embd": 64, "rope_base": 5e5}
    tokenizer = new_tokenizer("byte")
    gpt = llama(tokenizer, steps=0, rope_scaling=RopeScaling(8, 1, 4, 16), **shape)
    slow, fast = (theirs(config).model.rotary_emb.inv_freq for config in (
        gpt.config, LlamaConfig(vocab_size=257, **shape),
    ))  # fmt: skip
    convert(saved(tmp_path / "ours.safetensors", gpt, tokenizer), tmp_path / "x.gguf")
    factors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors}["rope_freqs.weight"]
    assert np.allclose(factors, (fast / slow).numpy(), rtol=1e-6, atol=0)
    assert 1 < factors.min() < factors.max() == 8
