"""Where answers lie on disk: one folder an item, one file an answer, so that whatever is there need not be made again.

00012/metadata.jsonl       what a right answer is (one JSON object: GenEval's own name and content)
00012/samples/00000.png    an answer that is one image
00012/samples/00000.json   any other answer: its parts, whose images are 00000-1.png ... beside it
generation.json            how all of it was made
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unimodal.documents import GENERATED, Part
from unimodal.evaluation.benchmark import Answer, Item
from unimodal.files import contained_path, write_atomically
from unimodal.images import load_image, png_bytes

RECORD = "generation.json"


class AnswerFolder:
    """The answers of one benchmark, by one model.

    Args:
        root: the folder.
        draws: whether an answer is exactly one image.
        samples: answers an item.
    """

    def __init__(self, root: Path, draws: bool, samples: int) -> None:
        if root.exists() and not root.is_dir():
            raise ValueError(f"answers: expected a folder, got the file {root}")
        self.root, self.draws, self.samples = root, draws, samples

    def has(self, item: Item, sample: int) -> bool:
        """Whether this answer was given."""
        return self._own(item, sample).is_file()

    def write(self, item: Item, sample: int, parts: Sequence[Part]) -> None:
        """Keep an answer; the file that says it is there comes last."""
        folder = self.root / item.id
        metadata = folder / "metadata.jsonl"
        if not metadata.is_file():
            write_atomically(metadata, (json.dumps(dict(item.truth)) + "\n").encode())
        if self.draws:
            images = [part for part in parts if part.is_image]
            if len(images) != 1:
                raise ValueError(f"answer {item.id}: expected one image, got {len(images)}")
            write_atomically(self._own(item, sample), png_bytes(images[0].image))
            return
        record: list[dict[str, str]] = []
        for number, part in enumerate(parts):
            if part.is_image:
                name = f"{sample:05d}-{number}.png"
                write_atomically(folder / "samples" / name, png_bytes(part.image))
                record.append({"image": name})
            else:
                record.append({"text": part.text})
        data = json.dumps({"parts": record}, ensure_ascii=False) + "\n"
        write_atomically(self._own(item, sample), data.encode())

    def read(self, item: Item) -> list[Answer]:
        """The answers to an item, by number; those that are missing are left out.

        Raises:
            ValueError: more answers than the benchmark asks for, a damaged file, or a folder of another item.
        """
        folder = self.root / item.id
        self._check_truth(item, folder)
        ending = "png" if self.draws else "json"
        # Other models' folders may name files 0.png or 00000.png: numbers count, not their width.
        names = [p for p in (folder / "samples").glob(f"*.{ending}") if re.fullmatch(r"[0-9]+", p.stem)]
        numbered = {int(path.stem): path for path in names}
        if len(numbered) != len(names) or any(number >= self.samples for number in numbered):
            raise ValueError(
                f"{folder / 'samples'}: expected {self.samples} answers numbered 0 to {self.samples - 1}, "
                f"got {', '.join(sorted(p.name for p in names))}"
            )
        return [self._read(item, number, path) for number, path in sorted(numbered.items())]

    def check_record(self, record: Mapping[str, Any]) -> None:
        """Begin, or go on with, answers made in one way; ValueError where the folder's were made in another."""
        path = self.root / RECORD
        if not path.is_file():
            if self.root.is_dir() and any(self.root.glob("*/samples/*")):
                raise ValueError(f"--out: {self.root} holds answers and no {RECORD}, so who made them is not known")
            write_atomically(path, (json.dumps(record, indent=2) + "\n").encode())
            return
        difference = first_difference(read_record(self.root), json.loads(json.dumps(record)))
        if difference is not None:
            key, old, new = difference
            raise ValueError(f"--out: {self.root} holds answers made with {key} {old}, got {new}; take another folder")

    def _own(self, item: Item, sample: int) -> Path:
        return self.root / item.id / "samples" / f"{sample:05d}.{'png' if self.draws else 'json'}"

    def _read(self, item: Item, sample: int, path: Path) -> Answer:
        name = path.relative_to(self.root).as_posix()
        if self.draws:
            return Answer(item, sample, (Part(load_image(path), role=GENERATED),), (name,))
        try:
            record = json.loads(path.read_text(encoding="utf-8"))["parts"]
            texts = [(part.get("text"), part.get("image")) for part in record]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: expected parts, each text or image, got {type(error).__name__}") from None
        parts, files = [], [name]
        for text, image in texts:
            if image is None:
                parts.append(Part(text, role=GENERATED))
            else:
                file = contained_path(image, path.parent, str(path))
                files.append(file.relative_to(self.root.resolve()).as_posix())
                parts.append(Part(load_image(file), role=GENERATED))
        return Answer(item, sample, tuple(parts), tuple(files))

    def _check_truth(self, item: Item, folder: Path) -> None:
        path = folder / "metadata.jsonl"
        if not path.is_file():
            return
        try:
            there = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            raise ValueError(f"{path}: expected one JSON object, got another text") from None
        difference = first_difference(there, json.loads(json.dumps(dict(item.truth))))
        if difference is not None:
            key, old, new = difference
            raise ValueError(f"{path}: expected what the prompt file says, {key} {new}, got {old}")


def read_record(root: Path) -> dict[str, Any] | None:
    """How a folder's answers were made; None where it does not say."""
    path = root / RECORD
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise ValueError(f"{path}: expected a JSON object, got something else")
    return record


def first_difference(a: Any, b: Any, key: str = "") -> tuple[str, str, str] | None:
    """The first place where two JSON values differ: dotted key and both values as text; None when they are equal."""
    if isinstance(a, dict) and isinstance(b, dict):
        for name in [*a, *(n for n in b if n not in a)]:
            found = first_difference(a.get(name), b.get(name), f"{key}.{name}".lstrip("."))
            if found is not None:
                return found
        return None
    return None if a == b else (key, json.dumps(a), json.dumps(b))
