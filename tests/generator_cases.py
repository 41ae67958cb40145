"""Every generator as the tests build it, over tokenizers without weights: add one here and all suites ask it."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from unimodal_generators import (
    Autoregressive,
    ConvNeXtCoder,
    Depth,
    Diffusion,
    DiffusionSettings,
    DiT,
    Flow,
    HeadDiffusion,
    Masked,
    MaskedText,
    NextScale,
    ParallelNext,
    Queries,
    Regression,
    TokenDiffusion,
    TokenDiffusionSettings,
    UNetCoder,
)
from unimodal_tokenizers import DiffusionRepresentation
from unimodal_tokenizers.base import Grid, ImageTokenizer, MultiscaleTokenizer, TokenLayout
from unimodal_tokenizers.patch import PatchTokenizer


class GrayLevels(ImageTokenizer):
    """A discrete tokenizer without weights: the gray level of each 2 x 2 square, in 16 steps."""

    def __init__(self) -> None:
        super().__init__()
        self.layout = TokenLayout("discrete", dim=1, stride=2, codebooks=(16,))

    def encode_batch(self, images: torch.Tensor, rng: torch.Generator | None = None) -> torch.Tensor:
        gray = torch.nn.functional.avg_pool2d(images.mean(1, keepdim=True), 2)
        return ((gray + 1) * 7.5).round().long().flatten(1)

    def decode_batch(
        self, tokens: torch.Tensor, grid: Grid, rngs: Sequence[torch.Generator] | None = None
    ) -> torch.Tensor:
        gray = (tokens.float() / 7.5 - 1).unflatten(1, (1, grid.h, grid.w))
        return gray.repeat(1, 3, 1, 1).repeat_interleave(2, -1).repeat_interleave(2, -2)

    def lookup(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens.float()[:, None] / 7.5 - 1


class GrayDigits(GrayLevels):
    """The same gray level as two digits of base 4: two codebooks."""

    def __init__(self) -> None:
        super().__init__()
        self.layout = TokenLayout("discrete", dim=1, stride=2, codebooks=(4, 4))

    def encode_batch(self, images: torch.Tensor, rng: torch.Generator | None = None) -> torch.Tensor:
        level = super().encode_batch(images, rng)
        return torch.stack([level // 4, level % 4], dim=-1)

    def decode_batch(
        self, tokens: torch.Tensor, grid: Grid, rngs: Sequence[torch.Generator] | None = None
    ) -> torch.Tensor:
        return super().decode_batch(tokens[..., 0] * 4 + tokens[..., 1], grid, rngs)

    def lookup(self, tokens: torch.Tensor) -> torch.Tensor:
        return super().lookup(tokens[:, 0] * 4 + tokens[:, 1])


class GrayPyramid(MultiscaleTokenizer):
    """The same in 1, 2 and 4 rows, each the difference to the coarser ones."""

    def __init__(self, scales: tuple[int, ...] = (1, 2, 4)) -> None:
        super().__init__()
        self.layout = TokenLayout("multiscale", dim=2, stride=2, codebooks=(16,), scales=scales)

    def encode_batch(self, images: torch.Tensor, rng: torch.Generator | None = None) -> torch.Tensor:
        grid = self.layout.grid(*images.shape[-2:])
        rest, ids = torch.nn.functional.avg_pool2d(images.mean(1, keepdim=True), 2), []
        for k, size in enumerate(grid.sizes):
            means = torch.nn.functional.interpolate(rest, size, mode="area")
            ids.append(((means + 1) * 7.5).round().clamp(0, 15).long().flatten(1))
            rest = rest - self._say(ids[-1], k, grid)[:, :1]
        return torch.cat(ids, dim=1)

    def accumulate(self, tokens: torch.Tensor, grid: Grid) -> list[torch.Tensor]:
        parts = [self._say(ids, k, grid) for k, ids in enumerate(tokens.split(grid.lengths, dim=1))]
        return [sum(parts[: k + 1]) for k in range(len(parts))]

    def _say(self, ids: torch.Tensor, k: int, grid: Grid) -> torch.Tensor:
        codes = self.lookup(ids.flatten()).unflatten(0, (len(ids), *grid.sizes[k])).permute(0, 3, 1, 2)
        return torch.nn.functional.interpolate(codes, (grid.h, grid.w), mode="nearest")

    def decode_batch(
        self, tokens: torch.Tensor, grid: Grid, rngs: Sequence[torch.Generator] | None = None
    ) -> torch.Tensor:
        gray = self.accumulate(tokens, grid)[-1][:, :1]
        return gray.repeat(1, 3, 1, 1).repeat_interleave(2, -1).repeat_interleave(2, -2)

    def lookup(self, tokens: torch.Tensor) -> torch.Tensor:
        gray = tokens.float()[:, None] / 7.5 - 1
        return torch.cat([gray, gray.square()], dim=1)


class Case(NamedTuple):
    """A generator and a tokenizer that it takes.

    `whole`: whether all suites ask it; others differ from one of those by a component that has tests of its own.
    """

    generator: Callable[..., Any]
    tokenizer: Callable[[], ImageTokenizer]
    whole: bool = True
    context: str = "clean"  # in which forms images are context


squares = functools.partial(PatchTokenizer, 2)
made = functools.partial
features = made(  # its decoder draws
    DiffusionRepresentation,
    "vit_tiny_patch16_224",
    {"img_size": 8, "patch_size": 2, "embed_dim": 16, "depth": 1, "num_heads": 2, "dynamic_img_size": True},
    dim=6,
    decoder_width=16,
    decoder_depth=1,
    decoder_heads=2,
    steps=3,
)
dit = made(DiT, width=16, depth=2, heads=2)
small = {"head_width": 16, "head_depth": 1, "multiply": 2}
CASES = {
    "flow": Case(Flow, squares),
    "flow_causal": Case(made(Flow, bidirectional=False), squares, whole=False),
    "unet": Case(made(Flow, coder=made(UNetCoder, patch=2, channels=8)), squares),
    "convnext": Case(made(Flow, coder=made(ConvNeXtCoder, channels=16)), squares, whole=False),
    "convnext_causal": Case(
        made(Flow, coder=made(ConvNeXtCoder, channels=16), bidirectional=False, time="token"), squares, whole=False
    ),
    "diffusion": Case(made(Diffusion, predicts="data", sampling=DiffusionSettings(steps=8, eta=1.0)), squares),
    "autoregressive": Case(Autoregressive, GrayLevels),
    "codes": Case(made(Autoregressive, inputs="codes", token_noise=0.2), GrayLevels),
    "shared": Case(made(Autoregressive, vocabulary="shared"), GrayLevels),
    "rows": Case(made(Autoregressive, end_of_row=True), GrayLevels, whole=False),
    "digits": Case(made(Autoregressive, token_noise=0.2), GrayDigits),
    "depth": Case(made(Autoregressive, depth=Depth(2, 16, 2), inputs="codes"), GrayDigits, whole=False),
    "squares": Case(made(Autoregressive, shuffle=2, end_of_row=True, depth=Depth(1, 16, 2)), GrayDigits),
    "masked": Case(Masked, GrayLevels),
    "bound": Case(made(Masked, inputs="codes", schedule="linear", weighting="bound"), GrayLevels, whole=False),
    "parallel": Case(ParallelNext, GrayLevels),
    "joint": Case(made(Masked, text=made(MaskedText, block=3)), GrayLevels),
    "joint_bound": Case(
        made(Masked, weighting="bound", text=made(MaskedText, block=5, schedule="cosine", weighting="bound")),
        GrayLevels,
        whole=False,
    ),
    "next_scale": Case(made(NextScale, token_noise=0.2), GrayPyramid),
    "token_raster": Case(
        made(TokenDiffusion, order="raster", input_noise=0.1, sampling=TokenDiffusionSettings(head_steps=4), **small),
        squares,
    ),
    "token_random": Case(
        made(TokenDiffusion, mask_min=0.3, sampling=TokenDiffusionSettings(steps=3, head_steps=4), **small), squares
    ),
    "mar": Case(
        made(
            TokenDiffusion,
            noising=HeadDiffusion(),
            mask_min=0.3,
            sampling=TokenDiffusionSettings(steps=3, head_steps=5),
            **small,
        ),
        squares,
        whole=False,
    ),
    "mar_raster": Case(
        made(
            TokenDiffusion,
            order="raster",
            noising=HeadDiffusion(),
            sampling=TokenDiffusionSettings(head_steps=3),
            **small,
        ),
        squares,
        whole=False,
    ),
    "regression": Case(Regression, squares),
    "cosine": Case(made(Regression, loss="cosine"), squares, whole=False),
    "prefilled": Case(made(Regression, order="parallel"), squares, whole=False),
    "prefilled_private": Case(made(Regression, order="parallel", private=True), squares),
    "queries": Case(made(Queries, denoiser=dit, queries=3), squares),
    "ladder": Case(made(Queries, denoiser=dit, queries=5, layers=(0, -1), private=False), squares, whole=False),
    "metamorph": Case(made(Regression, loss="cosine"), features, whole=False),
    "blip3o": Case(made(Queries, denoiser=dit, queries=3), features, whole=False),
    "both": Case(Flow, squares, context="both"),
    "reader": Case(Flow, squares, whole=False, context="understanding"),
    "janus": Case(Autoregressive, GrayLevels, context="understanding"),
    "next-both": Case(Autoregressive, GrayLevels, whole=False, context="both"),
    "dream": Case(
        made(Queries, denoiser=dit, queries=5, layers=(0, -1), private=False),
        squares,
        whole=False,
        context="understanding",
    ),
}
WHOLE = [name for name, case in CASES.items() if case.whole]
TIMED = ("flow", "unet", "convnext", "diffusion", "both", "reader")  # told their time in one of several ways
