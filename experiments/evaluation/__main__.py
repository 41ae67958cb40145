"""The evaluation demo: what digits and shapes recipes can be asked without weights or files of others, and one page.

Runs that are there already (`make demo`, `make shapes`) are scored. Where one is missing, its recipe (and the tokenizer
that it names) is trained for a few steps instead, and page and table say so: what it scores shows the machinery, not the
recipe.
"""

import argparse
import json
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from jinja2 import Environment, StrictUndefined
from PIL import Image

from unimodal.cli import main as unimodal
from unimodal.data.digits import caption, digit_images
from unimodal.data.shapes import ShapesSource, render_prompt
from unimodal.data.shapes import render as render_scene
from unimodal.documents import Part
from unimodal.environment import can_compile, choose_precision
from unimodal.evaluation.answers import AnswerFolder
from unimodal.evaluation.reconstruction import reconstruct
from unimodal.evaluation.shapes import GenEvalShapes
from unimodal.export import load_run
from unimodal.files import write_atomically
from unimodal.images import png_bytes

CONFIGS = Path("lightning_configs")
TOKENIZERS = {"shapes_mot_flow": "shapes_kl"}
"""Recipes whose images are tokens of a trained tokenizer: the recipe of that."""


@dataclass(frozen=True)
class Run:
    """A trained model.

    Attributes:
        name: which recipe.
        folder: its run folder.
        note: what is to be known about it.
    """

    name: str
    folder: Path
    note: str


@dataclass(frozen=True)
class Size:
    """How much is asked: of the demo little, of the recipe's own results all."""

    per_task: int
    samples: int
    count: int
    documents: int
    images: int
    compile: bool = False  # pays for many answers


DEMO = Size(per_task=8, samples=1, count=40, documents=12, images=200)
FULL = Size(per_task=50, samples=4, count=500, documents=100, images=1000, compile=True)
_AT_ONCE = 100  # images that are encoded together


@dataclass(frozen=True)
class Scored:
    """One line of the page."""

    subject: str
    name: str
    summary: dict[str, Any]
    link: str
    seconds: float


def main(argv: list[str] | None = None) -> int:
    """Train what is missing, score everything, write the page."""
    parser = argparse.ArgumentParser("python -m experiments.evaluation", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for results and index.html")
    parser.add_argument("--digits", type=Path, default=Path("out/demo/run"), help="run of digits_mot_flow")
    parser.add_argument("--shapes", type=Path, default=Path("out/shapes/run"), help="run of shapes_mot_flow")
    parser.add_argument("--steps", type=int, default=20, help="training steps of a recipe without a run (20)")
    parser.add_argument("--only", choices=("digits", "shapes"), help="one of the two")
    parser.add_argument("--full", action="store_true", help="train what is missing in full, and ask all prompts")
    args = parser.parse_args(argv)
    started, size, steps = time.monotonic(), FULL if args.full else DEMO, None if args.full else args.steps
    lines: list[Scored] = []
    notes: list[str] = []
    if args.only != "digits":
        run = ready("shapes_mot_flow", args.shapes, args.out, steps)
        notes.append(f"{run.name}: {run.note}.")
        lines += shapes(run, args.out / "shapes", size)
    if args.only != "shapes":
        run = ready("digits_mot_flow", args.digits, args.out, steps)
        notes.append(f"{run.name}: {run.note}.")
        lines += digits(run, args.out / "digits", size)
    page(args.out, lines, notes, time.monotonic() - started)
    print(f"done in {time.monotonic() - started:.0f} s: open {args.out / 'index.html'}")
    return 0


def ready(recipe: str, folder: Path, out: Path, steps: int | None) -> Run:
    """The run in `folder`; where there is none, one of few steps in `out`, or (steps None) the whole recipe in `folder`."""
    if steps is None and not (folder / "export").is_dir():
        train("models", recipe, folder, tokens(recipe, folder.parent, out, steps))
    if (folder / "export").is_dir():
        return Run(recipe, folder, how_trained(recipe, folder))
    short = out / f"{recipe}_{steps}_steps"
    if not (short / "export").is_dir():
        few = ["--data.validation_documents", "8", "--data.prompts", "2"]
        train("models", recipe, short, [*tokens(recipe, folder.parent, out, steps), *few], steps)
    return Run(recipe, short, f"trained for {steps} steps only: no run in {folder}")


def how_trained(recipe: str, folder: Path) -> str:
    """What a run that was found says of itself; ends the demo when it is of something else."""
    path = folder / "run.json"
    said = json.loads(path.read_text()) if path.is_file() else {}
    if said.get("recipe") != recipe:
        sys.exit(
            f"{folder}: expected a run of {recipe}, got one of {said.get('recipe', 'nothing that run.json names')}"
        )
    whole = yaml.safe_load((CONFIGS / "models" / f"{recipe}.yaml").read_text())["trainer"]["max_steps"]
    return "trained in full" if said["steps"] >= whole else f"trained for {said['steps']} of {whole} steps"


def tokens(recipe: str, home: Path, out: Path, steps: int | None) -> list[str]:
    """Options that name a recipe's tokenizer: trained in full in `home`, else for few steps in `out`."""
    if recipe not in TOKENIZERS:
        return []
    name = TOKENIZERS[recipe]
    folder = home / name
    if steps is not None and not (folder / "export").is_dir():
        folder = out / f"{name}_{steps}_steps"
    if not (folder / "export").is_dir():
        train("tokenizers", name, folder, [], steps)
    return ["--model.tokenizer_weights", str(folder / "export")]


def train(kind: str, recipe: str, folder: Path, options: list[str], steps: int | None = None) -> None:
    """The recipe as this machine trains it best, in full or for a few steps, which do not pay for compiling."""
    precision, _ = choose_precision()
    settings = ["--trainer.default_root_dir", str(folder), "--trainer.precision", precision]
    if steps is not None:
        settings += ["--trainer.max_steps", str(steps), "--trainer.val_check_interval", str(steps)]
    elif kind == "models":
        settings += ["--model.compile", str(can_compile()[0]).lower()]
    command(["fit", "-c", str(CONFIGS / kind / f"{recipe}.yaml"), *settings, *options])


def shapes(run: Run, out: Path, size: Size) -> list[Scored]:
    """All that the shapes world can score, a perfect renderer beside the model, and whether guidance matters.

    The same perfect images through the model's tokenizer say what no model of these tokens can exceed.
    """
    prompts = ["--per-task", str(size.per_task), "--samples", str(size.samples)]
    perfect = GenEvalShapes(size.per_task, size.samples)
    drawn = out / "perfect" / "answers"
    draw_perfectly(perfect, drawn)
    through = out / "tokenizer" / "answers"
    through_tokenizer(run, drawn, through)
    lines = [
        scored("a perfect renderer", "geneval-shapes", out / "perfect", ["--images", str(drawn), *prompts]),
        scored("the same, encoded and decoded", "geneval-shapes", out / "tokenizer", ["--images", str(through), *prompts]),
        scored(run.name, "geneval-shapes", out / "geneval", [*of(run, size), *prompts]),
        scored(
            f"{run.name}, guidance 1", "geneval-shapes", out / "geneval-1",
            [*of(run, size), *prompts, "--guidance", "1"],
        ),
    ]  # fmt: skip
    command(["evaluate", "compare", str(out / "geneval-1"), str(out / "geneval"), "--out", str(out / "guidance")])
    for name in ("shapes-questions", "shapes-captions", "shapes-edits"):
        lines.append(scored(run.name, name, out / name, [*of(run, size), "--count", str(size.count)]))
    lines.append(scored(run.name, "shapes-steps", out / "steps", [*of(run, size), "--count", str(size.documents)]))
    source = ShapesSource("text_to_image", "test", documents=2 * size.images, seed=0)
    documents = [source.document(i, np.random.default_rng(0)) for i in range(len(source))]
    real = [document.images[0] for document in documents[size.images :]]
    lines.append(image_set(run, size, out / "images", [document.text for document in documents[: size.images]], real))
    return lines


def digits(run: Run, out: Path, size: Size) -> list[Scored]:
    """Sums of digits as interleaved documents."""
    prompts = [caption(i % 10) for i in range(size.images)]
    return [
        scored(run.name, "digits-sums", out / "sums", [*of(run, size), "--sums", str(size.documents)]),
        image_set(run, size, out / "images", prompts, digit_images("test").images()),
    ]


def image_set(run: Run, size: Size, out: Path, prompts: list[str], real: list[Image.Image]) -> Scored:
    """Drawn images against unseen real ones, by their pixels: the FID family's formulas, and no FID."""
    write_atomically(out / "prompts.txt", "".join(f"{prompt}\n" for prompt in prompts).encode())
    shutil.rmtree(out / "real", ignore_errors=True)
    for number, image in enumerate(real):
        write_atomically(out / "real" / f"{number:05d}.png", png_bytes(image))
    options = ["--prompts", str(out / "prompts.txt"), "--reference", str(out / "real"), "--metrics", "[pixels]"]
    return scored(run.name, "images", out, [*of(run, size), *options, "--subset-size", "100"])


def of(run: Run, size: Size) -> list[str]:
    """Options that name a run."""
    compiled = ["--compile"] if size.compile and can_compile()[0] else []
    return ["--run", str(run.folder), "--batch", "100", *compiled]


def draw_perfectly(benchmark: GenEvalShapes, root: Path) -> None:
    """Answers that fulfil every prompt, as any model's images would lie on disk; nothing else is left there."""
    shutil.rmtree(root, ignore_errors=True)
    folder = AnswerFolder(root, benchmark.draws, benchmark.samples)
    for number, item in enumerate(benchmark.items()):
        for sample in range(benchmark.samples):
            scene = render_prompt(dict(item.truth), np.random.default_rng((number, sample)), benchmark.size)
            folder.write(item, sample, [Part(render_scene(scene))])


@torch.no_grad()
def through_tokenizer(run: Run, drawn: Path, to: Path) -> None:
    """A folder of answers, each image encoded and decoded."""
    tokenizer = load_run(run.folder).tokenizer.eval()
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(drawn, to)
    files = sorted(to.rglob("*.png"))
    for start in range(0, len(files), _AT_ONCE):
        part = files[start : start + _AT_ONCE]
        pixels = [torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1) for path in part]
        made, _ = reconstruct(tokenizer, pixels)
        for path, image in zip(part, made, strict=True):
            write_atomically(path, png_bytes(Image.fromarray(image.permute(1, 2, 0).numpy())))


def scored(subject: str, name: str, out: Path, options: list[str]) -> Scored:
    """Run one benchmark, afresh: answers of another model are not gone on with."""
    started = time.monotonic()
    if "--run" in options:
        shutil.rmtree(out / "answers", ignore_errors=True)
    command(["evaluate", name, "--out", str(out), *options])
    summary = json.loads((out / "summary.json").read_text())
    return Scored(subject, name, summary, f"{out.parent.name}/{out.name}/index.html", time.monotonic() - started)


def command(arguments: list[str]) -> None:
    """One `unimodal` command; its exit code ends the demo when it is not 0."""
    print(f"\n$ unimodal {' '.join(arguments)}", flush=True)
    code = unimodal(arguments)
    if code:
        sys.exit(code)


def page(out: Path, lines: list[Scored], notes: list[str], seconds: float) -> None:
    """`index.html`, with a link to every gallery, and `summary.json`."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    write_atomically(out / "index.html", template.render(lines=lines, notes=notes, seconds=round(seconds)).encode())
    record = [{"subject": s.subject, "seconds": s.seconds, **s.summary} for s in lines]
    write_atomically(out / "summary.json", (json.dumps(record, indent=2) + "\n").encode())


if __name__ == "__main__":
    sys.exit(main())
