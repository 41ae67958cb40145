"""Speed and memory on one CUDA device, with random weights; each row in one process with its peer.

Rows and goals are for a card with 80 GB or more; a row that fails says why and leaves the others alone.
"""

import re
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from experiments.benchmarks import evaluation, geneval, models, peers, runner, tokenizers
from experiments.benchmarks.attention import both_ways, heads_of, plan_table
from experiments.benchmarks.blocks import Blocks, ratio
from experiments.benchmarks.blocks import measure as measure_blocks
from experiments.benchmarks.cases import Case, Settings, bests, fastest, grads, relative, worst
from experiments.benchmarks.decoding import generate, greedy
from experiments.benchmarks.flops import attention_flops, train_flops
from experiments.benchmarks.machine import copy_bandwidth, gemm, gemm_peak
from experiments.benchmarks.machine import probe as probe_host
from experiments.benchmarks.memory import loss_memory
from experiments.benchmarks.results import HERE, Goal, Result, speedup
from experiments.benchmarks.timing import Timing, interleave
from experiments.benchmarks.training import autocast, loss_of, our_step
from unimodal.attention import SegmentTable, choose_backend, dense_mask, packed_attention, visible
from unimodal.attention.flex import FlexAttention
from unimodal.backbone import BackboneConfig, Experts
from unimodal.decoding import Session
from unimodal.model import UnifiedModel
from unimodal.packing import Run
from unimodal_generators.base import Block, Branch, Corrupted, Grid, TokenKind

BF16 = torch.bfloat16
# Two towers of 0.84 B each, and 0.13 B of embedding and head.
MOT = BackboneConfig(
    width=2048, depth=18, heads=16, kv_heads=8, mlp_width=5504, vocabulary=32768, positions="block", experts=models.MOT,
    qk_norm=False, tied_head=False,
)  # fmt: skip
# The text tower of a 7B model: 7.6 B with its embedding.
TOWER = BackboneConfig(
    width=3584, depth=28, heads=28, kv_heads=4, mlp_width=18944, vocabulary=152_064, positions="sequential",
    qk_norm=False, tied_head=False,
)  # fmt: skip
TINY = replace(models.TINY, experts=Experts(), positions="sequential")


# --- H1: a packed train step


def train_times(settings: Settings) -> tuple[dict[str, Timing], float, int]:
    """A step on 8192 tokens beside the matrix product; useful FLOPs; peak bytes."""

    def make() -> tuple[dict[str, Timing], float, int]:
        config, side, text = settings.size(MOT, models.TINY), settings.size(32, 2), settings.size(1024, 8)
        step = our_step(config, 4, BF16, settings.compiles, text, side, settings.device)
        runs = {"ours": step, "gemm": gemm(BF16, settings.size(8192, 64), settings.device)[0]}
        times = interleave(runs, settings.repeats, warmup=settings.warmup, wait=settings.wait)
        peak = torch.cuda.max_memory_allocated() if settings.device == "cuda" else 0
        # Lengths are what the FLOPs need of a pack, and a narrow model packs alike.
        narrow = models.unified(replace(config, width=32, heads=2, kv_heads=2, mlp_width=8), (side,))
        return times, train_flops(config, models.batch(narrow, 4, text, side), models.LATENT), peak

    return settings.once("train", make)


def train(settings: Settings, share: bool) -> Result:
    """Useful TF/s, or their share of the best matrix product in the same minutes."""
    times, useful, peak = train_times(settings)
    settings.release()
    ours, product, flops = times["ours"], times["gemm"], 2.0 * settings.size(8192, 64) ** 3
    extra = {"useful_tflop": useful / 1e12, "gemm_tflops": flops / product.best / 1e12, "peak_bytes": peak}
    return Result(
        name="", value=useful / ours.best / (flops / product.best if share else 1e12), unit="",
        value_median=useful / ours.median / (flops / product.median if share else 1e12), compiled=settings.compiles,
        peer="GEMM peak" if share else "", correct=settings.once("loss", lambda: loss_error(settings)), tolerance=2e-2,
        extra=extra,
    ).timed(ours, product)  # fmt: skip


def loss_error(settings: Settings) -> float:
    """The loss of a small pack under autocast against the dense rule in fp32."""
    config, side = settings.size(MOT, models.TINY), settings.size(8, 2)
    model = models.unified(config, (side,), settings.device).train()
    packed = models.batch(model, 4, 64, side).to(settings.device)
    if settings.compiles:
        model.backbone.compile()
    with autocast(settings.device, BF16):
        found = loss_of(model, packed)
    model.backbone.config = replace(config, attention="reference")
    with torch.no_grad():
        return relative(found, loss_of(model, packed))


# --- H2: experts


def experts(settings: Settings, against: str) -> Result:
    """Two experts against one, and against routing by scatter in every projection."""

    def make() -> tuple[dict[str, Timing], float]:
        shape = replace(settings.size(MOT, TINY), depth=2, vocabulary=8, positions="sequential", experts=Experts())
        length = settings.size(1024, 32)
        table = models.segments([models.alternating(2 * length, length, length)] * 4)
        return measure_blocks(settings, Blocks(shape, table, settings.device, BF16), scatter=True)

    times, error = settings.once("experts", make)
    if against == "dense":
        return ratio(times, "mot", "dense", error, peer="dense block", tolerance=5e-2)
    return ratio(times, "scatter", "mot", error, peer="BAGEL's routing, written again", tolerance=5e-2)


# --- H3: attention


def attention_setup(settings: Settings) -> tuple[SegmentTable, Tensor, list[Tensor]]:
    """16384 tokens: four documents, each text and images in turn; 16 heads of 128."""
    length = settings.size(1024, 16)
    table = models.segments([models.alternating(4 * length, length, length)] * 4)
    heads = settings.size((16, 128), (2, 16))
    return table, models.expert_order(table).to(settings.device), heads_of(len(table), *heads, BF16, settings.device)


def attention(settings: Settings, backward: bool) -> Result:
    """Against fused attention with the dense mask."""
    table, inverse, inputs = attention_setup(settings)
    ours = packed_attention(choose_backend("auto", inverse.device), table, inverse, len(table)).layer(0)
    masked = partial(peers.masked_attention, mask=dense_mask(table.tokens(inverse.device)))

    def run(call: Callable[..., Tensor]) -> Callable[[], object]:
        return both_ways(call, inputs) if backward else partial(quiet, call, *inputs[:3])

    runs = {"ours": run(ours), "peer": run(masked)}
    times = interleave(runs, settings.repeats, warmup=settings.warmup, wait=settings.wait)
    found = grads(ours, (inputs[0], inputs[1], inputs[2]), inputs[3])
    in_order = [x[inverse] for x in inputs]
    expected = grads(masked, (in_order[0], in_order[1], in_order[2]), in_order[3])
    result = speedup(times["ours"], times["peer"], peer="SDPA, dense mask")
    # Both sides are bf16: this is the sum of two roundings.
    result.correct, result.tolerance = worst([(a[inverse], b) for a, b in zip(found, expected)]), 5e-2
    heads, head_dim = inputs[0].shape[1:]
    flops = attention_flops(table, heads, head_dim, backward)
    result.extra = {"useful_tflops": flops / times["ours"].best / 1e12,
                    "density": table.pairs / len(table) ** 2,
                    "backend": choose_backend("auto", inverse.device)}  # fmt: skip
    return result


@torch.no_grad()
def quiet(call: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Without gradients."""
    return call(*inputs)


def attention_causal(settings: Settings) -> Result:
    """Useful TF/s, with backward, over those of fused causal attention on as many tokens."""
    table, inverse, inputs = attention_setup(settings)
    ours = packed_attention(choose_backend("auto", inverse.device), table, inverse, len(table)).layer(0)

    def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)[0].transpose(0, 1)

    runs = {"ours": both_ways(ours, inputs), "causal": both_ways(causal, inputs)}
    times = interleave(runs, settings.repeats, warmup=settings.warmup, wait=settings.wait)
    heads, head_dim = inputs[0].shape[1:]
    whole = models.segments([[(len(table), False)]])
    useful, full = (attention_flops(t, heads, head_dim, backward=True) for t in (table, whole))
    rates = [useful / times["ours"].best, full / times["causal"].best]
    medians = [useful / times["ours"].median, full / times["causal"].median]
    return Result(
        name="", value=rates[0] / rates[1], unit="", peer="SDPA, causal", value_median=medians[0] / medians[1],
        extra={"tflops": rates[0] / 1e12, "causal_tflops": rates[1] / 1e12},
    ).timed(times["ours"], times["causal"])  # fmt: skip


# --- H4: the plan


def mask_plan(settings: Settings, against: bool) -> Result:
    """Milliseconds for the block mask of 32768 tokens on the device, or how much faster than evaluating the rule."""
    length = settings.size(32768, 512)
    table = plan_table(length, settings.size(256, 32), settings.size(700, 100))
    order = torch.arange(length, device=settings.device)
    tokens = table.tokens(order.device)

    def rule(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return visible(tokens, q, k)

    def plan() -> Any:
        return FlexAttention(table, order, length).mask()

    def evaluate(heads: int | None = settings.size(28, 2), compiled: bool = not settings.quick) -> Any:
        batch = None if heads is None else 1
        return create_block_mask(rule, batch, heads, length, length, device=settings.device, _compile=compiled)

    inner = settings.size(20, 1)
    ours = interleave({"ours": plan}, settings.repeats, inner=inner, wait=settings.wait)["ours"]
    found = plan().to_dense()
    synced = syncs(settings, plan)
    if not against:
        error = float((found != evaluate(None).to_dense()).double().mean())
        return Result(
            name="", value=1e3 * ours.best, unit="ms", value_median=1e3 * ours.median, correct=error, tolerance=0.0,
            note="" if not synced else f"{synced} synchronisations, expected 0", extra={"synchronisations": synced},
        ).timed(ours)  # fmt: skip
    theirs = interleave({"peer": evaluate}, settings.size(5, 1), wait=settings.wait)["peer"]
    return speedup(ours, theirs, peer="create_block_mask, a head each, compiled")


def syncs(settings: Settings, run: Callable[[], object]) -> int:
    """How often `run` waits for the device."""
    if settings.device != "cuda":
        return 0
    settings.wait()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(w.message) for w in caught)


# --- H7: text, one document


@torch.no_grad()
def naive_greedy(model: UnifiedModel, prompt: Sequence[int], new: int) -> list[int]:
    """`greedy` for one prompt over a cache as BAGEL's."""
    backbone = model.backbone
    cache = peers.NaiveCache(backbone.config.depth)
    ids, start, out = list(prompt), 0, []
    for _ in range(new):
        x = backbone.embedding(torch.tensor(ids, device=model.device))
        positions = torch.arange(start, start + len(ids), device=model.device)[:, None]
        hidden = backbone(x, positions, [len(ids)], cache)
        start += len(ids)
        ids = [int(backbone.logits(hidden[-1:]).argmax())]
        out += ids
    return out


def decode_times(settings: Settings) -> tuple[dict[str, Timing], float, float]:
    """Time of each further token behind 2048, by all; bytes that one token has to read; error of the first logits."""

    def make() -> tuple[dict[str, Timing], float, float]:
        config, device = settings.size(TOWER, TINY), settings.device
        context, more = settings.size(2048, 16), settings.size(64, 2)
        llama = peers.llama(config, 2 * context, device, BF16)
        model = models.unified(config, device=device, dtype=BF16).eval()
        peers.give_weights(llama, model.backbone)
        prompt = torch.randint(0, 256, (1, context), generator=torch.Generator().manual_seed(0))
        ids = prompt.tolist()

        def ours(new: int) -> Callable[[], object]:
            return partial(greedy, model, ids, new)

        runs: dict[str, Callable[[int], Callable[[], object]]] = {
            "ours/eager": ours,
            "hf/eager": lambda new: partial(generate, llama, prompt.to(device), new, False),
            "naive/eager": lambda new: partial(naive_greedy, model, ids[0], new),
        }
        error = first_logits(model, llama, prompt.to(device))
        times = further(settings, runs, more)
        if settings.compiles:
            model.backbone.compile_decoding()
            times |= further(settings, {"ours/compiled": ours}, more)
        layers = sum(p.numel() for p in model.backbone.layers.parameters())
        head = sum(table.numel() for table in model.backbone.tables)
        kept = 2 * config.depth * config.kv_heads * config.head_size * context
        return times, 2.0 * (layers + head + kept), error

    return settings.once("decode", make)


def further(
    settings: Settings, runs: Mapping[str, Callable[[int], Callable[[], object]]], more: int
) -> dict[str, Timing]:
    """Seconds a token beyond the first: what the prompt takes is the best of its own runs."""
    both = {f"{name} {new}": make(new) for name, make in runs.items() for new in (1, 1 + more)}
    times = interleave(both, min(settings.repeats, 10), warmup=settings.warmup, wait=settings.wait)

    def per_token(name: str) -> Timing:
        first = times[f"{name} 1"].best
        return Timing(tuple(max(s - first, 1e-9) / more for s in times[f"{name} {1 + more}"].seconds))

    return {name: per_token(name) for name in runs}


@torch.no_grad()
def first_logits(model: UnifiedModel, llama: Any, prompt: Tensor) -> float:
    """Relative error of the logits behind the prompt; ids of bf16 part where two scores are close."""
    session = Session.start(model, 1, [Branch()], prompt.shape[1] + 1)
    session.append_text([Run(tuple(prompt[0].tolist()), (False,) * prompt.shape[1])])
    return relative(model.backbone.logits(session.last[0])[0], llama(prompt).logits[0, -1])


def decode(settings: Settings, against: str) -> Result:
    """Share of the memory's speed, or how much faster than transformers or than the naive cache."""
    times, read, error = decode_times(settings)
    best = fastest(times, "ours")
    checked = {"correct": error, "tolerance": 5e-2, "compiled": best.compiled}
    extra = {"tokens_per_s": {way: 1 / t.best for way, t in times.items()}, "bytes_per_token": read}
    if against == "memory":
        bandwidth = settings.once("copy", lambda: card_bandwidth(settings))
        share = [read / seconds / bandwidth for seconds in (best.timing.best, best.timing.median)]
        result = Result(name="", value=share[0], unit="", peer="copy bandwidth", value_median=share[1], **checked)  # type: ignore[arg-type]
        result.timed(best.timing)
    else:
        name = {"hf": "transformers generate", "naive": "BAGEL's cache, written again"}[against]
        result = speedup(best.timing, fastest(times, against).timing, peer=name, **checked)
    result.extra = extra
    return result


# --- H8: guidance


def guidance(settings: Settings, full: int) -> Result:
    """A step of two branches over a step of one, for an image of side x side tokens."""
    config, side = settings.size(MOT, models.TINY), settings.size(full, 2)
    model = models.unified(config, (side,), settings.device, BF16).eval()
    grid = Grid(side, side)
    special = model.text.special
    run = Run((special.bos, *range(32), special.boi), (True, *[False] * 32, True))
    blocks = [Block(grid, TokenKind.LEARNED, bidirectional=True, private=True)]
    noise = torch.randn(grid.length, models.LATENT, generator=torch.Generator().manual_seed(0)).to(settings.device)

    def session(branches: int) -> Session:
        made = Session.start(
            model, 1, [Branch(), Branch(text=False)][:branches], len(run.ids) + grid.length
        )  # fmt: skip
        made.append_text([run])
        return made

    @torch.no_grad()
    def step(branches: Session) -> Tensor:
        time = torch.full((1,), 0.5, device=settings.device)
        return branches.peek(model.generator.embed(Corrupted(noise.to(BF16), time, (grid,))), blocks)

    with torch.no_grad():
        one, two = session(1), session(2)
    runs = {"one/eager": partial(step, one), "two/eager": partial(step, two)}
    times = interleave(runs, settings.repeats, warmup=settings.warmup, wait=settings.wait)
    if settings.compiles:
        model.backbone.compile_decoding()
        compiled = {way.replace("eager", "compiled"): call for way, call in runs.items()}
        times |= interleave(compiled, settings.repeats, warmup=settings.warmup, wait=settings.wait)
    error = relative(step(two)[0], step(one)[0])
    a, b = fastest(times, "two"), fastest(times, "one")
    return Result(
        name="", value=a.timing.best / b.timing.best, unit="x", peer="one branch", compiled=a.compiled, correct=error,
        value_median=a.timing.median / b.timing.median, tolerance=2e-2, extra={"seconds": bests(times)},
    ).timed(a.timing, b.timing)  # fmt: skip


# --- all of them


GOALS: dict[str, Goal | None] = {
    "h1_train": Goal(500.0, "TF/s"),
    "h1_train_share": Goal(0.63, ""),
    "h2_mot_tax": Goal(1.03, "x", at_most=True),
    "h2_scatter": Goal(1.25, "x"),
    "h3_attention_forward": Goal(4.0, "x"),
    "h3_attention": Goal(4.0, "x"),
    "h3_attention_causal": Goal(0.85, ""),
    "h4_mask_plan": Goal(0.3, "ms", at_most=True),
    "h4_mask_plan_speedup": Goal(30.0, "x"),
    "h7_decode_share": Goal(0.80, ""),
    "h7_decode_hf": Goal(4.0, "x"),
    "h7_decode_naive": Goal(6.0, "x"),
    "h8_guidance_256": Goal(1.15, "x", at_most=True),
    "h8_guidance_4096": Goal(1.95, "x", at_most=True),
    "h12_loss_memory": Goal(4.0, "x"),
    "fid_features": Goal(0.95, ""),
    "geneval_scoring": Goal(3.0, "x"),
    "code_search": Goal(1.0, "x"),
    "code_search_any_length": Goal(1.0, "x"),
    "vq_encode_share": Goal(0.95, ""),
}
CASES: dict[str, Case] = {
    "h1_train": partial(train, share=False),
    "h1_train_share": partial(train, share=True),
    "h2_mot_tax": partial(experts, against="dense"),
    "h2_scatter": partial(experts, against="scatter"),
    "h3_attention_forward": partial(attention, backward=False),
    "h3_attention": partial(attention, backward=True),
    "h3_attention_causal": attention_causal,
    "h4_mask_plan": partial(mask_plan, against=False),
    "h4_mask_plan_speedup": partial(mask_plan, against=True),
    "h7_decode_share": partial(decode, against="memory"),
    "h7_decode_hf": partial(decode, against="hf"),
    "h7_decode_naive": partial(decode, against="naive"),
    "h8_guidance_256": partial(guidance, full=16),
    "h8_guidance_4096": partial(guidance, full=64),
    "h12_loss_memory": loss_memory,
    **evaluation.CASES,
    **geneval.CASES,
    **tokenizers.CASES,
}


def card_bandwidth(settings: Settings) -> float:
    """Bytes a second, read and written together."""
    return copy_bandwidth(settings.size(2**32, 2**16), settings.repeats, settings.device, settings.wait)


def probe(quick: bool) -> dict[str, Any]:
    """The card in numbers, and its host."""
    settings = Settings(quick=quick, device="cuda")
    host = probe_host(quick=True)
    peak = gemm_peak(BF16, settings.size(8192, 64), 20, "cuda", settings.wait) / 1e9
    return {
        **{key: host[key] for key in ("cpu", "cores", "threads", "memory_gb")},
        "gpu": torch.cuda.get_device_name(),
        "gpu_memory_gb": round(torch.cuda.get_device_properties(0).total_memory / 1e9, 1),
        "cuda": torch.version.cuda,
        "gemm_peak_gflops": {"bf16": peak},
        "gemm_n": settings.size(8192, 64),
        "copy_gb_per_s": {"device": card_bandwidth(settings) / 1e9},
    }


def main(argv: list[str] | None = None) -> int:
    """Every row on the first CUDA device."""
    if not torch.cuda.is_available():
        print("error: bench-gpu needs a CUDA device, found none", file=sys.stderr)
        return 2
    card = re.sub(r"[^a-z0-9]+", "_", torch.cuda.get_device_name().lower()).strip("_")
    return runner.main(
        argv, command="experiments.benchmarks.gpu", about=__doc__, goals=GOALS, cases=CASES, device="cuda",
        out=HERE / "results" / f"gpu_{card}.json", probe=probe,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
