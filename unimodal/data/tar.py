"""Tar shards in WebDataset's layout: neighbouring members whose names differ behind the first dot are one record.

Members are found by an index made once; then any record is read by itself, at its place in the file. Nothing is ever
unpacked, so no name in an archive can reach a file, and nothing is unpickled: images, text and JSON are all that is read.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
import zipfile
import zlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import Int

from unimodal.data.jsonl import decode_object
from unimodal.data.records import (
    DocumentRules,
    Layout,
    RawImage,
    Record,
    RecordSource,
    brief,
    find_files,
    read_span,
)
from unimodal.data.source import BrokenDocument
from unimodal.files import write_atomically

_TEXTS = ("txt", "text", "caption", "cap")


class TarSource(RecordSource):
    """Documents of tar shards: `000.jpg` and `000.txt` (img2dataset), or `000.json` with the images it names beside it.

    A record's fields are its members by suffix (`jpg`, `txt`, `source.jpg`) and the keys of its `.json`.

    Args:
        paths: `.tar` files, folders, patterns (`*`), ranges (`{00000..00099}`), one or a list.
        layout: what a record means; None: read from the first.
        rules: of images and texts.
        index: folder where indexes are kept between runs, for shards so many that reading through them takes long;
            None: they are made each time. A changed shard is indexed anew.
    """

    def __init__(
        self,
        paths: str | list[str],
        layout: Layout | None = None,
        rules: DocumentRules = DocumentRules(),
        index: str | None = None,
    ) -> None:
        cache = None if index is None else Path(index)
        self._tars = [tar_index(path, cache) for path in find_files(paths, (".tar",), "paths")]
        super().__init__([len(tar) for tar in self._tars], layout, rules)

    def files(self) -> list[Path]:
        """The shards."""
        return [tar.path for tar in self._tars]

    def record(self, index: int) -> Record:
        """The members of one key."""
        number, sample = self.locate(index)
        tar = self._tars[number]
        if sample == tar.samples:
            raise BrokenDocument(str(tar.path), tar.damage)
        members = tar.members(sample)
        where = f"{tar.path}: {_key(members[0].name)[0]}"
        fields: dict[str, object] = {}
        said: dict[str, object] = {}  # by the .json, beside what is there itself
        for member in members:
            suffix = _key(member.name)[1].lower()
            if suffix == "json":
                said = decode_object(read_span(tar.path, member.start, member.size), f"{tar.path}: {member.name}")
            elif suffix in _TEXTS:
                fields[suffix] = read_span(tar.path, member.start, member.size)
            else:
                fields[suffix] = _raw(tar.path, member)
        return Record(where, said | fields, partial(_member, tar.path, members))


@dataclass(frozen=True)
class Member:
    """A file in a tar: its bytes are start to start + size."""

    name: str
    start: int
    size: int

    @property
    def end(self) -> int:
        """Of its last block."""
        return -(-(self.start + self.size) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


@dataclass(frozen=True)
class TarIndex:
    """Where the members of a tar are, as arrays: a data set has millions."""

    path: Path
    names: bytes  # of all members, a zero byte after each
    name_ends: Int[np.ndarray, " m"]
    starts: Int[np.ndarray, " m"]
    sizes: Int[np.ndarray, " m"]
    firsts: Int[np.ndarray, " s"]  # first member of each record
    damage: str  # what is wrong with the file; one more document, always broken, stands for it

    @property
    def samples(self) -> int:
        """Records."""
        return len(self.firsts)

    def __len__(self) -> int:
        return self.samples + bool(self.damage)

    def members(self, sample: int) -> list[Member]:
        """The members of one record."""
        end = self.firsts[sample + 1] if sample + 1 < self.samples else len(self.starts)
        return [
            Member(self._name(i), int(self.starts[i]), int(self.sizes[i])) for i in range(int(self.firsts[sample]), end)
        ]

    def _name(self, i: int) -> str:
        start = int(self.name_ends[i - 1]) + 1 if i else 0
        return self.names[start : int(self.name_ends[i])].decode("utf-8", "surrogateescape")


def tar_index(path: Path, cache: Path | None = None) -> TarIndex:
    """The index of a tar, from `cache` where it is there and the tar has not changed since.

    A tar that is cut off or no tar at all has the records before the damage, and `damage`.
    """
    if cache is None:
        return _read_index(path)
    stat = path.stat()
    name = hashlib.sha256(f"{path.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}".encode()).hexdigest()[:32]
    file = cache / f"{name}.npz"
    if file.is_file():
        try:
            with np.load(file, allow_pickle=False) as kept:
                arrays = (kept["name_ends"], kept["starts"], kept["sizes"], kept["firsts"])
                return TarIndex(path, kept["names"].tobytes(), *arrays, str(kept["damage"]))
        except (zipfile.BadZipFile, zlib.error, KeyError, ValueError, EOFError, OSError):
            pass  # damaged: made anew
    made = _read_index(path)
    buffer = io.BytesIO()
    np.savez(
        buffer, names=np.frombuffer(made.names, np.uint8), name_ends=made.name_ends, starts=made.starts,
        sizes=made.sizes, firsts=made.firsts, damage=made.damage,
    )  # fmt: skip
    write_atomically(file, buffer.getvalue())
    return made


def _read_index(path: Path) -> TarIndex:
    members: list[Member] = []
    damage = ""
    size = path.stat().st_size
    try:
        with tarfile.open(path, "r:") as tar:
            while (info := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # it would keep every one
                if info.isreg() and not info.issparse() and all(_key(info.name)):
                    members.append(Member(info.name, info.offset_data, info.size))
    except (tarfile.TarError, OSError, ValueError) as error:
        damage = f"expected a whole uncompressed tar, got {' '.join(str(error).split()) or 'an empty file'}"
    cut = [member for member in members if member.start + member.size > size]
    if members and not cut and not damage and size < members[-1].end + tarfile.BLOCKSIZE:
        damage = "expected a whole tar, got one without the zeros it ends in"  # cut off just there, it seems
    if cut and not damage:
        damage = f"expected a whole tar, got one that is cut off within {cut[0].name}"
    if damage:
        members = [member for member in members if member not in cut]
        if members:  # what is left of the last record is not all of it
            last = _key(members[-1].name)[0]
            while members and _key(members[-1].name)[0] == last:
                members.pop()
        damage += f" behind {len(_firsts(members))} whole records"
    names = [member.name.encode("utf-8", "surrogateescape") for member in members]
    return TarIndex(
        path,
        b"".join(name + b"\0" for name in names),
        np.cumsum([len(name) + 1 for name in names], dtype=np.int64) - 1,
        np.array([member.start for member in members], np.int64),
        np.array([member.size for member in members], np.int64),
        np.array(_firsts(members), np.int64),
        damage,
    )


def _firsts(members: list[Member]) -> list[int]:
    """Where records begin: at another key, or at a suffix that the record has already."""
    firsts, last, suffixes = [], "", set[str]()
    for i, member in enumerate(members):
        key, suffix = _key(member.name)
        if not i or key != last or suffix in suffixes:
            firsts.append(i)
            last, suffixes = key, set()
        suffixes.add(suffix)
    return firsts


def _key(name: str) -> tuple[str, str]:
    """What the members of a record share, and what tells them apart: "a/b.c.jpg" -> ("a/b", "c.jpg")."""
    folder, _, file = name.rpartition("/")
    stem, _, suffix = file.partition(".")
    return (f"{folder}/{stem}" if folder and stem else stem), suffix


def _raw(path: Path, member: Member) -> RawImage:
    return RawImage(member.name, partial(read_span, path, member.start, member.size))


def _member(path: Path, members: list[Member], name: str) -> RawImage:
    """A member of the record by its whole name, its file name, or what follows the first dot."""
    for member in members:
        if name in (member.name, member.name.rpartition("/")[2], _key(member.name)[1]):
            return _raw(path, member)
    raise ValueError(f"expected a member of the record, got {brief(name)}, which is none of {len(members)}")
