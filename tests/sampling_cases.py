"""Sessions that wait for an image, and what a generator draws in them."""

from collections.abc import Sequence
from typing import Any

import torch

from unimodal.model import UnifiedModel
from unimodal.packing import Run
from unimodal.session import Session
from unimodal_generators.base import Branch, Grid, ImageTokens, Known


def begun(model: UnifiedModel, prompts: Sequence[str], guided: bool = False) -> Session:
    """A session in which every prompt waits for an image; `guided` has a second branch, without text."""
    session = Session.start(model, len(prompts), [Branch(), Branch(text=False)][: 1 + guided], 96)
    special = model.text.special
    runs = []
    for prompt in prompts:
        ids = model.text.encode(prompt)
        runs.append(Run((special.bos, *ids, special.boi), (True, *[False] * len(ids), True)))
    with torch.no_grad():
        session.append_text(runs)
    return session


def sampled(
    session: Any, model: UnifiedModel, grids: Sequence[Grid], settings: Any, seeds: Sequence[int],
    known: Known | None = None,
) -> list[ImageTokens]:  # fmt: skip
    """All states of drawing images, a seed each."""
    rngs = [torch.Generator().manual_seed(seed) for seed in seeds]
    with torch.no_grad():
        return list(model.generator.sample(session, grids, settings, rngs, known))
