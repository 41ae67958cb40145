"""Useful FLOPs of training: what one pack asks for, however it is computed.

A multiply-add is two FLOPs, and only matrix products count: forward, the gradient of what was multiplied, and that of the
weights where they are trained. Filling of expert slices, pairs that may not see each other and recomputed layers are no use.
"""

import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from unimodal.backbone import Backbone
from unimodal.backbone.adapters import LoraLinear
from unimodal.backbone.moe import RoutedMLP
from unimodal.backbone.transformer import DecoderLayer
from unimodal.model import UnifiedModel
from unimodal.packing import PackedSequence


class Flops(NamedTuple):
    """Of one pack, forward and backward, by what asks for them."""

    layers: int  # products with weights
    attention: int
    head: int
    generator: int
    tokenizer: int  # forward only: it is frozen
    vision: int  # the encoder of understanding features, and its connector

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self)


def useful_flops(model: UnifiedModel, packed: PackedSequence) -> Flops:
    """Of a training step over one pack, which must be where the model is."""
    layers, attention = layer_flops(model.backbone, packed)
    return Flops(layers, attention, head_flops(model.backbone, packed), *image_flops(model, packed))


def layer_flops(backbone: Backbone, packed: PackedSequence) -> tuple[int, int]:
    """Of the layers' weights, and of their attention."""
    images = len(packed.learned_images) + len(packed.context_images)
    weights = sum(tokens * token_flops(backbone, expert) for expert, tokens in enumerate(packed.tokens))
    weights += images * modulation_flops(backbone)
    return round(weights), pair_flops(backbone) * packed.table.pairs


def token_flops(backbone: Backbone, expert: int) -> float:
    """Of the layers' weights, a token of an expert."""
    layers = [layer for layer in backbone.layers if isinstance(layer, DecoderLayer)]
    return sum((_per_row(w, share) for layer in layers for w, share in matrices(layer, expert)), 0.0)


def modulation_flops(backbone: Backbone) -> float:
    """Of the layers' modulation, an image and never a token."""
    layers = [layer for layer in backbone.layers if isinstance(layer, DecoderLayer)]
    modulations = [layer.modulation for layer in layers if layer.modulation is not None]
    return sum((_per_row(m.project.weight) for m in modulations), 0.0)


def pair_flops(backbone: Backbone) -> int:
    """Of attention, a visible pair: forward two products, scores and values; backward four."""
    return 12 * len(backbone.layers) * backbone.config.heads * backbone.config.head_size


def target_flops(backbone: Backbone) -> float:
    """Of the text head, a target."""
    return sum((_per_row(table) for table in backbone.tables), 0.0)


def head_flops(backbone: Backbone, packed: PackedSequence) -> int:
    """Of the text head, which reads the targets only."""
    return round(len(packed.text_targets) * target_flops(backbone))


def image_flops(model: UnifiedModel, packed: PackedSequence) -> tuple[int, int, int]:
    """Of generator, tokenizer and vision encoder, counted while they run: their networks are their own affair."""
    with FlopCounterMode(display=False) as tokenizer, torch.no_grad():
        model.tokens(packed)
    with FlopCounterMode(display=False) as both:
        _backward(generator_loss(model, packed), model)
    with FlopCounterMode(display=False) as vision:
        if packed.understood_images:
            _backward(model.understand(packed.understood).sum(), model)
    tokens = tokenizer.get_total_flops()
    return both.get_total_flops() - tokens, tokens, vision.get_total_flops()


def _backward(loss: Tensor, model: UnifiedModel) -> None:
    """Where anything learns; gradients stay as they were."""
    gradients = [(p, p.grad) for p in model.parameters()]
    model.zero_grad()
    if loss.requires_grad:
        loss.backward()
    for parameter, gradient in gradients:
        parameter.grad = gradient


def generator_loss(model: UnifiedModel, packed: PackedSequence) -> Tensor:
    """What the generator makes of a pack's images and of hidden states (zeros here), as one sum."""
    with torch.no_grad():
        tokens = model.tokens(packed)
    generator = model.generator
    learned = generator.corrupt(tokens.select(packed.learned_images), packed.learned_blocks)
    embedded = [generator.embed(learned), generator.embed(generator.context(tokens.select(packed.context_images)))]
    hidden = embedded[0].values.new_zeros(len(packed.image_reads), model.image_channels).requires_grad_()
    losses = generator.loss(hidden, embedded[0], learned)
    outputs = [term.sum for term in losses.values()]
    outputs += [x.sum() for e in embedded for x in (e.values, e.condition) if x is not None]
    return torch.stack([x.float() for x in outputs]).sum()


def product_peak(device: torch.device, dtype: torch.dtype, seconds: float = 0.5) -> float:
    """FLOPs a second of the fastest square matrix product, of growing sizes, that was found in so much time."""
    warm = torch.ones(256, 256, device=device, dtype=dtype)
    torch.mm(warm, warm).sum().item()  # what is loaded first may take longer than all that is measured
    best, n, end = 0.0, 256, time.perf_counter() + seconds
    while n <= 8192:
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        times = []
        for _ in range(4):
            begin = time.perf_counter()
            torch.mm(a, b)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - begin)
        best, n = max(best, 2 * n**3 / min(times)), 2 * n
        if time.perf_counter() + 4 * 8 * min(times) > end:  # the next four would take longer than what is left
            break
    return best


def matrices(layer: DecoderLayer, expert: int) -> Iterator[tuple[nn.Parameter, float]]:
    """Weights that a token of an expert is multiplied with in one layer, and which share of them."""
    for routed in (layer.qkv, layer.o, layer.mlp):
        for module in routed[expert].modules():
            if isinstance(module, LoraLinear):
                base = module._base[0].weight
                assert isinstance(base, nn.Parameter)
                yield base, 1.0
            for name, parameter in module.named_parameters(recurse=False):
                if isinstance(module, RoutedMLP) and name in ("gate_up", "down"):
                    yield parameter, module.moe.top_k / module.moe.experts
                elif parameter.ndim >= 2:
                    yield parameter, 1.0


def _per_row(weight: Tensor, share: float = 1.0) -> float:
    """FLOPs a row that is multiplied with a weight."""
    return (6 if weight.requires_grad else 4) * weight.numel() * share
