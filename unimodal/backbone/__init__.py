"""Decoder blocks, experts (mixture of transformers), positions."""

from unimodal.backbone.config import BackboneConfig, Experts, Lora, Moe, RopeScaling
from unimodal.backbone.positions import SCHEMES, PositionScheme
from unimodal.backbone.transformer import Backbone, deferred

__all__ = [
    "SCHEMES",
    "Backbone",
    "BackboneConfig",
    "Experts",
    "Lora",
    "Moe",
    "PositionScheme",
    "RopeScaling",
    "deferred",
]
