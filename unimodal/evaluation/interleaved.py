"""Benchmarks of interleaved documents: any prompts by structure and features; digits and shapes exactly."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import groupby, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from unimodal.data.digits import DigitsSource, digits_of, sum_answer
from unimodal.data.shapes import COLOURS, RELATIONS, SHAPES, built
from unimodal.data.shapes.edits import END
from unimodal.data.shapes.recognise import recognise
from unimodal.data.shapes.words import a, phrase
from unimodal.data.shapes.world import CANVAS
from unimodal.documents import Document, JsonLine, Part, document_record, read_json_lines
from unimodal.environment import usable_device
from unimodal.evaluation.benchmark import Answer, Benchmark, Item, Row, Verdict
from unimodal.evaluation.digits import Judge
from unimodal.evaluation.shapes import OVERLAP, ShapesBenchmark, boxes, iou
from unimodal.metrics.detection import Detection
from unimodal.metrics.geneval import relations
from unimodal.metrics.interleaved import StructureMatch, consistency, cosines, structure_match

if TYPE_CHECKING:
    from unimodal.decoding_settings import DecodingSettings
    from unimodal.metrics.features import ImageFeatures
    from unimodal_generators.base import SamplingSettings

TEXT, IMAGE = "text", "image"


def kinds(parts: Sequence[Part]) -> list[str]:
    """The order of texts and images: texts in a row are one text, blank ones none."""
    found: list[str] = []
    for part in parts:
        if part.is_image:
            found.append(IMAGE)
        elif part.text.strip() and found[-1:] != [TEXT]:
            found.append(TEXT)
    return found


def images_with_text(prompt: Document, parts: Sequence[Part]) -> list[tuple[Image.Image, str | None]]:
    """Every image of an answer with the nearest text before it, which may be the prompt's; None where there is none."""
    pairs: list[tuple[Image.Image, str | None]] = []
    text = next((part.text for part in reversed(prompt.parts) if part.is_text and part.text.strip()), None)
    growing = False  # whether the text before belongs to the answer and has no image behind it yet
    for part in parts:
        if part.is_image:
            pairs.append((part.image, text))
            growing = False
        elif part.text.strip():
            text = f"{text}{part.text}" if growing else part.text
            growing = True
    return pairs


def means(rows: Sequence[Row], names: Mapping[str, str]) -> dict[str, float]:
    """Mean of every field over the rows that have it, under another name; names without any value are left out."""
    found = {name: [float(row[field]) for row in rows if row.get(field) is not None] for field, name in names.items()}
    return {name: sum(values) / len(values) for name, values in found.items() if values}


def structure_fields(match: StructureMatch, made: Sequence[str]) -> dict[str, Any]:
    """What a row says of an answer's structure."""
    return {"made": list(made), "distance": match.distance, "structure_right": match.exact}


def structure_cause(match: StructureMatch, asked: Sequence[str], made: Sequence[str]) -> str:
    """Why the structure is wrong, "" where it is right."""
    return "" if match.exact else f"asked {' '.join(asked)}, made {' '.join(made) or 'nothing'}"


class Interleaved(Benchmark):
    """Documents that are asked to go on in a given order of texts and images.

    The score is the structure's similarity, 1 where number and order are as asked. With weights, measures say besides how
    well images agree with the text before them (CLIP) and with each other (DINOv2, or CLIP where there is no DINOv2).

    Args:
        prompts: JSONL file, a line {"prompt": {"parts": [...]}, "asked": ["text", "image", ...], "task": "story"}; the
            prompt is a document as in training files, its images lie beside the file.
        clip: weights of CLIP, a file or a tag such as openai; "" leaves agreement out.
        clip_model: open_clip's name of the network.
        dino: weights of DINOv2, a file or lvd142m; "" has CLIP compare images, where there is one.
        dino_model: timm's name of the network.
        max_tokens: most text tokens of an answer.
        device: where features are taken.
    """

    name = "interleaved"

    def __init__(
        self,
        prompts: Path,
        clip: str = "",
        clip_model: str = "ViT-L-14-quickgelu",
        dino: str = "",
        dino_model: str = "vit_large_patch14_dinov2",
        max_tokens: int = 256,
        device: str = "auto",
    ) -> None:
        if max_tokens < 1:
            raise ValueError(f"max_tokens: expected at least 1, got {max_tokens}")
        self.prompts, self.max_tokens = prompts, max_tokens
        self._items = [_asked_item(i, line, prompts.parent) for i, line in enumerate(read_json_lines(prompts))]
        if not self._items:
            raise ValueError(f"prompts: expected at least one line, got none in {prompts}")
        where = usable_device(device)
        self._agreement = _clip_features(clip, clip_model, where) if clip else None
        self._consistency = _dino_features(dino, dino_model, where) if dino else self._agreement

    def items(self) -> Sequence[Item]:
        """A line of the file each."""
        return self._items

    def settings(self, image: SamplingSettings | None) -> DecodingSettings:
        """Text that may begin images, one more than any prompt asks, so that drawing too many is seen."""
        from unimodal.decoding_settings import DecodingSettings

        most = max(item.truth["asked"].count(IMAGE) for item in self._items)
        return DecodingSettings("text", max_tokens=self.max_tokens, max_images=most + 1, image=image)

    def judge(self, answers: Sequence[Answer]) -> list[Verdict]:
        """Structure by its edit distance; cosines of features into the row."""
        verdicts = []
        for answer in answers:
            asked, made = answer.item.truth["asked"], kinds(answer.parts)
            match = structure_match(asked, made)
            fields = structure_fields(match, made) | self._cosines(answer)
            verdicts.append(Verdict(match.similarity, structure_cause(match, asked, made), fields))
        return verdicts

    def measures(self, rows: Sequence[Row]) -> dict[str, float]:
        """Share of exact structures; mean cosines over the answers that have them."""
        names = {"structure_right": "structure exact"}
        for features, fields in (
            (self._agreement, {"agreement": "text-image agreement"}),
            (
                self._consistency,
                {"consistency": "image consistency", "consistency_first": "consistency with the first"},
            ),
        ):
            if features is not None:
                names |= {field: f"{name} ({features.name})" for field, name in fields.items()}
        return means(rows, names)

    def spec(self) -> dict[str, Any]:
        """The networks; the prompts are in the fingerprint anyway."""
        found = {"agreement": self._agreement, "consistency": self._consistency}
        return {name: None if features is None else features.spec() for name, features in found.items()}

    def _cosines(self, answer: Answer) -> dict[str, float | None]:
        fields: dict[str, float | None] = {}
        pairs = images_with_text(answer.item.prompt, answer.parts)
        if self._agreement is not None:
            shown = [(image, text) for image, text in pairs if text is not None]
            fields["agreement"] = None
            if shown:
                texts = _text_features(self._agreement, [text for _, text in shown])
                images = _image_features(self._agreement, [image for image, _ in shown])
                fields["agreement"] = float(cosines(images, texts).mean())
        if self._consistency is not None:
            found = consistency(_image_features(self._consistency, [i for i, _ in pairs])) if len(pairs) > 1 else None
            fields["consistency"] = None if found is None else found.pairwise
            fields["consistency_first"] = None if found is None else found.first
        return fields


def _asked_item(index: int, line: JsonLine, base: Path) -> Item:
    record, where = line.record, line.where
    for key in record:
        if key not in ("id", "prompt", "asked", "task"):
            raise ValueError(f"{where}: expected keys among id, prompt, asked, task, got {key!r}")
    asked, prompt, task = record.get("asked"), record.get("prompt"), record.get("task", "documents")
    if not isinstance(asked, list) or not asked or any(kind not in (TEXT, IMAGE) for kind in asked):
        raise ValueError(f'{where}: asked: expected a list of "text" and "image", got {asked!r}')
    if any(pair == (TEXT, TEXT) for pair in pairwise(asked)):
        raise ValueError(f"{where}: asked: expected no two texts in a row (they are one), got {asked}")
    if not isinstance(prompt, dict):
        raise ValueError(f'{where}: prompt: expected {{"parts": [...]}}, got {prompt!r}')
    if not isinstance(task, str) or not task:
        raise ValueError(f"{where}: task: expected a name, got {task!r}")
    name = record.get("id", f"{index:05d}")
    if not isinstance(name, str) or not re.fullmatch(r"[\w-]+", name):
        raise ValueError(f"{where}: id: expected letters, digits, - and _, got {name!r}")
    document = document_record(JsonLine(prompt, f"{where}: prompt"), base).load()
    given = Document(tuple(Part(part.content, learn=False, role=part.role) for part in document.parts), document.kind)
    return Item(name, task, given, {"asked": asked})


def _clip_features(weights: str, model: str, device: torch.device) -> ImageFeatures:
    from unimodal.metrics.clip import ClipFeatures  # here: open_clip takes seconds to import

    return ClipFeatures(model, weights).to(device)


def _dino_features(weights: str, model: str, device: torch.device) -> ImageFeatures:
    from unimodal.metrics.dino import DinoFeatures

    return DinoFeatures(weights, model).to(device)


def _device(features: ImageFeatures) -> torch.device:
    return next((tensor.device for tensor in (*features.parameters(), *features.buffers())), torch.device("cpu"))


@torch.inference_mode()
def _image_features(features: ImageFeatures, images: Sequence[Image.Image]) -> Float[Tensor, "N D"]:
    """One by one: images of a document may have different sizes."""
    prepared = [features.prepare(image)[None].to(_device(features)) for image in images]
    return torch.cat([features(pixels) for pixels in prepared]).cpu()


@torch.inference_mode()
def _text_features(features: Any, texts: Sequence[str]) -> Float[Tensor, "N D"]:
    return features.texts(texts).cpu()


# ---- digits


class DigitSums(Benchmark):
    """Two unseen handwritten digits are added: the sum in text, then drawn, an image a digit.

    Right is an answer with exactly that structure, the right word or number, and every drawn digit read as the right one,
    by a support vector machine on the pixels.

    Args:
        sums: how many are asked.
    """

    name = "digits-sums"

    def __init__(self, sums: int = 200) -> None:
        if sums < 1:
            raise ValueError(f"sums: expected at least 1, got {sums}")
        self.sums = sums

    @cached_property
    def _items(self) -> list[Item]:
        source = DigitsSource("sum", "test")
        items = []
        for i in range(self.sums):
            whole = source.document(i % len(source), np.random.default_rng([0, i]))
            prompt = Document(tuple(part for part in whole.parts if not part.learn), "sum")
            total = sum_answer("".join(part.text for part in whole.parts if part.learn and part.is_text))
            assert total is not None  # the source wrote it
            items.append(Item(f"{i:05d}", "sums", prompt, {"sum": total}))
        return items

    @cached_property
    def _judge(self) -> Judge:
        return Judge()

    def items(self) -> Sequence[Item]:
        """Scan plus scan equals, all of the test split."""
        return self._items

    def settings(self, image: SamplingSettings | None) -> DecodingSettings:
        """One image more than any answer has, so that drawing too many is seen."""
        from unimodal.decoding_settings import DecodingSettings

        return DecodingSettings("text", max_tokens=32, max_images=3, image=image)

    def judge(self, answers: Sequence[Answer]) -> list[Verdict]:
        """Against the true sum, not against what the model wrote: a wrong sum drawn well is wrong."""
        return [self._verdict(answer) for answer in answers]

    def _verdict(self, answer: Answer) -> Verdict:
        total = answer.item.truth["sum"]
        asked, made = [TEXT] + [IMAGE] * len(digits_of(total)), kinds(answer.parts)
        match = structure_match(asked, made)
        causes = [structure_cause(match, asked, made)]
        text_right = sum_answer(answer.text) == total
        if not text_right:
            causes.append(f"expected {total}, wrote {answer.text.strip() or 'nothing'}")
        images = [part.image for part in answer.parts if part.is_image]
        sized = all(image.size == (8, 8) for image in images)
        read = tuple(self._judge.read(images).tolist()) if sized else None
        drawn_right = read == digits_of(total)
        if read is None:
            causes.append(
                f"expected images of 8x8 pixels, drew {', '.join('x'.join(map(str, i.size)) for i in images)}"
            )
        elif not drawn_right:
            causes.append(f"expected {total} drawn, reads {' '.join(map(str, read)) or 'nothing'}")
        fields = structure_fields(match, made) | {"text_right": text_right, "drawn_right": drawn_right}
        right = match.exact and text_right and drawn_right
        return Verdict(float(right), "; ".join(filter(None, causes)), fields)

    def measures(self, rows: Sequence[Row]) -> dict[str, float]:
        """Shares of right structures, texts and drawings."""
        return means(
            rows, {"structure_right": "structure right", "text_right": "text right", "drawn_right": "drawn right"}
        )

    def spec(self) -> dict[str, Any]:
        """The judge, and how often it reads real scans of the test split right."""
        return {"judge": "support vector machine on 64 pixels", "judge_accuracy": round(self._judge.accuracy, 4)}


# ---- shapes

_FIRST = re.compile(f"first an? ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})")
_NEXT = re.compile(f"then an? ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)}) ({'|'.join(RELATIONS)}) it")
_STEP_RULES = ("structure", "texts", "things", "places", "kept")
_STEPS = (1, 2)  # further things that the world's documents of steps put in
Kind = tuple[str, str]


def read_step(text: str) -> tuple[Kind, str | None] | None:
    """Shape and colour of the thing that a step puts in, and where it is seen from the one before (None: the first step).

    None where the text is no step: "first a red circle", " then an orange square left of it".
    """
    text = text.strip()
    match = _NEXT.fullmatch(text) or _FIRST.fullmatch(text)
    if match is None:
        return None
    colour, shape, *relation = match.groups()
    noun = a(phrase(shape, colour))
    whole = f"then {noun} {relation[0]} it" if relation else f"first {noun}"  # with the right article
    return ((shape, colour), relation[0] if relation else None) if whole == text else None


class ShapesSteps(ShapesBenchmark):
    """Step by step: told the first thing, a model draws it, writes the next step, draws the scene with both, and so on.

    Right is an answer of image, text, image (once more text, image, or not) and "done", whose texts all read as steps, whose
    images hold exactly the things said so far, each where it was said to be, and where things that were there have stayed.

    Args:
        count: documents.
        size: pixels of the scenes' sides; the recipe must draw that size.
        split: "test" documents each begin with a pair of shape and colour that training never shows.
        seed: of the first things.
    """

    name = "shapes-steps"

    def item(self, index: int, rng: np.random.Generator) -> Item:
        """The first text of a document of steps."""
        texts, _ = built(self.split, self.size, rng)
        return Item(f"{index:05d}", "steps", Document((Part(texts[0], learn=False),), "steps"), {"first": texts[0]})

    def settings(self, image: SamplingSettings | None) -> DecodingSettings:
        """One image more than a document has, so that drawing too many is seen."""
        from unimodal.decoding_settings import DecodingSettings

        size, images = (self.size, self.size), _STEPS[-1] + 2
        return DecodingSettings("image", max_tokens=160, max_images=images, image=image, size=size)

    def judge(self, answers: Sequence[Answer]) -> list[Verdict]:
        """By the grammar of steps and the recogniser."""
        return [_judge_steps(answer) for answer in answers]

    def measures(self, rows: Sequence[Row]) -> dict[str, float]:
        """Shares of documents right in one way, of those where it could be seen."""
        return means(rows, {f"{name}_right": f"{name} right" for name in _STEP_RULES})


def _judge_steps(answer: Answer) -> Verdict:
    made = kinds(answer.parts)
    orders = [[IMAGE] + [TEXT, IMAGE] * n + [TEXT] for n in _STEPS]
    asked = min(orders, key=lambda order: structure_match(order, made).distance)
    match = structure_match(asked, made)
    texts = [answer.item.truth["first"]]
    for images, group in groupby(answer.parts, key=lambda part: part.is_image):
        joined = "" if images else "".join(part.text for part in group)
        texts += [joined] if joined.strip() else []
    causes: dict[str, list[str]] = {name: [] for name in _STEP_RULES}
    if len(texts) > 1 and texts[-1].strip() == END.strip():
        texts.pop()
    elif match.exact:
        causes["texts"].append(f"expected{END}, wrote {texts.pop().strip()[:60]}")
    steps = [read_step(text) for text in texts]
    if not match.exact:
        causes["structure"].append(structure_cause(match, asked, made))
    for i, (text, step) in enumerate(zip(texts, steps, strict=True)):
        if step is None or (step[1] is None) != (i == 0):
            causes["texts"].append(f"no step: {text.strip()[:60]}")
    seen, compared = _follow(steps, [part.image for part in answer.parts if part.is_image], causes)
    # A rule that nothing could break says nothing: where no thing is recognised, all would be in place.
    asks = {
        "texts": len(texts) > 1,
        "things": len(seen) > 0,
        "places": "places" in compared,
        "kept": "kept" in compared,
    }
    fields: dict[str, Any] = {"made": made}
    for name, found in causes.items():
        fields[f"{name}_right"] = not found if found or asks.get(name, True) else None
    reason = "; ".join(cause for found in causes.values() for cause in found)
    drawn = [box | {"image": number} for number, found in enumerate(seen) for box in boxes(found)]
    return Verdict(float(not reason), reason, fields | {"boxes": drawn})


def _follow(
    steps: Sequence[tuple[Kind, str | None] | None], images: Sequence[Image.Image], causes: dict[str, list[str]]
) -> tuple[list[list[Detection]], set[str]]:
    """Look at image after image with the steps told before each; adds causes.

    Returns what was seen, and which rules there was anything to compare for.
    """
    seen: list[list[Detection]] = []
    compared: set[str] = set()
    before: list[Detection | None] = []
    for number, image in enumerate(images, start=1):
        told = steps[:number]
        if not all(CANVAS[0] <= side <= CANVAS[1] for side in image.size):
            causes["things"].append(f"image {number} has {image.width}x{image.height} pixels")
            break
        found = recognise(image)
        seen.append(found)
        if len(told) < number or None in told:
            causes["things"].append(f"image {number} follows no step")
            break
        known = [step for step in told if step is not None]
        there = Counter((d.label, str(d.colour)) for d in found)
        wanted = Counter(kind for kind, _ in known)
        causes["things"] += [f"image {number} lacks {_noun(kind)}" for kind in (wanted - there).elements()]
        causes["things"] += [f"image {number} has {_noun(kind)} too many" for kind in (there - wanted).elements()]
        now = _identified(found, [kind for kind, _ in known], before)
        for (kind, _), old, seen_now in zip(known, before, now, strict=False):
            if old is None:
                continue
            compared.add("kept")
            if seen_now is None or iou(old.box, seen_now.box) < OVERLAP:
                causes["kept"].append(f"{_noun(kind)} of image {number - 1} did not stay")
        for ((other, _), first), ((kind, relation), new) in pairwise(zip(known, now, strict=True)):
            if not (relation and first and new):
                continue
            compared.add("places")
            if relation not in relations(new.box, first.box):
                causes["places"].append(f"in image {number} {_noun(kind)} is not {relation} {_noun(other)}")
        before = now
    return seen, compared


def _identified(
    found: Sequence[Detection], wanted: Sequence[Kind], before: Sequence[Detection | None]
) -> list[Detection | None]:
    """The detection of each thing told: of its kind, and where it was the nearest to that."""
    left = list(found)
    now: list[Detection | None] = []
    for i, kind in enumerate(wanted):
        old = before[i] if i < len(before) else None
        same = [d for d in left if (d.label, d.colour) == kind]
        best = max(same, key=lambda d: 0.0 if old is None else iou(old.box, d.box), default=None)
        if best is not None:
            left.remove(best)
        now.append(best)
    return now


def _noun(kind: Kind) -> str:
    return a(phrase(*kind))
