"""Sizes of images: buckets of one area, native sizes under a cap."""

from collections.abc import Callable

import numpy as np
import pytest
from data_formats import picture
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from unimodal.documents import Document, Part
from unimodal.image_sizes import NativeSizes, buckets
from unimodal.images import fit_image
from unimodal.model import UnifiedModel


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
