"""Generation that resumes and shares its work, scores that say when they are not whole, results that say what made them."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from unimodal.documents import Document, Part
from unimodal.evaluation.answers import AnswerFolder, first_difference
from unimodal.evaluation.benchmark import Answer, Benchmark, Item, Verdict
from unimodal.evaluation.fingerprint import items_sha256
from unimodal.evaluation.harness import Choice, answer_seed, generate, report, score
from unimodal.evaluation.results import item_values, summarise, to_markdown
from unimodal.model import UnifiedModel


class Drawn(Benchmark):
    """Six prompts of two tasks; an image is right when its mean is above a threshold of its prompt."""

    name = "drawn"
    draws = True

    def __init__(self, samples: int = 2) -> None:
        self.samples = samples

    def items(self) -> list[Item]:
        texts = ["a handwritten three", "a handwritten seven", "three plus seven equals ten"]
        return [
            Item(f"{t * 3 + i:05d}", task, Document((Part(text, learn=False),)), {"tag": task, "least": 100 * i})
            for t, task in enumerate(("bright", "dark"))
            for i, text in enumerate(texts)
        ]

    def judge(self, answers: Sequence[Answer]) -> list[Verdict]:
        means = [float(np.asarray(answer.parts[0].image).mean()) for answer in answers]
        return [
            Verdict(float(mean > a.item.truth["least"]), "" if mean > a.item.truth["least"] else "too dark",
                    {"mean": mean, "boxes": [{"label": "square", "box": [1, 1, 4, 4], "score": 0.5, "colour": "red"}]})
            for mean, a in zip(means, answers, strict=True)
        ]  # fmt: skip

    def spec(self) -> dict[str, Any]:
        return {"rule": "mean above least"}

    def measures(self, rows: Sequence[dict[str, Any]]) -> dict[str, float]:
        return {"mean": sum(row["mean"] for row in rows) / len(rows)}


class Written(Drawn):
    """The same prompts, continued with text and images."""

    name = "written"
    draws = False

    def settings(self, image: Any) -> Any:
        from unimodal.decoding_settings import DecodingSettings

        return DecodingSettings("image", max_tokens=3, max_images=2, image=image)

    def judge(self, answers: Sequence[Answer]) -> list[Verdict]:
        return [
            Verdict(len(answer.parts) / 10, fields={"kinds": [p.is_text for p in answer.parts]}) for answer in answers
        ]

    def measures(self, rows: Sequence[dict[str, Any]]) -> dict[str, float]:
        return {}


@pytest.fixture(scope="module")
def model(make: Callable[..., UnifiedModel]) -> UnifiedModel:
    return make("flow")


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def answers(benchmark: Benchmark, root: Path) -> AnswerFolder:
    return AnswerFolder(root, benchmark.draws, benchmark.samples)


@pytest.mark.parametrize("cls", [Drawn, Written])
def test_answers_do_not_depend_on_batch_processes_or_interruption(
    cls: type[Drawn], model: UnifiedModel, tmp_path: Path
) -> None:
    benchmark = cls()
    items = benchmark.items()
    whole, shared, resumed = (tmp_path / name for name in ("whole", "shared", "resumed"))
    assert generate(benchmark, items, answers(benchmark, whole), model, batch=12) == 12
    for k in (3, 1, 2):
        generate(benchmark, items, answers(benchmark, shared), model, batch=1, part=(k, 3))
    assert content(shared) == content(whole)
    generate(benchmark, items[:4], answers(benchmark, resumed), model, batch=5)
    lost = resumed / "00001" / "samples" / f"00001.{'png' if cls is Drawn else 'json'}"
    lost.unlink()
    assert generate(benchmark, items, answers(benchmark, resumed), model, batch=5) == 5
    assert content(resumed) == content(whole)
    other = tmp_path / "other"
    generate(benchmark, items[:1], answers(benchmark, other), model, seed=1)
    assert content(other / "00000") != content(whole / "00000")


def test_seeds_are_of_item_and_answer() -> None:
    seeds = {answer_seed(s, item, n) for s in (0, 1) for item in ("00000", "00001") for n in range(4)}
    assert len(seeds) == 16
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert answer_seed(0, "00000", 0) == answer_seed(0, "00000", 0)


def test_a_document_comes_back_as_it_was_written(tmp_path: Path) -> None:
    benchmark = Written(samples=1)
    item, folder = benchmark.items()[0], answers(benchmark, tmp_path)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8))
    assert not folder.has(item, 0)
    folder.write(item, 0, [Part("eine Zahl: "), Part(picture), Part(" 数")])
    (answer,) = folder.read(item)
    assert answer.text == "eine Zahl:  数"
    assert answer.parts[1].image.tobytes() == picture.tobytes()
    assert answer.files == ("00000/samples/00000.json", "00000/samples/00000-1.png")
    assert folder.has(item, 0)


def test_folders_of_other_models_are_read_by_number(tmp_path: Path) -> None:
    benchmark = Drawn()
    item = benchmark.items()[1]
    samples = tmp_path / item.id / "samples"
    samples.mkdir(parents=True)
    for name, grey in (("1.png", 200), ("00000.png", 0), ("grid.png", 7)):
        Image.new("RGB", (4, 4), (grey,) * 3).save(samples / name)
    rows = score(benchmark, [item], answers(benchmark, tmp_path))
    assert [(row["sample"], row["score"]) for row in rows] == [(0, 0.0), (1, 1.0)]
    Image.new("RGB", (4, 4)).save(samples / "2.png")
    with pytest.raises(ValueError, match=r"expected 2 answers numbered 0 to 1, got .*2\.png"):
        answers(benchmark, tmp_path).read(item)


def test_a_folder_of_other_prompts_is_refused(tmp_path: Path) -> None:
    benchmark = Drawn()
    item = benchmark.items()[1]
    (tmp_path / item.id).mkdir()
    (tmp_path / item.id / "metadata.jsonl").write_text(json.dumps({"tag": "bright", "least": 200}))
    with pytest.raises(ValueError, match=r"metadata\.jsonl: expected what the prompt file says, least 100, got 200"):
        answers(benchmark, tmp_path).read(item)


def test_answers_made_otherwise_are_not_mixed(tmp_path: Path) -> None:
    folder = answers(Drawn(), tmp_path / "answers")
    record = {"seed": 0, "sampling": {"image": {"guidance": 1.5, "size": (8, 8)}}}
    folder.check_record(record)
    folder.check_record(record)  # the same, from a file
    with pytest.raises(ValueError, match=r"answers made with sampling\.image\.guidance 1\.5, got 2\.0"):
        folder.check_record({"seed": 0, "sampling": {"image": {"guidance": 2.0, "size": (8, 8)}}})
    (folder.root / "generation.json").unlink()
    folder.write(Drawn().items()[0], 0, [Part(Image.new("RGB", (4, 4)))])
    with pytest.raises(ValueError, match=r"holds answers and no generation\.json"):
        folder.check_record(record)


def test_an_answer_that_is_no_single_image_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected one image, got 0"):
        answers(Drawn(), tmp_path).write(Drawn().items()[0], 0, [Part("no")])


def rows_of(values: Sequence[Sequence[float]], task: str = "bright") -> list[dict[str, Any]]:
    return [
        {"id": f"{i:05d}", "sample": n, "task": task, "score": v, "reason": "", "files": [], "mean": v}
        for i, scores in enumerate(values)
        for n, v in enumerate(scores)
    ]


def test_the_headline_is_the_mean_of_tasks_or_of_items_as_the_benchmark_says() -> None:
    benchmark = Drawn()
    rows = rows_of([[1, 1], [1, 0], [0, 0]]) + rows_of([[1, 1]], "dark")
    summary = summarise(benchmark, rows, ["bright", "dark"], 8, {})
    assert summary.tasks["bright"].score.value == 0.5
    assert summary.overall is not None
    assert summary.overall.value == 0.75
    assert summary.measures["mean"].value == 5 / 8
    low, high = summary.tasks["bright"].score.interval or (1.0, 0.0)
    assert low <= 0.5 <= high
    benchmark.overall = "items"  # type: ignore[misc]
    summary = summarise(benchmark, rows, ["bright", "dark"], 8, {})
    assert summary.overall is not None
    assert summary.overall.value == 2.5 / 4
    assert item_values(rows)["bright"] == {"00000": 1.0, "00001": 0.5, "00002": 0.0}


def test_where_all_items_agree_the_interval_is_still_one() -> None:
    """A bootstrap of equal values has no width, as if ten right answers proved that none can be wrong."""
    rows = rows_of([[1, 1]] * 10) + rows_of([[0, 0]] * 10, "dark")
    summary = summarise(Drawn(), rows, ["bright", "dark"], 40, {})
    assert summary.tasks["bright"].score.interval == pytest.approx((0.7225, 1.0), abs=1e-3)
    assert summary.tasks["dark"].score.interval == pytest.approx((0.0, 0.2775), abs=1e-3)


def test_missing_answers_make_a_partial_result_without_overall(model: UnifiedModel, tmp_path: Path) -> None:
    benchmark = Drawn()
    items = benchmark.items()
    folder = answers(benchmark, tmp_path / "answers")
    generate(benchmark, items, folder, model)
    whole = report(benchmark, score(benchmark, items, folder), tmp_path, folder.root, {"model": None})
    assert (whole.label, whole.answers, whole.expected) == ("complete", 12, 12)
    assert whole.overall is not None
    (folder.root / "00004" / "samples" / "00001.png").unlink()
    partial = report(benchmark, score(benchmark, items, folder), tmp_path, folder.root, {"model": None})
    assert (partial.label, partial.answers, partial.overall, dict(partial.measures)) == ("PARTIAL", 11, None, {})
    assert "PARTIAL, 11 of 12 answers, no overall score" in to_markdown(partial)
    limited = report(benchmark, score(benchmark, Choice(limit=1).of(items), folder), tmp_path, folder.root, {})
    assert (limited.label, limited.answers) == ("PARTIAL", 4)
    record = json.loads((tmp_path / "summary.json").read_text())
    assert record["overall"] is None
    assert record["label"] == "PARTIAL"


def test_the_four_files_say_what_was_asked_how_and_by_whom(model: UnifiedModel, tmp_path: Path) -> None:
    benchmark = Drawn()
    folder = answers(benchmark, tmp_path / "answers")
    generate(benchmark, benchmark.items(), folder, model)
    report(benchmark, score(benchmark, benchmark.items(), folder), tmp_path, folder.root, {"model": {"recipe": "tiny"}})
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert len(lines) == 12
    assert lines[0]["asked"] == "a handwritten three"
    assert lines[0]["files"] == ["00000/samples/00000.png"]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["fingerprint"]["model"] == {"recipe": "tiny"}
    assert summary["fingerprint"]["benchmark"]["rule"] == "mean above least"
    assert summary["fingerprint"]["benchmark"]["items_sha256"] == items_sha256(benchmark.items())
    assert {"python", "torch", "torchmetrics"} <= summary["fingerprint"]["versions"].keys()
    assert "| bright |" in (tmp_path / "summary.md").read_text()
    page = (tmp_path / "index.html").read_text()
    assert page.index("too dark") < page.rindex('class="card right"')
    assert 'src="answers/00000/samples/00000.png"' in page
    assert "red square 0.50" in page
    assert "http://" not in page


def test_what_is_asked_has_one_hash() -> None:
    items = Drawn().items()
    assert items_sha256(items) == items_sha256(Drawn().items())
    changed = [*items[:-1], Item("00005", "dark", items[-1].prompt, {"tag": "dark", "least": 201})]
    picture = Document((Part(Image.new("RGB", (4, 4))), *items[-1].prompt.parts))
    drawn = [*items[:-1], Item("00005", "dark", picture, items[-1].truth)]
    assert len({items_sha256(i) for i in (items, changed, drawn, items[:-1])}) == 4


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"part": (0, 2)}, "--part: expected K/N"), ({"part": (3, 2)}, "got 3/2"), ({"limit": 0}, "--limit: expected")],
)
def test_choices_that_cannot_be_made(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Choice(**settings)


def test_items_are_chosen_by_task_and_number() -> None:
    items = Drawn().items()
    assert [i.id for i in Choice(("dark",)).of(items)] == ["00003", "00004", "00005"]
    assert [i.id for i in Choice(limit=2).of(items)] == ["00000", "00001", "00003", "00004"]
    with pytest.raises(ValueError, match="--tasks: expected some of bright, dark, got light"):
        Choice(("light",)).of(items)


def test_a_name_that_comes_twice_is_refused() -> None:
    items = Drawn().items()
    with pytest.raises(ValueError, match="items: expected a name each, got 00001 twice"):
        Choice().of([*items, items[1]])


@pytest.mark.parametrize("content", ["[1]", "{", "3"])
def test_a_damaged_record_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "generation.json").write_text(content)
    with pytest.raises(ValueError, match=r"generation\.json: expected a JSON object"):
        answers(Drawn(), tmp_path).check_record({})


def test_the_overall_interval_counts_tasks_whose_items_agree() -> None:
    """All right is no proof that none can be wrong: the tasks' distances, squared, add up."""
    rows = rows_of([[1, 1]] * 10) + rows_of([[1, 1]] * 10, "dark")
    overall = summarise(Drawn(), rows, ["bright", "dark"], 40, {}).overall
    assert overall is not None
    half = 1 - 0.7225
    assert overall.interval == pytest.approx((1 - (2 * half**2) ** 0.5 / 2, 1.0), abs=1e-3)


def test_the_gallery_shows_what_was_asked_about(tmp_path: Path) -> None:
    class Asked(Drawn):
        def items(self) -> list[Item]:
            seen = Image.new("RGB", (5, 4), "red")
            prompt = Document((Part(seen, learn=False), Part("brighter", learn=False)))
            return [Item("00000", "bright", prompt, {"least": 0})]

    benchmark = Asked(samples=1)
    folder = answers(benchmark, tmp_path / "answers")
    folder.write(benchmark.items()[0], 0, [Part(Image.new("RGB", (4, 4), "white"))])
    report(benchmark, score(benchmark, benchmark.items(), folder), tmp_path, folder.root, {})
    assert Image.open(tmp_path / "asked" / "00000-0.png").size == (5, 4)
    page = (tmp_path / "index.html").read_text()
    assert page.index('src="asked/00000-0.png"') < page.index('src="answers/00000/samples/00000.png"')


def test_the_first_difference_is_named() -> None:
    assert first_difference({"a": {"b": 1}}, {"a": {"b": 1}}) is None
    assert first_difference({"a": {"b": 1}}, {"a": {"b": 2}}) == ("a.b", "1", "2")
    assert first_difference({"a": 1}, {"a": 1, "c": [1]}) == ("c", "null", "[1]")
