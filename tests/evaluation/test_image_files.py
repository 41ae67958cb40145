"""Files of a set of images: found in order, read by workers, mapped, told apart; prompts; damage in one line."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from unimodal.evaluation.image_files import (
    ImageFiles,
    Loading,
    NpzImages,
    by_shape,
    check_sizes,
    feature_batches,
    image_paths,
    listing_sha256,
    mapped_images,
    read_prompts,
)
from unimodal.evaluation.set_protocols import category_of
from unimodal.metrics.features import ImageFeatures, PixelFeatures, as_drawn


def test_images_are_found_below_a_folder_in_order(tmp_path: Path) -> None:
    for name in ("b/1.png", "a/samples/0.PNG", "a/grid.png", ".hidden/2.png", "a/.3.png", "c.jpg", "notes.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".txt":
            path.write_text("x")
        else:
            Image.new("RGB", (4, 4)).save(path)
    found = [path.relative_to(tmp_path).as_posix() for path in image_paths(tmp_path)]
    assert found == ["a/samples/0.PNG", "b/1.png", "c.jpg"]
    assert [category_of(path, tmp_path) for path in image_paths(tmp_path)] == ["a", "b", ""]
    before = listing_sha256(image_paths(tmp_path), tmp_path)
    Image.new("RGB", (40, 40)).save(tmp_path / "c.jpg")
    assert listing_sha256(image_paths(tmp_path), tmp_path) != before
    (tmp_path / "empty").mkdir()
    for bad, message in (("empty", "expected images in"), ("none", "which is missing"), ("notes.txt", "a file")):
        with pytest.raises(ValueError, match=message):
            image_paths(tmp_path / bad)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_named_in_one_line(tmp_path: Path, workers: int) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(30):
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:04d}.png")
    whole = (folder / "0011.png").read_bytes()
    (folder / "0011.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"0011\.png: expected a whole image") as caught:
        list(feature_batches(ImageFiles(image_paths(folder), as_drawn), PixelFeatures(8), Loading(4, workers), ""))
    assert "\n" not in str(caught.value)
    (folder / "0002.png").write_text("hello")
    with pytest.raises(ValueError, match=r"0002\.png"):
        check_sizes(image_paths(folder), (8, 8))


def test_batches_are_cut_where_sizes_change() -> None:
    sizes = [3, 3, 5, 3, 3, 3]
    found = by_shape([torch.zeros(3, size, 4) for size in sizes])
    assert [tuple(piece.shape[:3:2]) for piece in found if isinstance(piece, Tensor)] == [(2, 3), (1, 5), (3, 3)]
    assert by_shape([torch.zeros(3, 4, 4), "broken"]) == ["broken"]


def test_images_of_an_npz_are_mapped_and_not_read(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (9, 5, 6, 3), dtype=np.uint8)
    np.savez(tmp_path / "samples.npz", mu=np.zeros(3), arr_0=images)
    found = mapped_images(tmp_path / "samples.npz")
    assert isinstance(found, np.memmap)
    np.testing.assert_array_equal(found, images)
    dataset = NpzImages(tmp_path / "samples.npz", as_drawn)
    item = dataset[4]
    assert isinstance(item, Tensor)
    np.testing.assert_array_equal(item.permute(1, 2, 0).numpy(), images[4])
    batches = list(feature_batches(dataset, PixelFeatures(1), Loading(4, 1), ""))
    assert [len(batch) for batch in batches] == [4, 4, 1]
    np.savez_compressed(tmp_path / "packed.npz", arr_0=images)
    np.savez(tmp_path / "grey.npz", arr_0=images[..., 0])
    np.savez(tmp_path / "floats.npz", arr_0=images / 255)
    np.savez(tmp_path / "none.npz", mu=images)
    for name, message in (
        ("packed", "got compressed ones"), ("grey", r"expected arr_0 \(N, H, W, 3\)"), ("floats", "of float64"),
        ("none", "expected images under the key arr_0, got mu"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            mapped_images(tmp_path / f"{name}.npz")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "one\n two \n"),
        ("a.jsonl", '{"caption": "one"}\n\n{"prompt": "two", "category": "animals"}\n'),
        ("a.csv", 'image_id,text\n3,one\n4,"two"\n'),
        ("a.json", '{"x": {"prompt": "one", "category": "food"}, "y": {"prompt": "two"}}'),
    ],
)
def test_prompt_files(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    found = read_prompts(tmp_path / name)
    assert [(prompt.id, prompt.text) for prompt in found] == [("00000", "one"), ("00001", "two")]
    assert {prompt.category for prompt in found} <= {"images", "animals", "food"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "\n", "expected prompts in .*got none"),
        ("a.jsonl", '{"a": 1}\n', "expected prompt, caption or text in record 1"),
        ("a.jsonl", "{\n", "prompts: .*Expecting"),
        ("a.csv", "words\none\n", "expected prompt, caption or text in record 1"),
        ("a.xml", "x", r"expected a \.txt, \.jsonl, \.json or \.csv"),
        ("b.txt", None, "which is missing"),
        ("a.json", "5", "a.json: expected an object or a list of records, got 5"),
        ("a.jsonl", "[" * 100_000, "prompts: .*a.jsonl: "),
        ("a.csv", f"prompt\n{'x' * 140_000}\n", "prompts: .*a.csv: field larger than field limit"),
        ("a.csv", 'prompt\n"x\n', "prompts: .*a.csv: unexpected end of data"),
    ],
)
def test_bad_prompt_files(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / name)


def test_devices_are_checked() -> None:
    with pytest.raises(ValueError, match="device: abc cannot be used"):
        _ = Loading(device="abc").place
    assert isinstance(PixelFeatures(1), ImageFeatures)
