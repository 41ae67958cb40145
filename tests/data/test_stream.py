"""The stream of packs: whole epochs, budgets, positions, ranks."""

import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from stream_cases import SEVEN_AND_FIVE, Numbered, assert_same, order, packing, stream, take, texts

from unimodal.data.broken import Exchange
from unimodal.data.source import BrokenDocument, Source
from unimodal.data.stream import Mixture, Packing, PackStream, Weighted, deal, validation_packs
from unimodal.documents import Document, Part
from unimodal.model import UnifiedModel
from unimodal.packing import Lanes, PackedSequence

Make = Callable[..., UnifiedModel]


# ---- the mixture


def test_numbered_is_a_source() -> None:
    assert isinstance(Numbered("a", 3), Source)


@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_every_document_once_an_epoch_when_weights_are_lengths(epoch: int) -> None:
    mixture = Mixture([Weighted(Numbered("a", 7), 0.7), Weighted(Numbered("b", 30), 3.0)], seed=1)
    found = order(mixture, epoch)
    assert len(found) == len(mixture) == 37
    assert sorted((s, i) for s, i, _ in found) == [(0, i) for i in range(7)] + [(1, i) for i in range(30)]
    assert sorted(slot for *_, slot in found) == list(range(37))


def test_without_weights_an_epoch_is_every_document_once() -> None:
    mixture = Mixture(
        [Weighted(Numbered("a", 7)), Weighted(Numbered("b", 30)), Weighted(Numbered("c", 9), 0.0)], seed=1
    )
    assert mixture.counts == [7, 30]
    for epoch in (0, 1, 5):
        found = order(mixture, epoch)
        assert sorted((s, i) for s, i, _ in found) == [(0, i) for i in range(7)] + [(1, i) for i in range(30)]
        assert [s for s, *_ in found] != sorted(s for s, *_ in found)  # sources are mixed


def test_weights_of_some_sources_only_are_refused() -> None:
    sources = [Weighted(Numbered("a", 7)), Weighted(Numbered("b", 5), 2.0), Weighted(Numbered("c", 5), 0.0)]
    with pytest.raises(
        ValueError, match="expected a weight for every source or for none, got one for b and none for a"
    ):
        Mixture(sources, 1)
    with pytest.raises(ValueError, match="data: expected documents of source a, got none"):
        Mixture([Weighted(Numbered("a", 0)), *sources[:1]], 1)
    for weight in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="data: expected a weight of at least 0 for a, got"):
            Weighted(Numbered("a", 7), weight)


@given(st.lists(st.tuples(st.integers(1, 12), st.floats(0.05, 20)), min_size=1, max_size=4), st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_with_weights_no_document_is_given_twice_more_than_another(
    given_: list[tuple[int, float]], epochs: int
) -> None:
    """What an epoch is with weights: so many documents as there are, each source's share of them, rounds that go on."""
    mixture = Mixture([Weighted(Numbered(f"s{i}", n), weight) for i, (n, weight) in enumerate(given_)], seed=2)
    size, total = sum(n for n, _ in given_), sum(weight for _, weight in given_)
    assert mixture.counts == [max(1, round(size * weight / total)) for _, weight in given_]
    assert abs(len(mixture) - size) <= len(given_)
    places = [mixture.place(number) for number in range(epochs * len(mixture))]
    for s, (n, _) in enumerate(given_):
        of_source = [place for place in places if place.source == s]
        assert Counter(place.epoch for place in of_source) == dict.fromkeys(range(epochs), mixture.counts[s])
        times = Counter(place.document for place in of_source)
        assert {times[i] for i in range(n)} <= {len(of_source) // n, -(-len(of_source) // n)}


def test_shares_are_those_of_the_weights() -> None:
    mixture = Mixture(
        [Weighted(Numbered("a", 10), 3.0), Weighted(Numbered("b", 50), 1.0), Weighted(Numbered("c", 9), 0.0)], 1
    )
    assert mixture.counts == [45, 15]  # three to one of 60; a weight of 0 is no source
    times = Counter((s, i) for s, i, _ in order(mixture, 0))
    assert {n for (s, _), n in times.items() if s == 0} == {4, 5}  # all of its own before any comes again
    assert {n for (s, _), n in times.items() if s == 1} == {1}
    slots = Counter((s, slot) for s, _, slot in order(mixture, 0))
    assert set(slots.values()) == {1}  # a document that comes twice is drawn differently
    seen = {i for e in range(40) for s, i, _ in order(mixture, e) if s == 1}
    assert seen == set(range(50))


def test_order_is_a_function_of_seed_and_epoch() -> None:
    def of(seed: int, epoch: int) -> list[tuple[int, int, int]]:
        return order(Mixture([Weighted(Numbered("a", 20), 1.0), Weighted(Numbered("b", 20), 1.0)], seed), epoch)

    assert of(1, 2) == of(1, 2)
    assert of(1, 2) != of(1, 3)
    assert of(1, 2) != of(2, 2)
    assert [s for s, *_ in of(1, 2)] != sorted(s for s, *_ in of(1, 2))  # sources are mixed
    mixture = Mixture([Weighted(Numbered("a", 20), 1.0), Weighted(Numbered("b", 20), 1.0)], 1)
    assert [order(mixture, epoch) for epoch in (3, 0, 2, 1)] == [of(1, epoch) for epoch in (3, 0, 2, 1)]


def test_a_tiny_weight_still_gives_a_document() -> None:
    assert Mixture([Weighted(Numbered("a", 50), 1.0), Weighted(Numbered("b", 5), 1e-6)], 0).counts == [55, 1]


def test_no_source_is_refused() -> None:
    for sources in ([], [Weighted(Numbered("a", 5), 0.0)]):
        with pytest.raises(ValueError, match="data: expected at least one source with a weight above 0"):
            Mixture(sources, 0)


# ---- packs


def test_a_pack_smaller_than_a_document_is_refused(make: Make) -> None:
    model = make("flow", context_length=64)
    assert packing(model, 64).tokens == 64
    with pytest.raises(ValueError, match=r"data\.batch_tokens: expected at least sequence\.context_length 64, got 63"):
        packing(model, 63)


@pytest.mark.parametrize("waiting", [1, 2, 5, 40])
@pytest.mark.parametrize("tokens", [64, 65, 120, 300])
def test_packs_are_the_best_fits_by_the_slow_way(make: Make, tokens: int, waiting: int) -> None:
    """Number by number, with nothing but lengths."""
    model = make("flow", context_length=64)
    source = Weighted(Numbered("a", 20, longer=6, every=3), 1.0)
    packs = take(stream(model, source, tokens=tokens, waiting=waiting), 12)
    mixture, documents = Mixture([source], 3), {}
    for number in range(400):
        _, epoch, _, index, slot = mixture.place(number)
        key = (3, epoch, slot)
        documents[number] = model.sequencer.document(source.source.document(index, np.random.default_rng(key)), key)
    lengths, ahead = {n: d.length for n, d in documents.items()}, sorted(documents)
    for one in packs:
        held = [ahead[0]]
        while True:
            seen = [n for n in ahead if n not in held][:waiting]
            fitting = [n for n in seen if lengths[n] <= tokens - sum(lengths[h] for h in held)]
            if not fitting:
                break
            epoch = min(fitting) // 20
            held.append(max((n for n in fitting if n // 20 == epoch), key=lambda n: (lengths[n], -n)))
        assert list(one.numbers) == held
        assert len(one) == sum(one.table.document_lengths) == sum(lengths[n] for n in held) <= tokens
        assert one.kinds == {"a": len(one)}
        ahead = [n for n in ahead if n not in held]


def test_an_epoch_holds_every_document(make: Make) -> None:
    model = make("flow", context_length=64, drop_text=0.0)
    packs = take(stream(model), 30)
    said = {n: text for p in packs for n, text in zip(p.numbers, texts(model, p), strict=True)}
    assert len(said) == sum(p.documents for p in packs) > 60  # no number comes twice
    everything = sorted([f"a {i}" for i in range(7)] + [f"b {i}" for i in range(5)])
    for epoch in range(4):
        assert sorted(said[n] for n in range(12 * epoch, 12 * epoch + 12)) == everything
    assert [said[n] for n in range(12)] != [said[n] for n in range(12, 24)]
    # An epoch ends before the next begins, but for what fills up its last packs.
    finished = [max(i for i, p in enumerate(packs) if any(n // 12 == e for n in p.numbers)) for e in range(4)]
    begun = [min(i for i, p in enumerate(packs) if any(n // 12 == e for n in p.numbers)) for e in range(5)]
    assert all(begun[e + 1] >= finished[e] - 1 for e in range(4))


class Skewed(Numbered):
    """Many short texts, some long ones, and images: lengths over two orders of magnitude, mostly short."""

    def document(self, index: int, rng: np.random.Generator) -> Document:
        words = int(np.clip(np.random.default_rng((7, index)).lognormal(3.5, 1.2), 1, 900))
        parts = (Part("x" * words),)
        image = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        return Document((*parts, Part(image)) if index % 3 == 0 else parts, self.kind)


def test_packs_of_a_skewed_mix_hold_98_percent_real_tokens(make: Make) -> None:
    model = make("flow", context_length=1024)
    share = {}
    for waiting in (1, 32):
        packs = take(stream(model, Weighted(Skewed("a", 2000), 1.0), tokens=1024, waiting=waiting), 40)
        share[waiting] = sum(len(p) for p in packs) / (40 * 1024)
    assert share[32] >= 0.98 > share[1]  # in the order of reading it is less
    lengths = [n for p in packs for n in p.table.document_lengths]
    assert max(lengths) > 15 * np.median(lengths)
    assert Packing.__dataclass_fields__["waiting"].default == 32


def test_no_document_waits_for_ever(make: Make) -> None:
    model = make("flow", context_length=1024)
    packs = take(stream(model, Weighted(Skewed("a", 2000), 1.0), tokens=1024, waiting=8), 60)
    for i, p in enumerate(packs):
        oldest = min(n for later in packs[i:] for n in later.numbers)
        assert p.numbers[0] == oldest
        assert max(p.numbers) - oldest < 8 * 16


def test_no_document_is_split(make: Make) -> None:
    model = make("flow", context_length=64, drop_text=0.0)
    alone = {
        place.number: model.sequencer.document(
            SEVEN_AND_FIVE[place.source].source.document(place.document, np.random.default_rng(key)), key
        ).length
        for place in map(Mixture(SEVEN_AND_FIVE, 3).place, range(60))
        for key in [(3, place.epoch, place.slot)]
    }
    for p in take(stream(model), 12):
        assert list(p.table.document_lengths) == [alone[n] for n in p.numbers]


def test_a_missing_modality_is_harmless(make: Make) -> None:
    """Text alone, images alone, and packs of either beside each other."""
    model = make("flow", context_length=64, drop_text=0.0)
    mixed = [Weighted(Numbered("words", 6, image=False), 1.0), Weighted(Numbered("pictures", 6), 1.0)]
    for sources in ([mixed[0]], [mixed[1]], mixed):
        for p in take(stream(model, *sources, tokens=64, accumulate=2), 8):
            terms = model(p)
            assert sum(p.kinds.values()) == len(p)
            assert set(p.kinds) <= {w.source.kind for w in sources}
            assert ("pictures" in p.kinds) == (p.counts["image"] > 0)
            assert all(torch.isfinite(term.sum) for term in terms.values())
            if "pictures" not in p.kinds:
                assert float(terms["image"].sum.detach()) == 0


def test_a_stream_is_the_same_twice(make: Make) -> None:
    model = make("flow", context_length=64)
    for a, b in zip(take(stream(model), 8), take(stream(model), 8), strict=True):
        assert_same(a, b)
    other = take(stream(model, seed=4), 1)[0]
    assert not torch.equal(other.images[0][:1], take(stream(model), 1)[0].images[0][:1])


@pytest.mark.parametrize("generator", ["flow", "autoregressive"])
def test_resuming_anywhere_goes_on_bit_for_bit(make: Make, generator: str) -> None:
    model = make(generator, context_length=64)
    whole = take(stream(model), 14)
    assert max(whole[-1].numbers) >= 24  # into the third epoch
    for n, one in enumerate(whole[:-3]):
        assert len(one.position[0]) == 6  # the next number and five that wait
        resumed = take(stream(model, position=one.position), len(whole) - n - 1)
        for a, b in zip(whole[n + 1 :], resumed, strict=True):
            assert_same(a, b)


def test_resuming_steps_of_many_packs(make: Make) -> None:
    model = make("flow", context_length=64)
    whole = [take(stream(model, ranks=2, accumulate=3, rank=r), 12) for r in range(2)]
    for step in range(1, 4):
        ends = [packs[3 * step - 1].position for packs in whole]
        assert {p.position for p in whole[1][3 * step - 3 : 3 * step]} == {ends[1]}
        every = tuple(lane for lanes in zip(*ends, strict=True) for lane in lanes)
        for rank in range(2):
            resumed = take(stream(model, position=every, ranks=2, accumulate=3, rank=rank), 12 - 3 * step)
            for a, b in zip(whole[rank][3 * step :], resumed, strict=True):
                assert_same(a, b)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_workers_makes_the_same_packs(make: Make, workers: int) -> None:
    model = make("flow", context_length=64)
    alone = take(stream(model, accumulate=2, rank=1, ranks=3), 14)
    for a, b in zip(alone, take(stream(model, accumulate=2, rank=1, ranks=3, workers=workers), 14), strict=True):
        assert_same(a, b)
    position = stream(model, accumulate=2, rank=1, ranks=3).position
    assert position == ((1,), (4,))


def step_of(packs: list[list[PackedSequence]], accumulate: int, step: int) -> list[PackedSequence]:
    """The packs of one step on all ranks, lane by lane."""
    return [ranks[step * accumulate + a] for a in range(accumulate) for ranks in packs]


def test_two_ranks_see_what_one_sees_in_twice_the_accumulation(make: Make) -> None:
    model = make("flow", context_length=64)
    alone = take(stream(model, accumulate=2), 12)
    pair = [take(stream(model, rank=rank, ranks=2), 6) for rank in (0, 1)]
    for step in range(6):
        one, two = alone[2 * step : 2 * step + 2], step_of(pair, 1, step)
        for a, b in zip(one, two, strict=True):
            assert_same(a, b, but=("step_counts", "position"))
        assert one[0].position == two[0].position + two[1].position  # of all lanes, and of each rank's own


def test_counts_are_announced_for_the_whole_step(make: Make) -> None:
    """Each rank counts its own packs; what sums them over the ranks is asked once a step."""
    model = make("flow", context_length=64)
    names = ("text", "image", "router")
    plain = [take(stream(model, rank=r, ranks=3, accumulate=2), 4) for r in range(3)]
    for step in range(2):
        packs = step_of(plain, 2, step)
        assert sum(p.counts["router"] for p in packs) == sum(len(p) for p in packs)
        for r, of_rank in enumerate(plain):
            own = [p.counts for p in packs[r::3]]
            together = {n: sum(c[n] for c in own) for n in names}
            assert [p.step_counts for p in of_rank[2 * step : 2 * step + 2]] == [together] * 2
    asked: list[dict[str, int]] = []

    class Thrice(Exchange):
        def total(self, counts: dict[str, int]) -> dict[str, int]:
            asked.append({name: counts[name] for name in names})
            return {name: 3 * count for name, count in counts.items()}

    told = take(PackStream(Mixture(SEVEN_AND_FIVE, 3), packing(model), ranks=3, accumulate=2, exchange=Thrice()), 4)
    assert asked == [plain[0][0].step_counts, plain[0][2].step_counts]
    assert [p.step_counts["text"] for p in told] == [3 * p.step_counts["text"] for p in plain[0]]


@given(
    steps=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 2), st.integers(0, 2)), min_size=2, max_size=3),
    waiting=st.integers(1, 4),
)
@settings(max_examples=8, deadline=None)
def test_no_document_is_lost_or_doubled_by_other_ranks(
    make: Make, steps: list[tuple[int, int, int]], waiting: int
) -> None:
    """A run that goes on again and again, each time on other ranks and with other accumulation."""
    model = make("flow", context_length=64)
    position: Lanes = ()
    seen: Counter[int] = Counter()
    for ranks, accumulate, count in steps:
        every = [stream(model, position=position, rank=r, ranks=ranks, accumulate=accumulate, waiting=waiting)
                 for r in range(ranks)]  # fmt: skip
        packs = [take(one, count * accumulate) for one in every]
        seen.update(n for of_rank in packs for p in of_rank for n in p.numbers)
        ends = [of_rank[-1].position if of_rank else one.position for of_rank, one in zip(packs, every, strict=True)]
        position = tuple(lane for lanes in zip(*ends, strict=True) for lane in lanes)
    assert set(seen.values()) <= {1}
    rest = {n for lane in position for n in (*lane[1:], *range(lane[0], 500, len(position)))}
    assert rest.isdisjoint(seen)
    assert rest | set(seen) == set(range(500))


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    steps=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 2), st.integers(1, 3)), min_size=2, max_size=4),
)
@settings(max_examples=12, deadline=None)
def test_without_weights_every_document_comes_once_an_epoch_on_any_lanes(
    make: Make, lengths: list[int], steps: list[tuple[int, int, int]]
) -> None:
    """Of every epoch that is over, each document of each source was in one pack, wherever the run was resumed."""
    model = make("flow", context_length=64, drop_text=0.0)
    sources = [Weighted(Numbered("abc"[s], n)) for s, n in enumerate(lengths)]
    mixture, position, seen = Mixture(sources, 3), (), Counter[tuple[int, str]]()
    for ranks, accumulate, count in steps:
        every = [stream(model, *sources, position=position, rank=r, ranks=ranks, accumulate=accumulate, waiting=3)
                 for r in range(ranks)]  # fmt: skip
        packs = [take(one, count * accumulate) for one in every]
        for p in (p for of_rank in packs for p in of_rank):
            seen.update((n // len(mixture), text) for n, text in zip(p.numbers, texts(model, p), strict=True))
        position = tuple(
            lane for lanes in zip(*(of_rank[-1].position for of_rank in packs), strict=True) for lane in lanes
        )
    over = min(n for lane in position for n in lane) // len(mixture)  # no number before it is to come
    everything = sorted(f"{'abc'[s]} {i}" for s, n in enumerate(lengths) for i in range(n))
    for epoch in range(over):
        assert sorted(text for e, text in seen.elements() if e == epoch) == everything
    assert set(seen.values()) == {1}


def test_dealing_gives_the_oldest_first() -> None:
    assert deal((), 3) == ((0,), (1,), (2,))
    same = ((8, 2, 4), (7, 5))
    assert deal(same, 2) is same
    # Unread: 2, 4, 8, 10 ... of the one lane, 5, 7, 9 ... of the other.
    assert deal(same, 1) == ((8, 2, 4, 5, 7),)
    assert deal(same, 3) == ((9, 2, 7), (10, 4), (8, 5))


def test_draws_do_not_depend_on_where_packs_end(make: Make) -> None:
    model = make("flow", context_length=64, drop_text=0.0)
    found = []
    for tokens in (64, 120, 333):
        packs = take(stream(model, tokens=tokens), 40)
        numbers = [n for p in packs for n in p.numbers]
        said = [text for p in packs for text in texts(model, p)]
        images = [i for p in packs for i in torch.cat(p.images)]
        blocks = [(b.seed, b.time) for p in packs for b in p.learned_blocks]
        found.append(dict(zip(numbers, zip(said, blocks, images, strict=True), strict=True)))
    for other in found[1:]:
        for n in range(36):
            (text, block, image), (same_text, same_block, same_image) = found[0][n], other[n]
            assert (text, block) == (same_text, same_block)
            assert torch.equal(image, same_image)
    seeds = [found[0][n][1][0] for n in range(36)]
    assert len(set(seeds)) == 36  # and every epoch draws anew


def test_documents_that_are_too_long_are_skipped_and_named(make: Make) -> None:
    model = make("flow", context_length=48, drop_text=0.0)
    reading = stream(model, Weighted(Numbered("a", 6, longer=20, every=2), 1.0), tokens=60)
    with pytest.warns(UserWarning, match=r"document (0|2|4) of a skipped: \d+ tokens, sequence\.context_length is 48"):
        packs = take(reading, 6)
    assert reading.broken.skipped["a"] > 6  # every other one of all that were looked at
    said = {n: text for p in packs for n, text in zip(p.numbers, texts(model, p), strict=True)}
    assert Counter(said[n] for n in said if n < 18) == {"a 1": 3, "a 3": 3, "a 5": 3}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        take(stream(model, Weighted(Numbered("a", 6), 1.0), tokens=60), 6)


def test_skipping_resumes_too(make: Make) -> None:
    model = make("flow", context_length=48)
    source = Weighted(Numbered("a", 6, longer=20, every=2), 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = take(stream(model, source, tokens=60), 9)
        for n, one in enumerate(whole[:-1]):
            resumed = take(stream(model, source, tokens=60, position=one.position), 1)
            assert_same(resumed[0], whole[n + 1])


@pytest.mark.filterwarnings("ignore:document")
def test_a_stream_in_which_nothing_fits_is_refused(make: Make) -> None:
    model = make("flow", context_length=24, drop_text=0.0)
    for position in ((), ((4, 1),)):
        with pytest.raises(ValueError, match=r"data: no document fits sequence\.context_length 24"):
            take(stream(model, Weighted(Numbered("a", 6, longer=20), 1.0), tokens=60, position=position), 1)


# ---- validation


def test_validation_packs_are_of_one_kind_and_the_same_each_time(make: Make) -> None:
    model = make("flow", context_length=64, drop_text=0.5)
    sources = [Numbered("a", 9), Numbered("b", 3)]
    packs = validation_packs(sources, packing(model), seed=5, limit=6)
    again = validation_packs(sources, packing(model), seed=5, limit=6)
    assert len(packs) == len(again)
    for a, b in zip(packs, again, strict=True):
        assert_same(a, b)
        assert len(a) <= 120
    said = [(p.kind, text) for p in packs for text in texts(model, p)]
    assert said == [("a", f"a {i}") for i in range(6)] + [("b", f"b {i}") for i in range(3)]  # and no text is dropped
    moved = validation_packs(sources, packing(model), seed=6, limit=6)
    assert [b.seed for b in moved[0].learned_blocks] != [b.seed for b in packs[0].learned_blocks]


class Mixed(Numbered):
    """Documents of two kinds in turn, in one source."""

    def document(self, index: int, rng: np.random.Generator) -> Document:
        return replace(super().document(index, rng), kind="even" if index % 2 == 0 else "odd")


def test_kinds_of_one_source_are_packed_apart(make: Make) -> None:
    model = make("flow", context_length=64)
    for tokens in (64, 120, 1000):
        packs = validation_packs([Mixed("a", 7)], packing(model, tokens), seed=5, limit=7)
        said = {kind: [t for p in packs if p.kind == kind for t in texts(model, p)] for kind in ("even", "odd")}
        assert said == {"even": [f"a {i}" for i in (0, 2, 4, 6)], "odd": [f"a {i}" for i in (1, 3, 5)]}


def test_validation_draws_do_not_depend_on_packs_or_other_documents(make: Make) -> None:
    model = make("flow", context_length=64)

    def seeds(tokens: int, limit: int) -> list[int]:
        packs = validation_packs([Numbered("a", 9)], packing(model, tokens), seed=5, limit=limit)
        return [b.seed for p in packs for b in p.learned_blocks]

    assert seeds(64, 9) == seeds(300, 9)
    assert seeds(64, 4) == seeds(64, 9)[:4]


def test_validation_leaves_out_what_is_too_long(make: Make) -> None:
    model = make("flow", context_length=48)
    packs = validation_packs([Numbered("a", 6, longer=20, every=2)], packing(model, 60), seed=5, limit=6)
    assert [text for p in packs for text in texts(model, p)] == ["a 1", "a 3", "a 5"]
    assert validation_packs([Numbered("a", 6, longer=20)], packing(model, 60), seed=5, limit=6) == []


class Gone(Numbered):
    """Whose file is no more."""

    def document(self, index: int, rng: np.random.Generator) -> Document:
        raise BrokenDocument("a.tar", "expected it to be there")


def test_held_out_documents_of_which_none_can_be_read_are_refused(make: Make) -> None:
    with pytest.raises(ValueError, match=r"data: a: expected held-out documents that can be read, got none: a\.tar: "):
        validation_packs([Numbered("b", 3), Gone("a", 6)], packing(make("flow"), 200), seed=5, limit=4)
