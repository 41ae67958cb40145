"""Generate, then score; either half alone.

Answers are files (`answers.py`), so generation goes on where it stopped. An answer's draws depend on (seed, item, number
of the answer) alone: not on batch size, on which items are asked, or on how many processes share the work.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from unimodal import processes
from unimodal.decoding_settings import DecodingSettings
from unimodal.documents import Part
from unimodal.evaluation.answers import AnswerFolder
from unimodal.evaluation.benchmark import Answer, Benchmark, Item, Row
from unimodal.evaluation.fingerprint import benchmark_record, versions
from unimodal.evaluation.results import Summary, summarise, write_results
from unimodal.model import UnifiedModel

T = TypeVar("T")


@dataclass(frozen=True)
class Choice:
    """Which items are asked.

    Attributes:
        tasks: these alone; empty: all.
        limit: most items a task; None: all.
        part: this process' share, (k, n): the k-th of n, from 1.
    """

    tasks: tuple[str, ...] = ()
    limit: int | None = None
    part: tuple[int, int] = (1, 1)

    def __post_init__(self) -> None:
        k, n = self.part
        if not 1 <= k <= n:
            raise ValueError(f"--part: expected K/N with 1 <= K <= N, got {k}/{n}")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"--limit: expected at least 1, got {self.limit}")

    def of(self, items: Sequence[Item]) -> list[Item]:
        """The items of the tasks, up to the limit."""
        names = Counter(item.id for item in items)
        if len(names) < len(items):
            twice = next(name for name, number in names.items() if number > 1)
            raise ValueError(f"items: expected a name each, got {twice} twice: both would share one answer")
        known = dict.fromkeys(item.task for item in items)
        for task in self.tasks:
            if task not in known:
                raise ValueError(f"--tasks: expected some of {', '.join(known)}, got {task}")
        seen = dict.fromkeys(known, 0)
        chosen = []
        for item in items:
            if self.tasks and item.task not in self.tasks:
                continue
            seen[item.task] += 1
            if self.limit is None or seen[item.task] <= self.limit:
                chosen.append(item)
        return chosen


def answer_seed(seed: int, item: str, sample: int) -> int:
    """Seed of one answer, 0 .. 2^63 - 1."""
    digest = hashlib.sha256(f"{seed}/{item}/{sample}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generate(
    benchmark: Benchmark,
    items: Sequence[Item],
    folder: AnswerFolder,
    model: UnifiedModel,
    *,
    settings: DecodingSettings | None = None,
    seed: int = 0,
    batch: int = 32,
    part: tuple[int, int] = (1, 1),
) -> int:
    """Ask the model for every answer of this part that is not there yet; returns how many were made.

    It goes on as `settings` say (None: the benchmark's, with the recipe's sampler).
    Of several processes each asks for some of them, and the main one writes all.
    """
    settings = benchmark.settings(None) if settings is None else settings
    jobs = [(item, sample) for item in items for sample in range(benchmark.samples)]
    mine, here = jobs[part[0] - 1 :: part[1]], processes.current()
    jobs = [mine[i] for i in here.agree(lambda: [i for i, job in enumerate(mine) if not folder.has(*job)])]

    def answer(chunk: Sequence[tuple[Item, int]]) -> list[tuple[Part, ...]]:
        seeds = [answer_seed(seed, item.id, sample) for item, sample in chunk]
        return benchmark.answer(model, [item for item, _ in chunk], settings, seeds)

    hidden = None if here.main else True
    with tqdm(total=len(jobs), desc="answers", unit="answer", leave=False, disable=hidden) as bar:
        for (item, sample), parts in here.in_order(jobs, batch, answer):
            if here.main:
                folder.write(item, sample, parts)
            bar.update()
    return len(jobs)


def score(benchmark: Benchmark, items: Sequence[Item], folder: AnswerFolder, batch: int = 32) -> list[Row]:
    """A row for every answer that is there, in the order of the items."""
    rows: list[Row] = []
    answers = (answer for item in items for answer in folder.read(item))
    with tqdm(total=len(items) * benchmark.samples, desc="scores", unit="answer", leave=False, disable=None) as bar:
        for chunk in _chunks(answers, batch):
            for answer, verdict in zip(chunk, benchmark.judge(chunk), strict=True):
                rows.append(_row(answer, verdict.score, verdict.reason) | dict(verdict.fields))
            bar.update(len(chunk))
    return rows


def report(
    benchmark: Benchmark, rows: Sequence[Row], out: Path, folder: Path, provenance: dict[str, Any],
    set_measures: dict[str, float] | None = None, expected: int | None = None,
) -> Summary:  # fmt: skip
    """Summarise rows and write everything into `out`.

    Args:
        benchmark: what was asked.
        rows: scored answers.
        out: folder of the results.
        folder: folder of the answers.
        provenance: who made them: `model`, `sampling`, `seed` of the fingerprint.
        set_measures: numbers of the set as a whole.
        expected: answers of a complete set; None: all that the benchmark has.
    """
    items = list(benchmark.items())
    fingerprint = {"benchmark": benchmark_record(benchmark, items), **provenance, "versions": versions()}
    order = list(dict.fromkeys(item.task for item in items))
    expected = len(items) * benchmark.samples if expected is None else expected
    summary = summarise(benchmark, rows, order, expected, fingerprint, set_measures)
    write_results(out, rows, summary, folder, items)
    return summary


def _row(answer: Answer, value: float, reason: str) -> Row:
    asked = "".join(part.text if part.is_text else "[image]" for part in answer.item.prompt.parts)
    row = {
        "id": answer.item.id, "sample": answer.sample, "task": answer.item.task, "score": float(value), "reason": reason,
        "asked": asked.strip(), "files": list(answer.files),
    }  # fmt: skip
    row |= {"cluster": answer.item.cluster} if answer.item.cluster else {}
    return row | ({"text": answer.text} if answer.text else {})


def _chunks(things: Iterable[T], size: int) -> Iterator[list[T]]:
    chunk: list[T] = []
    for thing in things:
        chunk.append(thing)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
