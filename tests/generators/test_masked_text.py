"""Text that is learned masked: how it is laid out, what is hidden and learned, and how a block is written."""

import functools
import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from shape_checks import first_checked

from unimodal.decoding import Session, decode, stream
from unimodal.decoding_settings import DecodingSettings
from unimodal.documents import Document, Part
from unimodal.model import UnifiedModel
from unimodal.packing import PackedSequence, Run, SequencedDocument, pack
from unimodal.text import TextTokenizer
from unimodal_generators import FlowSettings, MaskedSettings, MaskedText
from unimodal_generators.base import Branch, Embeddings, TokenKind
from unimodal_generators.masked_text import HIDDEN, MaskedBlock
from unimodal_generators.unmasking import SCHEDULES, remaining

Make = Callable[..., UnifiedModel]
T, C, L = TokenKind.TEXT, TokenKind.CLEAN, TokenKind.LEARNED
B = 3  # of the model "joint"; "joint_bound" has blocks of 5


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8))


def lay(model: UnifiedModel, *parts: Part, key: tuple[int, ...] = (0, 0, 0)) -> SequencedDocument:
    return model.sequencer.document(Document(parts), key, train=False)


def packed(model: UnifiedModel, *documents: SequencedDocument) -> PackedSequence:
    return pack(documents, model.backbone.config.experts, model.generator.reads)


def texts(document: SequencedDocument) -> list[tuple[tuple[int, ...], int, bool]]:
    """Ids, first position and whether it is a learned copy, of every segment of text."""
    return [
        (s.ids, int(s.positions[0, 0]), s.block is not None and s.block.private)
        for s in document.segments
        if s.kind == T
    ]


# ---- the layout


def test_a_learned_text_is_read_twice_block_by_block(make: Make) -> None:
    """Every copy is as long as a block, shares the positions of what it hides, and is seen by nobody else."""
    model = make("joint")
    special, ids = model.text.special, tuple(model.text.encode("nnnnn"))
    assert len(ids) == 5
    document = lay(model, Part("n", learn=False), Part("nnnnn"), Part(picture()))
    n, boi, eos = ids[0], special.boi, special.eos
    assert [(s.kind, s.length) for s in document.segments] == [
        (T, 2), (T, 3), (T, 3), (T, 3), (T, 3), (L, 16), (C, 16), (T, 1), (T, 3),
    ]  # fmt: skip
    assert texts(document) == [
        ((special.bos, n), 0, False),
        ((n, n, n), 2, True),
        ((n, n, n), 2, False),
        ((n, n, boi), 5, True),
        ((n, n, boi), 5, False),
        ((special.eoi,), 24, False),
        ((eos,) * 3, 25, True),  # filled up with the end; nothing follows it
    ]
    for segment in document.segments:
        if segment.block is not None and segment.kind == T:
            assert (segment.block.bidirectional, segment.block.private) == (True, True)
            assert segment.block.n_targets == sum(segment.targets) >= 1
        elif segment.kind == T:
            assert not any(segment.targets)


def test_what_ends_otherwise_is_hidden_and_not_learned(make: Make) -> None:
    model = make("joint")
    (n,), eos = model.text.encode("n"), model.text.special.eos
    counts = set()
    for i in range(40):
        document = lay(model, Part("nnnn"), Part("n", learn=False), key=(0, 0, i))
        assert texts(document)[3:] == [((n, HIDDEN, HIDDEN), 4, True), ((n,), 4, False), ((n, eos), 5, False)]
        last = document.segments[3]
        assert last.targets == (True, False, False)  # the only one that is known
        counts.add(document.segments[1].targets)
    assert len(counts) == 7  # of the block before it, every choice of one at least


def test_drawing_is_decided_in_a_block_of_its_own(make: Make) -> None:
    model = make("joint")
    special = model.text.special
    document = lay(model, Part("n", learn=False), Part(picture()))
    assert texts(document)[1:3] == [((special.boi,) * B, 2, True), ((special.boi,), 2, False)]


def test_the_rest_of_a_layout_is_what_it_was(make: Make) -> None:
    """Without what is learned of text, documents are laid out and read as with text that is learned token by token."""
    joint, plain = (make(name) for name in ("joint", "masked"))
    parts = (Part("a handwritten", learn=False), Part(picture(), learn=False), Part(" seven", learn=False))
    for a, b in zip(lay(joint, *parts).segments, lay(plain, *parts).segments, strict=True):
        assert (a.kind, a.ids, a.targets, a.block) == (b.kind, b.ids, b.targets, b.block)
        assert np.array_equal(a.positions, b.positions)


def test_what_is_hidden_is_a_function_of_the_key(make: Make) -> None:
    model = make("joint")
    parts = (Part("three plus seven equals ten"),)

    def hidden(key: tuple[int, ...]) -> list[tuple[bool, ...]]:
        return [s.targets for s in lay(model, *parts, key=key).segments]

    assert hidden((0, 0, 1)) == hidden((0, 0, 1))
    assert hidden((0, 0, 1)) != hidden((0, 0, 2))
    assert len(set(hidden((0, 0, 3)))) > 2  # blocks of one text differ


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_plan_hides_as_many_as_its_schedule_says(schedule: str) -> None:
    made, rng = MaskedText(8, 64, schedule), np.random.default_rng(0)
    mean = {"cosine": 2 / math.pi, "linear": 1 / 2, "square": 2 / 3, "cubic": 3 / 4, "root": 1 / 3}[schedule]
    plans = [made.plan(range(64), (), rng) for _ in range(2000)]
    shares = np.array([p.targets for p in plans])
    assert shares.sum(1).min() >= 1
    assert shares.mean() == pytest.approx(mean + 0.5 / 64, abs=0.02)
    assert np.ptp(shares.mean(0)) < 0.09  # every place alike
    for p in plans[:20]:
        assert round((1 - p.block.time) * 64) == p.block.n_targets == sum(p.targets)


def test_a_bound_counts_all_ids() -> None:
    rng = np.random.default_rng(0)
    made = MaskedText(8, 6, weighting="bound")
    assert {made.plan([5, 7], (7,), rng).block.n_targets for _ in range(9)} == {6}  # with those that fill
    assert {made.plan([5, 7], (), rng).block.n_targets for _ in range(9)} == {2}
    assert made.plan([5, 7], (7,), rng).ids == (5, 7, 7, 7, 7, 7)
    assert made.plan([5, 7], (), rng).ids == (5, 7, *[HIDDEN] * 4)


# ---- what is learned


def states(model: UnifiedModel, p: PackedSequence) -> torch.Tensor:
    """Last hidden states in the order of reading."""
    found: list[torch.Tensor] = []
    handle = model.backbone.register_forward_hook(lambda module, inputs, output: found.append(output))
    model(p)
    handle.remove()
    return found[0][p.inverse]


@pytest.mark.parametrize("generator", ["joint", "joint_bound"])
def test_the_loss_is_of_hidden_ids_alone(make: Make, mixed: list[Document], generator: str) -> None:
    """The slow way, one segment after the other: value, count and gradients."""
    model = make(generator).double()
    documents = [model.sequencer.document(d, (0, 0, i), train=False) for i, d in enumerate(mixed)]
    p = packed(model, *documents)
    term = model(p)["text"]
    hidden, at, total, count = states(model, p), 0, torch.zeros((), dtype=torch.float64), 0
    for segment in itertools.chain(*(d.segments for d in documents)):
        if segment.kind == T and segment.block is not None:
            known = sum(i != HIDDEN for i in segment.ids)
            for j, (i, learned) in enumerate(zip(segment.ids, segment.targets, strict=True)):
                if learned:
                    weight = known / sum(segment.targets) if generator == "joint_bound" else 1.0
                    logits = model.backbone.logits(hidden[at + j][None])
                    total = total + weight * F.cross_entropy(logits, torch.tensor([i]))
            count += known if generator == "joint_bound" else sum(segment.targets)
        at += segment.length
    assert term.count == p.counts["text"] == count > 0
    torch.testing.assert_close(term.sum, total, atol=1e-5, rtol=1e-6)  # weights are in fp32
    leaves = [*model.backbone.parameters(), *model.generator.parameters()]
    got, slow = (torch.autograd.grad(x, leaves, allow_unused=True) for x in (term.sum, total))
    for a, b in zip(got, slow, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_a_hidden_id_is_not_read(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another id in a hidden place changes what is to be predicted, and no state that predicts it."""
    model = make("joint").double()
    assert model.generator.text is not None
    plan = model.generator.text.plan

    def shifted(ids: Sequence[int], ends: Sequence[int], rng: np.random.Generator, by: int) -> MaskedBlock:
        made = plan(ids, ends, rng)
        return made._replace(ids=tuple(i + by * t for i, t in zip(made.ids, made.targets, strict=True)))

    found = []
    for by in (0, -3):
        monkeypatch.setattr(model.generator.text, "plan", functools.partial(shifted, by=by))
        p = packed(model, lay(model, Part("three plus seven")))
        with torch.no_grad():
            model(p)
            found.append((states(model, p), p.text_targets))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1] - 3, found[1][1])


def test_no_learned_text_is_an_exact_zero(make: Make) -> None:
    model = make("joint")
    p = packed(model, lay(model, Part("seven", learn=False), Part(picture(), learn=False)))
    losses = model(p)
    assert (losses["text"].sum.detach().item(), losses["text"].count) == (0.0, 0)
    sum(term.sum for term in losses.values()).backward()  # type: ignore[union-attr]
    assert model.generator.text is not None
    gradient = model.generator.text.hidden.grad
    model.zero_grad()
    assert gradient is not None
    assert not gradient.any()


# ---- how a block is written


def begun(model: UnifiedModel, prompts: Sequence[str], branches: int = 1) -> Session:
    session = Session.start(model, len(prompts), [Branch(), Branch(text=False)][:branches], 96)
    ids = [model.text.encode(text) for text in prompts]
    runs = [Run((model.text.special.bos, *i), (True, *[False] * len(i))) for i in ids]
    with torch.no_grad():
        session.append_text(runs)
    return session


def write(model: UnifiedModel, session: Session, seeds: Sequence[int], **settings: object) -> list[list[int]]:
    assert model.generator.text is not None
    rngs = [torch.Generator().manual_seed(seed) for seed in seeds]
    chosen = MaskedSettings(**settings)  # type: ignore[arg-type]
    with torch.no_grad():
        logits = model.backbone.logits
        return model.generator.text.write(session, model.read_text, logits, chosen, rngs).tolist()


@pytest.mark.parametrize("steps", [1, 2, 4, 5])
def test_the_surest_ids_stay(make: Make, steps: int) -> None:
    """Written out for one document: predict all, keep the surest, hide the rest again."""
    model = make("joint_bound").double()
    text = model.generator.text
    assert text is not None
    session, ids = begun(model, ["three plus"]), [HIDDEN] * 5
    block = text.plan([0] * 5, (), np.random.default_rng(0)).block
    for left in remaining(SCHEDULES["cosine"], 5, steps):
        with torch.no_grad():
            hidden = session.peek(Embeddings(model.read_text(torch.tensor(ids))), [block])[0]
            scores = model.backbone.logits(hidden).log_softmax(-1)
        whole = [int(s.argmax()) if i == HIDDEN else i for i, s in zip(ids, scores, strict=True)]
        order = sorted((j for j in range(5) if ids[j] == HIDDEN), key=lambda j: float(scores[j, whole[j]]))
        ids = [HIDDEN if j in order[:left] else whole[j] for j in range(5)]
    assert HIDDEN not in ids
    assert write(model, begun(model, ["three plus"]), [0], temperature=0.0, text_steps=steps) == [ids]


def test_steps_are_network_evaluations_of_one_branch(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("joint_bound")
    seen: list[int] = []
    handle = model.backbone.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    for asked, expected in ((1, 1), (3, 3), (None, 5)):
        session = begun(model, ["a", "three plus"], branches=2)
        seen.clear()
        lengths = list(session._state.cache.lengths)
        write(model, session, [0, 1], text_steps=asked)
        assert seen == [2 * 5] * expected  # text is not guided
        assert session._state.cache.lengths == lengths
    handle.remove()


def test_a_block_does_not_depend_on_its_neighbours(make: Make) -> None:
    model = make("joint").double()
    prompts, seeds = ["a handwritten seven", "", "three"], [3, 4, 5]
    together = write(model, begun(model, prompts), seeds, top_k=20, top_p=0.9)
    for i, block in enumerate(together):
        assert write(model, begun(model, prompts[i : i + 1]), seeds[i : i + 1], top_k=20, top_p=0.9) == [block]
    again = write(model, begun(model, prompts), [3, 4, 6], top_k=20, top_p=0.9)
    assert again[:2] == together[:2]
    assert again[2] != together[2]


@pytest.mark.parametrize("temperature", [0.0, 1.0, 100.0])
def test_text_never_holds_special_or_unused_ids(
    make: Make, monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    model = make("joint")
    before = model.text
    model.text = TextTokenizer.train(["a handwritten seven"], 270)
    special, rows = model.text.special, model.backbone.config.vocabulary
    logits, read = model.backbone.logits, model.text.decode
    seen: list[int] = []

    def tempting(hidden: torch.Tensor) -> torch.Tensor:
        scores = logits(hidden)
        scores[:, [special.bos, special.eoi, *range(len(model.text), rows)]] += 1e4
        return scores

    monkeypatch.setattr(model.backbone, "logits", tempting)
    monkeypatch.setattr(model.text, "decode", lambda ids: seen.extend(ids) or read(ids))
    prompts = [Document((Part("a", learn=False),))] * 3
    decode(model, prompts, DecodingSettings(max_tokens=10, max_images=1, temperature=temperature), [0, 1, 2])
    model.text = before
    assert len(seen) > 5
    assert max(seen) < special.bos


def test_a_document_stops_where_its_context_ends(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of a block, if need be; and no image is begun at a place in a block where it would not fit."""
    prompt = Document((Part("a handwritten", learn=False),))
    length = 1 + len(make("joint").text.encode("a handwritten"))
    for room, draws in itertools.product(range(17, 21), (False, True)):
        model = make("joint", context_length=length + room)
        say_n_then_draw(model, monkeypatch, draws)
        (done,) = decode(model, [prompt], DecodingSettings(max_tokens=99, max_images=1), [0])
        images = int(draws and room >= 1 + 18)
        assert len(done.images) == images
        assert "".join(p.text for p in done.parts[1:] if p.is_text) == "n" * (room - 18 * images)
        assert not images or done.parts[1].text == "n"


def say_n_then_draw(model: UnifiedModel, monkeypatch: pytest.MonkeyPatch, draws: bool) -> None:
    """Make the model say "n" all the time, or draw from the second id of each block on where it may."""
    logits, (n,) = model.backbone.logits, model.text.encode("n")

    def scripted(hidden: torch.Tensor) -> torch.Tensor:
        scores = logits(hidden)
        scores[:, n] += 1e5
        if draws:
            scores[torch.arange(len(scores)) % B > 0, model.text.special.boi] += 1e6
        return scores

    monkeypatch.setattr(model.backbone, "logits", scripted)


def test_pieces_come_by_the_block(make: Make) -> None:
    model = make("joint")
    settings = DecodingSettings(max_tokens=9, max_images=0, temperature=1.0)
    prompts = [Document((Part(words, learn=False),)) for words in ("seven", "a handwritten")]
    whole = decode(model, prompts, settings, [1, 2])
    pieces = list(stream(model, prompts, settings, [1, 2]))
    for i, document in enumerate(whole):
        assert "".join(p.text for p in pieces if p.document == i) == "".join(p.text for p in document.parts[1:])


# ---- refusals


def test_what_means_nothing_is_refused(make: Make) -> None:
    with pytest.raises(ValueError, match=r"generator\.text\.block: expected 1 id or more, got 0"):
        MaskedText(8, 0)
    with pytest.raises(ValueError, match=r"schedule: expected one of cosine, .* got sine"):
        MaskedText(8, 4, "sine")
    with pytest.raises(ValueError, match="text_steps: expected 1 or more, got 0"):
        MaskedSettings(text_steps=0)
    model = make("joint")
    with pytest.raises(ValueError, match=r"text_steps: expected at most one an id of a block \(3\), got 4"):
        write(model, begun(model, ["a"]), [0], text_steps=4)
    with pytest.raises(ValueError, match=r"sequence\.write_size: expected false where generator\.text writes"):
        make("joint", write_size=True)
    with pytest.raises(ValueError, match="expected MaskedSettings, got FlowSettings"):
        decode(model, [Document(())], DecodingSettings(image=FlowSettings()), [0])


# ---- learning


@pytest.mark.slow
def test_learns_texts_and_images_by_heart(make: Make) -> None:
    """Of each of three pictures its words, of several blocks, in three steps a block; of each words the picture."""
    model = make("joint", noise=0.0, drop_text=0.0, context_length=96)
    words = ["a handwritten seven", "three plus seven equals", "grün"]
    pictures = [Image.fromarray(np.full((8, 8, 3), 85 * i, dtype=np.uint8)) for i in range(3)]
    assert max(len(model.text.encode(w)) for w in words) > B
    pairs = list(zip(words, pictures, strict=True))
    learned = [Document((Part(p, learn=False), Part(w))) for w, p in pairs]
    learned += [Document((Part(w, learn=False), Part(p))) for w, p in pairs]
    steps = 240
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2, weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps, pct_start=0.1)
    for step in first_checked(range(steps)):
        documents = [model.sequencer.document(d, (step, i)) for i, d in enumerate(learned)]
        losses = model(packed(model, *documents))
        optimizer.zero_grad()
        torch.stack([losses[name].sum / losses[name].count for name in ("text", "image")]).sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()
    read = decode(model, [Document(d.parts[:1]) for d in learned[:3]], DecodingSettings(), [0, 1, 2])
    assert [d.text for d in read] == words
    (fast,) = decode(model, [Document(learned[0].parts[:1])], DecodingSettings(image=MaskedSettings(text_steps=1)), [0])
    assert fast.text == words[0]
    drawn = decode(model, [Document(d.parts[:1]) for d in learned[3:]], DecodingSettings(max_images=1), [0, 1, 2])
    for document, image in zip(drawn, pictures, strict=True):  # it begins the image by itself, and ends behind it
        assert [p.is_image for p in document.parts] == [False, True]
        assert np.abs(np.asarray(document.images[0], dtype=float) - np.asarray(image)).mean() < 25
