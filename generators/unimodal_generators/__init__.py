"""How image tokens are learned and sampled, behind one interface."""

from unimodal_generators.autoregressive import Autoregressive, AutoregressiveSettings
from unimodal_generators.base import Block, ImageGenerator, SamplingSettings, TokenKind
from unimodal_generators.denoisers import Denoiser, DiT, Sana
from unimodal_generators.flow import Flow, FlowSettings
from unimodal_generators.queries import Queries

__all__ = [
    "Autoregressive",
    "AutoregressiveSettings",
    "Block",
    "Denoiser",
    "DiT",
    "Flow",
    "FlowSettings",
    "ImageGenerator",
    "Queries",
    "SamplingSettings",
    "Sana",
    "TokenKind",
]
