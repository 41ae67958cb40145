"""Packs against padded batches: real tokens a second of a train step on documents of skewed lengths."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import islice

import numpy as np
import torch

from experiments.benchmarks import models
from experiments.benchmarks.cases import TOLERANCE, Case, Settings, bests, worst
from experiments.benchmarks.results import Result, speedup
from experiments.benchmarks.timing import interleave
from experiments.benchmarks.training import BATCH, loss_of, step_of
from unimodal.data.stream import Mixture, Packing, PackStream, Weighted
from unimodal.documents import Document
from unimodal.model import UnifiedModel
from unimodal.packing import PackedSequence, Segment, SequencedDocument, pack
from unimodal_generators.base import TokenKind


class Skewed:
    """Texts of log-normal lengths, a third of them followed by an image: half are shorter than a tenth of the longest."""

    kind = "skewed"

    def __init__(self, longest: int, side: int) -> None:
        self.longest, self.side = longest, side

    def __len__(self) -> int:
        return 4096

    def document(self, index: int, rng: np.random.Generator) -> Document:
        """The document at `index`, whatever `rng`."""
        rng = np.random.default_rng(index)
        text = int(np.clip(rng.lognormal(np.log(self.longest / 16), 1.2), 3, self.longest - self.side**2 - 2))
        return models.document(text, self.side if index % 3 == 0 else 0, rng)

    def corpus(self) -> Iterable[str]:
        """Nothing: bytes are tokens."""
        return ()


def packed_and_padded(model: UnifiedModel, budget: int, side: int, packs: int) -> tuple[list[PackedSequence], ...]:
    """The packs that the loader makes, and the same documents in batches, each padded to the longest of its batch.

    A padded batch is written as a pack too: what fills up stands behind its document, where no real token sees it. So it
    costs what padding costs with attention that is causal within a row, and no mask.
    """
    sequencer = replace(model.sequencer, rules=replace(model.sequencer.rules, context_length=budget))
    packing = Packing(sequencer, model.backbone.config.experts, model.generator.reads, budget)
    source = Skewed(budget, side)
    mixture = Mixture([Weighted(source, 1.0)], 0)
    packed = list(islice(PackStream(mixture, packing), packs))
    documents = []
    for number in sorted(number for p in packed for number in p.numbers):
        place = mixture.place(number)
        key = (mixture.seed, place.epoch, place.slot)
        documents.append(sequencer.document(source.document(place.document, np.random.default_rng(key)), key))
    batches = [documents[i : i + BATCH] for i in range(0, len(documents), BATCH)]
    return packed, [pack(filled_up(model, batch), packing.experts, packing.reads) for batch in batches]


def filled_up(model: UnifiedModel, batch: Sequence[SequencedDocument]) -> list[SequencedDocument]:
    """Documents of one length: text that is no target behind the shorter ones."""
    longest = max(document.length for document in batch)
    filled = []
    for document in batch:
        n = longest - document.length
        padding = Segment(TokenKind.TEXT, model.scheme.text(document.length, n).ids, (0,) * n, (False,) * n)
        filled.append(replace(document, segments=(*document.segments, padding)) if n else document)
    return filled


def losses(model: UnifiedModel, packs: Sequence[PackedSequence]) -> torch.Tensor:
    """Sums of each loss over all packs."""
    with torch.no_grad():
        terms = [model(p) for p in packs]
    return torch.stack([sum((t[name].sum.double() for t in terms), torch.zeros(())) for name in ("text", "image")])


def padding(settings: Settings) -> Result:
    """Seconds that the same documents take, a train step a pack or a padded batch."""
    config, side = models.peer_s(settings.quick), settings.size(8, 2)
    model = models.unified(config, (side,)).train()
    packed, padded = packed_and_padded(model, settings.size(2048, 64), side, settings.size(4, 2))

    def steps(packs: list[PackedSequence]) -> Callable[[], None]:
        each = [step_of(model, lambda p=p: loss_of(model, p), "cpu", torch.float32) for p in packs]  # type: ignore[misc]

        def run() -> None:
            for step in each:
                step()

        return run

    correct = worst([(losses(model, packed), losses(model, padded))])
    times = interleave({"packed": steps(packed), "padded": steps(padded)}, min(settings.repeats, 6), warmup=1)
    real = sum(len(p) for p in packed)
    result = speedup(times["packed"], times["padded"], peer="padded batches", compiled=False)
    result.correct, result.tolerance = correct, TOLERANCE[torch.float32]
    result.extra = {
        "real_tokens": real, "tokens_per_s": real / times["packed"].best,
        "padded_tokens_per_s": real / times["padded"].best, "seconds": bests(times),
        "real_share": real / (len(packed) * settings.size(2048, 64)),
        "padded_real_share": real / sum(len(p) for p in padded),
    }  # fmt: skip
    return result


CASES: dict[str, Case] = {"padding": padding}
