"""Patch coders: each image by itself, whatever is packed beside it."""

from collections.abc import Callable
from functools import partial

import pytest
import torch

from unimodal_generators import ConvNeXtCoder, LinearCoder, UNetCoder
from unimodal_generators.patch_coders import PatchCoder
from unimodal_tokenizers.base import Grid, TokenLayout
from unimodal_tokenizers.patch import PatchTokenizer

LAYOUT = TokenLayout("continuous", dim=12, stride=2)
GRIDS = (Grid(4, 4), Grid(2, 4), Grid(1, 3), Grid(4, 4), Grid(4, 2))
CODERS: dict[str, Callable[[TokenLayout, int], PatchCoder]] = {
    "linear": LinearCoder,
    "unet": partial(UNetCoder, patch=2, channels=8),
    "unet whole": partial(UNetCoder, patch=1, channels=8, depth=1),
    "convnext": partial(ConvNeXtCoder, channels=8),
}


def coder(name: str) -> PatchCoder:
    torch.manual_seed(0)
    made = CODERS[name](LAYOUT, 16).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return made


def inputs(grids: tuple[Grid, ...] = GRIDS) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Vectors, hidden states and embeddings of time."""
    rng = torch.Generator().manual_seed(1)
    n = sum(g.length for g in grids)
    shapes = ((n, 12), (n, 16), (len(grids), 16))
    x, hidden, time = (torch.randn(s, generator=rng, dtype=torch.float64) for s in shapes)
    return x, hidden, time


def through(made: PatchCoder, x: torch.Tensor, hidden: torch.Tensor, time: torch.Tensor,
            grids: tuple[Grid, ...]) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    values, skips = made.encode(x, time, grids)
    return values, made.decode(hidden + values, skips, time, grids)


@pytest.mark.parametrize("name", CODERS)
def test_many_images_equal_each_alone_with_gradients(name: str) -> None:
    made, (x, hidden, time) = coder(name), inputs()
    values, out = through(made, x, hidden, time, GRIDS)
    assert (values.shape, out.shape) == ((51, 16), (51, 12))
    (values.sin().sum() + out.sin().sum()).backward()
    together = [p.grad.clone() for p in made.parameters() if p.grad is not None]
    assert len(together) == len(list(made.parameters()))
    made.zero_grad()
    start = 0
    for i, grid in enumerate(GRIDS):
        own = slice(start, start + grid.length)
        one = through(made, x[own], hidden[own], time[i : i + 1], (grid,))
        torch.testing.assert_close(one[0], values[own])
        torch.testing.assert_close(one[1], out[own])
        (one[0].sin().sum() + one[1].sin().sum()).backward()
        start += grid.length
    for parameter, grad in zip(made.parameters(), together, strict=True):
        torch.testing.assert_close(parameter.grad, grad)


@pytest.mark.parametrize("name", ["unet", "unet whole", "convnext"])
def test_an_image_sees_its_own_tokens_time_and_skips(name: str) -> None:
    """Each of these changes the image it is of, and no other."""
    made, (x, hidden, time) = coder(name), inputs()
    values, out = through(made, x, hidden, time, GRIDS)
    for of, change in (("x", 0), ("hidden", 1), ("time", 2)):
        moved = [x.clone(), hidden.clone(), time.clone()]
        moved[change][-1] += torch.randn(moved[change].shape[1], dtype=torch.float64)  # of the last image, or token
        others = through(made, *moved, GRIDS)
        assert torch.equal(others[1][:-8], out[:-8])
        assert (others[1][-8:] - out[-8:]).abs().amax(1).min() > 1e-6, of  # every token of the image hears of it
        assert torch.equal(others[0], values) == (of == "hidden")
    encoded, skips = made.encode(x, time, GRIDS)
    without = made.decode(hidden + encoded, torch.zeros_like(skips), time, GRIDS)
    assert (without - out).abs().amax(1).min() > 1e-6


def test_squares_of_a_token_lie_as_its_tokenizer_cut_them() -> None:
    """The first convolution sees the picture itself."""
    made = UNetCoder(LAYOUT, 16, patch=2, channels=8).double()
    pictures = torch.rand(2, 3, 8, 4, dtype=torch.float64)
    seen: list[torch.Tensor] = []
    made.first.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    tokens = PatchTokenizer(2).encode(pictures)
    made.encode(tokens.values, torch.zeros(2, 16, dtype=torch.float64), tokens.grids)
    assert torch.equal(seen[0], pictures)


@pytest.mark.parametrize("name", CODERS)
def test_a_fresh_coder_gives_zeros_and_then_learns(name: str) -> None:
    made, (x, hidden, time) = CODERS[name](LAYOUT, 16).double(), inputs()
    _, out = through(made, x, hidden, time, GRIDS)
    assert not out.any()
    (out - 1).square().sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in made.parameters())


@pytest.mark.parametrize("patch", [0, 5])
def test_a_patch_that_does_not_divide_a_token_is_refused(patch: int) -> None:
    with pytest.raises(ValueError, match=f"coder.patch: .* 12 channels, got {patch}"):
        UNetCoder(LAYOUT, 16, patch=patch, channels=8)
