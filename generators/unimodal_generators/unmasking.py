"""Drawing hidden ids a few at a time, the surest first: MaskGIT (arXiv 2202.04200), for ids of images and of text.

Letters: n rows, T ids of all of them, V entries, K steps; r from 0 (all hidden) to 1 (none).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unimodal_generators.base import SamplingSettings
from unimodal_generators.choice import ChoiceSettings, choose, gumbel

Schedule = Callable[[float], float]
ROUNDING = 1e-9  # what a share times a count may lack of a whole number: 5 (1 - 3 / 5) is 1.9999999999999998

SCHEDULES: dict[str, Schedule] = {
    "cosine": lambda r: math.cos(math.pi / 2 * r),
    "linear": lambda r: 1 - r,
    "square": lambda r: 1 - r**2,
    "cubic": lambda r: 1 - r**3,
    "root": lambda r: 1 - math.sqrt(r),
}
"""gamma(r), the share of ids that are hidden at r: from 1 down to 0 (MaskGIT, masking design)."""


@dataclass(frozen=True)
class MaskedSettings(ChoiceSettings):
    """How hidden ids are drawn, and which of them stay.

    Args:
        steps: network evaluations, exactly; at most one an id of the image.
        temperature: 0 takes the likeliest ids, those the model is surest of first: nothing is random.
        top_k: 0 is all.
        top_p: 1 is all.
        choice_temperature: of the Gumbel noise on the log-probabilities that say which ids stay; it falls linearly to 0.
        text_steps: network evaluations a block of text that is learned masked (`MaskedText`), exactly; None is one an id.
    """

    steps: int = 8
    choice_temperature: float = 1.0
    text_steps: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("steps", "text_steps"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}: expected 1 or more, got {value}")
        if not 0 <= self.choice_temperature < math.inf:
            raise ValueError(f"choice_temperature: expected 0 (no noise) or more, got {self.choice_temperature}")


def schedule_named(name: str) -> Schedule:
    """The schedule of a name of `SCHEDULES`."""
    if name not in SCHEDULES:
        raise ValueError(f"schedule: expected one of {', '.join(SCHEDULES)}, got {name}")
    return SCHEDULES[name]


def masked_settings(settings: SamplingSettings) -> MaskedSettings:
    """The same, if they are of this sampler."""
    if not isinstance(settings, MaskedSettings):
        raise ValueError(f"sampling: expected MaskedSettings, got {type(settings).__name__}")
    return settings


def unmask(
    score: Callable[[Int[Tensor, " T"], int], Float[Tensor, "T V"]],
    ids: Int[Tensor, " T"],
    masked: Bool[Tensor, " T"],
    lengths: Sequence[int],
    schedule: Schedule,
    settings: MaskedSettings,
    rngs: Sequence[torch.Generator],
    hidden: int,
) -> Iterator[Int[Tensor, " T"]]:
    """Draw all hidden ids, keep the surest, hide the rest again, K times (MaskGIT, section 3.2).

    Args:
        score: scores of every id, given the ids with `hidden` in the place of those that are hidden, and the step.
        ids: of all rows end to end, `hidden` where `masked`.
        masked: which are hidden; on the host, which counts them.
        lengths: of the rows, whose results depend on their own ids alone.
        schedule: how many are hidden after each step.
        settings: its `steps` are K, at most one an id of the shortest row.
        rngs: one a row.
        hidden: what stands for a hidden id.

    Yields:
        After each step, what is kept and what was drawn for the rest.
    """
    steps = settings.steps
    left = [remaining(schedule, int(m.sum()), steps) for m in masked.split(list(lengths))]  # a list a row
    masked = masked.to(ids.device)
    drawing = [rng for rng, n in zip(rngs, lengths, strict=True) for _ in range(n)]  # of each id
    for i in range(steps):
        logits = score(ids, i)  # (T, V)
        drawn = choose(logits, drawing, settings.temperature, settings.top_k, settings.top_p)
        sure = confidence(logits, drawn)
        heat = settings.choice_temperature * (1 - (i + 1) / steps) if settings.temperature else 0.0
        if heat:
            noise = [gumbel([rng], n)[0] for rng, n in zip(rngs, lengths, strict=True)]
            sure = sure + heat * torch.cat(noise).to(ids.device)
        drawn = torch.where(masked, drawn, ids)
        yield drawn
        masked = least(sure.masked_fill(~masked, torch.inf), lengths, [counts[i] for counts in left])
        ids = drawn.masked_fill(masked, hidden)


def hidden_count(schedule: Schedule, r: float, n: int) -> int:
    """ceil(gamma(r) n), one at least: how many of n ids are hidden in training (MaskGIT, section 3.1)."""
    return max(1, math.ceil(schedule(r) * n))


def remaining(schedule: Schedule, hidden: int, steps: int) -> list[int]:
    """How many of `hidden` ids are still hidden after each step: floor(gamma(i / K) hidden), and 0 at the end.

    Every step shows one at least and leaves one for each that follows; of fewer than steps, the first steps show none.
    """
    counts, left = [], hidden
    for i in range(1, steps + 1):
        left = max(min(math.floor(schedule(i / steps) * hidden + ROUNDING), left - 1), min(left, steps - i))
        counts.append(left)
    return counts


def confidence(logits: Float[Tensor, "T V"], ids: Int[Tensor, " T"]) -> Float[Tensor, " T"]:
    """log p(id), in float64."""
    return logits.double().log_softmax(-1).gather(1, ids[:, None])[:, 0]


def least(scores: Float[Tensor, " T"], lengths: Sequence[int], counts: Sequence[int]) -> Bool[Tensor, " T"]:
    """Which tokens are among the so many lowest of their row; of equal ones, the first."""
    chosen = []
    for one, count in zip(scores.split(list(lengths)), counts, strict=True):
        lowest = one.argsort(stable=True)[:count]
        chosen.append(torch.zeros_like(one, dtype=torch.bool).index_fill(0, lowest, True))
    return torch.cat(chosen)
