"""The comparison of designs: equal where it says so, resumable, and it claims no more than its intervals do."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from experiments.designs import running
from experiments.designs.__main__ import main
from experiments.designs.cost import Cost
from experiments.designs.report import interval, orderings, table, verdict, write_report
from experiments.designs.running import Row, Run, Runner, Stage, plan
from experiments.designs.table import CLAIMS, DESIGNS, DIGITS, Design, chosen, merged, model, recipe
from unimodal.metrics.shares import wilson_interval

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


def test_all_designs_have_one_budget() -> None:
    for design in DESIGNS:
        settings = recipe(design, DIGITS, {})
        inner = settings["model"]["init_args"]["model"]
        backbone = {key: inner["backbone"][key] for key in ("width", "depth", "heads", "mlp_width", "vocabulary")}
        assert backbone == {"width": 128, "depth": 4, "heads": 4, "mlp_width": 344, "vocabulary": 512}
        assert settings["data"] == DIGITS.budget["data"]
        assert settings["model"]["init_args"]["schedule"] == "constant"
        assert inner["sequence"]["image_sizes"] == [[8, 8]]


@pytest.mark.parametrize("name", NAMES)
def test_every_design_builds_and_its_cost_is_counted(name: str) -> None:
    run = plan(chosen([name])[0], TINY, 0, 11)
    assert sum(stage.steps for stage in run.stages) == 11
    assert len(run.stages) == (2 if run.design.first else 1)
    for stage in run.stages:
        assert stage.cost.flops > 0
        assert 0 < stage.cost.learning <= stage.cost.parameters
        assert 128 < stage.cost.tokens <= 256
    if run.design.first:
        assert run.stages[-1].cost.learning < run.stages[-1].cost.parameters  # something is kept


def test_controls_differ_in_what_they_say() -> None:
    runs = {name: plan(chosen([name])[0], TINY, 0, 10) for name in ("bagel", "flow-dense", "flow-causal")}
    costs = {name: run.stages[0].cost for name, run in runs.items()}
    assert costs["bagel"].parameters > costs["flow-dense"].parameters == costs["flow-causal"].parameters
    # Active FLOPs are equal: every token is read by one expert.
    assert costs["bagel"].flops == pytest.approx(costs["flow-dense"].flops, rel=0.01)
    assert costs["flow-causal"].flops < costs["flow-dense"].flops  # fewer pairs may see each other


def test_an_unknown_design_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for wrong, said in ((["--only", "dalle"], "dalle"), (["--steps", "1"], "--steps"), (["--jobs", "0"], "--jobs")):
        with pytest.raises(SystemExit) as end:
            main(["--out", str(tmp_path / "out"), *wrong])
        assert end.value.code == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# --- equal FLOPs


def made(name: str, costs: list[float], steps: list[int]) -> Run:
    stages = tuple(
        Stage(f"s{i}", {}, n, Cost(flops, 1.0, 1.0, 1, 1))
        for i, (flops, n) in enumerate(zip(costs, steps, strict=True))
    )
    return Run(Design(name, "none", "none"), DIGITS, 0, stages)


@given(
    st.lists(st.floats(1.0, 1e12), min_size=1, max_size=2), st.lists(st.integers(1, 5000), min_size=2, max_size=2),
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
    """Says what it would do, and leaves what that would leave."""

    calls: list[list[str]]

    def _call(self, command: list[str], log: Path) -> None:
        self.calls.append(command[3:] if command[1] == "-m" and command[2] == "unimodal.cli" else command[2:])
        given = dict(pairwise(command))
        if "fit" in command:
            folder = Path(given["--trainer.default_root_dir"])
            (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
            (folder / "checkpoints" / "last.ckpt").touch()
            (folder / "export").mkdir(exist_ok=True)
            (folder / "run.json").write_text(json.dumps({"steps": int(given.get("--trainer.max_steps", 0))}))
        elif "evaluate" in command or "experiments.designs.seconds" in command:
            out = Path(given["--out"])
            out.parent.mkdir(parents=True, exist_ok=True)
            if out.suffix == ".json":
                out.write_text('{"seconds_an_image": 1.0}')
            else:
                out.mkdir(parents=True, exist_ok=True)
                (out / "scores.json").write_text(json.dumps(scores(0.5)))
        else:
            Path(given["--out"]).mkdir(parents=True, exist_ok=True)


def scores(value: float) -> Row:
    row: Row = dict.fromkeys(DIGITS.scores, value)
    row |= {f"{name}_interval": [value - 0.1, value + 0.1] for name in DIGITS.scores}
    return row | dict.fromkeys(("frechet", "frechet_real", "recall", "copies", "guidance", "train_seconds"), 1.0)


def recorded(out: Path) -> Recorded:
    runner = Recorded(out)
    object.__setattr__(runner, "calls", [])
    return runner


def test_a_run_is_trained_to_both_points_and_nothing_twice(tmp_path: Path) -> None:
    run = made("bagel", [2.0], [10])
    runner = recorded(tmp_path)
    rows = runner.scored(run, 13.0)
    steps = [call[call.index("--trainer.max_steps") + 1] for call in runner.calls if call[0] == "fit"]
    assert steps == ["6", "10"]
    assert ["--ckpt_path" in call for call in runner.calls if call[0] == "fit"] == [False, True]
    assert [(row["at"], row["optimizer_steps"], row["flops"]) for row in rows] == [
        ("flops", 6, 12.0),
        ("steps", 10, 20.0),
    ]
    runner.calls.clear()
    assert runner.scored(run, 13.0) == rows
    assert runner.calls == []


def test_the_cheapest_design_is_scored_once(tmp_path: Path) -> None:
    run, runner = made("bagel", [2.0], [10]), recorded(tmp_path)
    first, second = runner.scored(run, run.flops)
    assert {key: value for key, value in first.items() if key != "at"} == {k: v for k, v in second.items() if k != "at"}
    assert sum(call[0] == "evaluate" for call in runner.calls) == 1


def test_a_first_stage_is_handed_on_and_counted(tmp_path: Path) -> None:
    for name, option in (("metaquery", "--init"), ("llamafusion", "--model.init_from")):
        design, runner = chosen([name])[0], recorded(tmp_path / name)
        run = replace(made("x", [2.0, 1.0], [5, 5]), design=replace(design, tokenizer=None))
        rows = runner.scored(run, 15.0)
        assert rows[-1]["optimizer_steps"] == 10
        assert rows[-1]["flops"] == 15.0
        fits = [call for call in runner.calls if call[0] == "fit"]
        assert [option in call for call in fits] == [False, True]
        assert any(call[:2] == ["export", "hf"] for call in runner.calls) == (name == "llamafusion")


def test_a_run_that_fails_says_its_last_line(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="expected a YAML file"):
        Runner(tmp_path)._unimodal(["fit", "-c", str(tmp_path / "none.yaml")], tmp_path / "log")


@pytest.mark.slow
def test_a_design_of_two_stages_from_beginning_to_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real commands on a model made tiny; given again, nothing is done but the report."""
    monkeypatch.setattr(running, "can_compile", lambda: (False, "not in tests"))
    monkeypatch.setitem(__import__("experiments.designs.table", fromlist=["x"]).WORLDS, "digits", TINY)
    out = tmp_path / "out"
    command = ["--out", str(out), "--only", "llamafusion", "--steps", "4", "--seeds", "1"]
    assert main(command) == 0
    rows = json.loads((out / "rows.json").read_text())
    assert {row["at"] for row in rows} >= {"steps"}
    assert all(row["name"] == "llamafusion" and row["seed"] == 0 for row in rows)
    assert "llamafusion" in (out / "report.md").read_text()
    assert (out / "plot.png").stat().st_size > 1000
    monkeypatch.setattr(Runner, "_call", lambda *_: pytest.fail("done already"))
    assert main(command) == 0
    assert json.loads((out / "rows.json").read_text()) == rows


# --- what is said of them


def row(name: str, seed: int, value: float, at: str = "steps") -> Row:
    found: dict[str, Any] = {"name": name, "seed": seed, "at": at, "world": "digits"}
    for score in DIGITS.scores:
        near = wilson_interval(round(200 * value), 200)
        found |= {score: value, f"{score}_interval": [near.low, near.high]}
    costs = ("frechet", "recall", "flops", "tokens", "parameters", "learning", "seconds_an_image", "train_seconds")
    return found | dict.fromkeys(costs, 1.0)


def test_over_seeds_an_interval_is_student_s() -> None:
    values = [0.91, 0.94, 0.90]
    found = interval([row("x", i, v) for i, v in enumerate(values)], "asked_digit")
    expected = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, min(1.0, expected.high)))


def test_of_one_seed_it_is_that_of_the_run() -> None:
    one = row("x", 0, 0.9)
    found = interval([one], "asked_digit")
    assert [found.low, found.high] == one["asked_digit_interval"]


@pytest.mark.parametrize(
    ("better", "worse", "said"),
    [([0.9], [0.5], "came out in this one run"), ([0.5], [0.9], "the other way round in this one run"),
     ([0.90], [0.88], "not separated"), ([0.90, 0.91, 0.92], [0.5, 0.52, 0.51], "came out"),
     ([0.9, 0.5, 0.7], [0.5, 0.52, 0.51], "not separated")],
)  # fmt: skip
def test_an_ordering_needs_intervals_apart(better: list[float], worse: list[float], said: str) -> None:
    a, b = ([row(n, i, v) for i, v in enumerate(values)] for n, values in (("a", better), ("b", worse)))
    assert said in verdict(CLAIMS[0], a, b, "asked_digit")
    if len(better) > 1:
        assert "one run" not in verdict(CLAIMS[0], a, b, "asked_digit")


def test_the_report_has_every_design_both_points_and_every_claim(tmp_path: Path) -> None:
    rows = [row(name, 0, 0.5, at) for name in NAMES for at in ("steps", "flops")]
    write_report(rows, DIGITS, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert text.count("| bagel |") == 2
    assert "Equal steps" in text
    assert "Equal training FLOPs" in text
    assert all(text.count(claim.text) == 2 for claim in CLAIMS)
    assert table([row("bagel", 0, 0.5)], DIGITS).count("\n") == 2
    assert orderings([row("bagel", 0, 0.5)], DIGITS).count("\n") == 1  # half of a pair says nothing
