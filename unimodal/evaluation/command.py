"""`unimodal evaluate NAME`: options from the benchmark's class, then generate and score."""

from __future__ import annotations

import json
from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentError, ArgumentParser

from unimodal import processes
from unimodal.decoding_settings import DecodingSettings
from unimodal.environment import usable_device
from unimodal.evaluation.answers import AnswerFolder, read_record
from unimodal.evaluation.benchmark import Benchmark
from unimodal.evaluation.fingerprint import items_sha256, model_record, sampling_record
from unimodal.evaluation.harness import Choice, generate, report, score
from unimodal.evaluation.image_sets import ImageSets, evaluate_folder
from unimodal.evaluation.reconstruction import ImageReconstruction
from unimodal.evaluation.registry import benchmark_class
from unimodal.evaluation.results import Summary, print_summary
from unimodal.export import one_line, open_model
from unimodal.files import write_atomically
from unimodal.model import UnifiedModel
from unimodal.sampling import overridden

SAMPLER = ("guidance", "image_guidance", "steps", "solver", "shift", "temperature", "top_k", "top_p", "set", "negative")
"""Options of how a model draws."""


@dataclass(frozen=True)
class Options:
    """What every benchmark's command takes.

    Args:
        out: folder for answers/, results.jsonl, summary.json, summary.md and index.html.
        run: run folder, or an export, of the model that answers.
        images: folder of answers by another model, in the same layout; nothing is generated.
        weights: averaged, or of the last step.
        seed: of every answer's draws, together with the item and the answer's number.
        batch: answers at once; changes no score.
        device: cpu, cuda, cuda:1 ...
        compile: whether the network is compiled first, which pays for many answers.
        part: K/N: this process generates the K-th of N shares and scores only when there is one share.
        tasks: these tasks alone.
        limit: most items a task; the result is labelled PARTIAL.
        score: whether answers are scored when they are there.
        self_test: whether the judge is tested on known images, and nothing else done.
        guidance: of images; 1 is conditional.
        image_guidance: the same of the prompt's images.
        steps: network evaluations an image.
        solver: as its generator has it: euler, heun, ddim, or a scheduler of diffusers by class name.
        shift: of the sampler's times.
        temperature: of image tokens.
        top_k: of image tokens.
        top_p: of image tokens.
        set: NAME=VALUE, any other setting of the recipe's image sampler.
        negative: words to be led away from, by guidance of images.
    """

    out: Path | None = None
    run: Path | None = None
    images: Path | None = None
    weights: Literal["ema", "raw"] = "ema"
    seed: int = 0
    batch: int = 32
    device: str = "auto"
    compile: bool = False
    part: str = "1/1"
    tasks: list[str] | None = None
    limit: int | None = None
    score: bool = True
    self_test: bool = False
    guidance: float | None = None
    image_guidance: float | None = None
    steps: int | None = None
    solver: str | None = None
    shift: float | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    set: list[str] | None = None
    negative: str | None = None

    def choice(self) -> Choice:
        """Which items."""
        k, _, n = self.part.partition("/")
        if not (k.isdigit() and n.isdigit()):
            raise ValueError(f"--part: expected K/N such as 1/4, got {self.part}")
        return Choice(tuple(self.tasks or ()), self.limit, (int(k), int(n)))

    def drawing(self) -> list[str]:
        """Those that say how a model draws, as they are typed."""
        return [f"--{name.replace('_', '-')}" for name in SAMPLER if getattr(self, name) is not None]

    def answering(self) -> list[str]:
        """Those that mean something only where a model answers, as they are typed."""
        changed = {
            "--compile": self.compile, "--weights": self.weights != "ema", "--seed": self.seed != 0,
            "--part": self.part != "1/1", "--no-score": not self.score,
        }  # fmt: skip
        return [*self.drawing(), *(option for option, given in changed.items() if given)]

    def settings(self, benchmark: Benchmark, model: UnifiedModel) -> DecodingSettings:
        """The benchmark's, with the recipe's image sampler, changed where asked."""
        settings = benchmark.settings(overridden(model.generator.sampling, vars(self)))
        return settings if self.negative is None else replace(settings, negative=self.negative)


@dataclass(frozen=True)
class ReconstructionOptions:
    """Those of `Options` that mean something where a tokenizer is measured and no model answers.

    Args:
        out: folder for originals/, reconstructions/, results.jsonl, summary.json, summary.md and index.html.
        images: folder of images to reconstruct.
        weights: of the tokenizer, averaged, or of the last step.
        batch: images at once; changes no score.
        device: cpu, cuda, cuda:1 ...
    """

    out: Path | None = None
    images: Path | None = None
    weights: Literal["ema", "raw"] = "ema"
    batch: int = 32
    device: str = "auto"


class _Parser(ArgumentParser):
    def error(self, message: str, ex: Exception | None = None) -> Any:
        said, missing, names = one_line(message).partition("the following arguments are required: ")
        if missing:  # options are named as keys there, not as they are typed
            options = (
                f"--{name.replace('_', '-')}" if f"--{name}" in self.format_usage() else name
                for name in names.split(", ")
            )
            raise ValueError(f"{', '.join(options)}: expected a value, got none") from ex
        raise ValueError(said) from ex


def main(arguments: Sequence[str]) -> int:
    """Run `unimodal evaluate` with everything behind that word."""
    name, *rest = arguments
    other = {"statistics": statistics, "compare": compare, "published": published}
    if name in other:
        return other[name](rest) if processes.current().alone() else 0
    benchmark, options = parse(name, rest)
    if options.self_test:
        if not processes.current().alone():
            return 0
        benchmark.self_test()
        print(f"{name}: the self-test came out right")
        return 0
    summary = evaluate(benchmark, options)
    if summary is not None:
        print_summary(summary)
        print(f"{options.out}/index.html shows every answer")
    return 0


def parse(name: str, arguments: Sequence[str]) -> tuple[Benchmark, Options]:
    """The benchmark and the common options of a command line."""
    cls = benchmark_class(name)
    common: type[Options | ReconstructionOptions] = Options
    if issubclass(cls, ImageReconstruction):
        common = ReconstructionOptions
        _refuse_others(arguments, common.__dataclass_fields__)
    parser = _Parser(f"unimodal evaluate {name}", exit_on_error=False)
    parser.add_class_arguments(common, None, help="every benchmark's options")
    # The device is one for the model and the judge; --seed is of the answers, what is asked stays the same.
    parser.add_class_arguments(cls, None, skip={"device", "seed"}, help=f"options of {name}")
    switches = [k for c in (Options, cls) for k, kind in c.__init__.__annotations__.items() if kind in (bool, "bool")]
    try:
        parsed = parser.parse_args(spelt(arguments, switches))
    except ArgumentError as error:
        raise ValueError(f"evaluate {name}: {one_line(str(error))}") from error
    values = parsed.as_dict()
    options = Options(**{key: values.pop(key) for key in common.__dataclass_fields__})
    if "device" in cls.__init__.__annotations__:
        values["device"] = options.device
    if "cache" in values and values["cache"] is None and options.out is not None:
        values["cache"] = options.out / "judge_cache.jsonl"  # beside the scores that it belongs to
    return cls(**values), options


def _refuse_others(arguments: Sequence[str], known: Container[str]) -> None:
    """ValueError naming the options of a model's answers, where there is no model."""
    typed = [argument.partition("=")[0] for argument in arguments if argument.startswith("--")]
    names = {option: option[2:].replace("-", "_").removeprefix("no_") for option in typed}
    if others := [
        option for option, name in names.items() if name in Options.__dataclass_fields__ and name not in known
    ]:
        raise ValueError(
            f"{', '.join(others)}: a folder of images is reconstructed by a tokenizer alone, expected none"
        )


def spelt(arguments: Sequence[str], switches: Sequence[str]) -> list[str]:
    """As the parser has them: --top-k is --top_k, --compile --compile=true, --no-score --score=false, a,b is [a,b]."""
    found: list[str] = []
    for argument in arguments:
        if found[-1:] in (["--tasks"], ["--metrics"]) and not argument.startswith("["):
            argument = f"[{argument}]"  # a,b is a list as well
        if argument.startswith("--"):
            option, equals, value = argument[2:].partition("=")
            option = option.replace("-", "_")
            if not equals and option in switches:
                argument = f"--{option}=true"
            elif not equals and option.removeprefix("no_") in switches:
                argument = f"--{option.removeprefix('no_')}=false"
            else:
                argument = f"--{option}{equals}{value}"
        found.append(argument)
    return found


def statistics(arguments: Sequence[str]) -> int:
    """`unimodal evaluate statistics`: the reference of a folder of images as an .npz that --reference reads."""
    from unimodal.evaluation.image_sets import save_statistics

    parser = _Parser("unimodal evaluate statistics", exit_on_error=False)
    parser.add_function_arguments(save_statistics)
    parsed = parser.parse_args(spelt(arguments, ["keep_features"]))
    save_statistics(**parsed.as_dict())
    print(f"statistics in {parsed.out}")
    return 0


def compare(arguments: Sequence[str]) -> int:
    """`unimodal evaluate compare A B`: is B better than A on the same items?"""
    from unimodal.evaluation.compare import compare as compared

    parser = _Parser("unimodal evaluate compare", exit_on_error=False)
    parser.add_argument("a", type=Path, help="results, the ones that are improved upon")
    parser.add_argument("b", type=Path, help="results of the same benchmark")
    parser.add_argument("--out", type=Path, help="folder for comparison.md and comparison.json")
    parser.add_argument("--force", action="store_true", help="compare what was not asked or judged alike")
    parsed = parser.parse_args(list(arguments))
    if parsed.out is not None and parsed.out.exists() and not parsed.out.is_dir():
        raise ValueError(f"--out: expected a folder, got the file {parsed.out}")
    comparison = compared(parsed.a, parsed.b, parsed.force)
    print(comparison.to_markdown())
    if parsed.out is not None:
        write_atomically(parsed.out / "comparison.md", comparison.to_markdown().encode())
        write_atomically(parsed.out / "comparison.json", (json.dumps(comparison.to_json(), indent=2) + "\n").encode())
    return 0


def published(arguments: Sequence[str]) -> int:
    """`unimodal evaluate published geneval [RESULTS ...]`: scores in print with their sources, below one's own."""
    from unimodal.evaluation.geneval import official_table, read_own

    parser = _Parser("unimodal evaluate published", exit_on_error=False)
    parser.add_argument("name", choices=["geneval"], help="benchmark")
    parser.add_argument("results", nargs="*", type=Path, help="results of one's own: folders, or official result files")
    print(official_table([read_own(path) for path in parser.parse_args(list(arguments)).results]))
    return 0


def evaluate(benchmark: Benchmark, options: Options) -> Summary | None:
    """Generate where a model is given, score where that is asked; None when nothing was scored, or elsewhere."""
    if options.out is None:
        raise ValueError("--out: expected a folder for the results, got none")
    if isinstance(benchmark, ImageReconstruction) and options.images is None:
        raise ValueError("--images: expected a folder of images to reconstruct, got none")
    if (options.run is None) == (options.images is None):
        raise ValueError(f"--run or --images: expected one of them, got {'neither' if options.run is None else 'both'}")
    if options.batch < 1:
        raise ValueError(f"--batch: expected at least 1, got {options.batch}")
    if options.out.exists() and not options.out.is_dir():
        raise ValueError(f"--out: expected a folder, got the file {options.out}")
    if options.images is not None and not options.images.is_dir():
        raise ValueError(f"--images: expected a folder, got {options.images}, which does not exist")
    drawing, answering = options.drawing(), options.answering()
    if options.images is not None and answering and not isinstance(benchmark, ImageReconstruction):
        raise ValueError(f"{', '.join(answering)}: expected none with --images, for which nothing is drawn")
    if drawing and benchmark.settings(None).max_images == 0:
        raise ValueError(f"{', '.join(drawing)}: expected none with {benchmark.name}, for which nothing is drawn")
    choice, here = options.choice(), processes.current()
    usable_device(here.device(options.device))
    if options.run is None and not here.alone():  # scoring is the work of one
        return None
    if isinstance(benchmark, ImageSets | ImageReconstruction) and options.images is not None:
        for name, given in (("tasks", options.tasks), ("limit", options.limit)):
            if given:
                raise ValueError(f"--{name}: a folder of images is scored as a whole, expected none")
        if isinstance(benchmark, ImageReconstruction):
            return benchmark.measure(options.images, options.out, options.batch, options.weights)
        if not benchmark.has_layout(options.images):
            return evaluate_folder(benchmark, options.images, options.out)
    if options.score and choice.part[1] == 1:
        benchmark.prepare()
    items = choice.of(benchmark.items())
    folder = AnswerFolder(options.images or options.out / "answers", benchmark.draws, benchmark.samples)
    if options.run is not None:
        model = open_model(options.run, options.weights, here.device(options.device), options.compile)
        settings = options.settings(benchmark, model)
        record = {
            "benchmark": benchmark.name,
            "version": benchmark.version,
            "model": model_record(options.run, options.weights),
            "sampling": sampling_record(settings),
            "seed": options.seed,
            "items_sha256": items_sha256(list(benchmark.items())),
        }
        benchmark.answer(model, [], settings, [])  # refuses settings before anything is written
        if here.main:
            folder.check_record(record)
        generate(
            benchmark, items, folder, model,
            settings=settings, seed=options.seed, batch=options.batch, part=choice.part,
        )  # fmt: skip
    if not options.score or choice.part[1] > 1 or not here.alone():
        return None
    check_asked(benchmark, folder.root)
    rows = score(benchmark, items, folder, options.batch)
    if not rows:
        raise ValueError(f"--images: {folder.root} holds no answer to {benchmark.name}")
    measures = None
    if isinstance(benchmark, ImageSets) and len(rows) == len(benchmark.items()) * benchmark.samples:
        measures = benchmark.set_measures([folder.root / row["files"][0] for row in rows], folder.root)
        rows = benchmark.verdicts(rows)
    return report(benchmark, rows, options.out, folder.root, provenance(folder.root), measures)


def check_asked(benchmark: Benchmark, answers: Path) -> None:
    """ValueError where a folder says that its answers are to something else."""
    record = read_record(answers) or {}
    asked = {
        "benchmark": benchmark.name, "version": benchmark.version, "items_sha256": items_sha256(list(benchmark.items()))
    }  # fmt: skip
    for key, value in asked.items():
        if record and record.get(key) != value:
            raise ValueError(f"--images: {answers} holds answers to {key} {record.get(key)}, expected {value}")


def provenance(answers: Path) -> dict[str, Any]:
    """Who made a folder of answers, as far as it says."""
    record = read_record(answers) or {}
    return {key: record.get(key) for key in ("model", "sampling", "seed")}
