"""The unified model: text, image tokenizer, backbone and generator, wired.

Letters: S tokens of a pack, C width, T image tokens, N images.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from unimodal.attention import packed_attention
from unimodal.backbone import SCHEMES, Backbone, BackboneConfig
from unimodal.packing import PackedSequence, Sequencer, SequenceRules, kind_order
from unimodal.text import TextTokenizer
from unimodal_generators.base import Block, ImageGenerator, LossBreakdown, LossTerm, TokenKind
from unimodal_tokenizers.base import Grid, ImageTokenizer, ImageTokens, TokenLayout


class UnifiedModel(nn.Module):
    """One transformer over text and image tokens.

    Args:
        tokenizer: pixels <-> image tokens; frozen here.
        generator: how image tokens are learned and sampled; the tokenizer's layout and the width are passed to it.
        backbone: shape of the decoder.
        sequence: how documents are laid out.
    """

    def __init__(
        self,
        tokenizer: ImageTokenizer,
        generator: Callable[[TokenLayout, int], ImageGenerator],
        backbone: BackboneConfig,
        sequence: SequenceRules,
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer.requires_grad_(False).eval()
        self.generator = generator(tokenizer.layout, backbone.width)
        self.generator.bind(tokenizer.lookup)
        self.backbone = Backbone(backbone)
        self.sequence = sequence
        self.scheme = SCHEMES[backbone.positions]
        self.kinds = kind_order(backbone.experts)
        self._text: TextTokenizer | None = None
        self.config: dict[str, Any] | None = None  # what an export says it was built from
        for height, width in sequence.image_sizes:
            tokenizer.layout.grid(height, width)  # refuses a size the tokenizer cannot cut

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "UnifiedModel":
        """The model of an export or a run folder, in evaluation mode, with averaged weights."""
        from unimodal.export import load_run

        return load_run(Path(folder))

    def train(self, mode: bool = True) -> "UnifiedModel":
        """The tokenizer stays in evaluation mode."""
        super().train(mode)
        self.tokenizer.eval()
        return self

    @property
    def text(self) -> TextTokenizer:
        """The text tokenizer, which training makes from its corpus and an export carries."""
        if self._text is None:
            raise ValueError("text tokenizer: expected one (trained by `fit`, or loaded with an export), got none")
        return self._text

    @text.setter
    def text(self, tokenizer: TextTokenizer) -> None:
        rows = self.backbone.config.vocabulary
        if len(tokenizer) > rows:
            raise ValueError(
                f"backbone.vocabulary: expected at least the text tokenizer's {len(tokenizer)}, got {rows}"
            )
        self._text = tokenizer

    @property
    def has_text(self) -> bool:
        """Whether a text tokenizer was given."""
        return self._text is not None

    @property
    def sequencer(self) -> Sequencer:
        """Lays documents out as this model reads them."""
        return Sequencer(self.text, self.tokenizer.layout, self.generator, self.scheme, self.sequence)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.backbone.embedding.weight.device

    def forward(self, packed: PackedSequence) -> LossBreakdown:
        """Sums and counts of every loss over a packed sequence."""
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):  # the ids that decoding will read
            tokens = self.encode(packed.images)
        learned = self.generator.corrupt(tokens.select(packed.learned_images), packed.learned_blocks)
        context = self.generator.context(tokens.select(packed.context_images))
        learned_embeddings = self.generator.embed(learned)
        values = {
            TokenKind.TEXT: self.backbone.embedding(packed.text_ids),
            TokenKind.CLEAN: self.place(self.generator.embed(context).values, packed.context_blocks),
            TokenKind.LEARNED: self.place(learned_embeddings.values, packed.learned_blocks),
        }
        hidden = self.hidden(values, packed)
        losses = self.generator.loss(hidden[packed.image_reads], learned_embeddings, learned)
        logits = self.backbone.logits(hidden[packed.text_reads])  # (M, V)
        text = F.cross_entropy(logits, packed.text_targets, reduction="sum")
        return {"text": LossTerm(text, len(packed.text_targets)), **losses}

    def hidden(self, values: dict[TokenKind, Float[Tensor, "_ C"]], packed: PackedSequence) -> Float[Tensor, "S C"]:
        """Hidden states, in expert order, of embeddings given by kind."""
        dtype = self.backbone.embedding.weight.dtype  # of the residual stream, also under autocast
        x = torch.cat([values[kind].to(dtype) for kind in self.kinds if kind in values])  # (S, C)
        attention = packed_attention(self.backbone.config.attention, packed.table, packed.order, packed.inverse)
        return self.backbone(x, packed.positions, packed.splits, attention)

    def encode(self, images: Sequence[Float[Tensor, "_ 3 _ _"]]) -> ImageTokens:
        """Tokens of images grouped by size."""
        if not images:
            layout = self.tokenizer.layout
            shape = (0, layout.dim) if layout.kind == "continuous" else (0, *layout.codebooks[1:2])
            dtype = self.backbone.embedding.weight.dtype if layout.kind == "continuous" else torch.long
            return ImageTokens(torch.empty(shape, dtype=dtype, device=self.device), ())
        return ImageTokens.cat(
            [self.tokenizer.encode(group.to(self.backbone.embedding.weight.dtype)) for group in images]
        )

    def place(self, values: Float[Tensor, "T C"], blocks: Sequence[Block]) -> Float[Tensor, "T C"]:
        """Image embeddings plus what the position scheme adds to them."""
        config = self.backbone.config
        added = [_additive(config.positions, block.grid, config.width, values.device) for block in blocks]
        parts = [a[b.offset : b.offset + b.length] for a, b in zip(added, blocks, strict=True) if a is not None]
        return values + torch.cat(parts).to(values.dtype) if parts else values  # (T, C)


@lru_cache(maxsize=256)
def _additive(positions: str, grid: Grid, width: int, device: torch.device) -> Float[Tensor, "n C"] | None:
    added = SCHEMES[positions].additive(grid, width)
    return None if added is None else added.to(device)
