"""Benchmarks in validation: each rank its share, together the whole; by one key of a recipe."""

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from unimodal.cli import main
from unimodal.documents import Document, Part
from unimodal.evaluation.benchmark import Answer, Benchmark, Item, Verdict
from unimodal.metrics.features import PixelFeatures, TextImageFeatures, as_drawn
from unimodal.metrics.image_sets import ClipScore, FrechetDistance, KernelDistance
from unimodal.metrics.scores import TaskScores
from unimodal.model import UnifiedModel
from unimodal.training.scores import ValidationScores, ask, compare_images

SHAPES = Path(__file__).parents[2] / "lightning_configs" / "models" / "shapes_mot_flow.yaml"
TINY = """
model:
  init_args:
    model:
      tokenizer: {class_path: unimodal_tokenizers.PatchTokenizer, init_args: {patch: 16}}
      backbone: {width: 32, depth: 1, heads: 2, kv_heads: 2, mlp_width: 48, vocabulary: 400}
      generator: {init_args: {sampling: {steps: 2, guidance: 1.0}}}
    tokenizer_weights: null
    warmup_steps: 1
    benchmarks: [{class_path: unimodal.evaluation.shapes.GenEvalShapes, init_args: {per_task: 2, samples: 1}}]
    image_metrics:
      - class_path: unimodal.metrics.image_sets.FrechetDistance
        init_args:
          width: 12
          allow_few: true
          features: {class_path: unimodal.metrics.features.PixelFeatures, init_args: {size: 2}}
      - class_path: unimodal.metrics.image_sets.FrechetDistance
        init_args:
          width: 3
          allow_few: true
          features: {class_path: unimodal.metrics.features.PixelFeatures, init_args: {size: 1}}
data:
  init_args: {batch_tokens: 512, validation_documents: 2, prompts: 1, workers: 0}
trainer: {max_steps: 2, val_check_interval: 2, precision: 32-true, accelerator: cpu, enable_progress_bar: false}
"""


class Bright(Benchmark):
    """Images are right when they are bright; which are depends on their seeds."""

    name = "bright"
    draws = True
    samples = 3

    def items(self) -> list[Item]:
        from unimodal.documents import Document, Part

        return [Item(f"{i}", "ab"[i % 2], Document((Part("seven", learn=False),))) for i in range(4)]

    def judge(self, answers: list[Answer]) -> list[Verdict]:  # type: ignore[override]
        means = [
            float(torch.frombuffer(bytearray(a.parts[0].image.tobytes()), dtype=torch.uint8).float().mean())
            for a in answers
        ]
        return [Verdict(mean / 255) for mean in means]

    def spec(self) -> dict[str, str]:
        return {}


def test_ranks_together_are_one(make: Callable[..., UnifiedModel]) -> None:
    model, benchmark = make("flow"), Bright()
    whole, parts = TaskScores("ab"), [TaskScores("ab") for _ in range(3)]
    ask(benchmark, model, whole)
    for rank, metric in enumerate(parts):
        ask(benchmark, model, metric, rank, 3)
        assert int(metric.counts.sum()) == 4
    for other in parts[1:]:
        parts[0].merge_state(other)
    assert int(parts[0].counts.sum()) == int(whole.counts.sum()) == 12
    torch.testing.assert_close(
        parts[0].sums, whole.sums, atol=1e-3, rtol=0
    )  # a rounded grey level is 1/255 of one pixel
    assert whole.compute().keys() == {"a", "b", "overall"}


def test_scores_are_means_by_task_and_their_mean() -> None:
    metric = TaskScores(["a", "b"])
    metric.update(["a", "a", "a"], [1.0, 0.0, 0.0])
    assert metric.compute() == {"a": pytest.approx(1 / 3)}
    metric.update(["b"], [1.0])
    assert {k: float(v) for k, v in metric.compute().items()} == pytest.approx({"a": 1 / 3, "b": 1, "overall": 2 / 3})
    with pytest.raises(ValueError, match="tasks: expected some of a, b, got c"):
        metric.update(["c"], [1.0])


def test_one_key_of_a_recipe_scores_every_validation(tmp_path: Path) -> None:
    tiny = tmp_path / "tiny.yaml"
    tiny.write_text(TINY)
    run = tmp_path / "run"
    assert main(["fit", "-c", str(SHAPES), "-c", str(tiny), "--trainer.default_root_dir", str(run)]) == 0
    with (run / "logs" / "version_0" / "metrics.csv").open() as file:
        (row,) = [row for row in csv.DictReader(file) if row.get("val/geneval-shapes/overall")]
    assert {name for name in row if name.startswith("val/geneval-shapes/")} == {
        f"val/geneval-shapes/{task}"
        for task in ("single_object", "two_object", "counting", "colors", "position", "color_attr", "overall")
    }
    assert row["step"] == "1"
    fine, coarse = (float(row[f"val/FrechetDistance/{name}"]) for name in ("pixels12", "pixels3"))
    assert fine > coarse > 0


class Bluest(TextImageFeatures):
    """Mean colours, and texts as what their first word says."""

    def __init__(self) -> None:
        super().__init__("bluest", 3, as_drawn, {})

    def forward(self, pixels: Tensor) -> Tensor:
        return torch.nn.functional.normalize(pixels.float().mean((2, 3)), dim=-1)

    def texts(self, texts: Sequence[str]) -> Tensor:
        assert all("handwritten" in text for text in texts)
        return torch.eye(3)[[2] * len(texts)]

    def spec(self) -> dict[str, Any]:
        return {}


def test_images_are_compared_with_their_captions_where_a_metric_takes_texts(make: Callable[..., UnifiedModel]) -> None:
    metrics = [ClipScore(Bluest()), FrechetDistance(12, features=PixelFeatures(2), allow_few=True)]
    ValidationScores([], metrics)
    parts = (Part("a handwritten seven", learn=False), Part(Image.new("RGB", (8, 8), "blue")))
    compare_images(metrics, make("flow"), [(str(i), Document(parts, "text_to_image")) for i in range(3)])
    assert 0 < float(metrics[0].compute()) < 100
    assert (int(metrics[1].fake_count), int(metrics[1].real_count)) == (3, 3)


def test_what_cannot_be_told_apart_or_compared_is_refused_at_once() -> None:
    pixels = [FrechetDistance(12, features=PixelFeatures(2)) for _ in range(2)]
    with pytest.raises(
        ValueError, match=r"model\.image_metrics: expected each name once, got FrechetDistance/pixels12"
    ):
        ValidationScores([], pixels)
    ValidationScores(
        [], [pixels[0], FrechetDistance(27, features=PixelFeatures(3)), KernelDistance(features=PixelFeatures(2))]
    )
    with pytest.raises(ValueError, match=r"model\.benchmarks: expected each name once, got bright twice"):
        ValidationScores([Bright(), Bright()])
    with pytest.raises(ValueError, match=r"model\.image_metrics: expected metrics of images .*got TaskScores"):
        ValidationScores([], [TaskScores("ab")])


def test_sets_are_no_benchmark_of_single_images() -> None:
    from unimodal.evaluation.image_sets import ImageSets

    with pytest.raises(ValueError, match=r"model\.benchmarks: images scores sets alone; give model\.image_metrics"):
        ValidationScores([ImageSets(reference=Path("."), metrics=["pixels"])])
