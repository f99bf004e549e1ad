"""Documents in rows: JSON Lines, Parquet, and data sets of the Hugging Face hub, streamed."""

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nanogpt_lit.data.documents import TextDocument, UndecodableError, opened
from nanogpt_lit.data.tokenizer import without_surrogates
from nanogpt_lit.errors import UserError

ROWS_AT_ONCE = 256


def jsonl_documents(path: Path, key: str, skipped: set[str] | None) -> Iterator[TextDocument]:
    """The text under `key` of every line. Raises UserError for a line that has none."""
    for row, where in jsonl_rows(path, f"{{{json.dumps(key)}: ...}}", skipped):
        text = text_of(row, key, where)
        # An escape can bring half a surrogate pair into JSON.
        yield TextDocument(text if text.isascii() else without_surrogates(text))


def jsonl_rows(path: Path, example: str, skipped: set[str] | None) -> Iterator[tuple[dict[str, Any], str]]:
    """Every line, and its place for errors; empty lines do not count.

    example: of a line, for errors
    skipped: None refuses a line that is not UTF-8; a set has its place added and the line left out.
    Raises UserError with file and line for one that is not a JSON object.
    """
    offset = 0
    with opened(path) as file:
        for number, line in enumerate(file, 1):
            where = f"data.source: {path}, line {number}"
            offset += len(line)
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                if skipped is None:
                    raise UndecodableError(path, offset - len(line) + error.start) from error
                skipped.add(f"{path}, line {number}")
                continue
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{where} is not JSON ({error}).") from error
            if not isinstance(row, dict):
                raise UserError(f"{where} is not a JSON object such as {example}.")
            yield row, where


def parquet_documents(path: Path, key: str) -> Iterator[TextDocument]:
    """The column `key`, a few rows in memory at a time. Raises UserError without that column or without pyarrow."""
    number = 0
    try:
        with _parquet(path, key) as file:
            for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, columns=[key]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    yield TextDocument(text_of({key: value}, key, f"data.source: {path}, row {number}"))
    except UserError:
        raise
    except (OSError, ValueError, MemoryError) as error:  # pyarrow's, and text that is no UTF-8
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"data.source: {path} cannot be read after row {number} ({reason}).") from error


def parquet_text_bytes(path: Path, key: str) -> int:
    """About how many bytes of text the column holds, by the file's own statistics."""
    with _parquet(path, key) as file:
        groups = (file.metadata.row_group(i) for i in range(file.metadata.num_row_groups))
        columns = (group.column(i) for group in groups for i in range(group.num_columns))
        return sum(column.total_uncompressed_size for column in columns if column.path_in_schema == key)


def _parquet(path: Path, key: str) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(
            f'data.source={path}: Parquet needs the package pyarrow: `pip install "nanogpt_lit[parquet]"`.'
        ) from error
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"data.source: {path} is not a readable Parquet file ({error}).") from error
    names = file.schema_arrow.names
    if key not in names:
        raise UserError(f"data.source: {path} has no column {key!r} (data.text_key); its columns: {', '.join(names)}.")
    return file


def hub_documents(name: str, config: str | None, key: str) -> Iterator[TextDocument]:
    """The column `key` of the train split of a hub data set, streamed. Raises UserError without `datasets`."""
    source = f"data.source=hf:{name}" + (f":{config}" if config else "")
    # The text is fetched, and nothing is told about this machine.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise UserError(f'{source} needs the package datasets: `pip install "nanogpt_lit[hub]"`.') from error
    try:
        with retries_said_once():
            rows = load_dataset(name, config, split="train", streaming=True)
            for number, row in enumerate(rows, 1):
                yield TextDocument(text_of(row, key, f"{source}, row {number}"))
    except OSError as error:  # no such data set, no network, a connection that broke: all are OSErrors
        raise UserError(f"{source} cannot be read: {error}") from error


def text_of(row: dict[str, Any], key: str, where: str) -> str:
    """The text under the key. Raises UserError naming the keys there are, or what stands there instead of text."""
    if key not in row:
        raise UserError(f"{where} has no {key!r} (data.text_key); its keys: {', '.join(map(str, row)) or 'none'}.")
    value = row[key]
    if not isinstance(value, str):
        raise UserError(f"{where}: {key!r} (data.text_key) holds {type(value).__name__}, not text.")
    return value


@contextmanager
def retries_said_once() -> Iterator[None]:
    """Say in one line that the hub does not answer; its library says two with each of half a dozen tries."""
    logger, said_once = logging.getLogger("huggingface_hub.utils._http"), _SaidOnce()
    logger.addFilter(said_once)
    try:
        yield
    finally:
        logger.removeFilter(said_once)


class _SaidOnce(logging.Filter):
    def __init__(self) -> None:
        super().__init__()
        self._said = False

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING:
            return True
        if not self._said:
            print("hub: no answer; trying again for half a minute", file=sys.stderr, flush=True)
        self._said = True
        return False
