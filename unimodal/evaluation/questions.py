"""What benchmarks of questions about images share: the prompt, the answer to each question, the fingerprint."""

from __future__ import annotations

import hashlib
import re
from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unimodal.documents import GENERATED, Document, Part
from unimodal.evaluation.benchmark import Answer, Benchmark, Item
from unimodal.evaluation.lazy_images import LazyImage
from unimodal.files import file_sha256

if TYPE_CHECKING:
    from unimodal.decoding_settings import DecodingSettings
    from unimodal.model import UnifiedModel


class Questions(Benchmark):
    """Items whose prompt is an image and one or more questions, each asked on its own behind the image.

    An item with several questions is one that counts once: both questions of MME on an image, every rotation of MMBench.
    Its answer has one text a question.
    """

    files: Sequence[Path] = ()

    @cached_property
    def _items(self) -> list[Item]:
        return self.read()

    @abstractmethod
    def read(self) -> list[Item]:
        """The items, from the files."""

    def items(self) -> Sequence[Item]:
        """All items; their images are read when they are looked at."""
        return self._items

    def answer(
        self, model: UnifiedModel, items: Sequence[Item], settings: DecodingSettings, seeds: Sequence[int]
    ) -> list[tuple[Part, ...]]:
        """One text a question, empty where the model says nothing."""
        from unimodal.decoding import decode

        prompts = [asked(item) for item in items]
        flat = [document for documents in prompts for document in documents]
        draws = [seed for documents, seed in zip(prompts, seeds, strict=True) for _ in documents]
        done = decode(model, flat, settings, draws)
        written = iter(
            "".join(part.text for part in after.parts[len(before.parts) :] if part.is_text)
            for before, after in zip(flat, done, strict=True)
        )
        return [tuple(Part(next(written), role=GENERATED) for _ in documents) for documents in prompts]

    def spec(self) -> dict[str, Any]:
        """Hashes of the files and images that were asked about."""
        images = hashlib.sha256()
        for item in self._items:
            for part in item.prompt.parts:
                if isinstance(part, LazyImage):
                    images.update(part.digest.encode() + b"\n")
        return {
            "files": {path.name: file_sha256(path) for path in self.files},
            "images_sha256": images.hexdigest(),
            "answer": "first line of what is written, without the spaces around it",
        }


def asked(item: Item) -> list[Document]:
    """What a model is given for an item: each text of its prompt by itself, behind the images."""
    images = tuple(part for part in item.prompt.parts if part.is_image)
    texts = [part for part in item.prompt.parts if part.is_text]
    return [Document((*images, text)) for text in texts] or [Document(images)]


def answer_texts(answer: Answer) -> list[str]:
    """The first line of the answer to each question.

    Raises:
        ValueError: not one text a question.
    """
    texts = [part.text for part in answer.parts if part.is_text]
    wanted = len(asked(answer.item))
    if wanted == 1:
        texts = ["".join(texts)]
    if len(texts) != wanted:
        raise ValueError(f"answer {answer.item.id}: expected {wanted} texts, one a question, got {len(texts)}")
    return [text.strip().split("\n", 1)[0].strip() for text in texts]


def worded(wording: str, **fields: str) -> str:
    """The wording with its {fields} filled in."""
    return re.sub(
        r"\{(\w+)\}", lambda field: fields.get(field[1], field[0]), wording
    )  # once: a text may hold {options}


def check_wording(wording: str, *fields: str) -> str:
    """The wording; ValueError when it lacks a {field}."""
    for name in fields:
        if f"{{{name}}}" not in wording:
            raise ValueError(f"--wording: expected a text with {{{name}}} in it, got {wording!r}")
    return wording


def image_prompt(image: LazyImage, *texts: str) -> Document:
    """An image and texts, all of it context."""
    return Document((image, *(Part(text, learn=False) for text in texts)))


def wrong_answer(said: str, right: str) -> str:
    """Why an answer is wrong."""
    return f"said {said!r}, right is {right!r}"
