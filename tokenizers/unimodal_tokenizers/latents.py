"""Latents of published autoencoders as continuous tokens; the networks are those of diffusers.

Letters: B images, H height, W width (pixels); h, w the token grid, N = h w; T tokens of all images end to end, D channels of
a latent. z is a latent as the autoencoder knows it.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from unimodal_tokenizers.base import Grid, ImageTokenizer, TokenLayout


class LatentTokenizer(ImageTokenizer):
    """An image as a grid of vectors (z - shift) * scale, so that each channel has about mean 0 and deviation 1.

    Latent diffusion (arXiv 2112.10752) with a scale; Stable Diffusion 3 and FLUX with a shift as well.
    """

    scale: Float[Tensor, "#D 1 1"]
    shift: Float[Tensor, "#D 1 1"]

    def __init__(self, dim: int, stride: int, scale: float | Sequence[float], shift: float | Sequence[float]) -> None:
        super().__init__()
        self.layout = TokenLayout("continuous", dim=dim, stride=stride)
        self.register_buffer("scale", per_channel("scale", scale, dim))
        self.register_buffer("shift", per_channel("shift", shift, dim))
        if not (self.scale > 0).all():
            raise ValueError(f"scale: expected numbers above 0, got {scale}")

    @abstractmethod
    def image_to_latent(
        self, images: Float[Tensor, "B 3 H W"], rng: torch.Generator | None
    ) -> Float[Tensor, "B D h w"]:
        """z of images in [-1, 1]; a posterior is sampled if there is a generator, and its mean taken otherwise."""

    @abstractmethod
    def latent_to_image(self, latent: Float[Tensor, "B D h w"]) -> Float[Tensor, "B 3 H W"]:
        """Images, about in [-1, 1], of z."""

    def latent_to_tokens(self, latent: Float[Tensor, "B D h w"]) -> Float[Tensor, "B N D"]:
        """(z - shift) * scale, row by row."""
        return rearrange((latent - self.shift) * self.scale, "B D h w -> B (h w) D")

    def tokens_to_latent(self, tokens: Float[Tensor, "B N D"], grid: Grid) -> Float[Tensor, "B D h w"]:
        """The inverse of `latent_to_tokens`."""
        return rearrange(tokens, "B (h w) D -> B D h w", h=grid.h, w=grid.w) / self.scale + self.shift

    def encode_batch(
        self, images: Float[Tensor, "B 3 H W"], rng: torch.Generator | None = None
    ) -> Float[Tensor, "B N D"]:
        """Images `(B, 3, H, W)` in [-1, 1] to normalised latents; of a posterior a sample if there is a generator.

        Raises:
            ValueError: the stride does not divide the image's height and width.
        """
        self.layout.grid(*images.shape[-2:])
        with torch.no_grad():
            return self.latent_to_tokens(self.image_to_latent(images, rng))

    def decode_batch(
        self, tokens: Shaped[Tensor, "B N *channels"], grid: Grid, rngs: Sequence[torch.Generator] | None = None
    ) -> Float[Tensor, "B 3 H W"]:
        """Normalised latents to images, about in [-1, 1] (not clamped, unless the network does); `rngs` are not used.

        Raises:
            ValueError: the tokens are not h w vectors of D channels an image.
        """
        expected = (grid.length, self.layout.dim)
        if tuple(tokens.shape[1:]) != expected:
            raise ValueError(f"tokens: expected (N, D) = {expected} an image, got {tuple(tokens.shape[1:])}")
        return self.latent_to_image(self.tokens_to_latent(tokens, grid))

    def lookup(self, tokens: Shaped[Tensor, "T *channels"]) -> Float[Tensor, "T D"]:
        """Continuous tokens are their own vectors."""
        if tokens.dim() != 2 or tokens.shape[-1] != self.layout.dim:
            raise ValueError(f"tokens: expected vectors (T, {self.layout.dim}), got shape {tuple(tokens.shape)}")
        return tokens


class FrozenNetwork(ImageTokenizer):
    """A tokenizer whose `network` never learns and stays in evaluation mode."""

    network: Any  # diffusers and transformers say of no network what it has

    def _freeze(self, network: nn.Module) -> None:
        self.network = network.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "FrozenNetwork":
        """The network stays in evaluation mode."""
        super().train(mode)
        self.network.eval()
        return self


class DCTokenizer(FrozenNetwork, LatentTokenizer):
    """Deep compression autoencoder (arXiv 2410.10733), which SANA reads: diffusers' AutoencoderDC."""

    def __init__(
        self, options: Mapping[str, Any], scale: float | Sequence[float], shift: float | Sequence[float] = 0.0
    ) -> None:
        """Args:

        options: settings of AutoencoderDC.
        scale: of the latents, one for all channels or one each.
        shift: subtracted from the latents before.
        """
        network = diffusers_network("AutoencoderDC", options)
        check_colours(network.config.in_channels, network.config.in_channels)
        super().__init__(network.config.latent_channels, network.spatial_compression_ratio, scale, shift)
        self._freeze(network)

    def image_to_latent(
        self, images: Float[Tensor, "B 3 H W"], rng: torch.Generator | None
    ) -> Float[Tensor, "B D h w"]:
        """z = E(x); nothing is sampled."""
        return self.network.encode(images).latent

    def latent_to_image(self, latent: Float[Tensor, "B D h w"]) -> Float[Tensor, "B 3 H W"]:
        """x = G(z)."""
        return self.network.decode(latent).sample


class WanTokenizer(FrozenNetwork, LatentTokenizer):
    """The video autoencoder of Wan (arXiv 2503.20314), an image being one frame: diffusers' AutoencoderKLWan."""

    def __init__(
        self, options: Mapping[str, Any], scale: float | Sequence[float], shift: float | Sequence[float]
    ) -> None:
        """Args:

        options: settings of AutoencoderKLWan.
        scale: of the latents, one for all channels or one each.
        shift: subtracted from the latents before.
        """
        network = diffusers_network("AutoencoderKLWan", options)
        patch = network.config.patch_size or 1
        check_colours(network.config.in_channels, network.config.out_channels, of=3 * patch**2)
        stride = patch * 2 ** (len(network.config.dim_mult) - 1)
        super().__init__(network.config.z_dim, stride, scale, shift)
        self._freeze(network)

    def image_to_latent(
        self, images: Float[Tensor, "B 3 H W"], rng: torch.Generator | None
    ) -> Float[Tensor, "B D h w"]:
        """z ~ q(z | x), or its mean, of a video of one frame."""
        posterior = self.network.encode(images[:, :, None]).latent_dist  # of (B, D, 1, h, w)
        return (posterior.mode() if rng is None else posterior.sample(rng))[:, :, 0]

    def latent_to_image(self, latent: Float[Tensor, "B D h w"]) -> Float[Tensor, "B 3 H W"]:
        """The frame; the network clamps it to [-1, 1]."""
        return self.network.decode(latent[:, :, None]).sample[:, :, 0]


class RAETokenizer(FrozenNetwork, LatentTokenizer):
    """Representation autoencoder (arXiv 2510.11690), images of one size only: diffusers' AutoencoderRAE."""

    def __init__(
        self, options: Mapping[str, Any], scale: float | Sequence[float] = 1.0, shift: float | Sequence[float] = 0.0
    ) -> None:
        """Args:

        options: settings of AutoencoderRAE, which has a scale and a shift of each channel of its own.
        scale: of what it gives, one for all channels or one each.
        shift: subtracted from that before.
        """
        network = diffusers_network("AutoencoderRAE", options)
        check_colours(network.config.num_channels, network.config.num_channels)
        super().__init__(network.config.encoder_hidden_size, network.decoder_patch_size, scale, shift)
        self.side: int = network.decoder_image_size
        self._freeze(network)

    def image_to_latent(
        self, images: Float[Tensor, "B 3 H W"], rng: torch.Generator | None
    ) -> Float[Tensor, "B D h w"]:
        """Features of the encoder, which reads pixels from 0 to 1; nothing is sampled."""
        self._check_side(*images.shape[-2:])
        latent = self.network.encode((images + 1) / 2).latent
        grid = self.layout.grid(*images.shape[-2:])
        return latent if latent.dim() == 4 else rearrange(latent, "B (h w) D -> B D h w", h=grid.h)

    def latent_to_image(self, latent: Float[Tensor, "B D h w"]) -> Float[Tensor, "B 3 H W"]:
        """Pixels of the features, from 0 to 1 on their side."""
        self._check_side(*(self.layout.stride * n for n in latent.shape[-2:]))
        if not self.network.reshape_to_2d:
            latent = rearrange(latent, "B D h w -> B (h w) D")
        return 2 * self.network.decode(latent).sample - 1

    def _check_side(self, height: int, width: int) -> None:
        if (height, width) != (self.side, self.side):
            raise ValueError(f"image size: expected {self.side}x{self.side} pixels alone, got {height}x{width}")


def per_channel(key: str, value: float | Sequence[float], dim: int) -> Float[Tensor, "#D 1 1"]:
    """One number for all channels, or one for each, against `(B, D, h, w)`."""
    found = torch.as_tensor(value, dtype=torch.float32).flatten()[:, None, None]
    if len(found) not in (1, dim):
        raise ValueError(f"{key}: expected 1 number or {dim}, one for each channel, got {len(found)}")
    return found


def check_colours(read: int, drawn: int, of: int = 3) -> None:
    """Refuse a network that does not read and draw red, green and blue."""
    if (read, drawn) != (of, of):
        raise ValueError(f"options: expected a network that reads and draws {of} channels, got {read} and {drawn}")


def diffusers_network(name: str, options: Mapping[str, Any]) -> Any:
    """A class of diffusers with random weights.

    Raises:
        ValueError: diffusers has no such class, it takes no such option, or not this value.
    """
    import diffusers  # here: it takes seconds, which whoever trains on pixels need not wait for

    if not hasattr(diffusers, name):
        raise ValueError(f"{name}: expected a diffusers that has it, got {diffusers.__version__}")
    made = getattr(diffusers, name)
    known = signature(made.__init__).parameters.keys() - {"self"}
    check_options(name, options, known)
    try:
        return made(**options)
    except (TypeError, RuntimeError, ValueError) as error:
        raise ValueError(f"options: expected what {name} takes, got {options} ({error})") from error


def check_options(name: str, options: Mapping[str, Any], known: set[str]) -> None:
    """Refuse what a published class does not take."""
    if unknown := sorted(options.keys() - known):
        raise ValueError(f"options: expected settings of {name}, got {', '.join(unknown)}")
