"""The `sdpa` back end: a packed sequence as dense tiles, never an S x S mask.

Short documents of about one length are a batch with a small mask. A long document is cut into tiles of rows: an image's
rows see everything before them and all of their image, without a mask; rows of text see everything before them and, through
a small triangle, each other. Private blocks of the past are left out of the keys.

Letters: P places of expert order, R rows of the gathered order (padding included), H query heads, K key/value heads,
G = H / K, E channels; in one tile n documents, T rows, M keys.

The whole is one operator with a backward of its own, which `torch.compile` does not look into: a loop over tiles there would
be a new graph a layout.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from unimodal.attention.packed import KV, Q
from unimodal.attention.visibility import SegmentTable, TokenTable, visible

SHORT = 256  # longest document that is one tile of a batch
ROWS = 256  # most rows of a tile of a long document
STEP = 16  # lengths of short documents are padded to multiples of this: little padding, few batches
HIDDEN = -1e30  # finite: a row is never empty, and nothing becomes NaN


@dataclass(frozen=True)
class Tile:
    """Rows `rows` of n documents that lie at `base`, each `stride` rows long, and the keys they see."""

    base: int
    n: int
    stride: int
    rows: tuple[int, int]
    keys: tuple[tuple[int, int], ...]  # ranges, in order; the mask is that of the last `masked` keys
    mask: int  # where its mask (n, T, masked) begins in the buffer
    masked: int  # 0: every row sees every key


class SdpaAttention:
    """One pack, planned: where rows are gathered from and to, the tiles, and their masks."""

    def __init__(self, table: SegmentTable, inverse: Int[Tensor, " S"], count: int) -> None:
        device = inverse.device
        tiles, position, real, masks = _plan(table)
        places = torch.from_numpy(position).to(device)
        self.gather = inverse[places]  # (R,) padding repeats a real row
        # (R,) padding is written behind the last place
        self.scatter = self.gather.masked_fill(~torch.from_numpy(real).to(device), count)
        taken = torch.zeros(count, dtype=torch.bool, device=device).index_fill_(0, inverse, True)
        # Neither is ever shorter than two: a compiler makes rules of lengths 0 and 1, and a new graph where they fail.
        self.empty = F.pad((~taken).nonzero().squeeze(1), (0, 2), value=count)  # places that no token has
        self.masks = F.pad(masks, (0, 2)).to(device)
        self.tiles = _pack_tiles(tiles)

    def layer(self, number: int) -> "SdpaAttention":
        """Itself."""
        return self

    def __call__(self, q: Q, k: KV, v: KV) -> Q:
        """Gather, attend tile by tile, put back."""
        return tiled_attention(q, k, v, self.gather, self.scatter, self.empty, self.tiles, self.masks)[0]


def kernel(device: torch.device) -> str:
    """What runs on a device."""
    return "tiles: fused kernels forward" if device.type == "cpu" else "tiles: matrix products"


# --- the plan, on the host


def _plan(table: SegmentTable) -> tuple[list[Tile], Int[np.ndarray, " R"], np.ndarray, Tensor]:
    """Tiles, the sequence position of each gathered row, whether it is no padding, and every mask end to end."""
    lengths = table.document_lengths
    starts = np.cumsum(lengths) - lengths
    tokens = table.tokens(torch.device("cpu"))
    tiles: list[Tile] = []
    positions: list[np.ndarray] = []
    reals: list[np.ndarray] = []
    masks: list[Tensor] = []
    base = size = 0
    padded = -(-lengths // STEP) * STEP
    for stride in np.unique(padded[lengths <= SHORT]):
        members = np.flatnonzero((padded == stride) & (lengths <= SHORT))
        local = np.arange(stride)
        real = local < lengths[members, None]  # (n, L)
        position = starts[members, None] + local * real  # (n, L); padding repeats the first token
        at = torch.from_numpy(position)
        seen = visible(tokens, at[:, :, None], at[:, None, :])  # (n, L, L)
        seen &= torch.from_numpy(real[:, None, :] | ~real[:, :, None])  # real queries never see padding
        tiles.append(Tile(base, len(members), int(stride), (0, int(stride)), ((0, int(stride)),), size, int(stride)))
        masks.append(seen.flatten())
        positions.append(position.ravel())
        reals.append(real.ravel())
        base, size = base + position.size, size + seen.numel()
    for document in np.flatnonzero(lengths > SHORT):
        for tile, mask in _long(table, tokens, int(document), base, size):
            tiles.append(tile)
            masks += [] if mask is None else [mask.flatten()]
            size += 0 if mask is None else mask.numel()
        positions.append(starts[document] + np.arange(lengths[document]))
        reals.append(np.ones(lengths[document], dtype=bool))
        base += int(lengths[document])
    flat = torch.cat(masks) if masks else torch.zeros(0, dtype=torch.bool)
    hidden = torch.zeros(len(flat)).masked_fill_(~flat, HIDDEN)
    return tiles, np.concatenate(positions), np.concatenate(reals), hidden


def _long(
    table: SegmentTable, tokens: TokenTable, document: int, base: int, size: int
) -> Iterator[tuple[Tile, Tensor | None]]:
    """Tiles of one long document: parts of one large segment, or small segments together."""
    segments = np.flatnonzero(table.document == document)
    first = int(table.start[segments[0]])
    stride = int(table.length[segments].sum())
    past: list[tuple[int, int]] = []  # what later segments see, as ranges
    held: list[int] = []

    def emit(a: int, b: int, own: tuple[int, int]) -> tuple[Tile, Tensor | None]:
        """Rows a to b, which see the past and `own`: all before them, and of themselves what the mask says."""
        at = torch.arange(first + a, first + b)
        seen = visible(tokens, at[:, None], at[None, :])  # rows of a whole image see each other, then no mask is needed
        full = bool(seen.all())
        return Tile(base, 1, stride, (a, b), _joined([*past, own]), size, 0 if full else b - a), None if full else seen

    def close() -> Iterator[tuple[Tile, Tensor | None]]:
        nonlocal size
        if held:
            a, b = int(table.start[held[0]]) - first, int(table.start[held[-1]] + table.length[held[-1]]) - first
            made = emit(a, b, (a, b))
            size += 0 if made[1] is None else made[1].numel()
            yield made
            for s in held:
                _extend(past, table, s, first)
            held.clear()

    for s in segments:
        a, length = int(table.start[s]) - first, int(table.length[s])
        if held and a + length - (int(table.start[held[0]]) - first) > ROWS:
            yield from close()
        # A large image gets tiles of its own, which need no mask; so does what is too long for one tile.
        if length > ROWS or (table.bidirectional[s] and length >= ROWS // 4):
            yield from close()
            for low in range(a, a + length, ROWS):
                high = min(low + ROWS, a + length)
                own = (a, a + length) if table.bidirectional[s] else (a, high)
                made = emit(low, high, own)
                size += 0 if made[1] is None else made[1].numel()
                yield made
            _extend(past, table, int(s), first)
        else:
            held.append(int(s))
    yield from close()


def _extend(past: list[tuple[int, int]], table: SegmentTable, s: int, first: int) -> None:
    if not table.private[s]:
        a = int(table.start[s]) - first
        past[:] = _joined([*past, (a, a + int(table.length[s]))])


def _joined(ranges: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Neighbouring ranges as one."""
    out: list[tuple[int, int]] = []
    for a, b in ranges:
        if out and out[-1][1] == a:
            out[-1] = (out[-1][0], b)
        else:
            out.append((a, b))
    return tuple(out)


def _pack_tiles(tiles: list[Tile]) -> Int[Tensor, " numbers"]:
    """Tiles as one tensor, which an operator can be given."""
    numbers: list[int] = []
    for t in tiles:
        numbers += [t.base, t.n, t.stride, *t.rows, t.mask, t.masked, len(t.keys), *(i for r in t.keys for i in r)]
    return torch.tensor(numbers)


def _unpack_tiles(packed: Int[Tensor, " numbers"]) -> list[Tile]:
    numbers = packed.tolist()
    tiles, i = [], 0
    while i < len(numbers):
        base, n, stride, a, b, mask, masked, count = numbers[i : i + 8]
        i += 8
        flat = numbers[i : i + 2 * count]
        i += 2 * count
        tiles.append(Tile(base, n, stride, (a, b), tuple(zip(flat[::2], flat[1::2], strict=True)), mask, masked))
    return tiles


# --- the operator


@torch.library.custom_op("unimodal::tiled_attention", mutates_args=())
def tiled_attention(
    q: Tensor, k: Tensor, v: Tensor, gather: Tensor, scatter: Tensor, empty: Tensor, tiles: Tensor, masks: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Outputs (P, H, E); for backward, log-sum-exp of every row, tile by tile (R * H,), and q, k, v as gathered."""
    kv_heads, groups = k.shape[1], q.shape[1] // k.shape[1]
    out = _by_place(q, empty)
    q, k, v = (x.index_select(0, gather) for x in (q, k, v))  # (R, H | K | K, E)
    statistics = []
    for document in _by_document(_unpack_tiles(tiles)):
        whole = _Tile(document[0], kv_heads, groups, masks)
        hq, hk, hv = (whole.heads(x, dense=not _is_fused(x)) for x in (q, k, v))
        for tile in document:
            one = _Tile(tile, kv_heads, groups, masks)
            o, lse = one.forward(one.rows(hq), one.keys(hk), one.keys(hv))
            out.index_copy_(0, one.places(scatter), one.flat(o))
            statistics.append(lse.flatten())
    return out[:-1], torch.cat(statistics), q, k, v


@tiled_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, gather: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(q.dtype, torch.float32)
    rows = gather.shape[0]
    gathered_q, gathered_k, gathered_v = (x.new_empty(rows, *x.shape[1:]) for x in (q, k, v))
    return q.new_empty(q.shape), q.new_empty(rows * q.shape[1], dtype=dtype), gathered_q, gathered_k, gathered_v


@torch.library.custom_op("unimodal::tiled_attention_backward", mutates_args=())
def tiled_attention_backward(
    grad: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor,
    gather: Tensor, scatter: Tensor, empty: Tensor, tiles: Tensor, masks: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v, in expert order."""
    kv_heads, groups = k.shape[1], q.shape[1] // k.shape[1]
    grads = [_by_place(x.new_empty(grad.shape[0], *x.shape[1:]), empty) for x in (q, k, v)]
    fused = _is_fused(q) and q.dtype != torch.bfloat16  # whose backward does not reach the matrix units of a CPU
    out = out.index_select(0, gather) if fused else q  # plain products do not ask for it
    grad = grad.index_select(0, gather)
    grad.index_fill_(0, (scatter == len(grads[0]) - 1).nonzero().squeeze(1), 0)  # padding, which nobody read
    at = 0
    for document in _by_document(_unpack_tiles(tiles)):
        whole = _Tile(document[0], kv_heads, groups, masks)
        hq, hk, hv, ho, hg = (whole.heads(x, dense=not fused) for x in (q, k, v, out, grad))
        exact = torch.promote_types(k.dtype, torch.float32)  # one sum over many tiles
        dk, dv = (torch.zeros_like(x, dtype=exact) for x in (hk, hv)) if len(document) > 1 else (None, None)
        for tile in document:
            one = _Tile(tile, kv_heads, groups, masks)
            count = one.n * q.shape[1] * one.height
            inputs = one.rows(hq), one.keys(hk), one.keys(hv), one.rows(ho), one.rows(hg)
            dq, part_k, part_v = one.backward(*inputs, lse[at : at + count])
            grads[0].index_copy_(0, one.places(scatter), one.flat(dq))
            if dk is None or dv is None:
                dk, dv = part_k, part_v  # the only tile sees every key
            else:
                one.add(dk, part_k)
                one.add(dv, part_v)
            at += count
        assert dk is not None
        assert dv is not None
        places = scatter[whole.tile.base : whole.tile.base + whole.n * whole.tile.stride]
        grads[1].index_copy_(0, places, dk.transpose(1, 2).flatten(0, 1).to(k.dtype))  # (n*L, K, E)
        grads[2].index_copy_(0, places, dv.transpose(1, 2).flatten(0, 1).to(v.dtype))
    dq, dk, dv = (g[:-1] for g in grads)
    return dq, dk, dv


@tiled_attention_backward.register_fake
def _(
    grad: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (x.new_empty(grad.shape[0], *x.shape[1:]) for x in (q, k, v))
    return dq, dk, dv


def _setup(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output, *inputs[3:])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    return (*tiled_attention_backward(grad, *ctx.saved_tensors), None, None, None, None, None)


tiled_attention.register_autograd(_backward, setup_context=_setup)


def _by_place(like: Tensor, empty: Tensor) -> Tensor:
    """Room for a row a place and one more, where padding of tiles is written; places that no token has are zero."""
    out = like.new_empty(len(like) + 1, *like.shape[1:])
    return out.index_fill_(0, empty, 0)


def _is_fused(x: Tensor) -> bool:
    """Whether a fused kernel is called, which takes strided heads; matrix products would copy them for every tile."""
    return x.device.type == "cpu"


def _by_document(tiles: list[Tile]) -> Iterator[list[Tile]]:
    """Tiles of the same documents together."""
    for _, group in groupby(tiles, key=lambda tile: tile.base):
        yield list(group)


class _Tile:
    """The arithmetic of one tile. Query heads that share a key head are rows of one matrix, so keys are never repeated."""

    def __init__(self, tile: Tile, kv_heads: int, groups: int, masks: Tensor) -> None:
        self.tile, self.k, self.g = tile, kv_heads, groups
        self.n, self.height = tile.n, tile.rows[1] - tile.rows[0]
        self.masks = masks

    def heads(self, x: Tensor, dense: bool) -> Tensor:
        """(R, heads, E) -> (n, heads, L, E) of this tile's documents, a view unless it is to be dense."""
        x = x[self.tile.base : self.tile.base + self.n * self.tile.stride].unflatten(0, (self.n, -1)).transpose(1, 2)
        return x.contiguous() if dense else x

    def rows(self, x: Tensor) -> Tensor:
        """(n, H, L, E) -> (n, K, G*T, E)."""
        a, b = self.tile.rows
        x = x[:, :, a:b]  # (n, H, T, E)
        return x if self.g == 1 else x.unflatten(1, (self.k, self.g)).flatten(2, 3)

    def keys(self, x: Tensor) -> Tensor:
        """(n, K, L, E) -> (n, K, M, E)."""
        parts = [x[:, :, a:b] for a, b in self.tile.keys]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    def flat(self, x: Tensor) -> Tensor:
        """(n, K, G*T, E) -> (n*T, H, E), the inverse of `rows`."""
        return x.unflatten(2, (self.g, -1)).flatten(1, 2).transpose(1, 2).flatten(0, 1)

    def places(self, scatter: Tensor) -> Tensor:
        """Where those rows belong."""
        a, b = self.tile.rows
        mine = scatter[self.tile.base : self.tile.base + self.n * self.tile.stride]
        return mine.unflatten(0, (self.n, -1))[:, a:b].flatten()

    def add(self, out: Tensor, x: Tensor) -> None:
        """The inverse of `keys`, added to (n, K, L, E)."""
        at = 0
        for a, b in self.tile.keys:
            out[:, :, a:b] += x[:, :, at : at + b - a]
            at += b - a

    def mask(self) -> Tensor | None:
        """(n, 1, 1, T, masked), added to the scores of the last `masked` keys."""
        at, masked = self.tile.mask, self.tile.masked
        if not masked:
            return None
        return self.masks[at : at + self.n * self.height * masked].view(self.n, 1, 1, self.height, masked)

    def whole_mask(self, dtype: torch.dtype) -> Tensor | None:
        """(n, 1, G*T, M), as a fused kernel wants it."""
        mask = self.mask()
        if mask is None:
            return None
        masked, width = self.tile.masked, sum(b - a for a, b in self.tile.keys)
        if width == masked and self.g == 1:
            return mask[:, :, 0].to(dtype)
        full = torch.zeros(self.n, 1, self.g, self.height, width, dtype=dtype, device=mask.device)
        full[..., width - masked :] = mask
        return full.flatten(2, 3)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs (n, K, G*T, E) and log-sum-exp (n, K, G*T)."""
        if _is_fused(q):
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q, k, v, 0.0, False, attn_mask=self.whole_mask(q.dtype)
            )
        return self.plain_forward(q, k, v)

    def backward(self, q: Tensor, k: Tensor, v: Tensor, o: Tensor, do: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
        """Gradients of q, k, v."""
        if _is_fused(q) and q.dtype != torch.bfloat16:
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                do, q, k, v, o, lse.view(q.shape[:-1]), 0.0, False, attn_mask=self.whole_mask(q.dtype)
            )
        return self.plain_backward(q, k, v, do)

    def plain_forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The same as matrix products."""
        s = self.scores(q * q.shape[-1] ** -0.5, k)
        exact = torch.promote_types(q.dtype, torch.float32)
        return s.softmax(-1) @ v, s.to(exact).logsumexp(-1)

    def plain_backward(self, q: Tensor, k: Tensor, v: Tensor, do: Tensor) -> tuple[Tensor, ...]:
        """Gradients from the probabilities P, computed again: they are never kept."""
        scale = q.shape[-1] ** -0.5
        q = q * scale
        p = self.scores(q, k).softmax(-1)  # (n, K, G*T, M); softmax and its gradient add up in fp32 or better
        dp = do @ v.transpose(-1, -2)
        ds = torch._softmax_backward_data(dp, p, -1, q.dtype)
        return (ds @ k).mul_(scale), ds.transpose(-1, -2) @ q, p.transpose(-1, -2) @ do

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """q k^T, masked."""
        s, mask = q @ k.transpose(-1, -2), self.mask()
        if mask is not None:
            s.unflatten(2, (self.g, -1))[..., s.shape[-1] - self.tile.masked :] += mask.to(s.dtype)
        return s
