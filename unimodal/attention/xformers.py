"""The `xformers` back end: a packed sequence as block-diagonal problems, with keys gathered for each.

Text is one problem a run: causal from the bottom right, over what its document shows before the run and the run itself; a
hidden private block in between does not end a run. A bidirectional segment is an unmasked problem over all that it sees. A
private text segment is a causal problem of its own.

Letters: P places of expert order, S queries (every token once), N gathered keys (a key once a problem), n problems, H query
heads, K key/value heads, G = H / K, E channels; in one group of problems M queries, L keys.

The whole is one operator with a backward of its own, as in `sdpa`, around xformers' explicit forward and backward: its
dispatch is no code to trace, and its autograd function has no backward for heads in groups.
"""

import importlib
import importlib.util
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from unimodal.attention.packed import KV, Q
from unimodal.attention.visibility import SegmentTable

Range = tuple[int, int]


class Problem(NamedTuple):
    """Queries and the keys they see, as ranges of sequence positions in order."""

    causal: bool  # the last query sees every key, the one before it all but the last ...
    queries: tuple[Range, ...]
    keys: tuple[Range, ...]


class Group(NamedTuple):
    """Problems of one kind, end to end."""

    causal: bool
    q_lengths: list[int]
    k_lengths: list[int]
    q_starts: Int[Tensor, " n+1"]  # int32, on the device
    k_starts: Int[Tensor, " n+1"]


class Kernel(NamedTuple):
    """What solves a group."""

    forward: Callable[..., tuple[Tensor, Tensor]]  # q (M, H, E), k (L, K, E), v, group -> out, log-sum-exp (H, M)
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]  # grad, q, k, v, out, log-sum-exp, group -> dq, dk, dv


class XformersAttention:
    """One pack, planned: the places of all queries and of all their keys, and how long each problem is."""

    def __init__(self, table: SegmentTable, inverse: Int[Tensor, " S"], places: int, kernel: str = "xformers") -> None:
        device = inverse.device
        ordered = sorted(problems(table), key=lambda problem: not problem.causal)  # both groups, causal first
        self.queries = inverse[_positions(problem.queries for problem in ordered).to(device)]  # (S,)
        self.keys = inverse[_positions(problem.keys for problem in ordered).to(device)]  # (N,)
        lengths = np.array([(p.causal, _count(p.queries), _count(p.keys)) for p in ordered])
        starts = [
            np.concatenate([[0], group.cumsum()])
            for side in (lengths[:, 1], lengths[:, 2])
            for group in (side[lengths[:, 0] == 1], side[lengths[:, 0] == 0])
        ]
        self.lengths = torch.from_numpy(lengths)  # (n, 3), on the host
        self.starts = torch.from_numpy(np.concatenate(starts).astype(np.int32).reshape(2, -1)).to(device)  # (2, n + 2)
        self.kernel = kernel

    def layer(self, number: int) -> "XformersAttention":
        """Itself."""
        return self

    def __call__(self, q: Q, k: KV, v: KV) -> Q:
        """Gather, solve, put back."""
        return block_attention(q, k, v, self.queries, self.keys, self.lengths, self.starts, self.kernel)[0]


def missing(device: torch.device) -> str | None:
    """Why it cannot run on a device, and what would help."""
    if importlib.util.find_spec("xformers") is None:
        return "install unimodal[xformers]"
    if device.type != "cuda":
        return f"its kernels need CUDA, the device is {device.type}"
    try:
        _fmha()
    except ImportError as error:
        return f"xformers cannot be imported: {' '.join(str(error).split())}"
    # Without its extension every operator refuses CUDA, also those that are PyTorch's own.
    problem = importlib.import_module("xformers._cpp_lib")._cpp_library_load_exception
    return None if problem is None else " ".join(str(problem).partition("Please")[0].split())


def kernel(device: torch.device) -> str:
    """xformers' names of the operators that run on a device."""
    half, single = (_operators(dtype, device)[0].NAME for dtype in (torch.bfloat16, torch.float32))
    return f"{half} in 16 bits, {single} in 32"


# --- the plan, on the host


def problems(table: SegmentTable) -> Iterator[Problem]:
    """Every token is a query of one of them."""
    run: list[Range] = []  # public text that one problem takes together
    past: list[Range] = []  # what the document shows so far
    document = -1
    for s, (start, length) in enumerate(zip(table.start.tolist(), table.length.tolist(), strict=True)):
        own, private, whole = (start, start + length), bool(table.private[s]), bool(table.bidirectional[s])
        if run and (table.document[s] != document or (whole and not private)):
            yield Problem(True, tuple(run), tuple(past))
            run = []
        if table.document[s] != document:
            document, past = int(table.document[s]), []
        if not private:
            past = _joined(past, own)
        if whole or private:
            yield Problem(not whole, (own,), tuple(_joined(past, own) if private else past))
        else:
            run = _joined(run, own)
    if run:
        yield Problem(True, tuple(run), tuple(past))


def _joined(ranges: Sequence[Range], new: Range) -> list[Range]:
    """One more range, part of the last where it goes on."""
    if ranges and ranges[-1][1] == new[0]:
        return [*ranges[:-1], (ranges[-1][0], new[1])]
    return [*ranges, new]


def _count(ranges: Sequence[Range]) -> int:
    return sum(b - a for a, b in ranges)


def _positions(sides: Iterable[Sequence[Range]]) -> Int[Tensor, " _"]:
    """Ranges written out."""
    first, end = np.array([r for ranges in sides for r in ranges], dtype=np.int64).T
    lengths = end - first
    return torch.from_numpy(np.arange(lengths.sum()) + np.repeat(first - (lengths.cumsum() - lengths), lengths))


# --- the operator


@torch.library.custom_op("unimodal::block_attention", mutates_args=())
def block_attention(
    q: Tensor, k: Tensor, v: Tensor, queries: Tensor, keys: Tensor, lengths: Tensor, starts: Tensor, kernel: str
) -> tuple[Tensor, Tensor]:
    """Outputs (P, H, E) and the log-sum-exp of every query (H, S)."""
    solve = KERNELS[kernel].forward
    out, statistics = torch.zeros_like(q), []
    for group, mine, theirs in _groups(lengths, starts):
        o, lse = solve(q[queries[mine]], k[keys[theirs]], v[keys[theirs]], group)
        out.index_copy_(0, queries[mine], o)
        statistics.append(lse)
    return out, torch.cat(statistics, dim=1)


@block_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, queries: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty(q.shape[1], queries.shape[0], dtype=dtype)


@torch.library.custom_op("unimodal::block_attention_backward", mutates_args=())
def block_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    queries: Tensor, keys: Tensor, lengths: Tensor, starts: Tensor, kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v."""
    solve = KERNELS[kernel].backward
    dtype = torch.promote_types(q.dtype, torch.float32)
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k, dtype=dtype), torch.zeros_like(v, dtype=dtype)
    for group, mine, theirs in _groups(lengths, starts):
        m, n = queries[mine], keys[theirs]
        part_q, part_k, part_v = solve(grad[m], q[m], k[n], v[n], out[m], lse[:, mine], group)
        dq.index_copy_(0, m, part_q)
        dk.index_add_(0, n, part_k.to(dtype))  # a key is in many problems: bf16 would lose most of the sum
        dv.index_add_(0, n, part_v.to(dtype))
    return dq, dk.to(k.dtype, copy=True), dv.to(v.dtype, copy=True)


@block_attention_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], *output, *inputs[3:7])
    ctx.kernel = inputs[7]
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return (*block_attention_backward(grad, *ctx.saved_tensors, ctx.kernel), *(None,) * 5)


block_attention.register_autograd(_backward, setup_context=_setup)


def _groups(lengths: Int[Tensor, "n 3"], starts: Int[Tensor, "2 n+2"]) -> Iterator[tuple[Group, slice, slice]]:
    """Each kind of problem that there is, and its part of the queries and of the keys."""
    rows = lengths.tolist()
    column = q = k = 0
    for causal in (True, False):
        q_lengths, k_lengths = ([row[side] for row in rows if row[0] == causal] for side in (1, 2))
        stop = column + len(q_lengths) + 1
        if q_lengths:
            mine, theirs = slice(q, q + sum(q_lengths)), slice(k, k + sum(k_lengths))
            yield Group(causal, q_lengths, k_lengths, starts[0, column:stop], starts[1, column:stop]), mine, theirs
            q, k = mine.stop, theirs.stop
        column = stop


# --- xformers itself


def _fmha() -> Any:
    """Its memory-efficient attention; imported when it is used, as it is an extra."""
    return importlib.import_module("xformers.ops.fmha")


def _operators(dtype: torch.dtype, device: torch.device) -> tuple[Any, Any]:
    """Forward and backward that agree on the format of log-sum-exp: chosen here, so that the log can name them."""
    half = dtype in (torch.bfloat16, torch.float16) and torch.cuda.get_device_capability(device) >= (8, 0)
    pair = "MemoryEfficientAttentionFlashAttentionOp" if half else "MemoryEfficientAttentionCutlassOp"
    return getattr(_fmha(), pair)


def bias(group: Group) -> Any:
    """The mask of a group as xformers has it, made of tensors that are on the device already."""
    biases = _fmha().attn_bias

    def info(lengths: list[int], starts: Tensor) -> Any:
        listed = [0, *np.cumsum(lengths).tolist()]
        return biases._SeqLenInfo(seqstart=starts, max_seqlen=max(lengths), min_seqlen=min(lengths), seqstart_py=listed)

    kind = biases.BlockDiagonalCausalFromBottomRightMask if group.causal else biases.BlockDiagonalMask
    return kind(info(group.q_lengths, group.q_starts), info(group.k_lengths, group.k_starts))


def _forward(q: Tensor, k: Tensor, v: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    operator = _operators(q.dtype, q.device)[0]
    groups = q.shape[1] // k.shape[1]
    inputs = [q[None], k[None], v[None]]  # (1, M | L, H | K | K, E)
    if groups > 1:  # (1, M | L, K, G, E), keys repeated by a stride of zero
        shared = (x[None, :, :, None].expand(-1, -1, -1, groups, -1) for x in (k, v))
        inputs = [q.unflatten(1, (-1, groups))[None], *shared]
    out, lse = _fmha().memory_efficient_attention_forward_requires_grad(*inputs, bias(group), op=operator)
    lse = lse if groups == 1 else lse.flatten(1, 2)
    if operator.VARLEN_LSE_PACKED:  # (1, H, M)
        lse = lse[0]
    else:  # (n, H, longest)
        lse = torch.cat([row[:, :length] for row, length in zip(lse, group.q_lengths, strict=True)], dim=1)
    return out.view(q.shape), lse


def _gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, group: Group
) -> tuple[Tensor, Tensor, Tensor]:
    operator = _operators(q.dtype, q.device)[1]
    groups = q.shape[1] // k.shape[1]
    if operator.VARLEN_LSE_PACKED:
        lse = lse[None].contiguous()
    else:
        rows = lse.T.split(group.q_lengths)
        lse = pad_sequence(rows, batch_first=True, padding_value=torch.inf).transpose(1, 2).contiguous()
    repeated = (x.repeat_interleave(groups, 1)[None] for x in (k, v))  # no backward has heads in groups
    dq, dk, dv = _fmha().memory_efficient_attention_backward(
        grad[None], out[None], lse, q[None], *repeated, bias(group), op=operator
    )
    dk, dv = (x[0].unflatten(1, (-1, groups)).sum(2) for x in (dk, dv))
    return dq[0], dk, dv


KERNELS = {"xformers": Kernel(_forward, _gradients)}
