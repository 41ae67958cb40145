"""Two result folders: numbers by hand and by the paired test, and everything that is refused."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from unimodal.evaluation.compare import Comparison, compare
from unimodal.metrics.statistics import holm, paired_test

FINGERPRINT = {
    "benchmark": {"name": "toy", "version": 1, "items": 40, "detector": {"name": "exact", "threshold": 0.3}},
    "model": {"recipe": "small.yaml", "sha256": "aa"},
    "sampling": {"image": {"guidance": 4.0}},
    "seed": 0,
    "versions": {"torch": "2.11"},
}


def make_rows(seed: int, right: float, samples: int = 2) -> list[dict[str, Any]]:
    """30 items of "easy", 10 of "hard"."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(40):
        task = "easy" if i < 30 else "hard"
        for s in range(samples):
            score = float(rng.random() < (right if task == "easy" else right / 2))
            rows.append({"id": f"{i:05d}", "sample": s, "task": task, "score": score, "reason": "", "files": []})
    return rows


def values(rows: list[dict[str, Any]], task: str | None = None) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for row in rows:
        if task in (None, row["task"]):
            found.setdefault(row["id"], []).append(row["score"])
    return {item: float(np.mean(scores)) for item, scores in found.items()}


def write(folder: Path, rows: list[dict[str, Any]], by_items: bool = False, **changes: Any) -> Path:
    folder.mkdir()
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    means = [float(np.mean(list(values(rows, task).values()))) for task in tasks]
    overall = float(np.mean(list(values(rows).values()) if by_items else means))
    summary = {
        "benchmark": "toy", "version": 1, "label": "complete", "answers": len(rows), "expected": len(rows),
        "overall": overall, "overall_interval": [0, 1], "tasks": {}, "measures": {},
        "headline": "items" if by_items else "tasks",
        "fingerprint": copy.deepcopy(FINGERPRINT),
    }  # fmt: skip
    summary |= changes
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def changed(**parts: Any) -> dict[str, Any]:
    """The fingerprint with dotted entries set."""
    fingerprint: dict[str, Any] = copy.deepcopy(FINGERPRINT)
    for key, value in parts.items():
        *path, last = key.split("__")
        place = fingerprint
        for name in path:
            place = place[name]
        place[last] = value
    return fingerprint


def test_differences_are_those_of_the_paired_test(tmp_path: Path) -> None:
    first, second = make_rows(0, 0.5), make_rows(1, 0.9)
    found = compare(write(tmp_path / "a", first), write(tmp_path / "b", second))
    assert list(found.tasks) == ["easy", "hard"]
    for task in ("easy", "hard"):
        a, b = values(first, task), values(second, task)
        expected = paired_test(a, b, dict.fromkeys(a, task))
        got = found.tasks[task]
        assert (got.difference, got.interval, got.p, got.items) == (
            expected.difference, expected.interval, expected.p, expected.items,
        )  # fmt: skip
        assert got.a == pytest.approx(np.mean(list(a.values())))
        assert got.b - got.a == pytest.approx(got.difference)
    corrected = holm({task: found.tasks[task].p for task in found.tasks})
    assert {task: d.p_holm for task, d in found.tasks.items()} == corrected
    tasks = found.tasks
    assert found.overall.difference == pytest.approx((tasks["easy"].difference + tasks["hard"].difference) / 2)
    assert found.overall.p_holm is None
    assert found.overall.items == 40
    assert found.changed == ()
    assert not found.forced


def test_headline_over_items_where_the_summaries_say_so(tmp_path: Path) -> None:
    first, second = make_rows(0, 0.5), make_rows(1, 0.9)
    zero = [row | {"score": 0.0} for row in first]  # whose two kinds of mean are equal
    for name, rows in (("a", first), ("zero", zero), ("b", second)):
        write(tmp_path / name, rows, by_items=True)
    for name, rows in (("a", first), ("zero", zero)):
        a, b = values(rows), values(second)
        found = compare(tmp_path / name, tmp_path / "b").overall
        assert found.difference == pytest.approx(np.mean([b[i] - a[i] for i in a]))
        assert found.b == pytest.approx(np.mean(list(b.values())))
    write(tmp_path / "tasks", first)
    with pytest.raises(ValueError, match="mean over tasks"):
        compare(tmp_path / "tasks", tmp_path / "b")
    write(tmp_path / "set", first, headline="none", overall=None)
    with pytest.raises(ValueError, match="b: expected scores of items to compare, got numbers of whole sets"):
        compare(tmp_path / "a", tmp_path / "set")


def test_order_of_rows_does_not_matter(tmp_path: Path) -> None:
    first, second = make_rows(0, 0.5), make_rows(1, 0.9)
    write(tmp_path / "a", first)
    one = compare(tmp_path / "a", write(tmp_path / "b", second))
    other = compare(tmp_path / "a", write(tmp_path / "c", second[::-1]))
    assert one.overall == other.overall


def test_another_benchmark_is_refused_by_its_first_key(tmp_path: Path) -> None:
    a = write(tmp_path / "a", make_rows(0, 0.5))
    other = changed(benchmark__detector={"name": "exact", "threshold": 0.9}, benchmark__items=41)
    b = write(tmp_path / "b", make_rows(1, 0.9), fingerprint=other)
    with pytest.raises(ValueError, match=r"another benchmark\.items: 40 in a and 41 in b"):
        compare(a, b)
    found = compare(a, b, force=True)
    assert found.forced
    assert [(c.key, c.a, c.b) for c in found.changed] == [
        ("benchmark.items", 40, 41),
        ("benchmark.detector.threshold", 0.3, 0.9),
    ]
    assert "by force" in found.to_markdown()


def test_an_entry_only_one_fingerprint_has_counts(tmp_path: Path) -> None:
    a = write(tmp_path / "a", make_rows(0, 0.5))
    b = write(tmp_path / "b", make_rows(1, 0.9), fingerprint=changed(benchmark__rewriter="x"))
    with pytest.raises(ValueError, match=r'benchmark\.rewriter: null in a and "x" in b'):
        compare(a, b)


def test_other_models_and_versions_are_named_not_refused(tmp_path: Path) -> None:
    a = write(tmp_path / "a", make_rows(0, 0.5))
    b = write(tmp_path / "b", make_rows(1, 0.9), fingerprint=changed(model__sha256="b|b", versions__torch="2.12"))
    found = compare(a, b)
    assert [c.key for c in found.changed] == ["model.sha256", "versions.torch"]
    assert not found.forced
    assert "| model.sha256 | aa | b\\|b |" in found.to_markdown()


def test_partial_results_are_refused_even_by_force(tmp_path: Path) -> None:
    a = write(tmp_path / "a", make_rows(0, 0.5))
    b = write(tmp_path / "b", make_rows(1, 0.9), label="PARTIAL", overall=None, expected=100)
    for force in (False, True):
        with pytest.raises(ValueError, match=r"^b: expected complete results, got PARTIAL .* 80 of 100 answers"):
            compare(a, b, force)
        with pytest.raises(ValueError, match=r"^a: expected complete"):
            compare(b, a, force)


def test_other_items_and_tasks_are_refused(tmp_path: Path) -> None:
    rows = make_rows(0, 0.5)
    a = write(tmp_path / "a", rows)
    fewer = write(tmp_path / "b", rows[:-2])
    with pytest.raises(ValueError, match="'00039' of hard in a and of no task in b"):
        compare(a, fewer)
    with pytest.raises(ValueError, match="'00039' of no task in a and of hard in b"):
        compare(fewer, a)
    moved = [row | {"task": "hard"} if row["id"] == "00003" else row for row in rows]
    with pytest.raises(ValueError, match="'00003' of easy in a and of hard in b"):
        compare(a, write(tmp_path / "c", moved))


def test_files_that_disagree_or_are_missing_are_refused(tmp_path: Path) -> None:
    rows = make_rows(0, 0.5)
    a = write(tmp_path / "a", rows)
    with pytest.raises(ValueError, match=r"b: expected results\.jsonl to give"):
        compare(a, write(tmp_path / "b", rows, overall=0.123))
    with pytest.raises(ValueError, match=r"b: expected results\.jsonl to give"):
        compare(a, write(tmp_path / "c", rows, answers=79))
    with pytest.raises(ValueError, match=r"b: expected a folder with summary\.json"):
        compare(a, tmp_path)
    (tmp_path / "c" / "summary.json").write_text("{}")
    with pytest.raises(ValueError, match=r"b: expected a summary\.json of"):
        compare(a, tmp_path / "c")
    (tmp_path / "c" / "summary.json").write_text("{")
    with pytest.raises(ValueError, match=r"b: expected a summary\.json of"):
        compare(a, tmp_path / "c")


@pytest.mark.parametrize("key", ["id", "task", "score"])
def test_rows_without_their_keys_are_named(tmp_path: Path, key: str) -> None:
    rows = make_rows(0, 0.5)
    a = write(tmp_path / "a", rows)
    lines = [json.dumps({k: v for k, v in row.items() if (i, k) != (3, key)}) for i, row in enumerate(rows)]
    (a / "results.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"a: expected id, task and score in answer 4 of .*results\.jsonl"):
        compare(a, a)


def test_json_and_markdown_hold_the_same_numbers(tmp_path: Path) -> None:
    found: Comparison = compare(write(tmp_path / "a", make_rows(0, 0.5)), write(tmp_path / "b", make_rows(1, 0.9)))
    record = json.loads(json.dumps(found.to_json()))
    assert record["tasks"]["easy"]["p_holm"] == found.tasks["easy"].p_holm
    assert record["overall"]["interval"] == {"low": found.overall.interval.low, "high": found.overall.interval.high}
    line = next(line for line in found.to_markdown().splitlines() if line.startswith("| easy"))
    easy = found.tasks["easy"]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[:4] == ["easy", f"{100 * easy.a:.1f}", f"{100 * easy.b:.1f}", f"{100 * easy.difference:+.1f}"]
    assert cells[7] == "30"
    assert "**overall**" in found.to_markdown()


def test_questions_about_one_image_are_compared_together(tmp_path: Path) -> None:
    """Ten images of four questions each, all answered alike: ten differences and not forty, whichever names the images."""
    rows = {side: make_rows(0, 1.0, samples=1) for side in "ab"}
    for side, found in rows.items():
        for i, row in enumerate(found):
            row |= {"score": float(i // 4 % 3 == 0 or side == "b"), "task": "one"}
    alone = compare(write(tmp_path / "a", rows["a"]), write(tmp_path / "b", rows["b"])).overall
    named = write(tmp_path / "c", [row | {"cluster": f"image {i // 4}"} for i, row in enumerate(rows["b"])])
    together = compare(tmp_path / "a", named).overall
    assert together.difference == alone.difference == pytest.approx(0.6)
    assert together.p == 2 / 2**6
    assert together.interval.high - together.interval.low > 1.5 * (alone.interval.high - alone.interval.low)
