"""Faults of data: one item of many is broken, or a whole shard."""

from __future__ import annotations

import io
import json
import os
import struct
import tarfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from experiments.faults.runs import RUN, Ended, Process, arguments, trained
from experiments.faults.table import Row

DOCUMENTS = 120
BROKEN = 50
"""Number of the document that is broken."""


def png(seed: int, size: tuple[int, int] = (8, 8)) -> bytes:
    """A small picture."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    return encoded(Image.fromarray(pixels))


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    """The file of a picture."""
    buffer = io.BytesIO()
    image.save(buffer, format=form, **options)
    return buffer.getvalue()


def bomb(side: int, text: int = 0) -> bytes:
    """A black PNG of 1 kB that says it has so many pixels a side, and a compressed text of so many bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    note = chunk(b"zTXt", b"note\0\0" + zlib.compress(bytes(text), 9)) if text else b""
    pixels = chunk(b"IDAT", zlib.compress(bytes(1 << 20), 9))
    return b"\x89PNG\r\n\x1a\n" + head + note + pixels + chunk(b"IEND", b"")


def animated() -> bytes:
    """A GIF of two frames."""
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


def cmyk() -> bytes:
    """A JPEG as printers have them."""
    return encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")


def write_tar(path: Path, first: int = 0, count: int = DOCUMENTS, image: bytes | None = None, name: str = "") -> Path:
    """Pairs of a picture and its caption; number `BROKEN` has another picture, or its members have another name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for i in range(first, first + count):
            key = name if name and i == BROKEN else f"{i:05d}"
            picture = image if image is not None and i == BROKEN else png(i)
            for member, data in ((f"{key}.png", picture), (f"{key}.txt", f"picture number {i}".encode())):
                info = tarfile.TarInfo(member)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def write_lines(path: Path, line: bytes) -> Path:
    """JSON Lines of texts; number `BROKEN` is another line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"text": f"sentence number {i}"}).encode() for i in range(DOCUMENTS)]
    lines[BROKEN] = line
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def one_item(
    name: str, fault: str, skipped: bool, write: Callable[[Path], Path], source: str = "TarSource", suffix: str = ".tar"
) -> Callable[[], Row]:
    """A row of a data set with one odd item: it alone is skipped, or it is read."""

    def provoke() -> Row:
        run = Process(arguments(RUN, write(Path(f"data{suffix}")), source), RUN)
        ended = run.end()
        lost = sorted(set(range(DOCUMENTS)) - trained(run.steps))
        message = ended.line("skipped")
        ok = ended.clean and ended.code == 0 and lost == [BROKEN] * skipped and bool(message) == skipped
        done = "skipped, named once; the run goes on" if skipped else "read as an image like any other"
        return Row(name, fault, happened(ended, done), amount(lost), message, ok)

    return provoke


def happened(ended: Ended, expected: str) -> str:
    """What a run did, in words that were checked."""
    if ended.code is None:
        return "the run hung"
    return expected if ended.clean else f"a traceback, exit code {ended.code}"


def amount(lost: list[int]) -> str:
    """Documents that were not trained on."""
    return f"{len(lost)} of {DOCUMENTS} documents: the broken one" if len(lost) == 1 else (
        "nothing" if not lost else f"{len(lost)} of {DOCUMENTS} documents"
    )  # fmt: skip


def truncated_tar() -> Row:
    """A shard that ends early, as a broken download does."""
    shards = Path("data")
    write_tar(shards / "a.tar", 0, 60)
    cut = write_tar(shards / "b.tar", 60, 60)
    os.truncate(cut, cut.stat().st_size * 3 // 4)
    run = Process(arguments(RUN, shards, "TarSource", "--data.broken_share", "0.1"), RUN)
    ended = run.end()
    seen = trained(run.steps)
    message = ended.line("skipped", "whole records")
    whole = int(message.split("behind ")[-1].split()[0]) if "behind " in message else -1
    # The rest of the shard stands as one broken document behind the records before the cut.
    ok = ended.clean and ended.code == 0 and seen == set(range(60 + whole)) and 0 < whole < 60
    lost = f"{60 - whole} of {DOCUMENTS} documents: those behind the cut"
    done = "every record before the cut is trained on; the damage is named once"
    return Row(
        "truncated tar", "the second of two shards lacks its last quarter", happened(ended, done), lost, message, ok
    )


def vanishing_tar() -> Row:
    """A shard that is removed while it is read."""
    shards = [write_tar(Path("data", f"{i}.tar"), i * 40, 40) for i in range(3)]
    run = Process(arguments(RUN, shards[0].parent, "TarSource", "--data.broken_share", "0.4"), RUN)
    run.until(1)
    shards[1].unlink()
    ended = run.end()
    seen = trained(run.steps)
    lost = sorted(set(range(DOCUMENTS)) - seen)
    message = ended.line("skipped", "1.tar")
    ok = ended.clean and ended.code == 0 and bool(message) and bool(lost) and set(lost) <= set(range(40, 80))
    ok = ok and sum("skipped" in line for line in ended.said.splitlines()) == 1
    done = "its documents that were not read yet are skipped, named once for all; the run goes on"
    what = f"{len(lost)} of {DOCUMENTS} documents: of that shard, what was not read yet"
    return Row(
        "a tar that vanishes mid-epoch", "one of three shards is removed behind the first step, "
        "`--data.broken_share 0.4`", happened(ended, done), what, message, ok,
    )  # fmt: skip


def too_many() -> Row:
    """More broken than a user allowed."""
    data = write_lines(Path("data.jsonl"), b'{"text')
    data.write_bytes(data.read_bytes().replace(b'{"text": "sentence number 7', b'{"tex'))
    run = Process(arguments(RUN, data, "JsonlSource"), RUN)
    ended = run.end()
    message = ended.line("unimodal:", "data.broken_share")
    ok = ended.clean and ended.code == 2 and bool(message)
    done = "the run ends with exit code 2 rather than train on what is left"
    return Row("too many broken items", "12 of 120 lines are cut off", happened(ended, done), "nothing", message, ok)


def escaping_path() -> Row:
    """An archive whose members would be written elsewhere by a careless reader."""
    data = write_tar(Path("deep", "er", "data.tar"), name="../../x")
    run = Process(arguments(RUN, data), RUN)
    ended = run.end()
    lost = sorted(set(range(DOCUMENTS)) - trained(run.steps))
    outside = [*Path().rglob("x.*"), *Path("..").glob("x.*")]
    ok = ended.clean and ended.code == 0 and not lost and not outside
    done = "nothing is ever unpacked: the record is read at its place in the file, and no file is written"
    return Row(
        "a member named ../../x", "a tar with members ../../x.png and ../../x.txt", happened(ended, done), amount(lost),
        "", ok,
    )  # fmt: skip


def _lines(data: bytes) -> Callable[[Path], Path]:
    return partial(write_lines, line=data)


ROWS: dict[str, Callable[[], Row]] = {
    "truncated tar": truncated_tar,
    "a tar that vanishes mid-epoch": vanishing_tar,
}


def _add(
    name: str, fault: str, skipped: bool, write: Callable[[Path], Path], source: str = "TarSource", suffix: str = ".tar"
) -> None:
    ROWS[name] = one_item(name, fault, skipped, write, source, suffix)


_add(
    "decompression bomb",
    "a PNG of 1 kB that claims 60,000 x 60,000 pixels",
    True,
    lambda p: write_tar(p, image=bomb(60_000)),
)
_add("text bomb", "a PNG of 8 x 8 pixels with a compressed note of 200 MB", True,
     lambda p: write_tar(p, image=bomb(8, 200 * 10**6)))  # fmt: skip
_add("zero-byte image", "an image of no bytes", True, lambda p: write_tar(p, image=b""))
_add("1 x 1 image", "an image of one pixel, as trackers have", True, lambda p: write_tar(p, image=png(0, (1, 1))))
_add("CMYK image", "a JPEG in CMYK", False, lambda p: write_tar(p, image=cmyk()))
_add("animated image", "a GIF of two frames; its first one counts", False, lambda p: write_tar(p, image=animated()))
_add("malformed JSON line", 'a line `{"text": "half`', True, _lines(b'{"text": "half'), "JsonlSource", ".jsonl")
_add("wrong UTF-8", "a line in Latin-1", True, _lines('{"text": "Füße"}'.encode("latin-1")), "JsonlSource", ".jsonl")
_add("caption of 1 MB", "a text of 1,048,576 characters", True,
     _lines(json.dumps({"text": "b" * 2**20}).encode()), "JsonlSource", ".jsonl")  # fmt: skip
ROWS |= {"too many broken items": too_many, "a member named ../../x": escaping_path}
