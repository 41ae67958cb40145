"""An image as a grid of ids: a convolutional encoder, a quantizer that is passed in, a convolutional decoder.

Letters: B images, H height, W width (pixels); h, w the token grid; N tokens of one image, T of all images end to end, P
encoder outputs of all of them (B h w); Q codebooks, D channels of an encoder output.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Float, Int64, Shaped
from torch import Tensor, nn

from unimodal_tokenizers.base import Grid, Reconstruction, TokenLayout, TrainableTokenizer
from unimodal_tokenizers.quantizers.base import Quantized, Quantizer
from unimodal_tokenizers.semantic import SemanticHead
from unimodal_tokenizers.squares import Keeps, Squares, check_space_to_depth


class CodebookTokenizer(TrainableTokenizer):
    """Quantization between the convolutional encoder and decoder of latent diffusion.

    The networks are those of diffusers' AutoencoderKL, without the distribution; LlamaGen (arXiv 2406.06525)
    uses the same kind. Subclasses say how encoder outputs become ids and back.
    """

    def __init__(
        self,
        codebooks: Sequence[int],
        dim: int,
        channels: Sequence[int],
        blocks: int,
        groups: int,
        attention: bool,
        scales: Sequence[int] = (),
        space_to_depth: int = 1,
        keeps: Keeps = "vectors",
        slices: int = 1,
    ) -> None:
        super().__init__()
        check_space_to_depth(space_to_depth)
        if not channels or any(c < 1 or c % groups for c in channels):
            raise ValueError(f"channels: expected multiples of groups = {groups}, at least one, got {list(channels)}")
        if blocks < 1:
            raise ValueError(f"blocks: expected at least 1, got {blocks}")
        # Here, not above: diffusers takes seconds to import, and whoever trains on pixels never needs it.
        from diffusers.models.autoencoders.vae import Decoder, Encoder

        n, colours = len(channels), 3 * space_to_depth**2
        kind: Literal["multiscale", "discrete"] = "multiscale" if scales else "discrete"
        stride = space_to_depth * 2 ** (n - 1)
        self.layout = TokenLayout(kind, dim, stride=stride, codebooks=tuple(codebooks), scales=tuple(scales))
        shared = {
            "block_out_channels": tuple(channels),
            "layers_per_block": blocks,
            "norm_num_groups": groups,
            "mid_block_add_attention": attention,
        }
        self.encoder = Encoder(colours, dim, down_block_types=("DownEncoderBlock2D",) * n, double_z=False, **shared)
        self.decoder = Decoder(dim, colours, up_block_types=("UpDecoderBlock2D",) * n, **shared)
        self.squares = Squares(space_to_depth, stride, dim, keeps, slices) if space_to_depth > 1 else None
        if self.squares is not None:
            self.squares.silence(self.encoder.conv_out, self.decoder.conv_out)

    @abstractmethod
    def quantize(self, vectors: Float[Tensor, "P D"], grid: Grid) -> Quantized:
        """Encoder outputs through the codebook, with the terms of the loss; counts and revives in training mode."""

    @abstractmethod
    def vectors_to_ids(self, vectors: Float[Tensor, "P D"], grid: Grid) -> Int64[Tensor, "B N *Q"]:
        """Encoder outputs to ids; changes nothing."""

    @abstractmethod
    def ids_to_vectors(self, ids: Shaped[Tensor, "B N *Q"], grid: Grid) -> Float[Tensor, "P D"]:
        """Ids to what the decoder reads."""

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Reconstruction:
        """Images `(B, 3, H, W)` in [-1, 1] through the codebook and back, with the quantizer's terms of the loss.

        Raises:
            ValueError: the stride does not divide the image's height and width.
        """
        grid = self.layout.grid(*images.shape[-2:])
        quantized = self.quantize(self._images_to_vectors(images), grid)
        images = self._vectors_to_images(quantized.quantized, grid)
        return Reconstruction(images, quantized.terms, quantized.counts)

    @property
    def last_layer(self) -> nn.Parameter:
        """The network's last weight; a linear map may stand beside it."""
        return self.decoder.conv_out.weight

    def encode_batch(
        self, images: Float[Tensor, "B 3 H W"], rng: torch.Generator | None = None
    ) -> Int64[Tensor, "B N *Q"]:
        """Images `(B, 3, H, W)` in [-1, 1] to ids `(B, N)`, or `(B, N, Q)` of several codebooks; `rng` is not used.

        Leaves the codebook's statistics alone.

        Raises:
            ValueError: the stride does not divide the image's height and width.
        """
        grid = self.layout.grid(*images.shape[-2:])
        with torch.no_grad():
            return self.vectors_to_ids(self._images_to_vectors(images), grid)

    def decode_batch(
        self, tokens: Shaped[Tensor, "B N *channels"], grid: Grid, rngs: Sequence[torch.Generator] | None = None
    ) -> Float[Tensor, "B 3 H W"]:
        """Ids `(B, N)` or `(B, N, Q)` to images `(B, 3, H, W)`, about in [-1, 1] (not clamped); `rngs` are not used.

        Raises:
            ValueError: ids that are no integers or lie outside the codebook, or not as many of them as the grid has.
        """
        books = list(self.layout.codebooks[1:] and [len(self.layout.codebooks)])
        if tokens.dim() < 2 or list(tokens.shape[1:]) != [grid.length, *books]:
            expected = ", ".join(["B", *map(str, [grid.length, *books])])
            raise ValueError(f"tokens: expected ids ({expected}), got shape {tuple(tokens.shape)}")
        return self._vectors_to_images(self.ids_to_vectors(tokens, grid), grid)  # (B, 3, H, W)

    def _images_to_vectors(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "P D"]:
        squares = self.squares
        z = self.encoder(images) if squares is None else self.encoder(squares.fold(images)) + squares.analysis(images)
        return rearrange(z, "B D h w -> (B h w) D")  # (P, D)

    def _vectors_to_images(self, vectors: Float[Tensor, "P D"], grid: Grid) -> Float[Tensor, "B 3 H W"]:
        vectors, squares = (
            vectors.to(self.last_layer.dtype),
            self.squares,
        )  # codebooks say fp32, whatever the network is in
        z = rearrange(vectors, "(B h w) D -> B D h w", h=grid.h, w=grid.w)  # (B, D, h, w)
        return self.decoder(z) if squares is None else squares.unfold(self.decoder(z)) + squares.synthesis(z)


class GridTokenizer(CodebookTokenizer):
    """An image as h x w positions, each an id of every codebook that the quantizer has."""

    def __init__(
        self,
        quantizer: Quantizer,
        channels: Sequence[int],
        blocks: int,
        groups: int = 8,
        attention: bool = False,
        semantic: SemanticHead | None = None,
        space_to_depth: int = 1,
    ) -> None:
        """Args:

        quantizer: what makes ids of the encoder's outputs.
        channels: width of the networks at each resolution, fine to coarse; each further one halves the resolution, so
            that the stride is space_to_depth * 2 ** (len(channels) - 1) pixels.
        blocks: residual blocks of the encoder at each resolution (the decoder has one more).
        groups: groups of the group norms; must divide every width.
        attention: whether the middle of both networks attends over the whole image.
        semantic: what the quantized vectors are to mean.
        space_to_depth: side in pixels of the squares that the networks see as one place; above 1 a linear map stands
            beside them (`Squares`).
        """
        super().__init__(
            quantizer.codebooks,
            quantizer.dim,
            channels,
            blocks,
            groups,
            attention,
            space_to_depth=space_to_depth,
            keeps=quantizer.keeps,
            slices=quantizer.slices,
        )
        self.quantizer, self.semantic = quantizer, semantic
        self.weights = {**quantizer.weights, **({} if semantic is None else semantic.weights)}
        if semantic is not None:
            semantic.check(quantizer.dim)

    def forward(self, images: Float[Tensor, "B 3 H W"], texts: Sequence[str] | None = None) -> Reconstruction:
        """Images `(B, 3, H, W)` in [-1, 1] through the quantizer and back, with the terms of the loss.

        Args:
            images: of one size.
            texts: what is said of each, for a `semantic` that asks for it.

        Raises:
            ValueError: the stride does not divide the height and width; texts that are missing or not asked for.
        """
        grid = self.layout.grid(*images.shape[-2:])
        quantized = self.quantizer(self._images_to_vectors(images))
        terms = dict(quantized.terms)
        if self.semantic is not None:
            vectors = quantized.quantized.unflatten(0, (-1, grid.length))  # (B, N, D)
            terms |= self.semantic(vectors, grid, images, texts)
        return Reconstruction(self._vectors_to_images(quantized.quantized, grid), terms, quantized.counts)

    def quantize(self, vectors: Float[Tensor, "P D"], grid: Grid) -> Quantized:
        """Each output by itself."""
        return self.quantizer(vectors)

    def vectors_to_ids(self, vectors: Float[Tensor, "P D"], grid: Grid) -> Int64[Tensor, "B N *Q"]:
        """Each output by itself."""
        return self.quantizer.vectors_to_ids(vectors).unflatten(0, (-1, grid.length))  # (B, N, ...)

    def ids_to_vectors(self, ids: Shaped[Tensor, "B N *Q"], grid: Grid) -> Float[Tensor, "P D"]:
        """Ids to what they say."""
        return self.lookup(ids.flatten(0, 1))

    def lookup(self, tokens: Shaped[Tensor, "T *channels"]) -> Float[Tensor, "T D"]:
        """Ids `(T,)`, or `(T, Q)` of several codebooks, to what they say; a residual's first q codebooks say `(T, q)`.

        Raises:
            ValueError: ids that are no integers, lie outside the codebook, or are not one of each codebook.
        """
        return self.quantizer.ids_to_vectors(tokens)

    def after_step(self) -> None:
        """A codebook that learns without gradients moves."""
        self.quantizer.after_step()
