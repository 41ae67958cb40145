"""Runs of the comparison of designs: resumable, nothing done twice, rows of other machines."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from designs_cases import TINY, Recorded, done, made, scores
from forking import Forks
from PIL import Image

from experiments.designs import running
from experiments.designs.__main__ import main, time_alone
from experiments.designs.__main__ import train as train_all
from experiments.designs.cost import Cost, Costs
from experiments.designs.elsewhere import given, left_over, read_rows
from experiments.designs.report import table
from experiments.designs.running import Row, Run, Runner, plan
from experiments.designs.table import DIGITS, WORLDS, chosen, merged, model

# --- runs


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


def test_what_other_versions_scored_is_neither_reported_nor_gone_on_with(tmp_path: Path) -> None:
    run, runner = made("bagel", [2.0], [10]), Recorded(tmp_path)
    done(runner, run, 13.0)
    raised = replace(run, world=replace(DIGITS, versions={"digits": 7}))
    with pytest.raises(RuntimeError, match=r"at_10 was scored by versions .*'digits': 1.* today's are .*7.*: delete"):
        runner.train(raised, 13.0)
    (runner.folder(run) / "at_6.json").unlink()
    with pytest.raises(RuntimeError, match=r"at_6 was scored by versions None"):
        runner.check(run)


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
        replace(run, world=replace(DIGITS, versions={"digits": 0})),
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
    run = replace(run, stages=(replace(run.stages[0], config=plan(run.design, TINY, 0, 4, Costs()).stages[0].config),))
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
    run = plan(chosen(["llamafusion"])[0], world, 0, 6, Costs())
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
