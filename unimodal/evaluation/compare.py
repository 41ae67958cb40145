"""Two results of one benchmark, item by item: is b better than a, and could chance alone have made the difference?"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from unimodal.documents import read_json_lines
from unimodal.evaluation.benchmark import Row
from unimodal.metrics.statistics import Interval, holm, paired_test


@dataclass(frozen=True)
class Difference:
    """Two scores over the same items.

    Attributes:
        a: score of the first.
        b: score of the second.
        difference: b less a.
        interval: 95 %, by bootstrap over the shared items.
        p: two-sided, by sign flips.
        p_holm: the same corrected for the number of tasks; None for the headline, which is one test.
        items: how many were compared.
    """

    a: float
    b: float
    difference: float
    interval: Interval
    p: float
    p_holm: float | None
    items: int


@dataclass(frozen=True)
class Changed:
    """An entry that two fingerprints do not share; None where one of them has none."""

    key: str
    a: Any
    b: Any


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    Attributes:
        benchmark: its name in a.
        a: folder of the first result.
        b: folder of the second.
        overall: the headline.
        tasks: every task, in a's order.
        changed: entries of the fingerprints that differ: what the difference may be due to.
        forced: whether the benchmarks differed and were compared all the same.
    """

    benchmark: str
    a: str
    b: str
    overall: Difference
    tasks: Mapping[str, Difference]
    changed: tuple[Changed, ...]
    forced: bool

    def to_json(self) -> dict[str, Any]:
        """All of it, for a JSON file."""
        return json.loads(json.dumps(asdict(self)))

    def to_markdown(self) -> str:
        """A table, and what differed between the two."""
        lines = [f"# {self.benchmark}: b less a", "", f"- a: `{self.a}`", f"- b: `{self.b}`", ""]
        if self.forced:
            lines += ["**Compared by force: the two were not asked or judged alike (benchmark.* below).**", ""]
        lines += [
            "| task | a | b | difference | 95 % interval | p | p (Holm) | items |",
            "|---|---|---|---|---|---|---|---|",
        ]
        lines += [_line(name, found) for name, found in self.tasks.items()]
        lines += [_line("**overall**", self.overall), ""]
        lines += [
            "Scores in percent. Items are resampled within their task, those about one image together (bootstrap, 95 %); p "
            "is of a two-sided sign-flip test on the same items, Holm's correction over the tasks."
        ]
        if self.changed:
            lines += ["", "| differs | a | b |", "|---|---|---|"]
            lines += [f"| {_cell(c.key)} | {_cell(c.a)} | {_cell(c.b)} |" for c in self.changed]
        return "\n".join([*lines, ""])


def compare(a: Path, b: Path, force: bool = False) -> Comparison:
    """Compare two folders that `unimodal evaluate` wrote.

    Args:
        a: the first, the one that is improved upon.
        b: the second.
        force: compare although the benchmark parts of the fingerprints differ.

    Raises:
        ValueError: a folder without results or with PARTIAL ones, another benchmark (unless forced), other items, or a
            results.jsonl that its summary.json does not agree with.
    """
    first, second = _read("a", a), _read("b", b)
    changed = tuple(_changed(first.summary["fingerprint"], second.summary["fingerprint"]))
    asked = [entry for entry in changed if entry.key.split(".")[0] == "benchmark"]
    if asked and not force:
        entry = asked[0]
        raise ValueError(
            f"b: expected the benchmark of a, got another {entry.key}: {_brief(entry.a)} in a and {_brief(entry.b)} in b"
            " (--force compares all the same)"
        )
    for item in [*first.tasks, *second.tasks]:
        there = [result.tasks.get(item, "no task") for result in (first, second)]
        if there[0] != there[1]:
            raise ValueError(f"b: expected the items of a, got {item!r} of {there[0]} in a and of {there[1]} in b")
    by_items = first.by_items
    if by_items != second.by_items:
        raise ValueError(
            "b: expected an overall score of the kind of a's, got a mean over tasks beside a mean over items"
        )
    names = list(dict.fromkeys(first.tasks.values()))
    sizes = {name: float(list(first.tasks.values()).count(name)) for name in names}
    overall = _difference(first, second, names, sizes if by_items else dict.fromkeys(names, 1.0))
    found = {name: _difference(first, second, [name], {name: 1.0}) for name in names}
    corrected = holm({name: difference.p for name, difference in found.items()})
    tasks = {name: Difference(**{**vars(found[name]), "p_holm": corrected[name]}) for name in names}
    return Comparison(first.summary["benchmark"], str(a), str(b), overall, tasks, changed, bool(asked))


@dataclass(frozen=True)
class _Result:
    """One folder: an item's value is the mean of its answers."""

    summary: dict[str, Any]
    values: dict[str, float]  # item -> value
    tasks: dict[str, str]  # item -> task
    clusters: dict[str, str]  # item -> what intervals draw it together with, where it is not alone

    @property
    def by_items(self) -> bool:
        """Whether the headline is the mean of all items, not of the tasks' means."""
        return bool(self.summary["headline"] == "items")

    def headline(self) -> float:
        """As its summary says."""
        if self.by_items:
            return _mean(self.values.values())
        by_task: dict[str, list[float]] = {}
        for item, value in self.values.items():
            by_task.setdefault(self.tasks[item], []).append(value)
        return _mean([_mean(values) for values in by_task.values()])


def _read(name: str, folder: Path) -> _Result:
    for file in ("summary.json", "results.jsonl"):
        if not (folder / file).is_file():
            raise ValueError(f"{name}: expected a folder with {file}, as `unimodal evaluate` writes it, got {folder}")
    try:
        summary = json.loads((folder / "summary.json").read_text())
        label, answers, overall = summary["label"], summary["answers"], summary["overall"]
        headline = summary["headline"]
        summary["fingerprint"]["benchmark"], summary["benchmark"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{name}: expected a summary.json of `unimodal evaluate` in {folder}, got {error!r}") from None
    if headline == "none":
        raise ValueError(f"{name}: expected scores of items to compare, got numbers of whole sets in {folder}")
    if label != "complete" or overall is None:
        raise ValueError(
            f"{name}: expected complete results, got {label} ones in {folder}:"
            f" {answers} of {summary.get('expected')} answers"
        )
    rows: list[Row] = [line.record for line in read_json_lines(folder / "results.jsonl")]
    scores: dict[str, list[float]] = {}
    for number, row in enumerate(rows, 1):
        if not (
            isinstance(row.get("score"), (int, float)) and all(isinstance(row.get(k), str) for k in ("id", "task"))
        ):
            raise ValueError(f"{name}: expected id, task and score in answer {number} of {folder / 'results.jsonl'}")
        scores.setdefault(row["id"], []).append(float(row["score"]))
    values = {item: _mean(found) for item, found in scores.items()}
    clusters = {row["id"]: row["cluster"] for row in rows if "cluster" in row}
    result = _Result(summary, values, {row["id"]: row["task"] for row in rows}, clusters)
    if len(rows) != answers or not rows or not _close(result.headline(), overall):
        raise ValueError(f"{name}: expected results.jsonl to give the scores of summary.json, got others in {folder}")
    return result


def _difference(a: _Result, b: _Result, tasks: list[str], weights: Mapping[str, float]) -> Difference:
    chosen = {item: task for item, task in a.tasks.items() if task in tasks}
    first, second = ({item: result.values[item] for item in chosen} for result in (a, b))
    test = paired_test(first, second, chosen, weights=weights, clusters=b.clusters | a.clusters)
    total = sum(weights.values())
    scores = [
        sum(weights[t] / total * _mean([v for item, v in values.items() if chosen[item] == t]) for t in tasks)
        for values in (first, second)
    ]
    return Difference(scores[0], scores[1], test.difference, test.interval, test.p, None, test.items)


def _changed(a: Any, b: Any, key: str = "") -> Iterator[Changed]:
    """Leaves that differ, those of a first, in its order."""
    if isinstance(a, dict) and isinstance(b, dict):
        for name in dict.fromkeys([*a, *b]):
            yield from _changed(a.get(name), b.get(name), f"{key}.{name}" if key else str(name))
    elif a != b:
        yield Changed(key, a, b)


def _line(name: str, found: Difference) -> str:
    percent = [f"{100 * value:.1f}" for value in (found.a, found.b)]
    ends = f"{100 * found.interval.low:+.1f} to {100 * found.interval.high:+.1f}"
    corrected = "" if found.p_holm is None else f"{found.p_holm:.2g}"
    cells = [name, *percent, f"{100 * found.difference:+.1f}", ends, f"{found.p:.2g}", corrected, str(found.items)]
    return f"| {' | '.join(cells)} |"


def _cell(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _brief(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def _mean(values: Any) -> float:
    found = list(values)
    return sum(found) / len(found)


def _close(one: float, other: float) -> bool:
    return abs(one - other) <= 1e-9
