"""Containers: the same records by index as read in order, and what is damaged is skipped by name."""

import io
import itertools
import json
import pickle
import struct
import tarfile
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from data_formats import (
    caption_rows,
    encoded,
    img2dataset,
    obelics_tar,
    parquet_rows,
    picture,
    png,
    shade,
    write_jsonl,
    write_tar,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2

from unimodal.data import Interleaved, JsonlSource, Pairs, ParquetSource, TarSource, Text
from unimodal.data import tar as module
from unimodal.data.records import WINDOW, DocumentRules, RecordSource, find_files
from unimodal.data.source import BrokenDocument
from unimodal.data.tar import TarIndex, tar_index

RNG = np.random.default_rng(0)


def everything(source: RecordSource) -> list[str]:
    """Texts by index; of what is broken, the message."""
    found = []
    for index in range(len(source)):
        try:
            found.append(source.document(index, RNG).text)
        except BrokenDocument as error:
            found.append(f"! {error}")
    return found


def broken(source: RecordSource, index: int) -> str:
    with pytest.raises(BrokenDocument) as caught:
        source.document(index, RNG)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- tar


def test_records_are_those_webdataset_reads(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    folder = img2dataset(tmp_path / "pairs")
    write_tar(
        folder / "odd.tar", [("a/b.c.png", png(1)), ("a/b.txt", b"one"), ("c.txt", b"two"), ("a/c.txt", b"three")]
    )
    files = sorted(str(path) for path in folder.glob("*.tar"))
    theirs = [
        {key: value for key, value in sample.items() if not key.startswith("__")}
        for sample in webdataset.WebDataset(files, shardshuffle=False)
    ]
    ours = []
    for path in files:
        index = tar_index(Path(path))
        data = Path(path).read_bytes()
        for n in range(index.samples):
            members = index.members(n)
            names = [member.name.rpartition("/")[2].partition(".")[2] for member in members]
            ours.append({k: data[m.start : m.start + m.size] for k, m in zip(names, members, strict=True)})
    assert ours == theirs
    assert len(ours) == 11


@settings(max_examples=15, deadline=None)
@given(st.floats(0, 0.99))
def test_a_tar_cut_anywhere_keeps_the_records_before_the_cut(share: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = img2dataset(Path(folder), shards=1, each=5) / "00000.tar"
        whole = everything(TarSource(folder, Pairs()))
        data = path.read_bytes()
        path.write_bytes(data[: int(share * len(data))])
        found = everything(TarSource(folder, Pairs()))
        good = [text for text in found if not text.startswith("!")]
        assert good == whole[: len(good)]
        assert len(found) - len(good) <= 1
        if len(good) < 5:
            assert found[-1].startswith(f"! {path}: expected")
            assert f"behind {len(good)} whole records" in found[-1]


def test_a_file_that_is_no_tar_is_one_broken_document(tmp_path: Path) -> None:
    folder = img2dataset(tmp_path, shards=1, each=2)
    (folder / "a.tar").write_bytes(b"")
    (folder / "b.tar").write_bytes(b"no tar " * 200)
    with tarfile.open(folder / "c.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("x.txt"))
    found = everything(TarSource(str(folder)))
    assert found[:2] == ["shade 0", "shade 1"]
    assert [text.split(":")[0] for text in found[2:]] == [f"! {folder / name}" for name in ("a.tar", "b.tar", "c.tar")]


def test_a_tar_that_vanishes_or_shrinks_is_named_once(tmp_path: Path) -> None:
    folder = img2dataset(tmp_path)
    source = TarSource(str(folder))
    (folder / "00001.tar").unlink()
    assert broken(source, 4).startswith(f"{folder / '00001.tar'}: expected the file that was there at the start")
    names = set()
    for index in range(4, 8):
        with pytest.raises(BrokenDocument) as caught:
            source.document(index, RNG)
        names.add(caught.value.name)
    assert names == {str(folder / "00001.tar")}
    (folder / "00000.tar").write_bytes(b"short")
    assert "the file is cut off" in broken(source, 0)


def test_names_in_an_archive_reach_no_file(tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(1))
    record = {"images": [None, "../secret.png"], "texts": ["a", None]}
    path = tmp_path / "in" / "a.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w") as tar:
        for name, data in (("../../up.txt", b"up"), ("/abs.txt", b"abs"), ("0.json", json.dumps(record).encode())):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
            info = tarfile.TarInfo("1.txt")
            info.type, info.linkname = kind, str(secret)
            tar.addfile(info)
    before = sorted(tmp_path.rglob("*"))
    source = TarSource(str(path), Text("txt"))
    assert everything(source)[:2] == ["up", "abs"]
    assert len(source) == 3  # links and devices are no members
    assert "expected a member of the record, got '../secret.png'" in broken(TarSource(str(path), Interleaved()), 2)
    assert sorted(tmp_path.rglob("*")) == before


def test_pickles_in_an_archive_stay_bytes(tmp_path: Path) -> None:
    marker = tmp_path / "ran"

    class Payload:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
            return Path.touch, (marker,)

    members = {"0.png": png(1), "0.txt": b"a", "0.pkl": pickle.dumps(Payload()), "0.pyd": pickle.dumps(Payload())}
    assert everything(TarSource(str(write_tar(tmp_path / "a.tar", members)))) == ["a"]
    assert not marker.exists()


def test_neighbours_of_one_key_are_two_records(tmp_path: Path) -> None:
    members = [("a.txt", b"1"), ("b.txt", b"2"), ("b.cls", b"x"), ("b.txt", b"3"), ("b.txt", b"4"), ("b.cls", b"y")]
    source = TarSource(str(write_tar(tmp_path / "a.tar", members)))
    assert [source.record(i).fields.get("txt") for i in range(len(source))] == [b"1", b"2", b"3", b"4"]
    assert ["cls" in source.record(i).fields for i in range(len(source))] == [False, True, False, True]


def test_a_damaged_index_is_made_anew(tmp_path: Path) -> None:
    tar, cache = write_tar(tmp_path / "a.tar", {"a.txt": b"1", "b.txt": b"2"}), tmp_path / "cache"
    assert len(tar_index(tar, cache)) == 2
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    for damaged in (b"", b"x", whole[: len(whole) // 2], whole[:200] + b"\0" * 40 + whole[240:]):
        file.write_bytes(damaged)
        assert tar_index(tar, cache).samples == 2
        assert file.read_bytes() == whole


def test_an_index_is_kept_and_a_changed_shard_indexed_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, kept = obelics_tar(tmp_path / "data"), tmp_path / "index"
    first = everything(TarSource(str(folder), index=str(kept)))
    assert len(list(kept.iterdir())) == 1
    reads: list[Path] = []
    real = module._read_index

    def counted(path: Path) -> TarIndex:
        reads.append(path)
        return real(path)

    monkeypatch.setattr(module, "_read_index", counted)
    assert everything(TarSource(str(folder), index=str(kept))) == first
    assert not reads
    obelics_tar(tmp_path / "data", 7)
    assert len(TarSource(str(folder), index=str(kept))) == 7
    assert len(reads) == 1


# ---- JSON Lines and Parquet


def test_broken_lines_are_skipped_by_the_number_of_their_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [
        b'\xef\xbb\xbf{"text": "a"}',
        b"",
        b'{"text": "b\xff"}',
        b"{bad",
        b"[1]",
        b'{"text": 3}',
        '{"text": "grün \u2028"}'.encode(),
    ]
    lines += [b'{"text": "\\ud800"}', b'{"text": ' + b"9" * 5000 + b"}", b'{"a":' * 100_000]
    path.write_bytes(b"\r\n".join(lines))
    assert everything(JsonlSource(str(path))) == [
        "a",
        f"! {path}:3: expected UTF-8, got other bytes",
        f"! {path}:4: expected one JSON object, got another thing at byte 1",
        f"! {path}:5: expected a JSON object, got list",
        f"! {path}:6: text: expected text, got 3",
        "grün \u2028",
        f"! {path}:8: content: expected Unicode text, got a lone surrogate at 0",
        f"! {path}:9: expected one JSON object, got one nested too deeply or a number too long",
        f"! {path}:10: expected one JSON object, got one nested too deeply or a number too long",
    ]
    assert list(JsonlSource(str(path)).corpus()) == ["a", "grün \u2028"]


@given(st.lists(st.dictionaries(st.text(max_size=4), st.text(max_size=9) | st.lists(st.integers(), max_size=2)), max_size=5),
       st.sampled_from([None, 1]), st.booleans())  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_a_json_list_is_read_element_by_element(
    records: list[dict[str, object]], indent: int | None, ascii: bool
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.json"
        path.write_text(json.dumps([{"text": "x"}, *records], indent=indent, ensure_ascii=ascii), encoding="utf-8")
        source = JsonlSource(str(path))
        assert [source.record(i).fields for i in range(len(source))] == [{"text": "x"}, *records]


@pytest.mark.parametrize("chunk", [1, 2, 7, 1 << 24])
def test_lines_of_blanks_are_left_out(chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unimodal.data.jsonl._CHUNK", chunk)
    lines = ['{"text": "a"}', "", "   ", "\t \r", '  {"text": "b"}\r', "5", "\0\0", '{"text": "c"}']
    path = tmp_path / "a.jsonl"
    for end in ("", "\n", "\n  \n"):
        path.write_bytes(("\n".join(lines) + end).encode())
        found = everything(JsonlSource(str(path)))
        assert [text for text in found if not text.startswith("!")] == ["a", "b", "c"]
        assert [text.split()[1] for text in found if text.startswith("!")] == [f"{path}:6:", f"{path}:7:"]


def test_a_json_list_with_a_mistake_keeps_what_is_before_it(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"text": "a"}, {"text": "b"} {"text": "c"}]')
    found = everything(JsonlSource(str(path)))
    assert found[:2] == ["a", "b"]
    assert found[2].startswith(f"! {path}: expected a JSON list, got no comma")
    (tmp_path / "b.json").write_text("")
    assert everything(JsonlSource([str(path), str(tmp_path / "b.json")]))[3].endswith("got an empty file")


@pytest.mark.parametrize("behind", ['\n[{"text": "c"}]', " trailing {garbage"])
def test_what_is_behind_a_json_list_is_damage(behind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"text": "a"}]' + behind)
    found = everything(JsonlSource(str(path)))
    assert found[0] == "a"
    assert found[1].startswith(f"! {path}: expected a JSON list, got ")
    assert "behind its end behind 1 records" in found[1]
    path.write_text('[{"text": "a"}] \n')
    assert everything(JsonlSource(str(path))) == ["a"]


def test_images_of_lines_stay_in_their_folder(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(png(1))
    names = ["../secret.png", str(tmp_path / "secret.png"), "gone.png", "folder"]
    (tmp_path / "in" / "folder").mkdir(parents=True)
    path = write_jsonl(tmp_path / "in" / "a.jsonl", [{"image": name, "caption": "c"} for name in names])
    said = everything(JsonlSource(str(path)))
    assert all(text.startswith(f"! {path}:") for text in said)
    assert "inside the folder" in said[0]
    assert "relative path" in said[1]
    assert "No such file" in said[2]
    assert "directory" in said[3]


def test_a_value_that_python_has_not_is_one_broken_row(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    texts = pa.array([b"a", b"\xff", b"c", b"d"], pa.binary()).view(pa.string())
    days = pa.array([0, 0, 2**30, 0], pa.int32()).view(pa.date32())
    images = pa.array([{"bytes": png(n), "path": None} for n in range(4)])
    pq.write_table(pa.table({"image": images, "caption": texts, "day": days}), tmp_path / "a.parquet")
    found = everything(ParquetSource(str(tmp_path)))
    assert found[::3] == ["a", "d"]
    for row in (1, 2):
        assert found[row].startswith(
            f"! {tmp_path / 'a.parquet'}: row {row}: expected values that Python can hold, got "
        )


def test_a_parquet_file_that_is_cut_off_or_vanishes(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    good, cut = (parquet_rows(tmp_path / f"{name}.parquet", caption_rows()) for name in ("a", "b"))
    cut.write_bytes(cut.read_bytes()[:-100])
    source = ParquetSource(str(tmp_path))
    found = everything(source)
    assert found[:8] == [f"shade {i}" for i in range(8)]
    assert len(found) == 9
    assert found[8].startswith(f"! {cut}: expected a Parquet file")
    assert source.shards.tolist() == [3, 3, 2, 1]
    fresh = pickle.loads(pickle.dumps(source))
    good.unlink()
    assert "row group 0: expected the rows that were there at the start" in broken(fresh, 0)


# ---- images


def bomb() -> bytes:
    """A PNG that says it has 30000 x 30000 pixels."""
    head = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def frames() -> bytes:
    buffer = io.BytesIO()
    picture(40).save(buffer, format="GIF", save_all=True, append_images=[picture(200)])
    return buffer.getvalue()


def turned() -> bytes:
    image, buffer = picture(40, 4, 8), io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(buffer, format="PNG", exif=exif)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "expected an image, got an empty file"),
        (b"<svg/>", "expected an image, got a file of another kind"),
        (encoded(Image.fromarray(RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8)))[:90], "expected a whole image"),
        (bomb(), "pixels, got a larger image"),
        (png(1, 1, 1), "expected sides of at least 2 pixels, got 1 x 1"),
    ],
)
def test_a_bad_image_is_named(tmp_path: Path, data: bytes, message: str) -> None:
    source = TarSource(str(write_tar(tmp_path / "a.tar", {"7.png": data, "7.txt": b"a"})))
    said = broken(source, 0)
    assert said.startswith(f"{tmp_path / 'a.tar'}: 7: 7.png: ")
    assert message in said


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "I;16"])
def test_every_mode_is_read(tmp_path: Path, mode: str) -> None:
    image = Image.fromarray(np.full((8, 8), 40000, np.uint16)) if mode == "I;16" else picture(40).convert(mode)
    data = encoded(image, "JPEG" if mode in ("CMYK", "YCbCr") else "PNG")
    source = TarSource(str(write_tar(tmp_path / "a.tar", {"7.png": data, "7.txt": b"a"})))
    (read,) = source.document(0, RNG).images
    assert (read.mode, read.size) == ("RGB", (8, 8))


def test_the_first_frame_and_the_right_way_up(tmp_path: Path) -> None:
    members = {"0.gif": frames(), "0.txt": b"a", "1.png": turned(), "1.txt": b"b"}
    source = TarSource(str(write_tar(tmp_path / "a.tar", members)))
    assert abs(shade(source.document(0, RNG).images[0]) - 40) < 8
    assert source.document(1, RNG).images[0].size == (4, 8)


def test_texts_of_a_megabyte_are_broken(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}, {"text": "b" * 2**20}])
    assert everything(JsonlSource(str(path)))[1].endswith("at most rules.longest_text 200000 characters, got 1048576")
    assert everything(JsonlSource(str(path), rules=DocumentRules(longest_text=2**20)))[1] == "b" * 2**20


def test_transforms_draw_from_the_documents_own_generator_and_alike_in_a_document(tmp_path: Path) -> None:
    noise = RNG.integers(0, 256, (16, 16, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise))
    members = {"0.source.png": data, "0.txt": b"a", "0.target.png": data}
    rules = DocumentRules(transforms=[v2.RandomCrop(8), v2.RandomHorizontalFlip()])
    source = TarSource(str(write_tar(tmp_path / "a.tar", members)), rules=rules)

    def read(seed: int) -> list[bytes]:
        return [image.tobytes() for image in source.document(0, np.random.default_rng(seed)).images]

    state = torch.get_rng_state()
    first = read(0)
    assert torch.equal(state, torch.get_rng_state())
    assert first[0] == first[1]
    torch.manual_seed(5)
    assert read(0) == first
    assert len({read(seed)[0] for seed in range(20)}) > 5
    for wrong in (v2.PILToTensor(), v2.Normalize([0.5], [0.5])):
        with pytest.raises(ValueError, match=r"rules\.transforms: expected images of PIL in and out, got .*\w"):
            DocumentRules(transforms=[wrong])
    assert DocumentRules(transforms=[v2.RandomCrop(300)]).transforms  # which the data may have


# ---- order and files


def test_an_order_holds_every_document_once_and_few_shards_at_a_time(tmp_path: Path) -> None:
    for shard in range(20):
        write_jsonl(tmp_path / f"{shard:02d}.jsonl", [{"text": f"{shard} {i}"} for i in range(1 + shard % 5)])
    source = JsonlSource(str(tmp_path))
    order = source.order(0, np.random.default_rng(1))
    assert sorted(order) == list(range(len(source)))
    shards = np.repeat(np.arange(20), source.shards)[order]
    open_at = [len(set(shards[: i + 1]) & set(shards[i:])) for i in range(len(shards))]
    assert max(open_at) <= WINDOW
    assert order.tolist() == source.order(0, np.random.default_rng(1)).tolist()
    assert order.tolist() != source.order(0, np.random.default_rng(2)).tolist()


def test_members_of_a_record_are_what_its_json_says_beside_them(tmp_path: Path) -> None:
    """Whatever their order: keys of the .json do not hide files."""
    said = json.dumps({"txt": None, "jpg": None, "more": 1}).encode()
    write_tar(tmp_path / "a.tar", [("3.jpg", png(1)), ("3.txt", b"one"), ("3.json", said)])
    write_tar(tmp_path / "b.tar", [("3.json", said), ("3.jpg", png(1)), ("3.txt", b"one")])
    source = TarSource(str(tmp_path), Pairs())
    assert everything(source) == ["one", "one"]
    assert [source.record(i).fields["more"] for i in range(2)] == [1, 1]


def test_a_range_that_falls_is_refused() -> None:
    with pytest.raises(ValueError, match=r"paths: expected a range that rises, got \{5\.\.3\} in x\{5\.\.3\}\.jsonl"):
        find_files("x{5..3}.jsonl", (".jsonl",), "paths")


def test_ranges_patterns_and_folders_name_the_same_files(tmp_path: Path) -> None:
    folder = img2dataset(tmp_path, shards=3, each=1)
    all_ways = [str(folder), f"{folder}/*.tar", f"{folder}/{{00000..00002}}.tar"]
    assert len({tuple(find_files(way, (".tar",), "paths")) for way in all_ways}) == 1
    for wrong in (
        f"{folder}/{{00000..00003}}.tar",
        f"{folder}/no*.tar",
        str(folder / "gone"),
        "http://a/b.tar",
        "pipe:cat a.tar",
    ):
        with pytest.raises(ValueError, match=r"^paths: expected "):
            find_files(wrong, (".tar",), "paths")


def test_sources_travel_and_refuse_what_is_outside(tmp_path: Path) -> None:
    source = TarSource(str(img2dataset(tmp_path)))
    assert everything(pickle.loads(pickle.dumps(source))) == everything(source)
    for index in (-1, 8):
        with pytest.raises(IndexError, match="expected 0 to 7"):
            source.document(index, RNG)
    assert next(itertools.islice(source.corpus(), 1)) == "shade 0"
