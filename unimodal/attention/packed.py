"""Attention over a packed sequence: one signature, several back ends, chosen once.

Letters: S tokens, H query heads, K key/value heads, E channels of a head; n documents of a group, L their padded length.

Tokens arrive in *expert order* (see `unimodal.packing`); `order[i]` is the sequence position of token i.
"""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unimodal.attention.visibility import TokenTable, dense_mask, visible

Q = Float[Tensor, "S H E"]
KV = Float[Tensor, "S K E"]


@runtime_checkable
class PackedAttention(Protocol):
    """Attention of one packed sequence, ready to be called by every layer."""

    def __call__(self, layer: int, q: Q, k: KV, v: KV) -> Q:
        """Queries, keys and values in expert order -> outputs in expert order."""


BACKENDS: dict[str, Callable[[TokenTable, Int[Tensor, " S"], Int[Tensor, " S"]], PackedAttention]] = {}


def packed_attention(
    backend: str, table: TokenTable, order: Int[Tensor, " S"], inverse: Int[Tensor, " S"]
) -> PackedAttention:
    """The attention of one pack under a back end's name."""
    if backend not in BACKENDS:
        raise ValueError(f"attention: expected one of {', '.join(BACKENDS)}, got {backend}")
    return BACKENDS[backend](table, order, inverse)


class ReferenceAttention:
    """The rule as an S x S mask, everything in fp32 or better: slow, and what the others are compared with."""

    def __init__(self, table: TokenTable, order: Int[Tensor, " S"], inverse: Int[Tensor, " S"]) -> None:
        self.mask = dense_mask(table)[order][:, order]  # (S, S) in expert order

    def __call__(self, layer: int, q: Q, k: KV, v: KV) -> Q:
        """Softmax over every visible key."""
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)  # (S, H, E)
        dtype = torch.promote_types(q.dtype, torch.float32)
        scores = torch.einsum("qhe,khe->hqk", q.to(dtype), k.to(dtype)) * q.shape[-1] ** -0.5
        weights = scores.masked_fill(~self.mask, -torch.inf).softmax(-1)  # (H, S, S)
        return torch.einsum("hqk,khe->qhe", weights, v.to(dtype)).to(q.dtype)


class _Pad(torch.autograd.Function):
    """Rows into padded order. Padding repeats a real row whose copies receive no gradient, so backward is a gather too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gather: Tensor, slots: Tensor, real: Tensor) -> Tensor:
        ctx.save_for_backward(slots)
        return x.index_select(0, gather)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (slots,) = ctx.saved_tensors
        return grad.index_select(0, slots), None, None, None


class _Unpad(torch.autograd.Function):
    """Padded rows back into expert order; padding gets a gradient of exactly zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gather: Tensor, slots: Tensor, real: Tensor) -> Tensor:
        ctx.save_for_backward(gather, real)
        return x.index_select(0, slots)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        gather, real = ctx.saved_tensors
        return grad.index_select(0, gather) * real[:, None, None], None, None, None


class SdpaAttention:
    """Documents as batches: those of similar length are padded to one, so no S x S mask is ever built.

    A padded row repeats its document's first token, as a query that nobody reads and a key that nobody sees.
    """

    STEP = 16  # padded lengths are multiples of this: little padding, few groups

    def __init__(self, table: TokenTable, order: Int[Tensor, " S"], inverse: Int[Tensor, " S"]) -> None:
        device = inverse.device
        lengths = torch.tensor(table.document_lengths, device=device)  # (documents,)
        starts = lengths.cumsum(0) - lengths
        members: dict[int, list[int]] = {}
        for i, length in enumerate(table.document_lengths):
            members.setdefault(-(-length // self.STEP) * self.STEP, []).append(i)
        gathers, reals = [], []
        self.masks: list[Bool[Tensor, "n 1 L L"]] = []
        for padded, documents in sorted(members.items()):
            which = torch.tensor(documents, device=device)
            local = torch.arange(padded, device=device)
            real = local < lengths[which, None]  # (n, L)
            position = starts[which, None] + local * real  # (n, L)
            mask = visible(table, position[:, :, None], position[:, None, :])  # (n, L, L)
            mask = mask & (real[:, None, :] | ~real[:, :, None])  # real queries never see padding
            self.masks.append(mask[:, None])
            gathers.append(inverse[position].flatten())
            reals.append(real.flatten())
        self.rows = [mask.shape[0] * mask.shape[2] for mask in self.masks]  # padded rows of each group
        self.gather, self.real = torch.cat(gathers), torch.cat(reals)  # (padded rows,)
        self.slots = torch.empty_like(inverse)  # where each token lies among the padded rows
        self.slots[self.gather[self.real]] = self.real.nonzero().squeeze(1)

    def __call__(self, layer: int, q: Q, k: KV, v: KV) -> Q:
        """Pad, attend group by group, unpad."""
        index = (self.gather, self.slots, self.real)
        padded = [_Pad.apply(x, *index).split(self.rows) for x in (q, k, v)]  # (n*L, H | K | K, E) a group
        outputs = []
        for mask, *group in zip(self.masks, *padded, strict=True):
            qg, kg, vg = (x.unflatten(0, (mask.shape[0], -1)).transpose(1, 2) for x in group)  # (n, H | K | K, L, E)
            outputs.append(attend(qg, kg, vg, mask).transpose(1, 2).flatten(0, 1))  # (n*L, H, E)
        return _Unpad.apply(torch.cat(outputs), *index)  # (S, H, E)


def attend(
    q: Float[Tensor, "n H L E"],
    k: Float[Tensor, "n K M E"],
    v: Float[Tensor, "n K M E"],
    mask: Bool[Tensor, "n #h L M"],
) -> Float[Tensor, "n H L E"]:
    """Masked attention of a batch; the kernel is chosen by device and type.

    On CPU in bf16 plain matrix products reach the matrix units, the fused kernel does not; softmax is in fp32 either way.
    """
    groups = q.shape[1] // k.shape[1]
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        if groups > 1:
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)  # (n, H, M, E)
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # (n, H, L, M)
        weights = scores.float().masked_fill(~mask, -torch.inf).softmax(-1).to(q.dtype)
        return weights @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=groups > 1)


BACKENDS["reference"] = ReferenceAttention
BACKENDS["sdpa"] = SdpaAttention


def describe(backend: str, device: torch.device) -> str:
    """One line on what will run, for the log."""
    kernel: dict[str, Any] = {"reference": "einsum with an S x S mask", "sdpa": "documents as batches"}
    return f"attention: {backend} ({kernel[backend]}) on {device}"
