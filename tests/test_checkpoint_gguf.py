"""GGUF files, opened by llama.cpp itself (xllamacpp) and by the reader of the package gguf."""

import json
import re
import sys
from pathlib import Path
from urllib.request import Request, urlopen

import gguf
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import xllamacpp
from small_networks import LANGUAGES, TEXT, new_tokenizer, saved, trained

from nanogpt_lit.__main__ import main
from nanogpt_lit.checkpoint.convert import convert, load_network
from nanogpt_lit.data.tokenizer_files import with_special_tokens

LOG_PROBABILITY = 2e-3
"""llama.cpp takes GELU from a table of float16, which moves the five likeliest by that much and no more."""
AS_THERE = 1e-3
"""Of a network that takes it from such a table too: what is left is the order of sums, and numbers at the edge between
two entries."""


class TableGelu(torch.nn.Module):
    def forward(self, x):
        return F.gelu(x.half().float(), approximate="tanh").half().float()


def server(path, block_size):
    """llama.cpp with a cache in float32."""
    settings = xllamacpp.CommonParams()
    settings.model.path = str(path)
    settings.n_ctx = block_size
    settings.n_gpu_layers = 0
    settings.n_parallel = 1
    settings.warmup = False
    settings.cpuparams.n_threads = 1
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return xllamacpp.Server(settings)


def answer(there, prompt, tokens):
    """Its likeliest tokens, one after another, each with the five likeliest and their log-probabilities."""
    asked = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "logprobs": 5, "cache_prompt": False}
    said = there.handle_completions({**asked, "ignore_eos": True})
    said = said if isinstance(said, dict) else json.loads(said)
    return said["choices"][0]["logprobs"]["content"]


def compare(gpt, tokenizer, there, prompt, tokens):
    """How many of the tokens are ours too, and the largest difference of a log-probability."""
    context = torch.tensor([[tokenizer.eot, *tokenizer.encode(prompt).tolist()]])
    same, worst = 0, 0.0
    for entry in answer(there, prompt, tokens):
        with torch.no_grad():
            ours = gpt(context)[0, -1].log_softmax(-1)
        worst = max([worst, *(abs(other["logprob"] - float(ours[other["id"]])) for other in entry["top_logprobs"])])
        same += int(ours.argmax()) == entry["id"]
        context = torch.cat([context, torch.tensor([[entry["id"]]])], dim=1)
    return same, worst


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("byte", {"n_head": 1, "block_size": 128}),
        ("char", {"bias": False}),
        ("bpe", {"tied_head": False, "vocab_size": 320}),
        ("gpt2", {"n_layer": 1, "vocab_size": 50304, "steps": 15}),
    ],
)
def test_llama_cpp_says_what_our_network_says(tmp_path, kind, shape):
    tokenizer = new_tokenizer(kind)
    gpt = trained(tokenizer, **{"block_size": 96, **shape})
    convert(saved(tmp_path / "ours.safetensors", gpt, tokenizer), tmp_path / "there.gguf")
    there = server(tmp_path / "there.gguf", gpt.config.block_size)
    same, worst = compare(gpt, tokenizer, there, "It's 1,2", 64)
    assert same == 64
    assert worst < LOG_PROBABILITY


@pytest.mark.parametrize("kind", ["gpt2", "byte", "char", "bpe"])
def test_llama_cpp_cuts_text_as_our_tokenizer(tmp_path, kind):
    tokenizer = new_tokenizer(kind)
    gpt = trained(tokenizer, steps=0, n_layer=1)
    convert(saved(tmp_path / "ours.safetensors", gpt, tokenizer), tmp_path / "there.gguf")
    there = server(tmp_path / "there.gguf", 64)
    for text in (*LANGUAGES, TEXT):
        ids = tokenizer.encode(text).tolist()
        assert asked(there, "tokenize", {"content": text, "add_special": False})["tokens"] == ids
        assert asked(there, "detokenize", {"tokens": ids})["content"] == text


def test_special_tokens_of_one_s_own_are_read_from_a_prompt_there_too(tmp_path):
    tokenizer = with_special_tokens(new_tokenizer("byte"), ["<|user|>", "<|bot|>"])
    source = saved(tmp_path / "ours.safetensors", trained(tokenizer, steps=0, n_layer=1), tokenizer)
    convert(source, tmp_path / "there.gguf")
    text = "<|user|>Größe?<|bot|>5 €"
    there = server(tmp_path / "there.gguf", 64)
    tokens = asked(there, "tokenize", {"content": text, "add_special": False, "parse_special": True})["tokens"]
    assert tokens == tokenizer.encode(text).tolist()


@pytest.mark.long
def test_llama_cpp_goes_on_with_a_text_as_the_trained_quickstart_does(tmp_path):
    """Minutes of training: its answers are not those of a network that has learnt a few lines by heart."""
    config = Path(__file__).parents[1] / "configs/quickstart.yaml"
    assert main(["fit", "--config", str(config), f"--trainer.default_root_dir={tmp_path}"]) == 0
    best = tmp_path / "version_0/checkpoints/best.safetensors"
    convert(best, tmp_path / "gguf/best.gguf")
    gpt, tokenizer = load_network(best)
    there = server(tmp_path / "gguf/best.gguf", 128)
    for prompt in ("def ", "import ", "class A:\n", "# the "):
        same, worst = compare(gpt, tokenizer, there, prompt, 64)
        assert same == 64
        assert worst < 2 * LOG_PROBABILITY  # of one that has learnt much, now and then more than of small ones
    for block in gpt.transformer.h:
        block.mlp.activation = TableGelu()
    for prompt in ("def ", "import ", "class A:\n", "# the "):
        same, worst = compare(gpt, tokenizer, there, prompt, 64)
        assert same == 64
        assert worst < AS_THERE


def asked(there, what, content):
    address = there.listening_address.rstrip("/")
    request = Request(f"{address}/{what}", json.dumps(content).encode(), {"Content-Type": "application/json"})
    with urlopen(request, timeout=10) as answered:
        return json.loads(answered.read())


@pytest.mark.parametrize("dtype", ["f16", "bf16", "q8_0"])
def test_matrices_are_rounded_as_asked_and_the_effect_is_said(tmp_path, capsys, dtype):
    tokenizer = new_tokenizer("byte")
    gpt = trained(tokenizer, n_embd=96)
    source = saved(tmp_path / "ours.safetensors", gpt, tokenizer)
    assert main(["convert", str(source), str(tmp_path / "there.gguf"), "--dtype", dtype]) == 0
    said = capsys.readouterr().out
    there, here = map(float, re.search(r"the loss is (\S+) there and (\S+) here", said).groups())
    assert abs(there - here) < 0.01
    read = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "there.gguf").tensors}
    weight = gpt.state_dict()["transformer.h.0.attn.c_attn.weight"]
    found = read["blk.0.attn_qkv.weight"]
    assert found.tensor_type.name == dtype.upper()
    as_read = gguf.quants.dequantize(found.data, found.tensor_type)
    assert 0 < np.abs(as_read - weight.numpy()).max() < 0.01
    assert read["position_embd.weight"].tensor_type.name == read["output_norm.bias"].tensor_type.name == "F32"
    assert compare(gpt, tokenizer, server(tmp_path / "there.gguf", 64), "It's", 8)[1] < 0.2


def test_the_effect_that_is_said_of_an_exact_gelu_is_what_llama_cpp_does(tmp_path, capsys):
    tokenizer = new_tokenizer("byte")
    gpt = trained(tokenizer, gelu="erf")
    source = saved(tmp_path / "ours.safetensors", gpt, tokenizer)
    assert main(["convert", str(source), str(tmp_path / "there.gguf")]) == 0
    said = capsys.readouterr().out
    assert "llama.cpp computes the tanh approximation of GELU where this network was trained with the exact" in said
    there, here = map(float, re.search(r"the loss is (\S+) there and (\S+) here", said).groups())
    assert abs(there - here) < 0.01
    same, worst = compare(gpt, tokenizer, server(tmp_path / "there.gguf", 64), "It's", 16)
    assert same == 16
    assert worst < 5 * LOG_PROBABILITY


def test_a_modelfile_for_ollama_lies_beside_it_and_a_second_model_needs_another_folder(tmp_path, capsys):
    tokenizer = new_tokenizer("byte")
    source = saved(tmp_path / "ours.safetensors", trained(tokenizer, steps=0), tokenizer)
    assert main(["convert", str(source), str(tmp_path / "m/x.gguf")]) == 0
    assert f"ollama create x -f {tmp_path / 'm/Modelfile'}" in capsys.readouterr().out
    lines = (tmp_path / "m/Modelfile").read_text().splitlines()
    assert lines[0] == "FROM ./x.gguf"
    assert "PARAMETER num_ctx 64" in lines
    assert main(["convert", str(source), str(tmp_path / "m/y.gguf")]) == 2
    assert "Modelfile exists already" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == ["Modelfile", "x.gguf"]


def test_what_llama_cpp_cannot_express_is_refused_with_what_can(tmp_path, capsys):
    tokenizer = new_tokenizer("pattern")
    source = saved(tmp_path / "ours.safetensors", trained(tokenizer, steps=0), tokenizer)
    assert main(["convert", str(source), str(tmp_path / "x.gguf")]) == 2
    assert "the tokenizer mine cuts text by a pattern of its own" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["ours.safetensors"]


def test_the_extra_is_named_where_the_package_is_missing(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    tokenizer = new_tokenizer("byte")
    source = saved(tmp_path / "ours.safetensors", trained(tokenizer, steps=0), tokenizer)
    assert main(["convert", str(source), str(tmp_path / "x.gguf")]) == 2
    assert 'pip install "nanogpt_lit[gguf]"' in capsys.readouterr().err
