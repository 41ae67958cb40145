"""The stream of packs: whole epochs, budgets, positions, ranks."""

import itertools
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import fields

import numpy as np
import pytest
import torch
from PIL import Image

from unimodal.attention import SegmentTable
from unimodal.data.source import Source
from unimodal.data.stream import Mixture, Packing, PackStream, Weighted, validation_packs
from unimodal.documents import Document, Part
from unimodal.model import UnifiedModel
from unimodal.packing import PackedSequence

Make = Callable[..., UnifiedModel]


class Numbered:
    """Documents that say who they are: "kind index"; the picture is drawn from the rng."""

    def __init__(self, kind: str, count: int, longer: int = 0, every: int = 1) -> None:
        self.kind, self.count, self.longer, self.every = kind, count, longer, every

    def __len__(self) -> int:
        return self.count

    def document(self, index: int, rng: np.random.Generator) -> Document:
        if not 0 <= index < self.count:
            raise IndexError(index)
        words = Part(f"{self.kind} {index}" + " x" * self.longer * (index % self.every == 0), learn=False)
        image = Image.fromarray(rng.integers(0, 256, (4, 8, 3), dtype=np.uint8))
        return Document((words, Part(image)), self.kind)

    def corpus(self) -> Iterable[str]:
        yield self.kind


def packing(model: UnifiedModel, tokens: int = 120) -> Packing:
    return Packing(model.sequencer, model.backbone.config.experts, model.generator.reads, tokens)


def stream(model: UnifiedModel, *sources: Weighted, tokens: int = 120, position: tuple[int, int] = (0, 0), seed: int = 3,
           **ranks: int) -> PackStream:  # fmt: skip
    chosen = sources or (Weighted(Numbered("a", 7), 7.0), Weighted(Numbered("b", 5), 5.0))
    return PackStream(Mixture(chosen, seed), packing(model, tokens), position, **ranks)


def take(packs: Iterable[PackedSequence], n: int) -> list[PackedSequence]:
    return list(itertools.islice(packs, n))


def texts(model: UnifiedModel, p: PackedSequence) -> list[str]:
    """What the documents of a pack say they are (read before expert order mixes kinds: text keeps its order)."""
    out, ids = [], p.text_ids.tolist()
    starts = [i for i, token in enumerate(ids) if token == model.text.special.bos]
    for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
        out.append(model.text.decode(ids[start:end]))
    return out


def assert_same(a: PackedSequence, b: PackedSequence, but: tuple[str, ...] = ()) -> None:
    """Bit for bit."""
    for field in fields(PackedSequence):
        if field.name in but:
            continue
        x, y = getattr(a, field.name), getattr(b, field.name)
        if field.name == "table":
            assert all(np.array_equal(getattr(x, f.name), getattr(y, f.name)) for f in fields(SegmentTable))
        elif field.name == "images":
            assert len(x) == len(y)
            assert all(torch.equal(i, j) for i, j in zip(x, y, strict=True))
        elif isinstance(x, torch.Tensor):
            assert torch.equal(x, y), field.name
        else:
            assert x == y, field.name


# ---- the mixture


def test_numbered_is_a_source() -> None:
    assert isinstance(Numbered("a", 3), Source)


@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_every_document_once_an_epoch_when_weights_are_lengths(epoch: int) -> None:
    mixture = Mixture([Weighted(Numbered("a", 7), 0.7), Weighted(Numbered("b", 30), 3.0)], seed=1)
    order = mixture.order(epoch)
    assert len(order) == len(mixture) == 37
    assert sorted((s, i) for s, i, _ in order) == [(0, i) for i in range(7)] + [(1, i) for i in range(30)]
    assert sorted(slot for *_, slot in order) == list(range(37))


def test_shares_are_those_of_the_weights() -> None:
    mixture = Mixture(
        [Weighted(Numbered("a", 10), 3.0), Weighted(Numbered("b", 50), 1.0), Weighted(Numbered("c", 9), 0.0)], 1
    )
    assert mixture.counts == [45, 15]  # three to one of 60; a weight of 0 is no source
    times = Counter(mixture.order(0)[i][:2] for i in range(60))
    assert {n for (s, _), n in times.items() if s == 0} == {4, 5}  # all of its own before any comes again
    assert {n for (s, _), n in times.items() if s == 1} == {1}
    slots = Counter((s, slot) for s, _, slot in mixture.order(0))
    assert set(slots.values()) == {1}  # a document that comes twice is drawn differently
    seen = {i for e in range(40) for s, i, _ in mixture.order(e) if s == 1}
    assert seen == set(range(50))


def test_order_is_a_function_of_seed_and_epoch() -> None:
    def order(seed: int, epoch: int) -> list[tuple[int, int, int]]:
        return Mixture([Weighted(Numbered("a", 20), 1.0), Weighted(Numbered("b", 20), 1.0)], seed).order(epoch)

    assert order(1, 2) == order(1, 2)
    assert order(1, 2) != order(1, 3)
    assert order(1, 2) != order(2, 2)
    assert [s for s, *_ in order(1, 2)] != sorted(s for s, *_ in order(1, 2))  # sources are mixed


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


@pytest.mark.parametrize("tokens", [64, 65, 120, 300])
def test_packs_are_full_and_never_more(make: Make, tokens: int) -> None:
    model = make("flow", context_length=64)
    packs = take(stream(model, Weighted(Numbered("a", 20, longer=6, every=3), 1.0), tokens=tokens), 12)
    for one, following in itertools.pairwise(packs):
        assert len(one) == sum(one.table.document_lengths) <= tokens
        assert len(one) + following.table.document_lengths[0] > tokens  # the next would not have fitted


def test_an_epoch_holds_every_document(make: Make) -> None:
    model = make("flow", context_length=64, drop_text=0.0)
    said = [text for p in take(stream(model), 30) for text in texts(model, p)]
    everything = sorted([f"a {i}" for i in range(7)] + [f"b {i}" for i in range(5)])
    assert len(said) > 48
    for epoch in range(4):
        assert sorted(said[12 * epoch : 12 * epoch + 12]) == everything
    assert said[:12] != said[12:24]


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
    assert whole[-1].position[0] >= 2  # into the third epoch
    for n, one in enumerate(whole[:-3]):
        resumed = take(stream(model, position=one.position), len(whole) - n - 1)  # type: ignore[arg-type]
        for a, b in zip(whole[n + 1 :], resumed, strict=True):
            assert_same(a, b)


def test_resuming_steps_of_many_packs(make: Make) -> None:
    model = make("flow", context_length=64)
    whole = take(stream(model, ranks=2, accumulate=3, rank=1), 12)
    for step in range(1, 4):
        end = whole[3 * step - 1]
        assert {p.position for p in whole[3 * step - 3 : 3 * step]} == {end.position}
        resumed = take(stream(model, position=end.position, ranks=2, accumulate=3, rank=1), 12 - 3 * step)  # type: ignore[arg-type]
        for a, b in zip(whole[3 * step :], resumed, strict=True):
            assert_same(a, b)


def test_two_ranks_see_what_one_sees_in_twice_the_accumulation(make: Make) -> None:
    model = make("flow", context_length=64)
    alone = take(stream(model, accumulate=2), 12)
    first, second = (take(stream(model, rank=rank, ranks=2), 6) for rank in (0, 1))
    for step in range(6):
        one, pair = alone[2 * step : 2 * step + 2], [first[step], second[step]]
        for a, b in zip(one, pair, strict=True):
            assert_same(a, b)  # the announced counts and position too
        total = {name: sum(p.counts[name] for p in pair) for name in ("text", "image", "router")}
        assert [p.step_counts for p in pair] == [total, total]
        assert total["image"] > 0


def test_counts_are_announced_for_the_whole_step(make: Make) -> None:
    model = make("flow", context_length=64)
    ranks = [take(stream(model, rank=r, ranks=3, accumulate=2), 4) for r in range(3)]
    plain = take(stream(model), 12)
    for step in range(2):
        total = {n: sum(p.counts[n] for p in plain[6 * step : 6 * step + 6]) for n in ("text", "image", "router")}
        assert total["router"] == sum(len(p) for p in plain[6 * step : 6 * step + 6])
        for packs in ranks:
            assert [p.step_counts for p in packs[2 * step : 2 * step + 2]] == [total] * 2
        dealt = [packs[2 * step + i] for i in range(2) for packs in ranks]
        for a, b in zip(dealt, plain[6 * step : 6 * step + 6], strict=True):
            assert_same(a, b, but=("step_counts", "position"))


def test_draws_do_not_depend_on_where_packs_end(make: Make) -> None:
    model = make("flow", context_length=64, drop_text=0.0)
    found = []
    for tokens in (64, 120, 333):
        packs = take(stream(model, tokens=tokens), 40)
        said = [text for p in packs for text in texts(model, p)]
        images = [i for p in packs for i in torch.cat(p.images)]
        blocks = [(b.seed, b.time) for p in packs for b in p.learned_blocks]
        found.append(list(zip(said, blocks, images, strict=True))[:36])
    for other in found[1:]:
        for (text, block, image), (same_text, same_block, same_image) in zip(found[0], other, strict=True):
            assert (text, block) == (same_text, same_block)
            assert torch.equal(image, same_image)
    seeds = [seed for _, (seed, _), _ in found[0]]
    assert len(set(seeds)) == 36  # and every epoch draws anew


def test_documents_that_are_too_long_are_skipped_and_named(make: Make) -> None:
    model = make("flow", context_length=48, drop_text=0.0)
    with pytest.warns(UserWarning, match=r"document (0|2|4) of a skipped: \d+ tokens, sequence\.context_length is 48"):
        packs = take(stream(model, Weighted(Numbered("a", 6, longer=20, every=2), 1.0), tokens=60), 6)
    assert Counter(text for p in packs for text in texts(model, p)) == {"a 1": 4, "a 3": 4, "a 5": 4}
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
            resumed = take(stream(model, source, tokens=60, position=one.position), 1)  # type: ignore[arg-type]
            assert_same(resumed[0], whole[n + 1])


@pytest.mark.filterwarnings("ignore:document")
def test_a_stream_in_which_nothing_fits_is_refused(make: Make) -> None:
    model = make("flow", context_length=24, drop_text=0.0)
    for position in ((0, 0), (0, 4)):
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
