"""Drawing one id from scores: greedy, temperature, top-k, top-p; one random generator a document.

Letters: R documents, V entries.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unimodal_generators.base import SamplingSettings


@dataclass(frozen=True)
class ChoiceSettings(SamplingSettings):
    """How the ids of an image are drawn.

    Args:
        temperature: 0 takes the likeliest.
        top_k: 0 is all.
        top_p: 1 is all.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.temperature, self.top_k, self.top_p)


def choose(
    logits: Float[Tensor, "R V"],
    rngs: Sequence[torch.Generator],
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Int[Tensor, " R"]:
    """One id a row. Row i draws from `rngs[i]` alone, so a document's ids do not depend on its neighbours."""
    check_choice(temperature, top_k, top_p)
    if temperature == 0:
        return logits.argmax(-1)
    logits = restrict(logits.double() / temperature, top_k, top_p)
    return (logits + gumbel(rngs, logits.shape[1]).to(logits.device)).argmax(-1)  # Gumbel-max


def gumbel(rngs: Sequence[torch.Generator], count: int) -> Float[Tensor, "R {count}"]:
    """Standard Gumbel noise in float64, a row a generator; drawn on the host: the same ids on every device."""
    uniform = torch.stack([torch.rand(count, generator=rng, dtype=torch.float64) for rng in rngs])
    return -torch.log(-torch.log(uniform.clamp(1e-300, 1 - 1e-16)))


def restrict(logits: Float[Tensor, "R V"], top_k: int, top_p: float) -> Float[Tensor, "R V"]:
    """Minus infinity for all but the k likeliest, then outside the nucleus: the fewest whose probabilities reach p.

    Top-p is nucleus sampling (arXiv 1904.09751).
    """
    if 0 < top_k < logits.shape[-1]:
        left = torch.ones_like(logits, dtype=torch.bool).scatter(-1, logits.topk(top_k, dim=-1).indices, False)
        logits = logits.masked_fill(left, -torch.inf)  # of equals no more than k stay
    if top_p < 1:
        ordered, index = logits.sort(dim=-1, descending=True)
        probability = ordered.softmax(-1)
        beyond = probability.cumsum(-1) - probability >= top_p  # the first is always kept
        logits = logits.masked_fill(beyond.scatter(-1, index, beyond), -torch.inf)
    return logits


def check_choice(temperature: float, top_k: int, top_p: float) -> None:
    """Refuse settings that mean nothing."""
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature: expected 0 (the likeliest) or more, got {temperature}")
    if top_k < 0:
        raise ValueError(f"top_k: expected 0 (all) or more, got {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected a probability above 0, at most 1, got {top_p}")
