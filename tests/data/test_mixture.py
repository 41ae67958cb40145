"""Mixtures of any sources: rounds, what is held out, what is broken, and streams."""

import logging
import os
import pickle
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from data_formats import caption_rows, image_folder, img2dataset, parquet_rows, png, shade, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from unimodal.data import FolderSource, HuggingFaceSource, JsonlSource, MixtureData, ParquetSource, TarSource, hub
from unimodal.data.broken import ENOUGH, BrokenItems, Exchange
from unimodal.data.hub import STREAM_WINDOW
from unimodal.data.mixture import Entry, Slice
from unimodal.data.order import mixed_order, round_order
from unimodal.data.source import BrokenDocument, Source, identity
from unimodal.documents import Document, Part
from unimodal.model import UnifiedModel

RNG = np.random.default_rng(0)


class Numbered:
    """Documents that say their number; those in `bad` are broken."""

    kind = "numbered"

    def __init__(self, count: int, bad: Iterable[int] = ()) -> None:
        self.count, self.bad = count, set(bad)

    def __len__(self) -> int:
        return self.count

    def document(self, index: int, rng: np.random.Generator) -> Document:
        if index in self.bad:
            raise BrokenDocument(f"item {index}", "expected good")
        return Document((Part(str(index)),), self.kind)

    def corpus(self) -> Iterable[str]:
        yield "0123456789"


@given(st.integers(1, 9), st.integers(1, 25), st.integers(0, 6))
@settings(max_examples=50, deadline=None)
def test_a_source_gives_all_its_documents_before_any_comes_again_across_epochs(n: int, count: int, epochs: int) -> None:
    row = [i for epoch in range(epochs) for i in round_order(Numbered(n), epoch * count, count, (7,))]
    assert row == round_order(Numbered(n), 0, epochs * count, (7,)).tolist()
    for r in range(len(row) // n):
        assert sorted(row[r * n : (r + 1) * n]) == list(range(n))


def test_sources_take_turns_and_keep_their_own_order() -> None:
    sources: list[Source] = [Numbered(30), Numbered(50)]
    turns, index = mixed_order(sources, [30, 50], seed=3, epoch=2)
    assert Counter(turns.tolist()) == {0: 30, 1: 50}
    for s, count in ((0, 30), (1, 50)):
        assert index[turns == s].tolist() == round_order(sources[s], 2 * count, count, (3, s, 1)).tolist()
    assert len(set(turns[:10].tolist())) == 2
    again = mixed_order(sources, [30, 50], seed=3, epoch=2)
    assert (turns.tolist(), index.tolist()) == (again[0].tolist(), again[1].tolist())


def test_what_is_held_out_is_never_trained_on_and_more_data_moves_none_of_it() -> None:
    def sides(n: int) -> tuple[set[str], set[str]]:
        data = MixtureData(1, {"a": Entry(Numbered(n))}, validation_share=0.2)
        (train,), (held,) = data.training_sources(), data.validation_sources()
        return tuple({s.document(i, RNG).text for i in range(len(s))} for s in (train.source, held))  # type: ignore[return-value]

    train, held = sides(200)
    assert not train & held
    assert train | held == {str(i) for i in range(200)}
    assert 20 < len(held) < 60
    assert held <= sides(300)[1]
    for n in (2, 3, 4):
        assert all(sides(n))


def test_a_slice_keeps_the_order_of_its_source(tmp_path: Path) -> None:
    source = TarSource(str(img2dataset(tmp_path, shards=20, each=3)))
    chosen = np.random.default_rng(1).random(60) < 0.7
    part = Slice("mine", source, chosen)
    order = part.order(0, np.random.default_rng(2))
    assert sorted(order) == list(range(int(chosen.sum())))
    texts = [part.document(int(i), RNG).text for i in order]
    whole = [source.document(int(i), RNG).text for i in source.order(0, np.random.default_rng(2)) if chosen[i]]
    assert texts == whole
    assert {part.document(int(i), RNG).kind for i in order} == {"mine"}
    with pytest.raises(IndexError):
        part.document(len(part), RNG)


def test_bad_settings_are_named() -> None:
    for settings_, message in (
        ({"sources": {}}, "data.sources: expected at least one"),
        ({"sources": {"a": Entry(Numbered(1))}}, "data.sources.a: expected at least two"),
        ({"sources": {"a": Entry(Numbered(3), -1.0)}}, "weight of at least 0 for a, got -1.0"),
        ({"sources": {"a": Entry(Numbered(3))}, "validation_share": 0.0}, "data.validation_share"),
        ({"sources": {"a": Entry(Numbered(3))}, "broken_share": 2.0}, "data.broken_share"),
    ):
        with pytest.raises(ValueError, match=message):
            MixtureData(1, **settings_)  # type: ignore[arg-type]


# ---- what is broken


def run_through(source: Numbered, share: float, rounds: int = 1) -> BrokenItems:
    broken = BrokenItems(share, {"s": len(source)})
    for index in [*range(len(source))] * rounds:
        meet(broken, source, index)
    return broken


def meet(broken: BrokenItems, source: Numbered, index: int) -> None:
    try:
        source.document(index, RNG)
        broken.pack("s")
    except BrokenDocument as error:
        broken.add("s", index, error)


def test_broken_items_are_named_once_and_counted_each_time(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert run_through(Numbered(200, [5, 7]), share=0.01, rounds=4).total == 8
    assert [record.getMessage() for record in caplog.records] == [
        "data: s: skipped item 5: expected good", "data: s: skipped item 7: expected good"
    ]  # fmt: skip


def test_above_the_share_the_run_stops_and_says_so() -> None:
    with pytest.raises(ValueError, match=r"data: s: 3 of 200 documents cannot be read, more than data.broken_share 0.01; "
                       r"the last: item 9: expected good \(all of them: unimodal data check\)"):  # fmt: skip
        run_through(Numbered(200, [5, 7, 9]), share=0.01)
    with pytest.raises(ValueError, match="1 of 3 documents"):
        run_through(Numbered(3, [2]), share=0.0)


def test_a_source_that_fails_altogether_stops_long_before_its_end() -> None:
    broken = BrokenItems(0.01, {"s": 10**9})
    for index in range(ENOUGH // 100):
        broken.add("s", index, BrokenDocument(f"item {index}", "expected it to be there"))
    with pytest.raises(ValueError, match="11 of 11 documents read"):
        broken.add("s", ENOUGH, BrokenDocument("another", "expected it to be there"))
    broken = BrokenItems(0.01, {"s": 10**9})
    for index in range(ENOUGH // 2):
        broken.add("s", index, BrokenDocument("the disk", "expected it to be there"))
    with pytest.raises(ValueError, match="501 of 501 documents read"):
        broken.add("s", ENOUGH, BrokenDocument("the disk", "expected it to be there"))


def test_a_shard_that_is_gone_stops_no_run_that_has_a_thousand() -> None:
    broken = BrokenItems(0.01, {"s": 100_000})
    for index in range(800):  # a window of eight shards
        if index % 8:
            broken.pack("s")
        else:
            broken.add("s", index, BrokenDocument("s7.tar", "expected the file that was there at the start"))
    assert broken.total == 100


class Meeting:
    """Ranks that agree one after another, in one process."""

    def __init__(self, ranks: list[BrokenItems]) -> None:
        self.ranks = ranks

    def agree(self) -> list[str]:
        """What each of them says."""
        told, new = [rank.news() for rank in self.ranks], [list(rank._new) for rank in self.ranks]
        totals, said = {name: sum(one[name] for one in told) for name in told[0]}, []
        for rank in self.ranks:
            try:
                rank.agree(totals, lambda mine: new)
                said.append("")
            except ValueError as error:
                said.append(str(error))
        return said


@given(
    reads=st.lists(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 39)), max_size=8), min_size=1, max_size=12),
    count=st.integers(1, 3), stop=st.integers(0, 11), after=st.integers(1, 3),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_ranks_and_resumes_know_what_one_rank_would(
    reads: list[list[tuple[int, int]]], count: int, stop: int, after: int
) -> None:
    """Whoever met it, whatever was read ahead, and whoever goes on."""
    source = Numbered(40, bad=range(0, 40, 3))
    alone = BrokenItems(1.0, {"s": 40})
    ranks, marks, states = [BrokenItems(1.0, {"s": 40}) for _ in range(count)], [], []
    for step, some in enumerate(reads):
        if step == stop:  # one more was read ahead, and is lost
            meet(ranks[0], source, 21)
            ranks[0].agree(ranks[0].news(), lambda mine: [mine])
            state = ranks[0].state(marks[-1]) if marks else {}
            ranks = [BrokenItems(1.0, {"s": 40}, state) for _ in range(after)]
        for rank, index in some:
            meet(alone, source, index)
            meet(ranks[rank % len(ranks)], source, index)
        assert not any(Meeting(ranks).agree())
        alone.agree(alone.news(), lambda mine: [mine])
        marks.append(alone.mark())
        states.append(alone.state(marks[-1]))
        for rank in ranks:
            assert rank.state(rank.mark()) == states[-1]
            assert (rank.total, rank.skipped) == (alone.total, alone.skipped)
    assert [alone.state(mark) for mark in marks] == states


def test_ranks_stop_at_the_same_step_with_the_same_words() -> None:
    source = Numbered(200, bad=(5, 7, 9))
    ranks = [BrokenItems(0.01, {"s": 200}) for _ in range(3)]
    for rank, index in ((0, 5), (2, 7)):  # as many as may be
        meet(ranks[rank], source, index)
    assert Meeting(ranks).agree() == [""] * 3
    for rank in (0, 1, 2):  # the same again, by others, in another epoch: no more are broken than before
        meet(ranks[rank], source, 5 + 2 * (rank % 2))
    assert Meeting(ranks).agree() == [""] * 3
    meet(ranks[0], source, 8)
    with pytest.raises(ValueError, match="3 of 200 documents cannot be read"):
        meet(ranks[1], source, 9)  # knows of two that others met
    (said,) = set(Meeting(ranks).agree())
    assert said == (
        "data: s: 3 of 200 documents cannot be read, more than data.broken_share 0.01; the last: item 9: expected good "
        "(all of them: unimodal data check)"
    )


def one_of_two(rank: int, folder: str) -> None:
    """A process that meets a broken document of its own, and writes down what it knows then."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    exchange, broken = Exchange.over_ranks(), BrokenItems(0.02, {"s": 100, "t": 50})
    broken.add("s", 10 + rank, BrokenDocument(f"item {rank}", "expected good"))
    for _ in range(2):  # the second time nobody has news
        broken.pack("t")
        broken.agree(exchange.total(broken.news()), exchange.gather)
    torch.save([broken.state(broken.mark()), exchange.gather(rank)], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_know_the_same(tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(one_of_two, (str(tmp_path),), nprocs=2, start_method="fork")
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert first == second
    state, ranks = first
    assert ranks == [0, 1]
    assert {key: state["s"][key] for key in ("packed", "broken", "items")} == {"packed": 0, "broken": 2, "items": [10, 11]}
    assert len(state["s"]["names"]) == 2
    assert state["t"] == {"packed": 4, "broken": 0, "long": 0, "items": [], "names": []}


def test_what_one_rank_named_no_other_names_again(caplog: pytest.LogCaptureFixture) -> None:
    source = Numbered(200, bad=(5,))
    ranks = [BrokenItems(0.01, {"s": 200}) for _ in range(2)]
    with caplog.at_level(logging.WARNING):
        for rank in ranks:
            meet(rank, source, 5)
            Meeting(ranks).agree()
        meet(BrokenItems(0.01, {"s": 200}, ranks[1].state(ranks[1].mark())), source, 5)
    assert [record.getMessage() for record in caplog.records] == ["data: s: skipped item 5: expected good"]


def test_a_broken_document_travels_between_processes() -> None:
    error = pickle.loads(pickle.dumps(BrokenDocument("a", "b")))
    assert (str(error), error.name, error.reason) == ("a: b", "a", "b")


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


# ---- other documents at resume


def test_a_source_is_told_from_others_with_as_many_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By names and sizes of files, wherever they lie; nothing of what they hold is read."""
    pytest.importorskip("datasets")
    here, there = tmp_path / "here", tmp_path / "there"
    img2dataset(here / "tar")
    write_jsonl(here / "a.jsonl", [{"text": f"line {n}"} for n in range(9)])
    parquet_rows(here / "rows.parquet", caption_rows(9))
    image_folder(here / "named")
    for n in range(4):
        (here / "mine").mkdir(exist_ok=True)
        (here / "mine" / f"{n}.png").write_bytes(png(n))
        (here / "mine" / f"{n}.txt").write_text(f"shade {n}")
    shutil.copytree(here / "mine", here / "listed")
    write_jsonl(here / "listed" / "list.jsonl", [{"image": f"{n}.png", "caption": f"shade {n}"} for n in range(4)])
    shutil.copytree(here, there)

    def sources(root: Path) -> dict[str, Source]:
        return {
            "tar": TarSource(str(root / "tar")), "jsonl": JsonlSource(str(root / "a.jsonl")),
            "parquet": ParquetSource(str(root / "rows.parquet")), "named": HuggingFaceSource(str(root / "named")),
            "mine": FolderSource(root / "mine", "all"), "listed": FolderSource(root / "listed", "all"),
            "some": MixtureData(1, {"x": Entry(FolderSource(root / "mine", "all"))}).training_sources()[0].source,
            "stream": HuggingFaceSource(str(root / "named"), streaming=True, documents=4),
        }  # fmt: skip

    def identities(root: Path) -> dict[str, str]:
        return {name: identity(source) for name, source in sources(root).items()}

    before = identities(here)
    assert before == identities(there)
    assert len(set(before.values())) == len(before)
    assert before["tar"].startswith("TarSource, 8 documents, 2 files of ")
    (there / "mine" / "2.txt").write_bytes(b"\xff")  # broken just now: no reason to stop a run
    (there / "listed" / "1.png").unlink()
    (there / "named" / "sub" / "1.png").unlink()
    assert before == identities(there)
    (there / "tar" / "00001.tar").rename(there / "tar" / "00002.tar")
    write_jsonl(there / "a.jsonl", [{"text": f"line  {n}"} for n in range(9)])
    parquet_rows(there / "rows.parquet", [{**row, "caption": "another"} for row in caption_rows(9)])
    write_jsonl(there / "named" / "metadata.jsonl", [{"file_name": f"sub/{n}.png", "text": "x"} for n in (0, 0, 2, 3, 4, 5)])
    for suffix in ("png", "txt"):
        (there / "mine" / f"3.{suffix}").rename(there / "mine" / f"7.{suffix}")
    write_jsonl(there / "listed" / "list.jsonl", [{"image": "0.png", "caption": f"no. {n}"} for n in range(4)])
    after = identities(there)
    assert not set(before.values()) & set(after.values())
    counts = [[one.split(", ")[1] for one in some.values()] for some in (before, after)]
    assert counts[0] == counts[1]  # by their numbers, nothing could be told
    assert identity(Numbered(3)) == "Numbered, 3 documents"


def test_what_is_held_out_is_part_of_what_is_trained_on() -> None:
    chosen = np.random.default_rng(0).permutation(40) < 20
    ones = {identity(Slice("a", Numbered(40), some)) for some in (chosen, ~chosen, np.ones(40, dtype=bool))}
    assert len(ones) == 3


def trained(sources: dict[str, Source], state: dict[str, Any] | None, model: UnifiedModel) -> MixtureData:
    """The data of a run that begins, or goes on from a state."""
    data = MixtureData(64, {name: Entry(source) for name, source in sources.items()}, {"v": Entry(Numbered(3))})
    data.trainer = Mock(limit_train_batches=1.0, fast_dev_run=False, global_rank=0, world_size=1, accumulate_grad_batches=1)
    data.trainer.lightning_module.model = model  # type: ignore[union-attr]
    if state is not None:
        data.load_state_dict(state)
    data.train_dataloader()
    return data


def test_a_run_goes_on_with_its_own_sources_only(make: Callable[..., UnifiedModel], tmp_path: Path) -> None:
    model = make("flow", context_length=64)
    one, other = (TarSource(str(img2dataset(tmp_path / name))) for name in ("one", "other"))
    state = trained({"a": Numbered(9), "b": one}, None, model).state_dict()
    assert state["sources"]["b"] == identity(one)
    assert trained({"a": Numbered(9), "b": other}, state, model).state_dict() == state  # copied to another place
    os.truncate(tmp_path / "other" / "00001.tar", (tmp_path / "other" / "00001.tar").stat().st_size - 512)
    changed = TarSource(str(tmp_path / "other"))
    assert len(changed) == len(one)
    for sources, name, expected, got in (
        ({"a": Numbered(9), "b": changed}, "b", identity(one), identity(changed)),
        ({"a": Numbered(9), "c": one}, "b", identity(one), "no such source"),
        ({"a": Numbered(9), "b": one, "c": one}, "c", "no such source", identity(one)),
        ({"a": Numbered(8), "b": one}, "a", "Numbered, 9 documents", "Numbered, 8 documents"),
    ):
        said = f"data: {name}: expected, as in the checkpoint, {expected}; got {got}; an export (init) can be trained on"
        with pytest.raises(ValueError, match="^" + re.escape(said)):
            trained(sources, state, model)
    old = {key: state[key] for key in ("lanes", "counts", "seed")}  # of before such things were kept
    assert trained({"a": Numbered(9), "b": changed}, old, model).state_dict()["left_out"] == state["left_out"]


# ---- Hugging Face datasets


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder of `save_to_disk`, and beside it one of Parquet files."""
    datasets = pytest.importorskip("datasets")
    parquet_rows(tmp_path / "files" / "train.parquet", caption_rows(10))
    rows = datasets.Dataset.from_list(caption_rows(10)).cast_column("image", datasets.Image())
    rows.save_to_disk(str(tmp_path / "saved"))
    return tmp_path


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


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
    data = MixtureData(1, {"s": Entry(source)}, {"v": Entry(Numbered(3))})
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
    write_jsonl(folder / "metadata.jsonl", [{"file_name": "sub/0.png", "text": "a"}, {"file_name": outside, "text": "b"}])
    with pytest.raises(ValueError, match=r"path: expected a data set with the split train, got .*real: Invalid metadata"):
        HuggingFaceSource(str(folder))


def test_a_link_out_of_a_folder_of_images_is_not_followed(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    folder = image_folder(tmp_path / "real", "jsonl", {2: None})
    (tmp_path / "outside.png").write_bytes(png(2))
    (folder / "sub" / "2.png").symlink_to(tmp_path / "outside.png")
    with pytest.raises(BrokenDocument, match=r"row 2: .*expected a file inside the folder"):
        HuggingFaceSource(str(folder)).document(2, RNG)


def test_an_unreadable_source_is_refused_where_it_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{\n{\n")
    with pytest.raises(ValueError, match="expected at least one record that can be read, got none"):
        JsonlSource(str(tmp_path / "a.jsonl"))
