"""From rows to tables, plots, and which published orderings came out.

An interval of one run is what its scoring found (of the digits Wilson's, of the shapes a bootstrap over prompts). Over
several seeds it spans Student's over the seeds' scores and Wilson's of their mean over what one run is asked: at
the ceiling seeds agree by chance, and other seeds are asked much the same. Of one run nothing is said but how it came out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from experiments.designs.gallery import gallery
from experiments.designs.running import Row
from experiments.designs.table import CLAIMS, DESIGNS, World
from unimodal.files import write_atomically
from unimodal.metrics.shares import wilson_interval
from unimodal.metrics.statistics import Interval

POINTS = {"steps": "Equal steps", "flops": "Equal training FLOPs"}


def write_report(rows: Sequence[Row], world: World, out: Path) -> None:
    """In the world's folder: `report.md` with a table for each point, `plot.png`, and `gallery.png` of what was drawn.

    `out` is the folder of all runs, in which rows say where their samples are.
    """
    folder = out / world.name
    parts = [f"# Designs on {world.name}\n"]
    _, written = world.measures["frechet"]
    real = f"Frechet distance of unseen real images: {written(rows[0]['frechet_real'])}"
    parts.append(f"{real}. FLOPs, tokens and documents: estimates.\n")
    for at, title in POINTS.items():
        mine = [row for row in rows if row["at"] == at]
        if mine:
            parts += [f"## {title}\n", table(mine, world), "", orderings(mine, world), ""]
    machines = dict.fromkeys(row["machine"] for row in rows)
    if len(machines) > 1:
        named = "; ".join(machines)
        parts.append(
            f"Trained on several machines ({named}), each with tokenizers of its own: seconds do not compare.\n"
        )
    if world.legend:
        parts.append(f"{world.legend}\n")
    write_atomically(folder / "report.md", "\n".join(parts).encode())
    plot(rows, world, folder / "plot.png")
    gallery(rows, out, folder / "gallery.png")


def of(rows: Sequence[Row], name: str) -> list[Row]:
    """Rows of a design, one a seed."""
    return sorted((row for row in rows if row["name"] == name), key=lambda row: int(row["seed"]))


def interval(rows: Sequence[Row], score: str, trials: int) -> Interval:
    """Of a design's score, a share of `trials` a run, at 95 %."""
    values = [row[score] for row in rows]
    if len(values) == 1:
        return Interval(*rows[0][f"{score}_interval"])
    asked = wilson_interval(round(trials * mean(values)), trials)
    half = float(stats.t.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5
    low, high = max(0.0, mean(values) - half), min(1.0, mean(values) + half)
    return Interval(min(low, asked.low), max(high, asked.high))


def table(rows: Sequence[Row], world: World) -> str:
    """One line a design."""
    heads = ["design", "seeds", *(score.replace("_", " ") for score in world.scores)]
    heads += [title for title, _ in world.measures.values()]
    heads += [
        "steps",
        "TFLOP",
        "M tokens",
        "k documents",
        "M parameters (learning)",
        "s an image",
        "s of training",
    ]
    lines = [heads, ["---"] * len(heads)]
    for design in DESIGNS:
        mine = of(rows, design.name)
        if mine:
            lines.append(
                [
                    design.name,
                    str(len(mine)),
                    *(_share(mine, score, world) for score in world.scores),
                    *_costs(mine, world),
                ]
            )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _share(rows: Sequence[Row], score: str, world: World) -> str:
    found, value = interval(rows, score, world.scores[score]), mean(row[score] for row in rows)
    return f"{100 * value:.1f} ({100 * found.low:.1f} to {100 * found.high:.1f})"


def _costs(rows: Sequence[Row], world: World) -> list[str]:
    def middle(key: str) -> float:
        return float(mean(row[key] for row in rows))

    timed = [row["seconds_an_image"] for row in rows if "seconds_an_image" in row]  # of one seed

    parameters = f"{middle('parameters') / 1e6:.2f} ({middle('learning') / 1e6:.2f})"
    return [
        *(written(middle(key)) for key, (_, written) in world.measures.items()),
        f"{middle('optimizer_steps'):.0f}", f"{middle('flops') / 1e12:.1f}", f"{middle('tokens') / 1e6:.2f}",
        f"{middle('documents') / 1e3:.0f}", parameters, f"{mean(timed):.3f}" if timed else "",
        f"{middle('train_seconds'):.0f}",
    ]  # fmt: skip


def orderings(rows: Sequence[Row], world: World) -> str:
    """Each published ordering, how it came out here, and what else differed."""
    lines = ["| published | here | | what else differs |", "| --- | --- | --- | --- |"]
    for claim in CLAIMS:
        better, worse = of(rows, claim.better), of(rows, claim.worse)
        if better and worse:
            score = world.drawn if claim.score == "drawn" else world.read
            values = f"{claim.better} {_share(better, score, world)}, {claim.worse} {_share(worse, score, world)}"
            found = verdict(better, worse, score, world)
            lines.append(f"| {claim.text} ({claim.source}) | {values} | {found} | {claim.also or 'nothing'} |")
    return "\n".join(lines)


def verdict(better: Sequence[Row], worse: Sequence[Row], score: str, world: World) -> str:
    """In words; an ordering is one only where the intervals do not touch."""
    a, b = (interval(rows, score, world.scores[score]) for rows in (better, worse))
    if a.low <= b.high and b.low <= a.high:
        return "not separated"
    found = "came out" if a.low > b.high else "came out the other way round"
    return f"{found}{', of one seed, which says nothing of others' if 1 in (len(better), len(worse)) else ''}"


def plot(rows: Sequence[Row], world: World, path: Path) -> None:
    """Drawing and reading: a bar a design at equal steps, with its interval, and a diamond at equal FLOPs."""
    within, rows = ([row for row in rows if row["at"] == at] for at in ("flops", "steps"))
    names = [design.name for design in DESIGNS if of(rows, design.name)]
    if not names:
        return
    figure = Figure(figsize=(9, 0.38 * len(names) + 1.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    places = np.arange(len(names))
    for ax, score, title in zip(axes, (world.drawn, world.read), ("asked for, drawn", "shown, named"), strict=True):
        values = np.array([mean(row[score] for row in of(rows, name)) for name in names])
        found = [interval(of(rows, name), score, world.scores[score]) for name in names]
        # Rounding may put an end on the wrong side of a share of 0 or 1.
        low = np.clip(values - np.array([i.low for i in found]), 0, None)
        high = np.clip(np.array([i.high for i in found]) - values, 0, None)
        ax.barh(places, 100 * values, xerr=100 * np.stack([low, high]), color="#7aa6c2", ecolor="#1f3b4d", capsize=2)
        for name, place in zip(names, places, strict=True):
            dots = [100 * row[score] for row in of(rows, name)]
            if len(dots) > 1:
                ax.plot(dots, [place] * len(dots), "k.", markersize=4)
            if equal := of(within, name):
                share = 100 * mean(row[score] for row in equal)
                ax.plot(share, place, "D", color="#c2694f", markersize=5, markerfacecolor="none")
        most = max(i.high for i in found)
        most = 1.0 if most > 0.5 else most  # small scores of a hard world are still to be told apart
        ax.set(xlim=(0, 105 * most), xlabel=f"{world.name} {title}, %")
        ax.grid(axis="x", alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylim(len(names) - 0.4, -0.6)
    figure.suptitle("bars: equal steps, with 95 % intervals; diamonds: equal training FLOPs", fontsize=9)
    axes[0].set_yticks(places, names)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
