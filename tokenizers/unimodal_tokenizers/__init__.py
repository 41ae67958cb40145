"""Visual tokenizers: pixels to tokens and back. `base` says what every one of them keeps."""

from unimodal_tokenizers.base import Grid, ImageTokenizer, ImageTokens, TokenLayout, bits_per_token
from unimodal_tokenizers.patch import PatchTokenizer
from unimodal_tokenizers.representation import Representation
from unimodal_tokenizers.vq import Quantized, Reconstruction, VectorQuantizer, VQTokenizer

__all__ = [
    "Grid",
    "ImageTokenizer",
    "ImageTokens",
    "PatchTokenizer",
    "Quantized",
    "Reconstruction",
    "Representation",
    "TokenLayout",
    "VQTokenizer",
    "VectorQuantizer",
    "bits_per_token",
]
