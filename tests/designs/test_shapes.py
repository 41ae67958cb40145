"""The comparison of designs on the shapes: images of another size, other scores, the same machinery."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from forking import Forks
from PIL import Image

from experiments.designs import running
from experiments.designs.__main__ import main
from experiments.designs.cost import Costs
from experiments.designs.report import interval, write_report
from experiments.designs.running import Row, Runner, plan
from experiments.designs.shapes import image_scores, perfect, shown
from experiments.designs.table import CONFIGS, DESIGNS, SHAPES, WORLDS, chosen, merged, model, recipe
from experiments.shapes import teacher
from unimodal.data.shapes import BACKGROUND, COLOURS, recognise
from unimodal.evaluation.shapes import GenEvalShapes

NAMES = [design.name for design in DESIGNS]
FEW = merged(
    SHAPES.budget,
    {
        **model(backbone={"width": 16, "depth": 1, "heads": 2, "kv_heads": 2, "mlp_width": 24}),
        "data": {
            "class_path": "unimodal.data.ShapesData",
            "init_args": {
                **SHAPES.budget["data"]["init_args"], "batch_tokens": 640, "validation_documents": 2, "prompts": 1,
            },
        },
    },
)  # fmt: skip
TINY = replace(SHAPES, budget=FEW, scoring=(*SHAPES.scoring, "--per-task", "2", "--samples", "2", "--count", "4"))


# --- what is trained


def settings(name: str) -> dict[str, Any]:
    found: dict[str, Any] = recipe(chosen([name])[0], SHAPES, {})["model"]["init_args"]["model"]
    return found


@pytest.mark.parametrize("name", NAMES)
def test_an_image_has_as_many_tokens_in_every_design(name: str) -> None:
    own = settings(name)
    tokenizer = own["tokenizer"]["init_args"]
    side = SHAPES.image // SHAPES.patch
    assert own["sequence"]["image_sizes"] == [[32, 32]]
    if "patch" in tokenizer:
        assert tokenizer == {"patch": 4, "colours": 3}
    elif "channels" in tokenizer:
        assert SHAPES.image // 2 ** (len(tokenizer["channels"]) - 1) // tokenizer.get("space_to_depth", 1) == side
        assert tokenizer.get("scales", [side])[-1] == side  # the finest, where there are several
    else:
        assert (tokenizer["options"]["img_size"], tokenizer["options"]["patch_size"]) == (32, 4)
    if "vision" in own:
        seen = own["vision"]["init_args"]["settings"]
        assert (seen["img_size"], seen["patch_size"]) == (32, 4)


def test_a_tokenizer_is_what_its_recipe_trains() -> None:
    for design in DESIGNS:
        name = SHAPES.tokenizer(design)
        if name is not None:
            trained = yaml.safe_load((CONFIGS / "tokenizers" / f"{name}.yaml").read_text())
            assert settings(design.name)["tokenizer"] == trained["model"]["init_args"]["tokenizer"]
    assert {SHAPES.tokenizer(design) for design in DESIGNS} == {
        None, "shapes_vq", "shapes_diffused", "shapes_multiscale",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["vargpt", "metaquery"])
def test_a_design_builds_and_its_cost_is_counted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experiments.designs.cost.PACKS", 1)
    run = plan(chosen([name])[0], TINY, 0, 11, Costs())
    assert run.steps == 11
    assert all(stage.cost.flops > 0 and stage.cost.tokens <= 640 for stage in run.stages)
    if run.design.first:
        assert run.stages[0].config["data"]["init_args"]["mixture"] == {
            **SHAPES.budget["data"]["init_args"]["mixture"], "text_to_image": 0.0,
        }  # fmt: skip


def test_the_teacher_is_what_the_recipe_says_and_names_what_it_sees() -> None:
    trained = yaml.safe_load((CONFIGS / "tokenizers" / "shapes_diffused.yaml").read_text())
    encoder = trained["model"]["init_args"]["tokenizer"]["init_args"]
    assert (encoder["encoder"], encoder["options"]) == (teacher.NAME, teacher.OPTIONS)
    images, there = teacher.scenes("train", 8)
    assert images.shape == (8, 3, 32, 32)
    for image, (shape, colour) in zip(images, there, strict=True):
        picture = Image.fromarray(((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())
        seen = {(found.label, found.colour) for found in recognise(picture)}
        named = {(teacher.SHAPE[s], teacher.COLOUR[c]) for s, c in zip(shape.tolist(), colour.tolist(), strict=True)}
        assert named == seen | {("background", "background")}
        patches = np.asarray(picture).reshape(8, 4, 8, 4, 3).swapaxes(1, 2).reshape(64, 16, 3)
        for patch, c in zip(patches, colour.tolist(), strict=True):
            if (patch == patch[0]).all():  # of one colour, so it is known which
                assert tuple(patch[0]) == tuple({**COLOURS, "background": BACKGROUND}[teacher.COLOUR[c]])
    network, share = teacher.train(2, batch=2, count=4)
    assert 0 <= share <= 1
    assert not network.training


# --- how it is scored


def test_images_are_compared_with_perfect_ones_of_the_same_prompts() -> None:
    benchmark = GenEvalShapes(per_task=2, samples=2)
    same = image_scores(perfect(benchmark, 0), benchmark)
    assert same["frechet"] == pytest.approx(0, abs=1e-9)
    assert same["recall"] == 1.0
    unseen = image_scores(perfect(benchmark, 1), benchmark)
    assert unseen["frechet"] == unseen["frechet_real"] == same["frechet_real"] > 0
    blank = image_scores([Image.new("RGB", (32, 32))] * 24, benchmark)
    assert blank["frechet"] > unseen["frechet"]
    assert blank["recall"] == 0.0


def test_ten_prompts_are_shown_of_every_task() -> None:
    for benchmark in (GenEvalShapes(), GenEvalShapes(per_task=2)):
        items = shown(benchmark)
        assert len({item.id for item in items}) == 10
        assert len({item.task for item in items}) >= 5
    assert len(set(SHAPES.prompts)) == 10


def row(name: str, value: float, at: str) -> Row:
    found: Row = {"name": name, "seed": 0, "at": at, "world": "shapes", "samples": "samples.png", "machine": "one"}
    for score in SHAPES.scores:
        found |= {score: value, f"{score}_interval": [value - 0.02, value + 0.03]}
    costs = ("optimizer_steps", "documents", "flops", "tokens", "parameters", "learning", "seconds_an_image")
    return found | dict.fromkeys((*costs, "train_seconds", *SHAPES.noted), 0.25)


def test_the_report_has_the_scores_of_the_world(tmp_path: Path) -> None:
    rows = [row(name, 0.05, at) for name in ("bagel", "janus") for at in ("steps", "flops")]
    Image.new("RGB", (4 * 36 + 4, 10 * 36 + 4)).save(tmp_path / "samples.png")
    write_report(rows, SHAPES, tmp_path)
    text = (tmp_path / "shapes" / "report.md").read_text()
    for said in ("geneval shapes", "shapes questions", "Frechet (pixels192)", "0.250", "5.0 (3.0 to 8.0)", "circle"):
        assert said in text, said
    for not_here in ("asked digit", "copies"):
        assert not_here not in text
    with Image.open(tmp_path / "shapes" / "gallery.png") as gallery:
        assert gallery.height == 2 * (36 + 3)


def test_of_one_seed_an_interval_is_what_scoring_found() -> None:
    found = interval([row("bagel", 0.05, "steps")], "geneval_shapes", 178)
    assert (found.low, found.high) == (0.05 - 0.02, 0.05 + 0.03)


def test_one_command_is_of_both_worlds_and_the_quick_one_of_digits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("experiments.designs.__main__.DESIGNS", chosen(["flow-dense"]))
    for options, planned in (
        ([], ["flow-dense-0-1200", "flow-dense-1-1200", "flow-dense-2-1200", "flow-dense-0-1200"]),
        (["--quick"], ["flow-dense-0-1200"]),
        (["--world", "shapes", "--steps", "9", "--seeds", "2"], ["flow-dense-0-9", "flow-dense-1-9"]),
    ):
        assert main(["--out", str(tmp_path / "out"), "--plan", *options]) == 0
        said = capsys.readouterr().out
        assert [line.split()[0] for line in said.splitlines() if line.startswith("flow-dense")] == planned
        assert [world for world in WORLDS if f"\n{world} " in said] == (
            ["digits", "shapes"] if not options else ["digits" if "--quick" in options else "shapes"]
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_design_from_beginning_to_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real commands on a model made tiny; given again, nothing is done but the report."""
    monkeypatch.setattr(running, "can_compile", lambda: (False, "not in tests"))
    quick = model(generator={"init_args": {"sampling": {"steps": 2}}})
    world = replace(TINY, budget=merged(TINY.budget, quick), step_flops=1e15)
    monkeypatch.setattr("experiments.designs.__main__.DESIGNS", chosen(["flow-dense"]))
    monkeypatch.setitem(WORLDS, "shapes", world)
    out = tmp_path / "out"
    command = ["--world", "shapes", "--out", str(out), "--only", "flow-dense", "--steps", "3"]
    with Forks("unimodal.training.lightning_cli", "experiments.designs.shapes", "experiments.designs.seconds") as forks:
        monkeypatch.setattr(Runner, "_call", lambda _, command, log: forks.check(command, log))
        assert main(command) == 0
    rows = json.loads((out / "shapes" / "rows.json").read_text())
    assert [(row["at"], row["world"], row["seed"]) for row in rows] == [("flops", "shapes", 0), ("steps", "shapes", 0)]
    assert all(set(SHAPES.scores) | set(SHAPES.noted) <= set(row) for row in rows)
    with Image.open(out / rows[0]["samples"]) as sheet:
        assert np.asarray(sheet).shape == (10 * 36 + 4, 2 * 36 + 4, 3)  # two draws a prompt
    monkeypatch.setattr(Runner, "_call", lambda *_: pytest.fail("done already"))
    assert main(command) == 0
    assert json.loads((out / "shapes" / "rows.json").read_text()) == rows
