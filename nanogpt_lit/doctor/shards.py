"""Whether prepared shards are, byte for byte, as they were written."""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from nanogpt_lit.doctor.finding import Finding
from nanogpt_lit.errors import UserError

BLOCK_BYTES = 1 << 22


def check_shards(folder: Path) -> Iterator[Finding]:
    # Late: tiktoken and NumPy, which the checks of the machine do without.
    from nanogpt_lit.data.shards import TokenShards, read_manifest, ready_format
    from nanogpt_lit.data.tokenizer import files_sha256, read_tokenizer_files

    kind = ready_format(folder) if folder.is_dir() else None
    if kind is None:
        yield Finding("look", "shards", f"none are in {folder} yet; fit prepares them")
        return
    try:
        train, val = (TokenShards.open(folder, side) for side in ("train", "val"))
        told = f"{len(train):,} tokens to train on and {len(val):,} to validate on in {folder}"
        if kind != "ours":
            yield Finding("ok", "shards", f"{told}, in {kind}'s format, which keeps no checksums")
            return
        manifest = read_manifest(folder)
        if files_sha256(read_tokenizer_files(folder)) != manifest["tokenizer"]["sha256"]:
            raise UserError(
                f"the tokenizer in {folder} is not the one its shards were made with; prepare the data again."
            )
        listed = [shard for split in manifest["splits"].values() for shard in split["shards"]]
        damaged = set(changed(folder, listed))
        vocabulary = manifest["tokenizer"]["vocab_size"]
        # The header has no checksum. Its other fields have been compared with the file and the manifest.
        damaged |= {file.path.name for file in (*train.files, *val.files) if file.vocab_size != vocabulary}
    except (UserError, OSError, KeyError, TypeError) as error:
        yield Finding("wrong", "shards", sentence(error, folder))
        return
    for name in sorted(damaged):
        told = f"{folder / name} is not as it was written: remove {folder}, fit prepares it again"
        yield Finding("wrong", "shards", told)
    if not damaged:
        yield Finding("ok", "shards", f"{told}, every byte as it was written")


def changed(folder: Path, listed: list[dict[str, Any]]) -> Iterator[str]:
    """The files whose tokens have another sha256 than the manifest says."""
    with ThreadPoolExecutor() as hashing:  # it leaves the interpreter to others
        found = hashing.map(lambda shard: tokens_sha256(folder / shard["file"]), listed)
        for shard, digest in zip(listed, found, strict=True):
            if digest != shard["sha256"]:
                yield shard["file"]


def tokens_sha256(path: Path) -> str:
    from nanogpt_lit.data.shard_file import HEADER_BYTES

    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(HEADER_BYTES)
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def sentence(error: Exception, folder: Path) -> str:
    if isinstance(error, ValueError):
        return str(error).rstrip(".")
    return f"{folder} cannot be checked ({type(error).__name__}: {error}): remove it, fit prepares it again"
