"""The `flex` back end: torch's FlexAttention, told on the host which blocks it skips and which need no mask.

Letters: S tokens, P places of expert order, R rows of the padded sequence, n = R / 128 its blocks, H query heads, K
key/value heads, E channels.

The padded sequence holds the tokens in sequence order, then the padding places of expert order, then rows that nothing
fills. What is no token is a document of its own and sees itself, so that no row is empty.

The rule of `visibility` in two numbers a token, which is what the kernel reads: a query sees a key iff
`key <= last[query]` (the end of the query's block, or the query itself) and `query < until[key]` (the end of the key's block
if that is private, else of its document).

No kernel options: ROWS_GUARANTEED_SAFE holds where each row sees something in the *first* block it visits, and a block
may hold two documents or a hidden private one; BLOCKS_ARE_CONTIGUOUS fails wherever something private lies in the past.
"""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor

from unimodal.attention.packed import KV, Q
from unimodal.attention.visibility import SegmentTable
from unimodal.environment import can_compile

BLOCK = 128  # rows and keys of a block, which is FlexAttention's default
COMPILED = 64  # padded lengths that may be compiled for; eight an octave, a run meets two or three
CHANNELS = 16  # fewest channels of a head that the kernels take


class FlexAttention:
    """One pack, planned: where its rows are, which blocks are looked at, and the two numbers a token.

    Inside the compiled layer, whose lengths are symbols, everything here has static sizes. Dynamo ignores a `torch.compile`
    within a compiled function, and FlexAttention under symbolic lengths has been reported to give silent NaN (pytorch issue
    186775) and checks every bound, so `mark_static` fixes the sizes of what is captured: R is a constant of the graph, and
    only P stays a symbol. A layer is compiled again for a new R, never for a new layout. Other ways out are worse: a
    disabled function breaks the full graph, and an opaque operator would run the forward again to reach a backward that is
    not public.
    """

    def __init__(self, table: SegmentTable, inverse: Int[Tensor, " S"], places: int) -> None:
        device, tokens = inverse.device, len(inverse)
        last, until = sight(table, padded(places))
        partial, full = blocks(last, until)
        arrays = [*ordered(partial), *ordered(full), *ordered(partial.T), *ordered(full.T)]
        # As `BlockMask` takes them: of partial and of full blocks, by row, then the same by column for the backward.
        self.blocks = tuple(_static(a.reshape(1, 1, *a.shape), device) for a in arrays)
        self.last, self.until = _static(last, device), _static(until, device)
        self.inverse = inverse
        empty = torch.ones(places, dtype=torch.bool, device=device).index_fill_(0, inverse, False)
        self.row = tokens - 1 + empty.cumsum(0)  # (P,) rows of padding places ...
        self.row[inverse] = torch.arange(tokens, device=device)  # ... and of tokens
        # A limit hit is an error in the layer's full graph, and outside of it the S x S scores of the eager form.
        config: Any = torch._dynamo.config
        config.recompile_limit = max(config.recompile_limit, COMPILED)

    def layer(self, number: int) -> "FlexAttention":
        """Itself."""
        return self

    def mask(self) -> Any:
        """The `BlockMask`; made where it is used, so that its block size is a constant there too."""
        from torch.nn.attention.flex_attention import BlockMask

        last, until = self.last, self.until
        rows = last.shape[0]
        made: Any = BlockMask  # the type checker cannot see how many `blocks` are
        # A lambda, which the run-time checks of shapes leave alone: torch looks into this function.
        return made(
            (rows, rows), *self.blocks, (BLOCK, BLOCK),
            lambda batch, head, query, key: (key <= last[query]) & (query < until[key]),
        )  # fmt: skip

    def __call__(self, q: Q, k: KV, v: KV) -> Q:
        """Put rows in sequence order, attend, put back."""
        channels = q.shape[-1]
        scale = channels**-0.5
        if channels < CHANNELS:
            q, k, v = (F.pad(x, (0, CHANNELS - channels)) for x in (q, k, v))
        q4, k4, v4 = (self.spread(x) for x in (q, k, v))  # (1, H | K | K, R, E)
        o = _attention(q.device)(q4, k4, v4, block_mask=self.mask(), scale=scale, enable_gqa=q.shape[1] != k.shape[1])
        o = o[0].transpose(0, 1)[: self.inverse.shape[0], :, :channels]  # (S, H, E)
        return q.new_zeros(q.shape[0], q.shape[1], channels).index_copy(0, self.inverse, o)

    def spread(self, x: Tensor) -> Tensor:
        """(P, heads, E) -> (1, heads, R, E). Written, not gathered: the gradient of that is a gather, of a gather a sum."""
        empty = x.new_zeros(1, x.shape[1], self.last.shape[0], x.shape[2])
        return empty.index_copy(2, self.row, x.transpose(0, 1)[None])


def missing(device: torch.device) -> str | None:
    """Why it cannot run on a device."""
    if device.type == "cpu":
        return "FlexAttention has no backward on a CPU; use sdpa there"
    if device.type != "cuda":
        return f"its kernels need CUDA, the device is {device.type}"
    if importlib.util.find_spec("triton") is None:
        return "its kernels are written in Triton; install triton"
    able, why = can_compile()
    return None if able else f"Triton builds its kernels' launchers, and this machine has {why}"


def kernel(device: torch.device) -> str:
    """What runs on a device."""
    return f"Triton kernels, blocks of {BLOCK}"


def _attention(device: torch.device) -> Callable[..., Any]:
    """FlexAttention as it has to be called here."""
    from torch.nn.attention.flex_attention import flex_attention

    # Within a compiled layer it is part of that graph. On a CPU, where it only serves to check masks, it stays eager.
    eager: Any = flex_attention
    return eager if torch.compiler.is_compiling() or device.type == "cpu" else _compiled()


@functools.cache
def _compiled() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _static(values: np.ndarray, device: torch.device) -> Tensor:
    """On the device, of a size that is a constant of any graph."""
    x = torch.from_numpy(values).to(device, non_blocking=True)
    torch._dynamo.mark_static(x)
    return x


# --- the plan, on the host


def padded(places: int) -> int:
    """Rows of the padded sequence: in steps of an eighth of the octave, and of whole blocks."""
    step = max(BLOCK, (1 << (places - 1).bit_length()) // 16)
    return -(-places // step) * step


def sight(table: SegmentTable, rows: int) -> tuple[Int[np.ndarray, " R"], Int[np.ndarray, " R"]]:
    """The last key each row sees, and the first query that does not see it."""
    end = table.start + table.length
    document_end = np.cumsum(table.document_lengths)[table.document]
    last = np.arange(rows, dtype=np.int32)
    until = last + 1
    tokens = len(table)
    whole = np.repeat(table.bidirectional, table.length)
    last[:tokens] = np.where(whole, np.repeat(end - 1, table.length), last[:tokens])
    until[:tokens] = np.repeat(np.where(table.private, end, document_end), table.length)
    return last, until


def blocks(
    last: Int[np.ndarray, " R"], until: Int[np.ndarray, " R"]
) -> tuple[Bool[np.ndarray, "n n"], Bool[np.ndarray, "n n"]]:
    """Which blocks are seen in part, and which as a whole."""
    first = np.arange(0, len(last), BLOCK, dtype=np.int32)  # (n,)
    final = first + BLOCK - 1
    last, until = last.reshape(-1, BLOCK), until.reshape(-1, BLOCK)  # (n, 128)
    # All keys of an earlier block are early enough, and its first query sees most of them. What is seen of a later
    # block belongs to the query's own, which nothing hides. On the diagonal each row sees itself.
    earlier = first[:, None] >= first
    some = np.where(earlier, until.max(1) > first[:, None], last.max(1)[:, None] >= first)
    full = (last.min(1)[:, None] >= final) & (until.min(1) > final[:, None])
    return some & ~full, full


def ordered(mask: Bool[np.ndarray, "n n"]) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, "n n"]]:
    """How many blocks each row has, and their numbers, rising, before the others'."""
    return mask.sum(1, dtype=np.int32), np.argsort(~mask, axis=1, kind="stable").astype(np.int32)
