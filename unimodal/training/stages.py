"""Stages: which parts of a model learn, and which stay as they came."""

from collections.abc import Sequence

from torch import nn

from unimodal.backbone import Backbone
from unimodal.backbone.config import Part
from unimodal.backbone.transformer import Modulation, Routed
from unimodal.model import UnifiedModel

HELD: dict[Part, tuple[str, ...]] = {
    "attention": ("qkv", "qk_norm", "o"), "mlp": ("mlp",), "norms": ("attention_norm", "mlp_norm"),
}  # fmt: skip
Named = dict[str, list[nn.Parameter]]


def freeze(model: UnifiedModel, names: Sequence[str]) -> None:
    """Let parts of a model stay as they are: no gradient, no decay, no moving average.

    Args:
        model: whose.
        names: EXPERT (all its parts) or EXPERT.PART with PART attention, mlp or norms; `shared` is the expert of what all
            experts use, and an adapter is its own expert's; `embedding` and `head` are the table of the vocabulary, whose
            added rows go on learning; `modulation`; `generator`; `vision`, the encoder, and `connector`, what leads from it.

    Raises:
        ValueError: a name this model has not, or nothing would be left to learn.
    """
    found = parts(model)
    for name in names:
        if name not in found:
            raise ValueError(f"freeze: expected some of {', '.join(found)}, got {name}")
    frozen = {id(p) for name in names for p in found[name]}
    if frozen and all(id(p) in frozen or not p.requires_grad for p in model.parameters()):
        raise ValueError(f"freeze: expected something to be left that learns, got {', '.join(names)}")
    for parameter in model.parameters():
        if id(parameter) in frozen:
            parameter.requires_grad_(False)


def parts(model: UnifiedModel) -> Named:
    """Everything that can be frozen, by name; names without parameters are left out."""
    backbone = model.backbone
    found = _experts(backbone)
    found["embedding"] = [backbone.embedding.weight]
    if backbone.head is not None:
        found["head"] = [backbone.head.weight]
    modulation = [module for module in backbone.modules() if isinstance(module, Modulation)]
    found["modulation"] = [p for module in modulation for p in module.parameters()]
    found["generator"] = list(model.generator.parameters())
    for name, module in (("vision", model.vision), ("connector", model.connector)):
        found[name] = [] if module is None else list(module.parameters())
    return {name: parameters for name, parameters in found.items() if parameters}


def _experts(backbone: Backbone) -> Named:
    """EXPERT and EXPERT.PART. An adapter names the weights it adapts without holding them."""
    routed = [(part, getattr(layer, name)) for layer in backbone.layers for part in HELD for name in HELD[part]]
    found: Named = {}
    for expert in (*backbone.config.experts.names, "shared"):
        found[expert] = []
        for part in HELD:
            modules = [module for p, module in [*routed, ("norms", backbone.norm)] if p == part]
            mine = [p for module in modules for p in _of(module, expert)]
            found[f"{expert}.{part}"] = mine
            found[expert] += mine
    return found


def _of(routed: Routed, expert: str) -> list[nn.Parameter]:
    groups = (routed.experts, getattr(routed, "adapters", {}))
    return [p for group in groups if expert in group for p in group[expert].parameters()]
