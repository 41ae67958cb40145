"""The shapes that are measured, and random documents for them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unimodal.attention import SegmentTable
from unimodal.backbone import BackboneConfig, Experts
from unimodal.documents import Document, Part
from unimodal.model import UnifiedModel
from unimodal.packing import PackedSequence, pack
from unimodal.sequence_rules import SequenceRules
from unimodal.text import TextTokenizer
from unimodal_generators import Flow
from unimodal_tokenizers.patch import PatchTokenizer

MOT = Experts(attention=True, mlp=True, norms=True)
PATCH = 4  # of grey pixels: 16 channels a token
LATENT = PATCH * PATCH
# As transfusion-pytorch is set up beside it: no norm of queries and keys, an untied head.
PEER_S = BackboneConfig(
    width=256, depth=6, heads=4, kv_heads=4, mlp_width=688, vocabulary=512, positions="block", experts=MOT,
    qk_norm=False, tied_head=False,
)  # fmt: skip
TINY = replace(PEER_S, width=32, depth=2, heads=2, kv_heads=2, mlp_width=48)


def peer_s(quick: bool, **changes: object) -> BackboneConfig:
    """The common shape, or a tiny one."""
    return replace(TINY if quick else PEER_S, **changes)  # type: ignore[arg-type]


def unified(
    config: BackboneConfig, sides: Sequence[int] = (8,), device: str = "cpu", dtype: torch.dtype = torch.float32
) -> UnifiedModel:
    """A flow model over grey patches; images are squares of `sides` tokens and are learned in a single copy."""
    torch.manual_seed(0)
    sizes = [(side * PATCH, side * PATCH) for side in sides]
    rules = SequenceRules(image_sizes=sizes, context_length=1 << 16, drop_text=0.1, learn_end=False)
    with made_on(device, dtype):
        model = UnifiedModel(PatchTokenizer(PATCH, colours=1), Flow, config, rules)
    model.text = TextTokenizer.train([], 260)  # bytes: a letter is a token
    with torch.no_grad():
        for parameter in model.parameters():  # what begins as zero would hide a wrong result
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model


@contextmanager
def made_on(device: str, dtype: torch.dtype) -> Iterator[None]:
    """Weights that are made inside are there at once: large ones never pass through the host."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def random_text(length: int, rng: np.random.Generator) -> str:
    """Letters, one token each."""
    return "".join(chr(c) for c in rng.integers(97, 123, length))


def random_image(side: int, rng: np.random.Generator) -> Image.Image:
    """Grey noise of `side` x `side` tokens."""
    return Image.fromarray(rng.integers(0, 256, (side * PATCH, side * PATCH), dtype=np.uint8))


def document(text: int, side: int, rng: np.random.Generator) -> Document:
    """`text` text tokens, begin of document and of image among them, then an image of `side` x `side`; all learned.

    `side` 0 is text alone, with its begin and end.
    """
    words = Part(random_text(text - 2, rng))
    return Document((words, Part(random_image(side, rng))) if side else (words,))


def packed(model: UnifiedModel, documents: Sequence[Document], seed: int = 0) -> PackedSequence:
    """Documents as the loader would pack them."""
    laid = [model.sequencer.document(d, (seed, i), train=False) for i, d in enumerate(documents)]
    return pack(laid, model.backbone.config.experts, model.generator.reads)


def batch(model: UnifiedModel, count: int, text: int, side: int) -> PackedSequence:
    """`count` documents of one length."""
    rng = np.random.default_rng(0)
    return packed(model, [document(text, side, rng) for _ in range(count)])


def segments(documents: Sequence[Sequence[tuple[int, bool]]]) -> SegmentTable:
    """Documents as runs of (length, whether they are an image whose tokens see each other)."""
    flat = [(d, length, image) for d, runs in enumerate(documents) for length, image in runs]
    number, length, image = (np.array(column) for column in zip(*flat))
    return SegmentTable(number, length, image.astype(bool), np.zeros(len(flat), dtype=bool))


def expert_order(table: SegmentTable) -> Tensor:
    """Place of each token when text comes first and images after it, as the backbone holds them."""
    image = np.repeat(table.bidirectional, table.length)
    order = np.argsort(image, kind="stable")
    inverse = np.empty_like(order)
    inverse[order] = np.arange(len(order))
    return torch.from_numpy(inverse)


def alternating(length: int, text: int, image: int) -> list[tuple[int, bool]]:
    """One document: text, image, text, image ..."""
    return [(text, False), (image, True)] * (length // (text + image))
