"""Documents against Python's own text files, and cuts against the tokens of the uncut text."""

import os
import random
from itertools import chain
from pathlib import Path

import pytest

from nanogpt_lit.data import documents
from nanogpt_lit.data.documents import FileDocument, TextDocument, UndecodableError, cut_pieces, last_cut, opened
from nanogpt_lit.data.tokenizer import GPT2Tokenizer


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "PIECE_CHARS", 100)
    monkeypatch.setattr(documents, "BLOCK_BYTES", 101)  # odd, so that blocks end inside characters


def test_both_sides_of_a_cut_have_the_tokens_of_the_whole() -> None:
    gpt2 = GPT2Tokenizer()
    rng = random.Random(0)
    parts = [
        "word",
        " ",
        "\n",
        "x1",
        "'s",
        "  ",
        "\n\n",
        "\t",
        "é",
        "日本",
        "\u00a0",
        "\r\n",
        ";",
        "İ",
        " (",
        "3.14",
        "\x1f",
    ]
    n_cut = 0
    for _ in range(2000):
        text = "".join(rng.choices(parts, k=12))
        cut = last_cut(text)
        if cut < len(text):
            n_cut += 1
            assert [*gpt2.encode(text[:cut]), *gpt2.encode(text[cut:])] == gpt2.encode(text).tolist(), (text, cut)
    assert n_cut > 500


def test_pieces_of_real_text_have_the_tokens_of_the_whole(small_pieces: None) -> None:
    gpt2 = GPT2Tokenizer()
    text = Path(__file__).read_text(encoding="utf-8")
    pieces = list(TextDocument(text).pieces())
    assert len(pieces) > 30
    assert list(chain.from_iterable(map(gpt2.encode, pieces))) == gpt2.encode(text).tolist()


def test_text_without_a_place_to_cut_is_cut_all_the_same(small_pieces: None) -> None:
    assert [len(piece) for piece in cut_pieces(["x" * 100, " " * 100, "x"])] == [100, 100, 1]
    assert list(TextDocument("").pieces()) == []


def test_a_file_is_read_as_pythons_text_files_are(tmp_path: Path, small_pieces: None) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(("\ufeff" + "Şəki\r\n日本\rfoo\n\r\n🙂 bar " * 50 + "\r").encode())
    pieces = list(FileDocument(path).pieces())
    assert len(pieces) > 5
    assert max(map(len, pieces)) <= 200
    assert "".join(pieces) == path.read_text(encoding="utf-8-sig")


@pytest.mark.parametrize("n_before", [0, 5, 100, 101, 202, 1000])
@pytest.mark.parametrize("bad", [b"\xff", b"\xe9t\xe9", b"\xf0\x9f\x99"])
def test_undecodable_bytes_are_named_with_their_place(
    tmp_path: Path, small_pieces: None, n_before: int, bad: bytes
) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"x" * n_before + bad)
    said = rf"a\.txt is not UTF-8 text \(byte {n_before:,}\).*data\.skip_undecodable: true"
    with pytest.raises(UndecodableError, match=said):
        list(FileDocument(path).pieces())
    with pytest.raises(UndecodableError):
        FileDocument(path).checked()


def test_a_division_falls_on_the_next_line_start(tmp_path: Path, small_pieces: None) -> None:
    text = "".join(f"line {i} of əğış\n" for i in range(1000))
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    for document in (TextDocument(text), FileDocument(path)):
        head, tail = ("".join(part.pieces()) for part in document.divide(0.1))
        assert head + tail == text
        assert head.endswith("\n")
        assert tail.startswith("line 9")
        assert len(tail) == pytest.approx(len(text) * 0.1, abs=25)  # a line


@pytest.mark.parametrize("text", ["", "a", "ab\n", "日", "日本語", "🙂" * 100, "x" * 50_000 + "\n", "\n", "\n\n"])
def test_a_division_without_a_line_start_near_never_cuts_a_character(
    tmp_path: Path, small_pieces: None, text: str
) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    for document in (TextDocument(text), FileDocument(path)):
        head, tail = ("".join(part.pieces()) for part in document.divide(0.1))
        assert head + tail == text
        assert bool(tail) == bool(text)


def test_an_unreadable_file_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    with pytest.raises(ValueError, match=r"gone\.txt cannot be read \(No such file"), opened(tmp_path / "gone.txt"):
        pass
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ValueError, match=r"data\.source: .*a\.txt cannot be read \(Permission denied\)"):
        list(FileDocument(tmp_path / "a.txt").pieces())


@pytest.mark.skipif(os.name != "posix", reason="sparse files and resource usage as on POSIX")
def test_a_huge_file_is_divided_without_reading_it(tmp_path: Path) -> None:
    path = tmp_path / "huge.txt"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # a terabyte of holes
    head, tail = FileDocument(path).divide(0.1)
    assert (head.stop, tail.start) == (tail.start, int((1 << 40) * 0.9))
