"""What cannot be read: counted over ranks and resumes, named once, and a run that stops for it."""

import itertools
import logging
import pickle
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_formats import Plain
from hypothesis import given, settings
from hypothesis import strategies as st
from stream_cases import Numbered, Room, Thread, assert_same, packing

from unimodal.data.broken import ALLOWED, ENOUGH, NAMED, BrokenItems, Exchange
from unimodal.data.source import BrokenDocument
from unimodal.data.stream import Mixture, PackStream, Weighted
from unimodal.documents import Document, Part
from unimodal.model import UnifiedModel
from unimodal.packing import Lanes, PackedSequence

RNG = np.random.default_rng(0)
Make = Callable[..., UnifiedModel]


# ---- counts


def run_through(source: Plain, share: float, rounds: int = 1) -> BrokenItems:
    broken = BrokenItems(share, {"s": len(source)})
    for index in [*range(len(source))] * rounds:
        meet(broken, source, index)
    return broken


def meet(broken: BrokenItems, source: Plain, index: int) -> None:
    try:
        source.document(index, RNG)
        broken.pack("s")
    except BrokenDocument as error:
        broken.add("s", index, error)


def test_broken_items_are_named_once_and_counted_each_time(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert run_through(Plain(200, [5, 7]), share=0.01, rounds=4).total == 8
    assert [record.getMessage() for record in caplog.records] == [
        "data: s: skipped item 5: expected good", "data: s: skipped item 7: expected good"
    ]  # fmt: skip


def test_above_the_share_the_run_stops_and_says_so() -> None:
    with pytest.raises(ValueError, match=r"data: s: 3 of 200 documents cannot be read, more than data.broken_share 0.01; "
                       r"the last: item 9: expected good \(all of them: unimodal data check\)"):  # fmt: skip
        run_through(Plain(200, [5, 7, 9]), share=0.01)
    with pytest.raises(ValueError, match="1 of 3 documents"):
        run_through(Plain(3, [2]), share=0.0)


def test_a_source_that_fails_altogether_stops_long_before_its_end() -> None:
    broken = BrokenItems(0.01, {"s": 10**9})
    for index in range(ALLOWED):
        broken.add("s", index, BrokenDocument(f"item {index}", "expected it to be there"))
    with pytest.raises(ValueError, match="21 of 21 documents read"):
        broken.add("s", ENOUGH, BrokenDocument("another", "expected it to be there"))
    broken = BrokenItems(0.01, {"s": 10**9})
    for index in range(ENOUGH // 2):
        broken.add("s", index, BrokenDocument("the disk", "expected it to be there"))
    with pytest.raises(ValueError, match="501 of 501 documents read"):
        broken.add("s", ENOUGH, BrokenDocument("the disk", "expected it to be there"))


@pytest.mark.parametrize("share", [0.8, 1.0])
def test_a_share_above_a_half_is_what_was_asked_for(share: float) -> None:
    broken = BrokenItems(share, {"s": 10**9})
    for index in range(3000):
        if index % 5 < 2:
            broken.pack("s")
        else:
            broken.add("s", index, BrokenDocument("the disk", "expected it to be there"))
    assert broken.total == 1800


@pytest.mark.parametrize("share", [0.0005, 0.01])
def test_chance_stops_no_run_that_has_half_the_share(share: float) -> None:
    """Twenty runs over 20,000 documents."""
    for seed in range(20):
        broken, rng = BrokenItems(share, {"s": 10**9}), np.random.default_rng(seed)
        for index in np.flatnonzero(rng.random(20_000) < share / 2).tolist():
            broken._counts["s"].packed = index - broken.total
            broken.add("s", index, BrokenDocument(f"item {index}", "expected it to be there"))


def test_what_is_too_long_is_named_a_thousand_times(recwarn: pytest.WarningsRecorder) -> None:
    broken = BrokenItems(0.01, {"s": 10**9})
    for index in range(NAMED + 500):
        broken.leave_out("s", f"document {index}")
    said = [str(one.message) for one in recwarn]
    assert said == [
        *(f"document {i}" for i in range(NAMED)),
        f"data: s: {NAMED} documents were too long; more are counted, not named",
    ]
    assert broken.skipped == {"s": NAMED + 500}


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
    source = Plain(40, bad=range(0, 40, 3))
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
    source = Plain(200, bad=(5, 7, 9))
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
    assert {key: state["s"][key] for key in ("packed", "broken", "items")} == {
        "packed": 0,
        "broken": 2,
        "items": [10, 11],
    }
    assert len(state["s"]["names"]) == 2
    assert state["t"] == {"packed": 4, "broken": 0, "long": 0, "items": [], "names": []}


def test_what_one_rank_named_no_other_names_again(caplog: pytest.LogCaptureFixture) -> None:
    source = Plain(200, bad=(5,))
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


# ---- streams


class Faulty(Numbered):
    """Of its documents those in `bad` are broken, and those in `long` too long."""

    def __init__(self, kind: str, count: int, bad: Sequence[int] = (), long: Sequence[int] = ()) -> None:
        super().__init__(kind, count)
        self.bad, self.long = bad, long

    def document(self, index: int, rng: np.random.Generator) -> Document:
        if index in self.bad:
            raise BrokenDocument(f"{self.kind} {index}", "expected good")
        return Document((Part("x" * 200),), self.kind) if index in self.long else super().document(index, rng)


FAULTY = (Weighted(Faulty("a", 7, bad=(2, 5), long=(3,))), Weighted(Faulty("b", 5, bad=(1,))))


Ended = tuple[list[PackedSequence], dict[str, Any], str]


def run_ranks(
    model: UnifiedModel, sources: Sequence[Weighted], position: Lanes, left_out: dict[str, Any], ranks: int, packs: int,
    share: float = 1.0, ahead: int = 0, accumulate: int = 1,
) -> list[Ended]:  # fmt: skip
    """Of every rank: its packs, the state behind them, though more was read ahead, and what stopped it."""
    room = Room(ranks)

    def run(rank: int) -> Ended:
        reading = PackStream(
            Mixture(sources, 3), packing(model, 120, 3), position, rank=rank, ranks=ranks, accumulate=accumulate,
            broken_share=share, left_out=left_out, exchange=Thread(room, rank),
        )  # fmt: skip
        found: list[PackedSequence] = []
        try:
            for one in itertools.islice(reading, packs + ahead):
                found.append(one)
        except ValueError as error:
            return found, {}, str(error)
        return found[:packs], reading.broken.state(found[packs - 1].left_out), ""

    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(run, range(ranks)))


def gone_on(ended: list[Ended]) -> tuple[Lanes, dict[str, Any]]:
    """What a checkpoint has."""
    (state,) = [s for i, (_, s, _) in enumerate(ended) if s not in [t for _, t, _ in ended[:i]]]  # alike on all of them
    return tuple(
        lane for lanes in zip(*(packs[-1].position for packs, *_ in ended), strict=True) for lane in lanes
    ), state


@pytest.mark.filterwarnings("ignore:document")
def test_what_was_left_out_is_counted_on_as_if_never_stopped(make: Make) -> None:
    model = make("flow", context_length=64, drop_text=0.0)
    whole = run_ranks(model, FAULTY, (), {}, ranks=2, packs=9)
    position, state = gone_on(run_ranks(model, FAULTY, (), {}, ranks=2, packs=4, ahead=2))
    assert state["a"]["broken"] > 0
    resumed = run_ranks(model, FAULTY, position, state, ranks=2, packs=5)
    assert gone_on(resumed) == gone_on(whole)
    for (a, *_), (b, *_) in zip(whole, resumed, strict=True):
        for one, other in zip(a[4:], b, strict=True):
            assert_same(one, other)


@pytest.mark.filterwarnings("ignore:document")
@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 2), st.integers(1, 2)), min_size=1, max_size=3))
@settings(max_examples=6, deadline=None)
def test_every_number_is_counted_once_on_any_lanes(make: Make, steps: list[tuple[int, int, int]]) -> None:
    """Packed, broken or too long, once, wherever the run was stopped and on however many lanes it went on."""
    model = make("flow", context_length=64, drop_text=0.0)
    position, state = (), {}
    for ranks, accumulate, count in steps:
        ended = run_ranks(
            model, FAULTY, position, state, ranks, count * accumulate, ahead=accumulate, accumulate=accumulate
        )
        position, state = gone_on(ended)
    mixture, begun = Mixture(FAULTY, 3), max(lane[0] for lane in position)
    coming = {n for lane in position for n in (*lane[1:], *range(lane[0], begun, len(position)))}
    done = [mixture.place(n) for n in range(begun) if n not in coming]
    for s, weighted in enumerate(FAULTY):
        source, of_source = weighted.source, [place.document for place in done if place.source == s]
        broken, long = ([i for i in of_source if i in some] for some in (source.bad, source.long))
        kept = state[source.kind]
        assert (kept["broken"], kept["long"], kept["items"]) == (len(broken), len(long), sorted(set(broken)))
        assert kept["packed"] == len(of_source) - len(broken) - len(long)


def test_all_ranks_stop_with_one_rank_and_its_line(make: Make) -> None:
    """Rank 0 of two reads the even numbers: it alone meets what is broken."""
    model = make("flow", context_length=64, drop_text=0.0)
    order_of = Mixture([Weighted(Numbered("a", 60))], 3)
    bad = [order_of.place(n).document for n in (30, 36, 42)]
    source = [Weighted(Faulty("a", 60, bad))]
    ended = run_ranks(model, source, (), {}, ranks=2, packs=30, share=0.04)
    assert len({len(packs) for packs, *_ in ended}) == 1
    assert 0 < len(ended[0][0]) < 30
    (said,) = {error for *_, error in ended}
    assert said.startswith("data: a: 3 of 60 documents cannot be read, more than data.broken_share 0.04; the last: a ")
    assert run_ranks(model, source, (), {}, ranks=2, packs=9, share=0.05)[0][2] == ""
    # Each has one more than may be of what the other has: together they are too many, and none by itself.
    two = [Weighted(Faulty("a", 60, [order_of.place(n).document for n in (4, 5)]))]
    ended = run_ranks(model, two, (), {}, ranks=2, packs=30, share=0.02)
    assert len({(len(packs), error) for packs, _, error in ended}) == 1
    assert "2 of 60 documents cannot be read" in ended[0][2]
