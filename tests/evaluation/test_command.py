"""`unimodal evaluate` from its arguments to its files, and what it says to wrong ones."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from unimodal.cli import main
from unimodal.data.shapes import render, render_prompt
from unimodal.documents import Part
from unimodal.environment import can_compile
from unimodal.evaluation.answers import AnswerFolder, read_record
from unimodal.evaluation.command import parse, spelt
from unimodal.evaluation.registry import BENCHMARKS, benchmark_class
from unimodal.evaluation.shapes import GenEvalShapes
from unimodal.export import ExportInfo, save_export
from unimodal.metrics.features import PixelFeatures
from unimodal.model import UnifiedModel

QUICK = ["--per-task", "2", "--samples", "1", "--steps", "1", "--guidance", "1"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model of 32 x 32 pixels, exported; no weight is zero, so that every condition counts."""
    config = {
        "class_path": "unimodal.model.UnifiedModel",
        "init_args": {
            "tokenizer": {"class_path": "unimodal_tokenizers.PatchTokenizer", "init_args": {"patch": 8}},
            "generator": {"class_path": "unimodal_generators.Flow", "init_args": {}},
            "backbone": {
                "width": 32, "depth": 1, "heads": 2, "kv_heads": 1, "mlp_width": 48, "vocabulary": 300, "positions": "block",
            },
            "sequence": {"image_sizes": [[32, 32]], "context_length": 192, "drop_text": 0.1},
        },
    }  # fmt: skip
    from unimodal.export import build
    from unimodal.text import TextTokenizer

    model = build(config, "model")
    assert isinstance(model, UnifiedModel)
    model.text = TextTokenizer.train(["a photo of a red circle left of two blue squares"], 300)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    folder = tmp_path_factory.mktemp("run") / "export"
    save_export(folder, model, config, ExportInfo("model", "ema", "tiny", "unknown"))
    return folder


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run what must fail with 2 and one line."""

    def check(*args: object, names: str) -> str:
        capsys.readouterr()
        assert main(["evaluate", *map(str, args)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert names in line, line
        return line

    return check


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_has_its_name_and_its_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    cls = benchmark_class(name)
    assert cls.name == name
    with pytest.raises(SystemExit) as end:
        main(["evaluate", name, "--help"])
    assert end.value.code == 0
    assert "--out" in capsys.readouterr().out


def test_the_list_names_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate"]) == 0
    listed = capsys.readouterr().out
    assert all(f"  {name} " in listed for name in BENCHMARKS)


def test_options_are_spelt_as_everywhere() -> None:
    assert spelt(["--top-k", "3", "--compile", "--no-score", "--per-task=4", "x-y"], ["compile", "score"]) == [
        "--top_k", "3", "--compile=true", "--score=false", "--per_task=4", "x-y",
    ]  # fmt: skip
    benchmark, options = parse(
        "geneval-shapes", ["--run", "r", "--out", "o", "--per-task", "3", "--top-p", "0.5", "--no-score"]
    )
    assert isinstance(benchmark, GenEvalShapes)
    assert (benchmark.per_task, benchmark.samples) == (3, 4)
    assert {k: v for k, v in asdict(options).items() if k in ("run", "top_p", "score", "seed")} == {
        "run": Path("r"), "top_p": 0.5, "score": False, "seed": 0,
    }  # fmt: skip


def test_generate_then_score_or_both_at_once(run: Path, tmp_path: Path) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    command = ["evaluate", "geneval-shapes", "--run", str(run), *QUICK]
    assert main([*command, "--out", str(whole)]) == 0
    for part in ("2/2", "1/2"):
        assert main([*command, "--out", str(halves), "--part", part, "--batch", "1"]) == 0
    assert not (halves / "summary.json").exists()
    assert (
        main(["evaluate", "geneval-shapes", "--images", str(halves / "answers"), "--out", str(halves), *QUICK[:4]]) == 0
    )
    assert (halves / "results.jsonl").read_bytes() == (whole / "results.jsonl").read_bytes()
    one, other = (json.loads((folder / "summary.json").read_text()) for folder in (whole, halves))
    assert one == other
    assert one["label"] == "complete"
    assert one["fingerprint"]["model"]["recipe"] == "tiny"
    assert one["fingerprint"]["sampling"]["image"]["steps"] == 1
    assert len(one["fingerprint"]["model"]["sha256"]) == 64


def test_a_folder_of_any_model_is_scored(tmp_path: Path) -> None:
    benchmark = GenEvalShapes(per_task=2, samples=1)
    folder = AnswerFolder(tmp_path / "theirs", True, 1)
    for i, item in enumerate(benchmark.items()):
        folder.write(item, 0, [Part(render(render_prompt(dict(item.truth), np.random.default_rng(i), 32)))])
    command = ["evaluate", "geneval-shapes", "--images", str(tmp_path / "theirs"), "--out", str(tmp_path), *QUICK[:4]]
    assert main(command) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["overall"], summary["label"]) == (1.0, "complete")
    assert summary["fingerprint"]["model"] is None
    (tmp_path / "theirs" / "00003" / "samples" / "00000.png").unlink()
    assert main(command) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["overall"], summary["label"], summary["answers"]) == (None, "PARTIAL", 11)


def test_two_results_are_compared(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in ("0", "1"):
        command = [
            "evaluate",
            "geneval-shapes",
            "--run",
            str(run),
            *QUICK,
            "--seed",
            seed,
            "--out",
            str(tmp_path / seed),
        ]
        assert main(command) == 0
    capsys.readouterr()
    assert main(["evaluate", "compare", str(tmp_path / "0"), str(tmp_path / "1"), "--out", str(tmp_path)]) == 0
    assert "| seed | 0 | 1 |" in capsys.readouterr().out
    assert json.loads((tmp_path / "comparison.json").read_text())["overall"]["items"] == 12


def test_other_settings_do_not_mix_into_a_folder(run: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    command = ["geneval-shapes", "--run", run, *QUICK, "--out", tmp_path / "out"]
    assert main(["evaluate", *map(str, command)]) == 0
    refused(*command, "--seed", "1", names="answers made with seed 0, got 1")
    refused(*command, "--steps", "2", names="sampling.image.steps 1, got 2")


def test_answers_to_something_else_are_not_scored(run: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    command = ["evaluate", "geneval-shapes", "--run", str(run), *QUICK, "--out", str(tmp_path / "out"), "--no-score"]
    assert main(command) == 0
    theirs = ["--images", tmp_path / "out" / "answers", "--out", tmp_path / "scores", "--samples", "1"]
    refused("geneval-shapes", *theirs, "--per-task", "3", names="holds answers to items_sha256")
    refused(
        "shapes-edits", *theirs[:4], "--count", "2", names="answers to benchmark geneval-shapes, expected shapes-edits"
    )


def test_the_demo_asks_what_its_benchmarks_understand(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And leaves a page of all of them; a folder of another size's answers is no hindrance."""
    from experiments.evaluation import __main__ as demo

    asked: list[list[str]] = []
    known = tmp_path / "known"
    assert main(["evaluate", "geneval-shapes", "--run", str(run), *QUICK, "--out", str(known)]) == 0

    def evaluate(arguments: list[str]) -> None:
        asked.append(arguments)
        if arguments[1] != "compare":
            benchmark, options = parse(arguments[1], arguments[2:])
            assert options.out is not None
            options.out.mkdir(parents=True, exist_ok=True)
            shutil.copy(known / "summary.json", options.out)
            assert benchmark.items()

    monkeypatch.setattr(demo, "command", evaluate)
    sizes = demo.Size(2, samples=2, count=2, documents=2, images=14, compile=True), demo.Size(1, 1, 2, 2, 12)
    for size in sizes:
        asked.clear()
        lines = demo.shapes(demo.Run("shapes", run, ""), tmp_path / "shapes", size)
        lines += demo.digits(demo.Run("digits", run, ""), tmp_path / "digits", size)
        able, _ = can_compile()
        assert all(("--compile" in arguments) == (size.compile and able) for arguments in asked if "--run" in arguments)
    for line in lines:
        (tmp_path / line.link).touch()
    assert len(list((tmp_path / "shapes" / "images" / "real").iterdir())) == 12
    demo.page(tmp_path, lines, ["trained <in> full."], 12.3)
    page = (tmp_path / "index.html").read_text()
    links = re.findall('href="([^"]+)"', page)
    assert len(links) == len(lines) > 10
    assert all((tmp_path / link).is_file() for link in links)
    assert "trained &lt;in&gt; full." in page
    assert len(json.loads((tmp_path / "summary.json").read_text())) == len(lines)
    assert {arguments[1] for arguments in asked} == {
        "geneval-shapes", "compare", "shapes-questions", "shapes-captions", "shapes-edits", "shapes-steps", "images",
        "digits-sums",
    }  # fmt: skip
    drawn, through = (sorted((tmp_path / "shapes" / name).rglob("*.png")) for name in ("perfect", "tokenizer"))
    assert len(drawn) == len(through) > 0
    for before, after in zip(drawn, through, strict=True):
        assert Image.open(before).tobytes() == Image.open(after).tobytes()  # patches lose nothing


def test_the_demo_draws_as_many_images_as_its_features_are_wide() -> None:
    """Fewer are refused by the Frechet distance, minutes after the demo began."""
    from experiments.evaluation.__main__ import DEMO, FULL

    assert min(DEMO.images, FULL.images) >= PixelFeatures().width


def test_the_demo_trains_the_tokenizer_that_a_recipe_needs_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from experiments.evaluation import __main__ as demo

    trained: list[list[str]] = []

    def fit(arguments: list[str]) -> None:
        trained.append(arguments)
        folder = Path(arguments[arguments.index("--trainer.default_root_dir") + 1])
        (folder / "export").mkdir(parents=True)
        steps = arguments[arguments.index("--trainer.max_steps") + 1] if "--trainer.max_steps" in arguments else 1900
        (folder / "run.json").write_text(json.dumps({"recipe": Path(arguments[2]).stem, "steps": int(steps)}))

    monkeypatch.setattr(demo, "command", fit)
    recipes = ["lightning_configs/tokenizers/shapes_kl.yaml", "lightning_configs/models/shapes_mot_flow.yaml"]
    folder, out = tmp_path / "shapes" / "run", tmp_path / "out"
    for steps, home in (
        (3, out / "shapes_kl_3_steps"),
        (None, folder.parent / "shapes_kl"),
        (3, folder.parent / "shapes_kl"),
    ):
        trained.clear()
        run = demo.ready("shapes_mot_flow", folder, out, steps)
        assert run.folder == (folder if steps is None else out / "shapes_mot_flow_3_steps")
        new = len(trained) == 2  # the third time the whole tokenizer is there, and the model of few steps is not
        assert [arguments[2] for arguments in trained] == recipes[not new :]
        assert new == (home.name != "shapes_kl" or steps is None)
        model = trained[-1]
        assert model[model.index("--model.tokenizer_weights") + 1] == str(home / "export")
        assert all(("--trainer.max_steps" in arguments) == (steps is not None) for arguments in trained)
        assert run.note == ("trained in full" if steps is None else f"trained for 3 steps only: no run in {folder}")
        trained.clear()
        assert demo.ready("shapes_mot_flow", folder, out, steps) == run
        assert not trained
        shutil.rmtree(run.folder)
    trained.clear()
    fit(["fit", "-c", recipes[1], "--trainer.default_root_dir", str(folder), "--trainer.max_steps", "50"])
    assert demo.ready("shapes_mot_flow", folder, out, 3).note == "trained for 50 of 1900 steps"
    with pytest.raises(SystemExit, match="expected a run of digits_mot_flow, got one of shapes_mot_flow"):
        demo.ready("digits_mot_flow", folder, out, 3)
    trained.clear()
    demo.ready("digits_mot_flow", tmp_path / "digits", tmp_path / "out", 3)
    assert [arguments[2] for arguments in trained] == ["lightning_configs/models/digits_mot_flow.yaml"]


def test_a_set_of_images_is_scored_against_a_folder_and_its_statistics(run: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("real", "fake"):
        (tmp_path / name).mkdir()
        for i in range(40):
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(tmp_path / name / f"{i}.png")
    statistics = ["evaluate", "statistics", "--images", str(tmp_path / "real"), "--out", str(tmp_path / "real.npz")]
    options = ["--network", "pixels", "--pixel-size", "2", "--keep-features", "--workers", "0"]
    assert main([*statistics, *options]) == 0
    values = {}
    for reference in ("real", "real.npz"):
        out = tmp_path / f"out-{reference}"
        command = ["evaluate", "images", "--images", str(tmp_path / "fake"), "--reference", str(tmp_path / reference)]
        command += ["--metrics", "[pixels]", "--pixel-size", "2", "--subset-size", "20", "--workers", "0"]
        assert main([*command, "--out", str(out)]) == 0
        summary = json.loads((out / "summary.json").read_text())
        assert (summary["label"], summary["answers"], summary["overall"]) == ("complete", 40, None)
        values[reference] = {name: measure["value"] for name, measure in summary["measures"].items()}
    assert values["real"] == pytest.approx(values["real.npz"], rel=1e-5)
    assert not any("fid" in name for name in values["real"])
    (tmp_path / "prompts.txt").write_text("".join(f"a red circle {i}\n" for i in range(12)))
    command = ["evaluate", "images", "--run", str(run), "--prompts", str(tmp_path / "prompts.txt"), *QUICK[4:]]
    command += [
        "--reference",
        str(tmp_path / "real"),
        "--metrics",
        "[pixels]",
        "--pixel-size",
        "1",
        "--subset-size",
        "5",
    ]
    assert main([*command, "--workers", "0", "--out", str(tmp_path / "drawn")]) == 0
    drawn = json.loads((tmp_path / "drawn" / "summary.json").read_text())
    assert drawn["answers"] == 12
    assert drawn["measures"].keys() == values["real"].keys() - {"x"} or drawn["measures"]


def test_words_to_be_led_away_from_are_asked_for_and_written_down(
    run: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    def drawn(name: str, *options: str) -> bytes:
        command = ["evaluate", "geneval-shapes", "--run", str(run), "--out", str(tmp_path / name), "--limit", "1"]
        assert main([*command, "--tasks", "counting", "--samples", "1", "--steps", "2", "--no-score", *options]) == 0
        (file,) = (tmp_path / name).rglob("*.png")
        return file.read_bytes()

    plain, away = drawn("plain", "--guidance", "50"), drawn("away", "--guidance", "50", "--negative", "two red squares")
    assert plain != away
    assert drawn("dropped", "--guidance", "50", "--negative", "") == plain
    record = read_record(tmp_path / "away" / "answers")
    assert record is not None
    assert record["sampling"]["negative"] == "two red squares"
    refused("geneval-shapes", "--run", run, "--out", tmp_path / "away", "--guidance", "50", names="sampling")
    others = ["--run", run, "--out", tmp_path / "no", "--negative", "two red squares"]
    refused("geneval-shapes", *others, "--guidance", "1", names="negative: expected none where guidance is 1")
    said = "--negative: expected none with shapes-questions, for which nothing is drawn"
    refused("shapes-questions", *others, names=said)
    assert not (tmp_path / "no").exists()


def test_published_scores_come_with_their_source(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "published", "geneval"]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert all(line.rstrip("| ").rpartition("|")[2].strip() for line in lines[2:])


def test_wrong_arguments_are_one_line(run: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    out = tmp_path / "out"
    shapes = ["geneval-shapes", "--out", out]
    refused("geneval-shape", names="expected one of digits, statistics, compare, published, geneval, ")
    refused(*shapes, names="--run or --images: expected one of them, got neither")
    refused(*shapes, "--run", run, "--images", tmp_path, names="got both")
    refused("geneval-shapes", "--run", run, names="--out: expected")
    refused(*shapes, "--images", tmp_path / "none", names="which does not exist")
    refused(*shapes, "--images", tmp_path, names="holds no answer")
    drawing = ("--guidance", "3", "--top-k", "5", "--compile")
    said = "--guidance, --top-k, --compile: expected none with --images, for which nothing is drawn"
    refused(*shapes, "--images", tmp_path, *drawing, names=said)
    answering = ("--seed", "1", "--weights", "raw", "--part", "1/2", "--no-score")
    said = "--weights, --seed, --part, --no-score: expected none with --images"
    refused(*shapes, "--images", tmp_path, *answering, names=said)
    refused(*shapes, "--run", tmp_path / "none", names="run: expected a folder")
    refused(*shapes, "--run", run, "--part", "2", names="--part: expected K/N such as 1/4, got 2")
    refused(*shapes, "--run", run, "--part", "3/2", names="--part: expected K/N")
    refused(*shapes, "--run", run, "--tasks", "[letters]", names="--tasks: expected some of single_object")
    refused(*shapes, "--run", run, "--batch", "0", names="--batch: expected at least 1")
    refused(*shapes, "--run", run, "--limit", "0", names="--limit: expected at least 1")
    refused(*shapes, "--run", run, "--device", "cud", names="--device: cud cannot be used")
    refused(*shapes, "--images", tmp_path, "--device", "cud", names="--device: cud cannot be used")
    refused(*shapes, "--run", run, "--device", "meta", names="--device: meta cannot be used")
    if not torch.cuda.is_available():
        refused(*shapes, "--run", run, "--device", "cuda", names="--device: cuda cannot be used")
    refused(*shapes, "--run", run, "--size", "16", names="size: expected 32 to 256 pixels, got 16")
    refused(*shapes, "--run", run, "--size", "64", names="size: this recipe draws 32x32, got 64x64")
    refused(*shapes, "--run", run, "--per-tusk", "3", names="per_tusk")
    refused(*shapes, "--run", run, "--samples", "many", names="samples")
    refused("geneval-shapes", "--self-test", names="--self-test: geneval-shapes has none")
    refused("geneval", "--run", run, "--out", out, names="unimodal: --metadata: expected a value, got none")
    refused("compare", names="unimodal: a, b: expected a value, got none")
    refused("images", "--images", tmp_path, "--out", out, names="inception_weights: expected a file of weights")
    refused("compare", tmp_path, tmp_path, names="expected a folder with summary.json")
    refused("published", "fid", names="fid")
    refused("published", "geneval", tmp_path / "none", names="none")
    assert not out.exists() or not list(out.rglob("*.json"))
