"""What the records of published data sets mean: which texts and images, in which order, and what of them is learned."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from unimodal.data.folder import IMAGE_SUFFIXES
from unimodal.data.records import Layout, RawImage, RawPart, Record, brief
from unimodal.data.source import BrokenDocument

if TYPE_CHECKING:
    from unimodal.data.records import RecordSource

IMAGE_FIELDS = ("image", *(suffix.removeprefix(".") for suffix in IMAGE_SUFFIXES))
"""What a pair's image is called: a column or key `image`, or a tar member's suffix."""
CAPTION_FIELDS = ("txt", "caption", "text")
_ANSWERING = ("gpt", "assistant")
_ASKING = ("human", "user")


@dataclass(frozen=True)
class Pairs:
    """An image and its caption: tar shards of img2dataset (`.jpg`, `.txt`, `.json`), rows with `image` and `caption`.

    Args:
        task: which of the two is learned; it comes second.
        caption: field of the caption; None: `txt`, `caption` or `text`, the first there is.
        image: field of the image; None: `image`, or a member with the suffix of an image.
    """

    task: Literal["text_to_image", "image_to_text"] = "text_to_image"
    caption: str | None = None
    image: str | None = None

    @property
    def kind(self) -> str:
        """The task."""
        return self.task

    def parts(self, record: Record) -> tuple[RawPart, ...]:
        """Given, then learned."""
        image = record.image(self.image or _first(record, IMAGE_FIELDS, "image"))
        text = record.text(self.caption or _first(record, CAPTION_FIELDS, "caption")).strip()
        if not text:
            raise ValueError("caption: expected text, got an empty one")
        first, second = (text, image) if self.task == "text_to_image" else (image, text)
        return RawPart(first, learn=False), RawPart(second)


@dataclass(frozen=True)
class Text:
    """A document of text alone, all of it learned.

    Args:
        field: which holds it.
    """

    field: str = "text"
    kind: str = "text"

    def parts(self, record: Record) -> tuple[RawPart, ...]:
        """One."""
        text = record.text(self.field)
        if not text.strip():
            raise ValueError(f"{self.field}: expected text, got an empty one")
        return (RawPart(text),)


@dataclass(frozen=True)
class Parts:
    """This project's own: `{"parts": [{"text" | "image": ..., "learn": ..., "role": ...}, ...]}`."""

    kind: str = "document"

    def parts(self, record: Record) -> tuple[RawPart, ...]:
        """As they stand."""
        return tuple(_own_part(record, part, f"parts[{i}]") for i, part in enumerate(_list(record, "parts")))


@dataclass(frozen=True)
class Interleaved:
    """OBELICS (arXiv 2306.16527): lists `images` and `texts` of one length, in each place the one or the other.

    Args:
        between: put between neighbouring texts.
        learn_images: whether images are drawn, or given only.
    """

    between: str = "\n\n"
    learn_images: bool = True
    kind: str = "interleaved"

    def parts(self, record: Record) -> tuple[RawPart, ...]:
        """In the order of the lists; places with neither are left out."""
        images, texts = _list(record, "images"), _list(record, "texts")
        if len(images) != len(texts):
            raise ValueError(f"images and texts: expected one length, got {len(images)} and {len(texts)}")
        items: list[str | RawImage] = []
        for i, (image, text) in enumerate(zip(images, texts, strict=True)):
            if image and text:
                raise ValueError(f"images[{i}] and texts[{i}]: expected one of them, got both")
            if image:
                items.append(record.as_image(image, f"images[{i}]"))
            elif text:
                items.append(_text(text, f"texts[{i}]"))
        return _joined(items, self.between, self.learn_images)


@dataclass(frozen=True)
class Mmc4:
    """MMC4 (arXiv 2304.06939): sentences in `text_list`, and `image_info` that says which sentence an image belongs to.

    An image is `image_base64`, or the file `image_name`; it stands before its sentence. Several of one sentence keep
    the order of `image_info`.

    Args:
        between: put between neighbouring sentences.
        similarity: images whose `matched_sim` is lower are left out.
        learn_images: whether images are drawn, or given only.
    """

    between: str = " "
    similarity: float = 0.0
    learn_images: bool = True
    kind: str = "interleaved"

    def parts(self, record: Record) -> tuple[RawPart, ...]:
        """Sentences with their images."""
        sentences = [_text(text, f"text_list[{i}]") for i, text in enumerate(_list(record, "text_list"))]
        before: dict[int, list[RawImage]] = {}
        for i, info in enumerate(_list(record, "image_info")):
            name = f"image_info[{i}]"
            if not isinstance(info, Mapping):
                raise ValueError(f"{name}: expected an object, got {brief(info)}")
            at, similarity = info.get("matched_text_index"), info.get("matched_sim", 1.0)
            if type(at) is not int or not 0 <= at < len(sentences):
                raise ValueError(f"{name}.matched_text_index: expected 0 to {len(sentences) - 1}, got {brief(at)}")
            if not isinstance(similarity, int | float):
                raise ValueError(f"{name}.matched_sim: expected a number, got {brief(similarity)}")
            if similarity >= self.similarity:
                before.setdefault(at, []).append(_mmc4_image(record, info, name))
        items = [item for i, sentence in enumerate(sentences) for item in (*before.get(i, ()), sentence)]
        return _joined(items, self.between, self.learn_images)


@dataclass(frozen=True)
class Conversation:
    """LLaVA (arXiv 2304.08485): `conversations` of `{"from": "human" | "gpt", "value": ...}`, images where `<image>` stands.

    Answers are learned, with what ends them; questions, system words and images are given. `image` is a name or a list
    of names; images that no `<image>` places come before the first question. Turns of `{"role", "content"}` under
    `messages` are read likewise.

    Args:
        question: what is written of a question; `{}` is its text.
        answer: what is written of an answer.
        system: likewise of a system turn.
    """

    question: str = "User: {}\nAssistant:"
    answer: str = " {}\n"
    system: str = "{}\n"
    kind: str = "conversation"

    def __post_init__(self) -> None:
        for name in ("question", "answer", "system"):
            if getattr(self, name).count("{}") != 1:
                raise ValueError(f"layout.{name}: expected {{}} once, got {getattr(self, name)!r}")

    def parts(self, record: Record) -> tuple[RawPart, ...]:
        """Turn by turn."""
        turns = [_turn(turn, i) for i, turn in enumerate(_list(record, *_present(record, "conversations", "messages")))]
        if not any(who in _ANSWERING for who, _ in turns):
            raise ValueError("conversations: expected an answer, got none")
        images = _images_of(record)
        placed = sum(text.count("<image>") for _, text in turns)
        if placed > len(images):
            raise ValueError(f"image: expected one for each of {placed} <image>, got {len(images)}")
        loose, images = images[: len(images) - placed], images[len(images) - placed :]
        parts = [RawPart(image, learn=False, role="user") for image in loose]
        for who, text in turns:
            answers, asks = who in _ANSWERING, who in _ASKING
            form = self.answer if answers else self.question if asks else self.system
            head, _, tail = form.partition("{}")
            pieces = text.strip().split("<image>")
            role = "assistant" if answers else "user" if asks else "system"
            for n, piece in enumerate(pieces):
                piece = (head if n == 0 else "") + (piece.strip("\n") if len(pieces) > 1 else piece)
                piece += tail if n == len(pieces) - 1 else ""
                if piece:
                    parts.append(RawPart(piece, learn=answers, role=role))
                if n < len(pieces) - 1:
                    parts.append(RawPart(images.pop(0), learn=answers, role=role))
        return tuple(parts)


@dataclass(frozen=True)
class Edit:
    """An image, an instruction and what the image becomes, which is learned (InstructPix2Pix, MagicBrush).

    Args:
        source: field of the image that is edited; None: `source_img`, `original_image`, `input_image`, `source`, or a
            tar member `source.*`.
        instruction: of the instruction; None: `instruction`, `edit_prompt`, `txt` or `text`.
        target: of the edited image; None: `target_img`, `edited_image`, `output_image`, `target`, or `target.*`.
    """

    source: str | None = None
    instruction: str | None = None
    target: str | None = None
    kind: str = "edit"

    def parts(self, record: Record) -> tuple[RawPart, ...]:
        """Image, instruction, edited image."""
        text = record.text(self.instruction or _first(record, EDIT_INSTRUCTIONS, "instruction")).strip()
        if not text:
            raise ValueError("instruction: expected text, got an empty one")
        return (
            RawPart(record.image(self.source or _first(record, EDIT_SOURCES, "source")), learn=False),
            RawPart(text, learn=False),
            RawPart(record.image(self.target or _first(record, EDIT_TARGETS, "target"))),
        )


def _with_suffixes(*names: str) -> tuple[str, ...]:
    return (*names, *(f"{name}{suffix}" for name in ("source", "target") if name in names for suffix in IMAGE_SUFFIXES))


EDIT_SOURCES = _with_suffixes("source_img", "original_image", "input_image", "source")
EDIT_TARGETS = _with_suffixes("target_img", "edited_image", "output_image", "target")
EDIT_INSTRUCTIONS = ("instruction", "edit_prompt", "txt", "text")


def guess_layout(source: RecordSource) -> Layout:
    """The layout that the first readable record of a source has the fields of.

    Raises:
        ValueError: no record can be read, or the fields are of no layout.
    """
    error: Exception | None = None
    for index in range(min(len(source), 100)):
        try:
            record = source.record(index)
        except BrokenDocument as broken:
            error = error or broken
            continue
        layout = _layout_of(set(record.fields))
        if layout is None:
            names = ", ".join(sorted(record.fields)[:12])
            raise ValueError(f"layout: expected one to be named for {record.where}, which has the fields {names}")
        return layout
    raise ValueError(f"expected at least one record that can be read, got none ({error})")


def _layout_of(fields: set[str]) -> Layout | None:
    if "parts" in fields:
        return Parts()
    if fields & {"conversations", "messages"}:
        return Conversation()
    if {"text_list", "image_info"} <= fields:
        return Mmc4()
    if {"images", "texts"} <= fields:
        return Interleaved()
    if fields & set(EDIT_SOURCES) and fields & set(EDIT_TARGETS) and fields & set(EDIT_INSTRUCTIONS):
        return Edit()
    if fields & set(IMAGE_FIELDS) and fields & set(CAPTION_FIELDS):
        return Pairs()
    return Text() if "text" in fields else Text("txt") if "txt" in fields else None


def _own_part(record: Record, part: object, name: str) -> RawPart:
    if not isinstance(part, Mapping):
        raise ValueError(f"{name}: expected an object, got {brief(part)}")
    part = {key: value for key, value in part.items() if value is not None}  # a table has every key in every row
    for key in part:
        if key not in ("text", "image", "learn", "role"):
            raise ValueError(f"{name}: expected keys among text, image, learn, role, got {key!r}")
    if ("text" in part) == ("image" in part):
        raise ValueError(f"{name}: expected either text or image, got {'both' if 'text' in part else 'neither'}")
    learn, role = part.get("learn", True), part.get("role", "")
    if not isinstance(learn, bool) or not isinstance(role, str):
        raise ValueError(f"{name}: expected learn true or false and role text, got {learn!r} and {role!r}")
    if "image" in part:
        return RawPart(record.as_image(part["image"], f"{name}.image"), learn, role)
    return RawPart(_text(part["text"], f"{name}.text"), learn, role)


def _mmc4_image(record: Record, info: Mapping[str, object], name: str) -> RawImage:
    encoded = info.get("image_base64")
    if encoded is None:
        return record.as_image(info.get("image_name"), f"{name}.image_name")

    def read() -> bytes:
        try:
            return base64.b64decode(_text(encoded, f"{name}.image_base64"), validate=True)
        except binascii.Error as error:
            raise ValueError(f"{name}.image_base64: expected base64, got other characters ({error})") from None

    return RawImage(name, read)


def _joined(items: Sequence[str | RawImage], between: str, learn_images: bool) -> tuple[RawPart, ...]:
    """Neighbouring texts as one, `between` between them."""
    parts: list[RawPart] = []
    for item in items:
        last = parts[-1].content if parts else None
        if isinstance(item, str) and isinstance(last, str):
            parts[-1] = RawPart(last + between + item)
        else:
            parts.append(RawPart(item, learn=isinstance(item, str) or learn_images))
    return tuple(parts)


def _turn(turn: object, i: int) -> tuple[str, str]:
    if not isinstance(turn, Mapping):
        raise ValueError(f"conversations[{i}]: expected an object, got {brief(turn)}")
    who, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    if who not in (*_ASKING, *_ANSWERING, "system"):
        raise ValueError(f"conversations[{i}].from: expected human, gpt or system, got {brief(who)}")
    return str(who), _text(text, f"conversations[{i}].value")


def _images_of(record: Record) -> list[RawImage]:
    names = [name for name in ("image", "images") if record.fields.get(name) is not None]
    if not names:
        suffixes = [name for name in IMAGE_FIELDS if name in record.fields]
        return [record.image(name) for name in suffixes if record.fields[name] is not None]
    value = record.fields[names[0]]
    values = value if isinstance(value, list) else [value]
    return [record.as_image(one, names[0]) for one in values]


def _first(record: Record, names: Sequence[str], what: str) -> str:
    for name in names:
        if record.fields.get(name) is not None:
            return name
    raise ValueError(f"{what}: expected one, got the fields {', '.join(sorted(record.fields)[:12]) or 'none'}")


def _present(record: Record, *names: str) -> tuple[str, ...]:
    return tuple(name for name in names if name in record.fields)[:1] or names[:1]


def _list(record: Record, name: str) -> list[object]:
    value = record.fields.get(name)
    if not isinstance(value, list):
        raise ValueError(f"{name}: expected a list, got {brief(value)}")
    return value


def _text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name}: expected text, got {brief(value)}")
    return value
