"""The shapes world as documents of six kinds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

import numpy as np
from PIL import Image

from unimodal.data.shapes.captions import CAPTION_TASKS, CaptionTask, captioned, described, random_scene, vocabulary
from unimodal.data.shapes.edits import END, built, edited
from unimodal.data.shapes.questions import asked
from unimodal.data.shapes.render import render
from unimodal.data.shapes.words import census
from unimodal.data.shapes.world import Scene, Split
from unimodal.documents import Document, Part

ShapesKind = Literal["text_to_image", "image_to_text", "question", "edit", "count", "steps"]
SHAPES_KINDS: tuple[ShapesKind, ...] = get_args(ShapesKind)
Draft = list[tuple[str | Scene, bool]]
"""Texts and scenes in order, each with whether it is learned."""

_TASK_SHARES: dict[CaptionTask, float] = {
    "single_object": 1, "two_object": 1, "counting": 1.5, "colors": 1, "position": 1.5, "color_attr": 1.5, "scene": 1.5,
}  # fmt: skip
_CORPUS = 150  # sampled texts a kind and split
_CORPUS_CANVAS = 64  # room for as many things as texts ever name


class ShapesSource:
    """Rendered scenes as documents of one kind; there is no end of them.

    - `text_to_image`: "a photo of two red circles", then the scene (learned).
    - `image_to_text`: a scene, then "a red circle above a blue square" (learned); every colour is named.
    - `question`: a scene, "is there a red circle?", then " yes" (learned).
    - `edit`: a scene, " make the red circle blue", then the changed scene (learned).
    - `count`: a scene, then "three circles and one square" (learned).
    - `steps`: "first a red circle", its scene (learned), " then a blue square below it" (learned), the scene with both
      (learned), perhaps a third, and " done" (learned).

    Args:
        kind: one of the six.
        split: "train" never shows or names a held-out pair of shape and colour; every scene of "test" holds one.
        size: pixels of the images' sides, 32 to 256.
        documents: how many count as one epoch.
        seed: None draws each document from the generator that it is asked with, so that no epoch repeats another; a number
            makes document i a function of (seed, i) alone: a fixed set.

    Raises:
        ValueError: an argument outside its values.
    """

    def __init__(
        self,
        kind: ShapesKind,
        split: Split = "train",
        size: int = 32,
        documents: int = 10_000,
        seed: int | None = None,
    ) -> None:
        if kind not in SHAPES_KINDS:
            raise ValueError(f"kind: expected one of {', '.join(SHAPES_KINDS)}, got {kind!r}")
        if split not in get_args(Split):
            raise ValueError(f"split: expected one of {', '.join(get_args(Split))}, got {split!r}")
        if documents < 1:
            raise ValueError(f"documents: expected 1 or more, got {documents}")
        self.kind: ShapesKind = kind
        self.split: Split = split
        self.size = Scene((), size).size  # refuses what no scene has
        self.documents, self.seed = documents, seed

    def __len__(self) -> int:
        """Documents in an epoch."""
        return self.documents

    def document(self, index: int, rng: np.random.Generator) -> Document:
        """The document at `index`; IndexError outside 0 <= index < len."""
        return Document(tuple(Part(_content(content), learn) for content, learn in self.draft(index, rng)), self.kind)

    def draft(self, index: int, rng: np.random.Generator) -> Draft:
        """The same with scenes in place of images."""
        if not 0 <= index < len(self):
            raise IndexError(f"index: expected 0 to {len(self) - 1}, got {index}")
        if self.seed is not None:
            rng = np.random.default_rng((self.seed, index, SHAPES_KINDS.index(self.kind)))
        if self.split == "test":
            rng.random()  # one key must not lay out a test scene as it lays out a training scene
        return draft(self.kind, self.split, self.size, rng)

    def corpus(self) -> Iterable[str]:
        """Texts of this kind, both splits: the tokenizer's vocabulary must not depend on the split. A fixed sample."""
        yield from vocabulary()
        for number, split in enumerate(get_args(Split)):
            for i in range(_CORPUS):
                rng = np.random.default_rng((number, i))
                for content, _ in draft(self.kind, split, _CORPUS_CANVAS, rng):
                    if isinstance(content, str):
                        yield content


def draft(kind: ShapesKind, split: Split, size: int, rng: np.random.Generator) -> Draft:
    """One random document of a kind; `ShapesSource` says what each holds."""
    if kind == "text_to_image":
        shares = np.array([_TASK_SHARES[task] for task in CAPTION_TASKS])
        task = CAPTION_TASKS[int(rng.choice(len(shares), p=shares / shares.sum()))]
        text, scene = captioned(task, split, size, rng)
        return [(text, False), (scene, True)]
    if kind == "image_to_text":
        text, scene = described(split, size, rng)
        return [(scene, False), (text, True)]
    if kind == "question":
        scene, question = asked(split, size, rng)
        return [(scene, False), (question.text, False), (question.answer, True)]
    if kind == "edit":
        edit = edited(split, size, rng)
        return [(edit.before, False), (edit.text, False), (edit.after, True)]
    if kind == "count":
        scene = random_scene(split, size, rng)
        return [(scene, False), (census(scene), True)]
    texts, scenes = built(split, size, rng)
    pieces = [piece for pair in zip(texts, scenes, strict=True) for piece in pair]
    return [(piece, i > 0) for i, piece in enumerate([*pieces, END])]


def _content(content: str | Scene) -> str | Image.Image:
    return content if isinstance(content, str) else render(content)
