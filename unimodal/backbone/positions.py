"""Position schemes: which rotary ids text and image tokens get, and what is added to image embeddings.

Letters: n tokens, A axes of position ids, C width, E channels of a head.
"""

import math
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from unimodal.backbone.config import RopeScaling
from unimodal_tokenizers.base import Grid


class Placed(NamedTuple):
    """Ids of a run of tokens, and the id that follows it."""

    ids: Int[np.ndarray, "n A"]  # host side: thousands of short runs a pack
    following: int


@runtime_checkable
class PositionScheme(Protocol):
    """How a run of tokens that begins at id `start` is numbered."""

    axes: int

    def axis(self, half: int) -> Int[np.ndarray, " half"]:
        """Which axis of the ids turns each of the `half` rotary frequencies of a head."""

    def text(self, start: int, count: int) -> Placed:
        """Ids of `count` text tokens."""

    def image(self, start: int, grid: Grid) -> Placed:
        """Ids of one image; its learned and its clean copy share them."""

    def additive(self, grid: Grid, width: int) -> Float[Tensor, "n C"] | None:
        """What is added to an image's embeddings, if anything."""


class Sequential:
    """One id a token, images included (Chameleon, Janus, Show-o2)."""

    axes = 1

    def axis(self, half: int) -> Int[np.ndarray, " half"]:
        """The only one."""
        return np.zeros(half, dtype=np.int64)

    def text(self, start: int, count: int) -> Placed:
        """start, start + 1, ... on every axis."""
        ids = np.arange(start, start + count)[:, None]
        return Placed(ids.repeat(self.axes, 1), start + count)

    def image(self, start: int, grid: Grid) -> Placed:
        """As text."""
        return self.text(start, grid.length)

    def additive(self, grid: Grid, width: int) -> Float[Tensor, "n C"] | None:
        """Nothing: the ids tell the tokens apart."""
        return None


class BlockPositions(Sequential):
    """One id an image, whose tokens are told apart by an added 2-D sine-cosine (BAGEL, arXiv 2505.14683)."""

    def image(self, start: int, grid: Grid) -> Placed:
        """start, for every token."""
        return Placed(np.full((grid.length, 1), start), start + 1)

    def additive(self, grid: Grid, width: int) -> Float[Tensor, "n C"]:
        """Half of the channels for the row, half for the column."""
        return sincos_2d(grid, width)


class MultimodalRope(Sequential):
    """Three axes, time, row and column, each turning its own frequencies (M-RoPE of Qwen2-VL, arXiv 2409.12191).

    Text has its id on all three, which is ordinary rotary embedding; an image keeps the time of its first token.
    """

    axes = 3

    def axis(self, half: int) -> Int[np.ndarray, " half"]:
        """A quarter for time, three eighths each for row and column, from fast to slow: Qwen2-VL's 16, 24, 24 of 64."""
        time, rows = half // 4, (half - half // 4) // 2
        return np.repeat([0, 1, 2], [time, rows, half - time - rows])

    def image(self, start: int, grid: Grid) -> Placed:
        """(start, start + row, start + column); text goes on behind the largest."""
        rows, columns = cells(grid).T
        ids = start + np.stack([np.zeros_like(rows), rows, columns], axis=1)
        return Placed(ids, start + max(grid.h, grid.w))


class Rope2d(Sequential):
    """Two axes, row and column, that turn every other frequency (as EVA-02's and Lumina's, arXiv 2303.11331, 2405.05945).

    Text has its id on both, which is ordinary rotary embedding.
    """

    axes = 2

    def axis(self, half: int) -> Int[np.ndarray, " half"]:
        """Row, column, row, column ..."""
        return np.arange(half) % 2

    def image(self, start: int, grid: Grid) -> Placed:
        """(start + row, start + column); text goes on behind the larger."""
        return Placed(start + cells(grid), start + max(grid.h, grid.w))


def cells(grid: Grid) -> Int[np.ndarray, "n 2"]:
    """Row and column of every token: of a coarser scale, those of the finest grid's cell that its own cell's middle is in.

    Cells of one scale never share a place; of two scales they may, and the generator says which scale is which.
    """
    placed = []
    for rows, columns in grid.sizes:
        row, column = np.divmod(np.arange(rows * columns), columns)
        placed.append(
            np.stack([(2 * row + 1) * grid.h // (2 * rows), (2 * column + 1) * grid.w // (2 * columns)], axis=1)
        )
    return np.concatenate(placed)


def sincos_2d(grid: Grid, width: int) -> Float[Tensor, "n C"]:
    """Fixed 2-D sine-cosine embedding, row-major (MAE, arXiv 2111.06377), of several scales one after the other."""
    if width % 4:
        raise ValueError(f"width: a 2-D sine-cosine embedding needs a multiple of 4, got {width}")
    halves = [sincos(torch.from_numpy(axis).float(), width // 2) for axis in cells(grid).T]
    return torch.cat(halves, dim=1)  # (n, C)


def sincos(values: Float[Tensor, " n"], width: int, period: float = 10_000.0) -> Float[Tensor, "n C"]:
    """Sines, then cosines, of `values` at geometrically falling frequencies (Transformer, section 3.5)."""
    half = width // 2
    frequency = torch.exp(-math.log(period) * torch.arange(half, device=values.device) / half)
    angle = values[:, None] * frequency  # (n, C/2)
    return torch.cat([angle.sin(), angle.cos()], dim=1)


SCHEMES: dict[str, PositionScheme] = {
    "sequential": Sequential(), "block": BlockPositions(), "mrope": MultimodalRope(), "rope2d": Rope2d(),
}  # fmt: skip


class Rotary:
    """Angles of a rotary position embedding (RoFormer, arXiv 2104.09864), for the scheme's axes and a stretch."""

    def __init__(self, scheme: PositionScheme, head_dim: int, theta: float, scaling: RopeScaling | None = None) -> None:
        half = head_dim // 2
        # On the host in float64 and no buffer: never cast, never empty on the meta device.
        self.frequency = stretch(theta ** (-np.arange(half) / half), head_dim, theta, scaling)  # (E/2,)
        self.axis = scheme.axis(half)
        self._on_device: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self.scale = 1.0
        if scaling is not None and scaling.kind == "yarn":
            default = 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0
            self.scale = default if scaling.attention_factor is None else scaling.attention_factor

    def __call__(self, positions: Int[Tensor, "n A"]) -> tuple[Float[Tensor, "n 1 E2"], Float[Tensor, "n 1 E2"]]:
        """Cosines and sines of every token, of a half head each, in fp32."""
        device = positions.device
        if device not in self._on_device:
            self._on_device[device] = (
                torch.from_numpy(self.frequency).to(device),
                torch.from_numpy(self.axis).to(device),
            )
        frequency, axis = self._on_device[device]
        ids = positions.double()  # (n, A)
        if positions.shape[1] > 1:
            ids = ids[:, axis]  # (n, E/2): each frequency its own axis
        angle = ids * frequency
        cos, sin = angle.cos(), angle.sin()  # (n, E/2)
        if self.scale != 1.0:
            cos, sin = cos * self.scale, sin * self.scale
        return cos.float()[:, None], sin.float()[:, None]


def stretch(
    frequency: Float[np.ndarray, " half"], head_dim: int, theta: float, scaling: RopeScaling | None
) -> Float[np.ndarray, " half"]:
    """Rotary frequencies for a longer context; see `RopeScaling`."""
    if scaling is None:
        return frequency
    slow = frequency / scaling.factor
    if scaling.kind == "linear":
        return slow
    assert scaling.original_length is not None
    length = scaling.original_length
    if scaling.kind == "llama3":
        turns = length * frequency / (2 * math.pi)  # in the length it was trained at
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    else:  # the dimension that turns n times, solved for its index, rounded outwards

        def index(turns: float) -> float:
            return head_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

        first = max(math.floor(index(scaling.beta_fast)), 0)
        last = min(math.ceil(index(scaling.beta_slow)), head_dim - 1)
        kept = 1 - np.clip((np.arange(head_dim // 2) - first) / max(last - first, 1e-3), 0.0, 1.0)
    return kept * frequency + (1 - kept) * slow


def rotate(
    x: Float[Tensor, "n H E"], cos: Float[Tensor, "n 1 E2"], sin: Float[Tensor, "n 1 E2"]
) -> Float[Tensor, "n H E"]:
    """Turn the two halves of every head against each other, in fp32 or better."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    cos, sin = cos.to(dtype), sin.to(dtype)
    a, b = x.to(dtype).chunk(2, dim=-1)  # (n, H, E/2) each
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)
