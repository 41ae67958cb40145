"""The comparison of designs: equal where it says so, resumable, and it claims no more than its intervals do."""

import json
import os
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forking import Forks
from hypothesis import given as drawn
from hypothesis import strategies as st
from PIL import Image
from scipy import stats

from experiments.designs import running
from experiments.designs.__main__ import main, time_alone
from experiments.designs.__main__ import train as train_all
from experiments.designs.cost import Cost, Costs
from experiments.designs.elsewhere import given, left_over, read_rows
from experiments.designs.gallery import DRAWS, gallery
from experiments.designs.report import interval, orderings, table, verdict, write_report
from experiments.designs.running import Row, Run, Runner, Stage, plan
from experiments.designs.table import CLAIMS, DESIGNS, DIGITS, WORLDS, Design, chosen, merged, model, recipe
from unimodal.evaluation.digits import sample_grid
from unimodal.metrics.shares import wilson_interval

COSTS = Costs()
NAMES = [design.name for design in DESIGNS]
TINY = replace(
    DIGITS,
    budget=merged(
        DIGITS.budget,
        {
            **model(backbone={"width": 16, "depth": 1, "heads": 2, "kv_heads": 2, "mlp_width": 24}),
            "data": {
                "class_path": "unimodal.data.DigitsData",
                "init_args": {"batch_tokens": 256, "validation_documents": 2, "prompts": 1},
            },
        },
    ),
)


# --- what is compared


def test_the_ten_designs_and_their_controls_are_there() -> None:
    ten = {"chameleon", "janus", "transfusion", "bagel", "llamafusion", "show-o", "unifluid", "vargpt", "metamorph"}
    assert ten | {"metaquery"} <= set(NAMES)
    assert len(set(NAMES)) == len(NAMES)
    for claim in CLAIMS:
        assert {claim.better, claim.worse} <= set(NAMES)


def test_changes_are_laid_over() -> None:
    base = {"a": {"b": 1, "c": 2}, "d": {"class_path": "X", "init_args": {"e": 1}}}
    assert merged(base, {"a": {"c": 3}}) == {"a": {"b": 1, "c": 3}, "d": base["d"]}
    assert merged(base, {"a": {"b": None}})["a"] == {"c": 2}
    assert merged(base, {"d": {"init_args": {"f": 2}}})["d"] == {"class_path": "X", "init_args": {"e": 1, "f": 2}}
    assert merged(base, {"d": {"class_path": "Y"}})["d"] == {"class_path": "Y"}
    assert base == {"a": {"b": 1, "c": 2}, "d": {"class_path": "X", "init_args": {"e": 1}}}


def differences(a: Any, b: Any, key: str = "") -> set[str]:
    """Keys in which two recipes differ."""
    if not (isinstance(a, dict) and isinstance(b, dict)):
        return set() if a == b else {key}
    return set().union(*(differences(a.get(k), b.get(k), f"{key}.{k}".lstrip(".")) for k in {*a, *b}))


def holds(settings: Any, budget: Any) -> bool:
    """Whether a recipe has everything that a budget says."""
    if isinstance(budget, dict):
        return isinstance(settings, dict) and all(holds(settings.get(k), v) for k, v in budget.items())
    return bool(settings == budget)


def test_all_designs_have_one_budget() -> None:
    for design in DESIGNS:
        assert holds(recipe(design, DIGITS, {}), DIGITS.budget), design.name
        assert recipe(design, DIGITS, {})["data"] == DIGITS.budget["data"]
        sequence = recipe(design, DIGITS, {})["model"]["init_args"]["model"]["sequence"]
        sequence.pop("context", None)  # how images are read is the design's own
        assert sequence == DIGITS.budget["model"]["init_args"]["model"]["sequence"], design.name


def test_controls_differ_in_what_they_say() -> None:
    recipes = {design.name: recipe(design, DIGITS, {}) for design in DESIGNS}
    inner = "model.init_args.model"

    def keys(a: str, b: str) -> set[str]:
        return differences(recipes[a], recipes[b])

    assert keys("bagel", "flow-dense") == {f"{inner}.backbone.experts"}
    assert keys("flow-dense", "flow-causal") == {f"{inner}.generator.init_args.bidirectional"}
    assert keys("janus", "janus-shared") == {f"{inner}.vision", f"{inner}.sequence.context"}


@pytest.mark.parametrize("name", NAMES)
def test_every_design_builds_and_its_cost_is_counted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experiments.designs.cost.PACKS", 4)
    run = plan(chosen([name])[0], TINY, 0, 11, COSTS)
    assert run.steps == sum(stage.steps for stage in run.stages) == 11
    assert plan(chosen([name])[0], TINY, 7, 11, COSTS).flops == run.flops  # whatever the seed
    assert len(run.stages) == (2 if run.design.first else 1)
    for stage in run.stages:
        assert stage.cost.flops > 0
        assert 0 < stage.cost.learning <= stage.cost.parameters
        assert 128 < stage.cost.tokens <= 256
    if run.design.first:
        assert run.stages[-1].cost.learning < run.stages[-1].cost.parameters  # something is kept
        seeds = [stage.config["seed_everything"] for stage in run.stages]
        assert len(set(seeds)) == 2  # other documents


def test_a_control_costs_what_it_should() -> None:
    runs = {name: plan(chosen([name])[0], TINY, 0, 10, COSTS) for name in ("bagel", "flow-dense", "flow-causal")}
    costs = {name: run.stages[0].cost for name, run in runs.items()}
    assert costs["bagel"].parameters > costs["flow-dense"].parameters == costs["flow-causal"].parameters
    # Active FLOPs are equal: every token is read by one expert.
    assert costs["bagel"].flops == pytest.approx(costs["flow-dense"].flops, rel=0.01)
    assert costs["flow-causal"].flops < costs["flow-dense"].flops  # fewer pairs may see each other


def test_an_unknown_design_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for wrong, said in (
        (["--only", "dalle"], "dalle"), (["--steps", "0"], "--steps"), (["--seeds", "0"], "--seeds"),
        (["--jobs", "0"], "--jobs"),
    ):  # fmt: skip
        with pytest.raises(SystemExit) as end:
            main(["--out", str(tmp_path / "out"), *wrong])
        assert end.value.code == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# --- equal FLOPs


def made(name: str, costs: list[float], steps: list[int]) -> Run:
    names = ["first", "run"][-len(costs) :]
    stages = (
        Stage(stage, {}, n, Cost(flops, 1.0, 1.0, 1, 1)) for stage, flops, n in zip(names, costs, steps, strict=True)
    )
    return Run(Design(name, "none", "none"), DIGITS, 0, tuple(stages))


@drawn(
    st.lists(st.floats(1e8, 1e12), min_size=1, max_size=2), st.lists(st.integers(1, 5000), min_size=2, max_size=2),
    st.floats(0.0, 1.5),
)  # fmt: skip
def test_a_budget_is_spent_and_not_overspent(costs: list[float], steps: list[int], share: float) -> None:
    run = made("x", costs, steps[: len(costs)])
    budget = share * run.flops
    n = run.steps_within(budget)
    last, before = run.stages[-1], run.flops - run.stages[-1].flops
    assert 0 <= n <= last.steps
    if n:
        assert before + n * last.cost.flops <= budget * (1 + 1e-9) + 1e-5 * last.cost.flops
    if n < last.steps:
        assert before + (n + 1) * last.cost.flops > budget * (1 - 1e-9)
    assert run.steps_within(run.flops) == last.steps


# --- runs


class Recorded(Runner):
    """Says what it would do, and leaves what that would leave: scores tell the steps of what was scored."""

    def __init__(self, out: Path) -> None:
        super().__init__(out)
        self.calls: list[list[str]] = []
        self.dies: str | None = None  # when it should do this

    def _call(self, command: list[str], log: Path) -> None:
        self.calls.append(command[3:] if command[2] == "unimodal.cli" else command[2:])
        given = dict(pairwise(command))
        if self.dies in command:
            raise RuntimeError("died")
        if "fit" in command:
            folder = Path(given["--trainer.default_root_dir"])
            (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
            (folder / "checkpoints" / "last.ckpt").touch()
            (folder / "export").mkdir(exist_ok=True)
            steps = int(given.get("--trainer.max_steps", 0))
            (folder / "run.json").write_text(json.dumps({"steps": steps, "train_seconds": 10.0}))
        elif "evaluate" in command:
            out = Path(given["--out"])
            out.mkdir(parents=True, exist_ok=True)
            record = json.loads((Path(given["--run"]) / "run.json").read_text())
            (out / "scores.json").write_text(json.dumps(scores(0.5) | {"guidance": record["steps"]}))
            sheet(out / "samples.png")
            (out / "index.html").touch()
        elif "experiments.designs.seconds" in command:
            Path(given["--out"]).write_text('{"seconds_an_image": 1.0}')
        else:
            Path(given["--out"]).mkdir(parents=True, exist_ok=True)


def done(runner: Recorded, run: Run, flops: float) -> list[Row]:
    """Everything of a run."""
    runner.train(run, flops)
    runner.time(run)
    return runner.rows(run, flops)


def sheet(path: Path) -> None:
    """As `unimodal evaluate digits` leaves one, of ten distinguishable rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [Image.new("RGB", (8, 8), (20 * digit, 0, 10 * draw)) for digit in range(10) for draw in range(10)]
    sample_grid(images, np.repeat(np.arange(10), 10)).save(path)


def scores(value: float) -> Row:
    row: Row = dict.fromkeys(DIGITS.scores, value)
    row |= {f"{name}_interval": [value - 0.1, value + 0.1] for name in DIGITS.scores}
    return row | dict.fromkeys(("frechet", "frechet_real", "recall", "copies", "guidance", "train_seconds"), 1.0)


def test_a_run_is_trained_to_both_points_and_nothing_twice(tmp_path: Path) -> None:
    run, runner = made("bagel", [2.0], [10]), Recorded(tmp_path)
    assert runner.rows(run, 13.0) == []
    rows = done(runner, run, 13.0)
    steps = [call[call.index("--trainer.max_steps") + 1] for call in runner.calls if call[0] == "fit"]
    assert steps == ["6", "10"]
    assert ["--ckpt_path" in call for call in runner.calls if call[0] == "fit"] == [False, True]
    assert [(row["at"], row["optimizer_steps"], row["flops"]) for row in rows] == [
        ("flops", 6, 12.0),
        ("steps", 10, 20.0),
    ]
    assert [row["guidance"] for row in rows] == [6, 10]  # scored at the steps that they say
    runner.calls.clear()
    assert done(runner, run, 13.0) == rows
    assert runner.calls == []


@pytest.mark.parametrize("dies", ["fit", "evaluate", "experiments.designs.seconds"])
def test_a_run_that_died_anywhere_goes_on(tmp_path: Path, dies: str) -> None:
    run, runner = made("bagel", [2.0], [10]), Recorded(tmp_path)
    runner.dies = dies
    with pytest.raises(RuntimeError, match="died"):
        done(runner, run, 13.0)
    assert runner.rows(run, 13.0) == []
    runner.dies = None
    rows = done(runner, run, 13.0)
    assert [row["guidance"] for row in rows] == [6, 10]


def test_what_is_trained_past_a_point_is_not_scored_as_that_point(tmp_path: Path) -> None:
    run, runner = made("bagel", [2.0], [10]), Recorded(tmp_path)
    done(runner, run, 13.0)
    with pytest.raises(RuntimeError, match="is trained for 10 steps, past 5: delete"):
        runner.train(run, 11.0)


def test_another_recipe_does_not_go_on_where_one_stopped(tmp_path: Path) -> None:
    run, runner = made("bagel", [2.0], [10]), Recorded(tmp_path)
    runner.dies = "evaluate"
    with pytest.raises(RuntimeError, match="died"):
        runner.train(run, 13.0)
    changed = replace(run, stages=(replace(run.stages[0], config={"other": 1}),))
    with pytest.raises(RuntimeError, match="no longer what the design says"):
        runner.train(changed, 13.0)
    runner.dies = None
    done(runner, run, 13.0)
    with pytest.raises(RuntimeError, match="no longer what the design says"):  # also where nothing is left to do
        runner.train(changed, 13.0)


def test_runs_of_other_lengths_and_seeds_lie_apart(tmp_path: Path) -> None:
    runner = Recorded(tmp_path)
    runs = [made("bagel", [2.0], [10]), made("bagel", [2.0], [12]), replace(made("bagel", [2.0], [10]), seed=1)]
    assert len({runner.folder(run) for run in runs}) == 3


# --- rows of another machine


def there(tmp_path: Path, run: Run, flops: float) -> list[Row]:
    """Rows as another machine leaves them."""
    rows = done(Recorded(tmp_path / "there"), run, flops)
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    return read_rows([tmp_path / "rows.json"])


def test_rows_are_of_their_own_run_and_of_each_of_its_points(tmp_path: Path) -> None:
    run = made("bagel", [2.0], [10])
    rows = there(tmp_path, run, 13.0)
    runs = [run, replace(run, seed=1), made("janus", [2.0], [10]), made("bagel", [2.0], [12])]
    assert given(rows, runs, 13.0) == {run.name: rows}
    assert given(rows, [replace(run, world=replace(DIGITS, name="others"))], 13.0) == {}
    assert given(rows[:1], runs, 13.0) == {}  # one point of two
    assert left_over(rows, rows[1:]) == ["digits bagel-0-10 at equal flops"]


def test_rows_of_other_settings_are_refused(tmp_path: Path) -> None:
    run = made("x", [2.0, 2.0], [5, 5])
    run = replace(run, design=replace(chosen(["metaquery"])[0], name="x"))
    rows = there(tmp_path, run, 13.0)
    first, last = run.stages
    assert run.design.first is not None
    others = [
        replace(run, stages=(first, replace(last, config={"other": 1}))),
        replace(run, stages=(replace(first, steps=4), replace(last, steps=6))),
        replace(run, design=replace(run.design, first=replace(run.design.first, handed="text"))),
        replace(run, design=replace(run.design, tokenizer="vq")),
        replace(run, world=replace(DIGITS, scoring=("another", "judge"))),
    ]
    for other in others:
        with pytest.raises(ValueError, match="--rows: x-0-10 was trained or scored by other settings than today's"):
            given(rows, [other], 13.0)
    with pytest.raises(ValueError, match="by other settings"):
        given(rows, [run], 15.0)  # other points
    assert given(rows, [run], 13.0) == {run.name: rows}


@pytest.mark.parametrize("wrong", ["", "{}", '[{"name": "bagel"}]', "[1]"])
def test_what_is_no_rows_is_refused(tmp_path: Path, wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows.json").write_text(wrong)
    with pytest.raises(SystemExit) as end:
        main(["--out", str(tmp_path / "out"), "--rows", str(tmp_path / "rows.json")])
    assert end.value.code == 2
    assert f"--rows: {tmp_path / 'rows.json'}: expected a" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_rows_that_come_twice_are_refused(tmp_path: Path) -> None:
    there(tmp_path, made("bagel", [2.0], [10]), 13.0)
    with pytest.raises(ValueError, match="expected one row of digits bagel-0-10 at equal flops, got two"):
        read_rows([tmp_path / "rows.json"] * 2)


def test_what_another_machine_has_done_is_reported_and_not_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole command: one design was done there, another is done here; rows of a third are left out, and said so."""
    monkeypatch.setattr("experiments.designs.__main__.DESIGNS", chosen(["bagel", "flow-dense"]))
    monkeypatch.setattr("experiments.designs.cost.cost", lambda config: Cost(2.0, 1.0, 1.0, 1, 1))
    monkeypatch.setitem(WORLDS, "digits", replace(DIGITS, step_flops=1.3))
    far, out = tmp_path / "there", tmp_path / "here"
    monkeypatch.setattr(Runner, "_call", Recorded(far)._call)
    command = ["--world", "digits", "--steps", "10", "--seeds", "1"]
    assert main([*command, "--out", str(far), "--only", "bagel"]) == 0
    rows = json.loads((far / "digits" / "rows.json").read_text())
    (tmp_path / "rows.json").write_text(json.dumps([*rows, {**rows[0], "seed": 5}]))
    command += ["--out", str(out), "--rows", str(tmp_path / "rows.json")]
    here = Recorded(out)
    monkeypatch.setattr(Runner, "_call", here._call)
    capsys.readouterr()
    assert main([*command, "--plan"]) == 0
    said = capsys.readouterr().out
    assert [line.split()[0] for line in said.splitlines() if line.endswith("done elsewhere")] == ["bagel-0-10"]
    assert "not reported, because it is of no whole run of this call: digits bagel-5-10" in said
    assert here.calls == []
    assert main(command) == 0
    assert all("bagel" not in " ".join(call) for call in here.calls)
    reported = json.loads((out / "digits" / "rows.json").read_text())
    assert [row["name"] for row in reported] == ["bagel"] * 2 + ["flow-dense"] * 2
    assert reported[:2] == rows
    with Image.open(out / "digits" / "gallery.png") as picture:
        assert picture.height == 36 + 3  # the samples of the other are not here


# --- what is known once


def test_what_an_image_takes_is_asked_of_one_seed(tmp_path: Path) -> None:
    runner, runs = Recorded(tmp_path), [replace(made("bagel", [2.0], [10]), seed=seed) for seed in (0, 1)]
    rows = [done(runner, run, 13.0)[-1] for run in runs]
    assert ["seconds_an_image" in row for row in rows] == [True, False]
    assert sum("experiments.designs.seconds" in call for call in runner.calls) == 1
    assert "| 1.000 |" in table(rows, DIGITS)
    assert "|  |" in table(rows[1:], DIGITS)  # not known


def test_costs_are_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[Any] = []
    found = Cost(1.5, 2.0, 3.0, 4, 5)
    monkeypatch.setattr("experiments.designs.cost.cost", lambda config: counted.append(config) or found)
    for costs in (Costs(tmp_path), Costs(tmp_path), Costs()):
        assert [costs.of({"a": 1, "seed_everything": seed}) for seed in (0, 1)] == [found, found]
    assert counted == [{"a": 1}] * 2  # the last keeps it to itself
    assert Costs(tmp_path).of({"a": 2}) == found
    assert counted[-1] == {"a": 2}


def test_the_cheapest_design_is_scored_once(tmp_path: Path) -> None:
    run, runner = made("bagel", [2.0], [10]), Recorded(tmp_path)
    first, second = done(runner, run, run.flops)
    assert {key: value for key, value in first.items() if key != "at"} == {k: v for k, v in second.items() if k != "at"}
    assert sum(call[0] == "evaluate" for call in runner.calls) == 1


def test_a_first_stage_is_handed_on_and_counted(tmp_path: Path) -> None:
    for name, option in (("metaquery", "--init"), ("llamafusion", "--model.init_from")):
        runner = Recorded(tmp_path / name)
        run = replace(made("x", [2.0, 1.0], [5, 5]), design=replace(chosen([name])[0], tokenizer=None))
        rows = done(runner, run, 15.0)
        assert rows[-1]["optimizer_steps"] == 10
        assert rows[-1]["flops"] == 15.0
        assert rows[-1]["train_seconds"] == scores(0.5)["train_seconds"] + 10.0
        fits = [call for call in runner.calls if call[0] == "fit"]
        assert [option in call for call in fits] == [False, True]
        assert any(call[:2] == ["export", "hf"] for call in runner.calls) == (name == "llamafusion")


def test_a_tokenizer_and_its_teacher_are_trained_once(tmp_path: Path) -> None:
    runner = Recorded(tmp_path)
    for name in ("metamorph", "vargpt", "metamorph"):
        runner.train(replace(made(name, [2.0], [10]), design=chosen([name])[0]), 20.0)
    trained = [Path(c[c.index("--trainer.default_root_dir") + 1]).name for c in runner.calls if c[0] == "fit"]
    assert trained.count("digits_diffused") == trained.count("digits_multiscale") == 1
    assert sum(call[0] == "experiments.digits.teacher" for call in runner.calls) == 1
    held = tmp_path / "tokenizers" / "digits_diffused.yaml"
    held.write_text(held.read_text().replace("steps: 25", "steps: 24"))
    other = replace(made("other", [2.0], [10]), design=chosen(["metamorph"])[0])
    with pytest.raises(
        RuntimeError, match=r"digits_diffused.yaml is no longer what .*: delete .*digits_diffused and the"
    ):
        runner.check(other)
    held.unlink()
    with pytest.raises(RuntimeError, match="no longer what"):
        runner.check(other)


def test_a_folder_of_runs_may_be_moved_and_named_in_another_way(tmp_path: Path) -> None:
    run = replace(made("metamorph", [2.0], [10]), design=chosen(["metamorph"])[0])
    run = replace(run, stages=(replace(run.stages[0], config=plan(run.design, TINY, 0, 4, COSTS).stages[0].config),))
    Recorded(tmp_path / "out").train(run, 20.0)
    Recorded(Path(os.path.relpath(tmp_path / "out"))).check(run)
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    moved = Recorded(tmp_path / "elsewhere")
    moved.train(run, 20.0)
    assert moved.calls == []


def test_a_design_that_cannot_be_timed_leaves_the_others_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runner, runs = Recorded(tmp_path), [made("bagel", [2.0], [10]), made("janus", [2.0], [10])]
    for run in runs:
        runner.train(run, 13.0)
    runner.dies = "experiments.designs.seconds"
    assert time_alone(runs, runner) == [run.name for run in runs]
    assert capsys.readouterr().out.count("not timed") == 2
    runner.dies = None
    assert time_alone(runs, runner) == []


def test_a_changed_design_ends_the_command_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    design = chosen(["flow-dense"])
    monkeypatch.setattr("experiments.designs.__main__.DESIGNS", design)
    held = tmp_path / "runs" / "digits" / "flow-dense-2-9"  # the last of three
    (held / "run").mkdir(parents=True)
    (held / "run.yaml").write_text("model: {init_args: {lr: 1.0}}")
    monkeypatch.setattr(Runner, "_call", lambda *_: pytest.fail("nothing is to be trained"))
    with pytest.raises(SystemExit) as end:
        main(["--world", "digits", "--steps", "9", "--out", str(tmp_path)])
    assert end.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "--out: " in said
    assert "flow-dense-2-9/run.yaml is no longer what the design says" in said


def test_a_run_that_fails_leaves_the_others_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Failing(Recorded):
        def train(self, run: Run, flops: float) -> None:
            if run.seed == 1:
                raise KeyError("broken")
            super().train(run, flops)

    runs = [replace(made("bagel", [2.0], [10]), seed=seed) for seed in range(3)]
    assert train_all(runs, 13.0, Failing(tmp_path), 2) == [runs[1].name]
    assert "KeyError: 'broken'" in capsys.readouterr().out
    assert [len(Recorded(tmp_path).rows(run, 13.0)) for run in runs] == [0, 0, 2]  # the first is not timed yet


def test_a_run_that_fails_says_its_last_line(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="invalid choice: 'nothing'"):
        Runner(tmp_path)._unimodal(["nothing"], tmp_path / "log")


@pytest.mark.slow
def test_a_design_of_two_stages_from_beginning_to_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real commands on a model made tiny; given again, nothing is done but the report."""
    monkeypatch.setattr(running, "can_compile", lambda: (False, "not in tests"))
    quick = model(generator={"init_args": {"sampling": {"steps": 2}}})  # 1,500 images are drawn on the way
    world = replace(TINY, budget=merged(TINY.budget, quick))
    run = plan(chosen(["llamafusion"])[0], world, 0, 6, COSTS)
    budget = run.flops - 1.5 * run.stages[-1].cost.flops  # so that equal FLOPs are two steps before the end
    monkeypatch.setattr("experiments.designs.__main__.DESIGNS", chosen(["llamafusion"]))  # others have no such steps
    monkeypatch.setitem(WORLDS, "digits", replace(world, step_flops=budget / 6))
    out = tmp_path / "out"
    command = ["--out", str(out), "--only", "llamafusion", "--steps", "6", "--quick"]
    with Forks("unimodal.commands", "unimodal.training.lightning_cli", "experiments.designs.seconds") as forks:
        monkeypatch.setattr(Runner, "_call", lambda _, command, log: forks.check(command, log))
        assert main(command) == 0
    rows = json.loads((out / "digits" / "rows.json").read_text())
    assert [row["at"] for row in rows] == ["flops", "steps"]
    assert rows[0]["optimizer_steps"] < rows[1]["optimizer_steps"] == 6
    assert all(row["name"] == "llamafusion" and row["seed"] == 0 for row in rows)
    assert "llamafusion" in (out / "digits" / "report.md").read_text()
    assert (out / "digits" / "plot.png").stat().st_size > 1000
    monkeypatch.setattr(Runner, "_call", lambda *_: pytest.fail("done already"))
    assert main(command) == 0
    assert json.loads((out / "digits" / "rows.json").read_text()) == rows


# --- what is said of them


def row(name: str, seed: int, value: float, at: str = "steps") -> Row:
    found: dict[str, Any] = {"name": name, "seed": seed, "at": at, "world": "digits", "machine": "one"}
    for score, trials in DIGITS.scores.items():
        asked = wilson_interval(round(trials * value), trials)
        found |= {score: value, f"{score}_interval": [asked.low, asked.high]}
    costs = (
        "frechet",
        "frechet_real",
        "recall",
        "copies",
        "optimizer_steps",
        "documents",
        "flops",
        "tokens",
        "parameters",
        "learning",
        "seconds_an_image",
        "train_seconds",
    )
    return found | dict.fromkeys(costs, 1.0) | {"samples": "samples.png"}


def test_the_gallery_shows_the_first_draws_of_every_design(tmp_path: Path) -> None:
    sheet(tmp_path / "samples.png")
    gallery([row("janus", 0, 0.5), row("bagel", 0, 0.5), row("bagel", 1, 0.5)], tmp_path, tmp_path / "gallery.png")
    with Image.open(tmp_path / "gallery.png") as picture:
        shown = picture.convert("RGB")
    assert shown.height == 2 * (36 + 3)  # a line a design
    for draw in range(DRAWS):
        for digit in range(10):
            at = (130 + 36 * (10 * draw + digit) + 16 * draw + 20, 20)
            near = np.abs(np.array(shown.getpixel(at)) - (20 * digit, 0, 10 * draw))
            assert near.max() <= 8


def test_over_seeds_an_interval_is_student_s() -> None:
    values = [0.91, 0.94, 0.90]
    found = interval([row("x", i, v) for i, v in enumerate(values)], "asked_digit", 500)
    expected = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, min(1.0, expected.high)))


def test_of_one_seed_it_is_that_of_the_run() -> None:
    found, asked = interval([row("x", 0, 0.9)], "asked_digit", 500), wilson_interval(450, 500)
    assert (found.low, found.high) == (asked.low, asked.high)


def test_seeds_that_agree_by_chance_are_not_certain() -> None:
    found, asked = interval([row("x", i, 1.0) for i in range(3)], "asked_digit", 500), wilson_interval(1500, 1500)
    assert (found.low, found.high) == (asked.low, asked.high)
    assert found.low < 0.998


@pytest.mark.parametrize(
    ("better", "worse", "said"),
    [([0.9], [0.5], "came out, of one seed"), ([0.5], [0.9], "the other way round, of one seed"),
     ([0.90], [0.88], "not separated"), ([0.90, 0.91, 0.92], [0.5, 0.52, 0.51], "came out"),
     ([0.9, 0.5, 0.7], [0.5, 0.52, 0.51], "not separated")],
)  # fmt: skip
def test_an_ordering_needs_intervals_apart(better: list[float], worse: list[float], said: str) -> None:
    a, b = ([row(n, i, v) for i, v in enumerate(values)] for n, values in (("a", better), ("b", worse)))
    assert said in verdict(a, b, "asked_digit", DIGITS)
    if len(better) > 1:
        assert "one seed" not in verdict(a, b, "asked_digit", DIGITS)


def test_the_report_has_every_design_both_points_and_every_claim(tmp_path: Path) -> None:
    rows = [row(name, 0, 0.5, at) for name in NAMES for at in ("steps", "flops")]
    sheet(tmp_path / "samples.png")
    write_report(rows, DIGITS, tmp_path)
    text = (tmp_path / "digits" / "report.md").read_text()
    assert text.count("| bagel |") == 2
    assert "Equal steps" in text
    assert "several machines" not in text
    write_report([*rows, row("bagel", 1, 0.5) | {"machine": "two"}], DIGITS, tmp_path)
    assert "Trained on several machines (one; two)" in (tmp_path / "digits" / "report.md").read_text()
    assert "Equal training FLOPs" in text
    assert all(text.count(claim.text) == 2 for claim in CLAIMS)
    assert table([row("bagel", 0, 0.5)], DIGITS).count("\n") == 2
    assert orderings([row("bagel", 0, 0.5)], DIGITS).count("\n") == 1  # half of a pair says nothing
