"""Scores of a design on the shapes world: drawing by GenEval's rules, answers, how near images are to real ones.

Frechet distance and recall are in the space `pixels192`, the image shrunk to 8 x 8; neither is FID's. Images drawn for the
prompts are compared with what a perfect renderer draws for the same ones. Answers are files: what is there is kept.
"""

import argparse
import html
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from unimodal.data.shapes import render, render_prompt
from unimodal.evaluation.answers import AnswerFolder
from unimodal.evaluation.benchmark import Item
from unimodal.evaluation.command import Options, evaluate
from unimodal.evaluation.digits import sample_grid
from unimodal.evaluation.results import Summary
from unimodal.evaluation.shapes import GenEvalShapes, ShapesBenchmark, ShapesQuestions
from unimodal.files import write_atomically
from unimodal.images import png_bytes
from unimodal.metrics.distances import frechet_distance
from unimodal.metrics.features import PixelFeatures
from unimodal.metrics.manifolds import precision_recall
from unimodal.metrics.moments import Moments

FEATURES = PixelFeatures(8)


@dataclass(frozen=True)
class Settings:
    """How a run is asked; the defaults are those of the benchmarks in full."""

    run: Path
    seed: int = 0
    compile: bool = False
    per_task: int = 50
    samples: int = 4
    count: int = 500


def main(argv: list[str] | None = None) -> int:
    """Ask, score, write `scores.json`, `samples.png` (a row a prompt) and, last, `index.html`."""
    full = Settings(Path())
    parser = argparse.ArgumentParser("python -m experiments.designs.shapes", description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="run folder")
    parser.add_argument("--out", type=Path, required=True, help="folder for scores and answers")
    parser.add_argument("--seed", type=int, default=full.seed, help="of every draw of the model's")
    parser.add_argument("--compile", action="store_true", help="compile the network first")
    parser.add_argument("--per-task", type=int, default=full.per_task, help=f"prompts a task ({full.per_task})")
    parser.add_argument("--samples", type=int, default=full.samples, help=f"images a prompt ({full.samples})")
    parser.add_argument("--count", type=int, default=full.count, help=f"questions ({full.count})")
    given = vars(parser.parse_args(argv))
    out: Path = given.pop("out")
    score(Settings(**given), out)
    return 0


def score(asked: Settings, out: Path) -> dict[str, Any]:
    """What `scores.json` holds, and everything else in `out`."""
    benchmark = GenEvalShapes(asked.per_task, asked.samples)
    drawn = _summary(benchmark, asked, out / "geneval")
    answered = _summary(ShapesQuestions(asked.count), asked, out / "questions")
    folder = AnswerFolder(out / "geneval" / "answers", benchmark.draws, benchmark.samples)
    images = {item.id: [answer.parts[0].image for answer in folder.read(item)] for item in benchmark.items()}
    scores: dict[str, Any] = {}
    for name, summary in (("geneval_shapes", drawn), ("shapes_questions", answered)):
        assert summary.overall is not None  # every answer is there
        scores |= {name: summary.overall.value, f"{name}_interval": summary.overall.interval}
        scores[f"{name}_tasks"] = {task: found.score.value for task, found in summary.tasks.items()}
    scores |= image_scores([image for of in images.values() for image in of], benchmark)
    record = json.loads((asked.run / "run.json").read_text())
    sampling = drawn.fingerprint["sampling"]["image"]
    scores |= {"train_seconds": record["train_seconds"], "guidance": sampling["guidance"], "seed": asked.seed}
    sheet = [image for item in shown(benchmark) for image in images[item.id]]
    grid = sample_grid(sheet, np.repeat(np.arange(len(sheet) // benchmark.samples), benchmark.samples), scale=1)
    write_atomically(out / "samples.png", png_bytes(grid))
    write_atomically(out / "scores.json", (json.dumps(scores, indent=2) + "\n").encode())
    write_atomically(out / "index.html", _page(scores, [prompt(item) for item in shown(benchmark)]).encode())
    return scores


def _summary(benchmark: ShapesBenchmark, asked: Settings, out: Path) -> Summary:
    options = Options(out=out, run=asked.run, seed=asked.seed, compile=asked.compile, batch=100)
    summary = evaluate(benchmark, options)
    assert summary is not None  # scoring is not left out
    return summary


def shown(benchmark: GenEvalShapes) -> list[Item]:
    """Ten prompts, evenly spread over the tasks."""
    items = benchmark.items()
    return [items[number * len(items) // 10] for number in range(10)]


def prompt(item: Item) -> str:
    """What is asked."""
    return item.prompt.parts[0].text


def image_scores(drawn: Sequence[Image.Image], benchmark: GenEvalShapes) -> dict[str, Any]:
    """Frechet distance and recall of images against perfect ones for the same prompts, and of other perfect ones."""
    reference, fake, unseen = (_features(images) for images in (perfect(benchmark, 0), drawn, perfect(benchmark, 1)))
    moments = Moments.of(reference)
    return {
        "frechet": frechet_distance(moments, Moments.of(fake)),
        "frechet_real": frechet_distance(moments, Moments.of(unseen)),
        "recall": precision_recall(reference, fake).recall,
        "recall_real": precision_recall(reference, unseen).recall,
        "feature": FEATURES.name,
        "images": len(fake),
    }


def perfect(benchmark: GenEvalShapes, set_number: Literal[0, 1]) -> list[Image.Image]:
    """What a perfect renderer draws for all prompts, as many images a prompt as a model draws."""
    return [
        render(render_prompt(dict(item.truth), np.random.default_rng((set_number, number, sample)), benchmark.size))
        for number, item in enumerate(benchmark.items())
        for sample in range(benchmark.samples)
    ]


def _features(images: Sequence[Image.Image]) -> np.ndarray:
    """(N, 192) float64."""
    return FEATURES(torch.stack([FEATURES.prepare(image) for image in images])).double().numpy()


def _page(scores: dict[str, Any], prompts: Sequence[str]) -> str:
    lines = [f"<li>{html.escape(text)}</li>" for text in prompts]
    return (
        "<!doctype html><meta charset='utf-8'><title>Shapes</title>"
        "<p><a href='geneval/index.html'>every drawing</a>, <a href='questions/index.html'>every question</a></p>"
        f"<p><img src='samples.png' alt='drawings, a row a prompt'></p><ol>{''.join(lines)}</ol>"
        f"<pre>{html.escape(json.dumps(scores, indent=2))}</pre>\n"
    )


if __name__ == "__main__":
    sys.exit(main())
