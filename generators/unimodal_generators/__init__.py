"""How image tokens are learned and sampled, behind one interface."""

from unimodal_generators.autoregressive import Autoregressive
from unimodal_generators.base import Block, ImageGenerator, SamplingSettings, TokenKind
from unimodal_generators.choice import ChoiceSettings
from unimodal_generators.denoisers import Denoiser, DiT, Sana
from unimodal_generators.depth import Depth
from unimodal_generators.diffusion import Diffusion, DiffusionSettings
from unimodal_generators.flow import Flow, FlowSettings
from unimodal_generators.masked import Masked, ParallelNext
from unimodal_generators.masked_text import MaskedText
from unimodal_generators.next_scale import NextScale
from unimodal_generators.patch_coders import ConvNeXtCoder, LinearCoder, UNetCoder
from unimodal_generators.queries import Queries
from unimodal_generators.regression import Regression, RegressionSettings
from unimodal_generators.token_diffusion import TokenDiffusion, TokenDiffusionSettings
from unimodal_generators.token_head import HeadDiffusion, HeadFlow
from unimodal_generators.unmasking import MaskedSettings

__all__ = [
    "Autoregressive",
    "Block",
    "ChoiceSettings",
    "ConvNeXtCoder",
    "Denoiser",
    "Depth",
    "DiT",
    "Diffusion",
    "DiffusionSettings",
    "Flow",
    "FlowSettings",
    "HeadDiffusion",
    "HeadFlow",
    "ImageGenerator",
    "LinearCoder",
    "Masked",
    "MaskedSettings",
    "MaskedText",
    "NextScale",
    "ParallelNext",
    "Queries",
    "Regression",
    "RegressionSettings",
    "SamplingSettings",
    "Sana",
    "TokenDiffusion",
    "TokenDiffusionSettings",
    "TokenKind",
    "UNetCoder",
]
