"""Visual tokenizers: pixels to tokens and back. `base` says what every one of them keeps."""

from unimodal_tokenizers.base import (
    Grid,
    ImageTokenizer,
    ImageTokens,
    MultiscaleTokenizer,
    TokenLayout,
    bits_per_token,
)
from unimodal_tokenizers.codec import CodecTokenizer
from unimodal_tokenizers.patch import PatchTokenizer
from unimodal_tokenizers.representation import Representation
from unimodal_tokenizers.residual import MultiscaleVQ, ResidualVQ
from unimodal_tokenizers.vq import CodebookTokenizer, Quantized, Reconstruction, VectorQuantizer, VQTokenizer

__all__ = [
    "CodebookTokenizer",
    "CodecTokenizer",
    "Grid",
    "ImageTokenizer",
    "ImageTokens",
    "MultiscaleTokenizer",
    "MultiscaleVQ",
    "PatchTokenizer",
    "Quantized",
    "Reconstruction",
    "Representation",
    "ResidualVQ",
    "TokenLayout",
    "VQTokenizer",
    "VectorQuantizer",
    "bits_per_token",
]
