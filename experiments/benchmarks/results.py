"""Rows of the result: what was measured, against whom, and whether the goal is met; as a table and as JSON.

`python -m experiments.benchmarks.results` writes the files in `results/` into the README's table.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from experiments.benchmarks.timing import Timing

HERE = Path(__file__).parent
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
INSTALL = "not measured: install with pip install -e .[bench]"


@dataclass(frozen=True)
class Goal:
    """What a row should reach."""

    limit: float
    unit: str
    at_most: bool = False

    def __str__(self) -> str:
        return f"{'<=' if self.at_most else '>='} {self.limit:g}"

    def met(self, value: float) -> bool:
        """Whether `value` reaches it."""
        return value <= self.limit if self.at_most else value >= self.limit


@dataclass
class Result:
    """One row. Times are seconds; `value` is made of the best of them, `value_median` of the medians."""

    name: str
    value: float | None
    unit: str
    peer: str = ""
    goal: str = ""
    met: bool | None = None
    compiled: bool | None = None  # None: there is nothing to compile
    note: str = ""
    best: float | None = None
    median: float | None = None
    peer_best: float | None = None
    peer_median: float | None = None
    value_median: float | None = None
    correct: float | None = None  # largest relative error against the reference; None: the two sides differ
    tolerance: float | None = None
    command: str = ""
    extra: dict[str, Any] = field(default_factory=dict)

    def judged(self, goal: Goal | None, command: str) -> "Result":
        """With the goal and whether it is met: a wrong result meets none."""
        self.command = command
        if goal is not None:
            self.goal, self.unit = str(goal), goal.unit
            wrong = self.correct is not None and self.tolerance is not None and not self.correct <= self.tolerance
            if self.value is not None:
                self.met = goal.met(self.value) and not wrong
            if wrong:
                self.note = "; ".join(filter(None, (f"wrong by {self.correct:.2g}", self.note)))
        return self

    def timed(self, ours: Timing | None, peer: Timing | None = None) -> "Result":
        """With the times of both sides."""
        if ours is not None:
            self.best, self.median = ours.best, ours.median
        if peer is not None:
            self.peer_best, self.peer_median = peer.best, peer.median
        return self


def speedup(ours: Timing, theirs: Timing | None, **fields: Any) -> Result:
    """How many times faster we are; the caller names the row."""
    if theirs is None:
        fields["note"] = INSTALL
        return Result(name="", value=None, unit="x", **fields).timed(ours)
    value, median = theirs.best / ours.best, theirs.median / ours.median
    return Result(name="", value=value, unit="x", value_median=median, **fields).timed(ours, theirs)


def table(rows: Sequence[Result]) -> str:
    """Rows as aligned text."""
    header = ("name", "value", "unit", "peer", "goal", "met", "compiled", "note")
    words = {True: "yes", False: "no", None: "-"}
    lines = [header]
    for r in rows:
        value = "-" if r.value is None else f"{r.value:.4g}"
        lines.append((r.name, value, r.unit, r.peer, r.goal or "-", words[r.met], words[r.compiled], r.note))
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip() for line in lines)


def write(path: Path, machine: dict[str, Any], versions: dict[str, Any], rows: Iterable[Result]) -> None:
    """A result file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    report = {"machine": machine, "versions": versions, "results": [asdict(row) for row in rows]}
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def markdown(files: Sequence[Path]) -> str:
    """Every result file as a heading, a line on the machine and a table."""
    parts = []
    for path in sorted(files):
        report = json.loads(path.read_text(encoding="utf-8"))
        machine, words = report["machine"], {True: "yes", False: "**no**", None: "-"}
        peaks = ", ".join(f"{k} {v:.0f}" for k, v in machine["gemm_peak_gflops"].items())
        copies = ", ".join(f"{k} {v:.0f}" for k, v in machine["copy_gb_per_s"].items())
        packages = ", ".join(f"{k} {v}" for k, v in report["versions"].items() if v)
        lines = [
            f"### {machine.get('gpu', machine['cpu'])}",
            "",
            f"{machine['cores']} cores, {machine['threads']} threads. Matrix products, GF/s: {peaks}. "
            f"Copies, GB/s: {copies}. {packages}.",
            "",
            "| name | value | median | goal | met | compiled | peer | error | note |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for row in report["results"]:
            cells = (
                row["name"], _number(row["value"], row["unit"]), _number(row["value_median"], row["unit"]),
                row["goal"] or "-", words[row["met"]], {True: "yes", False: "no", None: "-"}[row["compiled"]],
                row["peer"] or "-", "-" if row["correct"] is None else f"{row['correct']:.1e}", row["note"] or "",
            )  # fmt: skip
            lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) or "Not measured yet."


def _number(value: float | None, unit: str) -> str:
    return "-" if value is None else f"{value:.3g} {unit}".strip()


def update_readme(folder: Path = HERE) -> None:
    """Put the tables of `folder/results` between the marks of its README."""
    readme = folder / "README.md"
    text = readme.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"README.md: expected one pair of marks {BEGIN} and {END}")
    head, _, rest = text.partition(BEGIN)
    tail = rest.partition(END)[2]
    filled = markdown(list((folder / "results").glob("*.json")))
    readme.write_text(f"{head}{BEGIN}\n\n{filled}\n\n{END}{tail}", encoding="utf-8")


if __name__ == "__main__":
    update_readme()
