"""Checkpoints of sharded runs: a folder of safetensors that every rank writes its parts into.

shard-*.safetensors    parts of weights, moments and average (torch.distributed.checkpoint's, which any ranks read)
rest.ckpt              everything else, and where in it the sharded tensors belong
checksums.json         CRC-32 and size of every other file
"""

import json
import os
import shutil
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from unimodal.files import remove, sync_folder, warn, whole_file
from unimodal.shards import write

REST, CHECKSUMS, MARK = "rest.ckpt", "checksums.json", "__sharded__"

Place = tuple[str | int, ...]
"""Keys that lead to something in a checkpoint."""


class Writer:
    """A file that takes what is written to it even when there is no room: torch.save must not be interrupted."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        """Write, unless an earlier write failed."""
        if self.error is None:
            try:
                self.file.write(data)
            except OSError as error:
                self.error = error
        return len(data)

    def flush(self) -> None:
        """Nothing: the file is flushed when it is whole."""


def agreed(path: Path) -> Path:
    """What rank 0 would read."""
    held = [path]
    if dist.is_available() and dist.is_initialized():
        dist.broadcast_object_list(held)
    return held[0]


def save_sharded(checkpoint: dict[str, Any], folder: Path) -> bool:
    """Write a folder, all ranks together; whether it is there. If not, the reason was reported and nothing is left.

    Every sharded tensor goes into the files of the ranks, all else into rank 0's `rest.ckpt`.
    """
    sharded: dict[str, Tensor] = {}
    temporary, rank = folder.with_name(f".{folder.name}.tmp"), dist.get_rank()

    def take(place: Place, value: Tensor) -> Any:
        if not isinstance(value, DTensor):
            return value
        name = "/".join(map(str, place))
        sharded[name] = value.detach()
        return {MARK: name, "shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}

    rest = walk(checkpoint, take)

    def begin() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)

    def write_rest() -> None:
        with whole_file(temporary / REST) as file:
            writer = Writer(file)
            torch.save(rest, writer)  # type: ignore[arg-type]  # what is written is not read back
            if writer.error is not None:
                raise writer.error

    def own_sums() -> dict[str, list[int]]:  # each of its own file: they are large
        paths = [*temporary.glob(f"shard-{rank + 1:05d}-*"), *([temporary / REST] if rank == 0 else [])]
        return {path.name: _checksum(path) for path in paths}

    def finish(sums: dict[str, list[int]]) -> None:
        for name, (_, size) in sums.items():
            if not (temporary / name).is_file() or (temporary / name).stat().st_size != size:
                raise OSError(f"{name} is not here: expected a folder that all ranks share")
        with whole_file(temporary / CHECKSUMS) as file:
            file.write(json.dumps(sums, indent=2).encode() + b"\n")
        remove(folder)  # of a run that went on from before it
        os.replace(temporary, folder)
        sync_folder(folder.parent)

    problem, _ = _together(begin if rank == 0 else lambda: None)
    if problem is None:
        try:
            dcp.save(sharded, storage_writer=HuggingFaceStorageWriter(str(temporary), save_distributed=True))
        except CheckpointException as error:  # raised on all ranks alike
            problem = "; ".join(f"rank {rank}: {reason[0]}" for rank, reason in sorted(error.failures.items()))
    if problem is None:
        problem, _ = _together(write_rest if rank == 0 else lambda: None)
    if problem is None:
        problem, found = _together(own_sums)
        sums = {name: value for part in found for name, value in part.items()}
    if problem is None:
        problem, _ = _together((lambda: finish(sums)) if rank == 0 else lambda: None)
    if problem is not None and rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        warn(f"checkpoint: {folder} could not be written ({problem}); training goes on, earlier ones are kept")
    return problem is None


def _together(work: Callable[[], Any]) -> tuple[str | None, list[Any]]:
    """Have every rank do something that its file system may refuse: what went wrong anywhere, and what each found.

    A rank that raised would leave the others waiting, so nothing is raised here.
    """
    try:
        done: tuple[str | None, Any] = None, work()
    except (OSError, RuntimeError, ValueError) as error:
        done = f"rank {dist.get_rank()}: {error}", None
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, done)
    return next((problem for problem, _ in ranks if problem is not None), None), [found for _, found in ranks]


def load_sharded(path: Path, like: Callable[[Place], DTensor | None]) -> dict[str, Any]:
    """A checkpoint, in which this rank's parts take the place of tensors that `like` knows a sharded parameter for.

    Args:
        path: a folder, or one file, of which only those parts are read into memory.
        like: by the keys that lead to a tensor; None keeps it whole.
    """
    path = agreed(path)
    if path.is_dir():

        def part_of(place: Place, shape: list[int], dtype: torch.dtype) -> Tensor | None:
            parameter = like(place)
            return None if parameter is None else _like(parameter, dtype)

        return _read(path, part_of)
    checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)

    def cut(place: Place, value: Tensor) -> Any:
        parameter = like(place)
        if parameter is None or parameter.shape != value.shape:  # a step count, say
            return value
        part = _like(parameter, value.dtype)
        write(part, value)
        return part

    return walk(checkpoint, cut)


def consolidated(folder: Path, wanted: Callable[[Place], bool] = lambda place: True) -> dict[str, Any]:
    """The checkpoint of a folder with whole tensors, as one process writes it.

    Tensors in places that are not wanted are not read: they have a shape only (on the meta device).
    """

    def whole(place: Place, shape: list[int], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="cpu" if wanted(place) else "meta")

    return _read(folder, whole)


def _read(folder: Path, made: Callable[[Place, list[int], torch.dtype], Tensor | None]) -> dict[str, Any]:
    rest = torch.load(folder / REST, map_location="cpu", weights_only=True)
    sharded: dict[str, Tensor] = {}

    def put(place: Place, value: dict[str, Any]) -> Any:
        tensor = made(place, value["shape"], getattr(torch, value["dtype"]))
        if tensor is not None:
            sharded[value[MARK]] = tensor
        return tensor

    checkpoint = walk(rest, lambda place, value: value, put)
    wanted = {name: tensor for name, tensor in sharded.items() if not tensor.is_meta}
    if wanted:
        alone = not dist.is_initialized()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as it is meant
            dcp.load(wanted, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=alone)
    return checkpoint


def damage_of(folder: Path) -> str | None:
    """What is wrong with a folder; None if every byte of every file is as it was written."""
    try:
        sums = json.loads((folder / CHECKSUMS).read_text())
        if REST not in sums or len(sums) < 2:
            return f"{CHECKSUMS} names no parts"
        for name, expected in sums.items():
            if _checksum(folder / name) != expected:
                return f"{name} has another checksum than when it was written"
    except (OSError, ValueError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _checksum(path: Path) -> list[int]:
    total, size = 0, 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            total, size = zlib.crc32(block, total), size + len(block)
    return [total, size]


def _like(parameter: DTensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(parameter.detach(), dtype=dtype)


def walk(
    value: Any, tensor: Callable[[Place, Tensor], Any], marked: Callable[[Place, dict[str, Any]], Any] | None = None,
    place: Place = (),
) -> Any:  # fmt: skip
    """A copy of nested dicts, lists and tuples in which tensors, and what stands for one, are replaced."""
    if isinstance(value, Tensor):
        return tensor(place, value)
    if isinstance(value, dict):
        if marked is not None and MARK in value:
            return marked(place, value)
        return {key: walk(item, tensor, marked, (*place, key)) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(walk(item, tensor, marked, (*place, n)) for n, item in enumerate(value))
    return value
