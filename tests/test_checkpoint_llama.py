"""Hugging Face's folders of Llama and Qwen3, in and out, with transformers itself at the other end."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file
from small_networks import TEXT, new_tokenizer, saved
from test_llama import SHAPES, randomised, theirs
from test_tokenizer_json import KINDS, written
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, Qwen3ForCausalLM

from nanogpt_lit.__main__ import main
from nanogpt_lit.checkpoint.convert import convert, load_network
from nanogpt_lit.checkpoint.run_file import load_run
from nanogpt_lit.data.tokenizer_files import tokenizer_from_files, with_chat_template
from nanogpt_lit.data.tokenizer_json_reader import from_hugging_face
from nanogpt_lit.gpt.llama import LlamaConfig

ROUNDING = 1e-5
"""Of logits of size 1: the two implementations add in another order."""
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SMALL = {"block_size": 64, "n_layer": 2, "n_head": 4, "n_embd": 24, "n_kv_head": 2}


def furthest(ours, there, vocab_size):
    tokens = torch.randint(0, vocab_size, (2, ours.config.block_size), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return float((ours(tokens) - there(tokens).logits).abs().max() / ours(tokens).abs().max().clamp(min=1))


def of_bytes(shape):
    """The shape with a vocabulary of bytes."""
    return LlamaConfig(**{**vars(SHAPES[shape]), "vocab_size": 257})


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("files", ["one", "several, bfloat16"])
def test_transformers_network_comes_in_and_goes_out_with_the_same_weights_and_logits(tmp_path, shape, files):
    config = of_bytes(shape)
    model = theirs(config).eval()
    model.load_state_dict(randomised(config).state_dict())
    if files == "one":
        model.save_pretrained(tmp_path / "hf")
    else:
        model.bfloat16().save_pretrained(tmp_path / "hf", max_shard_size="20KB")
        assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    convert(tmp_path / "hf", tmp_path / "ours.safetensors", tokenizer="byte")
    gpt, _ = load_network(tmp_path / "ours.safetensors")
    assert furthest(gpt, model, 257) < ROUNDING
    convert(tmp_path / "ours.safetensors", tmp_path / "back", to="hf")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    assert type(back) is (Qwen3ForCausalLM if config.qk_norm else LlamaForCausalLM)
    assert furthest(gpt, back, 257) < ROUNDING
    before, after = model.state_dict(), back.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    if files == "one":
        before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("hf", "back"))
        assert before.keys() == after.keys()


def test_older_configurations_say_the_same_in_other_keys(tmp_path):
    config = of_bytes("stretched as Llama 3")
    theirs(config).save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "new.safetensors", tokenizer="byte")
    path = tmp_path / "hf/config.json"
    described = json.loads(path.read_text())
    rope = described.pop("rope_parameters")
    described |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    del described["head_dim"]
    path.write_text(json.dumps(described))
    convert(tmp_path / "hf", tmp_path / "old.safetensors", tokenizer="byte")
    shapes = [load_run(tmp_path / f"{name}.safetensors").hyper_parameters["llama"] for name in ("new", "old")]
    assert shapes[0] == shapes[1]
    assert shapes[0]["rope_scaling"] == {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_block_size": 16,
    }  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_tokenizer_chat_template_and_what_ends_an_answer_go_along(tmp_path, kind):
    written(tmp_path / kind, kind)
    tokenizer = with_chat_template(from_hugging_face(tmp_path / kind), CHAT)
    gpt = randomised(LlamaConfig(vocab_size=320, **SMALL))
    convert(saved(tmp_path / "ours.safetensors", gpt, tokenizer), tmp_path / "hf", to="hf")
    here, there = (AutoTokenizer.from_pretrained(tmp_path / folder) for folder in (kind, "hf"))
    for text in (TEXT, "<|im_start|>user\nHi 12<|im_end|>", " x<|eot_id|>"):
        assert there(text)["input_ids"] == here(text)["input_ids"]
    assert (there.bos_token, there.eos_token) == (here.bos_token, here.eos_token)
    messages = [{"role": "user", "content": "Hi"}]
    asked = {"tokenize": False, "add_generation_prompt": True}
    assert there.apply_chat_template(messages, **asked) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    ends = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").generation_config.eos_token_id
    assert ends == [tokenizer.id_of(here.eos_token), tokenizer.eot]
    card = (tmp_path / "hf/README.md").read_text(encoding="utf-8")
    assert "A network of the architecture `llama`" in card
    assert f'tokenizer("{tokenizer.eot_text}"' in card
    convert(tmp_path / "hf", tmp_path / "back.safetensors")
    back = tokenizer_from_files(load_run(tmp_path / "back.safetensors").data["tokenizer"])
    assert back.chat_template == CHAT
    assert vars(back.conventions) == vars(tokenizer.conventions)
    assert back.encode(TEXT).tolist() == tokenizer.encode(TEXT).tolist()


def changed(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"attention_bias": True}, "attention_bias=True, and this network has False"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"use_sliding_window": True}, "use_sliding_window=True"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types with others than full_attention"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}}, "rope_type='yarn'; llama3 can"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type='linear'"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rope_type='llama3' without low_freq_factor"),
        ({"rope_parameters": 3}, "rope_parameters=3, which is no dictionary"),
        ({"rope_parameters": {"rope_theta": "much"}}, "rope_theta='much', which is no number"),
        ({"num_hidden_layers": 10**9}, "n_layer=1000000000 and holds"),
        ({"num_key_value_heads": 5}, "n_kv_head=5 does not divide"),
        ({"head_dim": 10}, "of shape"),
        ({"intermediate_size": None}, "intermediate_size=None, which is no size"),
        ({"model_type": "qwen3"}, "lacks model.layers.0.self_attn.k_norm.weight"),
    ],
)  # fmt: skip
def test_what_this_network_lacks_is_refused_in_one_sentence(tmp_path, capsys, changes, sentence):
    theirs(of_bytes("another base")).save_pretrained(tmp_path / "hf")
    changed(tmp_path / "hf", **{"head_dim": 12, **changes})
    capsys.readouterr()
    assert main(["convert", str(tmp_path / "hf"), str(tmp_path / "x.safetensors"), "--tokenizer", "byte"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(sentence, line), line
    assert not (tmp_path / "x.safetensors").exists()


def test_a_shape_that_transformers_refuses_is_told_before_it_is_written(tmp_path, capsys):
    gpt = randomised(LlamaConfig(block_size=8, vocab_size=257, n_layer=1, n_head=3, n_embd=16, head_size=4))
    source = saved(tmp_path / "x.safetensors", gpt, new_tokenizer("byte"))
    assert main(["convert", str(source), str(tmp_path / "hf"), "--to", "hf"]) == 2
    assert "n_embd=16, which n_head=3 does not divide, and transformers' Llama wants it to" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(("to", "name"), [("nanogpt", "x.pt")])
def test_nanogpt_has_no_such_network(tmp_path, capsys, to, name):
    gpt = randomised(LlamaConfig(vocab_size=257, **SMALL))
    source = saved(tmp_path / "ours.safetensors", gpt, new_tokenizer("byte"))
    assert main(["convert", str(source), str(tmp_path / name), "--to", to]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--to hf and --to gguf carry it" in line
