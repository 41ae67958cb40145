"""Training from token files alone: in the place of another data module, whose images were encoded beforehand."""

from collections.abc import Iterable
from pathlib import Path

from unimodal.data.module import DocumentData
from unimodal.data.source import Source
from unimodal.data.stream import Weighted
from unimodal.data.token_files import TokenFiles


class TokenData(DocumentData):
    """Token files that `unimodal tokenize` wrote, read in the place of the data they were made of.

    Args:
        root: the folder of token files.
        batch_tokens: most tokens of one packed sequence, which is one micro-batch on one device.
        weights: shares of kinds of documents, by name; those not named keep the shares that they were written with.
        validation_documents: most documents of each kind in validation.
        prompts: documents of each kind that are continued in validation, as many as were kept at the most.
        seed: of every draw; linked to `seed_everything`.
        workers: processes that read documents beside the training process; what is trained on is the same for any number.
        broken_share: of a kind's documents, how many may be broken; those are skipped and named, more stop the run.
    """

    def __init__(
        self,
        root: Path,
        batch_tokens: int,
        weights: dict[str, float] | None = None,
        validation_documents: int = 200,
        prompts: int = 20,
        seed: int = 0,
        workers: int = 0,
        broken_share: float = 0.01,
    ) -> None:
        super().__init__(batch_tokens, validation_documents, prompts, seed, workers, broken_share)
        self.files = TokenFiles(Path(root))
        self.weights = weights or {}
        kinds = [source.kind for source in self.files.plan.sources["train"]]
        for kind in self.weights:
            if kind not in kinds:
                raise ValueError(f"data.weights: expected some of {', '.join(dict.fromkeys(kinds))}, got {kind}")

    def training_sources(self) -> list[Weighted]:
        """As they were written."""
        written: dict[str, float | None] = {}
        for record in self.files.plan.sources["train"]:
            written[record.kind] = None if record.weight is None else (written.get(record.kind) or 0.0) + record.weight
        weights = written | self.weights
        return [Weighted(source, weights[source.kind]) for source in self.files.sources("train")]

    def validation_sources(self) -> list[Source]:
        """Likewise."""
        return list(self.files.sources("val"))

    def corpus(self) -> Iterable[str]:
        """The other data module's."""
        return self.files.corpus()
