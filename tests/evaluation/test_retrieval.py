"""Retrieval by likelihood: ranks equal those of a whole table, whatever is asked at once; cheats find nothing."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from unimodal.documents import GENERATED, Document, Part
from unimodal.evaluation import likelihood
from unimodal.evaluation.answers import AnswerFolder
from unimodal.evaluation.benchmark import Answer
from unimodal.evaluation.command import main, parse
from unimodal.evaluation.harness import Choice, generate, report, score
from unimodal.evaluation.likelihood import Likelihood, log_likelihoods
from unimodal.evaluation.retrieval import Retrieval
from unimodal.metrics.retrieval import retrieval_recall
from unimodal.model import UnifiedModel

Make = Callable[..., UnifiedModel]
CAPTIONS = [2, 1, 3, 2, 1, 2]  # of each image


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """Six images of the test split, told apart by their shade, one of training, and two more of which there is no file."""
    (tmp_path / "images" / "val2014").mkdir(parents=True)
    images: list[dict[str, Any]] = [{"filename": "t.jpg", "imgid": 99, "split": "train", "sentences": [{"raw": "x"}]}]
    for i in range(8):
        if i < 6:
            Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(tmp_path / "images" / "val2014" / f"{i}.png")
        sentences = [{"raw": f"caption {i} {j}. "} for j in range(CAPTIONS[i % 6])]
        images.append(
            {"filename": f"{i}.png", "filepath": "val2014", "imgid": i, "split": "test", "sentences": sentences}
        )
    (tmp_path / "dataset_flickr30k.json").write_text(json.dumps({"dataset": "flickr30k", "images": images}))
    return tmp_path / "dataset_flickr30k.json", tmp_path / "images"


class Table:
    """Stands for `log_likelihoods`: a number for every image and caption; counts what it is asked."""

    def __init__(self, rule: Callable[[int, int, int], float]) -> None:
        self.rule, self.asked = rule, 0

    def __call__(self, model: Any, prompts: Sequence[Document], choices: Any, end: bool) -> list[list[Likelihood]]:
        assert end
        found = []
        for prompt, listed in zip(prompts, choices, strict=True):
            shade = int(prompt.images[0].getpixel((0, 0))[0]) // 40  # type: ignore[index]
            words = [choice.removesuffix(".").split(" ") for choice in listed]
            found.append([Likelihood(self.rule(shade, int(i), int(j)), 2, False) for _, i, j in words])
            self.asked += len(listed)
        return found


def embedded() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    image_of = torch.tensor([i for i, count in enumerate(CAPTIONS) for _ in range(count)])
    images = torch.nn.functional.normalize(torch.randn(6, 3, generator=generator), dim=1)
    texts = images[image_of] + 0.7 * torch.randn(len(image_of), 3, generator=generator)
    return images, torch.nn.functional.normalize(texts, dim=1), image_of


def scored(benchmark: Retrieval, out: Path, batch: int, model: UnifiedModel) -> Any:
    folder = AnswerFolder(out / "answers", draws=False, samples=1)
    generate(benchmark, benchmark.items(), folder, model, batch=batch)
    return report(benchmark, score(benchmark, benchmark.items(), folder), out, folder.root, {})


@pytest.mark.parametrize("batch", [1, 4, 6])
def test_recalls_are_those_of_the_whole_table(
    make: Make, files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    images, texts, image_of = embedded()
    first = [0, *torch.tensor(CAPTIONS).cumsum(0).tolist()]
    table = Table(lambda shade, i, j: float(images[shade] @ texts[first[i] + j]))
    monkeypatch.setattr(likelihood, "log_likelihoods", table)
    benchmark = Retrieval(*files, candidates=6)
    summary = scored(benchmark, tmp_path / "out", batch, make("flow"))
    expected = retrieval_recall(images, texts, image_of)
    assert {name: number.value for name, number in summary.measures.items()} == pytest.approx(expected)
    assert 0.2 < expected["text_recall@1"] < 1
    assert expected["image_recall@1"] != expected["text_recall@1"]
    assert summary.label == "complete"
    assert table.asked == 66 if batch == 6 else 66 < table.asked <= 132  # 6 images, 11 captions
    assert summary.fingerprint["benchmark"]["candidates"] == {"images": 6, "captions": 11}
    assert summary.measures["image_recall@1"].interval is not None
    assert "caption" in (tmp_path / "out" / "index.html").read_text()


def test_the_right_ones_first_and_nothing_for_cheats(
    make: Make, files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rules: list[tuple[Callable[[int, int, int], float], float, float]] = [
        (lambda shade, i, j: float(shade == i), 1, 1),
        (lambda shade, i, j: 0.0, 0, 0),  # does not look at anything
        (
            lambda shade, i, j: float(i + j),
            1 / 6,
            0,
        ),  # does not look at the image: only 5 1, the likeliest, finds its own
        (lambda shade, i, j: -float(shade == i), 0, 0),
    ]
    for number, (rule, text, image) in enumerate(rules):
        monkeypatch.setattr(likelihood, "log_likelihoods", Table(rule))
        summary = scored(Retrieval(*files, candidates=6), tmp_path / str(number), 6, make("flow"))
        assert summary.measures["text_recall@1"].value == pytest.approx(text)
        assert summary.measures["image_recall@1"].value == image
        assert summary.overall.value == pytest.approx((text + image) / 2)


def test_a_part_of_the_items_has_all_candidates(
    make: Make, files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(likelihood, "log_likelihoods", Table(lambda shade, i, j: float(shade == 0) - 0.5 * (i == 0)))
    benchmark = Retrieval(*files, candidates=6)
    folder = AnswerFolder(tmp_path, draws=False, samples=1)
    items = Choice(limit=2).of(benchmark.items())
    generate(benchmark, items, folder, make("flow"))
    rows = score(benchmark, items, folder)
    assert [(row["text_rank"], row["image_ranks"]) for row in rows] == [(9, [0, 0]), (8, [5])]
    summary = report(benchmark, rows, tmp_path / "out", folder.root, {})
    assert (summary.label, summary.overall, dict(summary.measures)) == ("PARTIAL", None, {})


@pytest.mark.parametrize("wording", ["", "What is it?"])
def test_a_models_own_likelihoods(make: Make, files: tuple[Path, Path], tmp_path: Path, wording: str) -> None:
    model = make("flow")
    benchmark = Retrieval(*files, candidates=3, wording=wording, by="total")
    assert (benchmark.name, Retrieval.name) == ("retrieval-total", "retrieval")
    captions = [f"{' ' if wording else ''}caption {i} {j}." for i in range(3) for j in range(CAPTIONS[i])]
    first, second, *_ = benchmark.answer(model, benchmark.items(), benchmark.settings(None), [0] * 3)
    documents = [
        Document((item.prompt.parts[0], *([Part(wording, learn=False)] if wording else [])))
        for item in benchmark.items()
    ]
    table = [[one.total for one in row] for row in log_likelihoods(model, documents, [captions] * 3, end=True)]
    best = max(table[0][:2])
    assert json.loads(first[0].text) == {
        "text": sum(value >= best for value in table[0][2:]),
        "image": [sum(row[j] >= table[0][j] for row in table[1:]) for j in (0, 1)],
    }
    assert json.loads(second[0].text)["text"] == sum(v >= table[1][2] for j, v in enumerate(table[1]) if j != 2)
    assert scored(benchmark, tmp_path / "out", 2, model).label == "complete"
    assert benchmark.answer(model, [], benchmark.settings(None), []) == []


def test_what_cannot_be_ranked_is_refused(files: tuple[Path, Path]) -> None:
    with pytest.raises(ValueError, match="candidates: expected at least 2 images, got 1"):
        Retrieval(*files, candidates=1)
    with pytest.raises(ValueError, match=r"images\[7\]: expected the image .*6\.png, got no such file"):
        Retrieval(*files, candidates=8).items()
    for i in (6, 7):
        Image.new("RGB", (8, 8)).save(files[1] / f"{i}.png")  # not in the subfolder
    assert len(Retrieval(*files, candidates=8).items()) == 8
    with pytest.raises(ValueError, match="candidates: expected at most 8, the images of the split, got 100"):
        Retrieval(*files).items()
    benchmark = Retrieval(*files, candidates=6)
    for said in ("", "0", '{"text": 0}', '{"text": 0, "image": [0]}', '{"text": 0, "image": [0, -1]}',
                 '{"text": true, "image": [0, 0]}', '{"text": 0, "image": [0, 0.5]}'):  # fmt: skip
        with pytest.raises(ValueError, match=r'answer 0: expected \{"text": number, "image": \[2 numbers\]\}'):
            benchmark.judge([Answer(benchmark.items()[0], 0, (Part(said, role=GENERATED),))])


def test_another_models_ranks_are_scored(
    files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--annotations", str(files[0]), "--image-folder", str(files[1]), "--candidates", "6"]
    benchmark, _ = parse("retrieval", arguments)
    assert isinstance(benchmark, Retrieval)
    folder = AnswerFolder(tmp_path / "theirs", draws=False, samples=1)
    for item, count in zip(benchmark.items(), CAPTIONS, strict=True):
        folder.write(item, 0, [Part(json.dumps({"text": 3, "image": [0] * count}))])
    command = ["retrieval", *arguments, "--images", str(tmp_path / "theirs"), "--out", str(tmp_path / "out")]
    assert main(command) == 0
    record = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert record["overall"] == 0.5
    assert record["measures"]["text_recall@5"]["value"] == 1
    assert "50.0 %" in capsys.readouterr().out
