"""The metrics: any split into batches, halves of two processes, references, dtypes, and what they refuse."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchmetrics import Metric

from unimodal.metrics import distances
from unimodal.metrics.features import PixelFeatures
from unimodal.metrics.image_sets import (
    ClipDistance,
    ClipScore,
    FrechetDistance,
    InceptionScore,
    KernelDistance,
    PrecisionRecall,
)
from unimodal.metrics.manifolds import precision_recall_density_coverage
from unimodal.metrics.moments import Moments

D = 6


def features(seed: int, n: int, shift: float = 0.0) -> Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy((rng.normal(size=(n, D)) * np.geomspace(2, 0.1, D) + shift).astype(np.float32))


REAL, FAKE = features(0, 90), features(1, 70, 0.3)


def whole(metric: Metric) -> Any:
    return fed(metric, [REAL], [FAKE])


def fed(metric: Metric, real: list[Tensor], fake: list[Tensor]) -> Any:
    for is_real, parts in ((True, real), (False, fake)):
        for part in parts:
            metric.update(part, real=is_real)
    return metric.compute()


def numbers(value: Any) -> list[float]:
    return [float(v) for v in value.values()] if isinstance(value, dict) else [float(value)]


METRICS: dict[str, Callable[..., Metric]] = {
    "frechet": lambda **more: FrechetDistance(D, **more),
    "kernel": lambda **more: KernelDistance(subsets=5, subset_size=40, **more),
    "manifold": lambda **more: PrecisionRecall(**more),
    "cmmd": lambda **more: ClipDistance(**more),
    "inception_score": lambda **more: InceptionScore(splits=4),
}


@pytest.mark.parametrize("name", METRICS)
def test_batches_and_processes_do_not_matter(name: str) -> None:
    expected = numbers(whole(METRICS[name]()))
    split = fed(METRICS[name](), list(REAL.split([1, 40, 49])), list(FAKE.split(13)))
    assert numbers(split) == pytest.approx(expected, rel=1e-9)
    first, second = METRICS[name](), METRICS[name]()
    fed_only(first, REAL[:50], FAKE[:20])
    fed_only(second, REAL[50:], FAKE[20:])
    second_state = {key: torch.cat(v) if isinstance(v, list) and v else v for key, v in second.metric_state.items()}
    second.merge_state(first.metric_state)  # torchmetrics puts the incoming state first
    assert numbers(second.compute()) == pytest.approx(expected, rel=1e-9)
    assert second_state.keys() == first.metric_state.keys()


def fed_only(metric: Metric, real: Tensor, fake: Tensor) -> None:
    metric.update(real, real=True)
    metric.update(fake, real=False)


@pytest.mark.parametrize("name", METRICS)
def test_the_reference_may_be_given(name: str) -> None:
    if name == "inception_score":
        pytest.skip("has none")
    reference = Moments.of(REAL) if name == "frechet" else REAL
    metric = METRICS[name](reference=reference)
    metric.update(FAKE, real=False)
    assert numbers(metric.compute()) == pytest.approx(numbers(whole(METRICS[name]())), rel=1e-9)
    with pytest.raises(ValueError, match="real: expected generated images alone"):
        metric.update(REAL, real=True)
    metric.reset()
    metric.update(FAKE, real=False)  # the reference stays
    metric.compute()


def test_the_numbers_are_those_of_the_formulas() -> None:
    assert float(whole(FrechetDistance(D))) == pytest.approx(
        distances.frechet_distance(Moments.of(REAL), Moments.of(FAKE)), rel=1e-9
    )
    assert float(whole(KernelDistance(7, 50, 3))) == distances.kernel_distance(REAL, FAKE, 7, 50, 3).mean
    assert float(whole(ClipDistance())) == distances.cmmd(REAL, FAKE)
    assert float(whole(InceptionScore(3, None))) == distances.inception_score(FAKE, 3, None).mean
    found = whole(PrecisionRecall(k=2, k_coverage=4))
    slow = precision_recall_density_coverage(REAL.numpy(), FAKE.numpy(), 2, 4)
    assert {name: float(value) for name, value in found.items()} == slow.by_name()
    for metric in (FrechetDistance(D), KernelDistance(5, 40), ClipDistance(), InceptionScore(3)):
        assert whole(metric).dtype == torch.float64


def tensors(metric: Metric) -> dict[str, Tensor]:
    return {name: value for name, value in metric.metric_state.items() if isinstance(value, Tensor)}


def test_frechets_state_is_all_it_keeps() -> None:
    metric = FrechetDistance(2048)
    assert sum(value.numel() for value in tensors(metric).values()) == 2 * (
        2048 * 2048 + 2048 + 1
    )  # the same for 2 and for 50,000 images
    small = FrechetDistance(D)
    before = {name: value.shape for name, value in tensors(small).items()}
    whole(small)
    assert {name: value.shape for name, value in tensors(small).items()} == before
    assert all(value.dtype == torch.float64 for name, value in tensors(small).items() if "count" not in name)
    small.half()  # nor does a model's dtype change it
    assert small.fake_outer.dtype == torch.float64


def test_too_few_images_are_an_error_unless_asked_for() -> None:
    metric = FrechetDistance(D)
    metric.update(REAL, real=True)
    metric.update(FAKE[: D - 1], real=False)
    with pytest.raises(ValueError, match="generated images: expected at least as many as features, 6, got 5"):
        metric.compute()
    with pytest.raises(ValueError, match="real images: expected at least as many as features"):
        fed(FrechetDistance(D), [REAL[:5]], [FAKE])
    metric = FrechetDistance(D, Moments.of(REAL[:5]))
    metric.update(FAKE, real=False)
    with pytest.raises(ValueError, match="real images: expected at least"):
        metric.compute()
    assert float(fed(FrechetDistance(D, allow_few=True), [REAL[:5]], [FAKE[:4]])) > 0
    unknown = FrechetDistance(D, Moments(None, np.zeros(D), np.eye(D)))  # others' files do not say
    unknown.update(FAKE, real=False)
    unknown.compute()


# ---- images


def images(seed: int, n: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (n, 3, 8, 8), dtype=np.uint8))


def test_images_go_through_the_network_and_floats_are_refused() -> None:
    network = PixelFeatures(1)
    metric = FrechetDistance(3, features=network)
    metric.update(images(0, 40), real=True)
    metric.update(images(1, 40), real=False)
    means = [images(seed, 40).float().mean((2, 3)) / 255 for seed in (0, 1)]  # what one pixel is, up to its rounding
    expected = distances.frechet_distance(Moments.of(means[0]), Moments.of(means[1]))
    assert float(metric.compute()) == pytest.approx(expected, rel=0.1)
    for bad in (images(0, 4).float() / 255, images(0, 4)[0], torch.zeros(4, 3, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"images: expected features .* uint8 \(round, do not cut"):
            metric.update(bad, real=False)
    with pytest.raises(ValueError, match="this metric was given no network"):
        FrechetDistance(3).update(images(0, 4), real=True)
    with pytest.raises(ValueError, match="images: expected 3 features, got 6"):
        metric.update(FAKE, real=False)


def test_cutting_instead_of_rounding_would_be_seen() -> None:
    # What the refusal of floats is for: a float image, cut, is darker by half a step on average.
    exact = torch.rand(4000, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    cut, rounded = (255 * exact).to(torch.uint8), (255 * exact).round().to(torch.uint8)
    assert float((cut.float() - 255 * exact).mean()) == pytest.approx(-0.5, abs=0.01)
    assert float((rounded.float() - 255 * exact).mean()) == pytest.approx(0, abs=0.01)


def test_the_network_is_saved_in_no_checkpoint_and_is_not_trained() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.metric = FrechetDistance(3, features=Weighty(1))

    class Weighty(PixelFeatures):
        def __init__(self, size: int) -> None:
            super().__init__(size)
            self.weight = nn.Parameter(torch.zeros(9))

    holder = Holder()
    assert not list(holder.parameters())
    assert not holder.state_dict()
    holder.metric.update(images(0, 5), real=True)
    holder.metric.clone().update(images(0, 5), real=True)


def test_stored_features_stay_where_they_came_as_they_came() -> None:
    metric = KernelDistance(5, 40)
    metric.update(REAL, real=True)
    metric.update(FAKE, real=False)
    assert not metric.compute_on_cpu  # NCCL gathers nothing from a CPU
    assert metric.real[0].dtype == torch.float32


def test_clip_score_of_embeddings() -> None:
    image, text = features(3, 10), features(4, 10)
    metric = ClipScore()
    metric.update(image[:3], text[:3])
    metric.update(image[3:], text[3:])
    assert float(metric.compute()) == pytest.approx(float(distances.clip_score(image, text).mean()))
    other = ClipScore()
    other.update(image[:4], text[:4])
    rest = ClipScore()
    rest.update(image[4:], text[4:])
    other.merge_state(rest)
    assert float(other.compute()) == pytest.approx(float(metric.compute()))
    with pytest.raises(ValueError, match="texts: expected one for each of 10 images, got 9"):
        metric.update(image, text[:9])
    with pytest.raises(ValueError, match="this metric was given no CLIP"):
        metric.update(image, ["a"] * 10)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: FrechetDistance(5, Moments.of(REAL)), "reference: expected 5 features, got 6"),
        (lambda: FrechetDistance(5, features=PixelFeatures(1)), "features: expected 5 features, got 3"),
        (lambda: KernelDistance().compute(), "images: expected real and generated ones, got none"),
        (lambda: InceptionScore().compute(), "images: expected generated ones, got none"),
        (lambda: ClipScore().compute(), "images: expected at least one, got none"),
        (lambda: FrechetDistance(5).compute(), "expected at least 2, got 0"),
    ],
)
def test_bad_use_is_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def one_of_two(rank: int, store: str, found: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mine = (REAL[:23], FAKE[:40]) if rank == 0 else (REAL[23:], FAKE[40:])
    found.put((rank, {name: numbers(fed(METRICS[name](), [mine[0]], [mine[1]])) for name in METRICS}))
    dist.destroy_process_group()


def test_two_processes_find_the_number_of_one(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")  # what is imported stays imported
    found = context.Queue()
    processes = [context.Process(target=one_of_two, args=(rank, str(tmp_path / "store"), found)) for rank in range(2)]
    for process in processes:
        process.start()
    values = dict(found.get(timeout=60) for _ in processes)
    for process in processes:
        process.join(timeout=60)
    assert values[0] == values[1]
    for name in METRICS:
        assert values[0][name] == pytest.approx(numbers(whole(METRICS[name]())), rel=1e-9)
