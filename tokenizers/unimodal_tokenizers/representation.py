"""Features of a frozen vision encoder as continuous tokens, and a trained decoder that makes pixels of them.

Emu (arXiv 2307.05222) and MetaMorph (arXiv 2412.14164) predict such features; RAE (arXiv 2510.11690) shows that a plain
transformer decoder brings them back to pixels, VUGEN (arXiv 2510.06529) that few channels of them are easier to draw.

Letters: B images, H height, W width (pixels); h, w the token grid, N = h w; p the encoder's patch; E channels of a
feature, D of a token, C width of the decoder.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor, nn

from unimodal_tokenizers.base import Grid, Reconstruction, TokenLayout, TrainableTokenizer
from unimodal_tokenizers.frozen import FrozenEncoder
from unimodal_tokenizers.normalise import Normalise
from unimodal_tokenizers.quantizers.base import step_generator
from unimodal_tokenizers.transformer import Transformer, patches_to_images, places


class Representation(TrainableTokenizer):
    """Patch features of a timm vision transformer, each channel brought to mean 0 and deviation 1 over the images.

    The encoder never learns; the decoder does, and the projection where there is one. Mean and deviation are those of the
    batches seen in training, averaged exponentially, and stored. The encoder begins as random weights:
    `encoder.load` gives it its own, and an export carries them.
    """

    steps: Int64[Tensor, ""]

    def __init__(
        self,
        encoder: str,
        options: Mapping[str, Any] | None = None,
        dim: int | None = None,
        decoder_width: int = 256,
        decoder_depth: int = 4,
        decoder_heads: int = 4,
        noise: float = 0.0,
    ) -> None:
        """Args:

        encoder: name of a vision transformer in timm, without a tag of weights: nothing is downloaded.
        options: of it, as `timm.create_model` takes them: patch_size, embed_dim, depth ...
        dim: channels D of a token, a linear projection of the features that is learned with the decoder; None: all E.
        decoder_width: of the pixel decoder, a transformer over the token grid; a multiple of 4.
        decoder_depth: its layers.
        decoder_heads: its attention heads.
        noise: tau of the noise on tokens that the decoder learns to draw from, so that it bears what a generator gets wrong.
            It depends on a counter among the buffers, and on the process, only.
        """
        super().__init__()
        if decoder_width % 4 or decoder_width % decoder_heads:
            raise ValueError(f"decoder_width: expected a multiple of 4 and of decoder_heads, got {decoder_width}")
        if noise < 0:
            raise ValueError(f"noise: expected at least 0, got {noise}")
        if dim is not None and dim < 1:
            raise ValueError(f"dim: expected at least 1, or none for all of the encoder's channels, got {dim}")
        self.encoder = FrozenEncoder(encoder, options)
        self.weights = {}  # nothing but the reconstruction
        width, p = self.encoder.layout.dim, self.encoder.layout.stride
        self.layout = TokenLayout("continuous", dim=dim or width, stride=p)
        self.project = nn.Identity() if dim is None else nn.Linear(width, dim, bias=False)
        self.normalise = Normalise(self.layout.dim)
        self.noise = noise
        self.token_in = nn.Linear(self.layout.dim, decoder_width)
        self.decoder = Transformer(decoder_width, decoder_depth, decoder_heads)
        self.pixels_out = nn.Linear(decoder_width, 3 * p * p)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))  # training batches that got noise

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Reconstruction:
        """Images `(B, 3, H, W)` in [-1, 1] to tokens and back, for training the decoder."""
        grid = self.layout.grid(*images.shape[-2:])
        tokens = self.encode_batch(images)
        return Reconstruction(self.decode_batch(self._noised(tokens) if self.training and self.noise else tokens, grid))

    @property
    def last_layer(self) -> nn.Parameter:
        """The linear layer that makes pixels."""
        return self.pixels_out.get_parameter("weight")

    def encode_batch(
        self, images: Float[Tensor, "B 3 H W"], rng: torch.Generator | None = None
    ) -> Float[Tensor, "B N D"]:
        """Images in [-1, 1] to normalised features; `rng` is not used. In training mode the batch's own statistics.

        Raises:
            ValueError: the patch does not divide the image's height and width.
        """
        tokens = self.project(self.encoder(images))
        return self.normalise(tokens.flatten(0, 1)).view_as(tokens)  # (B, N, D)

    def decode_batch(
        self, tokens: Shaped[Tensor, "B N *channels"], grid: Grid, rngs: Sequence[torch.Generator] | None = None
    ) -> Float[Tensor, "B 3 H W"]:
        """Normalised features to images, about in [-1, 1] (not clamped); `rngs` are not used.

        Raises:
            ValueError: the tokens are not h w vectors of D channels an image.
        """
        self.check_tokens(tokens, grid)
        x = self.token_in(tokens.to(self.token_in.weight.dtype))
        x = self.decoder(x + places(grid, x))  # (B, N, C)
        return patches_to_images(self.pixels_out(x), grid, self.layout.stride)

    def check_tokens(self, tokens: Shaped[Tensor, "B N *channels"], grid: Grid) -> None:
        """Refuse what is not h w vectors of D channels an image."""
        expected = (grid.length, self.layout.dim)
        if tuple(tokens.shape[1:]) != expected:
            raise ValueError(f"tokens: expected (N, D) = {expected} an image, got {tuple(tokens.shape[1:])}")

    def lookup(self, tokens: Shaped[Tensor, "T *channels"]) -> Float[Tensor, "T D"]:
        """Continuous tokens are their own vectors."""
        if tokens.dim() != 2 or tokens.shape[-1] != self.layout.dim:
            raise ValueError(f"tokens: expected vectors (T, {self.layout.dim}), got shape {tuple(tokens.shape)}")
        return tokens

    def _noised(self, tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        """z + sigma n with n ~ N(0, 1) and, image by image, sigma ~ |N(0, tau^2)| (RAE, section 4.3)."""
        rng = step_generator(0, int(self.steps))
        self.steps.add_(1)
        sigma = self.noise * torch.randn(len(tokens), 1, 1, generator=rng).abs()
        return tokens + (sigma * torch.randn(tokens.shape, generator=rng)).to(tokens)
