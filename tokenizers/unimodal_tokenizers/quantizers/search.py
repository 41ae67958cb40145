"""The nearest of many codes, without a matrix of all distances.

Letters: T vectors, K codes, D channels.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

SEARCH_BYTES = 64 * 2**20  # the largest vectors x entries matrix that a search, or a quantizer, may hold
HOST_BYTES = 16 * 2**20  # on the host: above this, memory is fetched from the system anew for every part


def rows_at_once(entries: int, like: Tensor, max_bytes: int | None = None) -> int:
    """Vectors whose row of so many entries, of the precision and on the device of `like`, fit into the limit; at least 1."""
    limit = max_bytes if max_bytes is not None else HOST_BYTES if like.device.type == "cpu" else SEARCH_BYTES
    return max(1, limit // (entries * like.element_size()))


def nearest_code(
    z: Float[Tensor, "T D"], codes: Float[Tensor, "K D"], max_bytes: int | None = None
) -> Int64[Tensor, " T"]:
    """ids = argmin_k |z - e_k|^2 = argmax_k <z, e_k>, for vectors of equal length (ViT-VQGAN, arXiv 2110.04627).

    Searches as many vectors at a time as keep the similarity matrix within `max_bytes` (one vector at the least).
    """
    rows = rows_at_once(len(codes), z, max_bytes)
    return torch.cat([(part @ codes.T).argmax(-1) for part in z.split(rows)])  # (T,)


def nearest_code_of_any_length(
    z: Float[Tensor, "T D"], codes: Float[Tensor, "K D"], max_bytes: int | None = None
) -> Int64[Tensor, " T"]:
    """ids = argmin_k |z - e_k|^2 = argmax_k <(z, 1), (e_k, -|e_k|^2 / 2)>: the same search, one channel more."""
    offset = -codes.square().sum(-1, keepdim=True) / 2  # (K, 1)
    return nearest_code(torch.cat([z, torch.ones_like(z[:, :1])], 1), torch.cat([codes, offset], 1), max_bytes)
