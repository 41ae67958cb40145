"""Mixtures of any sources: rounds, what is held out, and that a run goes on with its own."""

import os
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from data_formats import Plain, caption_rows, image_folder, img2dataset, parquet_rows, png, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning import Trainer

from unimodal.data import FolderSource, HuggingFaceSource, JsonlSource, MixtureData, ParquetSource, TarSource
from unimodal.data.mixture import Entry, Slice
from unimodal.data.order import mixed_order, round_order
from unimodal.data.source import Source, identity
from unimodal.model import UnifiedModel

RNG = np.random.default_rng(0)


@given(st.integers(1, 9), st.integers(1, 25), st.integers(0, 6))
@settings(max_examples=50, deadline=None)
def test_a_source_gives_all_its_documents_before_any_comes_again_across_epochs(n: int, count: int, epochs: int) -> None:
    row = [i for epoch in range(epochs) for i in round_order(Plain(n), epoch * count, count, (7,))]
    assert row == round_order(Plain(n), 0, epochs * count, (7,)).tolist()
    for r in range(len(row) // n):
        assert sorted(row[r * n : (r + 1) * n]) == list(range(n))


def test_sources_take_turns_and_keep_their_own_order() -> None:
    sources: list[Source] = [Plain(30), Plain(50)]
    turns, index = mixed_order(sources, [30, 50], seed=3, epoch=2)
    assert Counter(turns.tolist()) == {0: 30, 1: 50}
    for s, count in ((0, 30), (1, 50)):
        assert index[turns == s].tolist() == round_order(sources[s], 2 * count, count, (3, s, 1)).tolist()
    assert len(set(turns[:10].tolist())) == 2
    again = mixed_order(sources, [30, 50], seed=3, epoch=2)
    assert (turns.tolist(), index.tolist()) == (again[0].tolist(), again[1].tolist())


def test_what_is_held_out_is_never_trained_on_and_more_data_moves_none_of_it() -> None:
    def sides(n: int) -> tuple[set[str], set[str]]:
        data = MixtureData(1, {"a": Entry(Plain(n))}, validation_share=0.2)
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
        ({"sources": {"a": Entry(Plain(1))}}, "data.sources.a: expected at least two"),
        (
            {"sources": {"a": Entry(Plain(3), -1.0)}},
            r"data\.sources\.a\.weight: expected a number of 0 or more, got -1\.0",
        ),
        (
            {"sources": {"a": Entry(Plain(3))}, "validation": {"b": Entry(Plain(3), -1.0)}},
            r"data\.validation\.b\.weight: expected",
        ),
        ({"sources": {"a": Entry(Plain(3))}, "validation_share": 0.0}, "data.validation_share"),
        ({"sources": {"a": Entry(Plain(3))}, "broken_share": 2.0}, "data.broken_share"),
        ({"sources": {"a": Entry(Plain(3))}, "prompts": -3}, "data.prompts: expected 0 or more, got -3"),
        ({"sources": {"a": Entry(Plain(3))}, "validation_documents": -5}, "data.validation_documents: expected 0"),
    ):
        with pytest.raises(ValueError, match=message):
            MixtureData(1, **settings_)  # type: ignore[arg-type]


def test_a_source_of_weight_zero_may_be_any() -> None:
    for sources in (
        {"a": Entry(Plain(9), 1.0), "b": Entry(Plain(1), 0.0)},
        {"a": Entry(Plain(9), 1.0), "b": Entry(Endless(), 0.0)},
    ):
        data = MixtureData(1, sources)
        assert [source.kind for source in data.validation_sources()] == ["a"]


class Endless(Plain):
    """A stream."""

    endless = True

    def __init__(self) -> None:
        super().__init__(5)


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
    write_jsonl(
        there / "named" / "metadata.jsonl", [{"file_name": f"sub/{n}.png", "text": "x"} for n in (0, 0, 2, 3, 4, 5)]
    )
    for suffix in ("png", "txt"):
        (there / "mine" / f"3.{suffix}").rename(there / "mine" / f"7.{suffix}")
    write_jsonl(there / "listed" / "list.jsonl", [{"image": "0.png", "caption": f"no. {n}"} for n in range(4)])
    after = identities(there)
    assert not set(before.values()) & set(after.values())
    counts = [[one.split(", ")[1] for one in some.values()] for some in (before, after)]
    assert counts[0] == counts[1]  # by their numbers, nothing could be told
    assert identity(Plain(3)) == "Plain, 3 documents"


def test_what_is_held_out_is_part_of_what_is_trained_on() -> None:
    chosen = np.random.default_rng(0).permutation(40) < 20
    ones = {identity(Slice("a", Plain(40), some)) for some in (chosen, ~chosen, None)}
    assert len(ones) == 3


def trained(sources: dict[str, Source], state: dict[str, Any] | None, model: UnifiedModel) -> MixtureData:
    """The data of a run that begins, or goes on from a state."""
    data = MixtureData(64, {name: Entry(source) for name, source in sources.items()}, {"v": Entry(Plain(3))})
    data.trainer = Mock(
        spec=Trainer, limit_train_batches=1.0, fast_dev_run=False, global_rank=0, world_size=1,
        accumulate_grad_batches=1, lightning_module=Mock(model=model),
    )  # fmt: skip
    if state is not None:
        data.load_state_dict(state)
    data.train_dataloader()
    return data


def test_a_run_goes_on_with_its_own_sources_only(make: Callable[..., UnifiedModel], tmp_path: Path) -> None:
    model = make("flow", context_length=64)
    one, other = (TarSource(str(img2dataset(tmp_path / name))) for name in ("one", "other"))
    state = trained({"a": Plain(9), "b": one}, None, model).state_dict()
    assert state["sources"]["b"] == identity(one)
    assert trained({"a": Plain(9), "b": other}, state, model).state_dict() == state  # copied to another place
    os.truncate(tmp_path / "other" / "00001.tar", (tmp_path / "other" / "00001.tar").stat().st_size - 512)
    changed = TarSource(str(tmp_path / "other"))
    assert len(changed) == len(one)
    for sources, name, expected, got in (
        ({"a": Plain(9), "b": changed}, "b", identity(one), identity(changed)),
        ({"a": Plain(9), "c": one}, "b", identity(one), "no such source"),
        ({"a": Plain(9), "b": one, "c": one}, "c", "no such source", identity(one)),
        ({"a": Plain(8), "b": one}, "a", "Plain, 9 documents", "Plain, 8 documents"),
    ):
        said = (
            f"data: {name}: expected, as in the checkpoint, {expected}; got {got}; an export (init) can be trained on"
        )
        with pytest.raises(ValueError, match="^" + re.escape(said)):
            trained(sources, state, model)
    with pytest.raises(ValueError, match="data: expected sources in the order a, b, as in the checkpoint, got b, a"):
        trained({"b": one, "a": Plain(9)}, state, model)
    old = {key: state[key] for key in ("lanes", "counts", "seed")}  # of before such things were kept
    assert trained({"a": Plain(9), "b": changed}, old, model).state_dict()["left_out"] == state["left_out"]


def test_files_that_datasets_leaves_behind_make_no_other_source(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    image_folder(tmp_path / "a")
    before = identity(HuggingFaceSource(str(tmp_path / "a")))
    (tmp_path / "a" / ".cache").mkdir()
    for name in ("README.md", "cache-1.arrow", ".cache/x.lock", ".cache/x"):
        (tmp_path / "a" / name).write_bytes(b"x")
    assert identity(HuggingFaceSource(str(tmp_path / "a"))) == before


def test_one_of_two_folders_may_move(tmp_path: Path) -> None:
    for name in ("one", "two"):
        img2dataset(tmp_path / name)
    before = identity(TarSource([str(tmp_path / "one"), str(tmp_path / "two")]))
    shutil.move(tmp_path / "two", tmp_path / "further" / "down")
    assert identity(TarSource([str(tmp_path / "one"), str(tmp_path / "further" / "down")])) == before


def test_an_unreadable_source_is_refused_where_it_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{\n{\n")
    with pytest.raises(ValueError, match="expected at least one record that can be read, got none"):
        JsonlSource(str(tmp_path / "a.jsonl"))
