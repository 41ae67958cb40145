"""What flow and diffusion share: a noised image is a private bidirectional block, of which something is read off.

Transfusion (arXiv 2408.11039), BAGEL (arXiv 2505.14683), LlamaFusion (arXiv 2412.15188), JanusFlow (arXiv 2411.07975).

Letters: N images, T tokens of all of them, D channels of a token, C width, G guidance branches.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
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
    per_token,
)
from unimodal_generators.patch_coders import PatchCoder
from unimodal_tokenizers.base import Grid, ImageTokens, TokenLayout, precise
from unimodal_tokenizers.diffusion import timestep_embedding

TimeInput = Literal["add", "token", "adaln"]
Estimate = Callable[[Tensor, float], Tensor]  # of x (T, D) at t


class DenoisingGenerator(ImageGenerator):
    """Learns something of a noised copy, from which a subclass's solver goes from noise to data.

    Args:
        layout: of the image tokenizer.
        width: of the backbone.
        time: how the network is told an image's time: added to its patches (Transfusion, BAGEL), as a token before them
            (JanusFlow, Show-o2), or as a condition that scales, shifts and gates them in every layer (DiT; needs
            backbone.adaln).
        coder: between token vectors and the backbone; the layout and the width are passed to it.
        bidirectional: whether patches of an image see each other in the backbone, or only those before them (Transfusion's
            ablation; JanusFlow, where they meet in the coder).
        sampling: defaults of the sampler.
    """

    reads = "own"
    accepts: ClassVar = ("continuous",)
    repeats = True
    inpaints = True
    settings: ClassVar[type[DenoisingSettings]]

    def __init__(
        self,
        layout: TokenLayout,
        width: int,
        time: TimeInput,
        coder: Callable[[TokenLayout, int], PatchCoder],
        bidirectional: bool,
        sampling: DenoisingSettings,
    ) -> None:
        super().__init__()
        self.check(layout)
        self.layout, self.bidirectional, self.sampling = layout, bidirectional, sampling
        self.time, self.conditions, self.prefix = time, time == "adaln", int(time == "token")
        self.coder = coder(layout, width)
        self.time_in = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    @abstractmethod
    def draw_time(self, grid: Grid, rng: np.random.Generator) -> float:
        """A training time."""

    @abstractmethod
    def noised(
        self, noise: Float[Tensor, "T D"], data: Float[Tensor, "T D"], t: Float[Tensor, "#T 1"]
    ) -> Float[Tensor, "T D"]:
        """x_t."""

    @abstractmethod
    def target(
        self, noise: Float[Tensor, "T D"], data: Float[Tensor, "T D"], t: Float[Tensor, "#T 1"]
    ) -> Float[Tensor, "T D"]:
        """What is learned of x_t."""

    def convert(
        self, out: Float[Tensor, "*G T D"], x: Float[Tensor, "T D"], t: Float[Tensor, "#T 1"]
    ) -> Float[Tensor, "*G T D"]:
        """What the network says of x_t, in the terms of `target`; guidance acts on it."""
        return out

    @abstractmethod
    def solve(
        self,
        estimate: Estimate,
        noise: Float[Tensor, "T D"],
        grids: Sequence[Grid],
        settings: SamplingSettings,
        rngs: Sequence[torch.Generator],
    ) -> Iterator[tuple[float, Float[Tensor, "T D"]]]:
        """From noise to data by `estimate`, which is in the terms of `target`; a time and x there after each step."""

    def plan(self, grid: Grid, rng: np.random.Generator) -> list[Block]:
        """One private block: its time and the seed of its noise."""
        time, seed = self.draw_time(grid, rng), int(rng.integers(2**63))
        return [replace(self._block(grid), time=time, seed=seed, n_targets=grid.length)]

    def plan_context(self, grid: Grid) -> list[Block]:
        """One block, seen as the noised one is."""
        return [replace(self._block(grid), kind=TokenKind.CLEAN, private=False)]

    def _block(self, grid: Grid) -> Block:
        return Block(grid, TokenKind.LEARNED, bidirectional=self.bidirectional, private=True, prefix=self.prefix)

    def corrupt(self, tokens: ImageTokens, blocks: Sequence[Block]) -> Corrupted:
        """x_t of every image, and what is learned of it."""
        data = precise(tokens.values)
        noise = torch.cat(
            [data.new_empty(0, data.shape[1])] + [self._noise(b.grid, b.seed, data) for b in blocks]
        )  # (T, D)
        time = data.new_tensor([b.time for b in blocks])  # (N,)
        t = per_token(time, tokens.grids)[:, None]  # (T, 1)
        return Corrupted(self.noised(noise, data, t), time, tokens.grids, self.target(noise, data, t))

    def context(self, tokens: ImageTokens) -> Corrupted:
        """The data itself, at t = 1."""
        return Corrupted(tokens.values, tokens.values.new_ones(len(tokens)), tokens.grids)

    def embed(self, corrupted: Corrupted) -> Embeddings:
        """Coded patches, and an embedding of the image's time: added, before them, or beside them."""
        time, grids = self._time(corrupted), corrupted.grids  # (N, C)
        patches, skips = self.coder.encode(corrupted.inputs.to(time.dtype), time, grids)  # (T, C), (T, K)
        if self.time == "adaln":
            return Embeddings(patches, time, skips)
        if self.time == "add":
            return Embeddings(patches + per_token(time, grids), None, skips)
        pairs = zip(time.split(1), patches.split([g.length for g in grids] or [0]))
        values = torch.cat([time[:0], patches[:0], *(x for pair in pairs for x in pair)])
        return Embeddings(values, None, skips)

    def predict(
        self, hidden: Float[Tensor, "*G T C"], embeddings: Embeddings, corrupted: Corrupted
    ) -> Float[Tensor, "*G T D"]:
        """What hidden states say of x_t, in the terms of `target`; in fp32 or better.

        Raises:
            RuntimeError: hidden states of other tokens than `embeddings` and `corrupted` are of.
        """
        assert embeddings.skips is not None
        branches = math.prod(hidden.shape[:-2])
        skips = embeddings.skips.repeat(branches, 1)  # (G*T, K)
        time = self._time(corrupted).repeat(branches, 1)  # (G*N, C)
        out = self.coder.decode(hidden.flatten(0, -2), skips, time, corrupted.grids * branches)  # (G*T, D)
        out = precise(out).view(*hidden.shape[:-1], out.shape[-1])
        return self.convert(out, corrupted.inputs, per_token(corrupted.time, corrupted.grids)[:, None])

    def loss(self, hidden: Float[Tensor, "T C"], embeddings: Embeddings, corrupted: Corrupted) -> LossBreakdown:
        """Squared error of what is learned, a mean over a token's channels and a sum over tokens."""
        assert corrupted.targets is not None
        out = self.predict(hidden, embeddings, corrupted)
        error = F.mse_loss(out, corrupted.targets, reduction="none").mean(-1)  # (T,)
        return {"image": LossTerm(error.sum(), len(error))}

    def sample(
        self,
        session: DecodingSession,
        grids: Sequence[Grid],
        settings: SamplingSettings,
        rngs: Sequence[torch.Generator],
        known: Known | None = None,
    ) -> Iterator[ImageTokens]:
        """From noise to data; one preview a solver step, the data last.

        Given tokens are put on their own path from noise to data before every evaluation (RePaint, arXiv 2201.09865,
        without its resampling, so the rest follows them less than it could), and come out as they were given.
        """
        self.check_sampling(settings, grids)
        assert isinstance(settings, DenoisingSettings)
        weight = self.time_in[0].weight
        assert isinstance(weight, Tensor)
        noise = draw_noise(grids, rngs, self.layout.dim)
        noise = noise.to(weight.device, torch.promote_types(weight.dtype, torch.float32))  # (T, D)
        blocks = [self._block(grid) for grid in grids]
        own = self._own(grids).to(weight.device)
        lengths = [grid.length for grid in grids]

        def given(x: Tensor, t: float) -> Tensor:
            if known is None:
                return x
            path = self.noised(noise, known.tokens.values.to(noise), noise.new_full((1, 1), t))
            return torch.where(known.mask.to(x.device)[:, None], path, x)

        def estimate(x: Tensor, t: float) -> Tensor:
            at = Corrupted(given(x, t), x.new_full((len(grids),), t), tuple(grids))
            embedded = self.embed(at)
            hidden = session.peek(embedded, blocks, settings.active(t))  # (G, T and prefixes, C)
            hidden = hidden[:, own] if self.prefix else hidden
            return settings.guide_images(self.predict(hidden, embedded, at), lengths, t)  # (T, D)

        for t, x in self.solve(estimate, noise, grids, settings, rngs):
            yield ImageTokens(given(x, t), tuple(grids))

    def _time(self, corrupted: Corrupted) -> Float[Tensor, "N C"]:
        weight = self.time_in[0].weight
        assert isinstance(weight, Tensor)
        return self.time_in(timestep_embedding(corrupted.time).to(weight.dtype))

    def _noise(self, grid: Grid, seed: int, like: Tensor) -> Float[Tensor, "n D"]:
        rng = torch.Generator().manual_seed(seed)
        return torch.randn(grid.length, self.layout.dim, generator=rng).to(like)

    def _own(self, grids: Sequence[Grid]) -> Int[Tensor, " T"]:
        """Which tokens of blocks end to end are their images' own."""
        images = per_token(torch.arange(1, len(grids) + 1), grids)  # (T,): of each token, counted from 1
        return torch.arange(len(images)) + self.prefix * images


def draw_noise(grids: Sequence[Grid], rngs: Sequence[torch.Generator], dim: int) -> Float[Tensor, "T {dim}"]:
    """Standard normal, each image from its own generator; in float64, on the host: the same on every device."""
    drawn = [torch.randn(g.length, dim, generator=rng, dtype=torch.float64) for g, rng in zip(grids, rngs, strict=True)]
    return torch.cat(drawn)
