"""Sizes of images: buckets of one area, native sizes under a cap."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from data_formats import picture
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from unimodal.documents import Document, Part
from unimodal.image_sizes import NativeSizes, buckets
from unimodal.images import fit_image
from unimodal.model import UnifiedModel
from unimodal.packing import to_tensor


@given(st.integers(1, 64), st.integers(1, 16), st.integers(1, 3000), st.integers(1, 3000))
def test_native_sizes_are_multiples_under_the_cap(tokens: int, stride: int, height: int, width: int) -> None:
    h, w = NativeSizes(tokens, stride).size(height, width)
    assert h % stride == w % stride == 0
    assert 1 <= (h // stride) * (w // stride) <= tokens
    if height % stride == width % stride == 0 and height * width <= tokens * stride**2:
        assert (h, w) == (height, width)  # what fits stays as it is


def test_a_shape_is_kept_when_an_image_is_scaled_down() -> None:
    h, w = NativeSizes(1024, 16).size(3000, 1500)
    assert h / w == pytest.approx(2, rel=0.05)
    assert (h // 16) * (w // 16) > 950


@given(st.integers(1, 16), st.integers(1, 16), st.floats(1, 4))
def test_buckets_have_one_area_and_every_shape(cells: int, stride: int, ratio: float) -> None:
    sizes = buckets(cells * stride, stride, ratio)
    assert sizes[0] == (cells * stride, cells * stride)
    assert len(set(sizes)) == len(sizes)
    assert {(w, h) for h, w in sizes} == set(sizes)
    for h, w in sizes:
        assert h % stride == w % stride == 0
        assert h * w <= (cells * stride) ** 2
        assert max(h, w) <= ratio * min(h, w)


def test_an_image_goes_to_the_bucket_of_its_shape_and_is_cropped_at_the_centre() -> None:
    sizes = buckets(256, 32)
    assert fit_image(picture(0, 300, 500), sizes).shape[:2] == (192, 320)
    assert fit_image(picture(0, 500, 300), sizes).shape[:2] == (320, 192)
    assert fit_image(picture(0, 900, 900), sizes).shape[:2] == (256, 256)


def test_a_recipe_with_native_sizes_packs_images_as_they_are(make: Callable[..., UnifiedModel]) -> None:
    model = make("flow", native=NativeSizes(tokens=6, stride=4))
    document = Document(
        (Part(picture(0, 8, 12), learn=False), Part("a"), Part(picture(1, 80, 40)), Part(picture(2, 5, 5)))
    )
    sequenced = model.sequencer.document(document, (0, 0, 0))
    assert [image.shape[:2] for image in sequenced.images] == [(8, 12), (12, 8), (4, 4)]


@pytest.mark.parametrize(("side", "stride", "ratio"), [(10, 4, 2.0), (2, 4, 2.0), (8, 0, 2.0), (8, 4, 0.5)])
def test_bad_sizes_are_named(side: int, stride: int, ratio: float) -> None:
    with pytest.raises(ValueError, match=r"^(side|ratio): expected"):
        buckets(side, stride, ratio)
    with pytest.raises(ValueError, match=r"sequence\.native\.tokens: expected at least 1"):
        NativeSizes(0, 4)


def test_a_spacer_is_cropped_before_it_is_scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    """No image is ever made that is larger than what was given or asked for."""
    made: list[int] = []
    resize = Image.Image.resize

    def watched(self: Image.Image, size: tuple[int, int], *args: object, **kwargs: object) -> Image.Image:
        made.append(size[0] * size[1])
        return resize(self, size, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Image.Image, "resize", watched)
    assert fit_image(picture(0, 2, 4000), [(128, 128)]).shape == (128, 128, 3)
    assert made == [128 * 128]


@pytest.mark.parametrize("shape", [(40, 60), (61, 33), (16, 16), (200, 17)])
def test_scaling_the_crop_is_cropping_the_scaled(shape: tuple[int, int]) -> None:
    """Up to a rounding of the crop's edges to whole pixels."""
    image = picture(0, *shape).resize((shape[1] * 4, shape[0] * 4), Image.Resampling.BICUBIC)  # smooth
    scale = max(16 / image.height, 16 / image.width)
    w, h = round(image.width * scale), round(image.height * scale)
    left, top = (w - 16) // 2, (h - 16) // 2
    slow = image.resize((w, h), Image.Resampling.LANCZOS).crop((left, top, left + 16, top + 16))
    difference = np.abs(fit_image(image, [(16, 16)]).astype(float) - np.asarray(slow))
    assert difference.mean() < 14


def test_an_image_of_the_right_size_is_left_alone() -> None:
    image = picture(1, 8, 8)
    assert np.array_equal(fit_image(image, [(4, 8), (8, 8)]), np.asarray(image))


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((8, 8), (8, 8)), ((500, 400), (8, 8)), ((30, 60), (4, 8)), ((10, 100), (4, 8)), ((60, 30), (8, 4)), ((1, 1), (8, 8)),
     ((71, 100), (8, 8)), ((70, 100), (4, 8)), ((1, 300), (4, 8)), ((300, 1), (8, 4))],
)  # fmt: skip
def test_the_nearest_shape_is_chosen(shape: tuple[int, int], expected: tuple[int, int]) -> None:
    pixels = fit_image(Image.new("RGB", shape[::-1]), [(4, 8), (8, 8), (8, 4)])
    assert pixels.shape == (*expected, 3)
    assert pixels.dtype == np.uint8


def test_of_equal_shapes_the_larger_is_chosen() -> None:
    assert fit_image(Image.new("RGB", (20, 20)), [(4, 4), (16, 16), (8, 8)]).shape == (16, 16, 3)


def test_what_does_not_fit_is_cut_from_both_sides() -> None:
    """Three stripes, the outer ones cut off: nothing is squeezed."""
    stripes = np.zeros((32, 96, 3), np.uint8)
    stripes[:, :32], stripes[:, 32:64], stripes[:, 64:] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    pixels = fit_image(Image.fromarray(stripes), [(32, 32)])
    assert (pixels == (0, 255, 0)).all()
    upright = fit_image(Image.fromarray(stripes.transpose(1, 0, 2).copy()), [(32, 32)])
    assert (upright == (0, 255, 0)).all()


def test_a_smaller_image_is_scaled_up() -> None:
    pixels = fit_image(Image.new("RGB", (2, 2), (10, 20, 30)), [(8, 8)])
    assert (pixels == (10, 20, 30)).all()


@pytest.mark.parametrize("size", [(8, 8), (16, 16)])
def test_other_modes_become_rgb(size: tuple[int, int]) -> None:
    """Transparency lies on white, 16 bits are scaled and not clipped."""
    clear = fit_image(Image.new("RGBA", size, (255, 0, 0, 0)), [(8, 8)])
    assert (clear == 255).all()
    deep = fit_image(Image.fromarray(np.full(size, 0x8080, np.uint16)), [(8, 8)])
    assert (deep == 128).all()
    for mode, colour in (("L", 7), ("1", 1), ("P", 0), ("LA", (7, 255)), ("CMYK", (0, 0, 0, 0))):
        assert fit_image(Image.new(mode, size, colour), [(8, 8)]).shape == (8, 8, 3)


def test_pixels_become_tensors() -> None:
    tensor = to_tensor([np.array([[[0, 255, 128]]], np.uint8)])
    torch.testing.assert_close(tensor, torch.tensor([-1.0, 1.0, 128 / 127.5 - 1]).view(1, 3, 1, 1))
