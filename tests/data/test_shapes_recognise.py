"""The recogniser against scenes that are known, spoilt in known ways, and against what is no scene at all."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from experiments.shapes.recogniser import SPOILS, blur, iou, is_right, main, measure, noise, scenes, tint
from unimodal.data.shapes import (
    BACKGROUND,
    COLOURS,
    SHAPES,
    Scene,
    Thing,
    coverage,
    prompts,
    recognise,
    render,
    render_prompt,
    visible,
)
from unimodal.data.shapes.render import PALETTE, paint


def kinds(found):
    return sorted((d.label, d.colour) for d in found)


def canvas(size=64, colour=BACKGROUND):
    return Image.new("RGB", (size, size), colour)


# ---- truth


def test_rendered_scenes_are_read_right():
    wrong = [i for i, scene in enumerate(scenes(32, 240, seed=11)) if not is_right(scene, recognise(render(scene)))]
    assert not wrong  # measured: one in 10,000 (experiments/shapes)
    for size, number in ((48, 16), (101, 8), (256, 2)):
        assert all(is_right(scene, recognise(render(scene))) for scene in scenes(size, number, seed=12))


@pytest.mark.parametrize("size", [8, 9, 13])
def test_every_shape_in_every_colour(size):
    for s, shape in enumerate(SHAPES):
        for c, colour in enumerate(COLOURS):
            thing = Thing(shape, colour, size, (3 * s + c) % 15, (5 * c + s) % 15)
            (found,) = recognise(render(Scene((thing,), 32)))
            assert (found.label, found.colour, found.box) == (shape, colour, thing.box)
            assert found.score > 0.97


def test_masks_hold_what_is_seen():
    scene = Scene((Thing("square", "red", 14, 2, 3), Thing("circle", "blue", 12, 10, 8)), 32)
    found = {d.label: d for d in recognise(render(scene))}
    for thing, left in zip(scene.things, visible(scene), strict=True):
        mask = found[thing.shape].mask
        assert mask.shape == (32, 32)
        expected = np.zeros((32, 32), bool)
        expected[thing.y : thing.y + thing.size, thing.x : thing.x + thing.size] = left >= 0.5
        np.testing.assert_array_equal(mask, expected)
    assert found["square"].box == (2, 3, 16, 17)  # the whole square, though a corner is covered
    assert not found["square"].mask[14, 14]


def test_mixed_edges_join_nothing():
    """Half black on the background is nearest to brown: it must not join two brown things, nor be a thing itself."""
    diamond = Thing("diamond", "black", 14, 6, 14)
    scene = Scene((Thing("cross", "brown", 10, 15, 12), diamond, Thing("cross", "brown", 8, 5, 17)), 32)
    assert is_right(scene, recognise(render(scene)))
    assert kinds(recognise(render(Scene((diamond,), 32)))) == [("diamond", "black")]


def test_things_that_hardly_overlap_find_their_order():
    things = (
        Thing("ring", "red", 12, 3, 5), Thing("square", "brown", 10, 9, 10), Thing("triangle", "black", 8, 3, 24),
        Thing("heart", "white", 12, 14, 12),
    )  # fmt: skip
    assert is_right(Scene(things, 32), recognise(render(Scene(things, 32))))


@pytest.mark.parametrize(("rows", "claimed"), [(5, False), (7, True)])
def test_nothing_is_claimed_that_is_covered_by_more_than_half(rows, claimed):
    things = (Thing("square", "red", 12, 10, 16 - rows), Thing("square", "blue", 12, 10, 16))
    found = kinds(recognise(render(Scene(things, 32)), threshold=0.0))
    assert ("square", "blue") in found
    assert (("square", "red") in found) == claimed


def test_prompts_drawn_are_read_back():
    for i, record in enumerate(r for split in ("train", "test") for r in prompts(split, 6)):
        scene = render_prompt(record, np.random.default_rng((2, i)), 32)
        assert is_right(scene, recognise(render(scene))), record


# ---- spoilt images


def test_noise_and_blur_are_borne_and_then_lower_the_score():
    clean = measure(32, 24, 5)
    assert clean["right"] == 1
    for spoil in (noise(20), blur(0.7), blur(1.0), tint(5)):
        assert measure(32, 24, 5, spoil)["names"] >= 0.97
    for make, degrees in ((noise, (40, 60)), (blur, (1.25, 2.5))):
        rows = [clean, *(measure(32, 24, 5, make(degree)) for degree in degrees)]
        right = [row["names"] for row in rows]
        assert all(later <= earlier + 0.06 for earlier, later in pairwise(right))
        assert right[-1] < 0.7
        assert rows[-1]["mean_score"] is None or rows[-1]["mean_score"] < 0.9 < clean["mean_score"]
        assert sum(row["extra_things"] for row in rows) <= 3


def test_a_colour_that_is_off_lowers_the_score_alone():
    def drawn(off):
        picture = paint(
            [Thing("heart", "green", 16, 5, 7)], (0, 0, 32, 32), {**PALETTE, "green": PALETTE["green"] + off}
        )
        (found,) = recognise(Image.fromarray(np.rint(picture).astype(np.uint8)))
        assert (found.label, found.colour, found.box) == ("heart", "green", (5, 7, 21, 23))
        return found.score

    scores = [drawn(np.array([off, off / 2, -off / 2], np.float32)) for off in (0, 15, 30, 45)]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] > 0.99
    assert 0.3 < scores[-1] < 0.75


def test_a_shape_that_is_off_lowers_the_score():
    def score(height):
        image = canvas(32)
        ImageDraw.Draw(image).rectangle((4, 4, 19, 3 + height), fill=COLOURS["blue"])
        found = [d for d in recognise(image, threshold=0.0) if d.label == "square"]
        return max((d.score for d in found), default=0.0)

    scores = [score(height) for height in (16, 15, 14, 10)]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] == pytest.approx(1)
    assert scores[1] > 0.8
    assert scores[3] < 0.3


def test_what_is_no_scene_gives_next_to_nothing():
    rng = np.random.default_rng(0)
    assert recognise(canvas()) == []
    assert recognise(Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))) == []
    ramp = np.repeat(np.repeat(np.linspace(0, 255, 64, dtype=np.uint8)[:, None], 64, axis=1)[..., None], 3, axis=2)
    assert len(recognise(Image.fromarray(ramp), threshold=0.3)) <= 2
    clouds = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((64, 64), Image.Resampling.BICUBIC)
    assert len(recognise(clouds, threshold=0.3)) <= 8  # of 64 blobs
    checks = (np.indices((64, 64)) // 2).sum(axis=0) % 2
    assert len(recognise(Image.fromarray((checks * 255).astype(np.uint8)), threshold=0.3)) <= 2


def test_sizes_modes_and_thresholds():
    scene = Scene((Thing("star", "red", 12, 3, 4), Thing("ring", "black", 11, 18, 19)), 32)
    expected = kinds(recognise(render(scene)))
    assert kinds(recognise(render(scene).convert("RGBA"))) == expected
    wide = canvas(32).resize((70, 32))
    wide.paste(render(scene), (30, 0))
    found = recognise(wide)
    assert kinds(found) == expected
    assert all(d.mask.shape == (32, 70) for d in found)
    assert max(d.box[2] for d in found) <= 70
    for size in ((16, 32), (32, 300)):
        with pytest.raises(ValueError, match=f"image: expected sides of 32 to 256 pixels, got {size[0]}x{size[1]}"):
            recognise(Image.new("RGB", size))
    noisy = noise(30)(render(scene), np.random.default_rng(0))
    low, high = recognise(noisy, threshold=0.0), recognise(noisy, threshold=0.95)
    assert len(high) < len(low)
    assert [d.score for d in low] == sorted((d.score for d in low), reverse=True)
    first, again = (recognise(noisy) for _ in range(2))
    assert [(d.label, d.box, d.score) for d in first] == [(d.label, d.box, d.score) for d in again]


# ---- the measurement


def test_right_means_right():
    scene = Scene((Thing("square", "red", 10, 2, 2),), 32)
    (found,) = recognise(render(scene))
    assert is_right(scene, [found])
    assert not is_right(scene, [])
    assert not is_right(scene, [found, found])
    assert not is_right(Scene((Thing("square", "blue", 10, 2, 2),), 32), [found])
    assert not is_right(Scene((Thing("circle", "red", 10, 2, 2),), 32), [found])
    assert not is_right(Scene((Thing("square", "red", 10, 3, 2),), 32), [found])  # 0.82 of the union
    assert iou((0, 0, 10, 10), (5, 0, 15, 10)) == pytest.approx(1 / 3)
    assert iou((0, 0, 4, 4), (5, 5, 6, 6)) == 0
    assert coverage("square", 10).sum() == 100


def test_the_measurement_writes_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("experiments.shapes.recogniser.SIZES", {32: 10})
    monkeypatch.setattr("experiments.shapes.recogniser.SPOILT", 4)
    main(["--out", str(tmp_path / "result.json"), "--share", "0.5"])
    result = json.loads((tmp_path / "result.json").read_text())
    assert set(result["rows"]) == {"clean 32", *SPOILS}
    assert result["rows"]["clean 32"]["scenes"] == 5
    assert result["rows"]["clean 32"]["right"] == 1
