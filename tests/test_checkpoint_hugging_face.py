"""Hugging Face's folders of GPT-2, in and out, with transformers itself at the other end."""

import json
import os
import pickle
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_networks import LANGUAGES, TEXT, much_text, new_tokenizer, saved, trained
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Tokenizer,
    PreTrainedTokenizerFast,
)

from nanogpt_lit.__main__ import main
from nanogpt_lit.checkpoint.convert import convert, load_network
from nanogpt_lit.checkpoint.run_file import load_run, save_run
from nanogpt_lit.data.tokenizer import EOT, BytePairTokenizer, CharTokenizer, gpt2_tokenizer
from nanogpt_lit.data.tokenizer_files import tokenizer_from_files
from nanogpt_lit.data.tokenizer_json_reader import from_hugging_face
from nanogpt_lit.data.tokenizer_json_writer import to_hugging_face
from nanogpt_lit.errors import UserError

ROUNDING = 1e-5
"""Of logits of size 1: the two implementations add in another order."""


def theirs(folder, safe=True, **changes):
    torch.manual_seed(1)
    config = {"vocab_size": 257, "n_positions": 64, "n_embd": 48, "n_layer": 2, "n_head": 3, **changes}
    model = GPT2LMHeadModel(GPT2Config(**config)).eval()
    model.save_pretrained(folder)
    if not safe:
        (folder / "model.safetensors").unlink()
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return model


def some_tokens(vocab_size, T):
    return torch.randint(0, vocab_size, (2, T), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def furthest(first, second, tokens):
    return float((first(tokens) - second(tokens).logits).abs().max())


@pytest.mark.parametrize(
    ("vocab_size", "n_head", "block_size"), [(257, 1, 64), (257, 3, 1024), (50257, 3, 64), (50304, 1, 64)]
)
def test_transformers_gpt2_comes_in_and_goes_out_with_the_same_bytes_and_logits(
    tmp_path, vocab_size, n_head, block_size
):
    model = theirs(tmp_path / "hf", vocab_size=vocab_size, n_head=n_head, n_positions=block_size, n_layer=1)
    tokenizer = "byte" if vocab_size == 257 else None
    convert(tmp_path / "hf", tmp_path / "ours.safetensors", tokenizer=tokenizer)
    gpt, _ = load_network(tmp_path / "ours.safetensors")
    tokens = some_tokens(vocab_size, block_size)
    assert furthest(gpt, model, tokens) < ROUNDING
    convert(tmp_path / "ours.safetensors", tmp_path / "back", to="hf")
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("hf", "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert furthest(gpt, AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval(), tokens) < ROUNDING


@pytest.mark.parametrize("kind", ["gpt2", "byte", "char", "bpe", "pattern"])
def test_every_tokenizer_goes_along_and_comes_back(tmp_path, kind):
    tokenizer = new_tokenizer(kind)
    gpt = trained(tokenizer, steps=0, n_layer=1)
    convert(saved(tmp_path / "ours.safetensors", gpt, tokenizer), tmp_path / "hf", to="hf")
    there = AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in (*LANGUAGES, TEXT, "", " ", "\n\n \n  x"[: 1 if kind == "char" else None]):
        ids = tokenizer.encode(text).tolist()
        assert there(text)["input_ids"] == ids
        assert there.decode(ids) == text
    assert (there.bos_token_id, there.eos_token_id) == (tokenizer.eot, tokenizer.eot)
    convert(tmp_path / "hf", tmp_path / "back.safetensors")
    back = tokenizer_from_files(load_run(tmp_path / "back.safetensors").data["tokenizer"])
    assert type(back) is type(tokenizer)
    assert back.encode(TEXT).tolist() == tokenizer.encode(TEXT).tolist()
    assert back.eot == tokenizer.eot


@pytest.mark.parametrize("kind", ["gpt2", "byte", "char", "bpe", "pattern"])
def test_token_ids_of_much_text_in_four_languages_are_equal(tmp_path, kind):
    text = much_text()
    tokenizer = CharTokenizer.of([text]) if kind == "char" else new_tokenizer(kind)
    (tmp_path / "tokenizer.json").write_text(json.dumps(to_hugging_face(tokenizer)))
    there = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    ids = tokenizer.encode(text).tolist()
    assert there(text)["input_ids"] == ids
    assert there.decode(ids) == text == tokenizer.decode(ids)
    assert from_hugging_face(tmp_path).encode(text).tolist() == ids


@pytest.mark.parametrize("add_bos_token", [False, True])
def test_gpt2_s_tokenizer_as_transformers_writes_it_is_read_as_gpt2_s(tmp_path, add_bos_token):
    tokenizer = gpt2_tokenizer()
    described = to_hugging_face(tokenizer)["model"]
    merges = [tuple(pair) for pair in described["merges"]]
    theirs = GPT2Tokenizer(vocab=described["vocab"], merges=merges, add_bos_token=add_bos_token)
    theirs.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "tokenizer.json").read_text())["post_processor"]["type"] == "TemplateProcessing"
    assert from_hugging_face(tmp_path) is tokenizer


def test_a_pattern_that_two_libraries_read_differently_is_refused(tmp_path):
    """In tiktoken {1,3}+ takes three digits and gives none back; in Hugging Face's it takes three, repeatedly."""
    bpe = new_tokenizer("bpe")
    tokenizer = BytePairTokenizer("mine", bpe.ranks, r"\p{L}++|\p{N}{1,3}+|\s++|[^\s\p{L}\p{N}]++", {EOT: 300})
    source = saved(tmp_path / "ours.safetensors", trained(tokenizer, steps=0), tokenizer)
    with pytest.raises(UserError, match=r"the tokenizer mine has a pattern that .* read differently"):
        convert(source, tmp_path / "hf", to="hf")
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    "shape",
    [
        {"gelu": "erf"},
        {"bias": False, "gelu": "erf"},
        {"tied_head": False},
        {"n_head": 1, "block_size": 7, "vocab_size": 300},
    ],
    ids=str,
)
def test_what_gpt2_s_architecture_can_say_is_computed_there_as_here(tmp_path, shape):
    tokenizer = new_tokenizer("byte")
    gpt = trained(tokenizer, steps=5, **shape)
    convert(saved(tmp_path / "ours.safetensors", gpt, tokenizer), tmp_path / "hf", to="hf")
    there = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    tokens = some_tokens(gpt.config.vocab_size, gpt.config.block_size)
    assert furthest(gpt, there, tokens) < ROUNDING
    convert(tmp_path / "hf", tmp_path / "back.safetensors")
    back, _ = load_network(tmp_path / "back.safetensors")
    with torch.no_grad():
        assert torch.allclose(back(tokens), gpt(tokens), rtol=0, atol=ROUNDING)


def test_generation_begins_and_ends_as_here_and_the_card_says_what_the_model_is(tmp_path):
    tokenizer = new_tokenizer("byte")
    source = saved(tmp_path / "run/checkpoints/best.safetensors", trained(tokenizer, steps=0), tokenizer)
    save_run(source, replace(load_run(source), step=1500, validations={"latest": (1500, 2.0), "best": (1400, 1.5)}))
    (tmp_path / "run/config.yaml").write_text("init_from: hf:a/b@c\ndata: {source: my_texts, val_fraction: 0.1}\n")
    convert(source, tmp_path / "hf", to="hf")
    assert len({path.stat().st_mode for path in (tmp_path / "hf").iterdir()}) == 1  # who may read one, may read all
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert model.generation_config.eos_token_id == model.generation_config.bos_token_id == 256
    card = (tmp_path / "hf/README.md").read_text(encoding="utf-8")
    for said in (
        "source: my_texts", "val_fraction: 0.1", "tokenizer: byte, 257 tokens", "2 layers, 3 heads, 48 channels",
        '"lr": 0.0006', "1,500 optimizer steps", "latest validation loss 2.0000, perplexity 7.39, at step 1,500",
        "best validation loss 1.5000", "fine-tuned from hf:a/b@c", "nanogpt_lit ", "torch 2.", "Python 3.",
    ):  # fmt: skip
        assert said in card
    (tmp_path / "run/config.yaml").write_text("data: {{[")
    convert(source, tmp_path / "again", to="hf")
    assert "the text: not known to the checkpoint" in (tmp_path / "again/README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("legacy", [False, True])
def test_files_of_torch_are_read_the_oldest_too(tmp_path, legacy):
    model = theirs(tmp_path / "hf", safe=False)
    old = {
        name.removeprefix("transformer."): tensor for name, tensor in model.state_dict().items() if "lm_" not in name
    }
    old["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)  # the mask, as older versions saved it
    torch.save(old, tmp_path / "hf/pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    convert(tmp_path / "hf", tmp_path / "ours.safetensors", tokenizer="byte")
    gpt, _ = load_network(tmp_path / "ours.safetensors")
    assert furthest(gpt, model, some_tokens(257, 64)) < ROUNDING


def as_the_hub_keeps_it(folder):
    """Its cache has links to blobs, which lie beside all snapshots."""
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    for n, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / f"{n:040}")
        path.symlink_to(blobs / f"{n:040}")


def test_weights_in_several_files_and_vocab_json_with_merges_txt_are_read(tmp_path):
    tokenizer = new_tokenizer("bpe")
    gpt = trained(tokenizer, steps=0)
    convert(saved(tmp_path / "ours.safetensors", gpt, tokenizer), tmp_path / "hf", to="hf")
    model = json.loads((tmp_path / "hf/tokenizer.json").read_text())["model"]
    (tmp_path / "hf/vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "hf/merges.txt").write_text("#version: 0.2\n" + "".join(" ".join(m) + "\n" for m in model["merges"]))
    (tmp_path / "hf/tokenizer.json").unlink()
    tensors = load_file(tmp_path / "hf/model.safetensors")
    (tmp_path / "hf/model.safetensors").unlink()
    names = sorted(tensors)
    for number, part in enumerate((names[:5], names[5:])):
        save_file({name: tensors[name] for name in part}, tmp_path / f"hf/model-{number}.safetensors")
    files = {name: f"model-{int(n >= 5)}.safetensors" for n, name in enumerate(names)}
    (tmp_path / "hf/model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    as_the_hub_keeps_it(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "back.safetensors")
    back, tokenizer_back = load_network(tmp_path / "back.safetensors")
    assert all(torch.equal(tensor, back.state_dict()[name]) for name, tensor in gpt.state_dict().items())
    assert tokenizer_back.encode(TEXT).tolist() == tokenizer.encode(TEXT).tolist()


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def changed(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def one_tensor(folder, name, tensor):
    path = folder / "model.safetensors"
    save_file({**load_file(path), name: tensor}, path)


def a_tokenizer(folder, **changes):
    convert(
        saved(folder.parent / "o.safetensors", trained(new_tokenizer("bpe"), steps=0), new_tokenizer("bpe")),
        folder.parent / "o",
        to="hf",
    )
    described = json.loads((folder.parent / "o/tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**described, **changes}))


HOSTILE = {
    "another architecture": (lambda f: changed(f, model_type="bert"), "type 'bert'; convert reads gpt2, llama, qwen3"),
    "another epsilon": (lambda f: changed(f, layer_norm_epsilon=1e-6), "layer_norm_epsilon=1e-06"),
    "another activation": (lambda f: changed(f, activation_function="silu"), "activation_function='silu'"),
    "another width": (lambda f: changed(f, n_inner=100), "n_inner=100"),
    "layers without end": (lambda f: changed(f, n_layer=10**9), "n_layer=1000000000 and holds"),
    "a size that is none": (lambda f: changed(f, n_embd="48"), "n_embd='48'"),
    "a lie about channels": (lambda f: changed(f, n_embd=96), "of shape"),
    "a lie about heads": (lambda f: changed(f, n_head=5), "equal heads"),
    "channels without end": (lambda f: changed(f, n_embd=2**31 - 1), "does not divide into n_head=3 equal heads"),
    "a lie about the head": (
        lambda f: one_tensor(f, "lm_head.weight", torch.zeros(257, 48)), "is tied to transformer.wte.weight",
    ),
    "integers": (
        lambda f: one_tensor(f, "transformer.ln_f.bias", torch.zeros(48, dtype=torch.int32)), "floating-point weights",
    ),
    "not finite": (lambda f: one_tensor(f, "transformer.ln_f.bias", torch.full((48,), torch.nan)), "not finite"),
    "a tensor too many": (lambda f: one_tensor(f, "transformer.h.9.x", torch.zeros(1)), "has transformer.h.9.x"),
    "cut short": (lambda f: os.truncate(f / "model.safetensors", 5000), "damaged or cut short"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "holds neither model.safetensors"),
    "no JSON": (lambda f: (f / "config.json").write_text("[" * 100_000), "cannot be read as JSON"),
    "a list": (lambda f: (f / "config.json").write_text("[]"), "holds no JSON object"),
    "a way out": (
        lambda f: [
            (f / "model.safetensors").unlink(),
            (f / "model.safetensors.index.json").write_text('{"weight_map": {"x": "../../secret"}}'),
        ], "names '../../secret'",
    ),
    "code": (
        lambda f: [(f / "model.safetensors").unlink(), torch.save(Bomb(), f / "pytorch_model.bin")], "could run code",
    ),
    "bare code": (
        lambda f: [(f / "model.safetensors").unlink(), (f / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))],
        "could run code",
    ),
    "tokenizer of words": (lambda f: a_tokenizer(f, model={"type": "WordPiece", "vocab": {}}), "is a WordPiece"),
    "tokenizer that changes text": (lambda f: a_tokenizer(f, normalizer={"type": "NFKC"}), "changes text .*NFKC"),
    "tokenizer that adds": (
        lambda f: a_tokenizer(f, post_processor={"type": "TemplateProcessing"}), "adds tokens around a text",
    ),
    "tokenizer that is none": (lambda f: (f / "tokenizer.json").write_text("{}"), "not as tokenizers writes it"),
    "tokenizer too large": (lambda f: a_tokenizer(f), "a vocabulary of 257 and the tokenizer"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_folder_that_lies_or_would_run_code_is_refused_in_one_sentence(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    theirs(tmp_path / "hf", n_layer=1)
    change, sentence = HOSTILE[name]
    change(tmp_path / "hf")
    tokenizer = [] if (tmp_path / "hf/tokenizer.json").exists() else ["--tokenizer", "byte"]
    capsys.readouterr()
    assert main(["convert", "hf", "out.safetensors", *tokenizer]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(sentence, line), line
    assert not (tmp_path / "exploded").exists()
    assert not (tmp_path / "out.safetensors").exists()


def test_a_folder_without_a_tokenizer_asks_for_its_name_and_gpt2_s_vocabulary_tells_it(tmp_path, capsys):
    theirs(tmp_path / "hf", n_layer=1)
    assert main(["convert", str(tmp_path / "hf"), str(tmp_path / "x.safetensors")]) == 2
    assert "vocabulary of 257 is not GPT-2's; convert takes its name: --tokenizer" in capsys.readouterr().err
    theirs(tmp_path / "gpt2", n_layer=1, vocab_size=50257)
    assert main(["convert", str(tmp_path / "gpt2"), str(tmp_path / "x.safetensors")]) == 0
    assert "a Hugging Face folder; 1 layers, 3 heads, 48 channels, block 64" in capsys.readouterr().out
    assert load_network(tmp_path / "x.safetensors")[1].name == "gpt2"
