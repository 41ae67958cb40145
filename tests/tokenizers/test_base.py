"""The interface: grids, records of tokens, images of several sizes."""

import inspect
import math
import re
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unimodal_tokenizers import Grid, ImageTokens, PatchTokenizer, TokenLayout, bits_per_token

sides = st.integers(1, 3)
scales = st.lists(st.tuples(sides, sides), max_size=3).map(tuple)
grids = st.lists(st.builds(Grid, sides, sides, scales), min_size=1, max_size=5)


def numbered(items: list[Grid]) -> ImageTokens:
    return ImageTokens(torch.arange(sum(g.length for g in items)), tuple(items))


@settings(max_examples=30, deadline=None)
@given(items=grids)
def test_cat_undoes_split(items: list[Grid]) -> None:
    tokens = numbered(items)
    parts = tokens.split()
    assert [len(p.values) for p in parts] == tokens.lengths
    again = ImageTokens.cat(parts)
    assert again.grids == tokens.grids
    assert torch.equal(again.values, tokens.values)


@settings(max_examples=30, deadline=None)
@given(items=grids, data=st.data())
def test_select_takes_images_in_the_order_asked(items: list[Grid], data: st.DataObject) -> None:
    tokens = numbered(items)
    indices = data.draw(st.lists(st.integers(0, len(items) - 1), max_size=6))
    chosen, parts = tokens.select(indices), tokens.split()
    assert chosen.grids == tuple(items[i] for i in indices)
    assert chosen.values.tolist() == [v for i in indices for v in parts[i].values.tolist()]


def test_a_record_with_the_wrong_number_of_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match=r"tokens: expected 6 .* got 5"):
        ImageTokens(torch.zeros(5), (Grid(2, 2), Grid(1, 2)))


def test_grid_counts_strides_and_refuses_other_sizes() -> None:
    layout = TokenLayout("continuous", dim=3, stride=4)
    assert layout.grid(8, 12) == Grid(2, 3)
    for size in [(8, 13), (7, 12), (0, 4), (-4, 4)]:
        with pytest.raises(ValueError, match=f"stride 4, got {size[0]}x{size[1]}"):
            layout.grid(*size)


def test_a_layout_knows_the_size_of_its_grids() -> None:
    rows = TokenLayout("sequence", dim=3, stride=2, codebooks=(8,), length=5, image=(8, 12))
    for layout in (TokenLayout("discrete", 3, 4, (8,)), rows):
        assert layout.size(layout.grid(8, 12)) == (8, 12)
    assert rows.grid(8, 12) == Grid(1, 5)
    with pytest.raises(ValueError, match=r"image size: expected 8x12, .* got 12x8 pixels"):
        rows.grid(12, 8)
    for wrong in ({"length": 5}, {"image": (8, 8)}, {"kind": "sequence"}, {"kind": "sequence", "length": 5}):
        with pytest.raises(ValueError, match="layout: expected length and image of a sequence"):
            TokenLayout(**{"kind": "discrete", "dim": 3, "stride": 4, **wrong})


def test_a_prefix_holds_the_first_tokens_of_every_image() -> None:
    tokens = numbered([Grid(1, 5), Grid(1, 3)])
    assert tokens.prefix(2).values.tolist() == [0, 1, 5, 6]
    assert tokens.prefix(2).grids == (Grid(1, 2),) * 2
    for wrong, count in ((tokens, 4), (tokens, 0), (numbered([Grid(2, 2)]), 1)):
        with pytest.raises(ValueError, match="count: expected from 1 to as many tokens as each sequence has"):
            wrong.prefix(count)


def test_images_of_several_sizes_keep_their_order() -> None:
    rng = torch.Generator().manual_seed(0)
    images = [torch.randn(3, *size, generator=rng) for size in [(4, 4), (2, 6), (4, 4), (6, 2)]]
    tokenizer = PatchTokenizer(2)
    tokens = tokenizer.encode_each(images)
    alone = ImageTokens.cat([tokenizer.encode(image[None]) for image in images])
    assert tokens.grids == alone.grids == (Grid(2, 2), Grid(1, 3), Grid(2, 2), Grid(3, 1))
    assert torch.equal(tokens.values, alone.values)
    for image, again in zip(images, tokenizer.decode_each(tokens), strict=True):
        assert torch.equal(image, again)
    with pytest.raises(ValueError, match="decode expects images of one grid"):
        tokenizer.decode(tokens)


@pytest.mark.parametrize(
    "images", [torch.zeros(1, 1, 4, 4), torch.zeros(3, 4, 4), torch.zeros(1, 3, 4, 4, dtype=torch.uint8)], ids=str
)
def test_what_is_no_batch_of_colour_images_is_refused(images: torch.Tensor) -> None:
    said = re.escape(
        f"images: expected colours (B, 3, H, W) in [-1, 1], got shape {tuple(images.shape)} of {images.dtype}"
    )
    encode = inspect.unwrap(PatchTokenizer.encode)  # without the checks of shapes, which only tests have
    with pytest.raises(ValueError, match=said):
        encode(PatchTokenizer(patch=2), images)


def test_bits_of_a_token() -> None:
    assert bits_per_token(TokenLayout("discrete", dim=4, stride=2, codebooks=(128, 2))) == 8
    assert bits_per_token(TokenLayout("continuous", dim=4, stride=2)) == math.inf


def test_importing_the_package_does_not_import_diffusers() -> None:
    code = "import sys, unimodal_tokenizers; print('diffusers' in sys.modules, 'lightning' in sys.modules)"
    path = {"PYTHONPATH": ":".join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=path)
    assert done.stdout.split() == ["False", "False"]
