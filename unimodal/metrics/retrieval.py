"""Retrieval between images and texts, from embeddings or any other similarity.

Letters: I images, M texts, D features (E and N are checked to be D and M), Q queries, K items.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

_ROWS = 512  # queries compared at once, so that I x M similarities are never all held


def retrieval_recall(
    images: Float[Tensor, "I D"],
    texts: Float[Tensor, "M E"],
    image_of: Int[Tensor, " N"],
    ks: Sequence[int] = (1, 5, 10),
) -> dict[str, float]:
    """Recall at k both ways, by cosine similarity: the share of queries with a right item among the first k.

    An image may have several texts: any of them counts, as is usual for COCO and Flickr30k (torchmetrics calls this
    RetrievalHitRate). An item as similar as the right one comes before it, so that equal embeddings find nothing.

    Args:
        images: embeddings, of any length.
        texts: embeddings, of any length.
        image_of: the image of each text, 0 .. I - 1; each image has at least one.
        ks: how many items are looked at.

    Returns:
        "text_recall@k" (a text for an image) and "image_recall@k" (an image for a text), 0..1.

    Raises:
        ValueError: shapes that do not fit, an image without a text, or a k below 1.
    """
    if texts.shape[0] != image_of.shape[0] or images.shape[1] != texts.shape[1]:
        raise ValueError(
            f"texts: expected one image_of each ({len(image_of)}) and {images.shape[1]} features as in images, "
            f"got {tuple(texts.shape)}"
        )
    if not len(images):
        raise ValueError("images: expected at least one, got none")
    if not torch.equal(torch.unique(image_of), torch.arange(len(images), device=image_of.device)):
        raise ValueError(f"image_of: expected every image from 0 to {len(images) - 1}, got others or too few")
    if min(ks) < 1:
        raise ValueError(f"ks: expected numbers from 1, got {min(ks)}")
    images, texts = (torch.nn.functional.normalize(x.double(), dim=1) for x in (images, texts))
    everything = torch.arange(len(images), device=image_of.device)
    found: dict[str, float] = {}
    for name, ranks in (
        ("text", _ranks(images, texts, everything, image_of)),
        ("image", _ranks(texts, images, image_of, everything)),
    ):
        found |= {f"{name}_recall@{k}": float((ranks < k).double().mean()) for k in ks}
    return found


def _ranks(queries: Tensor, items: Tensor, wanted: Tensor, owner: Tensor) -> Tensor:
    """`ranks` of queries and items by their embeddings, some queries at once."""
    found = []
    for rows, want in zip(queries.split(_ROWS), wanted.split(_ROWS), strict=True):
        found.append(ranks(rows @ items.T, owner[None] == want[:, None]))
    return torch.cat(found)


def ranks(similarity: Float[Tensor, "Q K"], right: Bool[Tensor, "Q K"]) -> Int[Tensor, " Q"]:
    """How many wrong items come before the best right one, a query; one that is as similar comes before it."""
    best = similarity.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
    return ((similarity >= best) & ~right).sum(1)
