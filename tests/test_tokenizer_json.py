"""Tokenizers in the shape of SmolLM2's, Llama 3's and Qwen3's files, with the package tokenizers at the other end."""

import json
import unicodedata
from pathlib import Path

import pytest
from small_networks import LANGUAGES, TEXT, much_text
from tokenizers import Tokenizer as Theirs

from nanogpt_lit.cli.beginning import option_of
from nanogpt_lit.data.bpe import all_merges_of, as_characters, merges_of, train_ranks
from nanogpt_lit.data.documents import cut_pieces
from nanogpt_lit.data.tokenizer import BytePairTokenizer
from nanogpt_lit.data.tokenizer_files import tokenizer_from_file, tokenizer_from_files, with_special_tokens
from nanogpt_lit.data.tokenizer_json_reader import from_hugging_face
from nanogpt_lit.data.tokenizer_json_writer import to_hugging_face
from nanogpt_lit.errors import UserError

WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
"""Llama 3's; Qwen's is the same with one digit at a time."""
AWKWARD = (
    "", " ", "  1", "a  1 b", "12  \n 3\t4\n\n5 ", "IT'S they'LL'd", "!!\n\n?\r\n  ", "½ Ⅷ ١٢٣ x\u00a0\u20039",
    "e\u0301 A\u030a \u212b \u1100\u1161 o\u0338<", "def f(x):\n    return x  # 3.14  \n", *LANGUAGES,
)  # fmt: skip


def byte_level(use_regex):
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def split_by(pattern):
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, byte_level(False)]}


DIGITS_APART = {
    "type": "Sequence",
    "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level(True)],
}
FIRST, TEXT_ITSELF = (
    {"SpecialToken": {"id": "<|begin_of_text|>", "type_id": 0}},
    {"Sequence": {"id": "A", "type_id": 0}},
)
BEGIN = {
    "type": "TemplateProcessing",
    "single": [FIRST, TEXT_ITSELF],
    "pair": [FIRST, TEXT_ITSELF, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"<|begin_of_text|>": {"id": "<|begin_of_text|>", "ids": [301], "tokens": ["<|begin_of_text|>"]}},
}


def written(folder, kind):
    """A folder with the two files as the family of models has them, and a small vocabulary."""
    ranks = train_ranks([TEXT], 300)
    bos = nfc = post = None
    words, special, merges = [], ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], merges_of(ranks)
    eos = "<|im_end|>"
    match kind:
        case "smollm":  # its vocabulary lacks bytes that no text had
            ranks = {token: rank for token, rank in ranks.items() if token not in (b"\x04", b"\xff")}
            pre, bos = DIGITS_APART, "<|im_start|>"
        case "llama3":  # some of its tokens are whole words that no merge makes
            ranks[b".:.:"] = 300
            merges = all_merges_of(ranks)
            pre, special, post = (
                split_by(WORDS),
                ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"],
                {
                    "type": "Sequence",
                    "processors": [byte_level(True), BEGIN],
                },
            )
            bos, eos = "<|begin_of_text|>", "<|eot_id|>"
        case "qwen":
            pre, nfc, words = split_by(WORDS.replace("{1,3}", "")), {"type": "NFC"}, ["<think>", "</think>"]
            post = byte_level(False)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    texts, first = [*special, *words], 301 if kind == "llama3" else 300
    described = {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [
            {"id": first + n, "content": text, **flags, "special": text in special} for n, text in enumerate(texts)
        ],
        "normalizer": nfc, "pre_tokenizer": pre, "post_processor": post, "decoder": byte_level(True),
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
            "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False, "ignore_merges": kind == "llama3",
            "vocab": {
                **{as_characters(token): rank for token, rank in ranks.items()},
                **({text: first + n for n, text in enumerate(special)} if kind == "smollm" else {}),
            },
            "merges": [f"{as_characters(left)} {as_characters(right)}" for left, right in merges],
        },
    }  # fmt: skip
    config = {
        "bos_token": bos,
        "eos_token": {"__type": "AddedToken", "content": eos, **flags},
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(described))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return described


KINDS = ["smollm", "llama3", "qwen"]


@pytest.mark.parametrize("kind", KINDS)
def test_its_ids_are_those_of_the_package_tokenizers(tmp_path, kind):
    theirs = Theirs.from_str(json.dumps(written(tmp_path / kind, kind)))
    ours = from_hugging_face(tmp_path / kind)
    texts = [*AWKWARD, unicodedata.normalize("NFD", TEXT), much_text()]
    specials = sorted(ours.specials.keys() - {ours.eot_text})
    texts += [f"a {text} 1{text}\u0338b  {text}{text}\n" for text in specials]
    for text in texts:
        assert ours.encode(text).tolist() == theirs.encode(text, add_special_tokens=False).ids, text[:40]
    assert ours.decode(ours.encode(TEXT)) == TEXT
    text = much_text()
    pieces = list(cut_pieces([text[n : n + 1000] for n in range(0, len(text), 1000)]))  # as a long document is read
    assert len(pieces) > 1
    joined = ours.encode_stream([(piece, False) for piece in pieces]).tolist()
    assert (
        ours.encode("".join(pieces)).tolist() == [token for piece in pieces for token in ours.encode(piece)] == joined
    )


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_written_as_it_was_read_and_survives_its_files(tmp_path, kind):
    read = written(tmp_path / kind, kind)
    ours = from_hugging_face(tmp_path / kind)
    again = to_hugging_face(ours)
    assert again["added_tokens"] == read["added_tokens"]
    assert again["normalizer"] == read["normalizer"]
    assert again["model"]["ignore_merges"] == read["model"]["ignore_merges"]
    assert [" ".join(pair) for pair in again["model"]["merges"]] == read["model"]["merges"]
    before, after = (Theirs.from_str(json.dumps(described)) for described in (read, again))
    for text in (*AWKWARD, "<|im_end|>x<think>1"):
        assert after.encode(text).ids == before.encode(text).ids  # with what is put before a text
        assert after.decode(after.encode(text).ids) == before.decode(before.encode(text).ids)
    grown = with_special_tokens(ours, ["<|mine|>"])
    assert grown.encode("<|mine|>").tolist() == [ours.vocab_size]
    for tokenizer in (ours, grown):
        for twin in (
            tokenizer_from_files(tokenizer.files()),
            tokenizer_from_file(Path(option_of(tokenizer, tmp_path))),
        ):
            assert twin.sha256 == tokenizer.sha256
            assert (twin.eot_text, twin.nfc) == (tokenizer.eot_text, tokenizer.nfc) == (ours.eot_text, ours.nfc)
            assert vars(twin.conventions) == vars(ours.conventions)
            assert twin.encode("e\u0301 12").tolist() == ours.encode("e\u0301 12").tolist()


def test_the_token_that_begins_a_document_is_end_of_text_or_the_one_that_begins_a_text_there(tmp_path):
    for kind, eot, eos in (
        ("smollm", "<|endoftext|>", "<|im_end|>"),
        ("llama3", "<|begin_of_text|>", "<|eot_id|>"),
        ("qwen", "<|endoftext|>", "<|im_end|>"),
    ):
        written(tmp_path / kind, kind)
        ours = from_hugging_face(tmp_path / kind)
        assert (ours.eot_text, ours.conventions.eos, ours.conventions.adds_bos) == (eot, eos, kind == "llama3")
        assert ours.encode_stream([("a", True), ("b", True)])[0] == ours.specials[eot] == ours.eot
        assert ours.eot not in ours.encode(f"a{eot}b")  # which is plain text in a document
        assert ours.decode([ours.eot]) == eot


@pytest.mark.parametrize("where", ["in tokenizer_config.json", "one of several there", "in a file of its own"])
def test_the_chat_template_comes_along(tmp_path, where):
    written(tmp_path, "smollm")
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    several = [{"name": "default", "template": template}, {"name": "tool_use", "template": "x"}]
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    if where == "in a file of its own":
        (tmp_path / "chat_template.jinja").write_text(template)
        config["chat_template"] = "an older one"
    else:
        config["chat_template"] = several if "several" in where else template
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert from_hugging_face(tmp_path).chat_template == template


def test_a_byte_that_is_no_token_is_named_and_not_left_out(tmp_path):
    written(tmp_path / "smollm", "smollm")
    ours = from_hugging_face(tmp_path / "smollm")
    for encode in (ours.encode, lambda text: ours.encode_stream([(text, True)])):
        with pytest.raises(UserError, match=r"tokenizer smollm has no token for the byte 0x04, .*; leave '\\x04' out"):
            encode("a\x04b")


def changed(folder, change):
    described = json.loads((folder / "tokenizer.json").read_text())
    change(described)
    (folder / "tokenizer.json").write_text(json.dumps(described))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d["added_tokens"][1].update(lstrip=True), "has lstrip for its token '<|im_start|>'"),
        (lambda d: d["added_tokens"][2].update(content="<|im_start|>s"), "'<|im_start|>' and .* begin alike"),
        (lambda d: d["model"]["merges"].reverse(), "merges in another order"),
        (lambda d: d["model"]["vocab"].update({"a" * 10**6: 999}), "a token of 1,000,000 bytes; tokens of up to 1,024"),
        (lambda d: d.update(normalizer={"type": "NFKC"}), r"changes text before it is cut \(NFKC\)"),
        (lambda d: d["pre_tokenizer"]["pretokenizers"][0].update(individual_digits=False), "cuts text into words in"),
        (lambda d: d["pre_tokenizer"]["pretokenizers"].insert(0, {"type": "Whitespace"}), "cuts text into words in"),
        (
            lambda d: d.update(post_processor={"type": "TemplateProcessing", "single": [
                {"Sequence": {"id": "A"}}, {"SpecialToken": {"id": "<|im_end|>"}},
            ]}), "adds tokens around a text",
        ),
        (lambda d: d["model"].update(byte_fallback=True), "byte_fallback=True"),
    ],
)  # fmt: skip
def test_what_ours_would_read_otherwise_is_refused_in_a_sentence(tmp_path, change, said):
    written(tmp_path / "smollm", "smollm")
    changed(tmp_path / "smollm", change)
    with pytest.raises(UserError, match=said):
        from_hugging_face(tmp_path / "smollm")


def test_special_tokens_that_a_file_only_speaks_of_are_refused(tmp_path):
    written(tmp_path / "smollm", "smollm")
    files = from_hugging_face(tmp_path / "smollm").files()
    described = json.loads(files["tokenizer.json"])
    for change in ({"eos": "<|nowhere|>"}, {"words": 3}, {"bos": ["x"]}, {"more": 1}):
        conventions = {**described["conventions"], **change}
        with pytest.raises(UserError):
            tokenizer_from_files({**files, "tokenizer.json": json.dumps({**described, "conventions": conventions})})
    assert isinstance(tokenizer_from_files(files), BytePairTokenizer)
