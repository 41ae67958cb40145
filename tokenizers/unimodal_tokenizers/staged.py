"""Few channels a patch that unfold into meaning, and from there into pixels (MingTok, arXiv 2510.06590).

Generators learn the compact tokens; what understands reads the features they unfold into.

Letters: B images, H height, W width (pixels); h, w the token grid, N = h w; T tokens of all images end to end; D channels of
a token, C width of the features.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from unimodal_tokenizers.base import Grid, ImageTokens, Reconstruction, TokenLayout, TrainableTokenizer
from unimodal_tokenizers.normalise import Normalise
from unimodal_tokenizers.semantic import SemanticHead
from unimodal_tokenizers.transformer import Transformer, images_to_patches, patches_to_images, places


class StagedTokenizer(TrainableTokenizer):
    """Three transformers one after another: pixels -> tokens of D channels -> features of C -> pixels.

    Every channel of a token has mean 0 and deviation 1 over the images: those of the batches seen in training, averaged
    exponentially, and stored. `semantic` compares the features with a frozen encoder's, which is what unfolds them.
    """

    def __init__(
        self,
        dim: int,
        patch: int,
        width: int,
        depths: tuple[int, int, int],
        heads: int,
        causal: bool = False,
        semantic: SemanticHead | None = None,
    ) -> None:
        """Args:

        dim: channels D of a token.
        patch: side of a patch in pixels; it is the tokenizer's stride.
        width: channels C of the transformers, and of the features.
        depths: layers of the low-level encoder, of the semantic expansion, of the pixel decoder.
        heads: attention heads.
        causal: whether the expansion of a token sees none behind it, so that it can follow a generator token by token.
        semantic: what the features are to mean; its `dim` counts their channels.
        """
        super().__init__()
        if patch < 1 or dim < 1:
            raise ValueError(f"patch, dim: expected at least 1, got {patch} and {dim}")
        self.layout = TokenLayout("continuous", dim, stride=patch)
        self.causal = causal
        self.patches_in = nn.Linear(3 * patch * patch, width)
        self.encoder = Transformer(width, depths[0], heads)
        self.tokens_out = nn.Linear(width, dim)
        self.normalise = Normalise(dim)
        self.tokens_in = nn.Linear(dim, width)
        self.expansion = Transformer(width, depths[1], heads)
        self.decoder = Transformer(width, depths[2], heads)
        self.pixels_out = nn.Linear(width, 3 * patch * patch)
        self.semantic = semantic
        self.weights = {} if semantic is None else dict(semantic.weights)
        if semantic is not None:
            semantic.check(width)

    @property
    def last_layer(self) -> nn.Parameter:
        """The decoder's last weight."""
        return self.pixels_out.get_parameter("weight")

    def extra_repr(self) -> str:
        """Who sees whom, which no weight shows."""
        return f"causal={self.causal}"

    def forward(self, images: Float[Tensor, "B 3 H W"], texts: Sequence[str] | None = None) -> Reconstruction:
        """Images `(B, 3, H, W)` in [-1, 1] through all three stages, with the terms of the loss.

        Args:
            images: of one size.
            texts: what is said of each, for a `semantic` that asks for it.

        Raises:
            ValueError: the patch does not divide the height and width; texts that are missing or not asked for.
        """
        grid = self.layout.grid(*images.shape[-2:])
        features = self._expand(self.encode_batch(images), grid)
        terms = {} if self.semantic is None else self.semantic(features, grid, images, texts)
        return Reconstruction(self._draw(features, grid), terms)

    def encode_batch(
        self, images: Float[Tensor, "B 3 H W"], rng: torch.Generator | None = None
    ) -> Float[Tensor, "B N D"]:
        """Images in [-1, 1] to tokens; `rng` is not used. In training mode the batch's own statistics normalise them.

        Raises:
            ValueError: the patch does not divide the image's height and width.
        """
        grid = self.layout.grid(*images.shape[-2:])
        patches = self.patches_in(images_to_patches(images, self.layout.stride))  # (B, N, C)
        tokens = self.tokens_out(self.encoder(patches + places(grid, patches)))
        return self.normalise(tokens.flatten(0, 1)).view_as(tokens)  # (B, N, D)

    def features(self, tokens: ImageTokens) -> Float[Tensor, "T C"]:
        """What the tokens unfold into, for whoever reads them; images of any sizes."""
        parts = [self._expand(one.values[None], one.grids[0])[0] for one in tokens.split()]
        return torch.cat([tokens.values.new_empty(0, self.tokens_in.out_features), *parts])

    def decode_batch(
        self, tokens: Shaped[Tensor, "B N *channels"], grid: Grid, rngs: Sequence[torch.Generator] | None = None
    ) -> Float[Tensor, "B 3 H W"]:
        """Tokens to images, about in [-1, 1] (not clamped); `rngs` are not used.

        Raises:
            ValueError: the tokens are not h w vectors of D channels an image.
        """
        expected = (grid.length, self.layout.dim)
        if tuple(tokens.shape[1:]) != expected:
            raise ValueError(f"tokens: expected (N, D) = {expected} an image, got {tuple(tokens.shape[1:])}")
        return self._draw(self._expand(tokens, grid), grid)

    def lookup(self, tokens: Shaped[Tensor, "T *channels"]) -> Float[Tensor, "T D"]:
        """Continuous tokens are their own vectors."""
        if tokens.dim() != 2 or tokens.shape[-1] != self.layout.dim:
            raise ValueError(f"tokens: expected vectors (T, {self.layout.dim}), got shape {tuple(tokens.shape)}")
        return tokens

    def _expand(self, tokens: Float[Tensor, "B N D"], grid: Grid) -> Float[Tensor, "B N C"]:
        x = self.tokens_in(tokens.to(self.tokens_in.weight.dtype))
        n = grid.length
        mask = torch.ones(n, n, dtype=torch.bool, device=x.device).tril() if self.causal else None
        return self.expansion(x + places(grid, x), mask)

    def _draw(self, features: Float[Tensor, "B N C"], grid: Grid) -> Float[Tensor, "B 3 H W"]:
        x = self.decoder(features + places(grid, features))
        return patches_to_images(self.pixels_out(x), grid, self.layout.stride)
