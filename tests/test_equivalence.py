"""What must always be equal (docs/architecture.md): packed, alone, in a session, cached, batched."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import picture
from generator_cases import CASES, WHOLE
from PIL import Image

from unimodal.backbone import SCHEMES, Experts, Lora, Moe
from unimodal.decoding import Session, decode
from unimodal.decoding_settings import DecodingSettings
from unimodal.documents import Document, Part
from unimodal.model import UnifiedModel
from unimodal.packing import PackedSequence, Run, SequencedDocument, pack
from unimodal_generators import Regression
from unimodal_generators.base import Block, Branch, Embeddings, TokenKind
from unimodal_generators.masked_text import HIDDEN


def sequenced(model: UnifiedModel, documents: list[Document]) -> list[SequencedDocument]:
    return [model.sequencer.document(d, (0, 0, i), train=False) for i, d in enumerate(documents)]


def packed(model: UnifiedModel, documents: list[SequencedDocument]) -> PackedSequence:
    return pack(documents, model.backbone.config.experts, model.generator.reads)


def hidden_in_sequence_order(model: UnifiedModel, p: PackedSequence) -> torch.Tensor:
    """Hidden states of a training pass, in the order of reading."""
    states: list[torch.Tensor] = []
    handle = model.backbone.register_forward_hook(lambda module, inputs, output: states.append(output))
    with torch.no_grad():
        model(p)
    handle.remove()
    return states[0][p.inverse, -model.backbone.config.width :]  # of the last layer


def by_block(embeddings: Embeddings, blocks: Sequence[Block]) -> Iterator[Embeddings]:
    values = embeddings.values.split([b.length for b in blocks] or [0])
    conditions = [None] * len(blocks) if embeddings.condition is None else embeddings.condition.split(1)
    return map(Embeddings, values, conditions)


def hidden_in_session(model: UnifiedModel, document: SequencedDocument) -> torch.Tensor:
    """The same parts fed one by one to a session: private blocks peeked at, the rest appended."""
    p = packed(model, [document])
    generator = model.generator
    session = Session.start(model, 1, [Branch()], document.length)
    states = []
    with torch.no_grad():
        tokens = model.encode(p.images)
        learned = generator.corrupt(tokens.select(p.learned_images), p.learned_blocks)
        context = generator.context(tokens.select(p.context_images))
        streams = {
            TokenKind.LEARNED: by_block(generator.embed(learned), p.learned_blocks),
            TokenKind.CLEAN: by_block(generator.embed(context), p.context_blocks),
            TokenKind.UNDERSTANDING: by_block(Embeddings(model.understand(p.understood)), p.understood_blocks),
        }
        for segment in document.segments:
            if segment.kind == TokenKind.TEXT and segment.block is not None:  # hidden: targets, and what nobody knows
                pairs = zip(segment.ids, segment.targets, strict=True)
                ids = torch.tensor([HIDDEN if learned else i for i, learned in pairs])
                states.append(session.peek(Embeddings(model.read_text(ids)), [segment.block])[0])
                continue
            if segment.kind == TokenKind.TEXT:
                for i in segment.ids:
                    session.append_text([Run((i,), (False,))])
                    states.append(session.last[0])
                continue
            one = next(streams[segment.kind])
            block = segment.block
            assert block is not None
            if block.private:
                states.append(session.peek(one, [block])[0])
            elif block.bidirectional or block.prefix or one.condition is not None:  # told its time as a whole
                states.append(session.append(one, [block])[0])
            else:  # causal images come token by token
                for i, value in enumerate(one.values):
                    states.append(session.append(Embeddings(value[None]), [block.piece(i, 1)])[0])
    return torch.cat([x[:, -model.backbone.config.width :] for x in states])


def test_a_training_sequence_equals_its_parts_fed_to_a_session(model: UnifiedModel, mixed: list[Document]) -> None:
    for document in sequenced(model, mixed):
        trained = hidden_in_sequence_order(model, packed(model, [document]))
        torch.testing.assert_close(hidden_in_session(model, document), trained, atol=2e-5, rtol=1e-4)


def test_and_in_float64_to_the_last_digits(model: UnifiedModel, mixed: list[Document]) -> None:
    model = model.double()
    try:
        for document in sequenced(model, mixed):
            trained = hidden_in_sequence_order(model, packed(model, [document]))
            assert trained.dtype == torch.float64
            # Rotary tables are fp32, alike on both sides; nothing else is.
            torch.testing.assert_close(hidden_in_session(model, document), trained, atol=1e-10, rtol=1e-8)
    finally:
        model.float()


FULL = Experts(attention=True, mlp=True, norms=True)
VARIANTS = {
    f"{time}-{positions}-{name}": {"time": time, "experts": experts, "backbone": {"positions": positions}}
    for time in ("add", "token", "adaln")
    for positions in sorted(SCHEMES)
    for name, experts in (("dense", Experts()), ("mot", FULL))
}
MOE = {"moe": Moe(experts=4, top_k=2, width=16, shared=1)}
VARIANTS |= {
    "lora": {"experts": Experts(lora=Lora(2, 4.0))},
    "moe": {"experts": Experts(), "backbone": MOE},
    "moe-mot-adaln": {"experts": FULL, "backbone": MOE, "time": "adaln"},
    "three": {"experts": Experts(True, True, True, clean="look"), "time": "adaln"},
    "causal-features": {"generator": "reader", "causal_features": True},
    "crossed": {"experts": Experts(mlp=True, clean="text"), "time": "token"},
    "qwen2": {"backbone": {"qkv_bias": True, "qk_norm": False, "head_dim": 24, "tied_head": False, "added_tokens": 7}},
    **{
        f"{name}-{time}": {"generator": name, "time": time}
        for name in ("unet", "convnext", "diffusion")
        for time in ("add", "token", "adaln")
    },
    **{
        f"{name}-{positions}": {"generator": name, "backbone": {"positions": positions}}
        for name in (
            "autoregressive",
            "next_scale",
            "reader",
            "both",
            "next-both",
            "queries",
            "ladder",
            "dream",
            "token_random",
            "joint",
        )
        for positions in SCHEMES
    },
    "read-adaln": {"generator": "both", "time": "adaln", "experts": Experts(True, True, True, understanding="look")},
    "read-token": {"generator": "reader", "time": "token", "experts": Experts(mlp=True, understanding="image")},
    "joint-three": {"generator": "joint_bound", "experts": Experts(True, True, True, clean="look")},
    "cosine-three": {"generator": "cosine", "experts": Experts(True, True, True, clean="look")},
    **{name: {"generator": name} for name in CASES if not CASES[name].whole},
    "prefilled-three": {"generator": "prefilled", "experts": Experts(True, True, True, clean="look")},
}


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_so_does_every_way_to_tell_time_and_place(
    make: Callable[..., UnifiedModel], mixed: list[Document], settings: dict
) -> None:
    model = make(**settings).double()
    for document in sequenced(model, mixed):
        trained = hidden_in_sequence_order(model, packed(model, [document]))
        torch.testing.assert_close(hidden_in_session(model, document), trained, atol=1e-10, rtol=1e-8)
    together = hidden_in_sequence_order(model, packed(model, sequenced(model, mixed)))
    alone = [hidden_in_sequence_order(model, packed(model, [d])) for d in sequenced(model, mixed)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_patches_see_those_behind_them_where_they_are_told_to(
    make: Callable[..., UnifiedModel], bidirectional: bool
) -> None:
    """A flow image whose last patch changes: hidden states of the patches before it do where blocks are bidirectional."""
    model = make("flow" if bidirectional else "flow_causal").double()
    image, changed = np.asarray(picture(0)), np.array(picture(0))
    changed[-2:, -2:] ^= 255
    states = []
    for pixels in (image, changed):
        document = Document((Part("seven", learn=False), Part(Image.fromarray(pixels))), "text_to_image")
        states.append(hidden_in_sequence_order(model, packed(model, sequenced(model, [document]))))
    words, learned, clean, _ = (states[0] != states[1]).any(-1).split([4, 16, 16, 2])  # what is before and behind it
    assert not words.any()
    for patches in (learned, clean):
        assert patches[-1]
        assert patches[:-1].any() == bidirectional


@pytest.mark.parametrize("causal", [False, True])
def test_features_see_those_behind_them_unless_they_are_causal(
    make: Callable[..., UnifiedModel], causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A given image whose last feature changes."""
    model = make("reader", causal_features=causal).double()
    document = Document((Part("look", learn=False), Part(picture(0), learn=False), Part("seven")))
    p, states = packed(model, sequenced(model, [document])), []
    features = model.understand(p.understood)
    for more in (0.0, 1.0):
        shown = torch.cat([features[:-1], features[-1:] + more])
        monkeypatch.setattr(model, "understand", lambda images, shown=shown: shown)
        states.append(hidden_in_sequence_order(model, p))
    before, looked, after = (states[0] != states[1]).any(-1).split(p.table.length.tolist())
    assert not before.any()
    assert looked[-1]
    assert looked[:-1].any() != causal
    assert after.all()


@pytest.mark.parametrize("time", ["add", "token", "adaln"])
def test_text_before_an_image_does_not_know_its_time(
    make: Callable[..., UnifiedModel], mixed: list[Document], time: str
) -> None:
    """Whatever the time does to the image, text before it is as if nobody told it, to the last bit."""
    model = make("flow", time=time, experts=FULL)
    p = packed(model, sequenced(model, mixed[:1]))  # a caption, its drawing, the end
    caption = int(p.table.length[0])
    before = hidden_in_sequence_order(model, p)
    with torch.no_grad():
        for parameter in model.generator.time_in.parameters():
            parameter.mul_(-2.0)
    after = hidden_in_sequence_order(model, p)
    assert torch.equal(after[:caption], before[:caption])
    assert ((after[caption:] - before[caption:]).abs().amax(-1) > 1e-4).all()


def test_packed_equals_each_document_alone(model: UnifiedModel, mixed: list[Document]) -> None:
    documents = sequenced(model, mixed)
    together = hidden_in_sequence_order(model, packed(model, documents))
    alone = [hidden_in_sequence_order(model, packed(model, [d])) for d in documents]
    torch.testing.assert_close(together, torch.cat(alone), atol=2e-5, rtol=1e-4)
    with torch.no_grad():
        losses = [model(packed(model, [d])) for d in documents]
        total = model(packed(model, documents))
    for name, term in total.items():
        assert term.count == sum(loss[name].count for loss in losses)
        torch.testing.assert_close(term.sum, sum(loss[name].sum for loss in losses), atol=1e-3, rtol=1e-5)


def test_order_of_documents_changes_no_loss(model: UnifiedModel, mixed: list[Document]) -> None:
    documents = sequenced(model, mixed)
    with torch.no_grad():
        sums = [
            {name: float(term.sum) for name, term in model(packed(model, list(order))).items()}
            for order in itertools.islice(itertools.permutations(documents), 6)
        ]
    for other in sums[1:]:
        assert other == pytest.approx(sums[0], rel=1e-5)


def test_decoding_many_equals_decoding_each(model: UnifiedModel, mixed: list[Document]) -> None:
    model = model.double()
    try:
        prompts = [Document(d.parts[:n], d.kind) for d, n in zip(mixed, (1, 1, 4, 1), strict=True)]
        settings = DecodingSettings(max_tokens=12, max_images=2, temperature=1.0, image=_guided(model, 2.0))
        together = decode(model, prompts, settings, seeds=[1, 2, 3, 4])
        alone = [decode(model, [p], settings, seeds=[s])[0] for p, s in zip(prompts, (1, 2, 3, 4), strict=True)]
    finally:
        model.float()
    for a, b in zip(together, alone, strict=True):
        assert [p.content if p.is_text else p.content.tobytes() for p in a.parts] == [
            p.content if p.is_text else p.content.tobytes() for p in b.parts
        ]


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_a_drawn_image_does_not_depend_on_the_batch_in_single_precision(model: UnifiedModel, scale: float) -> None:
    """Vectors to 1e-5; ids are drawn, and a last digit may choose another: theirs are compared in float64, above.

    What regression draws one by one, guided, it reads again, and last digits grow from token to token: it alone is asked for
    1e-3 here, and for 1e-9 in float64.
    """
    if model.tokenizer.layout.codebooks:
        pytest.skip("ids: test_decoding_many_equals_decoding_each compares them in float64")
    prompts = {"a handwritten seven": 1, "two": 2, "one more, with a longer prompt": 3}
    grows = scale > 1 and isinstance(model.generator, Regression) and model.generator.order == "raster"
    try:
        for dtype, tolerance in ((torch.float32, 1e-3 if grows else 1e-5), (torch.float64, 1e-9)):
            model.to(dtype)
            _, together = _sample_each(model, scale, prompts)
            for (prompt, seed), tokens in zip(prompts.items(), together, strict=True):
                _, (alone,) = _sample_each(model, scale, {prompt: seed})
                assert tokens.dtype == dtype
                torch.testing.assert_close(tokens, alone, atol=tolerance, rtol=tolerance)
    finally:
        model.float()


def test_guidance_one_is_the_conditional_model(model: UnifiedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model.double()
    try:
        _, conditional = _sample(model, 1.0)
        branches, guided = _sample(model, 1.0 + 1e-12)
        _, strong = _sample(model, 8.0)
    finally:
        model.float()
    assert branches == 2
    torch.testing.assert_close(guided.double(), conditional.double(), atol=1e-6, rtol=0)
    assert not torch.equal(strong, conditional)


def test_guidance_zero_ignores_the_prompt(model: UnifiedModel) -> None:
    model = model.double()
    try:
        _, a = _sample(model, 0.0, "a handwritten seven")
        _, b = _sample(model, 0.0, "three plus seven equals ten")
        _, c = _sample(model, 1.0, "three plus seven equals ten")
        asked = [
            Document((Part(text, learn=False),)) for text in ("a handwritten seven", "three plus seven equals ten")
        ]
        image = model.generator.sampling.override(guidance=0.0)
        drawn = decode(model, asked, DecodingSettings("image", max_tokens=0, max_images=1, image=image), [3, 3])
    finally:
        model.float()
    torch.testing.assert_close(a.double(), b.double(), atol=1e-9, rtol=0)
    assert not torch.equal(b, c)
    assert drawn[0].images[-1].tobytes() == drawn[1].images[-1].tobytes()


def test_guidance_zero_reads_the_negative_words_alone(model: UnifiedModel) -> None:
    """u + 0 (c - u) is u, and u has read the negative words where the prompt's stood: text, given images and all."""
    model = model.double()
    try:
        image = model.generator.sampling
        drawn = []
        for asked, negative, guidance in (("three plus", "a handwritten seven", 0.0), ("a handwritten seven", "", 1.0)):
            settings = DecodingSettings(
                "image", max_tokens=0, max_images=1, image=image.override(guidance=guidance), negative=negative
            )
            given = (Part(picture(3), learn=False), Part(asked, learn=False), Part(picture(4, 4, 8), learn=False))
            prompts = [Document((Part(asked, learn=False),)), Document((*given, Part(" and then" * (guidance == 0))))]
            drawn.append(decode(model, prompts, settings, [3, 4]))
        plain = [decode(model, [d], replace(settings, image=image.override(guidance=2.0)), [3])[0] for d in prompts[:1]]
        led = replace(settings, image=image.override(guidance=2.0), negative="three plus")
        away = decode(model, prompts[:1], led, [3])
    finally:
        model.float()
    for ours, theirs in zip(*drawn, strict=True):
        assert ours.images[-1].tobytes() == theirs.images[-1].tobytes()
    assert plain[0].images[-1].tobytes() != away[0].images[-1].tobytes()


def test_negative_words_need_guidance_and_no_dropped_text(make: Callable[..., UnifiedModel]) -> None:
    prompt, drawing = Document((Part("three", learn=False),)), DecodingSettings("image", max_tokens=0, max_images=1)
    model = make("flow", drop_text=0.0)
    plain, guided = (model.generator.sampling.override(guidance=scale, steps=2) for scale in (1.0, 2.0))
    with pytest.raises(ValueError, match=r"negative: expected none where guidance is 1, .* got 'blurred'"):
        decode(model, [prompt], replace(drawing, image=plain, negative="blurred"), [0])
    with pytest.raises(ValueError, match="guidance: this recipe never dropped text"):
        decode(model, [prompt], replace(drawing, image=guided), [0])
    (drawn,) = decode(model, [prompt], replace(drawing, image=guided, negative="blurred"), [0])
    assert len(drawn.images) == 1
    with pytest.raises(ValueError, match=r"prompt 0: it has 63\d tokens, with 6\d\d of negative in"):
        decode(model, [prompt], replace(drawing, image=guided, negative="blurred " * 90), [0])
    (silent,) = decode(
        model, [Document((Part(picture(1), learn=False),))], replace(drawing, image=guided, negative="x"), [0]
    )
    assert len(silent.images) == 2


@pytest.mark.parametrize("name", WHOLE)
def test_guidance_of_images_is_nothing_where_none_is_given(make: Callable[..., UnifiedModel], name: str) -> None:
    """Nested, it would make more of the text's; and documents with and without images may be drawn together."""
    model = make(name, drop_images=0.1).double()
    plain = Document((Part("a handwritten seven", learn=False),))
    given = Document((Part(picture(5), learn=False), Part("a handwritten seven", learn=False)))

    def drawn(documents: Sequence[Document], **settings: object) -> list[np.ndarray]:
        image = model.generator.sampling.override(guidance=2.0, **settings)
        asked = DecodingSettings("image", max_tokens=0, max_images=1, image=image)
        return [np.array(d.images[-1], int) for d in decode(model, documents, asked, range(len(documents)))]

    for combine in ("nested", "additive"):
        together = drawn([plain, given, plain], image_guidance=5.0, combine=combine)
        unled = drawn([plain, given, plain])
        assert all(np.abs(together[i] - unled[i]).max() <= 1 for i in (0, 2))  # a level of 256
        assert not np.array_equal(together[1], unled[1])


@pytest.mark.parametrize("name", WHOLE)
def test_two_conditions_have_scales_and_intervals_of_their_own(make: Callable[..., UnifiedModel], name: str) -> None:
    model = make(name, drop_images=0.1).double()
    prompt = Document((Part(picture(5), learn=False), Part("a handwritten seven", learn=False)))

    def drawn(**settings: object) -> torch.Tensor:
        image = model.generator.sampling.override(**settings)
        (answer,) = decode(model, [prompt], DecodingSettings("image", max_tokens=0, max_images=1, image=image), [3])
        return torch.from_numpy(np.array(answer.images[-1])).float()

    text, images, both = drawn(guidance=4.0), drawn(image_guidance=5.0), drawn(guidance=4.0, image_guidance=5.0)
    assert not torch.equal(text, images)
    assert not torch.equal(text, both)
    assert not torch.equal(images, both)
    assert not torch.equal(both, drawn(guidance=4.0, image_guidance=5.0, combine="additive"))
    close = {"atol": 1.0, "rtol": 0.0}  # a level of 256
    if getattr(model.generator, "order", "") == "parallel":  # which has one step
        with pytest.raises(ValueError, match="image_interval: in parallel there is one step"):
            drawn(image_guidance=5.0, image_interval=[1.0, 1.0])
        return
    never = [1.0, 1.0]  # behind the last step
    torch.testing.assert_close(drawn(guidance=4.0, image_guidance=5.0, image_interval=never), text, **close)
    only = drawn(guidance=4.0, interval=never, image_guidance=5.0, image_interval=[0.0, 1.0])
    torch.testing.assert_close(only, images, **close)
    plain = drawn()
    torch.testing.assert_close(drawn(guidance=4.0, image_guidance=5.0, interval=never), plain, **close)
    assert not torch.equal(drawn(guidance=12.0, interval=[0.0, 0.5]), plain)


def test_peek_leaves_no_trace(model: UnifiedModel) -> None:
    session = Session.start(model, 2, [Branch(), Branch(text=False)], 64)
    session.append_text([Run((1, 2, 3), (True, False, False)), Run((4, 5), (True, False))])
    cache = session._state.cache
    before = [(cache.k[:, s, :, :n].clone(), cache.v[:, s, :, :n].clone()) for s, n in enumerate(cache.lengths)]
    lengths, last, following = list(cache.lengths), session.last.clone(), list(session._state.next)
    grid = model.tokenizer.layout.grid(8, 8)
    block = model.generator.plan_context(grid)[0]
    with torch.no_grad():
        session.peek(Embeddings(torch.randn(2 * block.length, 32)), [block, block])
    assert cache.lengths == lengths == [3, 2, 1, 1]
    assert session._state.next == following
    assert torch.equal(session.last, last)
    for s, (k, v) in enumerate(before):
        assert torch.equal(cache.k[:, s, :, : lengths[s]], k)
        assert torch.equal(cache.v[:, s, :, : lengths[s]], v)


def test_text_fed_at_once_equals_token_by_token(model: UnifiedModel) -> None:
    ids = tuple(model.text.encode("three plus seven"))
    with torch.no_grad():
        whole = Session.start(model, 1, [Branch()], 64)
        whole.append_text([Run(ids, (False,) * len(ids))])
        single = Session.start(model, 1, [Branch()], 64)
        for i in ids:
            single.append_text([Run((i,), (False,))])
    torch.testing.assert_close(whole.last, single.last, atol=1e-5, rtol=1e-4)


def _guided(model: UnifiedModel, scale: float):
    return model.generator.sampling.override(guidance=scale)


def _sample(model: UnifiedModel, scale: float, prompt: str = "a handwritten seven") -> tuple[int, torch.Tensor]:
    """Raw tokens of one image, and how many branches drew it."""
    branches, (tokens,) = _sample_each(model, scale, {prompt: 3})
    return branches, tokens


def _sample_each(model: UnifiedModel, scale: float, prompts: dict[str, int]) -> tuple[int, list[torch.Tensor]]:
    """Raw tokens of one image a prompt, drawn together by its seed, and how many branches drew them."""
    branches = [Branch()] + ([Branch(text=False)] if scale != 1 else [])
    session = Session.start(model, len(prompts), branches, 64)
    runs = [(model.text.special.bos, *model.text.encode(prompt), model.text.special.boi) for prompt in prompts]
    with torch.no_grad():
        session.append_text([Run(ids, (True, *[False] * (len(ids) - 2), True)) for ids in runs])
        grids = [model.tokenizer.layout.grid(8, 8)] * len(prompts)
        rngs = [torch.Generator().manual_seed(seed) for seed in prompts.values()]
        *_, tokens = model.generator.sample(session, grids, _guided(model, scale), rngs)
    return session.branches, [one.values for one in tokens.split()]


def test_equal_experts_equal_the_dense_model(make: Callable[..., UnifiedModel], mixed: list[Document]) -> None:
    routed, dense = make("flow"), make("flow", experts=Experts())
    state = dense.state_dict()
    for name in routed.state_dict():
        source = name.replace(".experts.text.", ".experts.shared.").replace(".experts.image.", ".experts.shared.")
        routed.state_dict()[name].copy_(state[source])
    p = packed(dense, sequenced(dense, mixed))
    q = packed(routed, sequenced(routed, mixed))
    torch.testing.assert_close(
        hidden_in_sequence_order(routed, q), hidden_in_sequence_order(dense, p), atol=1e-5, rtol=1e-4
    )
