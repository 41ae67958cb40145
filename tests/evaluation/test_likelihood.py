"""Teacher-forced likelihoods are the training loss, and do not depend on what is scored beside them."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from PIL import Image

from unimodal.decoding import Session, decode, read_prompts
from unimodal.decoding_settings import DecodingSettings
from unimodal.documents import Document, Part
from unimodal.evaluation.likelihood import Likelihood, log_likelihoods
from unimodal.model import UnifiedModel
from unimodal.packing import Run, pack
from unimodal_generators.base import Block, Branch, Grid, TokenKind
from unimodal_generators.masked_text import HIDDEN, MaskedBlock

Make = Callable[..., UnifiedModel]


def picture(seed: int, height: int = 8, width: int = 8) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    return Image.fromarray(torch.randint(0, 256, (height, width, 3), generator=generator).byte().numpy())


PROMPTS = [
    Document((Part(picture(0), learn=False), Part("how many", learn=False))),
    Document((Part("a handwritten", learn=False),)),
    Document((Part("see ", learn=False), Part(picture(1, 4, 8), learn=False))),  # ends in an image
    Document((Part(picture(2), learn=False), Part(picture(3), learn=False), Part(" plus", learn=False))),
]
CHOICES = [["seven", " three", "three plus seven equals ten"], [" seven"], ["n", "grün", "a"], [" 数字", " ten"]]


def training_loss(model: UnifiedModel, prompt: Document, choice: str, end: bool) -> float:
    """The text loss of a packed forward in which the choice alone (and the end, if asked) is learned."""
    tail = () if end else (Part("tail", learn=False),)  # whatever follows keeps the end from being a target
    document = Document((*prompt.parts, Part(choice), *tail))

    def loss() -> float:
        sequenced = model.sequencer.document(document, (0,), train=False)
        with torch.no_grad():
            return float(model(pack([sequenced], model.backbone.config.experts, model.generator.reads))["text"].sum)

    if (masked := model.generator.text) is None:
        return loss()
    total = 0.0
    for j in range(masked.block):  # the j-th id of every block, all behind it hidden

        def plan(ids: Sequence[int], ends: Sequence[int], rng: np.random.Generator, j: int = j) -> MaskedBlock:
            own = [*ids[: j + 1], *[HIDDEN] * (masked.block - len(ids[: j + 1]))]
            block = Block(Grid(1, masked.block), TokenKind.TEXT, True, True, n_targets=int(j < len(ids)))
            return MaskedBlock(tuple(own), tuple(i == j < len(ids) for i in range(masked.block)), block)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(masked, "plan", plan)
            total += loss()
    return total


@pytest.mark.parametrize("end", [False, True])
def test_equals_the_training_loss(model: UnifiedModel, end: bool) -> None:
    model = model.double()
    try:
        found = log_likelihoods(model, PROMPTS, CHOICES, end)
        for prompt, listed, row in zip(PROMPTS, CHOICES, found, strict=True):
            assert len(row) == len(listed)
            for choice, likelihood in zip(listed, row, strict=True):
                assert likelihood.total == pytest.approx(-training_loss(model, prompt, choice, end), rel=1e-9)
                assert likelihood.tokens == len(model.text.encode(choice)) + end
                assert likelihood.mean == likelihood.total / likelihood.tokens
    finally:
        model.float()


def test_in_single_precision(make: Make) -> None:
    model = make("flow")
    for prompt, listed, row in zip(PROMPTS, CHOICES, log_likelihoods(model, PROMPTS, CHOICES), strict=True):
        for choice, likelihood in zip(listed, row, strict=True):
            assert likelihood.total == pytest.approx(-training_loss(model, prompt, choice, False), rel=1e-5)


def test_batched_is_one_by_one(model: UnifiedModel) -> None:
    together = log_likelihoods(model, PROMPTS, CHOICES)
    for prompt, listed, row in zip(PROMPTS, CHOICES, together, strict=True):
        for choice, likelihood in zip(listed, row, strict=True):
            ((alone,),) = log_likelihoods(model, [prompt], [[choice]])
            assert likelihood.total == pytest.approx(alone.total, abs=1e-4)
            assert (likelihood.tokens, likelihood.greedy) == (alone.tokens, alone.greedy)


def test_a_prompt_is_read_once(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = make("flow"), []
    encode = model.tokenizer.encode_each
    monkeypatch.setattr(model.tokenizer, "encode_each", lambda images: seen.extend(images) or encode(images))
    log_likelihoods(model, [PROMPTS[0]], [["a", "b", "c", "d"]])
    assert len(seen) == 1


def test_greedy_is_what_decoding_writes(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("autoregressive")
    logits, (n,) = model.backbone.logits, model.text.encode("n")
    monkeypatch.setattr(model.backbone, "logits", lambda hidden: logits(hidden).index_fill(1, torch.tensor([n]), 50.0))
    (done,) = decode(model, [PROMPTS[1]], DecodingSettings(max_tokens=4, max_images=0), [0])
    assert done.parts[-1].text == "nnnn"
    ((likely, last, first),) = log_likelihoods(model, [PROMPTS[1]], [["nnnn", "nnnx", "xnnn"]])
    assert (likely.greedy, last.greedy, first.greedy) == (True, False, False)


def test_the_model_is_left_as_it_was(make: Make) -> None:
    model = make("flow").train()
    log_likelihoods(model, PROMPTS[:1], [["a"]])
    assert model.training


def test_nothing_asked(make: Make) -> None:
    model = make("flow")
    assert log_likelihoods(model, [], []) == []
    assert log_likelihoods(model, PROMPTS[:2], [[], []]) == [[], []]
    found = log_likelihoods(model, PROMPTS[:2], [[], ["a"]])
    assert found[0] == []
    assert isinstance(found[1][0], Likelihood)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ([["a"], ["b"]], "choices: expected one list a prompt"),
        ([["a", ""]], r"choices\[0\]\[1\]: expected text, got ''"),
    ],
)
def test_refusals(make: Make, choices: list[list[str]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        log_likelihoods(make("flow"), PROMPTS[:1], choices)


def test_a_choice_that_does_not_fit_is_refused(make: Make) -> None:
    model = make("flow", context_length=24)
    with pytest.raises(ValueError, match=r"prompt 0: it has \d+ tokens and needs room for 40 more, .* 24"):
        log_likelihoods(model, PROMPTS[1:2], [["x" * 40]])


def test_peeking_at_text_leaves_no_trace(make: Make) -> None:
    """What follows is the same whether or not other text was looked at in between; and it gives what appending gives."""
    model = make("flow").double()
    runs = [Run((5, 6, 7), (False,) * 3), Run((8,), (False,))]
    peeked, plain = (read_prompts(model, PROMPTS[:2], 8) for _ in range(2))
    with torch.no_grad():
        hidden = peeked.peek_text([Run((9, 9, 9, 9), (False,) * 4)] * 2)
        assert hidden is not None
        assert hidden.shape[:2] == (2, 4)
        hidden = peeked.peek_text(runs)
        assert hidden is not None
        assert torch.equal(peeked.last, plain.last)
        plain.append_text(runs)
        assert torch.allclose(hidden[0, 2], plain.last[0, 0], atol=1e-12)
        assert torch.allclose(hidden[1, 0], plain.last[0, 1], atol=1e-12)
        peeked.append_text(runs)
    assert torch.allclose(peeked.last, plain.last, atol=1e-12)
    assert [peeked.length(i) for i in range(2)] == [plain.length(i) for i in range(2)]


def test_peeking_at_text_that_no_branch_keeps(make: Make) -> None:
    session = Session.start(make("flow"), 1, [Branch(text=False)], 8)
    assert session.peek_text([Run((5,), (False,))]) is None
