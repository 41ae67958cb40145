"""Retrieval recall: equal to torchmetrics, and not fooled by equal embeddings."""

import pytest
import torch
from torchmetrics.retrieval import RetrievalHitRate

from unimodal.metrics import retrieval
from unimodal.metrics.retrieval import retrieval_recall


def embeddings(images: int = 40, per_image: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randn(images, 8, generator=generator)
    image_of = torch.arange(images).repeat_interleave(per_image)[
        torch.randperm(images * per_image, generator=generator)
    ]
    return pictures, pictures[image_of] + 1.5 * torch.randn(len(image_of), 8, generator=generator), image_of


@pytest.mark.parametrize("rows", [512, 7])
def test_equals_torchmetrics(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(retrieval, "_ROWS", rows)
    images, texts, image_of = embeddings()
    found = retrieval_recall(images, texts, image_of, (1, 3, 10))
    similarity = torch.nn.functional.cosine_similarity(images[:, None], texts[None], dim=-1)
    right = image_of[None] == torch.arange(len(images))[:, None]
    for name, scores, target in (("text", similarity, right), ("image", similarity.T, right.T)):
        queries = torch.arange(len(scores))[:, None].expand_as(scores)
        for k in (1, 3, 10):
            metric = RetrievalHitRate(top_k=k)
            expected = metric(scores.flatten(), target.flatten(), indexes=queries.flatten())
            assert found[f"{name}_recall@{k}"] == pytest.approx(float(expected), abs=1e-7)
    assert 0.1 < found["text_recall@1"] < 0.9


def test_equal_embeddings_find_nothing() -> None:
    found = retrieval_recall(torch.ones(12, 4), torch.ones(12, 4), torch.arange(12))
    assert set(found.values()) == {0.0}


def test_length_of_an_embedding_is_nothing() -> None:
    images, texts, image_of = embeddings()
    scaled = retrieval_recall(images * torch.rand(len(images), 1) * 9, texts, image_of)
    assert scaled == retrieval_recall(images, texts, image_of)


def test_refusals() -> None:
    images, texts, image_of = embeddings()
    with pytest.raises(ValueError, match="texts: expected one image_of each"):
        retrieval_recall(images, texts[:-1], image_of)
    with pytest.raises(ValueError, match="image_of: expected every image from 0 to 39"):
        retrieval_recall(images, texts, image_of.clamp(max=38))
    with pytest.raises(ValueError, match="images: expected at least one, got none"):
        retrieval_recall(images[:0], texts[:0], image_of[:0])
    with pytest.raises(ValueError, match="ks: expected numbers from 1"):
        retrieval_recall(images, texts, image_of, (0,))
