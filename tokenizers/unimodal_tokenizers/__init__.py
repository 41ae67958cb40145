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
from unimodal_tokenizers.codes import ChameleonTokenizer, Emu3Tokenizer, JanusTokenizer, MagvitTokenizer
from unimodal_tokenizers.diffused import DiffusionRepresentation
from unimodal_tokenizers.dynamic import DynamicTokenizer
from unimodal_tokenizers.frozen import FrozenEncoder
from unimodal_tokenizers.grid import CodebookTokenizer, GridTokenizer
from unimodal_tokenizers.kl import KLTokenizer
from unimodal_tokenizers.latents import DCTokenizer, RAETokenizer, WanTokenizer
from unimodal_tokenizers.multiscale import MultiscaleVQ
from unimodal_tokenizers.patch import PatchTokenizer
from unimodal_tokenizers.pretrained import from_pretrained
from unimodal_tokenizers.representation import Representation
from unimodal_tokenizers.semantic import SemanticHead, TextEncoder
from unimodal_tokenizers.sequence import SequenceTokenizer
from unimodal_tokenizers.staged import StagedTokenizer

__all__ = [
    "ChameleonTokenizer",
    "CodebookTokenizer",
    "CodecTokenizer",
    "DCTokenizer",
    "DiffusionRepresentation",
    "DynamicTokenizer",
    "Emu3Tokenizer",
    "FrozenEncoder",
    "Grid",
    "GridTokenizer",
    "ImageTokenizer",
    "ImageTokens",
    "JanusTokenizer",
    "KLTokenizer",
    "MagvitTokenizer",
    "MultiscaleTokenizer",
    "MultiscaleVQ",
    "PatchTokenizer",
    "RAETokenizer",
    "Reconstruction",
    "Representation",
    "SemanticHead",
    "SequenceTokenizer",
    "StagedTokenizer",
    "TextEncoder",
    "TokenLayout",
    "TrainableTokenizer",
    "WanTokenizer",
    "bits_per_token",
    "from_pretrained",
]
