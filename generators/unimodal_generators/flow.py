"""Flow matching inside the transformer: a noised image is a private bidirectional block whose velocity is read off.

Transfusion (arXiv 2408.11039), BAGEL (arXiv 2505.14683), LlamaFusion (arXiv 2412.15188).

Letters: N images, T tokens of all of them, D channels of a token, C width, G guidance branches, K solver steps.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from unimodal_generators.base import (
    Block,
    Corrupted,
    DecodingSession,
    DenoisingSettings,
    Embeddings,
    ImageGenerator,
    Known,
    LossBreakdown,
    LossTerm,
    SamplingSettings,
    TokenKind,
)
from unimodal_tokenizers import diffusion
from unimodal_tokenizers.base import Grid, ImageTokens, TokenLayout

NEAREST = 0.05
"""Least 1 - t that a difference from the data is divided by (JiT, arXiv 2511.13720)."""


@dataclass(frozen=True)
class FlowSettings(DenoisingSettings):
    """How a flow image is sampled."""

    steps: int = 20  # network evaluations, exactly
    solver: Literal["euler", "heun"] = "euler"
    shift: float = 1.0  # above 1: more steps near the noise


class Flow(ImageGenerator):
    """Learns v = data - noise of a noised copy (rectified flow, arXiv 2209.03003); samples by solving dx/dt = v.

    Args:
        layout: of the image tokenizer.
        width: of the backbone.
        time_shift: training times are moved towards the noise by this factor (SD3, section 5.3.2).
        time_mean: of the logit-normal the training times are drawn from.
        time_std: likewise.
        time: how the network is told an image's time: added to its patches (BAGEL), as a token before them (JanusFlow,
            Show-o2), or as a condition that scales, shifts and gates them in every layer (DiT; needs backbone.adaln).
        predicts: what the last layer gives: the velocity, or the data, whose velocity is (data - x_t) / (1 - t). The loss is
            the velocity's in both cases (JiT, arXiv 2511.13720: data lie near few dimensions, noise does not).
        sampling: defaults of the sampler.
    """

    reads = "own"
    accepts: ClassVar = ("continuous",)
    repeats = True
    inpaints = True

    def __init__(
        self,
        layout: TokenLayout,
        width: int,
        time_shift: float = 1.0,
        time_mean: float = 0.0,
        time_std: float = 1.0,
        time: Literal["add", "token", "adaln"] = "add",
        predicts: Literal["velocity", "data"] = "velocity",
        sampling: FlowSettings = FlowSettings(),
    ) -> None:
        super().__init__()
        self.check(layout)
        self.time, self.conditions, self.prefix = time, time == "adaln", int(time == "token")
        self.layout, self.sampling, self.predicts = layout, sampling, predicts
        self.time_shift, self.time_mean, self.time_std = time_shift, time_mean, time_std
        self.patch_in = nn.Linear(layout.dim, width)
        self.time_in = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.velocity_out = nn.Linear(width, layout.dim)
        nn.init.zeros_(self.velocity_out.weight)
        nn.init.zeros_(self.velocity_out.bias)

    def plan(self, grid: Grid, rng: np.random.Generator) -> list[Block]:
        """One private block: its time and the seed of its noise."""
        t = diffusion.shift_time(diffusion.logit_normal_time(rng, self.time_mean, self.time_std), self.time_shift)
        seed = int(rng.integers(2**63))
        return [replace(self._block(grid), time=t, seed=seed, n_targets=grid.length)]

    def plan_context(self, grid: Grid) -> list[Block]:
        """One bidirectional block."""
        return [replace(self._block(grid), kind=TokenKind.CLEAN, private=False)]

    def _block(self, grid: Grid) -> Block:
        return Block(grid, TokenKind.LEARNED, bidirectional=True, private=True, prefix=self.prefix)

    def corrupt(self, tokens: ImageTokens, blocks: Sequence[Block]) -> Corrupted:
        """x_t of every image, and the velocity there."""
        data = tokens.values
        noise = torch.cat(
            [data.new_empty(0, data.shape[1])] + [self._noise(b.grid, b.seed, data) for b in blocks]
        )  # (T, D)
        time = data.new_tensor([b.time for b in blocks])  # (N,)
        x = diffusion.interpolate(noise, data, self._per_token(time, tokens.grids)[:, None])
        return Corrupted(x, time, tokens.grids, diffusion.velocity(noise, data))

    def context(self, tokens: ImageTokens) -> Corrupted:
        """The data itself, at t = 1."""
        return Corrupted(tokens.values, tokens.values.new_ones(len(tokens)), tokens.grids)

    def embed(self, corrupted: Corrupted) -> Embeddings:
        """Linear patches, and an embedding of the image's time: added, before them, or beside them."""
        time = self.time_in(timestep_embedding(corrupted.time).to(self.patch_in.weight.dtype))  # (N, C)
        patches = self.patch_in(corrupted.inputs.to(self.patch_in.weight.dtype))  # (T, C)
        if self.time == "adaln":
            return Embeddings(patches, time)
        if self.time == "add":
            return Embeddings(patches + self._per_token(time, corrupted.grids))
        lengths = [g.length for g in corrupted.grids]
        pairs = zip(time.split(1), patches.split(lengths))
        return Embeddings(torch.cat([time[:0], patches[:0], *(x for pair in pairs for x in pair)]))

    def velocity(
        self, hidden: Float[Tensor, "*rest C"], x: Float[Tensor, "T D"], t: Float[Tensor, "#T 1"]
    ) -> Float[Tensor, "*rest D"]:
        """v at x_t of hidden states, in fp32 or better."""
        out = self.velocity_out(hidden)
        out = out.to(torch.promote_types(out.dtype, torch.float32))
        return out if self.predicts == "velocity" else (out - x) / (1 - t).clamp_min(NEAREST)

    def loss(self, hidden: Float[Tensor, "T C"], embeddings: Embeddings, corrupted: Corrupted) -> LossBreakdown:
        """Squared error of v, a mean over a token's channels and a sum over tokens."""
        assert corrupted.targets is not None
        t = self._per_token(corrupted.time, corrupted.grids)[:, None]  # (T, 1)
        v = corrupted.targets
        if self.predicts == "data":  # near the data both are divided alike, or the difference would be a bias
            v = v * (1 - t) / (1 - t).clamp_min(NEAREST)
        error = F.mse_loss(self.velocity(hidden, corrupted.inputs, t), v, reduction="none").mean(-1)  # (T,)
        return {"image": LossTerm(error.sum(), len(error))}

    def sample(
        self,
        session: DecodingSession,
        grids: Sequence[Grid],
        settings: SamplingSettings,
        rngs: Sequence[torch.Generator],
        known: Known | None = None,
    ) -> Iterator[ImageTokens]:
        """Solve dx/dt = v from noise; one preview a solver step, the data last.

        Given tokens are put on their own straight path before every evaluation (RePaint, arXiv 2201.09865, without its
        resampling), and come out as they were given.
        """
        if not isinstance(settings, FlowSettings):
            raise ValueError(f"sampling: expected FlowSettings, got {type(settings).__name__}")
        weight = self.patch_in.weight
        drawn = [
            torch.randn(g.length, self.layout.dim, generator=rng, dtype=torch.float64) for g, rng in zip(grids, rngs)
        ]
        noise = torch.cat(drawn).to(weight.device, torch.promote_types(weight.dtype, torch.float32))  # (T, D)
        blocks = [self._block(grid) for grid in grids]
        own = self._own(grids).to(weight.device)
        lengths = [grid.length for grid in grids]

        def given(x: Tensor, t: float) -> Tensor:
            if known is None:
                return x
            path = diffusion.interpolate(noise, known.tokens.values.to(noise), noise.new_full((1, 1), t))
            return torch.where(known.mask.to(x.device)[:, None], path, x)

        def velocity(x: Tensor, t: float) -> Tensor:
            x = given(x, t)
            noised = Corrupted(x, x.new_full((len(grids),), t), tuple(grids))
            hidden = session.peek(self.embed(noised), blocks, settings.active(t))  # (G, T and prefixes, C)
            hidden = hidden[:, own] if self.prefix else hidden
            return settings.guide_images(self.velocity(hidden, x, x.new_full((1, 1), t)), lengths)  # (T, D)

        times = diffusion.sampling_times(settings.steps, settings.shift, settings.solver)
        for s, x in zip(times[1:], diffusion.SOLVERS[settings.solver](velocity, noise, times), strict=True):
            yield ImageTokens(given(x, s), tuple(grids))

    def _noise(self, grid: Grid, seed: int, like: Tensor) -> Float[Tensor, "n D"]:
        rng = torch.Generator().manual_seed(seed)
        return torch.randn(grid.length, self.layout.dim, generator=rng).to(like)

    def _own(self, grids: Sequence[Grid]) -> Int[Tensor, " T"]:
        """Which tokens of blocks end to end are their images' own."""
        images = self._per_token(torch.arange(1, len(grids) + 1), grids)  # (T,): of each token, counted from 1
        return torch.arange(len(images)) + self.prefix * images

    @staticmethod
    def _per_token(values: Shaped[Tensor, "N *rest"], grids: Sequence[Grid]) -> Shaped[Tensor, "T *rest"]:
        lengths = torch.tensor([g.length for g in grids], device=values.device, dtype=torch.long)
        return values.repeat_interleave(lengths, 0, output_size=sum(g.length for g in grids))  # no waiting for a GPU


def timestep_embedding(t: Float[Tensor, " N"], dim: int = 256) -> Float[Tensor, "N {dim}"]:
    """Sines and cosines of 1000 t (DDPM, arXiv 2006.11239, whose times are counted to 1000)."""
    half = dim // 2
    frequency = torch.exp(-math.log(10_000.0) * torch.arange(half, device=t.device, dtype=t.dtype) / half)
    angle = 1000.0 * t[:, None] * frequency  # (N, dim/2)
    return torch.cat([angle.cos(), angle.sin()], dim=1)
