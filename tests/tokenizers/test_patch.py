"""Patches: exactly invertible, in the documented order."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unimodal_tokenizers import Grid, ImageTokens, PatchTokenizer

sizes = st.integers(1, 4)


@settings(max_examples=30, deadline=None)
@given(batch=sizes, h=sizes, w=sizes, patch=sizes, seed=st.integers(0, 2**32 - 1))
def test_decode_gives_the_same_pixels_back(batch: int, h: int, w: int, patch: int, seed: int) -> None:
    images = torch.randn(batch, 3, h * patch, w * patch, generator=torch.Generator().manual_seed(seed))
    tokenizer = PatchTokenizer(patch)
    tokens = tokenizer.encode(images)
    assert tokens.grids == (Grid(h, w),) * batch
    assert tokens.values.shape == (batch * h * w, tokenizer.layout.dim)
    assert torch.equal(tokenizer.decode(tokens), images)


def test_vector_order_is_row_column_channel_and_the_grid_is_row_major() -> None:
    c, y, x = torch.meshgrid(torch.arange(3.0), torch.arange(4.0), torch.arange(6.0), indexing="ij")
    image = 100 * c + 10 * y + x  # the value names channel, row and column
    tokens = PatchTokenizer(2).encode(image[None]).values
    assert tokens[1].tolist() == [2, 102, 202, 3, 103, 203, 12, 112, 212, 13, 113, 213]  # one to the right
    assert tokens[3, 0] == 20  # the second row of patches follows the first of three


def test_it_has_no_weights_and_tokens_are_their_own_vectors() -> None:
    tokenizer = PatchTokenizer(2)
    assert not tokenizer.state_dict()
    tokens = torch.randn(5, 12)
    assert tokenizer.lookup(tokens) is tokens


def test_one_colour_keeps_grey_images_and_averages_others() -> None:
    tokenizer = PatchTokenizer(2, colours=1)
    grey = torch.rand(2, 1, 4, 6).expand(-1, 3, -1, -1)
    assert tokenizer.encode(grey).values.shape == (2 * 6, 4)
    torch.testing.assert_close(tokenizer.decode(tokenizer.encode(grey)), grey)
    colour = torch.rand(1, 3, 4, 6)
    expected = colour.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    torch.testing.assert_close(tokenizer.decode(tokenizer.encode(colour)), expected)


@pytest.mark.parametrize("patch", [0, -1])
def test_a_side_below_one_pixel_is_refused(patch: int) -> None:
    with pytest.raises(ValueError, match=f"patch: expected .* got {patch}"):
        PatchTokenizer(patch)


def test_sizes_that_do_not_fit_are_refused() -> None:
    tokenizer = PatchTokenizer(2)
    with pytest.raises(ValueError, match="stride 2, got 5x4"):
        tokenizer.encode_batch(torch.zeros(1, 3, 5, 4))
    with pytest.raises(ValueError, match=r"tokens: expected .*\(4, 12\).* got \(4, 11\)"):
        tokenizer.decode(ImageTokens(torch.zeros(4, 11), (Grid(2, 2),)))
    with pytest.raises(ValueError, match=r"tokens: expected vectors \(T, 12\), got shape \(4, 3\)"):
        tokenizer.lookup(torch.zeros(4, 3))
