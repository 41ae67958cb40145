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
from unimodal_tokenizers.codec import CodecTokenizer
from unimodal_tokenizers.dynamic import DynamicTokenizer
from unimodal_tokenizers.frozen import FrozenEncoder
from unimodal_tokenizers.grid import CodebookTokenizer, GridTokenizer
from unimodal_tokenizers.multiscale import MultiscaleVQ
from unimodal_tokenizers.patch import PatchTokenizer
from unimodal_tokenizers.representation import Representation
from unimodal_tokenizers.semantic import SemanticHead
from unimodal_tokenizers.sequence import SequenceTokenizer
from unimodal_tokenizers.staged import StagedTokenizer

__all__ = [
    "CodebookTokenizer",
    "CodecTokenizer",
    "DynamicTokenizer",
    "FrozenEncoder",
    "Grid",
    "GridTokenizer",
    "ImageTokenizer",
    "ImageTokens",
    "MultiscaleTokenizer",
    "MultiscaleVQ",
    "PatchTokenizer",
    "Reconstruction",
    "Representation",
    "SemanticHead",
    "SequenceTokenizer",
    "StagedTokenizer",
    "TokenLayout",
    "TrainableTokenizer",
    "bits_per_token",
]
