"""torchmetrics `Metric`s of sets of images: FID and its relatives, Inception score, precision and recall, CMMD, CLIPScore.

Each takes features (B, D), or uint8 images (B, 3, H, W) where it was given the network. Float images are refused: others
multiply them by 255 and cut, which darkens every pixel by half a step. The network is no part of a metric's state: it is
saved in no checkpoint.

Letters: B images of a batch, N all of them, D the width of the features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from unimodal.metrics import distances
from unimodal.metrics.features import ImageFeatures, LogitFeatures, TextImageFeatures
from unimodal.metrics.manifolds import ManifoldScores, precision_recall_density_coverage
from unimodal.metrics.moments import Moments, moments_of_sums


class SetMetric(Metric):
    """What the metrics share: images become features."""

    full_state_update = False
    is_differentiable = False

    def __init__(self, features: ImageFeatures | None, settings: dict[str, Any]) -> None:
        super().__init__(**settings)
        self._network = (features,)  # in a tuple, so that it is no submodule

    @property
    def features_name(self) -> str:
        """Of the network; empty where features are given."""
        network = self._network[0]
        return "" if network is None else network.name

    def _features(self, images: Shaped[Tensor, "B ..."]) -> Float[Tensor, "B _"]:
        if images.ndim == 2 and images.is_floating_point():
            return images.detach()
        if images.ndim != 4 or images.dtype != torch.uint8:
            raise ValueError(
                "images: expected features (B, D) in floats, or images (B, 3, H, W) in uint8 (round, do not cut: "
                f"(255 * x).round().to(torch.uint8)), got {tuple(images.shape)} in {str(images.dtype)[6:]}"
            )
        network = self._network[0]
        if network is None:
            raise ValueError("images: expected features (B, D), got images, and this metric was given no network")
        with torch.no_grad():
            return self._read(network.to(images.device), images)

    def _read(self, network: ImageFeatures, images: Tensor) -> Tensor:
        return network.of_images(images)


class FrechetDistance(SetMetric):
    """Squared Frechet distance between the moments of real and generated features, in float64 and constant memory.

    Args:
        width: D.
        reference: moments of the real set, so that nothing real need come.
        features: network, where images are given rather than features.
        allow_few: whether fewer features than D will do; the covariance is then singular, and the number compares with no
            other.
        settings: torchmetrics'.
    """

    higher_is_better = False
    real_sum: Tensor
    real_outer: Tensor
    real_count: Tensor
    fake_sum: Tensor
    fake_outer: Tensor
    fake_count: Tensor

    def __init__(
        self,
        width: int,
        reference: Moments | None = None,
        features: ImageFeatures | None = None,
        allow_few: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(features, settings)
        for name, found in (("reference", reference), ("features", features)):
            if found is not None and found.width != width:
                raise ValueError(f"{name}: expected {width} features, got {found.width}")
        self.width, self.reference, self.allow_few = width, reference, allow_few
        for side in ("real", "fake"):
            self.add_state(f"{side}_sum", torch.zeros(width, dtype=torch.float64), dist_reduce_fx="sum")
            self.add_state(f"{side}_outer", torch.zeros(width, width, dtype=torch.float64), dist_reduce_fx="sum")
            self.add_state(f"{side}_count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, images: Shaped[Tensor, "B ..."], real: bool) -> None:
        """Add a batch of real or generated images, or of their features."""
        if real and self.reference is not None:
            raise ValueError("real: expected generated images alone, because the reference was given as statistics")
        values = self._features(images).double()
        if values.shape[1] != self.width:
            raise ValueError(f"images: expected {self.width} features, got {values.shape[1]}")
        side = "real" if real else "fake"
        for name, value in (("sum", values.sum(0)), ("outer", values.T @ values), ("count", len(values))):
            setattr(self, f"{side}_{name}", getattr(self, f"{side}_{name}") + value)

    def compute(self) -> Tensor:
        """The distance; ValueError for fewer features than D unless that was allowed."""
        fake = self.moments(real=False)
        real = self.reference or self.moments(real=True)
        for name, moments in (("generated", fake), ("real", real)):
            if not self.allow_few and moments.n is not None and moments.n < self.width:
                raise ValueError(
                    f"{name} images: expected at least as many as features, {self.width}, got {moments.n}; fewer make a "
                    "singular covariance and a number that compares with no other (allow_few)"
                )
        return torch.tensor(distances.frechet_distance(real, fake), dtype=torch.float64)

    def moments(self, real: bool) -> Moments:
        """Of what came so far on this process."""
        if real:
            return moments_of_sums(int(self.real_count), self.real_sum, self.real_outer)
        return moments_of_sums(int(self.fake_count), self.fake_sum, self.fake_outer)


class _StoredFeatures(SetMetric):
    """Metrics that need every feature: N x D numbers, where they came (NCCL gathers nothing from a CPU)."""

    real: list[Tensor]
    fake: list[Tensor]

    def __init__(
        self, reference: Float[Tensor, "N D"] | None, features: ImageFeatures | None, settings: dict[str, Any]
    ) -> None:
        super().__init__(features, settings)
        self.reference = reference
        self.add_state("real", [], dist_reduce_fx="cat")
        self.add_state("fake", [], dist_reduce_fx="cat")

    def update(self, images: Shaped[Tensor, "B ..."], real: bool) -> None:
        """Add a batch of real or generated images, or of their features."""
        if real and self.reference is not None:
            raise ValueError("real: expected generated images alone, because the reference was given")
        (self.real if real else self.fake).append(self._features(images))

    def _sets(self) -> tuple[Tensor, Tensor]:
        if not len(self.fake) or (self.reference is None and not len(self.real)):
            raise ValueError("images: expected real and generated ones, got none of one kind")
        real = dim_zero_cat(self.real) if self.reference is None else self.reference
        return real, dim_zero_cat(self.fake)


class KernelDistance(_StoredFeatures):
    """KID: mean over subsets of the unbiased squared MMD with a cubic kernel.

    Args:
        subsets: how many are averaged.
        subset_size: features of each set in a subset.
        seed: of the draws.
        reference: features (N, D) of the real set, so that nothing real need come.
        features: network, where images are given rather than features.
        settings: torchmetrics'.
    """

    higher_is_better = False

    def __init__(
        self,
        subsets: int = 100,
        subset_size: int = 1000,
        seed: int = distances.SEED,
        reference: Float[Tensor, "N D"] | None = None,
        features: ImageFeatures | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(reference, features, settings)
        self.subsets, self.subset_size, self.seed = subsets, subset_size, seed

    def compute(self) -> Tensor:
        """The mean."""
        found = distances.kernel_distance(*self._sets(), self.subsets, self.subset_size, self.seed)
        return torch.tensor(found.mean, dtype=torch.float64)


class PrecisionRecall(_StoredFeatures):
    """Precision, recall, density and coverage.

    Args:
        k: neighbour that sets the radius, of precision and recall.
        k_coverage: the same of density and coverage.
        reference: features (N, D) of the real set, so that nothing real need come.
        features: network, where images are given rather than features.
        settings: torchmetrics'.
    """

    higher_is_better = True

    def __init__(
        self,
        k: int = 3,
        k_coverage: int = 5,
        reference: Float[Tensor, "N D"] | None = None,
        features: ImageFeatures | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(reference, features, settings)
        self.k, self.k_coverage = k, k_coverage

    def scores(self) -> ManifoldScores:
        """The four, and which generated images lie among the real ones."""
        real, fake = self._sets()
        return precision_recall_density_coverage(
            real.numpy(force=True), fake.numpy(force=True), self.k, self.k_coverage
        )

    def compute(self) -> dict[str, Tensor]:
        """The four by name."""
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in self.scores().by_name().items()}


class ClipDistance(_StoredFeatures):
    """CMMD: squared MMD of CLIP's embeddings with a Gaussian kernel, times 1000.

    Args:
        reference: embeddings (N, D) of the real set, so that nothing real need come.
        features: network, where images are given rather than embeddings; CMMD is that of ViT-L/14 at 336 pixels.
        settings: torchmetrics'.
    """

    higher_is_better = False

    def __init__(
        self, reference: Float[Tensor, "N D"] | None = None, features: ImageFeatures | None = None, **settings: Any
    ) -> None:
        super().__init__(reference, features, settings)

    def compute(self) -> Tensor:
        """The distance."""
        return torch.tensor(distances.cmmd(*self._sets()), dtype=torch.float64)


class InceptionScore(SetMetric):
    """Inception score of generated images; logits lie on the CPU.

    Args:
        splits: parts that are scored apart and averaged.
        seed: of the permutation before splitting; None: in the order given.
        features: Inception, where images are given rather than logits.
        settings: torchmetrics'.
    """

    higher_is_better = True
    logits: list[Tensor]

    def __init__(
        self,
        splits: int = 10,
        seed: int | None = distances.SEED,
        features: LogitFeatures | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(features, settings)
        self.splits, self.seed = splits, seed
        self.add_state("logits", [], dist_reduce_fx="cat")

    def _read(self, network: ImageFeatures, images: Tensor) -> Tensor:
        assert isinstance(network, LogitFeatures)
        return network.logits(network.of_images(images))

    def update(self, images: Shaped[Tensor, "B ..."], real: bool = False) -> None:
        """Add a batch of generated images, or of their logits; real ones change nothing."""
        if not real:
            self.logits.append(self._features(images))

    def compute(self) -> Tensor:
        """The mean over splits."""
        if not len(self.logits):
            raise ValueError("images: expected generated ones, got none")
        found = distances.inception_score(dim_zero_cat(self.logits), self.splits, self.seed)
        return torch.tensor(found.mean, dtype=torch.float64)


class ClipScore(SetMetric):
    """Mean CLIPScore, 0..100, of images and their texts.

    Args:
        features: CLIP, where images and texts are given rather than embeddings.
        settings: torchmetrics'.
    """

    higher_is_better = True
    total: Tensor
    count: Tensor

    def __init__(self, features: TextImageFeatures | None = None, **settings: Any) -> None:
        super().__init__(features, settings)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, images: Shaped[Tensor, "B ..."], texts: Sequence[str] | Float[Tensor, "_ _"]) -> None:
        """Add images (or embeddings) and the text (or embedding) of each."""
        found = self._features(images)
        if not isinstance(texts, Tensor):
            network = self._network[0]
            if not isinstance(network, TextImageFeatures):
                raise ValueError("texts: expected embeddings (B, D), got texts, and this metric was given no CLIP")
            with torch.no_grad():
                texts = network.to(found.device).texts(texts)
        if len(texts) != len(found):
            raise ValueError(f"texts: expected one for each of {len(found)} images, got {len(texts)}")
        self.total = self.total + distances.clip_score(found, texts).sum()
        self.count = self.count + len(found)

    def compute(self) -> Tensor:
        """The mean over images."""
        if not int(self.count):
            raise ValueError("images: expected at least one, got none")
        return self.total / self.count
