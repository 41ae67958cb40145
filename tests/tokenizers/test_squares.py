"""Squares of pixels as channels, and the linear map beside the networks."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from unimodal_tokenizers import GridTokenizer, KLTokenizer, MultiscaleVQ
from unimodal_tokenizers.base import TrainableTokenizer
from unimodal_tokenizers.quantizers import (
    BSQ,
    FSQ,
    IBQ,
    LFQ,
    EuclideanQuantizer,
    ResidualQuantizer,
    SubCodebooks,
    VectorQuantizer,
)
from unimodal_tokenizers.squares import Squares, lowest_frequencies

MADE = {
    "kl": lambda side: KLTokenizer(4, [8, 16], 1, space_to_depth=side),
    "grid": lambda side: GridTokenizer(VectorQuantizer(16, 4), [8, 16], 1, space_to_depth=side),
    "multiscale": lambda side: MultiscaleVQ(16, 4, [8, 16], 1, scales=[1, 2], space_to_depth=side),
}


def images(height: int = 16, width: int = 8, count: int = 2) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize(("side", "count"), [(1, 3), (2, 5), (2, 12), (4, 4), (4, 48), (3, 30)])
def test_the_waves_are_orthonormal_and_behind_the_last_come_zeros(side: int, count: int) -> None:
    basis, _ = lowest_frequencies(side, count)
    assert basis.shape == (count, 3, side, side)
    known = min(count, 3 * side**2)
    product = basis.flatten(1) @ basis.flatten(1).T
    expected = torch.diag(torch.tensor([1.0] * known + [0.0] * (count - known)))
    torch.testing.assert_close(product, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(basis[0], torch.full((3, side, side), (3 * side**2) ** -0.5))  # brightness comes first


def test_slow_waves_come_before_fast_ones_and_brightness_before_colour() -> None:
    """Of 4 x 4 pixels: brightness, its difference from red to blue, and the two slowest waves of brightness."""
    (mean, colour, *slow), _ = lowest_frequencies(4, 4)
    torch.testing.assert_close(mean, torch.full((3, 4, 4), 48**-0.5))
    torch.testing.assert_close(colour, torch.tensor([1.0, 0.0, -1.0])[:, None, None].expand(3, 4, 4) / 32**0.5)
    for wave, along in zip(slow, (-1, -2), strict=True):  # half a turn over the square: odd about its middle
        torch.testing.assert_close(wave.flip(along), -wave)
        torch.testing.assert_close(wave[:1].expand(3, 4, 4), wave)
        assert (wave.diff(dim=along) < 0).all()


def test_folding_is_turned_back_and_keeps_a_square_in_one_place() -> None:
    squares = Squares(4, 8, 2)
    x = images()
    folded = squares.fold(x)
    assert folded.shape == (2, 48, 4, 2)
    assert torch.equal(squares.unfold(folded), x)
    assert sorted(folded[1, :, 2, 1].tolist()) == sorted(x[1, :, 8:12, 4:8].flatten().tolist())


def test_the_linear_map_is_a_product_with_the_pixels_of_a_token() -> None:
    squares, x = Squares(2, 4, 5), images()
    z = squares.analysis(x)
    for row in range(4):
        for column in range(2):
            pixels = x[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].flatten(1)  # (B, 48)
            torch.testing.assert_close(z[:, :, row, column], pixels @ squares.analysis.weight.flatten(1).T)
    grey = torch.full((1, 3, 4, 4), 0.5)
    torch.testing.assert_close(squares.analysis(grey).flatten()[0], torch.tensor(0.5 * 3**0.5))


def test_training_begins_with_the_lowest_frequencies_alone() -> None:
    """As many channels as a token has values: nothing is lost. With fewer: what the waves hold of it, and no more."""
    x = images()
    for options in ({}, {"use_quant_conv": True, "use_post_quant_conv": True}):
        whole = KLTokenizer(12, [8], 1, space_to_depth=2, options=options).eval()
        torch.testing.assert_close(whole(x).images, x, atol=1e-5, rtol=0)
        variance = whole._posterior(x).logvar
        torch.testing.assert_close(variance, torch.full_like(variance, -6.0))
    made = KLTokenizer(4, [8, 16], 1, space_to_depth=2).eval()
    basis = lowest_frequencies(4, 4)[0].flatten(1)
    for row in range(4):
        pixels = x[:, :, 4 * row : 4 * row + 4, :4].flatten(1)
        seen = made(x).images[:, :, 4 * row : 4 * row + 4, :4].flatten(1)
        torch.testing.assert_close(seen, pixels @ basis.T @ basis, atol=1e-5, rtol=0)


def test_so_does_a_quantizer() -> None:
    """A codebook that holds the tokens of an image gives the waves of it back."""
    x = images()
    made = GridTokenizer(EuclideanQuantizer(16, 4), [8, 16], 1, space_to_depth=2).eval()
    with torch.no_grad():
        made.quantizer.codebook.weight.copy_(made._images_to_vectors(x))  # 2 images x 4 x 2 tokens
    linear = KLTokenizer(4, [8, 16], 1, space_to_depth=2).eval()
    torch.testing.assert_close(made(x).images, linear(x).images, atol=1e-5, rtol=0)


def test_where_directions_are_kept_each_slice_begins_with_a_constant_beside_its_waves() -> None:
    """So a vector can be told from half of it: the direction of its waves alone could not. Lost lengths lose little."""
    squares, x = Squares(2, 4, 6, "directions", slices=2), images()
    z = squares.analysis(x)
    torch.testing.assert_close(z[:, [2, 5]], torch.full((2, 2, 4, 2), 4.0))
    plain = Squares(2, 4, 4)
    # The first and the last wave to one slice, those between to the other: what weighs most is shared out.
    torch.testing.assert_close(z[:, [0, 3, 4, 1]], plain.analysis(x))
    torch.testing.assert_close(
        squares.synthesis(z / 4), plain.synthesis(plain.analysis(x))
    )  # a constant says nothing of pixels
    directions = F.normalize(z.unflatten(1, (2, 3)), dim=2).flatten(1, 2)
    torch.testing.assert_close(squares.synthesis(directions), plain.synthesis(plain.analysis(x)), atol=0.15, rtol=0)


def test_where_levels_are_kept_channels_begin_alike() -> None:
    """The share of a channel in what is seen stays what it was; its numbers are what they were over its deviation."""
    plain, squares = Squares(2, 4, 6), Squares(2, 4, 6, "levels")
    deviations = lowest_frequencies(4, 6)[1]
    assert (deviations.diff() <= 0).all()
    assert 0.5 < deviations[0] < 1.5
    x = images()
    torch.testing.assert_close(squares.analysis(x) * deviations[:, None, None], plain.analysis(x))
    torch.testing.assert_close(squares.synthesis(squares.analysis(x)), plain.synthesis(plain.analysis(x)))


def test_a_tokenizer_begins_as_its_quantizer_keeps_vectors() -> None:
    made = [
        (EuclideanQuantizer(16, 4), "vectors", 1),
        (ResidualQuantizer(16, 2, 4), "vectors", 1),
        (VectorQuantizer(16, 4), "directions", 1),
        (IBQ(16, 4), "levels", 1),
        (SubCodebooks(VectorQuantizer(16, 2), 2), "directions", 2),
        (FSQ([3, 3, 3, 3]), "levels", 1),
        (LFQ(4), "levels", 1),
        (BSQ(4), "levels", 1),
    ]
    for quantizer, keeps, slices in made:
        tokenizer, expected = GridTokenizer(quantizer, [8, 16], 1, space_to_depth=2), Squares(2, 4, 4, keeps, slices)
        for name, value in expected.state_dict().items():
            assert torch.equal(tokenizer.squares.state_dict()[name], value), (type(quantizer), name)


@pytest.mark.parametrize("name", MADE)
def test_everything_learns_and_the_stride_counts_it(name: str) -> None:
    tokenizer: TrainableTokenizer = MADE[name](2).train()
    assert tokenizer.layout.stride == 4
    torch.manual_seed(0)
    for parameter in tokenizer.parameters():  # away from the start, where last layers of zeros hide all before them
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    result = tokenizer(images())
    assert result.images.shape == (2, 3, 16, 8)
    (result.images.square().mean() + sum(result.terms.values())).backward()
    assert not [n for n, p in tokenizer.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    with pytest.raises(ValueError, match="stride"):
        tokenizer(images(height=6))


@pytest.mark.parametrize("name", MADE)
def test_tokens_decode_to_what_training_reconstructs(name: str) -> None:
    torch.manual_seed(0)
    tokenizer = MADE[name](4).eval()
    for parameter in tokenizer.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    with torch.no_grad():
        made = tokenizer.decode(tokenizer.encode(images()))
        torch.testing.assert_close(made, tokenizer(images()).images, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", MADE)
def test_without_squares_nothing_is_added(name: str) -> None:
    """Weights of earlier versions fit."""
    assert not [key for key in MADE[name](1).state_dict() if key.startswith("squares")]


@pytest.mark.parametrize("name", MADE)
def test_bad_sides_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="space_to_depth: expected a side of at least 1 pixel, got 0"):
        MADE[name](0)


def test_the_networks_colours_are_no_option_beside_it() -> None:
    with pytest.raises(
        ValueError, match="options: expected settings that have no argument of their own, got in_channels"
    ):
        KLTokenizer(4, [8], 1, space_to_depth=2, options={"in_channels": 3})
