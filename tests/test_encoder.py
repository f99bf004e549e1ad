"""The held-out side, by document where documents can be spared."""

from collections.abc import Iterator
from typing import Any

import pytest

from nanogpt_lit.data.documents import TextDocument
from nanogpt_lit.data.encoder import Split


class Texts:
    """A source of texts in memory."""

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts
        self.skipped: set[str] = set()
        self.n_read = 0

    def documents(self) -> Iterator[TextDocument]:
        for text in self.texts:
            self.n_read += 1
            yield TextDocument(text)

    def fingerprint(self) -> dict[str, Any]:
        return {}

    def text_bytes(self) -> None:
        return None


def sides(texts: list[str], val_fraction: float) -> dict[str, list[str]]:
    source = Texts(texts)
    split = Split.plan(source, val_fraction)
    found: dict[str, list[str]] = {"train": [], "val": []}
    for document in source.documents():
        for side, pieces in split.parts(document):
            found[side].append("".join(pieces))
    return found


TEXTS = [f"document {i}\n" * 3 for i in range(4000)]


def test_every_document_is_on_one_side_and_the_share_is_right() -> None:
    found = sides(TEXTS, 0.1)
    assert sorted(found["train"] + found["val"]) == sorted(TEXTS)
    # 400 expected, standard deviation sqrt(4000 * 0.1 * 0.9) = 19: four of them.
    assert abs(len(found["val"]) - 400) < 76
    assert found["val"] == [text for text in TEXTS if text in set(found["val"])]  # in the order of the source


def test_documents_stay_on_their_side_as_the_source_grows() -> None:
    before, after = sides(TEXTS[:2000], 0.1), sides(TEXTS, 0.1)
    assert set(before["val"]) <= set(after["val"])
    assert set(before["train"]) <= set(after["train"])
    grown = sides([text + "appended\n" * 10 for text in (t * 200 for t in TEXTS[:50])], 0.1)
    assert [t[:1000] for t in grown["val"]] == [t[:1000] for t in sides([t * 200 for t in TEXTS[:50]], 0.1)["val"]]


@pytest.mark.parametrize("n", range(2, 40))
@pytest.mark.parametrize("val_fraction", [0.5, 0.3])
def test_neither_side_is_ever_empty(n: int, val_fraction: float) -> None:
    for start in range(0, 400, 40):
        found = sides(TEXTS[start : start + n], val_fraction)
        assert found["train"]
        assert found["val"]


def test_planning_reads_no_more_documents_than_it_needs() -> None:
    source = Texts(["", *TEXTS])
    Split.plan(source, 0.1)
    assert source.n_read == 11  # the empty one does not count


def test_few_documents_give_up_their_last_part_each() -> None:
    texts = ["".join(f"{name} {i:04}\n" for i in range(1000)) for name in "abc"]
    found = sides(texts, 0.1)
    for text, head, tail in zip(texts, found["train"], found["val"], strict=True):
        assert head + tail == text
        assert tail[2:6] == "0901"  # the cut lies inside line 900, at its start already: the next line start


def test_copies_of_one_document_give_up_their_last_part_too() -> None:
    found = sides(["the same\ntext\n"] * 100, 0.1)
    assert len(found["train"]) == len(found["val"]) == 100


@pytest.mark.parametrize("val_fraction", [0, -0.1, 0.51, 1.0, float("nan")])
def test_a_share_outside_its_range_is_refused(val_fraction: float) -> None:
    with pytest.raises(ValueError, match=r"data\.val_fraction"):
        Split.plan(Texts(TEXTS), val_fraction)


def test_a_source_of_empty_documents_is_refused() -> None:
    with pytest.raises(ValueError, match="holds no text"):
        Split.plan(Texts(["", ""]), 0.1)
