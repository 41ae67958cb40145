"""From rows to tables, plots, and which published orderings came out.

An interval is Wilson's over what was asked of one run. Over several seeds it is Student's over the seeds' scores, which
alone says something about the design; of one run nothing is said but how that run came out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from experiments.designs.running import Row
from experiments.designs.table import CLAIMS, DESIGNS, Claim, World
from unimodal.files import write_atomically
from unimodal.metrics.statistics import Interval

POINTS = {"steps": "Equal steps", "flops": "Equal training FLOPs"}


def write_report(rows: Sequence[Row], world: World, out: Path) -> None:
    """`report.md` with a table for each point, and `plot.png`."""
    parts = [f"# Designs on {world.name}\n"]
    for at, title in POINTS.items():
        mine = [row for row in rows if row["at"] == at]
        if mine:
            parts += [f"## {title}\n", table(mine, world), "", orderings(mine, world), ""]
    write_atomically(out / "report.md", "\n".join(parts).encode())
    plot([row for row in rows if row["at"] == "steps"], world, out / "plot.png")


def of(rows: Sequence[Row], name: str) -> list[Row]:
    """Rows of a design, one a seed."""
    return sorted((row for row in rows if row["name"] == name), key=lambda row: int(row["seed"]))


def interval(rows: Sequence[Row], score: str) -> Interval:
    """Of a design's score, at 95 %."""
    if len(rows) == 1:
        low, high = rows[0][f"{score}_interval"]
        return Interval(low, high)
    values = [row[score] for row in rows]
    half = float(stats.t.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5
    return Interval(max(0.0, mean(values) - half), min(1.0, mean(values) + half))


def table(rows: Sequence[Row], world: World) -> str:
    """One line a design."""
    heads = ["design", "seeds", *(score.replace("_", " ") for score in world.scores), "Frechet (pixels64)", "recall"]
    heads += ["TFLOP", "M tokens", "M parameters (learning)", "s an image", "s of training"]
    lines = [heads, ["---"] * len(heads)]
    for design in DESIGNS:
        mine = of(rows, design.name)
        if mine:
            lines.append([design.name, str(len(mine)), *(_share(mine, score) for score in world.scores), *_costs(mine)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _share(rows: Sequence[Row], score: str) -> str:
    found, value = interval(rows, score), mean(row[score] for row in rows)
    return f"{100 * value:.1f} ({100 * found.low:.1f} to {100 * found.high:.1f})"


def _costs(rows: Sequence[Row]) -> list[str]:
    def middle(key: str) -> float:
        return float(mean(row[key] for row in rows))

    parameters = f"{middle('parameters') / 1e6:.2f} ({middle('learning') / 1e6:.2f})"
    return [
        f"{middle('frechet'):.0f}", f"{middle('recall'):.2f}", f"{middle('flops') / 1e12:.1f}",
        f"{middle('tokens') / 1e6:.2f}", parameters, f"{middle('seconds_an_image'):.3f}",
        f"{middle('train_seconds'):.0f}",
    ]  # fmt: skip


def orderings(rows: Sequence[Row], world: World) -> str:
    """Each published ordering, and how it came out here."""
    lines = ["| published | here | |", "| --- | --- | --- |"]
    for claim in CLAIMS:
        better, worse = of(rows, claim.better), of(rows, claim.worse)
        if better and worse:
            score = world.drawn if claim.score == "drawn" else world.read
            values = f"{claim.better} {_share(better, score)}, {claim.worse} {_share(worse, score)}"
            lines.append(f"| {claim.text} ({claim.source}) | {values} | {verdict(claim, better, worse, score)} |")
    return "\n".join(lines)


def verdict(claim: Claim, better: Sequence[Row], worse: Sequence[Row], score: str) -> str:
    """In words; an ordering is one only where the intervals do not touch."""
    a, b = interval(better, score), interval(worse, score)
    seeds = min(len(better), len(worse))
    if a.low <= b.high and b.low <= a.high:
        return "not separated"
    found = "came out" if a.low > b.high else "came out the other way round"
    return f"{found}{' in this one run of each, which says nothing of other seeds' if seeds == 1 else ''}"


def plot(rows: Sequence[Row], world: World, path: Path) -> None:
    """Drawing and reading, with intervals, a bar a design."""
    names = [design.name for design in DESIGNS if of(rows, design.name)]
    if not names:
        return
    figure = Figure(figsize=(9, 0.38 * len(names) + 1.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    places = np.arange(len(names))
    for ax, score, title in zip(axes, (world.drawn, world.read), ("asked for, drawn", "shown, named"), strict=True):
        values = np.array([mean(row[score] for row in of(rows, name)) for name in names])
        found = [interval(of(rows, name), score) for name in names]
        # An interval about a share of 0 or 1 need not hold its middle.
        low = np.clip(values - np.array([i.low for i in found]), 0, None)
        high = np.clip(np.array([i.high for i in found]) - values, 0, None)
        ax.barh(places, 100 * values, xerr=100 * np.stack([low, high]), color="#7aa6c2", ecolor="#1f3b4d", capsize=2)
        for name, place in zip(names, places, strict=True):
            dots = [100 * row[score] for row in of(rows, name)]
            if len(dots) > 1:
                ax.plot(dots, [place] * len(dots), "k.", markersize=4)
        ax.set(xlim=(0, 105), xlabel=f"{world.name} {title}, %")
        ax.grid(axis="x", alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(places, names)
    axes[0].invert_yaxis()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
