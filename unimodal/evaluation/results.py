"""What an evaluation leaves: results.jsonl (an answer a line), summary.json, summary.md, and the gallery index.html."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from unimodal.evaluation.benchmark import Benchmark, Item, Row
from unimodal.evaluation.gallery import write_gallery
from unimodal.files import write_atomically
from unimodal.metrics.shares import wilson_interval
from unimodal.metrics.statistics import bootstrap_interval, bootstrap_rows

COMPLETE, PARTIAL = "complete", "PARTIAL"


@dataclass(frozen=True)
class Number:
    """A value and the ends of its 95 % interval, None where it has none."""

    value: float
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Task:
    """One group of items."""

    score: Number
    answers: int
    items: int


@dataclass(frozen=True)
class Summary:
    """The numbers of one evaluation.

    Attributes:
        benchmark: its name.
        version: its version.
        label: "complete", or "PARTIAL" when answers are missing; then there is no overall number and no measure.
        answers: how many were scored.
        expected: how many there are to score.
        overall: mean of the tasks' scores, or of all items, as the benchmark says.
        tasks: by name, in the benchmark's order.
        measures: further numbers.
        fingerprint: what all of it depends on.
        headline: what `overall` is a mean of: tasks or items; none where only the set as a whole has numbers.
    """

    benchmark: str
    version: int
    label: str
    answers: int
    expected: int
    overall: Number | None
    tasks: Mapping[str, Task]
    measures: Mapping[str, Number]
    fingerprint: Mapping[str, Any]
    headline: str = "tasks"

    def to_json(self) -> dict[str, Any]:
        """The content of summary.json."""
        return {
            "benchmark": self.benchmark,
            "version": self.version,
            "label": self.label,
            "headline": self.headline,
            "answers": self.answers,
            "expected": self.expected,
            "overall": None if self.overall is None else self.overall.value,
            "overall_interval": None if self.overall is None else self.overall.interval,
            "tasks": {
                name: {"score": t.score.value, "interval": t.score.interval, "answers": t.answers, "items": t.items}
                for name, t in self.tasks.items()
            },
            "measures": {name: {"value": m.value, "interval": m.interval} for name, m in self.measures.items()},
            "fingerprint": dict(self.fingerprint),
        }


def summarise(
    benchmark: Benchmark, rows: Sequence[Row], order: Sequence[str], expected: int, fingerprint: Mapping[str, Any],
    set_measures: Mapping[str, float] | None = None,
) -> Summary:  # fmt: skip
    """Means, and 95 % intervals by bootstrap over items (or clusters of them): an item's value is the mean of its answers.

    Args:
        benchmark: what was asked.
        rows: scored answers.
        order: the tasks, in the order they are shown in.
        expected: answers that a complete set has.
        fingerprint: kept with the summary.
        set_measures: numbers of the set as a whole, which have no interval.
    """
    values = item_values(rows) if benchmark.overall != "none" else {}
    together = {row["id"]: str(row.get("cluster", row["id"])) for row in rows}
    clusters = {task: [together[item] for item in items] for task, items in values.items()}
    tasks = {}
    for name in [task for task in order if task in values]:
        scores = list(values[name].values())
        number = Number(sum(scores) / len(scores), task_interval(scores, clusters[name]))
        tasks[name] = Task(number, sum(row["task"] == name for row in rows), len(scores))
    complete = len(rows) == expected
    overall, measures = None, {}
    if complete and tasks:
        by_task = {name: list(values[name].values()) for name in tasks}
        if benchmark.overall == "items":
            clusters = {"all": [cluster for name in by_task for cluster in clusters[name]]}
            by_task = {"all": [value for scores in by_task.values() for value in scores]}
        overall = mean_of_tasks(by_task, clusters)
        point = benchmark.measures(rows)
        intervals = bootstrap_rows(rows, benchmark.measures) if point else {}
        measures = {k: Number(v, (i.low, i.high) if (i := intervals.get(k)) else None) for k, v in point.items()}
    if complete and set_measures:
        measures |= {name: Number(value) for name, value in set_measures.items()}
    label = COMPLETE if complete else PARTIAL
    return Summary(
        benchmark.name,
        benchmark.version,
        label,
        len(rows),
        expected,
        overall,
        tasks,
        measures,
        fingerprint,
        benchmark.overall,
    )


def task_interval(scores: Sequence[float], clusters: Sequence[str]) -> tuple[float, float]:
    """95 % interval of a mean over items, given the cluster of each.

    Where all items are right, or all wrong, a bootstrap has no width; Wilson's interval of as many trials as there are
    clusters is given there.
    """
    if set(scores) <= {0.0} or set(scores) <= {1.0}:
        trials = len(set(clusters))
        interval = wilson_interval(trials if scores[0] else 0, trials)
    else:
        interval = bootstrap_interval({"": scores}, clusters={"": clusters})
    return interval.low, interval.high


def mean_of_tasks(groups: Mapping[str, Sequence[float]], clusters: Mapping[str, Sequence[str]]) -> Number:
    """Unweighted mean of the tasks' means, and its 95 % interval, given every item's score and cluster by task.

    By bootstrap; where a task has none (all its items agree), from the tasks' own intervals: their distances from the
    means, squared, add up (MOVER: G. Zou and A. Donner, Statistics in Medicine 27, 2008, section 2).
    """
    means = [sum(scores) / len(scores) for scores in groups.values()]
    mean = sum(means) / len(means)
    if all(len(set(scores)) > 1 for scores in groups.values()):
        interval = bootstrap_interval(groups, clusters=clusters)
        return Number(mean, (interval.low, interval.high))
    ends = [task_interval(scores, clusters[name]) for name, scores in groups.items()]
    below = math.sqrt(sum((m - low) ** 2 for m, (low, _) in zip(means, ends, strict=True))) / len(means)
    above = math.sqrt(sum((high - m) ** 2 for m, (_, high) in zip(means, ends, strict=True))) / len(means)
    return Number(mean, (mean - below, mean + above))


def item_values(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Task -> item -> mean score of its answers."""
    scores: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        scores.setdefault(row["task"], {}).setdefault(row["id"], []).append(float(row["score"]))
    return {task: {item: sum(s) / len(s) for item, s in items.items()} for task, items in scores.items()}


def write_results(out: Path, rows: Sequence[Row], summary: Summary, answers: Path, items: Sequence[Item]) -> None:
    """Write the four files; each appears whole."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomically(out / "results.jsonl", lines.encode())
    write_atomically(out / "summary.json", (json.dumps(summary.to_json(), indent=2) + "\n").encode())
    write_atomically(out / "summary.md", to_markdown(summary).encode())
    write_gallery(out, rows, summary, answers, items)


def to_markdown(summary: Summary) -> str:
    """The table, and the fingerprint below it."""
    lines = [f"# {headline(summary)}", "", "| task | score | 95 % interval | answers |", "|---|---|---|---|"]
    for name, task in summary.tasks.items():
        lines.append(f"| {name} | {percent(task.score.value)} | {ends(task.score)} | {task.answers} |")
    if summary.overall is not None:
        lines.append(
            f"| **overall** | **{percent(summary.overall.value)}** | {ends(summary.overall)} | {summary.answers} |"
        )
    if summary.measures:
        lines += ["", "| measure | value | 95 % interval |", "|---|---|---|"]
        lines += [f"| {name} | {plain(m.value)} | {plain_ends(m)} |" for name, m in summary.measures.items()]
    fingerprint = json.dumps(dict(summary.fingerprint), indent=2)
    return "\n".join([*lines, "", "```json", fingerprint, "```", ""])


def print_summary(summary: Summary, console: Console | None = None) -> None:
    """The table on the terminal."""
    table = Table(title=headline(summary), title_justify="left")
    for heading in ("", "score", "95 % interval", "answers"):
        table.add_column(heading, justify="left" if not heading else "right", no_wrap=True)
    for name, task in summary.tasks.items():
        table.add_row(name, percent(task.score.value), ends(task.score), str(task.answers))
    if summary.overall is not None:
        table.add_section()
        table.add_row("overall", percent(summary.overall.value), ends(summary.overall), str(summary.answers))
    if summary.measures:
        table.add_section()
        for name, number in summary.measures.items():
            table.add_row(name, plain(number.value), plain_ends(number), "")
    (console or Console()).print(table)


def headline(summary: Summary) -> str:
    """Name, and whether all of it is there."""
    if summary.label == PARTIAL:
        return f"{summary.benchmark}: PARTIAL, {summary.answers} of {summary.expected} answers, no overall score"
    return f"{summary.benchmark}: {summary.answers} answers"


def percent(value: float) -> str:
    """A share."""
    return f"{100 * value:.1f} %"


def ends(number: Number) -> str:
    """The interval of a share."""
    return "" if number.interval is None else f"{100 * number.interval[0]:.1f} to {100 * number.interval[1]:.1f}"


def plain(value: float) -> str:
    """A number that is no share."""
    return f"{value:.4g}"


def plain_ends(number: Number) -> str:
    """The interval of a number that is no share."""
    return "" if number.interval is None else f"{plain(number.interval[0])} to {plain(number.interval[1])}"
