"""The nearest of many codes, without a matrix of all distances.

Letters: T vectors, K codes, D channels.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

SEARCH_BYTES = 64 * 2**20  # the largest tokens x entries matrix the search may hold


def nearest_code(
    z: Float[Tensor, "T D"], codes: Float[Tensor, "K D"], max_bytes: int = SEARCH_BYTES
) -> Int64[Tensor, " T"]:
    """ids = argmin_k |z - e_k|^2 = argmax_k <z, e_k>, for vectors of equal length (ViT-VQGAN, section 3.2).

    Searches as many tokens at a time as keep the similarity matrix within `max_bytes` (one token at the least).
    """
    rows = max(1, max_bytes // (len(codes) * z.element_size()))
    return torch.cat([(part @ codes.T).argmax(-1) for part in z.split(rows)])  # (T,)


def nearest_code_of_any_length(
    z: Float[Tensor, "T D"], codes: Float[Tensor, "K D"], max_bytes: int = SEARCH_BYTES
) -> Int64[Tensor, " T"]:
    """ids = argmin_k |z - e_k|^2 = argmax_k <(z, 1), (e_k, -|e_k|^2 / 2)>: the same search, one channel more."""
    offset = -codes.square().sum(-1, keepdim=True) / 2  # (K, 1)
    return nearest_code(torch.cat([z, torch.ones_like(z[:, :1])], 1), torch.cat([codes, offset], 1), max_bytes)
