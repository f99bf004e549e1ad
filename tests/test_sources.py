"""Sources against the files they were written from."""

import json
import os
import platform
import sys
import sysconfig
from contextlib import suppress
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from huggingface_hub.utils import http_backoff

from nanogpt_lit.data.sources import FilesSource, open_source
from nanogpt_lit.errors import UserError


def texts(source: object, **options: Any) -> list[str]:
    return ["".join(document.pieces()) for document in open_source(str(source), **options).documents()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, data in {
        "b.md": b"# b\n",
        "a/z.txt": b"z\r\n",
        "a.py": b"a = 1\n",
        "a/.hidden": b"no",
        ".git/config": b"no",
        "picture.png": b"\x89PNG\x00no",
        "rows.jsonl": b'{"text": "r1"}\n{"text": "r2"}\n',
    }.items():
        path = tmp_path / "corpus" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path / "corpus"


def test_a_folder_is_its_text_files_in_the_order_of_their_names(folder: Path) -> None:
    assert texts(folder) == ["a = 1\n", "z\n", "# b\n", "r1", "r2"]
    source = open_source(str(folder))
    assert [list(d.pieces()) for d in source.documents()] == [list(d.pieces()) for d in source.documents()]


def test_the_standard_library_is_the_running_ones_without_tests_and_packages() -> None:
    source = open_source("stdlib")
    assert isinstance(source, FilesSource)
    root = Path(sysconfig.get_path("stdlib"))
    names = [path.relative_to(root).as_posix() for path in source.text_paths]
    assert texts("stdlib") == [(root / name).read_text(encoding="utf-8-sig") for name in names]
    assert {"argparse.py", "json/decoder.py"} <= set(names)
    assert names == sorted(names)
    assert not any({"test", "tests", "site-packages"} & set(Path(name).parts) for name in names)
    assert source.text_bytes() == sum((root / name).stat().st_size for name in names)
    assert source.fingerprint()["python"] == platform.python_version()
    assert not source.skipped


def test_json_lines_give_the_named_column(tmp_path: Path) -> None:
    path = tmp_path / "a.ndjson"
    rows = [{"text": "bir\r\n"}, {"text": "iki 🙂", "more": 1}, {"text": "lone \ud800 half"}]
    path.write_text("\ufeff" + "\n\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    assert texts(path) == ["bir\r\n", "iki 🙂", "lone \ufffd half"]
    path.write_text('{"content": "here"}\n', encoding="utf-8")
    assert texts(path, text_key="content") == ["here"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"text": "cut', r"a\.jsonl, line 2 is not JSON"),
        ('["text"]', r"a\.jsonl, line 2 is not a JSON object"),
        ('{"body": "x", "id": 1}', r"a\.jsonl, line 2 has no 'text' \(data\.text_key\); its keys: body, id"),
        ('{"text": null}', r"a\.jsonl, line 2: 'text' .* holds NoneType, not text"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=said):
        texts(path)


def test_an_undecodable_line_is_refused_or_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n{"text": "c"}\n')
    with pytest.raises(ValueError, match=r"not UTF-8 text \(byte 24\)"):
        texts(path)
    source = open_source(str(path), skip_undecodable=True)
    for _ in range(2):
        assert ["".join(d.pieces()) for d in source.documents()] == ["a", "c"]
        assert source.skipped == {f"{path}, line 2"}


def test_parquet_gives_the_named_column_across_row_groups(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    rows = [f"row {i} əğış" for i in range(1000)]
    pyarrow.parquet.write_table(pyarrow.table({"id": range(1000), "text": rows}), path, row_group_size=300)
    assert texts(path) == rows
    n_bytes = sum(len(row.encode()) for row in rows)
    assert n_bytes <= open_source(str(path)).text_bytes() <= 2 * n_bytes  # lengths and page headers on top
    with pytest.raises(ValueError, match=r"no column 'body' \(data\.text_key\); its columns: id, text"):
        texts(path, text_key="body")
    with pytest.raises(ValueError, match=r"row 1: 'id' .* holds int, not text"):
        texts(path, text_key="id")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a readable Parquet file"):
        texts(path)


def test_a_hub_data_set_is_streamed_with_its_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load_dataset(*args: Any, **options: Any) -> list[dict[str, str]]:
        calls.append((args, options))
        return [{"text": "one"}, {"text": "two"}]

    module = ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    assert texts("hf:owner/name:az") == ["one", "two"]
    assert texts("hf:owner/name") == ["one", "two"]
    assert calls[0] == (("owner/name", "az"), {"split": "train", "streaming": True})
    assert calls[1][0] == ("owner/name", None)
    with pytest.raises(ValueError, match="has no 'body'"):
        texts("hf:owner/name", text_key="body")

    def no_network(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route to huggingface.co")

    module.load_dataset = no_network  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"hf:owner/name cannot be read: no route"):
        texts("hf:owner/name")


def test_a_hub_that_does_not_answer_is_one_line_and_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def load_dataset(*_: Any, **__: Any) -> None:
        """As datasets does, through the hub's own library."""
        try:
            http_backoff("HEAD", "http://127.0.0.1:9/datasets/owner/name", max_retries=2, base_wait_time=0)
        except Exception as error:
            raise ConnectionError("Couldn't reach 'owner/name' on the Hub") from error

    module = ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    with pytest.raises(ValueError, match=r"hf:owner/name cannot be read: Couldn't reach"):
        texts("hf:owner/name")
    assert capfd.readouterr().err == "hub: no answer; trying again for half a minute\n"


@pytest.mark.parametrize(
    ("module", "name", "extra"), [("pyarrow", "a.parquet", "parquet"), ("datasets", "hf:owner/name", "hub")]
)
def test_a_missing_extra_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, name: str, extra: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=rf'pip install "nanogpt_lit\[{extra}\]"'):
        texts(name)


def test_what_is_no_source_is_refused_with_what_works(tmp_path: Path) -> None:
    for source, said in {
        str(tmp_path / "missing"): r"data\.source=.*missing does not exist; what works: stdlib",
        "https://example.org/a.txt": r"is an address; download it",
        "": r"data\.source is empty; what works",
        "hf:name": r"written hf:OWNER/NAME",
        str(tmp_path): "holds no text",
    }.items():
        with pytest.raises(ValueError, match=said):
            open_source(source)
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match=r"holds no text: 1 files, all empty"):
        open_source(str(tmp_path))
    if os.name == "posix":
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(ValueError, match="neither a file nor a folder"):
            open_source(str(tmp_path / "pipe"))


def test_binary_files_alone_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"a\0b")
    for source in (tmp_path, tmp_path / "a.bin"):
        with pytest.raises(ValueError, match="only binary files"):
            texts(source)


def test_undecodable_files_are_refused_by_name_or_skipped_whole(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("fine", encoding="utf-8")
    (tmp_path / "b.txt").write_bytes(b"x" * 600_000 + b"\xff")  # found long after the first piece
    with pytest.raises(ValueError, match=r"b\.txt is not UTF-8 text \(byte 600,000\)"):
        texts(tmp_path)
    source = open_source(str(tmp_path), skip_undecodable=True)
    assert ["".join(d.pieces()) for d in source.documents()] == ["fine"]
    assert source.skipped == {str(tmp_path / "b.txt")}


def test_a_folder_that_may_not_be_listed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ValueError, match=r"data\.source: .* cannot be read \(Permission denied\)"):
        open_source(str(tmp_path))


def test_the_fingerprint_changes_with_names_sizes_and_times(folder: Path) -> None:
    def fingerprint() -> str:
        return json.dumps(open_source(str(folder)).fingerprint())

    seen = [fingerprint()]
    assert fingerprint() == seen[0]
    (folder / "a.py").rename(folder / "c.py")
    seen.append(fingerprint())
    with (folder / "c.py").open("a", encoding="utf-8") as file:
        file.write("more")
    seen.append(fingerprint())
    stat = (folder / "c.py").stat()
    os.utime(folder / "c.py", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000))
    seen.append(fingerprint())
    assert len(set(seen)) == 4


def test_nothing_is_read_until_documents_are_asked_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "open", lambda *_, **__: pytest.fail("read"))
    assert SimpleNamespace(**open_source(str(folder)).fingerprint()).files == 5


def test_a_deeply_nested_line_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n' + "[" * 200_000 + "\n")
    with pytest.raises(UserError, match="line 2 is not JSON"):
        list(open_source(str(tmp_path / "x.jsonl")).documents())


def test_parquet_with_damage_or_text_that_is_no_utf8_is_one_sentence(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    raw = pyarrow.Array.from_buffers(
        pyarrow.string(), 2, pyarrow.array([b"caf\xe9", b"ok"], type=pyarrow.binary()).buffers()
    )
    parquet.write_table(pyarrow.table({"text": raw}), tmp_path / "latin.parquet")
    with pytest.raises(UserError, match=r"latin\.parquet cannot be read after row 0 .*utf-8"):
        list(open_source(str(tmp_path / "latin.parquet")).documents())
    path = tmp_path / "damaged.parquet"
    parquet.write_table(pyarrow.table({"text": [f"row {i} " * 20 for i in range(3000)]}), path)
    whole = path.read_bytes()
    for place in range(4, len(whole), len(whole) // 40):
        path.write_bytes(whole[:place] + bytes(b ^ 0xFF for b in whole[place : place + 8]) + whole[place + 8 :])
        with suppress(UserError):  # damage that still is text cannot be known
            list(open_source(str(path)).documents())


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no such files")
def test_a_pipe_is_no_source(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(UserError, match="neither a file nor a folder"):
        open_source(str(tmp_path / "pipe.txt"))
    with pytest.raises(UserError, match="holds no text"):
        open_source(str(tmp_path))
