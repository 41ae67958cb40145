"""How image tokens are learned and sampled, behind one interface."""

from unimodal_generators.autoregressive import Autoregressive, AutoregressiveSettings
from unimodal_generators.base import Block, ImageGenerator, SamplingSettings, TokenKind
from unimodal_generators.depth import Depth
from unimodal_generators.flow import Flow, FlowSettings

__all__ = [
    "Autoregressive",
    "AutoregressiveSettings",
    "Block",
    "Depth",
    "Flow",
    "FlowSettings",
    "ImageGenerator",
    "SamplingSettings",
    "TokenKind",
]
