import json
import logging
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unimodal.data.folder import FolderSource, FolderSplit
from unimodal.data.source import BrokenDocument, Source
from unimodal.documents import Document, Part, write_jsonl

RNG = np.random.default_rng(0)


def save(path: Path, shade: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (shade, 0, 0)).save(path)
    return path


def captioned(root: Path, count: int) -> Path:
    for index in range(count):
        save(root / f"group{index % 3}" / f"{index}.PNG", index).with_suffix(".txt").write_text(f" shade {index}\n")
    return root


def texts(root: Path, split: FolderSplit, share: float = 0.1) -> set[str]:
    source = FolderSource(root, split, validation_share=share)
    return {source.document(index, RNG).text for index in range(len(source))}


def test_images_with_captions_beside_them(tmp_path: Path) -> None:
    source = FolderSource(captioned(tmp_path, 12))
    assert isinstance(source, Source)
    for index in range(len(source)):
        document = source.document(index, RNG)
        assert document.kind == source.kind == "text_to_image"
        assert [(part.is_image, part.learn) for part in document.parts] == [(False, False), (True, True)]
        assert document.text == f"shade {document.images[0].getpixel((0, 0))[0]}"  # type: ignore[index]
    assert set(source.corpus()) == texts(tmp_path, "train")


def test_image_to_text_learns_the_caption(tmp_path: Path) -> None:
    document = FolderSource(captioned(tmp_path, 4), task="image_to_text").document(0, RNG)
    assert [(part.is_image, part.learn) for part in document.parts] == [(True, False), (False, True)]
    assert document.kind == "image_to_text"


def test_images_by_themselves_need_no_captions(tmp_path: Path) -> None:
    captioned(tmp_path, 4)
    bare = [save(tmp_path / "bare" / f"{shade}.png", shade) for shade in (90, 91)]
    whole = FolderSource(tmp_path, "all", task="image")
    found = [whole.document(index, RNG) for index in range(len(whole))]
    assert all([(part.is_image, part.learn) for part in one.parts] == [(True, True)] for one in found)
    assert sorted(one.images[0].getpixel((0, 0))[0] for one in found) == [0, 1, 2, 3, 90, 91]  # type: ignore[index]
    assert {one.kind for one in found} == {whole.kind} == {"image"}
    assert not list(whole.corpus())
    parts = [FolderSource(tmp_path, split, task="image") for split in ("train", "val")]
    assert [len(part) for part in parts] == [5, 1]
    bare[0].write_bytes(b"")
    with pytest.raises(BrokenDocument, match=r"90\.png"):
        whole.document(next(i for i, one in enumerate(found) if one.images[0].getpixel((0, 0))[0] == 90), RNG)  # type: ignore[index]
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match=r"root: expected images in .*, got none"):
        FolderSource(tmp_path / "none", task="image")


@pytest.mark.parametrize("count", [2, 3, 5, 40])
@pytest.mark.parametrize("share", [0.0001, 0.1, 0.5, 0.9999])
def test_splits_are_disjoint_whole_and_never_empty(tmp_path: Path, count: int, share: float) -> None:
    captioned(tmp_path, count)
    train, val = texts(tmp_path, "train", share), texts(tmp_path, "val", share)
    assert train
    assert val
    assert not train & val
    assert len(train | val) == count


def test_a_new_image_moves_no_other(tmp_path: Path) -> None:
    captioned(tmp_path, 60)
    before = texts(tmp_path, "val", 0.3)
    captioned(tmp_path, 80)
    assert before <= texts(tmp_path, "val", 0.3)
    assert not before & texts(tmp_path, "train", 0.3)


@pytest.mark.parametrize("key", ["caption", "text"])
def test_jsonl_of_captions_keeps_one_image_on_one_side(tmp_path: Path, key: str) -> None:
    lines = []
    for index in range(10):
        save(tmp_path / "images" / f"{index}.png", index)
        lines += [json.dumps({"image": f"images/{index}.png", key: f"{word} {index}"}) for word in ("first", "second")]
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    sides = [{text.split()[1] for text in texts(tmp_path, split, 0.4)} for split in ("train", "val")]
    assert not sides[0] & sides[1]
    assert len(sides[0] | sides[1]) == 10


def test_jsonl_of_documents_is_given_as_it_stands(tmp_path: Path) -> None:
    documents = [
        Document((Part(f"q{i}", learn=False, role="user"), Part(Image.new("RGB", (3, 3), (i, 0, 0))))) for i in range(6)
    ]
    write_jsonl(tmp_path / "d.jsonl", [*documents, Document((Part("only text"),), "prose")])
    found = []
    for split in ("train", "val"):
        source = FolderSource(tmp_path, split)
        assert source.kind == "document"
        found += [source.document(index, RNG) for index in range(len(source))]
    assert sorted(document.text for document in found) == [*sorted(["only text", *(f"q{i}" for i in range(6))])]
    assert {document.kind for document in found} == {"document", "prose"}
    assert all(document.parts in [d.parts for d in documents] for document in found if document.images)


def test_images_load_late_and_sources_travel_to_workers(tmp_path: Path) -> None:
    captioned(tmp_path, 3)
    source: FolderSource = pickle.loads(pickle.dumps(FolderSource(tmp_path)))
    for path in tmp_path.rglob("*.PNG"):
        path.write_bytes(b"not any more")
    with pytest.raises(ValueError, match=r"\.PNG: expected an image, got a file of another kind"):
        source.document(0, RNG)
    with pytest.raises(IndexError, match="got 99"):
        source.document(99, RNG)


def test_images_without_caption_are_left_out_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(captioned(tmp_path, 3) / "bare.png")
    with caplog.at_level(logging.WARNING):
        assert len(texts(tmp_path, "train") | texts(tmp_path, "val")) == 3
    assert "1 of 4 images have no caption" in caplog.text
    assert "bare.png" in caplog.text


def test_names_of_files_need_not_be_text(tmp_path: Path) -> None:
    captioned(tmp_path, 2)
    (tmp_path / os.fsdecode(b"\xff.png")).write_bytes((save(tmp_path / "x.png")).read_bytes())
    (tmp_path / os.fsdecode(b"\xff.txt")).write_text("odd")
    found = [FolderSource(tmp_path, split) for split in ("train", "val")]
    assert sum(len(source) for source in found) == 3
    assert "odd" in {text for source in found for text in source.corpus()}


def test_links_inside_a_folder_of_files_are_followed(tmp_path: Path) -> None:
    root = captioned(tmp_path / "root", 2)
    (root / "linked.png").symlink_to(save(tmp_path / "elsewhere.png"))
    (root / "linked.txt").write_text("linked")
    assert "linked" in texts(root, "train") | texts(root, "val")


def write_lines(root: Path, *lines: str) -> None:
    save(root / "a.png")
    (root / "list.jsonl").write_text("\n".join(lines))


GOOD = '{"image": "a.png", "caption": "a"}'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"list\.jsonl:2: expected one JSON object"),
        ('{"image": "a.png"}', "expected either caption or text, got neither"),
        ('{"image": "a.png", "caption": " "}', "caption: expected a caption, got ' '"),
        ('{"image": "a.png", "caption": 3}', "caption: expected a caption, got 3"),
        ('{"image": "a.png", "caption": "a", "size": 3}', "got 'size'"),
        ('{"caption": "a"}', "image: expected a relative path, got None"),
        ('{"image": "../a.png", "caption": "a"}', "inside the folder"),
        ('{"image": "gone.png", "caption": "a"}', "'gone.png', which is missing"),
        ('{"parts": [{"text": "a"}]}', "expected a caption as on the first line"),
        (r'{"image": "a.png", "caption": "\ud800"}', "text: expected Unicode text, got a lone surrogate at 0"),
        ('{"image": "' + "c" * 300 + '.png", "caption": "a"}', "which is no name of a file"),
        ('{"image": "a.png", "caption": "a", "n": ' + "1" * 5000 + "}", "expected one JSON object on the line"),
    ],
)
def test_a_bad_line_is_one_broken_document(tmp_path: Path, line: str, message: str) -> None:
    write_lines(tmp_path, GOOD, line, GOOD.replace('"a"', '"b"'))
    source = FolderSource(tmp_path, "all")
    assert [source.document(i, RNG).text for i in (0, 2)] == ["a", "b"]
    with pytest.raises(BrokenDocument, match=message) as caught:
        source.document(1, RNG)
    assert caught.value.name == f"{tmp_path / 'list.jsonl'}:2"
    assert "\n" not in str(caught.value)
    assert list(source.corpus()) == ["a", "b"]


def test_a_bad_line_among_many_is_skipped_by_a_run_and_of_one_only_it_is_said(tmp_path: Path) -> None:
    write_lines(tmp_path, "{", GOOD, '{"image": "a.png", "caption": "\xff"}')
    assert len(FolderSource(tmp_path, "all")) == 3
    write_lines(tmp_path, "{", "[")
    with pytest.raises(ValueError, match=r"list\.jsonl:1: expected one JSON object"):
        FolderSource(tmp_path)
    (tmp_path / "list.jsonl").unlink()
    for name, caption in (("b", b""), ("c", b"\xff"), ("d", b"four")):
        save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_bytes(caption)
    source = FolderSource(tmp_path, "all")
    assert source.document(2, RNG).text == "four"
    for i, message in enumerate(
        (r"b\.txt: expected a caption, got an empty file", r"c\.txt: expected a caption in UTF-8")
    ):
        with pytest.raises(BrokenDocument, match=message):
            source.document(i, RNG)


def test_what_is_broken_in_other_sources_is_broken_here(tmp_path: Path) -> None:
    write_lines(tmp_path, GOOD, r'{"image": "a.png", "caption": "x \ud800"}', '{"image": "b.png", "caption": "b"}')
    Image.new("RGB", (1, 1)).save(tmp_path / "b.png")
    source = FolderSource(tmp_path, "all")
    for index, message in ((1, "surrogate|Unicode"), (2, "got 1 x 1 and 1")):
        with pytest.raises(BrokenDocument, match=message):
            source.document(index, RNG)


def test_bad_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"root: expected a folder, got .*which is missing"):
        FolderSource(tmp_path / "gone")
    with pytest.raises(ValueError, match="which is a file"):
        FolderSource(save(tmp_path / "bare" / "a.png"))
    with pytest.raises(ValueError, match="got 1 images and no caption beside any"):
        FolderSource(tmp_path / "bare")
    (tmp_path / "bare" / "a.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"a\.txt: expected a caption, got an empty file"):
        FolderSource(tmp_path / "bare")
    (tmp_path / "bare" / "a.txt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"a\.txt: expected a caption in UTF-8"):
        FolderSource(tmp_path / "bare")
    (tmp_path / "bare" / "a.txt").write_text("one")
    assert len(FolderSource(tmp_path / "bare")) == 1
    with pytest.raises(ValueError, match=r"at least two different images .* val would be empty"):
        FolderSource(tmp_path / "bare", "val")
    for name in ("x.jsonl", "y.jsonl"):
        (tmp_path / "bare" / name).write_text("")
    with pytest.raises(ValueError, match=r"at most one \.jsonl .* got x\.jsonl, y\.jsonl"):
        FolderSource(tmp_path / "bare")
    (tmp_path / "bare" / "y.jsonl").unlink()
    with pytest.raises(ValueError, match=r"x\.jsonl: expected at least one line"):
        FolderSource(tmp_path / "bare")


@pytest.mark.parametrize("share", [0.0, 1.0, -1.0])
def test_validation_share_is_checked(tmp_path: Path, share: float) -> None:
    with pytest.raises(ValueError, match="validation_share: expected"):
        FolderSource(captioned(tmp_path, 2), validation_share=share)
