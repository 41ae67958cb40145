"""The unified model: text, image tokenizer, backbone and generator, wired.

Letters: S tokens of a pack, P places of its expert order, C width, T image tokens, N images, n text tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from unimodal.attention import choose_backend, packed_attention
from unimodal.backbone import SCHEMES, Backbone, BackboneConfig
from unimodal.packing import PackedSequence, Sequencer, kind_order
from unimodal.sequence_rules import SequenceRules
from unimodal.text import SPECIAL_TOKENS, TextTokenizer
from unimodal.vision import VisionEncoder
from unimodal_generators.base import Block, ImageGenerator, LossBreakdown, LossTerm, TokenKind
from unimodal_generators.cross_entropy import linear_cross_entropy
from unimodal_tokenizers.base import Grid, ImageTokenizer, ImageTokens, TokenLayout


class UnifiedModel(nn.Module):
    """One transformer over text and image tokens.

    Args:
        tokenizer: pixels <-> image tokens; frozen here.
        generator: how image tokens are learned and sampled; the tokenizer's layout and the width are passed to it.
        backbone: shape of the decoder.
        sequence: how documents are laid out.
        vision: gives images as context the features that `sequence.context` asks for.
    """

    def __init__(
        self,
        tokenizer: ImageTokenizer,
        generator: Callable[[TokenLayout, int], ImageGenerator],
        backbone: BackboneConfig,
        sequence: SequenceRules,
        vision: VisionEncoder | None = None,
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer.requires_grad_(False).eval()
        self.generator = generator(tokenizer.layout, backbone.width)
        _check_condition(self.generator, backbone)
        _check_layers(self.generator, backbone)
        _check_vision(vision, sequence)
        if sequence.write_size and self.generator.text is not None:  # nobody learns what is written token by token
            raise ValueError("sequence.write_size: expected false where generator.text writes by the block, got true")
        self.vision = vision
        self.connector = None if vision is None else vision.connect(backbone.width)
        self.backbone = Backbone(backbone, self.generator.image_ids)
        self.generator.bind(tokenizer, self.backbone.image_rows if self.generator.image_ids else None)
        self.sequence = sequence
        last = self.generator.layers[-1] in (-1, backbone.depth - 1)
        self.layers = self.generator.layers if last else (*self.generator.layers, -1)  # the text's is the last of them
        self.image_channels = len(self.generator.layers) * backbone.width  # of hidden states, those for the generator
        self.scheme = SCHEMES[backbone.positions]
        self.kinds = kind_order(backbone.experts)
        self._text: TextTokenizer | None = None
        self.config: dict[str, Any] | None = None  # what an export says it was built from
        for height, width in sequence.image_sizes:
            self.generator.plan_context(tokenizer.layout.grid(height, width))  # each refuses what it cannot cut
            if vision is not None:
                vision.grid(height, width)

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
        config = self.backbone.config
        if config.added_tokens:  # the special tokens are rows of their own: those of `vocabulary` stay as they came
            if config.added_tokens < SPECIAL_TOKENS:
                raise ValueError(
                    f"backbone.added_tokens: expected 0, or at least {SPECIAL_TOKENS} for the special tokens, "
                    f"got {config.added_tokens}"
                )
            if tokenizer.entries > config.vocabulary:
                raise ValueError(
                    f"backbone.vocabulary: expected at least the text tokenizer's {tokenizer.entries} entries, "
                    f"got {config.vocabulary}"
                )
            tokenizer = tokenizer.placed(config.vocabulary)
        if len(tokenizer) > config.rows:
            raise ValueError(
                f"backbone.vocabulary: expected at least the text tokenizer's {len(tokenizer)}, got {config.rows}"
            )
        self._text = tokenizer

    @property
    def has_text(self) -> bool:
        """Whether a text tokenizer was given."""
        return self._text is not None

    @property
    def sequencer(self) -> Sequencer:
        """Lays documents out as this model reads them."""
        return Sequencer(self.text, self.tokenizer.layout, self.generator, self.scheme, self.sequence, self.vision)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.backbone.embedding.weight.device

    def forward(self, packed: PackedSequence) -> LossBreakdown:
        """Sums and counts of every loss over a packed sequence."""
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):  # the ids that decoding will read
            tokens = self.tokens(packed)
        learned = self.generator.corrupt(tokens.select(packed.learned_images), packed.learned_blocks)
        context = self.generator.context(tokens.select(packed.context_images))
        embeddings = self.generator.embed(learned), self.generator.embed(context)
        values = {
            TokenKind.TEXT: self.read_text(packed.text_ids),
            TokenKind.LEARNED: self.place(embeddings[0].values, packed.learned_blocks),
            TokenKind.CLEAN: self.place(embeddings[1].values, packed.context_blocks),
            TokenKind.UNDERSTANDING: self.place(self.understand(packed.understood), packed.understood_blocks),
        }
        conditions = [e.condition for e in embeddings if e.condition is not None]
        hidden = self.hidden(values, packed, torch.cat(conditions) if conditions else None, self.layers)
        losses = self.generator.loss(hidden[packed.image_reads, : self.image_channels], embeddings[0], learned)
        last = hidden[packed.text_reads, -self.backbone.config.width :]
        text = linear_cross_entropy(last, self.backbone.tables, packed.text_targets, weights=packed.text_weights)
        router = self.backbone.router_loss()
        if router is not None:  # in training only
            losses["router"] = LossTerm(router, len(packed))
        return {"text": LossTerm(text, packed.text_count), **losses}

    def read_text(self, ids: Int[Tensor, " n"]) -> Float[Tensor, "n C"]:
        """Vectors of text ids; those that are hidden (`MaskedText`) are among them where the generator learns text so."""
        masked = self.generator.text
        return self.backbone.embedding(ids) if masked is None else masked.vectors(ids, self.backbone.embedding)

    def hidden(
        self,
        values: dict[TokenKind, Float[Tensor, "_ C"]],
        packed: PackedSequence,
        condition: Float[Tensor, "N C"] | None = None,
        layers: Sequence[int] = (-1,),
    ) -> Float[Tensor, "P LC"]:
        """Hidden states of `layers`, in expert order, of embeddings given by kind."""
        experts, weight = self.backbone.config.experts, self.backbone.embedding.weight
        slices = []
        for expert, places in enumerate(packed.splits):
            mine = [values[kind] for kind in self.kinds if kind in values and experts.index(kind) == expert]
            empty = places - sum(len(x) for x in mine)
            slices += [x.to(weight.dtype) for x in mine] + [weight.new_zeros(empty, weight.shape[1])]
        backend = choose_backend(self.backbone.config.attention, self.device)
        attention = packed_attention(backend, packed.table, packed.inverse, sum(packed.splits))
        rows = None
        if condition is not None:
            images = {experts.index(TokenKind.LEARNED), experts.index(TokenKind.CLEAN)}
            by_expert = packed.image_rows.split(packed.splits)
            condition = F.pad(condition, (0, 0, 0, 2))  # a compiler makes rules of 0 images and of 1
            rows = condition, [r if expert in images else None for expert, r in enumerate(by_expert)]
        # The residual stream has the weights' type, also under autocast.
        return self.backbone(torch.cat(slices), packed.positions, packed.splits, attention, rows, packed.tokens, layers)

    def tokens(self, packed: PackedSequence) -> ImageTokens:
        """Tokens of all images of a pack that have any, as they are numbered: those stored, then those of pixels."""
        made, stored = self.encode(packed.images[: packed.tokenized]), packed.stored
        return (
            made if stored is None else ImageTokens.cat([replace(stored, values=stored.values.to(made.values)), made])
        )

    def encode(self, images: Sequence[Float[Tensor, "_ 3 _ _"]]) -> ImageTokens:
        """Tokens of images grouped by size."""
        if not images:
            layout = self.tokenizer.layout
            books = len(layout.codebooks)
            shape = (0, layout.dim) if layout.kind == "continuous" else (0, books) if books > 1 else (0,)
            dtype = self.backbone.embedding.weight.dtype if layout.kind == "continuous" else torch.long
            return ImageTokens(torch.empty(shape, dtype=dtype, device=self.device), ())
        return ImageTokens.cat(
            [self.tokenizer.encode(group.to(self.backbone.embedding.weight.dtype)) for group in images]
        )

    def understand(self, images: Sequence[Float[Tensor, "3 _ _"]]) -> Float[Tensor, "T C"]:
        """Understanding features of images of any sizes, end to end, as the backbone reads them."""
        if self.vision is None or self.connector is None:
            return self.backbone.embedding.weight.new_empty(0, self.backbone.config.width)
        # Without images it still runs, so that in training its gradient is zero rather than missing.
        seen = images or [torch.zeros(3, *self.sequence.image_sizes[0], device=self.device)]
        features = self.connector(self.vision.encode_each(seen).values)
        return features if images else features[:0]

    def place(self, values: Float[Tensor, "T C"], blocks: Sequence[Block]) -> Float[Tensor, "T C"]:
        """Image embeddings plus what the position scheme adds to them; to blocks of text it adds nothing."""
        config = self.backbone.config
        parts = []
        for block in blocks:
            added = _additive(config.positions, block.grid, config.width, values.device)
            if added is not None and block.kind != TokenKind.TEXT:
                own = added[block.offset : block.offset + block.length - block.prefix]
                parts.append(F.pad(own, (0, 0, block.prefix, 0)) if block.prefix else own)
        return values + torch.cat(parts).to(values.dtype) if parts else values  # (T, C)


def _check_condition(generator: ImageGenerator, backbone: BackboneConfig) -> None:
    """A condition that nobody reads, or a reader of none, would be a model without time."""
    if backbone.adaln and not generator.conditions:
        name = type(generator).__name__
        raise ValueError(f"backbone.adaln: true needs generator.time: adaln, got a {name} without it")
    if generator.conditions and not backbone.adaln:
        raise ValueError("generator.time: adaln needs backbone.adaln: true, got false")


def _check_layers(generator: ImageGenerator, backbone: BackboneConfig) -> None:
    for layer in generator.layers:
        if not -backbone.depth <= layer < backbone.depth:
            raise ValueError(f"generator.layers: expected layers of backbone.depth {backbone.depth}, got {layer}")


def _check_vision(vision: VisionEncoder | None, sequence: SequenceRules) -> None:
    """Features need somebody who makes them, and somebody who reads them."""
    if vision is None and sequence.context != "clean":
        raise ValueError(f"sequence.context: {sequence.context} needs model.vision, got none")
    if vision is not None and sequence.context == "clean":
        raise ValueError("model.vision: expected sequence.context understanding or both beside it, got clean")


@lru_cache(maxsize=256)
def _additive(positions: str, grid: Grid, width: int, device: torch.device) -> Float[Tensor, "n C"] | None:
    added = SCHEMES[positions].additive(grid, width)
    return None if added is None else added.to(device)
