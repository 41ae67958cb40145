"""The page and the terminal table that show a digits run: what was trained, its losses, its samples, its scores."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from PIL import Image
from rich.console import Console
from rich.table import Table

from unimodal.documents import DOCUMENT_CSS, Document, document_html
from unimodal.files import write_atomically
from unimodal.images import image_data_uri

Scores = Mapping[str, Any]


@dataclass(frozen=True)
class RunDescription:
    """What the page says about a run.

    Attributes:
        title: heading.
        summary: one or two sentences: which tokenizer, backbone and generator, on what data.
        recipe: the recipe's YAML as text.
        command: the command that made the run.
        machine: what it ran on.
        asked_digit_aim: aim for the share of asked digits; the flow recipe's is 0.98, the VQ recipe's 0.95.
    """

    title: str = "Handwritten digits"
    summary: str = ""
    recipe: str = ""
    command: str = ""
    machine: str = ""
    asked_digit_aim: float = 0.98


@dataclass(frozen=True)
class ScoreRow:
    """One line of the score table, as text; `met` is None where there is no aim."""

    name: str
    meaning: str
    value: str
    interval: str
    aim: str
    met: bool | None

    @property
    def verdict(self) -> str:
        """The last cell."""
        return {True: "met", False: "not met", None: ""}[self.met]


def score_rows(scores: Scores, description: RunDescription) -> list[ScoreRow]:
    """The score table; KeyError when a score is missing."""

    def share(
        key: str, meaning: str, at_least: float | None = None, at_most: float | None = None, aim: str = ""
    ) -> ScoreRow:
        value = scores[key]
        met = value >= at_least if at_least is not None else value <= at_most if at_most is not None else None
        interval = scores.get(f"{key}_interval")
        ends = f"{100 * interval[0]:.1f} – {100 * interval[1]:.1f}" if interval else ""
        return ScoreRow(key, meaning, f"{100 * value:.1f} %", ends, aim, met)

    def aimed(key: str, meaning: str, at_least: float) -> ScoreRow:
        return share(key, meaning, at_least=at_least, aim=f"≥ {100 * at_least:.0f} %")

    def distance(key: str, meaning: str) -> ScoreRow:
        return ScoreRow(key, meaning, f"{scores[key]:.1f}", "", "", None)

    recall_aim, copies_aim = scores["recall_real"] / 2, scores["copies_real"] + 0.02
    feature = scores["feature"]
    return [
        share("judge_accuracy", "the judge (a support vector machine) on unseen real scans"),
        aimed("asked_digit", "asked for a digit in words, the judge reads that digit", description.asked_digit_aim),
        aimed("image_to_text", "shown an unseen scan, the model names it", 0.96),
        aimed("sums_text", "two unseen scans added, the right number written", 0.90),
        aimed("sums_drawn", "the same sums, the right number drawn", 0.80),
        distance("frechet", f"Fréchet distance to the training scans ({feature}; lower is nearer)"),
        distance("frechet_real", "the same, of unseen real scans"),
        distance("frechet_noise", "the same, of noise"),
        share("precision", "samples that lie among the training scans"),
        share("precision_real", "the same, of unseen real scans"),
        share("precision_noise", "the same, of noise"),
        share("recall", "training scans that lie among the samples", recall_aim, aim=f"≥ {100 * recall_aim:.1f} %"),
        share("recall_real", "the same, of unseen real scans"),
        share("recall_noise", "the same, of noise"),
        share(
            "copies",
            "samples nearer to a training scan than 99 % of unseen scans are",
            at_most=copies_aim,
            aim=f"≤ {100 * copies_aim:.1f} %",
        ),
        share("copies_real", "the same, of other unseen scans"),
    ]


def print_scores(scores: Scores, description: RunDescription | None = None, console: Console | None = None) -> None:
    """Print the score table on the terminal."""
    table = Table(title=f"scores · {_facts_line(scores)}", title_justify="left")
    for heading in ("score", "value", "95 % interval", "aim", ""):
        table.add_column(heading, justify="left" if heading in ("score", "") else "right", no_wrap=True)
    for row in score_rows(scores, description or RunDescription()):
        colour = {True: "green", False: "red", None: ""}[row.met]
        table.add_row(row.name, row.value, row.interval, row.aim, f"[{colour}]{row.verdict}[/]" if colour else "")
    (console or Console()).print(table)


def _facts_line(scores: Scores) -> str:
    facts = [f"{scores['parameters'] / 1e6:.2f} M parameters", f"{scores['samples']} samples", f"seed {scores['seed']}"]
    if scores["train_seconds"] is not None:
        facts.insert(1, f"trained {_duration(scores['train_seconds'])}")
    if scores["guidance"] is not None:
        facts.append(f"guidance {scores['guidance']:g}")
    return " · ".join([*facts, f"{scores['weights']} weights"])


def _duration(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 60} min {whole % 60} s" if whole >= 60 else f"{whole} s"


# ---- loss curves


@dataclass(frozen=True)
class Curve:
    """One logged quantity: optimizer steps and values, as long as each other."""

    steps: tuple[int, ...]
    values: tuple[float, ...]


def read_curves(path: str | Path) -> dict[str, Curve]:
    """The `train/...` and `val/...` columns of a metrics.csv of Lightning's CSVLogger; blank cells are skipped.

    Raises:
        ValueError: the file is missing, has no `step` column, or a cell is no number (named by line).
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"metrics: expected a metrics.csv, got no file at {path}")
    points: dict[str, list[tuple[int, float]]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        names = [name for name in rows.fieldnames or () if name.startswith(("train/", "val/"))]
        if "step" not in (rows.fieldnames or ()):
            raise ValueError(
                f"{path}: expected a column step, got {', '.join(rows.fieldnames or ()) or 'an empty file'}"
            )
        for number, row in enumerate(rows, start=2):
            for name in names:
                if not row[name]:
                    continue
                try:
                    points.setdefault(name, []).append((int(row["step"]), float(row[name])))
                except (TypeError, ValueError):
                    raise ValueError(f"{path}:{number}: {name}: expected a number, got {row[name]!r}") from None
    return {
        name: Curve(tuple(step for step, _ in pairs), tuple(value for _, value in pairs))
        for name, pairs in points.items()
    }


_PANELS = {"loss": "total loss", "text": "text loss", "image": "image loss"}
_COLOURS = {"text_to_image": "#c0392b", "image_to_text": "#2471a3", "sum": "#b9770e", "text": "#1e8449"}
_SPARE_COLOURS = ("#7d3c98", "#117a65", "#6e2c00", "#5d6d7e")


def plot_curves(curves: Mapping[str, Curve]) -> Image.Image | None:
    """Losses over optimizer steps, a panel each for the total, text and image loss; None when there is none of these.

    Training is grey (faint) with its running mean (dark); validation is one coloured line a kind of document.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    panels = {
        last: {name: curve for name, curve in curves.items() if name.rsplit("/", 1)[1] == last and curve.steps}
        for last in _PANELS
    }
    panels = {last: found for last, found in panels.items() if found}
    if not panels:
        return None
    figure = Figure(figsize=(3.6 * len(panels), 3.1), dpi=110, layout="constrained")
    spare = iter(_SPARE_COLOURS * 4)
    colours = dict(_COLOURS)
    for axes, (last, found) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for name, curve in sorted(found.items()):
            where, *kind = name.split("/")[:-1]
            if where == "train":
                label = "training" if not kind else f"training, {_kind_label(kind)}"
                axes.plot(curve.steps, curve.values, color="#bbbbbb", linewidth=0.7)
                axes.plot(curve.steps, _running_mean(curve.values), color="#333333", linewidth=1.4, label=label)
            else:
                key = "/".join(kind)
                if key not in colours:
                    colours[key] = next(spare)
                label = f"held out, {_kind_label(kind)}" if kind else "held out"
                axes.plot(curve.steps, curve.values, color=colours[key], marker="o", markersize=3, label=label)
        finite = [value for curve in found.values() for value in curve.values if math.isfinite(value)]
        if finite and min(finite) > 0 and max(finite) / min(finite) > 5:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_title(_PANELS[last], fontsize=10)
        axes.set_xlabel("optimizer step", fontsize=9)
        axes.tick_params(labelsize=8, which="both")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=7, frameon=False)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return Image.open(buffer).convert("RGB")


def _kind_label(kind: Sequence[str]) -> str:
    return "/".join(kind).replace("text_to_image", "text → image").replace("image_to_text", "image → text")


def _running_mean(values: Sequence[float], share: float = 0.04) -> list[float]:
    """Mean of the last `share` of all values at each point; no smoothing ahead of time."""
    window = max(1, round(len(values) * share))
    means = []
    for end in range(1, len(values) + 1):
        recent = values[max(0, end - window) : end]
        means.append(sum(recent) / len(recent))
    return means


# ---- the page


def write_page(
    out: str | Path,
    scores: Scores,
    curves: str | Path | None,
    grid: Image.Image,
    sums_documents: Sequence[Document],
    description: RunDescription,
) -> Path:
    """Write `out/index.html`, one file that needs no other and runs no script; return its path.

    Args:
        out: folder.
        scores: what `evaluate_digits` returned.
        curves: the run's metrics.csv, or None.
        grid: samples, a row a digit 0..9.
        sums_documents: sums with what the model added.
        description: of the run.

    Raises:
        ValueError: `curves` cannot be read.
    """
    plot = None if curves is None else plot_curves(read_curves(curves))
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(Path(__file__).with_name("digits_page.html").read_text(encoding="utf-8"))
    page = template.render(
        about=description,
        facts=_facts_line(scores),
        scores=scores,
        rows=score_rows(scores, description),
        plot=None if plot is None else image_data_uri(plot),
        grid=image_data_uri(grid),
        # The grid is enlarged four times already; half as much again is still a whole factor.
        grid_width=grid.width * 3 // 2,
        grid_height=grid.height * 3 // 2,
        sums=[Markup(document_html(document)) for document in sums_documents],  # escaped there
        document_css=Markup(DOCUMENT_CSS),
    )
    path = Path(out) / "index.html"
    write_atomically(path, page.encode("utf-8"))
    return path
