"""Tensors that are sharded over processes: each process writes its own part, into a folder beside the checkpoint.

torch's distributed checkpoint plans who writes and who reads which part, for any number of processes before and after.
By itself it would write pickles. Here the parts are safetensors with checksums, and an index in the checkpoint says
where each is: the checkpoint is there once its index is, and `last` and `best` of one step share their parts.
"""

import json
import math
import shutil
from collections.abc import Callable, Iterable, Mapping
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from nanogpt_lit.checkpoint.tensor_file import DTYPE_OF, DTYPES, HEADER_DIGEST, SUFFIX, TensorFile, write_tensors
from nanogpt_lit.errors import UserError
from nanogpt_lit.runtime.durable import check_space, durable_file, sync_folder
from nanogpt_lit.runtime.processes import rank
from nanogpt_lit.untrusted.config_values import file_inside

SHARDS = "nanogpt_lit_shards"
"""The key of a checkpoint's metadata under which the index is, JSON."""
FOLDER = ".shards"
"""Suffix of the folder."""
Index = dict[str, Any]
"""folder: its name   files: name to the digest of its header
tensors: name to its dtype, its shape and its parts, each (file, offsets, sizes)"""
Part = tuple[TensorFile, torch.Size, torch.Size]
"""The file, under the whole tensor's name; where in the whole the part begins; its shape."""


# Writing.


def write_shards(folder: Path, tensors: Mapping[str, Tensor], finish: Callable[[Index], None]) -> None:
    """Write a folder of shards; all processes together, each its part.

    finish: what the first process does with the index once all parts are on the disk
    Raises on all processes what went wrong on any, and leaves nothing then.
    """
    from torch.distributed.checkpoint.api import CheckpointException  # late, for few runs are sharded
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
    from torch.distributed.checkpoint.state_dict_saver import save

    try:
        planner = DefaultSavePlanner(flatten_state_dict=False)
        save(dict(tensors), storage_writer=part_writer(folder, tensors, finish), planner=planner)
    except CheckpointException as failed:
        if rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
        raise first_of(failed) from None


def first_of(failed: Any) -> BaseException:
    """The error of one process: what is not the disk's before what is. failed: a CheckpointException"""
    errors = [error for error, _ in failed.failures.values()]
    return next((error for error in errors if not isinstance(error, OSError)), errors[0])


def part_writer(folder: Path, tensors: Mapping[str, Tensor], finish: Callable[[Index], None]) -> Any:
    """Writer that carries out the plan of a distributed checkpoint."""
    from torch.distributed.checkpoint.metadata import Metadata
    from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
    from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
    from torch.futures import Future

    class PartWriter(StorageWriter):
        def reset(self, checkpoint_id: Any = None) -> None: ...

        def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
            if is_coordinator:
                check_space(folder, sum(tensor.nbytes for tensor in tensors.values()))

        def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
            return plan

        def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
            return plans

        def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
            mine = {item.index.fqn: planner.resolve_data(item) for item in plan.items}
            path = folder / f"{rank()}{SUFFIX}"
            with durable_file(path) as file:
                digest = write_tensors(file, mine, {})  # type: ignore[arg-type]  # there are only tensors
            written: Future[list[WriteResult]] = Future()
            written.set_result([WriteResult(item.index, 0, (path.name, digest)) for item in plan.items])
            return written

        def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
            places = {
                (result.index.fqn, result.index.offset): result.storage_data for part in results for result in part
            }
            for name in (files := dict(places.values())):
                if not (folder / name).exists():
                    raise UserError(
                        f"{folder} lacks {name}, which process {Path(name).stem} has written to another disk: shards "
                        "need one that all machines see; set trainer.default_root_dir to a folder there."
                    )
            index: Index = {"folder": folder.name, "files": files, "tensors": {}}
            for name, stored in metadata.state_dict_metadata.items():
                parts = [
                    (places[name, chunk.offsets][0], list(chunk.offsets), list(chunk.sizes))
                    for chunk in stored.chunks  # type: ignore[union-attr]
                ]
                dtype = DTYPES[stored.properties.dtype]  # type: ignore[union-attr]
                index["tensors"][name] = {"dtype": dtype, "shape": list(stored.size), "parts": parts}  # type: ignore[union-attr]
            sync_folder(folder.parent)  # the folder's own name has to be there before what names it
            finish(index)

        @classmethod
        def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
            return True

    return PartWriter()


def sweep_shards(checkpoints: Path) -> None:
    """Removes the folders of shards that no checkpoint in this folder names any more, or yet."""
    folders = [path for path in checkpoints.glob(f"*{FOLDER}") if path.is_dir() and not path.is_symlink()]
    if not folders:
        return
    named = set()
    for path in checkpoints.glob(f"*{SUFFIX}"):
        try:
            named.add(json.loads(TensorFile(path).metadata.get(SHARDS, "{}")).get("folder"))
        except UserError:  # damaged: nothing leads to its shards
            continue
        except OSError:  # a disk that is away
            return
    for folder in folders:
        if folder.name not in named:
            shutil.rmtree(folder, ignore_errors=True)


# Reading.


class StoredTensors:
    """All tensors of a checkpoint, those in shards too. Raises UserError, naming the file, where one is not whole."""

    def __init__(self, file: TensorFile) -> None:
        self._file = file
        self._parts: dict[str, list[Part]] = {}
        self._described = {name: file.described(name) for name in file.names}
        index = json.loads(file.metadata.get(SHARDS, "{}"))
        self._shards: dict[str, TensorFile] = {}
        if index:
            beside = (file.path.resolve() if file.path.is_symlink() else file.path).parent
            folder = file_inside(beside, index["folder"], file.path.name)
            for name, digest in index["files"].items():
                self._shards[name] = self._opened(file_inside(folder, name, file.path.name), digest)
            for name, stored in index["tensors"].items():
                self._add(name, stored)

    def _opened(self, path: Path, digest: str) -> TensorFile:
        try:
            shard = TensorFile(path)
        except FileNotFoundError:
            raise UserError(
                f"{self._file.path} needs {path}, which is not there; it moves with its folder {path.parent.name}, or "
                "take another checkpoint of the run."
            ) from None
        if shard.metadata[HEADER_DIGEST] != digest:
            raise UserError(f"{path} is a shard of another checkpoint than {self._file.path}, which names it.")
        return shard

    def _add(self, name: str, stored: Mapping[str, Any]) -> None:
        described = DTYPE_OF[stored["dtype"]], torch.Size(stored["shape"])
        parts = [(self._shards[file], torch.Size(at), torch.Size(sizes)) for file, at, sizes in stored["parts"]]
        parts = [(file, at, sizes) for file, at, sizes in parts if math.prod(sizes)]
        for file, at, sizes in parts:
            if file.described(name) != (described[0], sizes):
                raise ValueError(f"{name} in {file.path} is another")
            if any(not 0 <= a <= a + n <= of for a, n, of in zip(at, sizes, described[1], strict=True)):
                raise ValueError(f"{name} in {file.path} lies outside of the whole")
        if sum(math.prod(sizes) for _, _, sizes in parts) != math.prod(described[1]):
            raise ValueError(f"{name} is not whole")
        self._described[name], self._parts[name] = described, parts

    @property
    def names(self) -> list[str]:
        return list(self._described)

    @property
    def files(self) -> list[Path]:
        """The checkpoint's own, and those of its shards."""
        return [file.path for file in (self._file, *self._shards.values())]

    def described(self, name: str) -> tuple[torch.dtype, torch.Size]:
        """The type and the shape of the whole tensor."""
        return self._described[name]

    def parts(self, name: str) -> list[Part]:
        shape = self._described[name][1]
        return self._parts[name] if name in self._parts else [(self._file, torch.Size([0] * len(shape)), shape)]

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The whole tensors of these names, on the CPU, each compared with its checksum."""
        names = list(names)
        return self._file.read(name for name in names if name not in self._parts) | {
            name: self._whole(name) for name in names if name in self._parts
        }

    def _whole(self, name: str) -> Tensor:
        dtype, shape = self._described[name]
        whole = torch.empty(shape, dtype=dtype)
        for file, at, sizes in self._parts[name]:
            whole[tuple(slice(a, a + n) for a, n in zip(at, sizes, strict=True))] = file.read([name])[name]
        return whole

    def read_into(self, tensors: dict[str, Tensor]) -> None:
        """Fills sharded tensors; all processes together, each its part of them.

        Raises on all processes what went wrong on any.
        """
        from torch.distributed.checkpoint.api import CheckpointException
        from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
        from torch.distributed.checkpoint.state_dict_loader import load

        try:
            planner = DefaultLoadPlanner(flatten_state_dict=False)
            load(tensors, storage_reader=part_reader(self, tensors), planner=planner)
        except CheckpointException as failed:
            raise first_of(failed) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for file in (self._file, *self._shards.values()):
            file.__exit__(kind, error, traceback)


def part_reader(stored: StoredTensors, names: Iterable[str]) -> Any:
    """Reader that carries out the plan of a distributed checkpoint."""
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        Metadata,
        TensorProperties,
        TensorStorageMetadata,
    )
    from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
    from torch.distributed.checkpoint.storage import StorageReader
    from torch.futures import Future

    def described(name: str) -> TensorStorageMetadata:
        dtype, shape = stored.described(name)
        chunks = [ChunkStorageMetadata(at, sizes) for _, at, sizes in stored.parts(name)]
        return TensorStorageMetadata(TensorProperties(dtype), shape, chunks)

    class PartReader(StorageReader):
        def reset(self, checkpoint_id: Any = None) -> None: ...

        def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
            return Metadata({name: described(name) for name in names})

        def set_up_storage_reader(self, *args: Any, **kwargs: Any) -> None: ...

        def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
            return plan

        def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
            return plans

        def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
            def place(item: Any) -> tuple[str, torch.Size]:
                return item.storage_index.fqn, item.storage_index.offset

            for (name, offset), items in groupby(sorted(plan.items, key=place), place):
                (file,) = (file for file, at, _ in stored.parts(name) if at == offset)
                part = file.read([name])[name]
                for item in items:
                    wanted = zip(item.storage_offsets, item.lengths, strict=True)
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(part[tuple(slice(a, a + n) for a, n in wanted)])
                    planner.commit_tensor(item, target)
            read: Future[None] = Future()
            read.set_result(None)
            return read

        @classmethod
        def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
            return True

    return PartReader()
