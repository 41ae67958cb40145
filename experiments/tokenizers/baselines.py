"""What no learning of networks reaches: principal components and k-means of patches, at the same rate.

Letters: n patches, D = 3 p^2 values of one, k components or entries.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from sklearn.cluster import MiniBatchKMeans
from sklearn.decomposition import PCA
from torch import Tensor

PATCH = 4
"""The stride of the tokenizers."""
_MOST = 100_000  # patches that are fitted


class Baseline(Protocol):
    """Patches to patches."""

    def __call__(self, patches: Float[np.ndarray, "n D"]) -> Float[np.ndarray, "n D"]:
        """Through the code and back."""


def patches_of(images: Sequence[UInt8[Tensor, "3 H W"]]) -> Float[np.ndarray, "n D"]:
    """All patches of images, 0..255."""
    cut = [rearrange(x, "c (h p) (w q) -> (h w) (p q c)", p=PATCH, q=PATCH) for x in images]
    return torch.cat(cut).double().numpy()


def through(baseline: Baseline, image: UInt8[Tensor, "3 H W"]) -> UInt8[Tensor, "3 H W"]:
    """An image through a baseline, 8 bit."""
    made = torch.from_numpy(baseline(patches_of([image]))).clamp(0, 255).round().to(torch.uint8)
    return rearrange(made, "(h w) (p q c) -> c (h p) (w q)", p=PATCH, q=PATCH, h=image.shape[1] // PATCH)


def fit(name: str, k: int, images: Sequence[UInt8[Tensor, "3 H W"]], seed: int = 0) -> Baseline:
    """ "pca" with k components, or "k-means" with k entries, of the patches of images."""
    patches = patches_of(images)
    if len(patches) > _MOST:
        patches = patches[np.random.default_rng(seed).choice(len(patches), _MOST, replace=False)]
    if name == "pca":
        pca = PCA(k, random_state=seed).fit(patches)
        return lambda patches: pca.inverse_transform(pca.transform(patches))
    means = MiniBatchKMeans(k, batch_size=4096, n_init=1, max_iter=200, random_state=seed).fit(patches)
    return lambda patches: means.cluster_centers_[means.predict(patches)]
