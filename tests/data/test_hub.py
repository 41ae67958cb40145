"""Hugging Face `datasets`: saved, of data files, of images beside a list; whole and streamed."""

import pickle
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from data_formats import Plain, caption_rows, image_folder, parquet_rows, png, shade, write_jsonl
from torch.utils.data import DataLoader, Dataset

from unimodal.data import HuggingFaceSource, MixtureData, hub
from unimodal.data.hub import STREAM_WINDOW
from unimodal.data.mixture import Entry
from unimodal.data.order import round_order
from unimodal.data.source import BrokenDocument

RNG = np.random.default_rng(0)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder of `save_to_disk`, and beside it one of Parquet files."""
    datasets = pytest.importorskip("datasets")
    parquet_rows(tmp_path / "files" / "train.parquet", caption_rows(10))
    rows = datasets.Dataset.from_list(caption_rows(10)).cast_column("image", datasets.Image())
    rows.save_to_disk(str(tmp_path / "saved"))
    return tmp_path


def said(source: HuggingFaceSource, indices: Iterable[int]) -> list[int]:
    found = []
    for index in indices:
        document = source.document(index, RNG)
        assert document.text == f"shade {shade(document.images[0])}"
        found.append(shade(document.images[0]))
    return found


def test_a_folder_of_datasets_is_read_by_row(saved: Path) -> None:
    for folder in ("saved", "files"):
        source = HuggingFaceSource(str(saved / folder))
        assert len(source) == 10
        assert said(source, [9, 0, 4]) == [9, 0, 4]
        assert said(pickle.loads(pickle.dumps(source)), [3]) == [3]


def test_a_stream_is_the_same_row_for_an_index_however_it_is_reached(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unimodal.data.hub.STREAM_WINDOW", 3)
    made = [HuggingFaceSource(str(saved / "saved"), streaming=True, documents=4) for _ in range(2)]
    assert said(made[0], range(25)) == [i % 10 for i in range(25)]  # behind the last row comes the first
    assert said(made[1], [24, 2, 13, 12, 7, 8]) == [4, 2, 3, 2, 7, 8]
    assert said(pickle.loads(pickle.dumps(made[0])), [11]) == [1]


def test_rounds_of_a_stream_go_on(saved: Path) -> None:
    source = HuggingFaceSource(str(saved / "files"), streaming=True, documents=4)
    orders = [source.order(epoch, np.random.default_rng(epoch)).tolist() for epoch in range(3)]
    assert [sorted(order) for order in orders] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert STREAM_WINDOW > 12
    with pytest.raises(ValueError, match=r"data\.validation: expected sources: of the stream data\.sources\.s"):
        MixtureData(1, {"s": Entry(source)})
    data = MixtureData(1, {"s": Entry(source)}, {"v": Entry(Plain(3))})
    (weighted,) = data.training_sources()
    assert round_order(weighted.source, 4, 4, (0,)).min() == 4
    assert weighted.source.document(11, RNG).text == "shade 1"


def test_nothing_is_fetched_that_is_not_named_as_such(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def offline(path: str, *args: object, **options: object) -> None:
        asked.append((path, options))
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(
        ValueError, match="path: expected a folder, or hub:OWNER/NAME for one on the hub, got some/name"
    ):
        HuggingFaceSource("some/name")
    assert not asked
    with pytest.raises(
        ValueError, match="path: expected a data set with the split train, got hub:some/name: no network"
    ):
        HuggingFaceSource("hub:some/name")
    assert asked == [("some/name", {"split": "train", "revision": None, "streaming": False})]
    monkeypatch.undo()
    with pytest.raises(ValueError, match="split nope"):
        HuggingFaceSource(str(saved / "files"), "nope")
    for streaming, documents in ((True, None), (False, 3), (True, 0)):
        with pytest.raises(ValueError, match=r"^documents: expected"):
            HuggingFaceSource(str(saved / "files"), streaming=streaming, documents=documents)


def test_a_broken_image_of_a_row_does_not_stop_the_reading(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    rows = caption_rows(4)
    rows[2] = {"image": {"bytes": b"no image", "path": None}, "caption": "x"}
    parquet_rows(tmp_path / "train.parquet", rows)
    source = HuggingFaceSource(str(tmp_path))
    with pytest.raises(BrokenDocument, match=r"train: row 2: image: expected an image, got a file of another kind"):
        source.document(2, RNG)
    assert said(source, [0, 1, 3]) == [0, 1, 3]


@pytest.mark.parametrize("documents", [None, 4])
def test_a_value_that_python_has_not_is_one_broken_row(documents: int | None, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = caption_rows(4)
    days = pa.array([0, 0, 2**30, 0], pa.int32()).view(pa.date32())
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    pq.write_table(pa.table({**columns, "day": days}), tmp_path / "train.parquet")
    source = HuggingFaceSource(str(tmp_path), streaming=documents is not None, documents=documents)
    with pytest.raises(BrokenDocument, match="train: row 2: expected values that Python can hold, got "):
        source.document(2, RNG)
    assert said(source, [0, 1, 3]) == [0, 1, 3]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_images_beside_a_metadata_file_are_read_undecoded_and_unfetched(
    form: str, streaming: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")

    def never(*args: object) -> None:
        raise AssertionError(args)

    monkeypatch.setattr(datasets.Image, "decode_example", never)
    monkeypatch.setattr("socket.socket.connect", never)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    folder = image_folder(tmp_path / "real", form, {3: b"no image", 4: b""})
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    for path in (str(folder), "real", "link"):
        source = HuggingFaceSource(path, streaming=streaming, documents=6 if streaming else None)
        assert (len(source), source.kind) == (6, "text_to_image")
        assert said(source, [5, 0, 2, 1]) == [5, 0, 2, 1]
        assert said(pickle.loads(pickle.dumps(source)), [1]) == [1]
        for index, reason in ((3, "expected an image, got a file of another kind"), (4, "got an empty file")):
            with pytest.raises(BrokenDocument, match=rf"train: row {index}: sub/{index}.png: .*{reason}"):
                source.document(index, RNG)
    (folder / "sub" / "0.png").unlink()
    with pytest.raises(BrokenDocument, match=r"train: row 0: .*No such file"):
        source.document(0, RNG)


def test_a_script_of_the_data_sets_name_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    folder = image_folder(tmp_path / "json")  # the name of a format of `datasets` too
    (folder / "other.py").write_text("raise SystemExit('run')")
    assert said(HuggingFaceSource("json"), [2]) == [2]
    (folder / "json.py").write_text("raise SystemExit('run')")
    with pytest.raises(ValueError, match=r"path: expected a data set .*json: Dataset scripts are no longer supported"):
        HuggingFaceSource(str(folder))


@pytest.mark.parametrize("outside", ["../outside.png", "/etc/hostname", "http://127.0.0.1:9/x.png"])
def test_a_metadata_file_reaches_no_file_outside_its_folder(outside: str, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    folder = image_folder(tmp_path / "real", "jsonl")
    (folder.parent / "outside.png").write_bytes(png(1))
    write_jsonl(
        folder / "metadata.jsonl", [{"file_name": "sub/0.png", "text": "a"}, {"file_name": outside, "text": "b"}]
    )
    with pytest.raises(
        ValueError, match=r"path: expected a data set with the split train, got .*real: Invalid metadata"
    ):
        HuggingFaceSource(str(folder))


def test_a_link_out_of_a_folder_of_images_is_not_followed(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    folder = image_folder(tmp_path / "real", "jsonl", {2: None})
    (tmp_path / "outside.png").write_bytes(png(2))
    (folder / "sub" / "2.png").symlink_to(tmp_path / "outside.png")
    with pytest.raises(BrokenDocument, match=r"row 2: .*expected a file inside the folder"):
        HuggingFaceSource(str(folder)).document(2, RNG)


@pytest.mark.parametrize("workers", [2, 3])
def test_a_stream_gives_every_worker_the_rows_it_asks_for(workers: int, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    for i in range(2):
        parquet_rows(tmp_path / "files" / f"train-{i}.parquet", caption_rows(10)[5 * i : 5 * i + 5])
    source = HuggingFaceSource(str(tmp_path / "files"), streaming=True, documents=10)
    alone = [source.document(i, RNG).text for i in range(10)]
    assert len(set(alone)) == 10
    loader = DataLoader(Asked(source), batch_size=1, num_workers=workers, collate_fn=list)
    assert [text for (text,) in loader] == alone


class Asked(Dataset):
    """Texts of a source's documents."""

    def __init__(self, source: HuggingFaceSource) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> str:
        return self.source.document(index, np.random.default_rng(0)).text


def test_lanes_that_straddle_windows_do_not_read_a_stream_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    parquet_rows(tmp_path / "files" / "train.parquet", caption_rows(40))
    monkeypatch.setattr(hub, "STREAM_WINDOW", 4)
    source, begun = HuggingFaceSource(str(tmp_path / "files"), streaming=True, documents=40), []
    original = hub._Forward._from
    monkeypatch.setattr(hub._Forward, "_from", lambda self, start: (begun.append(start), original(self, start))[1])
    for first in range(0, 36):
        for lane in (first, min(first + 4, 39), max(first - 3, 0)):
            source.document(lane, RNG)
    assert begun == []  # but once, when it was opened


def test_a_card_that_names_files_elsewhere_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "a.jsonl").write_text('{"text": "mine"}')
    card = tmp_path / "README.md"
    card.write_text(
        "---\nconfigs:\n- config_name: default\n  data_files: http://127.0.0.1:9/x.jsonl\n---\nsee https://x"
    )
    with pytest.raises(ValueError, match=r"path: expected files of .* alone, got its README.md"):
        HuggingFaceSource(str(tmp_path))
    card.write_text("---\nconfigs:\n- config_name: default\n  data_files: a.jsonl\nhome: https://x\n---\nsee https://x")
    assert HuggingFaceSource(str(tmp_path)).document(0, RNG).text == "mine"
