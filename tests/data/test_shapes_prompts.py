"""Prompts of the shapes world: they are GenEval's, and what is drawn for each fulfils it and no other."""

import importlib.util
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import shape_checks

from unimodal.data.shapes import HELD_OUT, PROMPT_TASKS, Scene, prompts, render_prompt

SPLITS = ("train", "test")
_spec = importlib.util.spec_from_file_location("shapes_readings", Path(__file__).with_name("shapes_readings.py"))
assert _spec is not None
assert _spec.loader is not None
readings = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(readings)
holds, told, check_rules = readings.holds, readings.told, readings.check_rules


@pytest.fixture
def unchecked():
    """Without the tests' own check of types, which would refuse a wrong word before the code does."""
    with shape_checks.unchecked():
        yield


def fulfils(record, scene: Scene) -> bool:
    """The official decision on a known scene, every clause in its own loop."""
    found = []
    for clause in record["include"]:
        matching = [t for t in scene.things if t.shape == clause["class"] and clause.get("color") in (None, t.colour)]
        if len(matching) < clause["count"]:
            return False
        if "position" in clause:
            relation, other = clause["position"]
            if not all(holds(a, relation, b) for a in matching for b in found[other]):
                return False
        found.append(matching)
    return not any(sum(t.shape == c["class"] for t in scene.things) >= c["count"] for c in record.get("exclude", ()))


@pytest.mark.parametrize("split", SPLITS)
def test_prompts_are_geneval_metadata(split):
    records = prompts(split, 100, seed=2)
    assert records == prompts(split, 100, seed=2)
    assert records != prompts(split, 100, seed=3)
    tags = Counter(r["tag"] for r in records)
    pairs = 18 if split == "test" else 62
    assert tags == dict(zip(PROMPT_TASKS, (8, 28, 24, pairs, 100, 100), strict=True))
    assert list(dict.fromkeys(r["tag"] for r in records)) == list(PROMPT_TASKS)
    assert len({r["prompt"] for r in records}) == len(records)
    for record in records:
        assert set(record) == {"tag", "include", "prompt"} | ({"exclude"} if record["tag"] == "counting" else set())
        named = [(n, c, s) for n, c, s in told(record["prompt"].removeprefix("a photo of "))]
        clauses = [(c["count"], c.get("color"), c["class"]) for c in record["include"]]
        if record["tag"] == "position":
            reference, placed = record["include"]
            relation = re.search(r"left of|right of|above|below", record["prompt"])[0]
            assert placed["position"] == [relation, 0]
            assert "position" not in reference
            clauses = clauses[::-1]
        assert named == clauses
        if record["tag"] == "counting":
            (one,) = record["exclude"]
            assert one == {"class": record["include"][0]["class"], "count": record["include"][0]["count"] + 1}
        if record["tag"] in ("colors", "color_attr"):
            kept = [(c["class"], c["color"]) in HELD_OUT for c in record["include"]]
            assert any(kept) == (split == "test")


def test_a_perfect_renderer_fulfils_every_prompt_and_only_its_own():
    wrong = 0
    records = [r for split in SPLITS for r in prompts(split, 30)]
    for i, record in enumerate(records):
        scene = render_prompt(record, np.random.default_rng((1, i)), 32)
        check_rules(scene)
        assert fulfils(record, scene)
        assert sum(c["count"] for c in record["include"]) == len(scene.things)
        wrong += fulfils(records[i - 1], scene)
    assert wrong < 0.2 * len(records)
    assert (
        len({t.colour for i in range(40) for t in render_prompt(records[0], np.random.default_rng(i), 32).things}) > 5
    )


def test_prompts_refuse_bad_arguments(unchecked):
    with pytest.raises(ValueError, match="split: expected train or test, got 'val'"):
        prompts("val")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="per_task: expected 1 or more, got 0"):
        prompts("test", 0)
