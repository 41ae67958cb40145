"""Small data sets in the formats people have, as the tools that make them write them."""

import base64
import io
import json
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from unimodal.data.source import BrokenDocument
from unimodal.documents import Document, Part


def picture(shade: int, height: int = 8, width: int = 8) -> Image.Image:
    """One colour, which says which picture it is."""
    return Image.new("RGB", (width, height), (shade, 255 - shade, 7))


def encoded(image: Image.Image, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=form)
    return buffer.getvalue()


def png(shade: int, height: int = 8, width: int = 8) -> bytes:
    return encoded(picture(shade, height, width))


def write_tar(path: Path, members: Mapping[str, bytes] | Iterable[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items() if isinstance(members, Mapping) else members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_jsonl(path: Path, records: Iterable[object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def img2dataset(folder: Path, shards: int = 2, each: int = 4) -> Path:
    """Pairs: NNNNN.tar with .png, .txt and .json of each."""
    for shard in range(shards):
        members: dict[str, bytes] = {}
        for i in range(each):
            number = shard * each + i
            key, meta = (
                f"{shard:05d}{i:04d}",
                {"caption": f"shade {number}", "url": "http://x/y.png", "status": "success"},
            )
            members |= {f"{key}.png": png(number), f"{key}.txt": f"shade {number}".encode()}
            members[f"{key}.json"] = json.dumps(meta).encode()
        write_tar(folder / f"{shard:05d}.tar", members)
    return folder


def obelics_record(first: object, second: object, number: int) -> dict[str, object]:
    return {
        "images": [None, first, None, second, None],
        "texts": [f"before {number}", None, "between", None, "grün"],
        "metadata": "[]",
    }


def obelics_tar(folder: Path, count: int = 6) -> Path:
    members: dict[str, bytes] = {}
    for n in range(count):
        members[f"{n:06d}.json"] = json.dumps(obelics_record(f"{n:06d}.0.png", f"{n:06d}.1.png", n)).encode()
        members |= {f"{n:06d}.0.png": png(n), f"{n:06d}.1.png": png(n + 100)}
    write_tar(folder / "obelics-000000.tar", members)
    return folder


def mmc4_record(number: int, image: Mapping[str, object]) -> dict[str, object]:
    return {
        "text_list": [f"first {number}.", "second.", "third."],
        "image_info": [{"image_name": "a.png", "matched_text_index": 1, "matched_sim": 0.3, **image}],
        "similarity_matrix": [[0.1, 0.3, 0.2]],
    }


def mmc4_jsonl(path: Path, count: int = 6) -> Path:
    """With images inside, as OpenFlamingo's shards have them."""
    return write_jsonl(
        path, (mmc4_record(n, {"image_base64": base64.b64encode(png(n)).decode()}) for n in range(count))
    )


def llava(folder: Path, count: int = 6) -> Path:
    """One JSON list, and a folder of images."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    records = []
    for n in range(count):
        (folder / "images" / f"{n}.png").write_bytes(png(n))
        turns = [
            {"from": "human", "value": "<image>\nWhich shade?"}, {"from": "gpt", "value": f"Shade {n}."},
            {"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "Quite."},
        ]  # fmt: skip
        records.append({"id": str(n), "image": f"{n}.png", "conversations": turns})
    (folder / "llava.json").write_text(json.dumps(records))
    return folder


def edit_tar(folder: Path, count: int = 6) -> Path:
    members: dict[str, bytes] = {}
    for n in range(count):
        members |= {f"{n}.source.png": png(n), f"{n}.txt": f"darker {n}".encode(), f"{n}.target.png": png(n + 100)}
    write_tar(folder / "edits-000.tar", members)
    return folder


def parquet_rows(path: Path, rows: list[dict[str, object]], group: int = 3) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=group)
    return path


def caption_rows(count: int = 8) -> list[dict[str, object]]:
    return [{"image": {"bytes": png(n), "path": None}, "caption": f"shade {n}"} for n in range(count)]


def image_folder(folder: Path, form: str = "jsonl", other: Mapping[int, bytes | None] | None = None) -> Path:
    """Images below a `metadata.jsonl` or `.csv`, as `datasets` has them; `other` bytes in the place of some, or no file."""
    (folder / "sub").mkdir(parents=True, exist_ok=True)
    rows = [{"file_name": f"sub/{n}.png", "text": f"shade {n}"} for n in range(6)]
    for n in range(6):
        if (data := (other or {}).get(n, png(n))) is not None:
            (folder / "sub" / f"{n}.png").write_bytes(data)
    if form == "jsonl":
        write_jsonl(folder / "metadata.jsonl", rows)
    else:
        lines = ["file_name,text", *(f"{row['file_name']},{row['text']}" for row in rows)]
        (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    return folder


class Plain:
    """Documents that say their number; those in `bad` are broken."""

    kind = "plain"

    def __init__(self, count: int, bad: Iterable[int] = ()) -> None:
        self.count, self.bad = count, set(bad)

    def __len__(self) -> int:
        return self.count

    def document(self, index: int, rng: np.random.Generator) -> Document:
        if index in self.bad:
            raise BrokenDocument(f"item {index}", "expected good")
        return Document((Part(str(index)),), self.kind)

    def corpus(self) -> Iterable[str]:
        yield "0123456789"


def shade(image: Image.Image) -> int:
    """Which picture it is."""
    return int(np.asarray(image)[0, 0, 0])
