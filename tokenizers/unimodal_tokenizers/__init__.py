"""Visual tokenizers: pixels to tokens and back. `base` says what every one of them keeps."""

from unimodal_tokenizers.base import (
    Grid,
    ImageTokenizer,
    ImageTokens,
    MultiscaleTokenizer,
    Reconstruction,
    TokenLayout,
    TrainableTokenizer,
    bits_per_token,
)
from unimodal_tokenizers.grid import CodebookTokenizer, GridTokenizer
from unimodal_tokenizers.multiscale import MultiscaleVQ
from unimodal_tokenizers.patch import PatchTokenizer
from unimodal_tokenizers.representation import Representation

__all__ = [
    "CodebookTokenizer",
    "Grid",
    "GridTokenizer",
    "ImageTokenizer",
    "ImageTokens",
    "MultiscaleTokenizer",
    "MultiscaleVQ",
    "PatchTokenizer",
    "Reconstruction",
    "Representation",
    "TokenLayout",
    "TrainableTokenizer",
    "bits_per_token",
]
