"""Interleaved documents: is their order as asked, do images show what the text says, do they fit each other?

Letters: N images of one document, D features.

Structure compares kinds ("text", "image") alone. Agreement is CLIP's cosine of an image with the text before it (CLIPScore
without its factor 2.5: J. Hessel et al., EMNLP 2021, arXiv 2104.08718). Consistency is the cosine between images of one
document, in the features of DINO or CLIP (as the image alignment of N. Ruiz et al., DreamBooth, CVPR 2023, arXiv
2208.12242).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics import Metric


@dataclass(frozen=True)
class StructureMatch:
    """How near a document's order of texts and images is to what was asked.

    Attributes:
        distance: least number of parts to put in, leave out or change (Levenshtein).
        similarity: 1 - distance / length of the longer one; 1 where both are empty.
        exact: whether nothing differs.
    """

    distance: int
    similarity: float
    exact: bool


def structure_match(asked: Sequence[str], made: Sequence[str]) -> StructureMatch:
    """Compare two orders of kinds."""
    row = list(range(len(made) + 1))  # distances of what is asked so far to each beginning of what was made
    for i, wanted in enumerate(asked, start=1):
        before, row[0] = row[0], i
        for j, found in enumerate(made, start=1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (wanted != found))
    longest = max(len(asked), len(made))
    return StructureMatch(row[-1], 1 - row[-1] / longest if longest else 1.0, row[-1] == 0)


def cosines(a: Float[Tensor, "N D"], b: Float[Tensor, "N D"]) -> Float[Tensor, " N"]:
    """Cosine of every pair of rows; 0 where one of them is zero."""
    return torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=1)


@dataclass(frozen=True)
class Consistency:
    """How alike the images of one document are, -1 .. 1.

    Attributes:
        pairwise: mean cosine over all pairs.
        first: mean cosine of the later images with the first: drift shows here and not between neighbours.
    """

    pairwise: float
    first: float


def consistency(features: Float[Tensor, "N D"]) -> Consistency:
    """Compare all images of a document; ValueError with fewer than two."""
    n = len(features)
    if n < 2:
        raise ValueError(f"features: expected those of at least 2 images, got {n}")
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    similar = unit @ unit.T  # (N, N)
    upper = torch.triu_indices(n, n, offset=1)
    return Consistency(similar[upper[0], upper[1]].mean().item(), similar[0, 1:].mean().item())


class StructureScore(Metric):
    """Share of documents whose structure is exactly as asked, and their mean similarity; 0 of none."""

    full_state_update = False
    exact: Tensor
    similarity: Tensor
    documents: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("exact", "similarity", "documents"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, asked: Sequence[Sequence[str]], made: Sequence[Sequence[str]]) -> None:
        """Add documents: the kinds that were asked and those that were made."""
        for one, other in zip(asked, made, strict=True):
            match = structure_match(one, other)
            self.exact += match.exact
            self.similarity += match.similarity
            self.documents += 1

    def compute(self) -> dict[str, Tensor]:
        """Means over all documents."""
        documents = self.documents.clamp(min=1)
        return {"exact": self.exact / documents, "similarity": self.similarity / documents}


class TextImageAgreement(Metric):
    """Mean cosine of images with the texts they belong to; every image counts the same. 0 of none."""

    full_state_update = False
    total: Tensor
    images: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("total", "images"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, images: Float[Tensor, "N D"], texts: Float[Tensor, "N D"]) -> None:
        """Add images and their texts, in one space."""
        self.total += cosines(images, texts).sum()
        self.images += len(images)

    def compute(self) -> Tensor:
        """The mean."""
        return self.total / self.images.clamp(min=1)


class ImageConsistency(Metric):
    """Mean consistency of documents, each counting the same; those with fewer than two images are left out. 0 of none."""

    full_state_update = False
    pairwise: Tensor
    first: Tensor
    documents: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("pairwise", "first", "documents"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, features: Float[Tensor, "N D"]) -> None:
        """Add the images of one document."""
        if len(features) < 2:
            return
        found = consistency(features)
        self.pairwise += found.pairwise
        self.first += found.first
        self.documents += 1

    def compute(self) -> dict[str, Tensor]:
        """Means over the documents that have at least two images."""
        documents = self.documents.clamp(min=1)
        return {"pairwise": self.pairwise / documents, "first": self.first / documents}
