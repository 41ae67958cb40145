"""Layers of two experts against one for all, and against routing by scatter."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from experiments.benchmarks import models
from experiments.benchmarks.cases import Case, Settings, bests, fastest, variants, worst
from experiments.benchmarks.peers import ScatterLayer
from experiments.benchmarks.results import Result
from experiments.benchmarks.timing import Timing, interleave
from unimodal.attention import SegmentTable, choose_backend, packed_attention
from unimodal.backbone import Backbone, BackboneConfig, Experts

Run = Callable[[], list[Tensor]]  # output and gradients, of the input first


@dataclass(frozen=True)
class Blocks:
    """A few layers over documents of as many text as image tokens; every expert has the same weights."""

    shape: BackboneConfig
    table: SegmentTable
    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    def backbone(self, experts: Experts) -> Backbone:
        """The layers, held by `experts`."""
        torch.manual_seed(0)
        with models.made_on(self.device, self.dtype):
            dense = Backbone(replace(self.shape, experts=Experts()))
            made = Backbone(replace(self.shape, experts=experts))
        target = made.state_dict()
        for name, weight in dense.state_dict().items():
            for expert in experts.names:
                target[name.replace("experts.shared", f"experts.{expert}")].copy_(weight)
        return made

    def numbers(self) -> tuple[Tensor, Tensor]:
        """Input and gradient, in sequence order."""
        rng = torch.Generator().manual_seed(0)
        x, grad = (torch.randn(len(self.table), self.shape.width, generator=rng) for _ in range(2))
        return x.to(self.device, self.dtype), grad.to(self.device, self.dtype)

    def attention(self, inverse: Tensor) -> Any:
        """Of this table, for an order of tokens."""
        device = torch.device(self.device)
        return packed_attention(choose_backend("auto", device), self.table, inverse.to(device), len(self.table))

    def ours(self, experts: Experts, compiled: bool) -> Run:
        """Our own layers, forward and backward, in expert order."""
        backbone, tokens = self.backbone(experts), len(self.table)
        if compiled:
            backbone.compile()
        inverse = models.expert_order(self.table)
        order = inverse.argsort()
        attention = self.attention(inverse)
        splits = (tokens // 2, tokens // 2) if len(experts.names) == 2 else (tokens,)
        x, grad = (n[order.to(self.device)] for n in self.numbers())
        x.requires_grad_()
        positions = order[:, None].to(self.device)

        def run() -> list[Tensor]:
            y = backbone(x, positions, splits, attention)
            return [y, *torch.autograd.grad(y, [x, *backbone.layers.parameters()], grad)]

        return run

    def scattered(self) -> Run:
        """The same weights, routed by index sets in every projection, in sequence order."""
        backbone = self.backbone(models.MOT)
        image = torch.from_numpy(self.table.bidirectional.repeat(self.table.length))
        places = [at.nonzero()[:, 0].to(self.device) for at in (~image, image)]
        layers = [ScatterLayer(layer, places) for layer in backbone.layers]
        order = torch.arange(len(self.table))
        attention, rotary = self.attention(order), backbone.rotary(order[:, None].to(self.device))
        x, grad = self.numbers()
        x.requires_grad_()

        def run() -> list[Tensor]:
            y = x
            for layer in layers:
                y = layer(y, rotary, attention.layer(0))
            y = backbone.norm[0](y)
            return [y, *torch.autograd.grad(y, [x, *backbone.layers.parameters()], grad)]

        return run


def measure(settings: Settings, blocks: Blocks, scatter: bool = False) -> tuple[dict[str, Timing], float]:
    """Times of all candidates in turn, and how far the results of two experts are from one's."""
    kinds = {"mot": models.MOT, "dense": Experts()}
    candidates: dict[str, Run] = {}
    for kind, experts in kinds.items():
        candidates |= variants(settings, kind, partial(blocks.ours, experts))
    if scatter:
        candidates["scatter/eager"] = blocks.scattered()
    times = interleave(candidates, settings.repeats, warmup=settings.warmup, wait=settings.wait)
    found, expected = (candidates[fastest(times, kind).way]()[:2] for kind in kinds)
    error = worst(list(zip(found, expected)))
    if scatter:
        inverse = models.expert_order(blocks.table).to(blocks.device)
        theirs = candidates["scatter/eager"]()[:2]
        error = max(error, worst([(a[inverse], b) for a, b in zip(found, theirs)]))
    return times, error


def ratio(times: dict[str, Timing], above: str, below: str, error: float, **fields: Any) -> Result:
    """The time of one kind over another's."""
    a, b = fastest(times, above), fastest(times, below)
    ours, peer = (a, b) if above == "mot" else (b, a)
    return Result(
        name="", value=a.timing.best / b.timing.best, unit="x", value_median=a.timing.median / b.timing.median,
        compiled=ours.compiled, correct=error, extra={"seconds": bests(times)}, **fields,
    ).timed(ours.timing, peer.timing)  # fmt: skip


def mot_tax(settings: Settings) -> Result:
    """Two experts of half the tokens each over one expert of all of them: equal FLOPs."""
    shape = BackboneConfig(
        width=settings.size(512, 32), depth=2, heads=settings.size(8, 2), kv_heads=settings.size(8, 2), vocabulary=8,
        mlp_width=settings.size(1376, 48), positions="sequential", qk_norm=False,
    )  # fmt: skip
    length = settings.size(256, 32)
    blocks = Blocks(shape, models.segments([models.alternating(2 * length, length, length)] * 4))
    times, error = measure(settings, blocks)
    return ratio(times, "mot", "dense", error, peer="dense block", tolerance=1e-3)


CASES: dict[str, Case] = {"mot_tax": mot_tax}
