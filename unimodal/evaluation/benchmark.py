"""What a benchmark is: things asked of a model, how one answer is judged, and what the numbers depend on.

The harness (`run.py`) does all else: it generates and resumes, keeps answers, writes results, intervals and the gallery.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from unimodal.documents import Document, Part
from unimodal.metrics.statistics import Row

if TYPE_CHECKING:
    from unimodal.decoding_settings import DecodingSettings
    from unimodal.model import UnifiedModel
    from unimodal_generators.base import SamplingSettings


@dataclass(frozen=True)
class Item:
    """One thing asked of a model.

    Attributes:
        id: stable name, safe in a path: "00012".
        task: group that its score counts in.
        prompt: what the model is given, all of it context.
        truth: what a right answer is, as the benchmark's file states it (JSON).
        choices: the possible answers, where there is a list of them.
        cluster: what it shares with items that are asked about the same thing, such as the image: intervals draw them
            together. Nothing: it stands alone.
    """

    id: str
    task: str
    prompt: Document
    truth: Mapping[str, Any] = field(default_factory=dict)
    choices: tuple[str, ...] = ()
    cluster: str = ""


@dataclass(frozen=True)
class Answer:
    """One answer to an item.

    Attributes:
        item: what was asked.
        sample: number of the answer, 0 .. samples - 1.
        parts: what the model wrote and drew.
        files: the answer's files, relative to the folder of answers.
    """

    item: Item
    sample: int
    parts: tuple[Part, ...]
    files: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """All text of the answer."""
        return "".join(part.text for part in self.parts if part.is_text)


@dataclass(frozen=True)
class Verdict:
    """How good one answer is.

    Attributes:
        score: 0 wrong .. 1 right.
        reason: why it is not 1, one line a cause; shown to people.
        fields: more for the row in results.jsonl (JSON). `boxes`, a list of {"label", "box", "score", "colour"}, is drawn
            into the gallery.
    """

    score: float
    reason: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)


class Benchmark(ABC):
    """A set of items and their judge. Constructor arguments are the command's options and part of the fingerprint.

    Attributes:
        name: what results call it; a changed detector or rule needs another name.
        version: raised whenever a score of the same answers would change.
        draws: whether an answer is exactly one image.
        overall: the headline: mean of the tasks' means, of all items, or none where only the set as a whole has numbers.
        samples: answers an item.
    """

    name: str
    version: ClassVar[int] = 1
    draws: ClassVar[bool] = False
    overall: ClassVar[Literal["tasks", "items", "none"]] = "tasks"
    samples: int = 1

    @abstractmethod
    def items(self) -> Sequence[Item]:
        """Everything that is asked, in the benchmark's order; the same at every call."""

    @abstractmethod
    def judge(self, answers: Sequence[Answer]) -> list[Verdict]:
        """A verdict an answer; called with as many answers at once as the harness' `batch` says."""

    @abstractmethod
    def spec(self) -> dict[str, Any]:
        """What scores depend on besides the answers: hashes of files and weights, thresholds, wordings, versions."""

    def settings(self, image: SamplingSettings | None) -> DecodingSettings:
        """How the model goes on behind a prompt."""
        from unimodal.decoding_settings import DecodingSettings

        if self.draws:
            return DecodingSettings("image", max_tokens=0, max_images=1, image=image)
        return DecodingSettings("text", max_tokens=32, max_images=0)

    def answer(
        self, model: UnifiedModel, items: Sequence[Item], settings: DecodingSettings, seeds: Sequence[int]
    ) -> list[tuple[Part, ...]]:
        """What the model writes and draws behind each prompt; one document's answer depends on its seed alone."""
        from unimodal.decoding import decode

        done = decode(model, [item.prompt for item in items], settings, seeds)
        return [document.parts[len(item.prompt.parts) :] for item, document in zip(items, done, strict=True)]

    def prepare(self) -> None:
        """ValueError where the judge lacks something; called before answers are generated that are to be scored."""
        return

    def measures(self, rows: Sequence[Row]) -> dict[str, float]:
        """Further numbers of a complete set of results, e.g. F1; each is bootstrapped like the rest."""
        return {}

    def self_test(self) -> None:
        """Score answers whose verdicts are known; ValueError when they do not come out right."""
        raise ValueError(f"--self-test: {self.name} has none: its judge has no weights that could be wrong")
