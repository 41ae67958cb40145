"""Position ids, the added 2-D embedding and rotary turns."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unimodal.backbone import SCHEMES, PositionScheme
from unimodal.backbone.positions import Rotary, sincos, sincos_2d
from unimodal_tokenizers.base import Grid


@pytest.mark.parametrize("name", sorted(SCHEMES))
def test_schemes_keep_the_interface(name: str) -> None:
    assert isinstance(SCHEMES[name], PositionScheme)


@pytest.mark.parametrize("name", sorted(SCHEMES))
def test_text_counts_on(name: str) -> None:
    placed = SCHEMES[name].text(7, 4)
    assert np.asarray(placed.ids).tolist() == [[7], [8], [9], [10]]
    assert placed.following == 11


def test_sequential_gives_every_image_token_an_id() -> None:
    placed = SCHEMES["sequential"].image(5, Grid(2, 3))
    assert np.asarray(placed.ids).tolist() == [[5], [6], [7], [8], [9], [10]]
    assert placed.following == 11
    assert SCHEMES["sequential"].additive(Grid(2, 3), 16) is None


def test_block_gives_an_image_one_id() -> None:
    placed = SCHEMES["block"].image(5, Grid(2, 3))
    assert np.asarray(placed.ids).tolist() == [[5]] * 6
    assert placed.following == 6
    added = SCHEMES["block"].additive(Grid(2, 3), 16)
    torch.testing.assert_close(added, sincos_2d(Grid(2, 3), 16))


def test_cells_of_an_image_are_told_apart() -> None:
    grid, width = Grid(7, 5), 32
    added = sincos_2d(grid, width)
    assert added.shape == (35, width)
    apart = torch.cdist(added, added) + 1e9 * torch.eye(35)
    assert apart.min() > 0.5


def test_half_of_the_channels_tell_the_row_half_the_column() -> None:
    added = sincos_2d(Grid(3, 4), 16).unflatten(0, (3, 4))
    assert torch.equal(added[:, :1, :8].expand(3, 4, 8), added[..., :8])
    assert torch.equal(added[:1, :, 8:].expand(3, 4, 8), added[..., 8:])
    torch.testing.assert_close(added[:, 0, :8], sincos(torch.arange(3.0), 8))
    torch.testing.assert_close(added[0, :, 8:], sincos(torch.arange(4.0), 8))


def test_a_cell_looks_the_same_in_every_grid() -> None:
    small, large = sincos_2d(Grid(2, 2), 16).unflatten(0, (2, 2)), sincos_2d(Grid(5, 6), 16).unflatten(0, (5, 6))
    torch.testing.assert_close(large[:2, :2], small)


def test_sincos_is_the_formula() -> None:
    expected = [[f(p / 10_000 ** (i / 4)) for f in (np.sin, np.cos) for i in range(4)] for p in (0.0, 1.5, 30.0)]
    torch.testing.assert_close(sincos(torch.tensor([0.0, 1.5, 30.0]), 8), torch.tensor(expected).float())


def test_a_width_that_cannot_be_quartered_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 4, got 18"):
        sincos_2d(Grid(2, 2), 18)


def turned(x: torch.Tensor, position: int) -> torch.Tensor:
    return Rotary(torch.full((1, 1), position), x.shape[-1], 10_000.0)(x[None, None])[0, 0]


@given(
    m=st.integers(0, 4000), n=st.integers(0, 4000), by=st.integers(0, 4000), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=50, deadline=None, derandomize=True)
def test_scores_depend_on_the_difference_of_ids_only(m: int, n: int, by: int, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(16, generator=rng, dtype=torch.float64) for _ in range(2))
    here, there = turned(q, m) @ turned(k, n), turned(q, m + by) @ turned(k, n + by)
    assert float(here) == pytest.approx(float(there), abs=1e-5)


def test_scores_do_depend_on_the_difference() -> None:
    q = torch.randn(16, generator=torch.Generator().manual_seed(0))
    scores = torch.stack([turned(q, 5) @ turned(q, n) for n in range(9)])
    assert scores.argmax() == 5
    assert (scores - scores[5]).abs().sort().values[1] > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_turn_keeps_lengths_and_types(dtype: torch.dtype) -> None:
    x = torch.randn(6, 3, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    out = Rotary(torch.arange(0, 6000, 1000)[:, None], 16, 10_000.0)(x)
    assert out.dtype == dtype
    torch.testing.assert_close(
        out.float().norm(dim=-1), x.float().norm(dim=-1), rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=0
    )
    torch.testing.assert_close(out[0], x[0])  # id 0 turns nothing
    assert not torch.allclose(out[1].float(), x[1].float(), atol=0.1)


def test_the_two_halves_of_a_head_turn_against_each_other() -> None:
    x = torch.zeros(1, 1, 4)
    x[..., 0] = 1.0
    out = Rotary(torch.tensor([[3]]), 4, 100.0)(x)[0, 0]
    torch.testing.assert_close(out, torch.tensor([np.cos(3.0), 0.0, np.sin(3.0), 0.0]).float())
    y = torch.zeros(1, 1, 4)
    y[..., 3] = 1.0  # second frequency: theta^(-1/2) = 0.1
    out = Rotary(torch.tensor([[3]]), 4, 100.0)(y)[0, 0]
    torch.testing.assert_close(out, torch.tensor([0.0, -np.sin(0.3), 0.0, np.cos(0.3)]).float())
