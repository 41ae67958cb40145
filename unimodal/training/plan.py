"""`unimodal fit --plan`: the size, the memory and the time of a run, estimated before it begins.

Counted: parameters, and the useful FLOPs of one real pack. Measured, in a second or two: what one layer keeps for backward,
how fast this machine multiplies matrices of the model's shapes, and how fast it trains a layer.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from lightning import LightningModule, Trainer
from torch import Tensor, nn

from unimodal.backbone import Backbone
from unimodal.backbone.transformer import DecoderLayer
from unimodal.data.module import DocumentData
from unimodal.data.stream import Mixture, Packing, PackStream
from unimodal.model import UnifiedModel
from unimodal.packing import PackedSequence
from unimodal.training import stages
from unimodal.training.flops import Flops, generator_loss, head_flops, image_flops, layer_flops, matrices
from unimodal.training.optimizers import MuonAdamW, split_matrices
from unimodal.training.ranks import Ranks, Weights
from unimodal.training.unified import UnifiedTraining
from unimodal_generators.base import TokenKind
from unimodal_generators.cross_entropy import BUDGET

SECONDS = 0.5  # of each measurement
ROWS = 4096  # most rows of a measured matrix product: more make it longer and not faster


@dataclass(frozen=True)
class Memory:
    """Bytes on one device when a backward pass begins."""

    weights: int
    gradients: int
    moments: int
    average: int
    layers: int  # how many
    layer: int  # what one keeps for backward
    layer_input: int  # what it keeps when it is computed again
    around: int  # what is kept once: positions, embeddings, the generator's own
    gathered: int  # of weights and gradients that lie in parts, what is together at once
    loss: int  # gradients of head and hidden states, and one chunk of logits

    def peak(self, checkpoint_layers: bool) -> int:
        """All of it; with recomputed layers, one of them at a time."""
        fixed = self.weights + self.gradients + self.moments + self.average + self.around + self.gathered + self.loss
        return fixed + (self.layers * self.layer_input + self.layer if checkpoint_layers else self.layers * self.layer)


@dataclass(frozen=True)
class Speed:
    """What this machine does a second, and how long it is at the rest."""

    products: float  # FLOPs of bare matrix products in the model's shapes
    layer: float  # useful FLOPs of a layer, forward and backward
    packing: float  # seconds a pack, in the training process
    around: float  # seconds a pack around its layers: positions, attention's plan, the last norm
    optimizer: float  # seconds a step


@dataclass(frozen=True)
class Plan:
    """What a run needs."""

    parameters: dict[str, tuple[int, int]]  # trained and frozen, by part
    packed: PackedSequence
    flops: Flops  # of the pack
    memory: Memory  # of a rank
    weights: Weights
    speed: Speed
    steps: int
    packs: int  # a step and rank
    ranks: Ranks
    device: torch.device
    dtype: torch.dtype  # of matrix products
    checkpoint_layers: bool
    compiles: bool
    optimizer: str

    @property
    def step_seconds(self) -> float:
        """One optimizer step: layers at the rate one was measured at, all else at that of bare products."""
        speed, layers = self.speed, self.flops.layers + self.flops.attention
        pack = layers / speed.layer + (self.flops.total - layers) / speed.products + speed.around
        return self.packs * (pack + speed.packing) + speed.optimizer / self.ranks.shards

    @property
    def bound_seconds(self) -> float:
        """One step if there were nothing but useful matrix products."""
        return self.packs * self.flops.total / self.speed.products


def make_plan(module: LightningModule, data: Any, trainer: Trainer, ranks: Ranks) -> Plan:
    """Of a run of `trainer` over `data`, which is neither begun nor given a folder.

    The model's backbone may be deferred: nothing of it is computed with.
    """
    if not isinstance(module, UnifiedTraining) or not isinstance(data, DocumentData):
        raise ValueError(f"--plan: expected a recipe of a unified model, got one of {type(module).__name__}")
    data.prepare_data()
    data.setup("fit")
    precision, model, device = trainer.precision_plugin, module.model, trainer.strategy.root_device
    if not model.has_text:
        module.train_text(data)
    precision.convert_module(module)
    packing = Packing(model.sequencer, model.backbone.config.experts, model.generator.reads, data.batch_tokens)
    stream = iter(PackStream(Mixture(data.training_sources(), data.seed), packing))
    packed = next(stream)
    packing_seconds = 0.0 if data.workers else _timed(lambda: next(stream))
    parameters = _parameters(model)
    with precision.forward_context():
        probe = Probe(model, packed, device)
        layers, attention = layer_flops(model.backbone, packed)
        flops = Flops(layers, attention, head_flops(model.backbone, packed), *probe.image_flops())
        per_layer = (layers + attention) / len(model.backbone.layers)
        seconds, around = probe.layer_seconds()
        weights = model_weights(model)
        memory = _estimate_memory(weights, packed, probe, _moments(module), ranks)
        products = probe.product_rate()
    speed = Speed(products, per_layer / seconds, packing_seconds, around, probe.optimizer_seconds(module))
    return Plan(
        parameters, packed, flops, memory, weights, speed, steps=trainer.max_steps,
        packs=trainer.accumulate_grad_batches, ranks=ranks, device=device, dtype=probe.dtype,
        checkpoint_layers=model.backbone.checkpointing, compiles=module.compiles,
        optimizer="AdamW" if module.muon_lr is None else "Muon and AdamW",
    )  # fmt: skip


def _parameters(model: UnifiedModel) -> dict[str, tuple[int, int]]:
    """Trained and frozen, under the names that `freeze` takes; what has none there under its module's."""
    experts = {*model.backbone.config.experts.names, "shared"}
    # An expert is the sum of its parts.
    found = {name: list(parameters) for name, parameters in stages.parts(model).items() if name not in experts}
    known = {id(p) for parameters in found.values() for p in parameters}
    for name, parameter in model.named_parameters():
        if id(parameter) not in known:
            top, _, rest = name.partition(".")
            found.setdefault(rest if top == "backbone" else top, []).append(parameter)
    found.setdefault("tokenizer", [])
    if model.backbone.head is None:
        found["head (the embedding)"] = []
    counts = {}
    for name, parameters in found.items():
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        counts[name] = trained, sum(p.numel() for p in parameters) - trained
    return counts


def _moments(module: UnifiedTraining) -> int:
    """Bytes of the optimizer's averages: two of each trained parameter by AdamW, one by Muon."""
    trained = sum(_bytes(p) for p in module.model.parameters() if p.requires_grad)
    if module.muon_lr is None:
        return 2 * trained
    matrices, _ = split_matrices(module.model, module.model.backbone.layers, module.weight_decay)
    return 2 * trained - sum(_bytes(p) for p in matrices)


def model_weights(model: UnifiedModel) -> Weights:
    """Bytes of a model as `Sharded` spreads them."""
    layers = [sum(_bytes(p) for p in layer.parameters()) for layer in model.backbone.layers]
    copied = sum(_bytes(t) for t in [*model.tokenizer.parameters(), *model.buffers()])
    whole = sum(_bytes(t) for t in [*model.parameters(), *model.buffers()])
    trained = sum(_bytes(p) for p in model.parameters() if p.requires_grad)
    itemsize = model.backbone.embedding.weight.element_size()
    return Weights(copied, sum(layers), max(layers), whole - copied - sum(layers), trained, itemsize)


def _estimate_memory(weights: Weights, packed: PackedSequence, probe: "Probe", moments: int, ranks: Ranks) -> Memory:
    layer, around = probe.kept()
    own, trained = probe.whole.backbone, -(-weights.trained // ranks.shards)
    return Memory(
        weights=weights.held(ranks), gradients=trained, moments=-(-moments // ranks.shards), average=trained,
        layers=len(own.layers), layer=layer,
        layer_input=sum(packed.splits) * own.config.width * own.embedding.weight.element_size(), around=around,
        gathered=weights.gathered(ranks), loss=loss_bytes(probe.whole, packed, probe.dtype),
    )  # fmt: skip


def loss_bytes(model: UnifiedModel, packed: PackedSequence, dtype: torch.dtype) -> int:
    """What the text loss holds at once: a chunk of logits and of their softmax, and gradients."""
    config, targets = model.backbone.config, len(packed.text_targets)
    exact = torch.promote_types(dtype, torch.float32).itemsize
    ids = sum(len(table) for table in model.backbone.tables)
    chunk = min(targets, max(1, BUDGET // ids)) * ids
    size = chunk * (2 * exact + dtype.itemsize) + targets * config.width * dtype.itemsize
    for table in model.backbone.tables:
        cast = dtype.itemsize if dtype != table.dtype else 0
        size += table.numel() * (cast + (exact if table.requires_grad else 0))
    return size


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


# --- measurements


class Probe:
    """The same model with two layers and hardly a vocabulary, and one pack, where they would be trained."""

    def __init__(self, model: UnifiedModel, packed: PackedSequence, device: torch.device) -> None:
        self.packed, self.device, self.whole = packed.to(device), device, model
        with torch.device(device):
            small: dict[str, Any] = {} if model.generator.image_ids else {"vocabulary": 1, "added_tokens": 0}
            backbone = Backbone(replace(model.backbone.config, depth=2, **small), model.generator.image_ids)
            self.dtype = (torch.ones(1, 1) @ torch.ones(1, 1)).dtype  # under autocast, that of matrix products
        backbone.to(model.backbone.embedding.weight.dtype)
        for layer in backbone.layers:
            for mine, its in zip(layer.parameters(), model.backbone.layers[0].parameters(), strict=True):
                mine.requires_grad_(its.requires_grad)
        backbone.checkpointing = model.backbone.checkpointing
        self.layers = backbone.layers
        self.model, self.backbone = copy.copy(model), backbone
        names = ("generator", "tokenizer", "vision", "connector")
        parts = {name: part.to(device) for name in names if (part := getattr(model, name)) is not None}
        self.model._modules = {**model._modules, **parts, "backbone": backbone}
        if model.generator.image_ids:  # the model's own table stays where it is
            model.generator.bind(model.tokenizer, backbone.image_rows)
            learns = {name: parameter.requires_grad for name, parameter in model.backbone.named_parameters()}
            for name, parameter in backbone.named_parameters():
                parameter.requires_grad_(learns.get(name, True))

    def run(self, depth: int, *, backward: bool) -> Tensor:
        """The first layers over random embeddings of the pack."""
        packed, weight = self.packed, self.backbone.embedding.weight
        self.backbone.layers = self.layers[:depth]

        def values(rows: int) -> Tensor:
            return torch.randn(rows, weight.shape[1], device=self.device, dtype=weight.dtype, requires_grad=True)

        embeddings = {TokenKind.TEXT: values(len(packed.text_ids))}
        blocks_of = {TokenKind.LEARNED: packed.learned_blocks, TokenKind.CLEAN: packed.context_blocks}
        for kind, blocks in (blocks_of | {TokenKind.UNDERSTANDING: packed.understood_blocks}).items():
            embeddings[kind] = values(sum(block.length for block in blocks))
        images = len(packed.learned_images) + len(packed.context_images)
        hidden = self.model.hidden(embeddings, packed, values(images) if self.backbone.config.adaln else None)
        if backward:
            hidden.backward(torch.randn_like(hidden))
        return hidden

    def image_flops(self) -> tuple[int, int, int]:
        """Of generator, tokenizer and vision encoder."""
        return image_flops(self.model, self.packed)

    def kept(self) -> tuple[int, int]:
        """Bytes kept for backward by one layer that is not computed again, and by all that is around the layers."""
        again, self.backbone.checkpointing = self.backbone.checkpointing, False
        one = _saved(lambda: self.run(1, backward=False), self.model)
        two = _saved(lambda: self.run(2, backward=False), self.model)
        self.backbone.checkpointing = again
        images = _saved(lambda: generator_loss(self.model, self.packed), self.model)
        images += _saved(lambda: self.model.understand(self.packed.understood), self.model)
        return two - one, one - (two - one) + images

    def layer_seconds(self) -> tuple[float, float]:
        """Of one layer, forward and backward, and of all that is around the layers."""
        none = self.seconds(lambda: self.run(0, backward=True))
        two = self.seconds(lambda: self.run(2, backward=True))
        return (two - none) / 2, none

    def product_rate(self) -> float:
        """FLOPs a second of the matrix products of one layer, forward and backward, and of nothing else."""
        layer = self.layers[0]
        assert isinstance(layer, DecoderLayer)
        products, flops = [], 0
        for expert, places in enumerate(self.packed.splits):
            for weight, share in matrices(layer, expert):
                out, width = weight.shape[-2:]
                rows = max(1, min(ROWS, round(places * share * weight.numel() / (out * width))))
                shapes = ((rows, width), (out, width), (rows, out))
                products.append([torch.randn(shape, device=self.device, dtype=self.dtype) for shape in shapes])
                flops += 6 * rows * out * width

        def run() -> None:
            for x, w, g in products:
                x @ w.T, g @ w, g.T @ x

        return flops / self.seconds(run)

    def optimizer_seconds(self, module: UnifiedTraining) -> float:
        """Of a step of all that is trained, at the rate of a layer's parameters."""
        parameters = list(self.layers.parameters())
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        trained = sum(p.numel() for p in module.model.parameters() if p.requires_grad)
        rate = self.seconds(torch.optim.AdamW(parameters, lr=1e-6).step) / sum(p.numel() for p in parameters)
        matrices, groups = split_matrices(self.layers, self.layers, 0.0)  # of the layers that learn
        if module.muon_lr is None or not matrices:
            return trained * rate
        muon = MuonAdamW(matrices, groups, lr=1e-6, muon_lr=1e-6, betas=module.betas, weight_decay=0.0).muon
        mine = sum(p.numel() for p in split_matrices(module.model, module.model.backbone.layers, 0.0)[0])
        measured = sum(p.numel() for p in matrices)
        return (trained - mine) * rate + mine * self.seconds(muon.step) / measured

    def seconds(self, run: Callable[[], object]) -> float:
        """Of one call, until the device is done."""

        def wait() -> None:
            run()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)

        return _timed(wait)


def _timed(run: Callable[[], object]) -> float:
    """Seconds of one call: the median of as many as fit into `SECONDS`, three at least, after one that does not count."""
    times: list[float] = []
    end = time.perf_counter() + SECONDS
    while len(times) < 4 or time.perf_counter() < end:
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return median(times[1:])


def _saved(run: Callable[[], object], model: nn.Module) -> int:
    """Bytes of the storages that `run` keeps for backward, weights left out."""
    held: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        graph = run()  # alive until all is counted, so that no address is used twice
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    size = sum(n for at, n in held.items() if at not in weights)
    del graph
    return size


# --- in words


def describe(plan: Plan) -> str:
    """The plan as text, which says what of it is estimated."""
    lines = [*_size_lines(plan), "", *_memory_lines(plan), "", *_time_lines(plan), ""]
    lines.append("Parameters and FLOPs are counted; bytes and seconds are estimates, made with one pack of the data.")
    lines.append("Bytes are those of tensors: the process, its libraries and what its allocator wastes come on top.")
    if plan.compiles:
        lines.append("Layers were measured as they are written, not as they are compiled.")
    if plan.ranks.count > 1:
        lines.append("Ranks were not measured together: what they tell each other takes time on top.")
    return "\n".join(lines)


def _size_lines(plan: Plan) -> list[str]:
    rows = [(name, *counts) for name, counts in plan.parameters.items()]
    total = tuple(sum(column) for column in list(zip(*rows))[1:])
    return [f"{'parameters':24}{'trained':>16}{'frozen':>16}"] + [
        f"  {name:22}{trained:>16,}{frozen:>16,}" for name, trained, frozen in [*rows, ("in all", *total)]
    ]


def _memory_lines(plan: Plan) -> list[str]:
    m = plan.memory
    kept, again = m.layers * m.layer, m.layers * m.layer_input + m.layer
    used = "checkpoint_layers: true" if plan.checkpoint_layers else "checkpoint_layers: false"
    items = [
        ("weights", m.weights, ""), ("gradients", m.gradients, ""), ("moments of the optimizer", m.moments, ""),
        ("moving average", m.average, ""),
        *([("gathered", m.gathered, "layers and gradients that are together at once")] if m.gathered else []),
        ("activations", again if plan.checkpoint_layers else kept,
         f"{m.layers} layers, each {_size(m.layer)}, or {_size(m.layer_input)} if computed again"),
        ("around the layers", m.around, ""), ("loss", m.loss, "one chunk of logits, gradients of the head"),
        ("peak", m.peak(plan.checkpoint_layers), f"with {used}; {_size(m.peak(not plan.checkpoint_layers))} otherwise"),
    ]  # fmt: skip
    of = f"a rank of {plan.ranks.count}" if plan.ranks.count > 1 else plan.device.type
    head = f"memory of {of}, estimated, while one pack of {len(plan.packed):,} tokens is trained on"
    return [head, *(f"  {name:22}{_size(size):>16}  {note}".rstrip() for name, size, note in items)]


def _time_lines(plan: Plan) -> list[str]:
    speed, counts, shares = plan.speed, plan.packed.counts, zip(plan.flops._fields, plan.flops)
    ranks, count = plan.ranks, plan.ranks.count
    tokens = plan.packs * count * len(plan.packed)
    packs = f"{plan.packs} pack{'s' * (plan.packs > 1)} on {count} rank{'s' * (count > 1)}"
    lines = [
        ("a pack", f"{plan.packed.documents} documents, {len(plan.packed):,} tokens in {sum(plan.packed.splits):,} places, "
                   f"{counts['text']:,} text and {counts['image']:,} image targets"),
        ("an image", _image_tokens(plan.packed)),
        ("useful work of it", f"{plan.flops.total / 1e9:,.1f} GFLOP: "
                              + ", ".join(f"{name} {n / 1e9:,.1f}" for name, n in shares)),
        ("matrix products", f"{speed.products / 1e9:,.1f} GFLOP/s in the model's shapes"),
        ("a layer", f"{speed.layer / 1e9:,.1f} useful GFLOP/s, forward and backward"),
        ("beside them", f"{speed.packing:.2g} s to lay out a pack, {speed.around:.2g} s around its layers, "
                        f"{speed.optimizer:.2g} s for {plan.optimizer}"),
        ("a step", f"{plan.step_seconds:.3g} s ({packs}, {tokens / plan.step_seconds:,.0f} tokens/s); "
                   f"with bare matrix products {plan.bound_seconds:.3g} s"),
    ]  # fmt: skip
    if count > 1:
        bytes_ = plan.weights.traffic(ranks, plan.packs, min(1.0, plan.dtype.itemsize / plan.weights.itemsize))
        spread = f"{ranks.replicas} x {ranks.shards} parts" if ranks.shards > 1 else f"{ranks.replicas} copies"
        lines.append(("traffic", f"{_size(bytes_)} received by a rank a step ({spread}), "
                                 f"{bytes_ / plan.step_seconds / 1e9:,.2g} GB/s to hide all of it"))  # fmt: skip
    if plan.steps > 0:
        seconds = plan.steps * plan.step_seconds
        lines.append(("the run", f"{_duration(seconds)} for {plan.steps:,} steps, without validation"))
    name = str(plan.dtype).removeprefix("torch.")
    return [f"time on {plan.device.type}, {name}, estimated", *(f"  {item:22}{text}" for item, text in lines)]


def _image_tokens(packed: PackedSequence) -> str:
    """How long images are, as they are learned and as context."""
    forms = {"learned": packed.learned_blocks, "clean": packed.context_blocks, "understood": packed.understood_blocks}
    images = {"learned": packed.learned_images, "clean": packed.context_images, "understood": packed.understood_images}
    mean = {name: sum(b.length for b in blocks) / len(images[name]) for name, blocks in forms.items() if images[name]}
    return " + ".join(f"{length:,.4g} tokens {name}" for name, length in mean.items()) or "none in it"


def _size(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"
