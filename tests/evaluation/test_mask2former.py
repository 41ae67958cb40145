"""What happens to pixels before the detector and to logits behind it, against slow versions; and the detector as a whole."""

import importlib.util
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from unimodal.evaluation import mask2former
from unimodal.evaluation.mask2former import (
    LABELS,
    Mask2FormerDetector,
    find,
    fitted_size,
    prepare,
    resize_8bit,
)
from unimodal.importers import mmdet

_spec = importlib.util.spec_from_file_location(
    "mmdet_reference", Path(__file__).parents[1] / "importers" / "mmdet_reference.py"
)
reference = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reference)


def picture(height, width, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def tensor(pixels):
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]


# --- before


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((512, 512), (800, 800)),
        ((1024, 1024), (800, 800)),
        ((800, 800), (800, 800)),
        ((480, 640), (800, 1067)),  # 640 * 800 / 480 = 1066.67
        ((640, 480), (1067, 800)),
        ((500, 1000), (667, 1333)),  # the long side is what stops it
        ((256, 257), (800, 803)),  # 803.1
    ],
)
def test_images_are_fitted_as_mmcv_does(size, expected):
    assert fitted_size(*size) == expected


def slow_resize(pixels, height, width):
    """OpenCV's INTER_LINEAR on 8 bits, one pixel and one integer at a time."""

    def taps(source, target, columns):
        for number in range(target):
            place = float(np.float32((number + 0.5) * (1.0 / (target / source)) - 0.5))
            first = math.floor(place)
            share = np.float32(place) - np.float32(first)
            if columns and first < 0:
                first, share = 0, np.float32(0)
            if columns and first >= source - 1:
                first, share = source - 1, np.float32(0)
            second = min(max(first + 1, 0), source - 1)
            first = min(max(first, 0), source - 1)
            weights = round(float((np.float32(1) - share) * 2048)), round(float(share * 2048))
            yield first, second, *weights

    out = np.zeros((height, width, 3), np.uint8)
    for y, (top, bottom, b0, b1) in enumerate(taps(pixels.shape[0], height, columns=False)):
        for x, (left, right, a0, a1) in enumerate(taps(pixels.shape[1], width, columns=True)):
            for c in range(3):
                above = int(pixels[top, left, c]) * a0 + int(pixels[top, right, c]) * a1
                below = int(pixels[bottom, left, c]) * a0 + int(pixels[bottom, right, c]) * a1
                out[y, x, c] = (((b0 * (above >> 4)) >> 16) + ((b1 * (below >> 4)) >> 16) + 2) >> 2
    return out


@pytest.mark.parametrize(
    ("size", "target"), [((16, 20), (25, 31)), ((40, 33), (13, 12)), ((9, 9), (9, 9)), ((24, 1), (36, 3))]
)
def test_resizing_is_opencvs_arithmetic_and_near_exact_bilinear(size, target):
    pixels = picture(*size)
    ours = resize_8bit(tensor(pixels), target)[0].permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(ours, slow_resize(pixels, *target))
    exact = functional.interpolate(
        tensor(pixels).double(), target, mode="bilinear", align_corners=False, antialias=False
    )
    # The residue of fixed point: 11 bits a weight and two truncations.
    assert (torch.from_numpy(ours).permute(2, 0, 1) - exact[0]).abs().max() < 1.1
    if size == target:
        np.testing.assert_array_equal(ours, pixels)


def test_half_size_is_the_mean_of_four_pixels():
    pixels = picture(8, 8)
    mean = (pixels.reshape(4, 2, 4, 2, 3).astype(int).sum((1, 3)) + 2) >> 2
    np.testing.assert_array_equal(resize_8bit(tensor(pixels), (4, 4))[0].permute(1, 2, 0), mean)


def test_the_network_sees_rgb_normalised_and_padded_with_grey_before_normalising():
    red = np.zeros((480, 640, 3), np.uint8)
    red[..., 0] = 255
    seen, filled = prepare(tensor(red))
    assert filled == (800, 1067)
    assert seen.shape == (1, 3, 800, 1088)
    expected = [(255 - 123.675) / 58.395, -116.28 / 57.12, -103.53 / 57.375]
    torch.testing.assert_close(seen[0, :, 0, 0], torch.tensor(expected))
    grey = [(128 - 123.675) / 58.395, (128 - 116.28) / 57.12, (128 - 103.53) / 57.375]
    torch.testing.assert_close(seen[0, :, 799, 1087], torch.tensor(grey))
    assert (seen[0, :, :, 1067:] == seen[0, :, :1, 1067:1068]).all()


# --- behind


def slow_find(classes, masks, padded, filled, original, least):
    """mmdetection's instances, all 100 of them, each mask made on its own."""
    classes, masks = classes.double(), masks.double()
    probabilities = []
    for query, logits in enumerate(classes.tolist()):
        total = sum(math.exp(value) for value in logits)
        probabilities += [(math.exp(value) / total, query, label) for label, value in enumerate(logits[:-1])]
    found = []
    for probability, query, label in sorted(probabilities, reverse=True)[:100]:
        whole = functional.interpolate(masks[None, query : query + 1], padded, mode="bilinear", align_corners=False)
        cut = whole[:, :, : filled[0], : filled[1]]
        own = functional.interpolate(cut, original, mode="bilinear", align_corners=False)[0, 0].numpy()
        mask = own > 0
        inside = [1 / (1 + math.exp(-value)) for value in own[mask].tolist()]
        score = probability * sum(inside) / (len(inside) + 1e-6)
        if score > least:
            rows, columns = np.where(mask)
            box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            found.append((label, score, box, mask))
    return sorted(found, key=lambda f: -f[1])


@pytest.mark.parametrize("least", [0.0, 0.05, 0.2, 0.95])
@pytest.mark.parametrize("original", [(20, 30), (7, 9)])
def test_objects_are_those_of_the_slow_version(least, original):
    draw = torch.Generator().manual_seed(1)
    classes = 3 * torch.randn(60, 6, generator=draw)
    masks = functional.interpolate(4 * torch.randn(1, 60, 2, 2, generator=draw) - 1, (8, 12), mode="bilinear")[0]
    masks[5] = -1  # an empty mask scores nothing and has no box
    classes[5, 0] = 20
    where = ((32, 48), (27, 41), original)
    ours = find(classes, masks, *where, least)
    theirs = slow_find(classes, masks, *where, least)
    order = sorted(range(len(ours.scores)), key=lambda i: -ours.scores[i])
    if least == 0.0:
        assert 60 < len(theirs) < 100
    if least == 0.95:
        assert len(theirs) < 4
    assert [ours.labels[i] for i in order] == [label for label, *_ in theirs]
    np.testing.assert_allclose([ours.scores[i] for i in order], [score for _, score, *_ in theirs], rtol=1e-5)
    for i, (_, _, box, mask) in zip(order, theirs, strict=True):
        assert ours.boxes[i] == tuple(map(float, box))
        np.testing.assert_array_equal(ours.masks[i], mask)


def test_a_score_at_the_bound_is_not_above_it():
    classes = torch.tensor([[0.0, -50.0]])  # probability 1 within float32
    masks = torch.full((1, 4, 4), 50.0)
    where = ((16, 16), (16, 16), (16, 16))
    score = find(classes, masks, *where).scores[0]
    assert len(find(classes, masks, *where, score).scores) == 0
    assert len(find(classes, masks, *where, math.nextafter(score, 0) - 1e-6).scores) == 1


# --- the detector


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    base = tmp_path_factory.mktemp("detector")
    torch.save({"state_dict": reference.checkpoint(reference.TINY), "meta": {}}, base / "some.pth")
    return mmdet.convert_checkpoint(base / "some.pth", base / "converted")


@pytest.fixture(scope="module")
def network(folder):
    return Mask2FormerDetector(folder, "cpu", batch=2)


@pytest.fixture
def detector(network, monkeypatch):
    """On images of 64 pixels instead of 800."""
    monkeypatch.setattr(mask2former, "LONG_SIDE", 96)
    monkeypatch.setattr(mask2former, "SHORT_SIDE", 64)
    return network


def views(detections):
    return [
        (d.label, d.box, pytest.approx(d.score, abs=1e-4)) for d in sorted(detections, key=lambda d: (d.label, d.box))
    ]


def test_images_together_are_what_they_are_alone(detector):
    sizes = [(40, 40), (40, 60), (40, 40), (40, 40), (40, 60)]
    pictures = [Image.fromarray(picture(*size, seed)) for seed, size in enumerate(sizes)]
    together = detector.detect(pictures, [0.01] * 5, [False] * 5)
    assert all(together)
    for image, detections in zip(pictures, together, strict=True):
        (alone,) = detector.detect([image], [0.01], [False])
        assert views(alone) == views(detections)


def test_masks_come_where_they_are_asked_for_and_fit_the_image(detector):
    image = Image.fromarray(picture(40, 60))
    with_masks, without = detector.detect([image, image], [0.01, 0.01], [True, False])
    assert views(with_masks) == views(without)
    assert all(d.mask is None for d in without)
    for detection in with_masks:
        assert detection.mask.shape == (40, 60)
        columns, rows = np.flatnonzero(detection.mask.any(0)), np.flatnonzero(detection.mask.any(1))
        assert detection.box == (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    assert {d.label for d in with_masks} <= set(LABELS)


def test_each_image_has_its_own_bound(detector):
    image = Image.fromarray(picture(40, 40))
    (every,) = detector.detect([image], [0.0], [False])
    scores = sorted(d.score for d in every)
    gap, lower = max((b - a, a) for a, b in itertools.pairwise(scores))
    bound = lower + gap / 2  # far from any score: together and alone differ by rounding
    low, high = detector.detect([image, image], [0.0, bound], [False, False])
    assert views(low) == views(every)
    assert views(high) == views([d for d in every if d.score > bound])


def test_red_and_blue_are_not_swapped(detector):
    pixels = picture(40, 40)
    pixels[..., 2] = 0
    right, _ = prepare(tensor(pixels))
    out = detector.network(pixel_values=right)
    where = ((right.shape[2], right.shape[3]), (64, 64), (40, 40))
    expected = find(out.class_queries_logits[0], out.masks_queries_logits[0], *where, 0.01)
    (ours,) = detector.detect([Image.fromarray(pixels)], [0.01], [False])
    (swapped,) = detector.detect([Image.fromarray(pixels[..., ::-1].copy())], [0.01], [False])
    assert sorted(d.score for d in ours) == pytest.approx(sorted(expected.scores), abs=1e-5)
    assert views(ours) != views(swapped)


def test_the_fingerprint_says_which_checkpoint_and_that_it_is_none_of_the_published(detector):
    spec = detector.spec()
    assert spec["source"] == "some.pth"
    assert len(spec["source_sha256"]) == 64
    assert spec["official"] is False
    assert mask2former.is_official({"source_sha256": "743b7d99" + 56 * "0"})
    assert mask2former.is_official({"source_sha256": "c9d0c4f2" + 56 * "0"})


def test_another_folder_is_refused(tmp_path, folder):
    with pytest.raises(ValueError, match="--detector: expected a folder with"):
        Mask2FormerDetector(tmp_path)
    (tmp_path / mmdet.WEIGHTS).write_bytes(b"text")
    (tmp_path / mmdet.CONFIG).write_text("{}")
    with pytest.raises(ValueError, match="expected safetensors and JSON"):
        Mask2FormerDetector(tmp_path)
    (tmp_path / mmdet.WEIGHTS).write_bytes((folder / mmdet.WEIGHTS).read_bytes())
    with pytest.raises(ValueError, match="that `unimodal import mask2former` wrote, got None"):
        Mask2FormerDetector(tmp_path)


def test_labels_are_cocos_with_genevals_three_names():
    assert len(LABELS) == len(set(LABELS)) == 80
    assert (LABELS[0], LABELS[11], LABELS[64:67], LABELS[79]) == (
        "person", "stop sign", ("computer mouse", "tv remote", "computer keyboard"), "toothbrush",
    )  # fmt: skip
