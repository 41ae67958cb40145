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
from unimodal_tokenizers.codes import ChameleonTokenizer, Emu3Tokenizer, JanusTokenizer, MagvitTokenizer
from unimodal_tokenizers.grid import CodebookTokenizer, GridTokenizer
from unimodal_tokenizers.kl import KLTokenizer
from unimodal_tokenizers.latents import DCTokenizer, RAETokenizer, WanTokenizer
from unimodal_tokenizers.multiscale import MultiscaleVQ
from unimodal_tokenizers.patch import PatchTokenizer
from unimodal_tokenizers.pretrained import from_pretrained
from unimodal_tokenizers.representation import Representation

__all__ = [
    "ChameleonTokenizer",
    "CodebookTokenizer",
    "DCTokenizer",
    "Emu3Tokenizer",
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
    "TokenLayout",
    "TrainableTokenizer",
    "WanTokenizer",
    "bits_per_token",
    "from_pretrained",
]
