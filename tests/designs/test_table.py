"""What is compared: designs equal where the table says so, and what they cost."""

from pathlib import Path
from typing import Any

import pytest
from designs_cases import TINY, made
from hypothesis import given as drawn
from hypothesis import strategies as st

from experiments.designs.__main__ import main
from experiments.designs.cost import Costs
from experiments.designs.running import plan
from experiments.designs.table import CLAIMS, DESIGNS, DIGITS, chosen, merged, recipe

COSTS = Costs()
NAMES = [design.name for design in DESIGNS]


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
