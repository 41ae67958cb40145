"""Position ids, the added 2-D embedding, rotary turns and how they are stretched."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, Qwen2VLTextConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.qwen2_vl import modeling_qwen2_vl as qwen2_vl

from unimodal.backbone import SCHEMES, PositionScheme, RopeScaling
from unimodal.backbone.positions import Rotary, cells, rotate, sincos, sincos_2d
from unimodal.documents import Document
from unimodal.model import UnifiedModel
from unimodal.packing import pack, place_block
from unimodal_generators.base import Block, TokenKind
from unimodal_tokenizers.base import Grid


@pytest.mark.parametrize("name", sorted(SCHEMES))
def test_schemes_keep_the_interface(name: str) -> None:
    assert isinstance(SCHEMES[name], PositionScheme)


@pytest.mark.parametrize("name", sorted(SCHEMES))
def test_text_counts_on(name: str) -> None:
    placed = SCHEMES[name].text(7, 4)
    assert np.asarray(placed.ids).tolist() == [[i] * SCHEMES[name].axes for i in (7, 8, 9, 10)]
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


@pytest.mark.parametrize(("grid", "following"), [(Grid(2, 3), 8), (Grid(3, 2), 8), (Grid(1, 1), 6)])
def test_mrope_and_rope2d_give_rows_and_columns(grid: Grid, following: int) -> None:
    """Text goes on behind the largest id: no later token shares one with the image."""
    cells = [(row, column) for row in range(grid.h) for column in range(grid.w)]
    three, two = SCHEMES["mrope"].image(5, grid), SCHEMES["rope2d"].image(5, grid)
    assert three.ids.tolist() == [[5, 5 + row, 5 + column] for row, column in cells]
    assert two.ids.tolist() == [[5 + row, 5 + column] for row, column in cells]
    assert three.following == two.following == following == max(i for cell in two.ids for i in cell) + 1
    assert SCHEMES["mrope"].additive(grid, 16) is None
    assert SCHEMES["rope2d"].additive(grid, 16) is None


def test_cells_of_coarser_scales_lie_where_their_middles_are() -> None:
    grid = Grid(4, 6, ((1, 1), (2, 3), (3, 4), (4, 6)))
    middles = []
    for rows, columns in grid.scales:
        for r, c in itertools.product(range(rows), range(columns)):
            middles.append([int((r + 0.5) / rows * 4), int((c + 0.5) / columns * 6)])
    assert cells(grid).tolist() == middles
    assert cells(grid)[0].tolist() == [2, 3]
    assert cells(grid)[-24:].tolist() == cells(Grid(4, 6)).tolist() == [[r, c] for r in range(4) for c in range(6)]
    for scale in np.split(cells(grid), np.cumsum(grid.lengths)[:-1]):
        assert len({tuple(cell) for cell in scale}) == len(scale)  # no two of one scale share a place


@pytest.mark.parametrize("name", sorted(SCHEMES))
def test_every_scheme_places_every_scale(name: str) -> None:
    """A scale as fine as the image is placed as the image; what follows it is behind all of them."""
    scheme, grid, plain = SCHEMES[name], Grid(2, 3, ((1, 1), (1, 2), (2, 3))), Grid(2, 3)
    placed, alone = scheme.image(5, grid), scheme.image(5, plain)
    assert len(placed.ids) == grid.length == 9
    assert placed.following == placed.ids.max() + 1
    added, own = scheme.additive(grid, 16), scheme.additive(plain, 16)
    if name == "sequential":
        assert placed.ids[:, 0].tolist() == list(range(5, 14))
    else:
        assert placed.ids[3:].tolist() == alone.ids.tolist()
        assert placed.following == alone.following
    if added is not None and own is not None:
        assert torch.equal(added[3:], own)
        assert torch.equal(added[0], own[4])  # the middle of 2 x 3 lies in row 1, column 1
    block = Block(grid, TokenKind.LEARNED, bidirectional=True, private=False)
    pieces = [place_block(scheme, 9, block.piece(offset, count)) for offset, count in ((0, 1), (1, 2), (3, 6))]
    assert np.concatenate([p.ids for p in pieces]).tolist() == place_block(scheme, 9, block).ids.tolist()


def test_mrope_numbers_a_document_as_qwen2_vl_does() -> None:
    """Text, an image, text: their rule, written down by them for a merge of 1."""
    scheme, grid = SCHEMES["mrope"], Grid(3, 4)
    first = scheme.text(0, 5)
    image = scheme.image(first.following, grid)
    last = scheme.text(image.following, 2)
    ours = np.concatenate([first.ids, image.ids, last.ids])
    kinds = torch.tensor([[0] * 5 + [1] * 12 + [0] * 2])
    vision = type("Vision", (), {"spatial_merge_size": 1})
    model = type("Model", (), {"config": type("Config", (), {"vision_config": vision})})
    model.get_vision_position_ids = qwen2_vl.Qwen2VLModel.get_vision_position_ids
    theirs, _ = qwen2_vl.Qwen2VLModel.get_rope_index(model(), torch.zeros_like(kinds), kinds, torch.tensor([[1, 3, 4]]))
    assert ours.tolist() == theirs[:, 0].T.tolist()


@pytest.mark.parametrize("name", sorted(SCHEMES))
def test_pieces_of_an_image_are_numbered_as_the_whole(name: str) -> None:
    block = Block(Grid(3, 4), TokenKind.LEARNED, bidirectional=False, private=False)
    whole = place_block(SCHEMES[name], 9, block)
    pieces = [place_block(SCHEMES[name], 9, block.piece(i, 4)) for i in (0, 4, 8)]
    assert np.concatenate([p.ids for p in pieces]).tolist() == whole.ids.tolist()
    assert {p.following for p in pieces} == {whole.following}


@pytest.mark.parametrize("name", sorted(SCHEMES))
def test_a_prefix_is_numbered_as_text_before_its_image(name: str) -> None:
    scheme, block = SCHEMES[name], Block(Grid(2, 3), TokenKind.LEARNED, bidirectional=True, private=True, prefix=1)
    placed = place_block(scheme, 9, block)
    assert placed.ids[0].tolist() == [9] * scheme.axes
    assert placed.ids[1:].tolist() == scheme.image(10, Grid(2, 3)).ids.tolist()
    assert placed.following == scheme.image(10, Grid(2, 3)).following
    assert len(placed.ids) == block.length == 7


@pytest.mark.parametrize("time", ["add", "token"])
@pytest.mark.parametrize("name", sorted(SCHEMES))
def test_a_learned_copy_and_its_clean_copy_share_ids(
    make: Callable[..., UnifiedModel], mixed: list[Document], name: str, time: str
) -> None:
    model = make("flow", time=time, backbone={"positions": name})
    segments = model.sequencer.document(mixed[2], (0, 0, 0)).segments
    pairs = [(a, b) for a, b in itertools.pairwise(segments) if a.kind == TokenKind.LEARNED]
    assert len(pairs) == 2
    for learned, clean in pairs:
        assert clean.kind == TokenKind.CLEAN
        assert learned.positions.tolist() == clean.positions.tolist()
    ids = [segment.positions for segment in segments if segment.kind != TokenKind.LEARNED]
    assert all(a.max() < b.min() for a, b in itertools.pairwise(ids))  # parts follow one another on every axis


@pytest.mark.parametrize("name", ["mrope", "rope2d", "block"])
def test_text_alone_is_as_sequential_to_the_last_bit(
    make: Callable[..., UnifiedModel], mixed: list[Document], name: str
) -> None:
    models = [make("flow", backbone={"positions": n}) for n in ("sequential", name)]
    models[1].load_state_dict(models[0].state_dict())
    with torch.no_grad():
        losses = [
            m(pack([m.sequencer.document(mixed[3], (0, 0, 0))], m.backbone.config.experts, "own"))["text"].sum
            for m in models
        ]
    assert torch.equal(losses[0], losses[1])


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


def turn(x: torch.Tensor, positions: torch.Tensor, theta: float = 10_000.0, name: str = "sequential") -> torch.Tensor:
    return rotate(x, *Rotary(SCHEMES[name], x.shape[-1], theta)(positions))


def turned(x: torch.Tensor, *position: int, name: str = "sequential") -> torch.Tensor:
    return turn(x[None, None], torch.tensor([position]), name=name)[0, 0]


@given(
    m=st.integers(0, 4000), n=st.integers(0, 4000), by=st.integers(0, 4000), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=50, deadline=None, derandomize=True)
def test_scores_depend_on_the_difference_of_ids_only(m: int, n: int, by: int, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(16, generator=rng, dtype=torch.float64) for _ in range(2))
    here, there = turned(q, m) @ turned(k, n), turned(q, m + by) @ turned(k, n + by)
    assert float(here) == pytest.approx(float(there), abs=1e-5)


@pytest.mark.parametrize("name", ["mrope", "rope2d"])
def test_scores_depend_on_the_difference_of_every_axis(name: str) -> None:
    rng, axes = np.random.default_rng(0), SCHEMES[name].axes
    q, k = torch.randn(2, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for _ in range(20):
        m, n, by = rng.integers(0, 1000, (3, axes))
        here, there = (
            float(turned(q, *a.tolist(), name=name) @ turned(k, *b.tolist(), name=name))
            for a, b in ((m, n), (m + by, n + by))
        )
        assert here == pytest.approx(there, abs=1e-5)
    still = turned(q, *[0] * axes, name=name) @ k
    for axis in range(axes):  # and each axis matters
        moved = turned(q, *[3 * (i == axis) for i in range(axes)], name=name) @ k
        assert abs(float(moved - still)) > 1e-3


def test_scores_do_depend_on_the_difference() -> None:
    q = torch.randn(16, generator=torch.Generator().manual_seed(0))
    scores = torch.stack([turned(q, 5) @ turned(q, n) for n in range(9)])
    assert scores.argmax() == 5
    assert (scores - scores[5]).abs().sort().values[1] > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_turn_keeps_lengths_and_types(dtype: torch.dtype) -> None:
    x = torch.randn(6, 3, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    out = turn(x, torch.arange(0, 6000, 1000)[:, None])
    assert out.dtype == dtype
    torch.testing.assert_close(
        out.float().norm(dim=-1), x.float().norm(dim=-1), rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=0
    )
    torch.testing.assert_close(out[0], x[0])  # id 0 turns nothing
    assert not torch.allclose(out[1].float(), x[1].float(), atol=0.1)


def test_the_two_halves_of_a_head_turn_against_each_other() -> None:
    x = torch.zeros(1, 1, 4)
    x[..., 0] = 1.0
    out = turn(x, torch.tensor([[3]]), 100.0)[0, 0]
    torch.testing.assert_close(out, torch.tensor([np.cos(3.0), 0.0, np.sin(3.0), 0.0]).float())
    y = torch.zeros(1, 1, 4)
    y[..., 3] = 1.0  # second frequency: theta^(-1/2) = 0.1
    out = turn(y, torch.tensor([[3]]), 100.0)[0, 0]
    torch.testing.assert_close(out, torch.tensor([0.0, -np.sin(0.3), 0.0, np.cos(0.3)]).float())


@pytest.mark.parametrize("name", ["mrope", "rope2d"])
def test_equal_ids_on_every_axis_are_the_ordinary_rotary(name: str) -> None:
    ids = torch.tensor([[0], [3], [5000]])
    many = Rotary(SCHEMES[name], 16, 1e4)(ids.expand(-1, SCHEMES[name].axes))
    for a, b in zip(many, Rotary(SCHEMES["sequential"], 16, 1e4)(ids), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("head", "section"), [(16, [2, 3, 3]), (128, [16, 24, 24])])
def test_mrope_turns_as_qwen2_vl_does(head: int, section: list[int]) -> None:
    config = Qwen2VLTextConfig(
        hidden_size=4 * head, num_attention_heads=4, num_key_value_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": section},
    )  # fmt: skip
    scheme = SCHEMES["mrope"]
    assert np.bincount(scheme.axis(head // 2)).tolist() == section
    ids = np.concatenate([scheme.text(0, 3).ids, scheme.image(3, Grid(4, 5)).ids, scheme.text(8, 2).ids])
    positions = torch.from_numpy(ids)
    q, k = (torch.randn(len(ids), heads, head, generator=torch.Generator().manual_seed(heads)) for heads in (4, 2))
    cos, sin = qwen2_vl.Qwen2VLRotaryEmbedding(config)(q, positions.T[:, None])  # (1, n, E) each
    expected = qwen2_vl.apply_rotary_pos_emb(q, k, cos[0], sin[0], unsqueeze_dim=1)
    for x, y in zip((q, k), expected, strict=True):
        torch.testing.assert_close(turn(x, positions, 1e6, "mrope"), y, atol=1e-5, rtol=1e-5)


def test_rope2d_turns_every_other_frequency_by_the_row_and_by_the_column() -> None:
    cos, sin = Rotary(SCHEMES["rope2d"], 8, 100.0)(torch.tensor([[7, 2]]))
    angles = torch.tensor([ids * 100.0 ** (-i / 4) for i, ids in enumerate((7, 2, 7, 2))])
    torch.testing.assert_close(cos[0, 0], angles.cos())
    torch.testing.assert_close(sin[0, 0], angles.sin())


STRETCHES: list[dict[str, Any]] = [
    {"kind": "linear", "factor": 4.0},
    {"kind": "llama3", "factor": 8.0, "original_length": 64},
    {"kind": "llama3", "factor": 32.0, "original_length": 8192, "low_freq_factor": 2.0, "high_freq_factor": 9.0},
    {"kind": "yarn", "factor": 4.0, "original_length": 64},
    {"kind": "yarn", "factor": 40.0, "original_length": 4096, "beta_fast": 16.0, "beta_slow": 2.0},
    {"kind": "yarn", "factor": 2.0, "original_length": 2048, "attention_factor": 1.5},
    {"kind": "yarn", "factor": 1.0, "original_length": 2048},
]


@pytest.mark.parametrize("settings", STRETCHES, ids=str)
@pytest.mark.parametrize("theta", [1e4, 5e5])
@pytest.mark.parametrize("head", [16, 64])
def test_stretched_frequencies_are_those_of_transformers(settings: dict[str, Any], theta: float, head: int) -> None:
    names = {"kind": "rope_type", "original_length": "original_max_position_embeddings"}
    config = LlamaConfig(
        hidden_size=4 * head, num_attention_heads=4, head_dim=head, max_position_embeddings=131072,
        rope_parameters={
            "rope_theta": theta, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            **{names.get(name, name): value for name, value in settings.items()},
        },
    )  # fmt: skip
    frequency, scale = ROPE_INIT_FUNCTIONS[settings["kind"]](config, torch.device("cpu"))
    rotary = Rotary(SCHEMES["sequential"], head, theta, RopeScaling(**settings))
    torch.testing.assert_close(torch.from_numpy(rotary.frequency).float(), frequency, rtol=1e-5, atol=0)
    assert rotary.scale == pytest.approx(scale)
    cos, sin = rotary(torch.tensor([[11]]))
    torch.testing.assert_close(cos[0, 0], (11 * frequency).cos() * scale, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sin[0, 0], (11 * frequency).sin() * scale, rtol=1e-4, atol=1e-5)


def test_nothing_stretched_is_nothing_changed() -> None:
    plain, same = (Rotary(SCHEMES["sequential"], 16, 1e4, s) for s in (None, RopeScaling("linear", 1.0)))
    assert plain.frequency.tolist() == same.frequency.tolist()
    assert plain.scale == same.scale == 1.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "linear", "factor": 0.5}, "rope_scaling.factor: expected at least 1, got 0.5"),
        ({"kind": "yarn", "factor": 2.0}, "rope_scaling.original_length: yarn needs .* got none"),
        ({"kind": "llama3", "factor": 2.0}, "rope_scaling.original_length: llama3 needs"),
    ],
)
def test_stretches_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RopeScaling(**settings)
