"""An image as a row of ids: learned queries read what the image says, and a decoder draws it from their codes alone.

TiTok (arXiv 2406.07550); causal queries as SEED's (arXiv 2307.08041); prefixes that decode by nested dropout (arXiv
1402.0915; FlexTok, arXiv 2502.13967; One-D-Piece, arXiv 2501.10064).

Letters: B images, H height, W width (pixels); h, w the grid of patches, P = h w; N tokens of an image, n those of a prefix,
T of all images end to end; Q codebooks; C width, D channels of a code.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from unimodal_tokenizers.base import Grid, Reconstruction, TokenLayout, TrainableTokenizer
from unimodal_tokenizers.quantizers import Quantizer
from unimodal_tokenizers.semantic import SemanticHead
from unimodal_tokenizers.transformer import (
    Transformer,
    causal_queries,
    images_to_patches,
    patches_to_images,
    places,
    spread,
)


class RowTokenizer(TrainableTokenizer):
    """What tokenizers share whose codes lie in a row, at no place of the image: one size, and a transformer that draws."""

    steps: Int64[Tensor, ""]
    no_weight_decay: ClassVar[tuple[str, ...]] = ("ranks", "drawn")

    def __init__(
        self,
        image: tuple[int, int],
        patch: int,
        dim: int,
        codebooks: tuple[int, ...],
        tokens: int | None = None,
        seed: int = 0,
    ) -> None:
        """Subclasses then build what reads, and `_build_drawer`.

        image: (height, width) in pixels of every image.
        patch: side of a patch in pixels.
        dim: channels D of a code.
        codebooks: entries of each.
        tokens: ids of an image, N; None: one a patch.
        seed: of what is drawn in training.
        """
        super().__init__()
        if patch < 1 or any(side < 1 or side % patch for side in image):
            raise ValueError(f"image: expected multiples of patch = {patch}, got {list(image)}")
        h, w = image
        self.cells = Grid(h // patch, w // patch)
        n = self.cells.length if tokens is None else tokens
        self.layout = TokenLayout("sequence", dim, stride=patch, codebooks=codebooks, length=n, image=(h, w))
        self.seed = seed

    def _build_drawer(
        self,
        quantizer: Quantizer,
        width: int,
        depth: int,
        heads: int,
        semantic: SemanticHead | None,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        """From what was read to codes and to pixels; `weights` are of the terms that are neither's."""
        self.codes_out = nn.Linear(width, quantizer.dim)
        self.quantizer = quantizer
        self.codes_in = nn.Linear(quantizer.dim, width)
        self.ranks = nn.Parameter(0.02 * torch.randn(self.layout.length, width))  # which of the codes one is
        self.drawn = nn.Parameter(0.02 * torch.randn(width))  # M: what is read where a patch is drawn
        self.decoder = Transformer(width, depth, heads)
        self.pixels_out = nn.Linear(width, 3 * self.layout.stride**2)
        self.semantic = semantic
        if semantic is not None:
            semantic.check(quantizer.dim)
        self.weights = {**quantizer.weights, **(weights or {}), **({} if semantic is None else semantic.weights)}
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))  # training batches that drew something

    @property
    def last_layer(self) -> nn.Parameter:
        """The decoder's last weight."""
        return self.pixels_out.get_parameter("weight")

    def after_step(self) -> None:
        """A codebook that learns without gradients moves."""
        self.quantizer.after_step()

    def _rng(self) -> torch.Generator:
        """Of this training batch: of a counter among the buffers only, the same on every process."""
        rng = torch.Generator().manual_seed(1_000_003 * self.seed + int(self.steps))
        self.steps.add_(1)
        return rng


class SequenceTokenizer(RowTokenizer):
    """N ids an image, which lie at no place of it; images of one size.

    With P the patches, L the learned queries and M the learned token of a pixel patch (TiTok):

        z = Enc(P + L)[L],   image = Dec(Quant(z) + M)[M]

    where + puts one row behind the other. Each query begins as the mean of its share of the patches, and each patch that is
    drawn with the code of its share: bare, the two transformers take long to find one another. How many codes of a batch
    the decoder is shown in training depends on a counter among the buffers only: training that was stopped and resumed
    makes the same choices, and so does every process.
    """

    def __init__(
        self,
        quantizer: Quantizer,
        image: tuple[int, int],
        patch: int,
        tokens: int,
        width: int,
        depth: int,
        heads: int,
        causal: bool = False,
        shortest: int | None = None,
        semantic: SemanticHead | None = None,
        seed: int = 0,
    ) -> None:
        """Args:

        quantizer: of the queries' vectors.
        image: (height, width) in pixels of every image.
        patch: side in pixels of the squares that both transformers read and draw.
        tokens: ids of an image, N.
        width: channels of both transformers.
        depth: layers of each.
        heads: attention heads.
        causal: whether a query sees none behind it, so that an id depends on no later one.
        shortest: ids of the shortest prefix that is trained to decode, drawn evenly from there to N; None: no prefix is.
        semantic: what its codes are to mean.
        seed: of the prefixes' lengths.
        """
        if tokens < 1:
            raise ValueError(f"tokens: expected at least 1, got {tokens}")
        if shortest is not None and not 1 <= shortest <= tokens:
            raise ValueError(f"shortest: expected from 1 to tokens = {tokens}, got {shortest}")
        super().__init__(image, patch, quantizer.dim, quantizer.codebooks, tokens, seed)
        self.causal, self.shortest = causal, shortest
        self.patches_in = nn.Linear(3 * patch * patch, width)
        self.queries = nn.Parameter(0.02 * torch.randn(tokens, width))
        self.encoder = Transformer(width, depth, heads)
        self._build_drawer(quantizer, width, depth, heads, semantic)

    no_weight_decay = (*RowTokenizer.no_weight_decay, "queries")

    def extra_repr(self) -> str:
        """Who sees whom, which no weight shows."""
        return f"causal={self.causal}"

    def forward(self, images: Float[Tensor, "B 3 H W"], texts: Sequence[str] | None = None) -> Reconstruction:
        """Images `(B, 3, H, W)` in [-1, 1] through their ids and back, with the terms of the loss.

        Args:
            images: of the one size.
            texts: what is said of each, for a `semantic` that asks for it.

        Raises:
            ValueError: images of another size; texts that are missing or not asked for.
        """
        grid = self.layout.grid(*images.shape[-2:])
        quantized = self.quantizer(self.images_to_vectors(images).flatten(0, 1))
        vectors = quantized.quantized.unflatten(0, (-1, grid.length))  # (B, N, D)
        terms = dict(quantized.terms)
        if self.semantic is not None:
            terms |= self.semantic(vectors, grid, images, texts)
        return Reconstruction(self.vectors_to_images(vectors[:, : self._length()]), terms, quantized.counts)

    def _length(self) -> int:
        """Codes the decoder is shown of each image of this batch: all, but in training of prefixes."""
        n = self.layout.length
        if not self.training or self.shortest is None:
            return n
        return int(torch.randint(self.shortest, n + 1, (), generator=self._rng()))

    def encode_batch(
        self, images: Float[Tensor, "B 3 H W"], rng: torch.Generator | None = None
    ) -> Int64[Tensor, "B N *Q"]:
        """Images `(B, 3, H, W)` in [-1, 1] to ids; `rng` is not used. Leaves the quantizer's statistics alone.

        Raises:
            ValueError: images of another size.
        """
        grid = self.layout.grid(*images.shape[-2:])
        with torch.no_grad():
            ids = self.quantizer.vectors_to_ids(self.images_to_vectors(images).flatten(0, 1))
            return ids.unflatten(0, (-1, grid.length))  # (B, N, *Q)

    def decode_batch(
        self, tokens: Shaped[Tensor, "B N *channels"], grid: Grid, rngs: Sequence[torch.Generator] | None = None
    ) -> Float[Tensor, "B 3 H W"]:
        """Ids, or a prefix of them, to images, about in [-1, 1] (not clamped); `rngs` are not used.

        Raises:
            ValueError: ids that are no integers or lie outside the codebook, a prefix that was not trained to decode, or
                not as many ids as the grid has.
        """
        n, longest = grid.length, self.layout.length
        least = longest if self.shortest is None else self.shortest
        if grid != Grid(1, n) or not least <= n <= longest:
            allowed = str(longest) if least == longest else f"{least} to {longest}"
            raise ValueError(f"tokens: expected {allowed} of an image (`shortest` of the tokenizer), got {n}")
        books = self.layout.codebooks
        if list(tokens.shape[1:]) != [n, *([len(books)] if len(books) > 1 else [])]:
            raise ValueError(f"tokens: expected {n} ids of {len(books)} codebooks, got shape {tuple(tokens.shape)}")
        vectors = self.quantizer.ids_to_vectors(tokens.flatten(0, 1))
        return self.vectors_to_images(vectors.unflatten(0, (-1, n)))  # (B, n, D)

    def lookup(self, tokens: Shaped[Tensor, "T *channels"]) -> Float[Tensor, "T D"]:
        """Ids to what their codes say.

        Raises:
            ValueError: ids that are no integers or lie outside the codebook.
        """
        return self.quantizer.ids_to_vectors(tokens)

    def images_to_vectors(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B N D"]:
        """Enc(P + L)[L]: what each query read."""
        patches = self.patches_in(images_to_patches(images, self.layout.stride))  # (B, P, C)
        patches = patches + places(self.cells, patches)
        shares = F.adaptive_avg_pool1d(patches.mT, self.layout.length).mT  # (B, N, C)
        x = torch.cat([patches, shares + self.queries], dim=1)
        mask = causal_queries(patches.shape[1], self.layout.length, images.device) if self.causal else None
        return self.codes_out(self.encoder(x, mask)[:, patches.shape[1] :])

    def vectors_to_images(self, vectors: Float[Tensor, "B n D"]) -> Float[Tensor, "B 3 H W"]:
        """Dec(codes + M)[M]: the image, of as many codes as there are."""
        n = vectors.shape[1]
        codes = self.codes_in(vectors.to(self.codes_in.weight.dtype)) + self.ranks[:n]  # (B, n, C)
        row = F.pad(codes, (0, 0, 0, self.layout.length - n))  # (B, N, C)
        drawn = self.drawn + places(self.cells, self.drawn) + spread(row, Grid(1, self.layout.length), self.cells)
        x = self.decoder(torch.cat([codes, drawn], dim=1))[:, n:]
        return patches_to_images(self.pixels_out(x), self.cells, self.layout.stride)
