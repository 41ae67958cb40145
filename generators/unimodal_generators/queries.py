"""Learned queries: the backbone says in their hidden states what to draw, and a diffusion transformer draws it.

DreamLLM (arXiv 2309.11499), MetaQuery (arXiv 2504.06256), BLIP3-o (arXiv 2505.09568), whose first step is this over the
tokens of a feature tokenizer; its second, decoding them by diffusion, is the tokenizer's (`DiffusionRepresentation`).

Letters: N images, T tokens of all of them, D channels of a token, Q queries of an image, C width of the backbone, L layers
of it that are read, K channels of a condition, G guidance branches.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from unimodal_generators.base import (
    Block,
    Corrupted,
    DecodingSession,
    Embeddings,
    ImageGenerator,
    Known,
    LossBreakdown,
    LossTerm,
    SamplingSettings,
    TokenKind,
    per_token,
)
from unimodal_generators.denoisers import Denoiser
from unimodal_generators.denoising import draw_noise
from unimodal_generators.flow import FlowSettings, solve_flow
from unimodal_tokenizers import diffusion
from unimodal_tokenizers.base import Grid, ImageTokens, TokenLayout, precise


class Queries(ImageGenerator):
    """A block of learned queries in the place of an image; what they become conditions a denoiser trained by flow matching.

    The backbone learns with it, or stays as it is (`freeze`), since gradients reach the queries through it.

    Args:
        layout: of the image tokenizer.
        width: of the backbone.
        denoiser: what draws; the channels of an image token are passed to it.
        queries: how many an image, whatever its size.
        layers: whose hidden states condition it, counted as Python does; -1 is the last, after its norm. Several: a ladder.
        private: whether the queries are gone when the image is drawn (MetaQuery), or stay for what follows (DreamLLM).
        time_shift: training times are moved towards the noise by this factor (SD3, section 5.3.2).
        time_mean: of the logit-normal the training times are drawn from.
        time_std: likewise.
        sampling: defaults of the sampler.
    """

    reads = "own"
    accepts: ClassVar = ("continuous",)
    settings: ClassVar = FlowSettings
    repeats = True
    no_weight_decay: ClassVar = ("queries",)

    def __init__(
        self,
        layout: TokenLayout,
        width: int,
        denoiser: Callable[[int], Denoiser],
        queries: int = 64,
        layers: Sequence[int] = (-1,),
        private: bool = True,
        time_shift: float = 1.0,
        time_mean: float = 0.0,
        time_std: float = 1.0,
        sampling: FlowSettings = FlowSettings(),
    ) -> None:
        super().__init__()
        self.check(layout)
        self.denoiser = denoiser(layout.dim)
        if queries < 1:
            raise ValueError(f"generator.queries: expected at least 1, got {queries}")
        if len(layers) != 1 and not (layers and self.denoiser.ladder):
            name = type(self.denoiser).__name__
            raise ValueError(f"generator.layers: expected one layer, which is what {name} reads, got {list(layers)}")
        diffusion.check_times(time_mean, time_std, time_shift)
        self.layout, self.layers, self.private, self.sampling = layout, tuple(layers), private, sampling
        self.time_shift, self.time_mean, self.time_std = time_shift, time_mean, time_std
        self.patch_in = nn.Linear(layout.dim, width)  # of images as context
        self.queries = nn.Parameter(0.02 * torch.randn(queries, width))
        self.connectors = nn.ModuleList(_connector(width, self.denoiser.condition_dim) for _ in layers)

    def plan(self, grid: Grid, rng: np.random.Generator) -> list[Block]:
        """One block of queries: the time of the image, and the seed of its noise."""
        t = diffusion.shift_time(diffusion.logit_normal_time(rng, self.time_mean, self.time_std), self.time_shift)
        return [self._block(time=t, seed=int(rng.integers(2**63)), n_targets=grid.length)]

    def plan_context(self, grid: Grid) -> list[Block]:
        """One bidirectional block of the image's own tokens."""
        return [Block(grid, TokenKind.CLEAN, bidirectional=True, private=False)]

    def _block(self, time: float = 1.0, seed: int = 0, n_targets: int = 0) -> Block:
        grid = Grid(1, len(self.queries))
        return Block(grid, TokenKind.LEARNED, bidirectional=True, private=self.private, time=time, seed=seed,
                     n_targets=n_targets)  # fmt: skip

    def corrupt(self, tokens: ImageTokens, blocks: Sequence[Block]) -> Corrupted:
        """x_t of every image, which the denoiser reads, and the velocity there."""
        data = precise(tokens.values)
        rngs = [torch.Generator().manual_seed(block.seed) for block in blocks]
        drawn = [torch.randn(n, data.shape[1], generator=rng) for n, rng in zip(tokens.lengths, rngs, strict=True)]
        noise = torch.cat([data[:0], *(x.to(data) for x in drawn)])  # (T, D)
        time = data.new_tensor([block.time for block in blocks])  # (N,)
        t = per_token(time, tokens.grids)[:, None]  # (T, 1)
        return Corrupted(diffusion.interpolate(noise, data, t), time, tokens.grids, diffusion.velocity(noise, data))

    def context(self, tokens: ImageTokens) -> Corrupted:
        """The data itself, at t = 1."""
        return Corrupted(tokens.values, tokens.values.new_ones(len(tokens)), tokens.grids)

    def embed(self, corrupted: Corrupted) -> Embeddings:
        """The queries of every image that is learned; the patches of those that are context."""
        if corrupted.targets is None:
            return Embeddings(self.patch_in(corrupted.inputs.to(self.patch_in.weight.dtype)))
        return Embeddings(self.queries.repeat(len(corrupted.grids), 1))

    def connect(self, hidden: Float[Tensor, "NQ LC"]) -> Float[Tensor, "N L Q K"]:
        """Conditions of hidden states at the queries."""
        by_image = hidden.unflatten(0, (len(hidden) // len(self.queries), len(self.queries)))  # (N, Q, LC)
        states = by_image.chunk(len(self.layers), dim=-1)
        return torch.stack([connect(x) for connect, x in zip(self.connectors, states, strict=True)], dim=1)

    def velocity(
        self,
        x: Float[Tensor, "T D"],
        t: Float[Tensor, " N"],
        condition: Float[Tensor, "N L Q K"],
        grids: Sequence[Grid],
    ) -> Float[Tensor, "T D"]:
        """v at x_t of images end to end, in fp32 or better; equal grids are one batch."""
        images = x.split([grid.length for grid in grids])
        found: dict[int, Tensor] = {}
        for grid in dict.fromkeys(grids):
            members = [i for i, g in enumerate(grids) if g == grid]
            v = self.denoiser(torch.stack([images[i] for i in members]), t[members], condition[members], grid)
            found |= zip(members, precise(v))
        return torch.cat([found[i] for i in range(len(grids))])

    def loss(self, hidden: Float[Tensor, "NQ LC"], embeddings: Embeddings, corrupted: Corrupted) -> LossBreakdown:
        """Squared error of v, a mean over a token's channels and a sum over tokens."""
        x, t, grids = corrupted.inputs, corrupted.time, corrupted.grids
        assert corrupted.targets is not None
        if not grids:  # it still runs, on an image of one token, so that its gradient is zero rather than missing
            hidden = hidden.new_zeros(len(self.queries), hidden.shape[1])
            x, t, grids = x.new_zeros(1, x.shape[1]), t.new_zeros(1), (Grid(1, 1),)
        v = self.velocity(x, t, self.connect(hidden), grids)[: len(corrupted.targets)]
        error = F.mse_loss(v, corrupted.targets, reduction="none").mean(-1)  # (T,)
        return {"image": LossTerm(error.sum(), len(error))}

    def sample(
        self,
        session: DecodingSession,
        grids: Sequence[Grid],
        settings: SamplingSettings,
        rngs: Sequence[torch.Generator],
        known: Known | None = None,
    ) -> Iterator[ImageTokens]:
        """Ask the backbone once, for all branches; then solve dx/dt = v from noise without it."""
        self.check_known(known)
        self.check_sampling(settings, grids)
        assert isinstance(settings, FlowSettings)
        count, lengths = len(grids), [grid.length for grid in grids]
        asked = Embeddings(self.queries.repeat(count, 1))
        ask = session.peek if self.private else session.append
        condition = self.connect(ask(asked, [self._block()] * count).flatten(0, 1))  # (G R, L, Q, K)
        noise = draw_noise(grids, rngs, self.layout.dim).to(precise(condition))  # (T, D)

        def velocity(x: Tensor, t: float) -> Tensor:
            branches = settings.active(t)
            rows = branches * count
            v = self.velocity(x.repeat(branches, 1), x.new_full((rows,), t), condition[:rows], [*grids] * branches)
            return settings.guide_images(v.unflatten(0, (branches, -1)), lengths, t)  # (G, T, D) -> (T, D)

        for _, x in solve_flow(velocity, noise, grids, settings):
            yield ImageTokens(x, tuple(grids))


def _connector(width: int, dim: int) -> nn.Sequential:
    """Hidden states of one layer to conditions; normed first, because streams grow from layer to layer."""
    return nn.Sequential(nn.RMSNorm(width), nn.Linear(width, dim), nn.GELU(), nn.Linear(dim, dim))
