"""How likely a model finds given continuations of documents: teacher forcing, as in training.

Letters: R prompts, T tokens of the longest continuation, C width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from unimodal.decoding import Session, read_prompts
from unimodal.documents import Document
from unimodal.model import UnifiedModel
from unimodal.packing import Run
from unimodal_generators import MaskedText


@dataclass(frozen=True)
class Likelihood:
    """What a model thinks of one continuation.

    Attributes:
        total: natural logarithm of its probability, the sum over its tokens.
        tokens: how many tokens it has.
        greedy: whether each token is the likeliest one.
    """

    total: float
    tokens: int
    greedy: bool

    @property
    def mean(self) -> float:
        """Logarithm a token, which does not favour short continuations."""
        return self.total / self.tokens


@torch.no_grad()
def log_likelihoods(
    model: UnifiedModel, prompts: Sequence[Document], choices: Sequence[Sequence[str]], end: bool = False
) -> list[list[Likelihood]]:
    """Likelihood of each choice as the part that follows its prompt; masked text counts as written from left to right.

    A prompt is read once, whatever the number of its choices; the first choices of all prompts are scored together, then
    the second ones, and so on. A choice is spelt as a part of its own, as in training: no token spans the border, so a
    word behind a word begins with its space (" cat"), and one behind an image does if it did so in training.

    Args:
        model: any model; it is in evaluation mode meanwhile.
        prompts: R documents.
        choices: any number of continuations for each.
        end: whether the end of the document behind it counts as the last token of each choice.

    Returns:
        One list a prompt, in the order of its choices.

    Raises:
        ValueError: not one list of choices a prompt, a choice without a token, or more tokens than the recipe allows.
    """
    if len(choices) != len(prompts):
        raise ValueError(f"choices: expected one list a prompt ({len(prompts)}), got {len(choices)}")
    close = (model.text.special.eos,) if end else ()
    spelt = [[(*model.text.encode(choice), *close) for choice in listed] for listed in choices]
    for i, listed in enumerate(spelt):
        for j, ids in enumerate(listed):
            if not ids:
                raise ValueError(f"choices[{i}][{j}]: expected text, got {choices[i][j]!r}")
    results: list[list[Likelihood]] = [[] for _ in prompts]
    longest = max((len(ids) for listed in spelt for ids in listed), default=0)
    if longest == 0:
        return results
    training = model.training
    model.eval()
    try:
        with model.backbone.as_weights_are():
            session = read_prompts(model, prompts, longest)
            for column in range(max(map(len, spelt))):
                asked = [i for i, listed in enumerate(spelt) if column < len(listed)]
                found = _score(model, session.rows(asked), [spelt[i][column] for i in asked])
                for i, likelihood in zip(asked, found, strict=True):
                    results[i].append(likelihood)
    finally:
        model.train(training)
    return results


def _score(model: UnifiedModel, session: Session, continuations: Sequence[tuple[int, ...]]) -> list[Likelihood]:
    """Likelihood of one continuation a document; the session stays as it is."""
    masked = model.generator.text
    states = _next(session, continuations) if masked is None else _masked(model, masked, session, continuations)
    return [_likelihood(model.backbone.logits(one), ids) for one, ids in zip(states, continuations, strict=True)]


def _next(session: Session, continuations: Sequence[tuple[int, ...]]) -> list[Float[Tensor, "T C"]]:
    """States that predict each token, where the next one is learned."""
    first = session.last[0][:, None]  # (R, 1, C)
    rest = session.peek_text([Run(ids[:-1], (False,) * (len(ids) - 1)) for ids in continuations])  # rows with ids alone
    found = []
    row = 0
    for i, ids in enumerate(continuations):
        hidden = first[i]  # (1, C)
        if len(ids) > 1:
            assert rest is not None
            hidden = torch.cat([hidden, rest[row, : len(ids) - 1]])  # (T, C)
            row += 1
        found.append(hidden)
    return found


def _masked(
    model: UnifiedModel, masked: MaskedText, session: Session, continuations: Sequence[tuple[int, ...]]
) -> list[Float[Tensor, "T C"]]:
    """The same where text is learned masked: from left to right, a network evaluation a token."""
    found: list[list[Tensor]] = [[] for _ in continuations]
    with session.trying():
        for at in range(0, max(map(len, continuations)), masked.block):
            rows = [i for i, ids in enumerate(continuations) if at < len(ids)]
            blocks = [continuations[i][at : at + masked.block] for i in rows]
            view = session.rows(rows)
            for i, states in zip(rows, masked.follow(view, model.read_text, blocks), strict=True):
                found[i].append(states)
            view.append_text([Run(ids, (False,) * len(ids)) for ids in blocks])
    return [torch.cat(states) for states in found]


def _likelihood(logits: Float[Tensor, "T V"], ids: tuple[int, ...]) -> Likelihood:
    target = torch.tensor(ids, device=logits.device)
    chosen = logits.log_softmax(-1).gather(1, target[:, None])  # (T, 1)
    return Likelihood(float(chosen.double().sum()), len(ids), bool((logits.argmax(-1) == target).all()))
