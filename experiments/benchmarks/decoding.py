"""Decoding: an image with guidance, greedy text, and one step of the key/value cache."""

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from experiments.benchmarks import models, peers
from experiments.benchmarks.cases import FAILURES, Case, Settings, bests, fastest, relative, variants, worst
from experiments.benchmarks.results import Result, speedup
from experiments.benchmarks.timing import interleave
from experiments.benchmarks.training import autocast
from unimodal.attention import KVCache
from unimodal.backbone import Experts
from unimodal.decoding import Session
from unimodal.model import UnifiedModel
from unimodal.packing import Run
from unimodal_generators.base import Branch, Grid
from unimodal_generators.flow import FlowSettings

T = TypeVar("T")
PROMPT, STEPS, GUIDANCE = 32, 16, 3.0
EVALUATIONS = 2 * (STEPS - 1)  # a midpoint solver between 16 times


# --- an image


@torch.no_grad()
def draw(model: UnifiedModel, side: int, evaluations: int, guidance: float = GUIDANCE) -> Tensor:
    """Tokens of one image behind a prompt of random bytes, from seed 0; guidance 1 has no second branch."""
    special = model.text.special
    ids = [special.bos, *(i % 256 for i in range(7, 7 + PROMPT)), special.boi]
    structural = [True, *[False] * PROMPT, True]
    branches = [Branch(), Branch(text=False)][: 1 if guidance == 1 else 2]
    session = Session.start(model, 1, branches, len(ids) + side * side)
    session.append_text([Run(tuple(ids), tuple(structural))])
    settings = FlowSettings(guidance=guidance, steps=evaluations)
    *_, tokens = model.generator.sample(session, [Grid(side, side)], settings, [torch.Generator().manual_seed(0)])
    return tokens.values


def counted(owner: Any, name: str, run: Callable[[], object]) -> int:
    """How often `run` calls a method."""
    method, calls = getattr(owner, name), 0

    @functools.wraps(method)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return method(*args, **kwargs)

    had = name in vars(owner)
    setattr(owner, name, wrapper)
    try:
        run()
    finally:
        setattr(owner, name, method) if had else delattr(owner, name)
    return calls


def our_drawings(settings: Settings, model: UnifiedModel, name: str, side: int) -> dict[str, Callable[[], Tensor]]:
    """Ways to draw in a type: as written or compiled; for bf16, with weights in bf16 or under autocast."""

    def make(way: str, compiled: bool) -> Callable[[], Tensor]:
        own = copy.deepcopy(model).to(torch.bfloat16 if way == "weights" else torch.float32)
        if compiled:
            own.backbone.compile_decoding()

        def run() -> Tensor:
            with autocast("cpu", torch.bfloat16 if way == "autocast" else torch.float32):
                return draw(own, side, EVALUATIONS)

        return run

    ways: dict[str, Callable[[], Tensor]] = {}
    for way in ("autocast", "weights") if name == "bf16" else ("fp32",):
        ways |= variants(settings, f"ours/{way}", functools.partial(make, way))
    return working(ways)


def peer_drawings(peer: Any, name: str, side: int) -> dict[str, Callable[[], object]]:
    """The same of transfusion-pytorch: guidance 3, 16 midpoint steps, stopped when the image is drawn."""
    prompt = torch.arange(7, 7 + PROMPT)

    def run(model: Any, mixed: bool) -> object:
        with torch.no_grad(), autocast("cpu", torch.bfloat16 if mixed else torch.float32):
            return model.sample_one(
                prompt=prompt, force_modality_at_start=(0, (side * side,)), modality_steps=STEPS, cfg_scale=GUIDANCE,
                max_length=side * side - 1,
            )  # fmt: skip

    if name == "fp32":
        return {"peer/fp32": lambda: run(peer, False)}
    cast = copy.deepcopy(peer).bfloat16()
    return working({"peer/autocast": lambda: run(peer, True), "peer/weights": lambda: run(cast, False)})


def working(ways: Mapping[str, Callable[[], T]]) -> dict[str, Callable[[], T]]:
    """Those that run at all; an error of all of them is raised."""
    found: dict[str, Callable[[], T]] = {}
    problem: Exception | None = None
    for way, run in ways.items():
        try:
            run()
            found[way] = run
        except FAILURES as error:
            problem = error
    if not found and problem is not None:
        raise problem
    return found


def t2i(settings: Settings, name: str) -> Result:
    """From a prompt to the image's tokens, both sides with as many network evaluations a branch."""
    config, side = models.peer_s(settings.quick), settings.size(8, 2)
    model = models.unified(config, (side,)).eval()
    ours = our_drawings(settings, model, name, side)
    candidates: dict[str, Callable[[], object]] = dict(ours)
    peer = peers.transfusion(config, side * side, models.LATENT)
    evaluations = {"branches": 2, "ours": EVALUATIONS}
    if peer is not None:
        found = peer_drawings(peer.eval(), name, side)
        candidates |= found
        (drawing,) = peer_drawings(peer, "fp32", side).values()
        # Conditional and unconditional forwards apart, and one that fills the cache of the unconditional history.
        evaluations["peer"] = (counted(peer.transformer, "forward", drawing) - 1) // 2
    times = interleave(candidates, settings.repeats, warmup=1)
    best, other = fastest(times, "ours"), None if peer is None else fastest(times, "peer")
    theirs = None if other is None else other.timing
    result = speedup(best.timing, theirs, peer="transfusion-pytorch", compiled=best.compiled)
    drawn = ours[best.way]()
    assert counted(model.generator, "predict", lambda: draw(model, side, EVALUATIONS)) == EVALUATIONS
    exact = draw(copy.deepcopy(model).double(), side, EVALUATIONS)
    result.correct, result.tolerance = relative(drawn, exact), {"fp32": 1e-3, "bf16": 1e-1}[name]
    result.extra = {"evaluations": evaluations, "way": best.way, "peer_way": other and other.way,
                    "seconds": bests(times)}  # fmt: skip
    if evaluations.get("peer", EVALUATIONS) != EVALUATIONS:
        result.note = f"the peer made {evaluations['peer']} evaluations, we {EVALUATIONS}"
    return result


def guidance(settings: Settings) -> Result:
    """Seconds of an image of 256 tokens with guidance over the whole interval, over those without it."""
    config, side = models.peer_s(settings.quick), settings.size(16, 2)
    model = models.unified(config, (side,)).eval()

    def ways(name: str, scale: float) -> dict[str, Callable[[], Tensor]]:
        def make(compiled: bool) -> Callable[[], Tensor]:
            own = copy.deepcopy(model)
            if compiled:
                own.backbone.compile_decoding()
            return lambda: draw(own, side, STEPS, scale)

        return dict(variants(settings, name, make))

    times = interleave(ways("guided", GUIDANCE) | ways("plain", 1.0), settings.repeats, warmup=1)
    guided, plain = fastest(times, "guided"), fastest(times, "plain")
    exact = copy.deepcopy(model).double()
    result = Result(
        name="", value=guided.timing.best / plain.timing.best, unit="x", peer="guidance 1", compiled=guided.compiled,
        value_median=guided.timing.median / plain.timing.median, tolerance=1e-3,
        correct=relative(draw(model, side, STEPS), draw(exact, side, STEPS)), extra={"seconds": bests(times)},
    )  # fmt: skip
    return result.timed(guided.timing, plain.timing)


# --- text


@torch.no_grad()
def greedy(model: UnifiedModel, prompts: Sequence[Sequence[int]], new: int) -> list[list[int]]:
    """The likeliest `new` ids behind each prompt."""
    session = Session.start(model, len(prompts), [Branch()], max(map(len, prompts)) + new)
    session.append_text([Run(tuple(ids), (False,) * len(ids)) for ids in prompts])
    out: list[list[int]] = [[] for _ in prompts]
    for step in range(new):
        ids = model.backbone.logits(session.last[0]).argmax(-1).tolist()
        for row, token in zip(out, ids, strict=True):
            row.append(token)
        if step < new - 1:
            session.append_text([Run((token,), (False,)) for token in ids])
    return out


@torch.no_grad()
def generate(llama: Any, prompts: Tensor, new: int, static: bool) -> list[list[int]]:
    """The same by transformers."""
    kind = {"cache_implementation": "static"} if static else {}
    mask = torch.ones_like(prompts)
    out = llama.generate(prompts, attention_mask=mask, do_sample=False, max_new_tokens=new, use_cache=True, **kind)
    return out[:, prompts.shape[1] :].tolist()


def text_pair(settings: Settings, context: int) -> tuple[UnifiedModel, Any]:
    """A dense backbone of ours and transformers' Llama with the same weights."""
    config = models.peer_s(settings.quick, experts=Experts(), positions="sequential")
    llama = peers.llama(config, context)
    model = models.unified(config).eval()
    peers.give_weights(llama, model.backbone)
    return model, llama


def decode(settings: Settings, rows: int) -> Result:
    """32 ids read and 128 written, greedily; both must write the same."""
    new = settings.size(128, 4)
    model, llama = text_pair(settings, 2 * (PROMPT + new))
    prompts = torch.randint(0, 256, (rows, PROMPT), generator=torch.Generator().manual_seed(0))

    def make(compiled: bool) -> Callable[[], list[list[int]]]:
        own = copy.deepcopy(model)
        if compiled:
            own.backbone.compile_decoding()
        return functools.partial(greedy, own, prompts.tolist(), new)

    ours = variants(settings, "ours", make)
    ways: dict[str, Callable[[], list[list[int]]]] = {
        "peer/dynamic": functools.partial(generate, llama, prompts, new, False),
        "peer/static": functools.partial(generate, llama, prompts, new, True),
    }
    candidates: dict[str, Callable[[], list[list[int]]]] = {**ours, **working(ways)}
    times = interleave(candidates, settings.repeats, warmup=1)
    best, peer = fastest(times, "ours"), fastest(times, "peer")
    written, expected = torch.tensor(ours[best.way]()), torch.tensor(candidates[peer.way]())
    result = speedup(best.timing, peer.timing, peer="transformers generate", compiled=best.compiled)
    result.correct, result.tolerance = float((written != expected).double().mean()), 0.0
    count = rows * new
    result.extra = {"tokens_per_s": {way: count / t.best for way, t in times.items()}, "peer_way": peer.way}
    return result


# --- one step of the cache


class PastCopies(TorchDispatchMode):
    """Bytes of `past` that operators write to other memory; results smaller than `least` bytes are no copies of it."""

    def __init__(self, past: Sequence[Tensor], least: int) -> None:
        super().__init__()
        self.storages = {x.untyped_storage()._cdata for x in past}
        self.least, self.copied = least, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func`; count the past that it read, if what it wrote is large and lies elsewhere."""
        out = func(*args, **(kwargs or {}))
        read = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and self.holds(x)]
        written = [x for x in tree_leaves(out) if isinstance(x, Tensor) and not self.holds(x)]
        if read and any(x.numel() * x.element_size() >= self.least for x in written):
            self.copied += sum(x.numel() * x.element_size() for x in read)
        return out

    def holds(self, x: Tensor) -> bool:
        """Whether a tensor lies in the past."""
        return x.untyped_storage()._cdata in self.storages


def cache_step(settings: Settings) -> Result:
    """Put one token of every layer behind a past of 4096 and attend to it, a layer."""
    config = models.peer_s(settings.quick)
    layers, heads, e, past = config.depth, config.heads, config.head_size, settings.size(4096, 64)
    rng = torch.Generator().manual_seed(0)
    cache = KVCache(layers, 1, past + 1, heads, e, device=torch.device("cpu"), dtype=torch.float32)
    naive = peers.NaiveCache(layers, keep=False)
    for i in range(layers):
        k, v = (torch.randn(past, heads, e, generator=rng) for _ in range(2))
        cache.k[i, 0, :, :past], cache.v[i, 0, :, :past] = k.transpose(0, 1), v.transpose(0, 1)
        naive.past[i] = k, v
    cache.advance([0], [past])
    new = [[torch.randn(1, heads, e, generator=rng) for _ in range(3)] for _ in range(layers)]

    @torch.no_grad()
    def ours() -> list[Tensor]:
        view = cache.view([0], [1], False)  # not advanced: the next call writes the same place
        return [view.layer(i)(*new[i]) for i in range(layers)]

    @torch.no_grad()
    def peer() -> list[Tensor]:
        return [naive.layer(i)(*new[i]) for i in range(layers)]

    times = interleave({"ours": ours, "peer": peer}, settings.repeats, inner=settings.size(20, 1))
    # One head's keys of the past: whatever is smaller holds scores or outputs.
    least = past * e * 4
    copies = {}
    held = {"ours": [cache.k, cache.v], "peer": [x for pair in naive.past.values() for x in pair]}
    for name, run in (("ours", ours), ("peer", peer)):
        with PastCopies(held[name], least) as mode:
            run()
        copies[name] = mode.copied
    result = speedup(times["ours"], times["peer"], peer="BAGEL's cache, written again", compiled=False)
    result.correct, result.tolerance = worst(list(zip(ours(), peer()))), 1e-4
    result.extra = {
        "us_per_layer": {k: 1e6 * t.best / layers for k, t in times.items()},
        "past_bytes_copied": copies["ours"], "peer_past_bytes_copied": copies["peer"],
    }  # fmt: skip
    if copies["ours"]:
        result.note = f"{copies['ours']} bytes of the past copied, expected 0"
    return result


CASES: dict[str, Case] = {
    "guidance": guidance,
    "t2i_fp32": functools.partial(t2i, name="fp32"),
    "t2i_bf16": functools.partial(t2i, name="bf16"),
    "decode_b1": functools.partial(decode, rows=1),
    "decode_b8": functools.partial(decode, rows=8),
    "cache_step": cache_step,
}
