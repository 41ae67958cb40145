"""Features of a frozen vision encoder as continuous tokens, and a trained decoder that makes pixels of them.

Emu (arXiv 2307.05222) and MetaMorph (arXiv 2412.14164) predict such features; RAE (arXiv 2510.11690) shows that a plain
transformer decoder brings them back to pixels.

Letters: B images, H height, W width (pixels); h, w the token grid, N = h w; p the encoder's patch; E channels of a
feature, D of a token, C width of the decoder.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from unimodal_tokenizers.base import Grid, Reconstruction, TokenLayout, TrainableTokenizer


class Representation(TrainableTokenizer):
    """Patch features of a timm vision transformer, each channel brought to mean 0 and deviation 1 over the images.

    The encoder never learns; the decoder does, and the projection where there is one. Mean and deviation are those of the
    batches seen in training, averaged exponentially, and stored. The encoder begins as random weights:
    `load_encoder` gives it its own, and an export carries them.
    """

    def __init__(
        self,
        encoder: str,
        options: Mapping[str, Any] | None = None,
        dim: int | None = None,
        decoder_width: int = 256,
        decoder_depth: int = 4,
        decoder_heads: int = 4,
    ) -> None:
        """Args:

        encoder: name of a vision transformer in timm, without a tag of weights: nothing is downloaded.
        options: of it, as `timm.create_model` takes them: patch_size, embed_dim, depth ...
        dim: channels D of a token, a linear projection of the features that is learned with the decoder; None: all E.
        decoder_width: of the pixel decoder, a transformer over the token grid; a multiple of 4.
        decoder_depth: its layers.
        decoder_heads: its attention heads.
        """
        super().__init__()
        # Here, not above: timm takes seconds to import, and whoever trains on pixels never needs it.
        import timm
        from timm.models.vision_transformer import Block

        if encoder not in timm.list_models(module="vision_transformer"):
            raise ValueError(f"encoder: expected a vision transformer's name in timm, without a tag, got {encoder}")
        if decoder_width % 4 or decoder_width % decoder_heads:
            raise ValueError(f"decoder_width: expected a multiple of 4 and of decoder_heads, got {decoder_width}")
        self.name = encoder
        self.weights = {}  # nothing but the reconstruction
        options = {"dynamic_img_size": True, **(options or {})}
        self.encoder = timm.create_model(encoder, pretrained=False, num_classes=0, **options)
        self.encoder.requires_grad_(False).eval()
        width: int = self.encoder.embed_dim
        (p, q) = self.encoder.patch_embed.patch_size
        if p != q:
            raise ValueError(f"encoder: expected square patches, got {p} x {q}")
        self.layout = TokenLayout("continuous", dim=dim or width, stride=p)
        of = self.encoder.pretrained_cfg  # what its pixels are normalised by
        self.register_buffer("pixel_mean", torch.tensor(of["mean"])[:, None, None], persistent=False)  # (3, 1, 1)
        self.register_buffer("pixel_std", torch.tensor(of["std"])[:, None, None], persistent=False)
        self.project = nn.Identity() if dim is None else nn.Linear(width, dim, bias=False)
        self.normalise = nn.BatchNorm1d(self.layout.dim, affine=False, momentum=0.02)
        self.token_in = nn.Linear(self.layout.dim, decoder_width)
        self.decoder = nn.Sequential(*(Block(decoder_width, decoder_heads) for _ in range(decoder_depth)))
        self.norm = nn.LayerNorm(decoder_width)
        self.pixels_out = nn.Linear(decoder_width, 3 * p * p)

    pixel_mean: Float[Tensor, "3 1 1"]
    pixel_std: Float[Tensor, "3 1 1"]

    def load_encoder(self, path: Path) -> None:
        """The encoder's weights, from a safetensors file with timm's names; a classification head is left out.

        Raises:
            ValueError: the file is missing or damaged, or does not fit.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            weights = load_file(path)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"encoder_weights: {path} is missing or no safetensors file ({error})") from error
        weights = {name: w for name, w in weights.items() if not name.startswith("head.")}
        own = self.encoder.state_dict()
        wrong = sorted(own.keys() ^ weights.keys()) or [n for n in own if own[n].shape != weights[n].shape]
        if wrong:
            more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
            raise ValueError(f"encoder_weights: {path} does not fit {self.name}: {', '.join(wrong[:5])}{more}")
        self.encoder.load_state_dict(weights)

    def train(self, mode: bool = True) -> "Representation":
        """The encoder stays in evaluation mode."""
        super().train(mode)
        self.encoder.eval()
        return self

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Reconstruction:
        """Images `(B, 3, H, W)` in [-1, 1] to tokens and back, for training the decoder."""
        grid = self.layout.grid(*images.shape[-2:])
        return Reconstruction(self.decode_batch(self.encode_batch(images), grid))

    @property
    def last_layer(self) -> nn.Parameter:
        """The linear layer that makes pixels."""
        return self.pixels_out.get_parameter("weight")

    def features(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B N E"]:
        """What the encoder says of each patch; class and register tokens are left out.

        Raises:
            ValueError: the patch does not divide the image's height and width.
        """
        self.layout.grid(*images.shape[-2:])
        with torch.no_grad():
            pixels = ((images + 1) / 2 - self.pixel_mean) / self.pixel_std
            return self.encoder.forward_features(pixels)[:, self.encoder.num_prefix_tokens :]

    def encode_batch(
        self, images: Float[Tensor, "B 3 H W"], rng: torch.Generator | None = None
    ) -> Float[Tensor, "B N D"]:
        """Images in [-1, 1] to normalised features; `rng` is not used. In training mode the batch's own statistics."""
        tokens = self.project(self.features(images))
        return self.normalise(tokens.flatten(0, 1)).view_as(tokens)  # (B, N, D)

    def decode_batch(
        self, tokens: Shaped[Tensor, "B N *channels"], grid: Grid, rng: torch.Generator | None = None
    ) -> Float[Tensor, "B 3 H W"]:
        """Normalised features to images, about in [-1, 1] (not clamped); `rng` is not used.

        Raises:
            ValueError: the tokens are not h w vectors of D channels an image.
        """
        from timm.layers import build_sincos2d_pos_embed

        expected = (grid.length, self.layout.dim)
        if tuple(tokens.shape[1:]) != expected:
            raise ValueError(f"tokens: expected (N, D) = {expected} an image, got {tuple(tokens.shape[1:])}")
        weight = self.token_in.weight
        places = build_sincos2d_pos_embed([grid.h, grid.w], dim=len(weight), device=weight.device)  # (N, C)
        hidden = self.decoder(self.token_in(tokens.to(weight.dtype)) + places.to(weight.dtype))  # (B, N, C)
        return rearrange(
            self.pixels_out(self.norm(hidden)), "B (h w) (p q c) -> B c (h p) (w q)",
            h=grid.h, w=grid.w, p=self.layout.stride, q=self.layout.stride,
        )  # fmt: skip

    def lookup(self, tokens: Shaped[Tensor, "T *channels"]) -> Float[Tensor, "T D"]:
        """Continuous tokens are their own vectors."""
        if tokens.dim() != 2 or tokens.shape[-1] != self.layout.dim:
            raise ValueError(f"tokens: expected vectors (T, {self.layout.dim}), got shape {tuple(tokens.shape)}")
        return tokens
