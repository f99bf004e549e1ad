"""data.special_tokens: a vocabulary that grows, and a model that keeps what it has learnt."""

import json

import pytest
import torch
from small_networks import TEXT, new_tokenizer, saved, trained
from small_runs import LOOPS, accelerate, fit, small_run
from transformers import AutoTokenizer

from nanogpt_lit.__main__ import main
from nanogpt_lit.checkpoint.convert import convert, load_network
from nanogpt_lit.checkpoint.run_file import load_run
from nanogpt_lit.data.tokenizer import EOT
from nanogpt_lit.data.tokenizer_files import tokenizer_from_files, with_special_tokens
from nanogpt_lit.errors import UserError

OWN = ["<|user|>", "<|bot|>"]
CHAT = "<|user|>It's 1,2<|bot|>Größe<|user|>"
SHAPE = {"block_size": 32, "n_layer": 1, "n_head": 2, "n_embd": 16}


@pytest.mark.parametrize("kind", ["gpt2", "byte", "bpe", "pattern"])
def test_they_stand_behind_the_vocabulary_whose_ids_stay(kind):
    tokenizer = new_tokenizer(kind)
    grown = with_special_tokens(tokenizer, OWN)
    before = tokenizer.vocab_size
    new = 1 if kind == "pattern" else 2  # which has <|user|> already
    assert grown.vocab_size == before + new
    assert grown.eot == tokenizer.eot
    plain = TEXT + EOT  # which is plain text inside a document
    assert grown.encode(plain).tolist() == tokenizer.encode(plain).tolist()
    user, bot = (grown.encode(text).tolist() for text in OWN)
    assert (user, bot) == ([301 if kind == "pattern" else before], [before + new - 1])
    inside = [tokenizer.encode(text).tolist() for text in ("It's 1,2", "Größe")]
    assert grown.encode(CHAT).tolist() == [*user, *inside[0], *bot, *inside[1], *user]
    assert grown.encode_stream([(CHAT, True)]).tolist() == [grown.eot, *grown.encode(CHAT).tolist()]
    assert grown.decode(grown.encode(CHAT)) == CHAT
    assert tokenizer_from_files(grown.files()).encode(CHAT).tolist() == grown.encode(CHAT).tolist()
    assert with_special_tokens(grown, OWN) is grown


@pytest.mark.parametrize("kind", ["gpt2", "byte", "bpe"])
def test_they_go_along_to_transformers(tmp_path, kind):
    grown = with_special_tokens(new_tokenizer(kind), OWN)
    convert(saved(tmp_path / "x.safetensors", trained(grown, steps=0, n_layer=1), grown), tmp_path / "hf", to="hf")
    assert AutoTokenizer.from_pretrained(tmp_path / "hf")(CHAT)["input_ids"] == grown.encode(CHAT).tolist()
    convert(tmp_path / "hf", tmp_path / "back.safetensors")
    assert load_network(tmp_path / "back.safetensors")[1].encode(CHAT).tolist() == grown.encode(CHAT).tolist()


@pytest.mark.parametrize(
    ("texts", "sentence"),
    [
        (["<|user|>", "<|user|>"], "has '<|user|>'; each is written once"),
        (["two words"], "has 'two words'; each is written once, without white space"),
        ([""], "has ''; each"),
        ([EOT], "is not <|endoftext|>, which every tokenizer has"),
    ],
)
def test_what_cannot_be_one_is_refused_in_a_sentence(text, tmp_path, capsys, texts, sentence):
    assert fit(*small_run(text, tmp_path, f"--data.special_tokens={json.dumps(texts)}")) == 2
    assert sentence in capsys.readouterr().err


def test_single_characters_take_none(text, tmp_path, capsys):
    assert fit(*small_run(text, tmp_path, f"--data.special_tokens={json.dumps(OWN)}", "--data.tokenizer=char")) == 2
    assert "does not go with data.tokenizer=char" in capsys.readouterr().err
    with pytest.raises(UserError, match="does not go with"):
        with_special_tokens(new_tokenizer("char"), OWN)


def test_shards_that_were_made_without_them_are_refused(text, tmp_path, capsys):
    options = small_run(text, tmp_path, f"--data.shards_dir={tmp_path / 'shards'}")
    assert main(["prepare", *options]) == 0
    ready = [option for option in options if not option.startswith(("--data.source", "--data.shards_dir"))]
    ready += [f"--data.source={tmp_path / 'shards'}", f"--data.special_tokens={json.dumps(OWN)}"]
    assert fit(*ready) == 2
    assert "holds tokens that were made without it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("loop", "padded", "tied_head"),
    [(fit, None, True), (fit, 320, False), (accelerate, None, False), (accelerate, 320, True)],
)
def test_a_model_grows_and_forgets_nothing(tmp_path, capsys, loop, padded, tied_head):
    tokenizer = new_tokenizer("bpe")
    before = trained(tokenizer, vocab_size=padded, tied_head=tied_head, **SHAPE)
    start = saved(tmp_path / "start.safetensors", before, tokenizer)
    chats = tmp_path / "text.txt"
    chats.write_text(CHAT * 200)
    options = small_run(
        chats, tmp_path, f"--init_from={start}", f"--data.special_tokens={json.dumps(OWN)}", "--model.optim.lr=1e-9",
        "--model.gpt.dropout=0", "--data.block_size=32",
    )  # fmt: skip
    assert loop(*options) == 0
    last = tmp_path / LOOPS[loop] / "checkpoints/last.safetensors"
    gpt, grown = load_network(last)
    assert gpt.config.vocab_size == (padded or 303)
    tokens = torch.from_numpy(tokenizer.encode(TEXT)[:32].astype("int64"))[None]
    with torch.no_grad():
        old, now = before(tokens)[..., :301], gpt(tokens)[..., :303]
    assert torch.allclose(now[..., :301], old, rtol=0, atol=1e-5)
    for new in (301, 302):  # the mean of all logits, which takes next to nothing from those that were learnt
        assert torch.allclose(now[..., new], old.mean(dim=-1), rtol=0, atol=1e-5)
    assert grown.encode(OWN[1]).tolist() == [302]
    # Its text is not made into tokens again when it goes on.
    capsys.readouterr()
    assert loop(*options, "--resume=auto", "--trainer.max_steps=10") == 0
    assert "preparing" not in capsys.readouterr().out
    assert load_run(last).step == 10


def test_the_plan_knows_the_rows_of_a_new_run(text, tmp_path, capsys):
    parameters = []
    for more in ([], [f"--data.special_tokens={json.dumps(OWN)}"]):
        assert main(["plan", "--vram=4GiB", "--os=linux", "--json", *small_run(text, tmp_path, *more)]) == 0
        parameters.append(json.loads(capsys.readouterr().out)["parameters"])
    assert parameters[1] - parameters[0] == 2 * 8
