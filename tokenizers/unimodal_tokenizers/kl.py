"""A variational autoencoder: continuous latents that are kept near a normal distribution. diffusers' AutoencoderKL.

Letters: B images, H height, W width (pixels); h, w the token grid, D channels of a latent. q(z | x) = N(m, s^2) is what
the encoder says of an image x, m and s^2 its mean and variance at every place and channel.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from unimodal_tokenizers.base import Reconstruction, TrainableTokenizer
from unimodal_tokenizers.latents import LatentTokenizer, check_colours, diffusers_network
from unimodal_tokenizers.quantizers.base import step_generator
from unimodal_tokenizers.squares import Squares, check_space_to_depth

MOMENTUM = 0.02  # share of a training batch in the measured scale and shift, once fifty were seen


def kl_to_normal(m: Float[Tensor, "B D h w"], log_s2: Float[Tensor, "B D h w"]) -> Float[Tensor, ""]:
    """KL(N(m, s^2) || N(0, 1)) = 1/2 sum_D (m^2 + s^2 - 1 - log s^2), in nats a token (VAE, arXiv 1312.6114, appendix B)."""
    return 0.5 * (m.square() + log_s2.exp() - 1 - log_s2).sum(1).mean()


class KLTokenizer(LatentTokenizer, TrainableTokenizer):
    """The autoencoder of latent diffusion (arXiv 2112.10752), of SDXL, Stable Diffusion 3 and FLUX.

    Tokens are (z - shift) * scale. Where neither is given, both are measured in training, an exponential average over the
    batches for each channel, and stored with the weights. In training mode z is sampled; the noise depends on a counter
    among the buffers, so that training that was stopped and resumed sees the same.
    """

    steps: Int64[Tensor, ""]

    def __init__(
        self,
        dim: int,
        channels: Sequence[int],
        blocks: int,
        scale: float | Sequence[float] | None = None,
        shift: float | Sequence[float] | None = None,
        groups: int = 8,
        attention: bool = False,
        seed: int = 0,
        options: Mapping[str, Any] | None = None,
        space_to_depth: int = 1,
    ) -> None:
        """Args:

        dim: channels D of a latent.
        channels: width of the networks at each resolution, fine to coarse; each further one halves the resolution, so
            that the stride is space_to_depth * 2 ** (len(channels) - 1) pixels.
        blocks: residual blocks of the encoder at each resolution (the decoder has one more).
        scale: of the latents, one for all channels or one each; None: measured in training, the shift too.
        shift: subtracted from the latents before.
        groups: groups of the group norms; must divide every width.
        attention: whether the middle of both networks attends over the whole image.
        seed: of the noise in training.
        options: further settings of diffusers' AutoencoderKL, which has no convolution beside the latents by default.
        space_to_depth: side in pixels of the squares that the networks see as one place; above 1 a linear map stands
            beside them (`Squares`).
        """
        if (scale is None) != (shift is None):
            raise ValueError(f"scale, shift: expected both or neither, got {scale} and {shift}")
        if not channels or any(c < 1 or c % groups for c in channels):
            raise ValueError(f"channels: expected multiples of groups = {groups}, at least one, got {list(channels)}")
        if dim < 1:
            raise ValueError(f"dim: expected at least 1, got {dim}")
        check_space_to_depth(space_to_depth)
        n, colours = len(channels), 3 * space_to_depth**2
        own = {
            "latent_channels": dim, "block_out_channels": tuple(channels), "layers_per_block": blocks,
            "norm_num_groups": groups, "mid_block_add_attention": attention,
        }  # fmt: skip
        if space_to_depth > 1:
            own |= {"in_channels": colours, "out_channels": colours}
        options = {
            "down_block_types": ("DownEncoderBlock2D",) * n, "up_block_types": ("UpDecoderBlock2D",) * n,
            "use_quant_conv": False, "use_post_quant_conv": False, **(options or {}),
        }  # fmt: skip
        if twice := sorted(own.keys() & options.keys()):
            raise ValueError(f"options: expected settings that have no argument of their own, got {', '.join(twice)}")
        network = diffusers_network("AutoencoderKL", {**own, **options})
        check_colours(network.config.in_channels, network.config.out_channels, of=colours)
        stride = space_to_depth * 2 ** (n - 1)
        given = [value if value is not None else [start] * dim for value, start in ((scale, 1.0), (shift, 0.0))]
        super().__init__(dim, stride, *given)
        self.network: Any = network  # diffusers says of no network what it has
        self.squares = Squares(space_to_depth, stride, dim) if space_to_depth > 1 else None
        if self.squares is not None:
            self.squares.silence(network.decoder.conv_out)
            self.squares.silence_posterior(network.quant_conv or network.encoder.conv_out)
        self.weights = {"kl": 1e-6}
        self.measures, self.seed = scale is None, seed
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))  # training batches seen

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Reconstruction:
        """Images through a sample of q(z | x) and back, in evaluation mode through its mean; the term "kl".

        Raises:
            ValueError: the stride does not divide the image's height and width.
        """
        self.layout.grid(*images.shape[-2:])
        posterior = self._posterior(images)
        m, log_s2 = posterior.mean.float(), posterior.logvar.float()
        z = m
        if self.training:
            noise = torch.randn(m.shape, generator=step_generator(self.seed, int(self.steps))).to(m)
            z = m + torch.exp(log_s2 / 2) * noise
            self._count(z.detach())
        return Reconstruction(self.latent_to_image(z.to(posterior.mean)), {"kl": kl_to_normal(m, log_s2)})

    @property
    def last_layer(self) -> nn.Parameter:
        """The decoder's last weight; a linear map may stand beside it."""
        return self.network.decoder.conv_out.weight

    def image_to_latent(
        self, images: Float[Tensor, "B 3 H W"], rng: torch.Generator | None
    ) -> Float[Tensor, "B D h w"]:
        """z ~ q(z | x), or its mean m."""
        posterior = self._posterior(images)
        return posterior.mode() if rng is None else posterior.sample(rng)

    def latent_to_image(self, latent: Float[Tensor, "B D h w"]) -> Float[Tensor, "B 3 H W"]:
        """What the decoder makes of z."""
        x = self.network.decode(latent).sample
        return x if self.squares is None else self.squares.unfold(x) + self.squares.synthesis(latent)

    def _posterior(self, images: Float[Tensor, "B 3 H W"]) -> Any:
        """diffusers' distribution q(z | x)."""
        if self.squares is None:
            return self.network.encode(images).latent_dist
        posterior = self.network.encode(self.squares.fold(images)).latent_dist
        posterior.mean = posterior.mean + self.squares.analysis(images)
        return posterior

    @torch.no_grad()
    def _count(self, z: Float[Tensor, "B D h w"]) -> None:
        """One more training batch; where they are measured, its mean and deviation enter shift and scale."""
        if self.measures:
            moments = torch.stack([z.mean((0, 2, 3)), z.square().mean((0, 2, 3))])  # (2, D)
            if torch.distributed.is_initialized():
                torch.distributed.all_reduce(moments)
                moments /= torch.distributed.get_world_size()
            mean, square = moments[:, :, None, None]  # (D, 1, 1) each
            share = max(MOMENTUM, 1 / (int(self.steps) + 1))
            variance = (square - mean.square()).clamp(min=1e-8)
            finite = moments.isfinite().all()  # a batch that overflowed must not stay in them
            self.shift.copy_(torch.where(finite, self.shift.lerp(mean, share), self.shift))
            scale = self.scale.pow(-2).lerp(variance, share).rsqrt()
            self.scale.copy_(torch.where(finite, scale, self.scale))
        self.steps.add_(1)
