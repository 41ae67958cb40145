import io
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from unimodal.documents import (
    GENERATED,
    Document,
    Part,
    document_html,
    read_jsonl,
    read_markdown,
    write_atomically,
    write_html,
    write_jsonl,
    write_markdown,
)
from unimodal.images import load_image, to_rgb


def picture(seed: int, width: int = 3, height: int = 2) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


TEXTS = st.text(st.characters(codec="utf-8"), max_size=30) | st.sampled_from(
    ["![a](b.png)", "!\\[x](y)", "!", "[", "a\r\nb", "\u2028", "![", "\\", "](", "\n", "\ufeff"]
)
PARTS = st.builds(
    Part,
    content=TEXTS | st.builds(picture, st.integers(0, 5), st.integers(1, 4), st.integers(1, 4)),
    learn=st.booleans(),
    role=st.sampled_from(["", "user", GENERATED]),
)
DOCUMENTS = st.builds(Document, st.lists(PARTS, min_size=1, max_size=5).map(tuple), st.sampled_from(["", "sum"]))
FILES = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


# ---- records


def test_document_gives_text_and_images_and_is_extended_without_change() -> None:
    image = picture(0)
    document = Document((Part("a", learn=False), Part(image), Part("b")), "k")
    longer = document.extended([Part("c", role=GENERATED)])
    assert document.text == "ab"
    assert document.images == (image,)
    assert longer.text == "abc"
    assert longer.kind == "k"
    assert document.text == "ab"
    assert [part.is_image for part in document.parts] == [not part.is_text for part in document.parts]
    with pytest.raises(ValueError, match="expected an image, got the text 'a'"):
        _ = document.parts[0].image
    with pytest.raises(ValueError, match="expected text, got an image"):
        _ = document.parts[1].text


def test_part_refuses_a_lone_surrogate_and_an_image_without_pixels() -> None:
    with pytest.raises(ValueError, match="lone surrogate at 1"):
        Part("a\ud800")
    with pytest.raises(ValueError, match=r"got size \(0, 4\)"):
        Part(Image.new("RGB", (0, 4)))


# ---- images


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    pixels = np.array([[[255, 0, 0, 255], [255, 0, 0, 0], [0, 0, 0, 127]]], np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert np.asarray(load_image(tmp_path / "a.png")).tolist() == [[[255, 0, 0], [255, 255, 255], [128, 128, 128]]]
    Image.fromarray(np.array([[[10, 255], [10, 0]]], np.uint8)).save(tmp_path / "la.png")
    assert np.asarray(load_image(tmp_path / "la.png"))[..., 0].tolist() == [[10, 255]]


def test_palette_with_a_transparent_colour(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([200, 10, 20, 1, 2, 3])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "a.png", transparency=1)
    assert np.asarray(load_image(tmp_path / "a.png")).tolist() == [[[200, 10, 20], [255, 255, 255]]]


@pytest.mark.parametrize("name", ["a.png", "a.tiff", "a.pgm"])
def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path: Path, name: str) -> None:
    values = np.array([[0, 257, 32896, 65535]], np.uint16)
    if name.endswith("pgm"):
        (tmp_path / name).write_bytes(b"P5 4 1 65535\n" + values.astype(">u2").tobytes())
    else:
        Image.fromarray(values).save(tmp_path / name)
    assert np.asarray(load_image(tmp_path / name))[..., 0].tolist() == [[0, 1, 128, 255]]


@pytest.mark.parametrize(
    "mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV", "RGBA", "LA", "RGBX", "PA", "RGBa", "La"]
)
def test_every_mode_of_a_white_image_is_white(mode: str) -> None:
    image = Image.new("RGBA", (2, 2), "white")
    if mode == "La":
        image = image.convert("LA")
    elif mode not in ("RGBA", "RGBa", "PA"):
        image = image.convert("RGB")
    elif mode == "PA":
        image = image.convert("P")
    rgb = to_rgb(image.convert(mode))
    assert rgb.mode == "RGB"
    assert np.asarray(rgb).min() >= 254


def test_float_and_wide_integers_are_refused() -> None:
    with pytest.raises(ValueError, match="got mode F"):
        to_rgb(Image.new("F", (2, 2)))
    with pytest.raises(ValueError, match=r"expected 16-bit grey 0\.\.65535, got 70000\.\.70000"):
        to_rgb(Image.new("I", (2, 2), 70000))


def test_exif_orientation_turns_the_image_once(tmp_path: Path) -> None:
    image = Image.new("RGB", (16, 8), "red")
    exif = image.getexif()
    exif[0x112] = 6  # turn by 90 degrees clockwise to view
    image.save(tmp_path / "a.jpg", exif=exif)
    loaded = load_image(tmp_path / "a.jpg")
    assert loaded.size == (8, 16)
    assert to_rgb(loaded).size == (8, 16)


def test_an_animation_gives_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert load_image(tmp_path / "a.gif").getpixel((0, 0)) == (255, 0, 0)


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_bomb(side: int) -> bytes:
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def whole_png() -> bytes:
    buffer = io.BytesIO()
    picture(1, 40, 40).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty file"),
        (b"hello", "file of another kind"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "file of another kind"),
        (whole_png()[:200], "expected a whole image"),
        (whole_png()[:20], "expected"),
        (png_bomb(60_000), "got a larger image"),
        (png_bomb(10_000), "got a larger image"),  # Pillow itself only warns here
    ],
    ids=["empty", "text", "postscript", "truncated", "header", "bomb", "half a bomb"],
)
def test_a_bad_image_file_is_named_in_one_line(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "bad.png").write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        load_image(tmp_path / "bad.png")
    assert str(caught.value).startswith(f"{tmp_path / 'bad.png'}: expected")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("cut", range(1, 400, 23))
def test_a_file_cut_anywhere_raises_only_value_error(tmp_path: Path, cut: int) -> None:
    for name in ("a.jpg", "a.gif", "a.tiff", "a.bmp", "a.webp"):
        buffer = io.BytesIO()
        picture(2, 12, 12).save(buffer, format={"jpg": "JPEG"}.get(name[2:], name[2:].upper()))
        (tmp_path / name).write_bytes(buffer.getvalue()[:cut])
        if cut < len(buffer.getvalue()) - 12:  # a few formats do not miss their last bytes
            with pytest.raises(ValueError, match=name):
                load_image(tmp_path / name)


def test_missing_file_folder_and_impossible_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gone\.png: expected an image file, got no such file"):
        load_image(tmp_path / "gone.png")
    with pytest.raises(ValueError, match="got a folder"):
        load_image(tmp_path)
    with pytest.raises(ValueError, match="expected an image file"):
        load_image(tmp_path / ("a" * 300))


# ---- JSONL


@FILES
@given(st.lists(DOCUMENTS, max_size=3))
def test_jsonl_round_trip(tmp_path: Path, documents: list[Document]) -> None:
    write_jsonl(tmp_path / "a.jsonl", documents)
    assert read_jsonl(tmp_path / "a.jsonl") == documents


def test_jsonl_keeps_images_in_the_folder_given_and_nothing_else_lies_about(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [Document((Part(picture(0)),))], images=tmp_path / "pictures")
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")) == [
        "a.jsonl", "pictures", "pictures/000000-00.png",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="images: expected a folder inside"):
        write_jsonl(tmp_path / "inner" / "a.jsonl", [], images=tmp_path / "pictures")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "expected one JSON object"),
        ("[1]", "expected a JSON object, got list"),
        ("[" * 100_000, "expected one JSON object"),
        ('{"parts": []}', "at least one part"),
        ('{"parts": [{"text": "a"}], "kid": 1}', "got 'kid'"),
        ('{"parts": ["a"]}', r"parts\[0\]: expected an object"),
        ('{"parts": [{"text": "a"}, {"learn": true}]}', r"parts\[1\]: expected either text or image, got neither"),
        ('{"parts": [{"text": "a", "image": "a.png"}]}', "got both"),
        ('{"parts": [{"text": 1}]}', "text: expected text, got 1"),
        ('{"parts": [{"text": "\\ud800"}]}', "lone surrogate"),
        ('{"parts": [{"text": "a", "learn": 1}]}', "learn: expected true or false"),
        ('{"parts": [{"text": "a", "role": null}]}', "role: expected text"),
        ('{"parts": [{"image": "gone.png"}]}', "gone.png: expected an image file"),
        ('{"parts": [{"image": "../secret.png"}]}', "inside the folder"),
        ('{"parts": [{"image": "link/secret.png"}]}', "inside the folder"),
        ('{"parts": [{"image": "/etc/passwd"}]}', "expected a relative path"),
        ('{"parts": [{"image": "a\\u0000b"}]}', "image: expected"),
        ('{"parts": [{"image": ""}]}', "image: expected a relative path"),
        ("\udcff", "expected UTF-8"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path: Path, line: str, message: str) -> None:
    picture(0).save(tmp_path / "secret.png")
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path)
    good = json.dumps({"parts": [{"text": "fine"}]})
    (folder / "a.jsonl").write_bytes(f"{good}\n\n{line}\n".encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=message) as caught:
        read_jsonl(folder / "a.jsonl")
    assert str(caught.value).startswith(f"{folder / 'a.jsonl'}:3: ")
    assert "\n" not in str(caught.value)


def test_a_missing_jsonl_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.jsonl: expected a JSONL file"):
        read_jsonl(tmp_path / "a.jsonl")


# ---- Markdown


def merged(document: Document) -> list[str | Image.Image]:
    """Contents with neighbouring texts joined and empty ones left out."""
    contents: list[str | Image.Image] = []
    for part in document.parts:
        if part.is_text and contents and isinstance(contents[-1], str):
            contents[-1] += part.text
        elif part.content != "":
            contents.append(part.content)
    return contents


@FILES
@given(DOCUMENTS.filter(lambda document: bool(merged(document))))
def test_markdown_round_trip(tmp_path: Path, document: Document) -> None:
    write_markdown(document, tmp_path / "a b.md")
    back = read_markdown((tmp_path / "a b.md").read_bytes().decode(), tmp_path)
    assert merged(back) == merged(document)
    assert not any(part.learn for part in back.parts)


def test_markdown_of_a_person(tmp_path: Path) -> None:
    picture(0).save(tmp_path / "my cat.png")
    document = read_markdown("![](<my cat.png>) plus ![two](my cat.png) equals \n", tmp_path)
    assert [part.content if part.is_text else "image" for part in document.parts] == [
        "image", " plus ", "image", " equals ",
    ]  # fmt: skip


def test_markdown_names_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gone\.png: expected an image file"):
        read_markdown("look: ![](gone.png)", tmp_path)
    with pytest.raises(ValueError, match=r"got the address 'https://example\.org/a\.png'"):
        read_markdown("![](https://example.org/a.png)", tmp_path)
    with pytest.raises(ValueError, match="empty prompt"):
        read_markdown("\n", tmp_path)


# ---- HTML


def test_html_escapes_marks_and_embeds(tmp_path: Path) -> None:
    document = Document((Part("<b>&", learn=False), Part(picture(0, 8, 8), role=GENERATED), Part("x", role=GENERATED)))
    write_html([document], tmp_path / "a.html", "<title>")
    page = (tmp_path / "a.html").read_text()
    assert "&lt;b&gt;&amp;" in page
    assert "<title>&lt;title&gt;</title>" in page
    assert '<img class="generated pixelated" width="64" height="64"' in page
    assert '<span class="generated">x</span>' in page
    assert page.count("src=") == page.count('src="data:image/png;base64,') == 1
    assert "<script" not in page
    assert list(tmp_path.iterdir()) == [tmp_path / "a.html"]


def test_a_large_image_is_not_enlarged() -> None:
    assert '<img width="100" height="50"' in document_html(Document((Part(Image.new("RGB", (100, 50))),)))


# ---- files


@pytest.mark.parametrize(
    "write",
    [
        lambda path: write_atomically(path, b"new"),
        lambda path: write_html([], path, "t"),
        lambda path: write_jsonl(path, []),
        lambda path: write_markdown(Document((Part("a"),)), path),
    ],
)
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], None]
) -> None:
    path = tmp_path / "a"
    path.write_text("old")

    def refuse(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(OSError, match="no space"):
        write(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
