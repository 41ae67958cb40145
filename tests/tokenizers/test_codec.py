"""JPEG bytes as tokens: the file's own, all of them, and whatever a model draws decodes."""

import io
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_sample_image

from unimodal_tokenizers import CodecTokenizer, Grid
from unimodal_tokenizers.codec import END


def photograph(side: int = 40) -> Image.Image:
    return Image.fromarray(load_sample_image("china.jpg")).resize((side, side))


def tensor(*images: Image.Image) -> torch.Tensor:
    return torch.stack([torch.from_numpy(np.array(i)).permute(2, 0, 1).float() / 127.5 - 1 for i in images])


@pytest.mark.parametrize("colours", [1, 3])
@pytest.mark.parametrize("quality", [10, 25, 90])
def test_tokens_decode_to_what_pillow_makes_of_the_file(colours: Any, quality: int) -> None:
    picture = photograph()
    file = io.BytesIO()
    picture.convert("L" if colours == 1 else "RGB").save(file, "JPEG", quality=quality, subsampling="4:2:0")
    tokenizer = CodecTokenizer((40, 40), length=2000, quality=quality, colours=colours)
    tokens = tokenizer.encode(tensor(picture))
    assert tokens.grids == (Grid(1, 2000),)
    scan = tokens.values[tokens.values != END]
    assert file.getvalue() == tokenizer.header + bytes(scan.tolist()).replace(b"\xff", b"\xff\x00") + b"\xff\xd9"
    assert 255 in scan or (quality, colours) != (90, 3)  # the case that stuffing is about
    assert torch.equal(tokenizer.decode(tokens), tensor(Image.open(file).convert("RGB")))


def test_a_prefix_draws_the_upper_part() -> None:
    tokenizer = CodecTokenizer((40, 40), length=2000, quality=50, colours=1)
    tokens = tokenizer.encode(tensor(photograph()))
    whole, used = tokenizer.decode(tokens), int((tokens.values != END).sum())
    errors = [float((tokenizer.decode(tokens.prefix(n)) - whole).abs().mean()) for n in (1, used // 2, used)]
    assert errors[0] > errors[1] > errors[2] == 0
    half = tokenizer.decode(tokens.prefix(used // 2))
    assert torch.equal(half[..., :8, :], whole[..., :8, :])


@settings(max_examples=30, deadline=None)
@given(ids=st.lists(st.integers(0, END), min_size=1, max_size=300))
def test_whatever_is_drawn_decodes(ids: list[int]) -> None:
    tokenizer = CodecTokenizer((16, 24), length=300)
    image = tokenizer.decode_batch(torch.tensor([ids]), Grid(1, len(ids)))
    assert image.shape == (1, 3, 16, 24)
    assert image.abs().max() <= 1
    kept = ids[: ids.index(END)] if END in ids else ids
    if not kept:
        assert len(image.unique()) == 1  # grey
    if kept:  # what stands behind the end is not looked at
        assert torch.equal(tokenizer.decode_batch(torch.tensor([kept]), Grid(1, len(kept))), image)


def test_codes_of_ids_are_their_bits() -> None:
    tokenizer = CodecTokenizer((8, 8), length=8)
    codes = tokenizer.lookup(torch.arange(END + 1))
    powers = 2 ** torch.arange(8, -1, -1)
    assert torch.equal(((codes + 1) / 2 * powers).sum(1).long(), torch.arange(END + 1))
    assert tokenizer.layout.dim == codes.shape[1]


@pytest.mark.parametrize(("settings", "message"), [
    ({"image": (0, 8)}, r"image: expected .* got \[0, 8\]"),
    ({"length": 0}, "length: expected at least 1, got 0"),
    ({"colours": 2}, "colours: expected 1 or 3, got 2"),
    ({"quality": 96}, "quality: expected from 1 to 95, got 96"),
])  # fmt: skip
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CodecTokenizer(**{"image": (8, 8), "length": 8, **settings})


def test_bad_images_and_tokens_are_refused() -> None:
    tokenizer = CodecTokenizer((40, 40), length=100)
    with pytest.raises(ValueError, match=r"length: expected as many ids as a JPEG of quality 25 .* got 100"):
        tokenizer.encode(tensor(photograph()))
    with pytest.raises(ValueError, match=r"image size: expected 40x40, .* got 8x40"):
        tokenizer.encode(torch.zeros(1, 3, 8, 40))
    with pytest.raises(ValueError, match="tokens: expected ids from 0 to 256, got 0 to 257"):
        tokenizer.decode_batch(torch.tensor([[0, 257]]), Grid(1, 2))
    with pytest.raises(ValueError, match=r"n up to 100, got shape \(1, 101\)"):
        tokenizer.decode_batch(torch.zeros(1, 101, dtype=torch.long), Grid(1, 101))
    with pytest.raises(ValueError, match=r"integer ids, got torch\.float32"):
        tokenizer.lookup(torch.zeros(3))
