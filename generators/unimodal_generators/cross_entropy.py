"""Cross-entropy of a linear head that never holds all of its logits.

Letters: M rows with a target, m of them in one chunk, C width, V ids.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

BUDGET = 2**25  # logits held at once


def linear_cross_entropy(
    hidden: Float[Tensor, "M C"],
    tables: Sequence[Float[Tensor, "_ C"]],
    targets: Int[Tensor, " M"],
    bias: Float[Tensor, " V"] | None = None,
    weights: Float[Tensor, " M"] | None = None,
) -> Float[Tensor, ""]:
    """Sum of -log softmax(hidden W^T + bias) at the targets, each times its weight (a constant), in fp32 or better.

    W is given as one or several tables of rows, in the order of ids. Gradients are computed with the loss, chunk by chunk
    (as Liger Kernel does, arXiv 2410.10989), so memory is that of the gradients and one chunk, not of M x V logits.
    """
    dtype = hidden.dtype
    if torch.is_autocast_enabled(hidden.device.type) and dtype != torch.float64:  # which autocast leaves alone
        dtype = torch.get_autocast_dtype(hidden.device.type)
    if not torch.is_grad_enabled():  # parameters would ask for gradients here too
        hidden, bias, tables = hidden.detach(), None if bias is None else bias.detach(), [t.detach() for t in tables]
    with torch.autocast(hidden.device.type, enabled=False):
        return _Chunked.apply(hidden, targets, bias, weights, dtype, *tables)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        bias: Tensor | None,
        share: Tensor | None,
        dtype: torch.dtype,
        *tables: Tensor,
    ) -> Tensor:
        wanted = [needed for i, needed in enumerate(ctx.needs_input_grad) if i not in (1, 3, 4)]
        exact = torch.promote_types(dtype, torch.float32)
        weights = [table.to(dtype) for table in tables]
        sizes = [len(w) for w in weights]
        d_hidden = torch.empty_like(hidden) if wanted[0] else None
        d_bias = torch.zeros_like(bias, dtype=exact) if bias is not None and wanted[1] else None
        # One accumulator a table, in fp32 or better: a chunk's share may be far below the sum.
        d_tables = [
            torch.zeros_like(t, dtype=exact) if needed else None for t, needed in zip(tables, wanted[2:], strict=True)
        ]
        total = hidden.new_zeros((), dtype=exact)
        step = max(1, BUDGET // sum(sizes))
        for first in range(0, len(hidden), step):
            h = hidden[first : first + step].to(dtype)  # (m, C)
            at = targets[first : first + step]
            s = torch.cat([(h @ w.T).to(exact) for w in weights], dim=1)  # (m, V)
            if bias is not None:
                s += bias
            loss = s.logsumexp(1) - s.gather(1, at[:, None])[:, 0]  # (m,)
            total += (loss if share is None else loss * share[first : first + step]).sum()
            if not any(wanted):
                continue
            s = s.softmax(1)
            s[torch.arange(len(at), device=s.device), at] -= 1.0  # d loss / d logits
            if share is not None:
                s *= share[first : first + step, None]
            if d_bias is not None:
                d_bias += s.sum(0)
            parts = [part.to(dtype) for part in s.split(sizes, dim=1)]
            if d_hidden is not None:
                d_hidden[first : first + step] = sum(part @ w for part, w in zip(parts, weights, strict=True))
            for d_table, part in zip(d_tables, parts, strict=True):
                if d_table is not None:
                    d_table += part.T @ h
        saved = [d_hidden, d_bias, *(g if g is None else g.to(t.dtype) for g, t in zip(d_tables, tables, strict=True))]
        ctx.kinds = [g is not None for g in saved]
        ctx.save_for_backward(*(g for g in saved if g is not None))
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        # Not in place: a retained graph may ask again.
        d_hidden, d_bias, *d_tables = (next(saved) * grad if kind else None for kind in ctx.kinds)
        return d_hidden, None, d_bias, None, None, *d_tables
