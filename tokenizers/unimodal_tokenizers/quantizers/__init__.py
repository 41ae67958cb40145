"""Quantizers: vectors of an encoder to ids and back. `base` says what every one of them keeps."""

from unimodal_tokenizers.quantizers.base import Quantized, Quantizer, codebook_perplexity, codebook_usage
from unimodal_tokenizers.quantizers.binary import BSQ, LFQ
from unimodal_tokenizers.quantizers.fsq import FSQ
from unimodal_tokenizers.quantizers.ibq import IBQ
from unimodal_tokenizers.quantizers.moving_average import MovingAverageQuantizer
from unimodal_tokenizers.quantizers.residual import ResidualQuantizer
from unimodal_tokenizers.quantizers.simvq import SimVQ
from unimodal_tokenizers.quantizers.sub_codebooks import SubCodebooks
from unimodal_tokenizers.quantizers.text_codebook import TextCodebook
from unimodal_tokenizers.quantizers.vector import EuclideanQuantizer, VectorQuantizer

__all__ = [
    "BSQ",
    "FSQ",
    "IBQ",
    "LFQ",
    "EuclideanQuantizer",
    "MovingAverageQuantizer",
    "Quantized",
    "Quantizer",
    "ResidualQuantizer",
    "SimVQ",
    "SubCodebooks",
    "TextCodebook",
    "VectorQuantizer",
    "codebook_perplexity",
    "codebook_usage",
]
