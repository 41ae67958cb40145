"""Continuous tokens one by one or a few at a time, each drawn by a small network of its own, given its hidden state.

MAR (arXiv 2406.11838), UniFluid (arXiv 2503.13436), Ming-UniVision (arXiv 2510.06590).

Letters: N images, T tokens of all of them, n tokens of one image, m tokens that are learned or drawn, K noise draws a
token, D channels of a token, C width of the backbone, G guidance branches, K backbone evaluations.
z a hidden state, x_t a noised token.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
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
    in_rows,
)
from unimodal_generators.denoising import draw_noise
from unimodal_generators.token_head import HeadFlow, HeadNoising, TokenHead
from unimodal_tokenizers import diffusion
from unimodal_tokenizers.base import Grid, ImageTokens, TokenLayout, precise


@dataclass(frozen=True)
class TokenDiffusionSettings(DenoisingSettings):
    """How tokens are drawn.

    Args:
        steps: evaluations of the backbone, exactly, which random order spends by the cosine schedule; None: one a token, all
            that raster order can do.
        head_steps: evaluations of the head a token, exactly.
        solver: of the head: euler or heun of a flow, ddpm of a diffusion; None: the first of these that it has.
        shift: above 1: more of the head's steps near the noise; a flow's alone.
        temperature: deviation of the noise that a flow begins as (0 is one token for all seeds), or that a diffusion adds.
        growth: whether guidance is the same for every token, or grows from 1 with the share that is drawn (MAR's linear
            schedule).
    """

    steps: int | None = None
    head_steps: int = 20
    solver: Literal["euler", "heun", "ddpm"] | None = None
    shift: float = 1.0
    temperature: float = 1.0
    growth: Literal["none", "linear"] = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature: expected 0 (no noise) or more, got {self.temperature}")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps: expected at least 1 evaluation of the backbone, got {self.steps}")
        try:
            diffusion.sampling_times(self.head_steps, self.shift, "heun" if self.solver == "heun" else "euler")
        except ValueError as error:
            raise ValueError(f"head_{error}" if str(error).startswith("steps") else str(error)) from error

    def grown(self, share: float) -> "TokenDiffusionSettings":
        """Guidance once a share of the tokens is drawn: 1 + share (guidance - 1), of the text and of images."""
        if self.growth == "none":
            return self
        text, images = (1.0 + share * (scale - 1.0) for scale in (self.guidance, self.image_guidance))
        return replace(self, guidance=text, image_guidance=images)


@dataclass(frozen=True)
class CorruptedTokens(Corrupted):
    """What the backbone reads, and what the head learns of it; at `where` it reads the mask instead of a token."""

    noise: Float[Tensor, "m K D"] | None = None
    head_time: Float[Tensor, "m K"] | None = None


class TokenDiffusion(ImageGenerator):
    """Learns p(token | hidden state) by a small network, the diffusion loss of MAR (section 3.2).

    In raster order an image is causal and its own context, and a token is drawn given those before it. In random order
    (MAR, section 3.4) an image is a private bidirectional block in which a random share of the tokens is replaced by a
    learned vector; those are learned, and drawn in K groups of growing size. MAR's encoder does not see the masked tokens
    and its decoder does; here one network sees all, as in MaskGIT.

    Args:
        layout: of the image tokenizer.
        width: of the backbone.
        order: of the tokens.
        head_width: of the head.
        head_depth: residual blocks of the head.
        multiply: noise draws a token and step; the loss is their mean (MAR, section 3.2: four).
        noising: between tokens and noise: `HeadDiffusion` as MAR, or None for `HeadFlow()`.
        mask_min: least share of masked tokens in random order; the share is drawn from a normal of mean 1 and deviation
            `mask_std`, cut to [mask_min, 1] (MAR, section 4.2).
        mask_std: see there.
        input_noise: raster order reads tokens of a learned image with that much noise added, never predicts it: in
            sampling, what is read is not data either.
        sampling: defaults of the sampler.
    """

    accepts: ClassVar = ("continuous",)
    settings: ClassVar = TokenDiffusionSettings
    inpaints = True

    def __init__(
        self,
        layout: TokenLayout,
        width: int,
        order: Literal["raster", "random"] = "random",
        head_width: int = 256,
        head_depth: int = 3,
        multiply: int = 4,
        noising: HeadNoising | None = None,
        mask_min: float = 0.7,
        mask_std: float = 0.25,
        input_noise: float = 0.0,
        sampling: TokenDiffusionSettings = TokenDiffusionSettings(),
    ) -> None:
        super().__init__()
        self.check(layout)
        if multiply < 1:
            raise ValueError(f"multiply: expected at least 1 noise draw a token, got {multiply}")
        if not (0 < mask_min <= 1 and mask_std > 0):
            raise ValueError(
                f"mask_min, mask_std: expected 0 < mask_min <= 1, mask_std > 0, got {mask_min}, {mask_std}"
            )
        if input_noise < 0 or (input_noise and order == "random"):
            raise ValueError(f"input_noise: expected at least 0, and 0 in random order, got {input_noise}")
        self.layout, self.sampling, self.order = layout, sampling, order
        self.reads = "previous" if order == "raster" else "own"
        self.repeats = order == "random"
        self.multiply, self.noising = multiply, HeadFlow() if noising is None else noising
        self.mask_min, self.mask_std, self.input_noise = mask_min, mask_std, input_noise
        self.token_in = nn.Linear(layout.dim, width)
        self.head = TokenHead(layout.dim, width, head_width, head_depth)
        if order == "random":
            self.mask = nn.Parameter(torch.randn(width) * 0.02)
        self._check(sampling)

    def plan(self, grid: Grid, rng: np.random.Generator) -> list[Block]:
        """One block: how many tokens are learned, and the seed of which, and of their noise."""
        count = grid.length if self.order == "raster" else math.ceil(grid.length * self._masked_share(rng))
        known = 1.0 - count / grid.length if self.order == "random" else 1.0
        seed = int(rng.integers(2**63))
        return [replace(self._block(grid), time=known, seed=seed, n_targets=count)]

    def plan_context(self, grid: Grid) -> list[Block]:
        """One block that later tokens see: bidirectional in random order, causal in raster order."""
        return [replace(self._block(grid), kind=TokenKind.CLEAN, private=False)]

    def _block(self, grid: Grid) -> Block:
        both = self.order == "random"
        return Block(grid, TokenKind.LEARNED, bidirectional=both, private=both)

    def _masked_share(self, rng: np.random.Generator) -> float:
        while (share := 1.0 - abs(rng.normal(0.0, self.mask_std))) < self.mask_min:  # the lower half of the normal
            pass
        return share

    def corrupt(self, tokens: ImageTokens, blocks: Sequence[Block]) -> CorruptedTokens:
        """The tokens, which of them are masked, and for every one that is learned K draws of noise and time."""
        data, dim = precise(tokens.values), self.layout.dim
        masked: list[Tensor] = [torch.empty(0, dtype=torch.long)]
        read: list[Tensor] = [torch.empty(0, dim)]
        noise: list[Tensor] = [torch.empty(0, self.multiply, dim)]
        time: list[Tensor] = [torch.empty(0, self.multiply)]
        first = 0
        for block in blocks:
            rng = torch.Generator().manual_seed(block.seed)
            if self.order == "random":
                masked.append(first + torch.randperm(block.grid.length, generator=rng)[: block.n_targets].sort().values)
            noise.append(torch.randn(block.n_targets, self.multiply, dim, generator=rng))
            time.append(self.noising.draw_time((block.n_targets, self.multiply), rng))
            if self.input_noise:
                read.append(self.input_noise * torch.randn(block.grid.length, dim, generator=rng))
            first += block.grid.length
        at = torch.cat(masked).to(data.device) if self.order == "random" else None
        return CorruptedTokens(
            inputs=data + torch.cat(read).to(data) if self.input_noise else data,
            time=data.new_tensor([block.time for block in blocks]),
            grids=tokens.grids,
            targets=data if at is None else data[at],
            where=at,
            noise=torch.cat(noise).to(data),
            head_time=torch.cat(time).to(data),
        )

    def context(self, tokens: ImageTokens) -> Corrupted:
        """The tokens themselves."""
        return Corrupted(tokens.values, tokens.values.new_ones(len(tokens)), tokens.grids)

    def embed(self, corrupted: Corrupted) -> Embeddings:
        """Linear tokens; the mask in the place of those that are masked."""
        values = self.token_in(corrupted.inputs.to(self.token_in.weight.dtype))  # (T, C)
        if corrupted.where is not None:
            values = values.index_put((corrupted.where,), self.mask.to(values.dtype))
        return Embeddings(values)

    def loss(self, hidden: Float[Tensor, "T C"], embeddings: Embeddings, corrupted: Corrupted) -> LossBreakdown:
        """Squared error (MAR, eq. 1), a mean over a token's channels and draws and a sum over learned tokens."""
        assert isinstance(corrupted, CorruptedTokens)
        noise, time, targets = corrupted.noise, corrupted.head_time, corrupted.targets
        assert noise is not None
        assert time is not None
        assert targets is not None
        z = hidden if corrupted.where is None else hidden[corrupted.where]  # (m, C)
        data, rows = targets.repeat_interleave(self.multiply, 0), noise.flatten(0, 1)  # (m K, D)
        t = time.flatten()[:, None]  # (m K, 1)
        x = self.noising.noised(rows, data, t)
        said = self.head(z[:, None], x.view_as(noise), time)  # (m, K, D): z is projected once, whatever K
        target = self.noising.target(rows, data, t).view_as(noise)
        error = F.mse_loss(said, target, reduction="none").mean((1, 2))  # (m,)
        return {"image": LossTerm(error.sum(), len(targets))}

    def draw(
        self,
        z: Float[Tensor, "G m C"],
        noise: Float[Tensor, "m D"],
        settings: TokenDiffusionSettings,
        lengths: Sequence[int],
        rngs: Sequence[torch.Generator],
        progress: float,
    ) -> Float[Tensor, "m D"]:
        """Every token from its own noise; a solver that draws more of it asks the generator of each token's image.

        Every step asks the head about the hidden states of all active branches and guides as the image's `progress` has it.
        `lengths`: tokens of each image.
        """

        def estimate(x: Tensor, t: float) -> Tensor:
            return settings.guide_images(self.head(z, x, x.new_full((), t)), lengths, progress)

        def draw() -> Tensor:
            return draw_noise([Grid(1, n) for n in lengths], rngs, self.layout.dim).to(noise)

        return self.noising.solve(estimate, noise, draw, settings)

    def _check(self, settings: TokenDiffusionSettings) -> None:
        """Refuse steps that would be ignored, and a solver that the head's noising has not."""
        self.noising.check(settings)
        if self.order == "raster" and settings.steps is not None:
            raise ValueError(
                f"steps: raster order evaluates the backbone once a token, expected none, got {settings.steps}"
            )

    def check_sampling(self, settings: SamplingSettings, grids: Sequence[Grid]) -> None:
        """Raster order takes no steps; random order draws one token at least in each."""
        super().check_sampling(settings, grids)
        assert isinstance(settings, TokenDiffusionSettings)
        self._check(settings)
        least = min(grid.length for grid in grids)
        if settings.steps is not None and settings.steps > least:
            raise ValueError(f"steps: expected at most one a token ({least}), got {settings.steps}")

    def sample(
        self,
        session: DecodingSession,
        grids: Sequence[Grid],
        settings: SamplingSettings,
        rngs: Sequence[torch.Generator],
        known: Known | None = None,
    ) -> Iterator[ImageTokens]:
        """Raster order appends one token a document and step, with a preview a row; random order peeks K times, one each.

        Given tokens are never drawn: raster order reads them in their place, random order never masks them.
        """
        self.check_sampling(settings, grids)
        assert isinstance(settings, TokenDiffusionSettings)
        yield from (self._raster if self.order == "raster" else self._random)(session, grids, settings, rngs, known)

    def _raster(
        self,
        session: DecodingSession,
        grids: Sequence[Grid],
        settings: TokenDiffusionSettings,
        rngs: Sequence[torch.Generator],
        known: Known | None,
    ) -> Iterator[ImageTokens]:
        if len(set(grids)) != 1:
            raise ValueError(f"sampling: raster-order images of one call need one size, got {sorted(set(grids))}")
        block, n, dim = self._block(grids[0]), grids[0].length, self.layout.dim
        noise = draw_noise(grids, rngs, dim).to(self._precise()).unflatten(0, (len(grids), n))  # (R, n, D)
        given = None if known is None else (known.tokens.values.to(noise).view(-1, n, dim), known.mask.view(-1, n))
        drawn: list[Tensor] = []
        hidden = session.last  # (G, R, C)
        for i in range(n):
            z, grown = hidden[: settings.active(i / n)], settings.grown((i + 1) / n)
            token = self.draw(z, noise[:, i], grown, [1] * len(grids), rngs, i / n)  # (R, D)
            if given is not None:
                token = torch.where(given[1][:, i, None].to(token.device), given[0][:, i], token)
            drawn.append(token)
            one = Corrupted(token, token.new_ones(len(grids)), (Grid(1, 1),) * len(grids))
            hidden = session.append(self.embed(one), [block.piece(i, 1)] * len(grids))
            if len(drawn) % grids[0].w == 0:
                yield in_rows(torch.stack(drawn, dim=1), grids[0], known)

    def _random(
        self,
        session: DecodingSession,
        grids: Sequence[Grid],
        settings: TokenDiffusionSettings,
        rngs: Sequence[torch.Generator],
        known: Known | None,
    ) -> Iterator[ImageTokens]:
        blocks = [self._block(grid) for grid in grids]
        orders = self._orders(grids, rngs, known)
        noise = draw_noise(grids, rngs, self.layout.dim).to(self._precise())  # (T, D)
        x = torch.zeros_like(noise)
        if known is not None:
            x = torch.where(known.mask.to(x.device)[:, None], known.tokens.values.to(x), x)
        if settings.steps is None and len({grid.length for grid in grids}) != 1:
            raise ValueError(f"steps: images of several sizes need a number, got none for {sorted(set(grids))}")
        steps = settings.steps or grids[0].length
        counts = [cosine_counts(len(order), g.length, settings.steps) for order, g in zip(orders, grids)]
        time = x.new_ones(len(grids))
        counts = [[0] * (steps - len(count)) + count for count in counts]  # what has less to draw begins later
        for k in range(steps):
            now = [order[: count[k]] for order, count in zip(orders, counts)]
            orders, masked = [order[len(at) :] for order, at in zip(orders, now)], torch.cat(orders)
            if any(len(at) for at in now):
                read = Corrupted(x, time, tuple(grids), where=masked.to(x.device))
                progress = k / steps
                hidden = session.peek(self.embed(read), blocks, settings.active(progress))  # (G, T, C)
                # Guidance grows with the share of an image's tokens that is there behind the step.
                shares = [1 - len(order) / grid.length for order, grid in zip(orders, grids)]
                for share in sorted(set(shares)) if settings.growth != "none" else [None]:
                    some = [r for r, reached in enumerate(shares) if share in (None, reached)]
                    at, lengths = torch.cat([now[r] for r in some]).to(x.device), [len(now[r]) for r in some]  # (m,)
                    guided, own = settings if share is None else settings.grown(share), [rngs[r] for r in some]
                    x = x.index_put((at,), self.draw(hidden[:, at], noise[at], guided, lengths, own, progress))
            yield ImageTokens(x, tuple(grids))

    def _orders(
        self, grids: Sequence[Grid], rngs: Sequence[torch.Generator], known: Known | None
    ) -> list[Int[Tensor, " m"]]:
        """The order in which each image's tokens are drawn, counted over all images; given tokens are left out."""
        orders, first = [], 0
        for grid, rng in zip(grids, rngs, strict=True):
            order = first + torch.randperm(grid.length, generator=rng)
            orders.append(order if known is None else order[~known.mask.cpu()[order]])
            first += grid.length
        return orders

    def _precise(self) -> Tensor:
        """An empty tensor on the weights' device, in fp32 or better."""
        weight = self.token_in.weight
        return weight.new_empty(0, dtype=torch.promote_types(weight.dtype, torch.float32))


def cosine_counts(tokens: int, length: int, steps: int | None) -> list[int]:
    """How many of an image's unknown tokens are drawn at each step, at least one: few at first (MaskGIT, MAR).

    After step k of K, floor(tokens cos(pi k / 2 K)) are left, and one fewer than before at the most. `length` tokens are
    in the image; `steps` None is one a token. With fewer unknown tokens than steps, there are so many counts only.
    """
    k_max = min(tokens, length if steps is None else steps)
    counts, left = [], tokens
    for k in range(1, k_max + 1):
        rest = 0 if k == k_max else min(left - 1, math.floor(tokens * math.cos(math.pi * k / (2 * k_max))))
        counts.append(left - rest)
        left = rest
    return counts
