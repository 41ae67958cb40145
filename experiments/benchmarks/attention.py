"""Attention of packed sequences against a mask of S x S, and what planning it costs."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from experiments.benchmarks import models, peers
from experiments.benchmarks.cases import TOLERANCE, Case, Settings, grads, worst
from experiments.benchmarks.flops import attention_flops
from experiments.benchmarks.machine import DTYPES
from experiments.benchmarks.results import Result, speedup
from experiments.benchmarks.timing import interleave
from unimodal.attention import SegmentTable, choose_backend, dense_mask, packed_attention, visible
from unimodal.attention.flex import FlexAttention


def heads_of(tokens: int, heads: int, head_dim: int, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    """Random queries, keys, values and a gradient of the output."""
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(tokens, heads, head_dim, generator=rng).to(device, dtype) for _ in range(4)]


def both_ways(run: Callable[..., Tensor], inputs: list[Tensor]) -> Callable[[], object]:
    """Forward and backward."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs[:3]]
    return lambda: torch.autograd.grad(run(*leaves), leaves, inputs[3])


def compare(
    settings: Settings, table: SegmentTable, dtype: torch.dtype, heads: int, head_dim: int, peer: str
) -> Result:
    """Forward and backward over `table` against fused attention with the dense mask; checked in float64."""
    inverse = models.expert_order(table)
    attention = packed_attention(choose_backend("auto", torch.device("cpu")), table, inverse, len(table)).layer(0)
    mask = dense_mask(table.tokens(torch.device("cpu")))
    inputs = heads_of(len(table), heads, head_dim, dtype)
    masked = functools.partial(peers.masked_attention, mask=mask)
    candidates = {"ours": both_ways(attention, inputs), "peer": both_ways(masked, inputs)}
    times = interleave(candidates, settings.repeats, warmup=settings.warmup)

    # The peer's order is the sequence's, ours is the experts': the same numbers, put in place.
    exact = packed_attention("reference", table, inverse, len(table)).layer(0)
    found = grads(attention, tuple(inputs[:3]), inputs[3])
    expected = grads(exact, tuple(x.double() for x in inputs[:3]), inputs[3].double())
    in_order = [x[inverse] for x in inputs]
    theirs = grads(masked, tuple(in_order[:3]), in_order[3])
    result = speedup(times["ours"], times["peer"], peer=peer)
    result.correct, result.tolerance = worst(list(zip(found, expected))), TOLERANCE[dtype]
    flops = attention_flops(table, heads, head_dim, backward=True)
    result.extra = {
        "peer_correct": worst([(a, b[inverse]) for a, b in zip(theirs, expected)]),
        "useful_gflops": flops / times["ours"].best / 1e9,
        "backend": choose_backend("auto", torch.device("cpu")),
    }
    return result


def spans(settings: Settings, name: str) -> Result:
    """One document of 2048 tokens with 4 images of 256."""
    length, span = settings.size(2048, 64), settings.size(256, 8)
    table = models.segments([models.alternating(length, length // 4 - span, span)])
    return compare(settings, table, DTYPES[name], settings.size(8, 2), settings.size(64, 16), "SDPA, boolean mask")


def packing(settings: Settings) -> Result:
    """8 documents of 256 tokens, half of each an image."""
    half = settings.size(128, 8)
    table = models.segments([[(half, False), (half, True)]] * 8)
    heads, head_dim = settings.size(8, 2), settings.size(64, 16)
    return compare(settings, table, torch.float32, heads, head_dim, "SDPA, dense document mask")


def plan_table(length: int, span: int, every: int) -> SegmentTable:
    """One document with an image of `span` tokens every `every`."""
    runs: list[tuple[int, bool]] = []
    while (left := length - sum(n for n, _ in runs)) > 0:
        runs += [(min(every - span, left), False)]
        runs += [(min(span, left - runs[-1][0]), True)] if left > runs[-1][0] else []
    return models.segments([runs])


def mask_plan(settings: Settings) -> Result:
    """Milliseconds for flex's block mask of 8192 tokens; the peer evaluates the rule on all of S x S."""
    length = settings.size(8192, 512)
    table = plan_table(length, settings.size(256, 32), settings.size(700, 100))
    order, tokens = torch.arange(length), table.tokens(torch.device("cpu"))

    def rule(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return visible(tokens, q, k)

    def plan() -> Any:
        return FlexAttention(table, order, length).mask()

    def evaluate() -> Any:
        return create_block_mask(rule, None, None, length, length, device="cpu")

    ours = interleave({"ours": plan}, settings.repeats, inner=settings.size(20, 1))["ours"]
    peer = interleave({"peer": evaluate}, settings.size(5, 1), warmup=1)["peer"]
    found, expected = plan().to_dense(), evaluate().to_dense()
    return Result(
        name="", value=1e3 * ours.best, unit="ms", peer="create_block_mask, eager", value_median=1e3 * ours.median,
        correct=float((found != expected).double().mean()), tolerance=0.0, extra={"speedup": peer.best / ours.best},
    ).timed(ours, peer)  # fmt: skip


CASES: dict[str, Case] = {
    "attention_fp32": functools.partial(spans, name="fp32"),
    "attention_bf16": functools.partial(spans, name="bf16"),
    "packing": packing,
    "mask_plan_ms": mask_plan,
}
