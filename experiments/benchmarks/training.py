"""Training: a whole step against transfusion-pytorch, its share of the machine, and what packing and compiling cost."""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from experiments.benchmarks import models, peers
from experiments.benchmarks.cases import TOLERANCE, Case, Settings, bests, fastest, variants, worst
from experiments.benchmarks.flops import dense_train_flops, train_flops
from experiments.benchmarks.machine import DTYPES, gemm
from experiments.benchmarks.results import Result, speedup
from experiments.benchmarks.timing import Timing, interleave, threads
from unimodal.attention import choose_backend, packed_attention
from unimodal.backbone import BackboneConfig
from unimodal.environment import can_compile
from unimodal.model import UnifiedModel
from unimodal.packing import PackedSequence

BATCH, TEXT, SIDE = 8, 64, 8  # documents of 64 text and 8 x 8 image tokens


def autocast(device: str, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """bf16 as training runs it; nothing for fp32."""
    return torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16)


def loss_of(model: UnifiedModel, packed: PackedSequence) -> Tensor:
    """Mean text loss plus mean image loss."""
    terms = [term.sum / max(term.count, 1) for term in model(packed).values()]
    return torch.stack(terms).sum()


def step_of(module: torch.nn.Module, loss: Callable[[], Tensor], device: str, dtype: torch.dtype) -> Callable[[], None]:
    """Forward, backward, AdamW."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-4, fused=True)

    def step() -> None:
        with autocast(device, dtype):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def our_step(
    config: BackboneConfig, count: int, dtype: torch.dtype, compiled: bool, text: int = TEXT, side: int = SIDE,
    device: str = "cpu",
) -> Callable[[], None]:  # fmt: skip
    """A train step on `count` packed documents."""
    model = models.unified(config, (side,), device=device).train()
    packed = models.batch(model, count, text, side).to(device)
    if compiled:
        model.backbone.compile()
    return step_of(model, lambda: loss_of(model, packed), device, dtype)


# --- a step of peer-S


def measure(settings: Settings, name: str, count: int) -> dict[str, Timing]:
    """Times of the train step, of the peers and of a matrix product, all in turn, on `count` threads."""
    dtype, config = DTYPES[name], models.peer_s(settings.quick)
    documents, side = settings.size(BATCH, 2), settings.size(SIDE, 2)
    make = functools.partial(our_step, config, documents, dtype, text=TEXT, side=side)
    candidates: dict[str, Callable[[], object]] = dict(variants(settings, "ours", make))
    if count == torch.get_num_threads():
        peer = peers.transfusion(config, side * side, models.LATENT)
        if peer is not None:
            samples = peers.transfusion_batch(config, documents, TEXT, side * side, models.LATENT)
            candidates["peer"] = step_of(peer.train(), lambda: peer(samples), "cpu", dtype)
    text_model = peers.llama(config, 2 * TEXT).train()
    ids = torch.randint(0, config.vocabulary, (documents, TEXT + side * side))
    candidates["llama"] = step_of(text_model, lambda: text_model(input_ids=ids, labels=ids).loss, "cpu", dtype)
    candidates["gemm"] = gemm(dtype, settings.size(1024, 64))[0]
    with threads(count):
        return interleave(candidates, settings.repeats, warmup=settings.warmup)


def measured(settings: Settings, name: str, count: int | None = None) -> dict[str, Timing]:
    """`measure`, once a run."""
    count = count or torch.get_num_threads()
    return settings.once(("train", name, count), lambda: measure(settings, name, count))


def gradient_error(settings: Settings, name: str) -> float:
    """Loss and gradients of a step against those of the dense rule in float64."""

    def make() -> float:
        dtype, config = DTYPES[name], models.peer_s(settings.quick)
        side = settings.size(SIDE, 2)
        model = models.unified(config, (side,)).train()
        exact = models.unified(replace(config, attention="reference"), (side,)).double().train()
        exact.load_state_dict(model.state_dict())
        packed = models.batch(model, 2, TEXT, side)
        if settings.compiles:
            model.backbone.compile()
        with autocast("cpu", dtype):
            loss = loss_of(model, packed)
        reference = loss_of(exact, packed)
        flat = [
            torch.cat([g.flatten().double() for g in torch.autograd.grad(value, list(m.parameters()), allow_unused=True)
                       if g is not None])
            for value, m in ((loss, model), (reference, exact))
        ]  # fmt: skip
        return worst([(loss, reference), (flat[0], flat[1])])

    return settings.once(("gradient", name), make)


def train(settings: Settings, name: str) -> Result:
    """Tokens a second against transfusion-pytorch."""
    times = measured(settings, name)
    best = fastest(times, "ours")
    tokens = settings.size(BATCH, 2) * (TEXT + settings.size(SIDE, 2) ** 2)
    result = speedup(best.timing, times.get("peer"), peer="transfusion-pytorch", compiled=best.compiled)
    result.correct, result.tolerance = gradient_error(settings, name), TOLERANCE[DTYPES[name]]
    result.extra = {"tokens_per_s": tokens / best.timing.best, "seconds": bests(times)}
    if "peer" in times:
        result.extra["peer_tokens_per_s"] = tokens / times["peer"].best
    return result


def flops_share(settings: Settings, name: str, count: int | None = None) -> Result:
    """Useful FLOPs a second over the best matrix product of the same minutes; Llama of the same shape beside it."""
    times, config = measured(settings, name, count), models.peer_s(settings.quick)
    documents, side = settings.size(BATCH, 2), settings.size(SIDE, 2)
    packed = models.batch(models.unified(config, (side,)), documents, TEXT, side)
    useful = train_flops(config, packed, models.LATENT)
    best = fastest(times, "ours")
    product = gemm(DTYPES[name], settings.size(1024, 64))[1]
    peak, peak_median = product / times["gemm"].best, product / times["gemm"].median
    text = dense_train_flops(config, [TEXT + side * side] * documents)
    return Result(
        name="", value=useful / best.timing.best / peak, unit="", peer="GEMM peak", compiled=best.compiled,
        value_median=useful / best.timing.median / peak_median, correct=gradient_error(settings, name),
        tolerance=TOLERANCE[DTYPES[name]],
        extra={"useful_gflop": useful / 1e9, "gemm_gflops": peak / 1e9, "threads": count or torch.get_num_threads(),
               "llama_share": text / times["llama"].best / peak},
    ).timed(best.timing, times["gemm"])  # fmt: skip


# --- packing and compiling


def pack_growth(settings: Settings) -> Result:
    """Time a token of a train step when eight times as many documents of one length are packed."""
    config, text, side = models.peer_s(settings.quick), settings.size(TEXT, 8), settings.size(SIDE, 2)
    length = text + side * side
    small, large = settings.size(4096, 4 * length), settings.size(32768, 8 * length)
    candidates: dict[str, Callable[[], object]] = {}
    for tokens in (small, large):
        make = functools.partial(our_step, config, tokens // length, torch.float32, text=text, side=side)
        candidates |= variants(settings, str(tokens), make)
    times = interleave(candidates, min(settings.repeats, 10), warmup=1)
    few, many = fastest(times, str(small)), fastest(times, str(large))
    ratio = small / large
    return Result(
        name="", value=many.timing.best / few.timing.best * ratio, unit="x", peer=f"pack of {small}",
        compiled=many.compiled, value_median=many.timing.median / few.timing.median * ratio,
        extra={"tokens": [small, large], "seconds": bests(times)},
    ).timed(many.timing, few.timing)  # fmt: skip


def random_pack(model: UnifiedModel, rng: np.random.Generator, sides: tuple[int, ...]) -> PackedSequence:
    """Documents of random lengths; at times only text, at times next to nothing but images."""
    kind = rng.choice(["text", "image", "both", "both"])
    documents = []
    for _ in range(rng.integers(1, 9)):
        text = 2 if kind == "image" else int(rng.integers(3, 80))
        side = 0 if kind == "text" or (kind == "both" and rng.random() < 0.3) else int(rng.choice(sides))
        documents.append(models.document(text, side, rng))
    return models.packed(model, documents, int(rng.integers(1 << 30)))


def recompiles(settings: Settings) -> Result:
    """Graphs that layouts never seen before add after a warm-up of eight."""
    able, why = can_compile()
    if not able and not settings.quick:
        return Result(name="", value=None, unit="graphs", note=f"not measured: {why}")
    counters = torch._dynamo.utils.counters
    sides = (2, 4)
    model = models.unified(replace(models.TINY, width=64), sides).train()
    rng = np.random.default_rng(0)

    def step() -> None:
        loss_of(model, random_pack(model, rng, sides)).backward()

    def graphs() -> int:
        return int(counters["stats"]["unique_graphs"]) + int(counters["aot_autograd"]["total"])

    traced = functools.partial(torch.compile, backend="eager")
    with mock.patch("torch.compile", traced) if settings.quick else mock.patch.dict({}):
        model.backbone.compile()
        for _ in range(settings.size(8, 1)):
            step()
        before = graphs()
        layouts = settings.size(200, 2)
        for _ in range(layouts):
            step()
    return Result(
        name="", value=float(graphs() - before), unit="graphs", compiled=True,
        extra={"layouts": layouts, "graphs_of_warm_up": before, "breaks": sum(counters["graph_break"].values())},
    )  # fmt: skip


def plan_overhead(settings: Settings) -> Result:
    """Share of a train step that goes into planning the attention of its pack."""
    config, side = models.peer_s(settings.quick), settings.size(SIDE, 2)
    model = models.unified(config, (side,)).train()
    packed = models.batch(model, settings.size(BATCH, 2), TEXT, side)
    backend = choose_backend("auto", torch.device("cpu"))
    places = sum(packed.splits)
    candidates: dict[str, Callable[[], object]] = {
        "plan": lambda: packed_attention(backend, packed.table, packed.inverse, places),
        "step": step_of(model, lambda: loss_of(model, packed), "cpu", torch.float32),
    }
    times = interleave(candidates, settings.repeats, warmup=settings.warmup)
    plan, step = times["plan"], times["step"]
    return Result(
        name="", value=plan.best / step.best, unit="", peer="train step", compiled=False,
        value_median=plan.median / step.median,
    ).timed(plan, step)  # fmt: skip


CASES: dict[str, Case] = {
    "train_fp32": functools.partial(train, name="fp32"),
    "train_bf16": functools.partial(train, name="bf16"),
    "flops_share_fp32": functools.partial(flops_share, name="fp32"),
    "flops_share_bf16_1t": functools.partial(flops_share, name="bf16", count=1),
    "flops_share_bf16_2t": functools.partial(flops_share, name="bf16", count=2),
    "pack_growth": pack_growth,
    "recompiles": recompiles,
    "plan_overhead": plan_overhead,
}
