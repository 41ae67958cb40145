"""How image tokens are learned and sampled, behind one interface."""

from unimodal_generators.autoregressive import Autoregressive, AutoregressiveSettings
from unimodal_generators.base import Block, ImageGenerator, SamplingSettings, TokenKind
from unimodal_generators.flow import Flow, FlowSettings
from unimodal_generators.next_scale import NextScale, NextScaleSettings

__all__ = [
    "Autoregressive",
    "AutoregressiveSettings",
    "Block",
    "Flow",
    "FlowSettings",
    "ImageGenerator",
    "NextScale",
    "NextScaleSettings",
    "SamplingSettings",
    "TokenKind",
]
