"""Quantizers: vectors of an encoder to ids and back. `base` says what every one of them keeps."""

from unimodal_tokenizers.quantizers.base import Quantized, Quantizer, codebook_perplexity, codebook_usage
from unimodal_tokenizers.quantizers.residual import ResidualQuantizer
from unimodal_tokenizers.quantizers.vector import EuclideanQuantizer, VectorQuantizer

__all__ = [
    "EuclideanQuantizer",
    "Quantized",
    "Quantizer",
    "ResidualQuantizer",
    "VectorQuantizer",
    "codebook_perplexity",
    "codebook_usage",
]
