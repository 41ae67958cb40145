"""The tokenizers that are compared, each with the same convolutions around it, or with transformers.

A row's rate is stated by what its tokens hold: bits a pixel where they are ids, numbers a pixel where they are vectors.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from experiments.tokenizers.photographs import SIDE
from unimodal_tokenizers import (
    CodecTokenizer,
    DynamicTokenizer,
    GridTokenizer,
    ImageTokenizer,
    KLTokenizer,
    MultiscaleVQ,
    SequenceTokenizer,
    StagedTokenizer,
)
from unimodal_tokenizers.quantizers import (
    BSQ,
    FSQ,
    IBQ,
    LFQ,
    EuclideanQuantizer,
    MovingAverageQuantizer,
    Quantizer,
    ResidualQuantizer,
    SimVQ,
    SubCodebooks,
    VectorQuantizer,
)

NETWORK: dict[str, Any] = {"channels": [128], "blocks": 1, "space_to_depth": 4}
"""Of every encoder and decoder of convolutions; the stride is 4, and nothing is computed at a finer resolution."""
ENTRIES = 1024
"""Of every codebook whose size is free: 10 bits."""


@dataclass(frozen=True)
class Entry:
    """A tokenizer of the comparison.

    Args:
        name: of its rows.
        paper: where it comes from.
        build: makes it, untrained; where nothing can be trained, it is measured as it is.
        weights: of its own loss terms, where the tokenizer's are not used.
    """

    name: str
    paper: str
    build: Callable[[], ImageTokenizer]
    weights: dict[str, float] | None = None


def _grid(quantizer: Callable[[], Quantizer]) -> Callable[[], ImageTokenizer]:
    return lambda: GridTokenizer(quantizer(), **NETWORK)


_COARSE: dict[str, Any] = {"patch": 8, "width": 192, "heads": 6, "depth": 3}
"""Of those whose tokens and patches attend to each other: a quarter of the patches, twice the width."""

_DIRECTIONS = {"codebook": 16.0, "commitment": 16.0}
"""Weights where directions are compared that begin beside a constant of 4: their squared distances are a sixteenth. The
commitment's is four times the tokenizer's own besides."""

TABLE = (
    Entry("kl", "latent diffusion", lambda: KLTokenizer(dim=4, **NETWORK), {"kl": 1e-6}),
    Entry("staged", "MingTok", lambda: StagedTokenizer(4, patch=4, width=96, heads=3, depths=(2, 1, 3))),
    Entry("vq", "LlamaGen", _grid(lambda: VectorQuantizer(ENTRIES, 8)), _DIRECTIONS),
    Entry("vq, any length", "VQ-VAE", _grid(lambda: EuclideanQuantizer(ENTRIES, 8))),
    Entry("vq, moving average", "VQ-VAE-2", _grid(lambda: MovingAverageQuantizer(ENTRIES, 8))),
    Entry("simvq", "SimVQ", _grid(lambda: SimVQ(ENTRIES, 8))),
    Entry("ibq", "IBQ", _grid(lambda: IBQ(ENTRIES, 8))),
    Entry("fsq", "FSQ", _grid(lambda: FSQ([8, 5, 5, 5]))),
    Entry("lfq", "MAGVIT-v2", _grid(lambda: LFQ(10))),
    Entry("bsq", "BSQ", _grid(lambda: BSQ(10))),
    Entry("residual, 2", "RQ-VAE", _grid(lambda: ResidualQuantizer(ENTRIES, 2, 8))),
    Entry("residual, 4", "RQ-VAE", _grid(lambda: ResidualQuantizer(ENTRIES, 4, 8))),
    Entry("sub-codebooks, 2", "UniTok", _grid(lambda: SubCodebooks(VectorQuantizer(ENTRIES, 8), 2)), _DIRECTIONS),
    Entry("multi-scale", "VAR", lambda: MultiscaleVQ(ENTRIES, 8, scales=[1, 2, 4, 8, 16], **NETWORK)),
    Entry(
        "sequence", "TiTok",
        lambda: SequenceTokenizer(
            VectorQuantizer(ENTRIES, 8), image=(SIDE, SIDE), tokens=64, **_COARSE
        ),
    ),
    Entry(
        "dynamic", "LaVIT",
        lambda: DynamicTokenizer(
            VectorQuantizer(ENTRIES, 8), image=(SIDE, SIDE), keep=0.5, **_COARSE
        ),
    ),
    Entry("codec", "JPEG-LM", lambda: CodecTokenizer(image=(SIDE, SIDE), length=4096, quality=40)),
)  # fmt: skip


def chosen(names: list[str] | None) -> list[Entry]:
    """Entries by name, all for None; ValueError for a name there is not."""
    known = {entry.name: entry for entry in TABLE}
    for name in names or []:
        if name not in known:
            raise ValueError(f"--only: expected among {'; '.join(known)}, got {name}")
    return list(TABLE) if names is None else [known[name] for name in names]
