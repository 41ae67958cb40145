"""Documents laid out and packed: what is read where, spelled out by hand."""

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from PIL import Image

from unimodal.backbone import Experts
from unimodal.documents import Document, Part
from unimodal.model import UnifiedModel
from unimodal.packing import BUCKET, PackedSequence, SequencedDocument, pack, to_tensor
from unimodal.sequence_rules import SequenceRules
from unimodal_generators.base import Grid, TokenKind

FULL = Experts(attention=True, mlp=True, norms=True)
T, C, L = TokenKind.TEXT, TokenKind.CLEAN, TokenKind.LEARNED
KEY = (0, 0, 0)
GENERATORS = ["flow", "autoregressive"]


def picture(seed: int = 0, height: int = 4, width: int = 8) -> Image.Image:
    """4 x 8 pixels are a grid of 2 x 4: eight tokens."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def drawing() -> Document:
    return Document((Part("a", learn=False), Part(picture())), "text_to_image")


def reading() -> Document:
    return Document((Part(picture(), learn=False), Part("ab")), "image_to_text")


def lay(model: UnifiedModel, document: Document, train: bool = False) -> SequencedDocument:
    return model.sequencer.document(document, KEY, train=train)


def packed(model: UnifiedModel, *documents: SequencedDocument) -> PackedSequence:
    return pack(documents, model.backbone.config.experts, model.generator.reads)


def kinds(document: SequencedDocument) -> list[tuple[TokenKind, int]]:
    return [(s.kind, s.length) for s in document.segments]


def order(p: PackedSequence) -> torch.Tensor:
    """Position in order of reading of every place, -1 where a place is filling."""
    at = torch.full((sum(p.splits),), -1)
    at[p.inverse] = torch.arange(len(p))
    return at


def text_targets(p: PackedSequence) -> list[tuple[int, int]]:
    """(position read from, id predicted), positions in order of reading."""
    return list(zip(order(p)[p.text_reads].tolist(), p.text_targets.tolist(), strict=True))


def image_reads(p: PackedSequence) -> list[int]:
    return order(p)[p.image_reads].tolist()


def targets(p: PackedSequence) -> dict[str, int]:
    """What is learned; a learned router counts every token, and never filling."""
    counts = p.counts
    assert counts.pop("router") == len(p)
    return counts


# ---- one document of each kind


def test_text_alone(make: Callable[..., UnifiedModel]) -> None:
    for generator in GENERATORS:
        model = make(generator)
        a, b = model.text.encode("a")[0], model.text.encode("b")[0]
        bos, eos = model.text.special.bos, model.text.special.eos
        document = lay(model, Document((Part("a"), Part("b")), "text"))
        (segment,) = document.segments
        assert segment.ids == (bos, a, b, eos)
        assert segment.targets == (False, True, True, True)
        p = packed(model, document)
        assert text_targets(p) == [(0, a), (1, b), (2, eos)]
        assert image_reads(p) == []
        assert targets(p) == {"text": 3, "image": 0}
        assert p.images == ()


def test_text_to_image_flow(make: Callable[..., UnifiedModel]) -> None:
    """0 bos, 1 a, 2 boi, 3-10 noised copy, 11-18 clean copy, 19 eoi, 20 eos."""
    model = make("flow")
    special = model.text.special
    document = lay(model, drawing())
    assert kinds(document) == [(T, 3), (L, 8), (C, 8), (T, 2)]
    assert document.segments[0].ids == (special.bos, *model.text.encode("a"), special.boi)
    assert document.segments[3].ids == (special.eoi, special.eos)
    p = packed(model, document)
    assert text_targets(p) == [(1, special.boi), (19, special.eos)]  # never bos, never eoi, nothing of a question
    assert image_reads(p) == list(range(3, 11))
    assert targets(p) == {"text": 2, "image": 8}


def test_text_to_image_autoregressive(make: Callable[..., UnifiedModel]) -> None:
    """0 bos, 1 a, 2 boi, 3-10 the image (which is its own context), 11 eoi, 12 eos."""
    model = make("autoregressive")
    special = model.text.special
    document = lay(model, drawing())
    assert kinds(document) == [(T, 3), (L, 8), (T, 2)]
    p = packed(model, document)
    assert text_targets(p) == [(1, special.boi), (11, special.eos)]
    assert image_reads(p) == list(range(2, 10))  # the first is predicted by boi
    assert targets(p) == {"text": 2, "image": 8}


def test_image_to_text(make: Callable[..., UnifiedModel]) -> None:
    """0 bos, 1 boi, 2-9 the image as context, 10 eoi, 11 a, 12 b, 13 eos."""
    for generator in GENERATORS:
        model = make(generator)
        special, (a, b) = model.text.special, (model.text.encode(c)[0] for c in "ab")
        document = lay(model, reading())
        assert kinds(document) == [(T, 2), (C, 8), (T, 4)]
        p = packed(model, document)
        assert text_targets(p) == [(10, a), (11, b), (12, special.eos)]  # not the image's boi
        assert image_reads(p) == []
        assert targets(p) == {"text": 3, "image": 0}
        assert (p.learned_images, p.context_images) == ((), (0,))


def test_interleaved(make: Callable[..., UnifiedModel]) -> None:
    """An image given, a question, an answer in words, an image drawn, a word more."""
    parts = (Part(picture(0), learn=False), Part("a", learn=False), Part("b"), Part(picture(1)), Part("a"))
    for generator, copies in (("flow", 16), ("autoregressive", 8)):
        model = make(generator)
        special, (a, b) = model.text.special, (model.text.encode(c)[0] for c in "ab")
        p = packed(model, lay(model, Document(parts)))
        # 0 bos, 1 boi, 2-9 image, 10 eoi, 11 a, 12 b, 13 boi, 14- the copies, eoi, a, eos
        end = 14 + copies
        assert text_targets(p) == [(11, b), (12, special.boi), (end, a), (end + 1, special.eos)]
        assert image_reads(p) == list(range(14, 22) if generator == "flow" else range(13, 21))
        assert p.learned_images == (1,)
        assert p.context_images == ((0, 1) if generator == "flow" else (0,))
        assert len(p) == end + 3


def test_two_learned_images_in_a_row(make: Callable[..., UnifiedModel]) -> None:
    """The second begin-of-image is learned from the first image's end."""
    model = make("flow")
    special = model.text.special
    p = packed(model, lay(model, Document((Part(picture(0)), Part(picture(1))))))
    # 0 bos, 1 boi, 2-9 N, 10-17 C, 18 eoi, 19 boi, 20-27 N, 28-35 C, 36 eoi, 37 eos
    assert text_targets(p) == [(0, special.boi), (18, special.boi), (36, special.eos)]
    assert image_reads(p) == [*range(2, 10), *range(20, 28)]


def test_an_end_is_learned_only_behind_what_is_learned(make: Callable[..., UnifiedModel]) -> None:
    model = make("flow")
    p = packed(model, lay(model, Document((Part("a"), Part("b", learn=False)))))
    assert text_targets(p) == [(0, model.text.encode("a")[0])]
    empty = packed(model, lay(model, Document(())))
    assert text_targets(empty) == []
    assert len(empty) == 2


def test_learn_end_false(make: Callable[..., UnifiedModel]) -> None:
    """A document that ends in a drawn image stops with it: no clean copy, no end."""
    for generator in GENERATORS:
        model = make(generator, learn_end=False)
        document = lay(model, drawing())
        assert kinds(document) == [(T, 3), (L, 8)]
        p = packed(model, document)
        assert text_targets(p) == [(1, model.text.special.boi)]
        assert image_reads(p) == list(range(3, 11) if generator == "flow" else range(2, 10))
        assert kinds(lay(model, reading())) == kinds(lay(make(generator), reading()))  # ends in text: as ever
        followed = Document((*drawing().parts, Part("b")))
        assert kinds(lay(model, followed)) == kinds(lay(make(generator), followed))  # followed by something: as ever
        given = Document((Part("a"), Part(picture(), learn=False)))
        assert kinds(lay(model, given)) == kinds(lay(make(generator), given))  # an image given: as ever


# ---- dropped text


@pytest.mark.parametrize("generator", GENERATORS)
def test_dropped_text_leaves_boundaries_and_no_text_loss(make: Callable[..., UnifiedModel], generator: str) -> None:
    model = make(generator, drop_text=0.999999)
    special = model.text.special
    document = lay(model, drawing(), train=True)
    ids = [i for s in document.segments for i in s.ids]
    assert ids == [special.bos, special.boi, special.eoi, special.eos]
    p = packed(model, document)
    assert targets(p) == {"text": 0, "image": 8}
    assert image_reads(p) == list(range(2, 10) if generator == "flow" else range(1, 9))
    described = packed(model, lay(model, reading(), train=True))
    assert targets(described) == {"text": 0, "image": 0}
    assert len(described) == 12  # bos, boi, eight image tokens, eoi, eos
    assert lay(model, drawing(), train=False).length > document.length  # validation drops nothing


def test_text_is_dropped_at_the_rate_asked_for(make: Callable[..., UnifiedModel]) -> None:
    sequencer = make("flow", drop_text=0.3).sequencer
    whole = sequencer.document(drawing(), KEY, train=False).length
    dropped = sum(sequencer.document(drawing(), (7, 0, i)).length < whole for i in range(600))
    assert 0.3 * 600 - 4 * 11.3 < dropped < 0.3 * 600 + 4 * 11.3


def test_images_are_dropped_at_a_rate_of_their_own(make: Callable[..., UnifiedModel]) -> None:
    """Of 2,000 documents: images alone, text alone, both, each as often as if neither knew of the other."""
    sequencer = make("flow", drop_text=0.4, drop_images=0.3).sequencer
    edit = Document((Part(picture(1), learn=False), Part("redder", learn=False), Part(picture(2))))
    words = sequencer.document(edit, KEY, train=False)
    counts = {(text, image): 0 for text in (False, True) for image in (False, True)}
    for i in range(2000):
        laid = sequencer.document(edit, (7, 0, i))
        images = sum(s.block is not None for s in laid.segments)
        ids = sum(len(s.ids) for s in laid.segments)
        whole = sum(s.block is not None for s in words.segments)
        counts[ids < sum(len(s.ids) for s in words.segments) - 4, images < whole] += 1
    shares = {(True, True): 0.12, (True, False): 0.28, (False, True): 0.18, (False, False): 0.42}
    for kind, share in shares.items():
        spread = 4 * (2000 * share * (1 - share)) ** 0.5
        assert abs(counts[kind] - 2000 * share) < spread, (kind, counts)


def test_dropping_says_nothing_about_what_a_source_draws(make: Callable[..., UnifiedModel]) -> None:
    """A source draws from the same key. (Seeds (a, b) and (a, b, 0) give numpy one and the same stream.)"""
    sequencer = make("flow", drop_text=0.3).sequencer
    whole = sequencer.document(drawing(), KEY, train=False).length
    keys = [(7, 0, i) for i in range(400)]
    draws = [np.random.default_rng(k).random() for k in keys if sequencer.document(drawing(), k).length < whole]
    assert 0.4 < np.mean(draws) < 0.6
    times = [s.block.time for k in keys for s in sequencer.document(drawing(), k).segments if s.kind == L and s.block]
    first = [np.random.default_rng(k).normal() for k in keys]
    assert abs(np.corrcoef(times, first)[0, 1]) < 0.2


def test_draws_are_a_function_of_the_key_and_the_part(make: Callable[..., UnifiedModel]) -> None:
    sequencer = make("flow").sequencer

    def seeds(document: Document, key: Sequence[int]) -> list[int]:
        laid = sequencer.document(document, key, train=False)
        return [s.block.seed for s in laid.segments if s.kind == L and s.block]

    two = Document((Part(picture(0)), Part(picture(1))))
    assert seeds(two, (1, 2, 3)) == seeds(two, (1, 2, 3))
    assert len({*seeds(two, (1, 2, 3)), *seeds(two, (1, 2, 4)), *seeds(two, (1, 3, 3)), *seeds(two, (2, 2, 3))}) == 8
    one = Document((Part(picture(5)), Part("words")))
    assert seeds(one, (1, 2, 3)) == seeds(two, (1, 2, 3))[:1]  # whatever follows


# ---- positions


def test_learned_and_clean_copies_share_position_ids(make: Callable[..., UnifiedModel]) -> None:
    model = make("flow")
    document = lay(model, Document((*drawing().parts, Part("b"))))
    text, learned, clean, rest = (np.asarray(s.positions)[:, 0].tolist() for s in document.segments)
    assert text == [0, 1, 2]
    assert learned == clean == [3] * 8  # one id a block
    assert rest == [4, 5, 6]
    causal = lay(make("autoregressive"), Document((*drawing().parts, Part("b"))))
    assert [i for s in causal.segments for i in np.asarray(s.positions)[:, 0].tolist()] == list(range(14))


def test_a_session_s_ids_go_on_like_a_document_s(make: Callable[..., UnifiedModel]) -> None:
    """`prompt` spells the same ids as `document`, and marks what every guidance branch keeps."""
    for generator in GENERATORS:
        model = make(generator)
        special = model.text.special
        document = Document((Part("a", learn=False), Part(picture(), learn=False), Part("b", learn=False)))
        runs = model.sequencer.prompt(document)
        laid = lay(model, document)
        assert [run.ids for run in runs if run.image is None] == [
            laid.segments[0].ids,
            laid.segments[2].ids[:-1],  # without the end
        ]
        assert runs[0].structural == (True, False, True)
        assert runs[2].structural == (True, False)
        assert runs[2].ids[0] == special.eoi
        assert np.array_equal(runs[1].image, laid.images[0])
        assert [run.ids for run in model.sequencer.prompt(Document(()))] == [(special.bos,)]


# ---- expert order


ROUTINGS = pytest.mark.parametrize(
    "experts",
    [Experts(), FULL, Experts(mlp=True, clean="text"), Experts(mlp=True, clean="look", learned="draw"),
     Experts(mlp=True, learned="text", clean="image")],
    ids=["dense", "two", "clean with text", "three", "learned with text"],
)  # fmt: skip


@pytest.mark.parametrize("bucket", [1, 5, BUCKET])
@pytest.mark.parametrize("generator", GENERATORS)
@ROUTINGS
def test_expert_order(
    make: Callable[..., UnifiedModel], mixed: list[Document], generator: str, experts: Experts, bucket: int
) -> None:
    model = make(generator)
    documents = [lay(model, d) for d in mixed]
    p = pack(documents, experts, model.generator.reads, bucket=bucket)
    n = sum(d.length for d in documents)
    assert len(p) == len(p.inverse) == n
    at = order(p)
    real = at >= 0
    assert sorted(at[real].tolist()) == list(range(n))  # every token has a place, and none of them two
    assert torch.equal(at[p.inverse], torch.arange(n))
    # walk the documents: kind, position id, id and image of every token in order of reading
    walk = [(s.kind, pos, i) for d in documents for s in d.segments
            for pos, i in zip(np.asarray(s.positions).tolist(), s.ids or [-1] * s.length, strict=True)]  # fmt: skip
    moved = [walk[i] for i in at[real].tolist()]
    expert_of = [experts.index(kind) for kind, _, _ in moved]
    assert expert_of == sorted(expert_of)
    assert p.positions[real].tolist() == [position for _, position, _ in moved]
    runs = [kind for kind, _, _ in moved]
    assert sum(a != b for a, b in itertools.pairwise(runs)) == len(set(runs)) - 1  # every kind in one piece
    assert p.text_ids.tolist() == [i for kind, _, i in moved if kind == T]
    # an expert's tokens come first in its slice, which is filled up to the bucket and never empty
    assert len(p.splits) == len(experts.names)
    for expert, places in enumerate(real.split(p.splits)):
        count = expert_of.count(expert)
        assert p.tokens[expert] == count
        assert places.tolist() == [True] * count + [False] * (len(places) - count)
        assert len(places) == max(bucket, -(-count // bucket) * bucket)
    # a target is read one place before it, wherever experts have put the two
    learned_text = [j for j, flag in enumerate(t for d in documents for s in d.segments
                                               for t in (s.targets or (False,) * s.length)) if flag]  # fmt: skip
    assert at[p.text_reads].tolist() == [j - 1 for j in learned_text]
    assert p.text_targets.tolist() == [walk[j][2] for j in learned_text]
    learned = [j for j, (kind, _, _) in enumerate(walk) if kind == L]
    back = 0 if model.generator.reads == "own" else 1
    assert at[p.image_reads].tolist() == [j - back for j in learned]


@ROUTINGS
def test_what_fills_up_is_zero(make: Callable[..., UnifiedModel], mixed: list[Document], experts: Experts) -> None:
    model = make("flow")
    p = pack([lay(model, d) for d in mixed], experts, model.generator.reads)
    filling = order(p) < 0
    assert filling.any()
    assert not p.positions[filling].any()
    assert not p.image_rows[filling].any()
    assert p.positions[~filling].any()
    assert all(places % BUCKET == 0 and places for places in p.splits)


def test_image_rows_number_learned_blocks_then_context_blocks(
    make: Callable[..., UnifiedModel], mixed: list[Document]
) -> None:
    model = make("flow")
    documents = [lay(model, d) for d in mixed]
    p = packed(model, *documents)
    in_order = [(s.kind, s.length) for d in documents for s in d.segments]
    number = {L: iter(range(1, 100)), C: iter(range(len(p.learned_blocks) + 1, 100)), T: itertools.repeat(0)}
    expected = [row for kind, length in in_order for row in [next(number[kind])] * length]
    assert p.image_rows[p.inverse].tolist() == expected
    assert max(expected) == len(p.learned_blocks) + len(p.context_blocks)


def test_an_expert_nobody_reads_has_a_slice_too(make: Callable[..., UnifiedModel]) -> None:
    """So it runs, and its gradient is zero rather than missing."""
    model = make("flow")
    words = lay(model, Document((Part("a"),), "text"))
    assert packed(model, words).splits == (BUCKET, BUCKET)
    assert pack([words], FULL, "own", bucket=1).splits == (words.length, 1)


def test_one_more_token_than_a_bucket_takes_two(make: Callable[..., UnifiedModel]) -> None:
    model = make("flow")
    words = lay(model, Document((Part("a"), Part("b")), "text"))  # bos, a, b, eos
    assert [pack([words], Experts(), "own", bucket=b).splits for b in (1, 3, 4, 5)] == [(4,), (6,), (4,), (5,)]


@pytest.mark.parametrize("generator", GENERATORS)
def test_what_fills_up_changes_no_loss_and_no_gradient(
    make: Callable[..., UnifiedModel], mixed: list[Document], generator: str
) -> None:
    """Not by how much of it there is, nor by what is in it."""
    model = make(generator)
    documents = [lay(model, d) for d in mixed]

    def run(bucket: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        model.zero_grad()
        losses = model(pack(documents, model.backbone.config.experts, model.generator.reads, bucket=bucket))
        sum(term.sum for term in losses.values()).backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return {name: term.sum.detach() for name, term in losses.items()}, gradients

    def soil(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        filling = order(pack(documents, model.backbone.config.experts, model.generator.reads)) < 0
        x = inputs[0].masked_fill(filling[:, None], 7.0)
        return (x, *inputs[1:])

    try:
        tight, clean, wide = run(1), run(BUCKET), run(4 * BUCKET)
        handle = model.backbone.register_forward_pre_hook(soil)
        soiled = run(BUCKET)
        handle.remove()
    finally:
        model.zero_grad()
    for other in (tight, wide):
        torch.testing.assert_close(other[0], clean[0], rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(other[1], clean[1], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(soiled[0], clean[0], rtol=0, atol=0)
    torch.testing.assert_close(soiled[1], clean[1], rtol=0, atol=0)


def test_the_table_of_a_pack(make: Callable[..., UnifiedModel]) -> None:
    model = make("flow")
    p = packed(model, lay(model, drawing()), lay(model, reading()))
    assert p.documents == 2
    assert p.table.document_lengths.tolist() == [21, 14]
    assert p.table.document.tolist() == [0] * 4 + [1] * 3
    runs = [3, 8, 8, 2, 2, 8, 4]
    assert p.table.length.tolist() == runs
    flags = [(False, False), (True, True), (True, False), (False, False), (False, False), (True, False), (False, False)]
    assert list(zip(p.table.bidirectional.tolist(), p.table.private.tolist(), strict=True)) == flags
    tokens = p.table.tokens(torch.device("cpu"))
    assert tokens.document.tolist() == [0] * 21 + [1] * 14
    assert tokens.block.tolist() == [b for b, n in enumerate(runs) for _ in range(n)]
    assert tokens.bidirectional.tolist() == [f[0] for f, n in zip(flags, runs, strict=True) for _ in range(n)]
    assert tokens.private.tolist() == [f[1] for f, n in zip(flags, runs, strict=True) for _ in range(n)]


def test_images_are_stacked_by_size_and_found_again(make: Callable[..., UnifiedModel]) -> None:
    model = make("flow")
    square, wide = picture(3, 8, 8), [picture(i) for i in (4, 5)]
    first = Document((Part(wide[0], learn=False), Part(square)))
    p = packed(model, lay(model, first), lay(model, Document((Part(wide[1]),))))
    flat = [image for stack in p.images for image in stack]
    assert [tuple(stack.shape) for stack in p.images] == [(2, 3, 4, 8), (1, 3, 8, 8)]
    learned = [to_tensor([np.asarray(i)])[0] for i in (square, wide[1])]
    context = [to_tensor([np.asarray(i)])[0] for i in (wide[0], square, wide[1])]
    assert all(torch.equal(flat[i], e) for i, e in zip(p.learned_images, learned, strict=True))
    assert all(torch.equal(flat[i], e) for i, e in zip(p.context_images, context, strict=True))
    assert [b.grid for b in p.learned_blocks] == [Grid(4, 4), Grid(2, 4)]


def test_kind_of_a_pack(make: Callable[..., UnifiedModel]) -> None:
    model = make("flow")
    assert packed(model, lay(model, drawing()), lay(model, drawing())).kind == "text_to_image"
    assert packed(model, lay(model, drawing()), lay(model, reading())).kind == ""


def test_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="documents: expected at least one to pack, got none"):
        pack([], FULL, "own")


def test_announced_and_moved(make: Callable[..., UnifiedModel]) -> None:
    model = make("flow")
    p = packed(model, lay(model, drawing()), lay(model, reading()))
    told = p.announce({"text": 9, "image": 8}, ((1, 2),), ((3, 4),))
    assert (told.step_counts, told.position, told.left_out) == ({"text": 9, "image": 8}, ((1, 2),), ((3, 4),))
    assert (p.step_counts, p.position, p.left_out) == ({}, (), ())
    assert told.inverse is p.inverse
    moved = told.to("meta")
    tensors = [v for v in vars(moved).values() if isinstance(v, torch.Tensor)] + [*moved.images]
    assert len(tensors) == 8
    assert {v.device.type for v in tensors} == {"meta"}
    assert moved.table is told.table  # plans are made of it on the host
    rest = ("splits", "tokens", "learned_images", "learned_blocks", "context_images", "kind", "step_counts", "position",
            "left_out", "counts")  # fmt: skip
    assert all(getattr(moved, name) == getattr(told, name) for name in rest)
    same = told.to("cpu")
    assert torch.equal(same.positions, told.positions)


# ---- rules


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"image_sizes": []}, "sequence.image_sizes: .* got none"),
        ({"drop_text": 1.0}, "sequence.drop_text: .* got 1.0"),
        ({"drop_text": -0.1}, "sequence.drop_text: .* got -0.1"),
    ],
)
def test_rules_that_cannot_be_are_refused(rules: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SequenceRules(**{"image_sizes": [(8, 8)], "context_length": 64, **rules})  # type: ignore[arg-type]


def test_a_size_the_tokenizer_cannot_cut_is_refused(make: Callable[..., UnifiedModel]) -> None:
    with pytest.raises(ValueError, match="image size: expected multiples of the stride 2, got 7x8"):
        make("flow", image_sizes=[(8, 8), (7, 8)])
