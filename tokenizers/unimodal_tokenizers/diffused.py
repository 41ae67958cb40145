"""Features of a frozen vision encoder as continuous tokens, and a decoder that draws pixels from them by flow matching.

Emu (arXiv 2307.05222), MetaMorph (arXiv 2412.14164) and BLIP3-o (arXiv 2505.09568) end in such a decoder: what features
leave open one pass averages, and a diffusion decides.

Letters: B images, H height, W width (pixels); h, w the token grid, N = h w; D channels of a token, C width of the decoder;
x_t an image on its way from noise at t = 0 to data at t = 1, v = dx_t/dt.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from unimodal_tokenizers import diffusion
from unimodal_tokenizers.base import Grid, Reconstruction, precise
from unimodal_tokenizers.quantizers.base import step_generator
from unimodal_tokenizers.representation import Representation
from unimodal_tokenizers.transformer import images_to_patches, patches_to_images, places


class DiffusionRepresentation(Representation):
    """`Representation` whose decoder learns the way from noise to pixels, given the tokens, and draws by solving dx/dt = v.

    It is a plain transformer over the time, as a token of its own, and the noised patches, each beside the token of its
    place (U-ViT, arXiv 2209.12152, without its long skips). It gives the data, whose v is (data - x_t) / (1 - t): a narrow
    network cannot carry the noise through (JiT, arXiv 2511.13720). In training the reconstruction is that; otherwise it
    is what the solver draws. The error of v is a term of the loss, so that the error of pixels may weigh nothing.
    Decoding begins with one and the same noise for every image unless each is given a generator: it is deterministic, and
    an image does not depend on those beside it.
    """

    needs_error = False

    def __init__(
        self,
        encoder: str,
        options: Mapping[str, Any] | None = None,
        dim: int | None = None,
        decoder_width: int = 256,
        decoder_depth: int = 4,
        decoder_heads: int = 4,
        noise: float = 0.0,
        steps: int = 25,
        solver: Literal["euler", "heun"] = "euler",
        shift: float = 1.0,
    ) -> None:
        """Args:

        encoder: name of a vision transformer in timm, without a tag of weights: nothing is downloaded.
        options: of it, as `timm.create_model` takes them: patch_size, embed_dim, depth ...
        dim: channels D of a token, a linear projection of the features that is learned with the decoder; None: all E.
        decoder_width: of the decoder; a multiple of 4.
        decoder_depth: its layers.
        decoder_heads: its attention heads.
        noise: tau of the noise on tokens that the decoder learns to draw from, so that it bears what a generator gets wrong.
        steps: evaluations of the decoder that draw an image, exactly.
        solver: euler, or heun (whose evaluations are odd in number).
        shift: of times towards the noise, in training and drawing; larger for larger images (SD3).
        """
        super().__init__(encoder, options, dim, decoder_width, decoder_depth, decoder_heads, noise)
        self.weights = {"velocity": 1.0}
        self.solver, self.shift, self.times = solver, shift, diffusion.sampling_times(steps, shift, solver)
        self.patches_in = nn.Linear(3 * self.layout.stride**2, decoder_width)
        self.time_in = nn.Sequential(nn.Linear(256, decoder_width), nn.SiLU(), nn.Linear(decoder_width, decoder_width))

    def extra_repr(self) -> str:
        """What no weight shows."""
        return f"solver={self.solver}, times={len(self.times)}, shift={self.shift}"

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Reconstruction:
        """Images `(B, 3, H, W)` in [-1, 1] to tokens, and what the decoder makes of them, with the error of v.

        Times are logit-normal (SD3). Outside training the draws are the same every time.
        """
        grid, count = self.layout.grid(*images.shape[-2:]), int(self.steps)
        tokens = self.encode_batch(images)
        if self.training and self.noise:
            tokens = self._noised(tokens)
        elif self.training:
            self.steps.add_(1)
        rng = step_generator(1, count if self.training else 0)
        t = torch.randn(len(images), generator=rng).sigmoid()  # (B,)
        t = (t / (1 + (self.shift - 1) * (1 - t))).to(images)[:, None, None, None]  # (B, 1, 1, 1), `shift_time`
        noise = torch.randn(images.shape, generator=rng).to(images)
        x = diffusion.interpolate(noise, images, t)
        data = self.data(x, t.flatten(), tokens, grid)
        error = diffusion.data_to_velocity(data, images, t).square().mean()  # of v: x_t is in both and falls out
        return Reconstruction(data if self.training else self.decode_batch(tokens, grid), {"velocity": error})

    def data(
        self, x: Float[Tensor, "B 3 H W"], t: Float[Tensor, " B"], tokens: Float[Tensor, "B N D"], grid: Grid
    ) -> Float[Tensor, "B 3 H W"]:
        """The images that x_t and tokens speak of, in single precision at least."""
        p, dtype = self.layout.stride, self.token_in.weight.dtype
        h = self.patches_in(images_to_patches(x.to(dtype), p)) + self.token_in(tokens.to(dtype))  # (B, N, C)
        time = self.time_in(diffusion.timestep_embedding(precise(t)).to(dtype))[:, None]  # (B, 1, C)
        h = self.decoder(torch.cat([time, h + places(grid, h)], dim=1))[:, 1:]
        return precise(patches_to_images(self.pixels_out(h), grid, p))

    def decode_batch(
        self, tokens: Shaped[Tensor, "B N *channels"], grid: Grid, rngs: Sequence[torch.Generator] | None = None
    ) -> Float[Tensor, "B 3 H W"]:
        """Tokens to images, about in [-1, 1] (not clamped), in `steps` evaluations; `rngs` draw where each begins.

        Raises:
            ValueError: the tokens are not h w vectors of D channels an image.
        """
        self.check_tokens(tokens, grid)
        height, width = self.layout.size(grid)
        rngs = [torch.Generator().manual_seed(0)] if rngs is None else rngs
        noise = torch.stack([torch.randn(3, height, width, generator=rng) for rng in rngs])  # (B or 1, 3, H, W)
        x = precise(noise.to(tokens)).expand(len(tokens), -1, -1, -1)

        def velocity(x: Tensor, t: float) -> Tensor:
            times = x.new_full((len(x),), t)
            return diffusion.data_to_velocity(self.data(x, times, tokens, grid), x, times[:, None, None, None])

        *_, x = diffusion.SOLVERS[self.solver](velocity, x, self.times)
        return x
