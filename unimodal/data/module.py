"""LightningDataModules of documents: where they come from, how they are mixed and packed, and where the run stands."""

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning import LightningDataModule, Trainer
from torch.utils.data import DataLoader

from unimodal.data.broken import BrokenItems, Exchange, Mark
from unimodal.data.digits import DigitsSource
from unimodal.data.folder import FolderSource, FolderSplit
from unimodal.data.shapes import ShapesKind, ShapesSource, Split
from unimodal.data.source import BrokenDocument, Source, Stored, whole
from unimodal.data.stream import Mixture, Packing, PackStream, Weighted, validation_packs
from unimodal.documents import Document
from unimodal.packing import FILLING, Lanes, PackedSequence
from unimodal.stored import tokenizer_fingerprint

if TYPE_CHECKING:
    from unimodal.model import UnifiedModel


class DocumentData(LightningDataModule):
    """Packs documents for the model being trained.

    Args:
        batch_tokens: most tokens of one packed sequence, which is one micro-batch on one device.
        validation_documents: most documents of each kind in validation.
        prompts: documents of each kind that are continued in validation, always the same.
        seed: of every draw; linked to `seed_everything`.
        workers: processes that read documents beside the training process; what is trained on is the same for any number.
        broken_share: of a source's documents, how many may be broken; those are skipped and named, more stop the run.
    """

    def __init__(
        self,
        batch_tokens: int,
        validation_documents: int = 200,
        prompts: int = 20,
        seed: int = 0,
        workers: int = 0,
        broken_share: float = 0.01,
    ) -> None:
        super().__init__()
        BrokenItems(broken_share)  # refuses what is no share, where it enters
        self.broken_share = broken_share
        if workers < 0:
            raise ValueError(f"data.workers: expected 0 or more, got {workers}")
        for name, count in (("validation_documents", validation_documents), ("prompts", prompts)):
            if count < 0:
                raise ValueError(f"data.{name}: expected 0 or more, got {count}")
        self.batch_tokens, self.seed, self.workers = batch_tokens, seed, workers
        self.validation_documents, self.prompt_count = validation_documents, prompts
        self.position: Lanes | None = None  # of this rank's lanes, behind the last finished optimizer step
        self.left_out: Mark = ()  # what the stream knew there of documents that are in no pack
        self._stream: PackStream | None = None
        # Of the run that is continued: where all its lanes stood, what its epochs were made of, what it left out.
        self._resumed: Lanes = ()
        self._counts: list[int] = []
        self._identities: dict[str, str] = {}
        self._left_out: dict[str, Any] = {}

    @abstractmethod
    def training_sources(self) -> list[Weighted]:
        """Sources of training documents and their weights."""

    @abstractmethod
    def validation_sources(self) -> list[Source]:
        """Sources of held-out documents, one a kind."""

    def setup(self, stage: str) -> None:
        """Refuse images stored as tokens that the model's tokenizer did not make, or its recipe has no use for."""
        if self.trainer is not None:  # a plan has none
            self.check(self.trainer.lightning_module.model)  # type: ignore[arg-type]

    def check(self, model: "UnifiedModel") -> None:
        """ValueError, naming the source, where one holds tokens that are not this model's."""
        sources = [*(weighted.source for weighted in self.training_sources()), *self.validation_sources()]
        stored = [(source.kind, held) for source in sources if isinstance(held := whole(source), Stored)]
        fingerprint = tokenizer_fingerprint(model.tokenizer) if stored else ""
        for kind, source in stored:
            try:
                source.check(fingerprint, model.sequence)
            except ValueError as error:
                raise ValueError(f"data: {kind}: {error}") from None

    def corpus(self) -> Iterable[str]:
        """Texts that the text tokenizer is trained on."""
        for weighted in self.training_sources():
            if weighted.used:
                yield from weighted.source.corpus()

    def prompts(self) -> list[Document]:
        """Held-out documents cut before their first target, which is for the model to write."""
        import numpy as np

        prompts = []
        for s, source in enumerate(self.validation_sources()):
            held = whole(source)
            if isinstance(held, Stored):
                own = held.prompts()[: self.prompt_count]
                prompts += own if held is source else [Document(one.parts, source.kind) for one in own]
                continue
            for index in range(min(self.prompt_count, len(source))):
                try:
                    document = source.document(index, np.random.default_rng((self.seed, s, index)))
                except BrokenDocument:
                    continue
                kept = tuple(takewhile(lambda part: not part.learn, document.parts))
                prompts.append(Document(kept, document.kind))
        return prompts

    def train_dataloader(self) -> Iterable[PackedSequence]:
        """The stream of this rank, from where the run stands. It has no end: `max_steps` has."""
        trainer = self.trainer
        assert trainer is not None
        refuse_limit(trainer)
        mixture = Mixture(self.training_sources(), self.seed)
        refuse_other(mixture, self._counts, self._identities)
        stream = PackStream(
            mixture, self._packing(), self._resumed, rank=trainer.global_rank, ranks=trainer.world_size,
            accumulate=trainer.accumulate_grad_batches, workers=self.workers, broken_share=self.broken_share,
            left_out=self._left_out, exchange=Exchange.over_ranks(),
        )  # fmt: skip
        self.position, self.left_out, self._stream = stream.position, stream.broken.mark(), stream
        self._counts, self._identities = mixture.counts, mixture.identities
        return stream

    def val_dataloader(self) -> Iterable[PackedSequence]:
        """Held-out packs of one kind each."""
        packs = validation_packs(self.validation_sources(), self._packing(), self.seed, self.validation_documents)
        assert self.trainer is not None
        rank, ranks = self.trainer.global_rank, self.trainer.world_size
        mine = packs[rank::ranks]
        if packs and len(mine) < -(-len(packs) // ranks):  # ranks that hold parts of the weights go forward together
            mine.append(replace(packs[0], kind=FILLING))
        # A generator of its own: the loader's draw must not move the random state of the run.
        return DataLoader(mine, batch_size=None, generator=torch.Generator())  # type: ignore[arg-type]  # a list is a dataset

    test_dataloader = val_dataloader

    def predict_dataloader(self) -> Iterable[list[tuple[int, Document]]]:
        """The prompts with their numbers, many at a time."""
        return DataLoader(list(enumerate(self.prompts())), batch_size=64, collate_fn=list)  # type: ignore[arg-type]

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Packs move; the documents that `predict` continues stay on the host."""
        return batch if isinstance(batch, list) else super().transfer_batch_to_device(batch, device, dataloader_idx)

    def state_dict(self) -> dict[str, Any]:
        """Where every lane of every rank stands, which all ranks ask at once: plain lists, so that checkpoints load
        without code.
        """
        lanes = self._resumed if self.position is None else of_all_ranks(self.position)
        left_out = self._left_out if self._stream is None else self._stream.broken.state(self.left_out)
        return {
            "lanes": [list(lane) for lane in lanes], "counts": self._counts, "seed": self.seed,
            "sources": self._identities, "left_out": left_out,
        }  # fmt: skip

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there, with any number of ranks and workers."""
        if state_dict["seed"] != self.seed:
            raise ValueError(f"seed_everything: the checkpoint was trained with {state_dict['seed']}, got {self.seed}")
        self._resumed, self._counts = tuple(tuple(lane) for lane in state_dict["lanes"]), state_dict["counts"]
        # Not in checkpoints of before: what they were trained on is not known, and counting begins anew.
        self._identities, self._left_out = state_dict.get("sources", {}), state_dict.get("left_out", {})

    def _packing(self) -> Packing:
        assert self.trainer is not None
        model: UnifiedModel = self.trainer.lightning_module.model  # type: ignore[assignment]
        return Packing(model.sequencer, model.backbone.config.experts, model.generator.reads, self.batch_tokens)


def refuse_limit(trainer: Trainer) -> None:
    """ValueError where a trainer would begin data anew that has no end, or make no step of any of it."""
    if trainer.accumulate_grad_batches < 1:
        raise ValueError(f"trainer.accumulate_grad_batches: expected at least 1, got {trainer.accumulate_grad_batches}")
    limit = trainer.limit_train_batches  # overfit_batches sets it, too; 1 is one batch, 1.0 are all
    if (limit != 1.0 or isinstance(limit, int)) and not trainer.fast_dev_run:  # type: ignore[attr-defined]
        raise ValueError(
            "trainer.limit_train_batches: expected 1.0, and no overfit_batches (the data has no end, trainer.max_steps "
            f"ends a run), got {limit}"
        )


def refuse_other(mixture: Mixture, counts: Sequence[int], identities: Mapping[str, str]) -> None:
    """ValueError where the run that is continued had other sources, or its epochs were made of other documents.

    Another file of as many documents would be read on in its middle, and nothing would tell.
    """
    sources = mixture.identities
    for name in identities and {**identities, **sources}:
        expected, got = (some.get(name, "no such source") for some in (identities, sources))
        if expected != got:
            raise ValueError(
                f"data: {name}: expected, as in the checkpoint, {expected}; got {got}; an export (init) can be trained "
                "on with others"
            )
    if identities and list(identities) != list(sources):  # seeds go by place
        raise ValueError(
            f"data: expected sources in the order {', '.join(identities)}, as in the checkpoint, got {', '.join(sources)}"
        )
    if list(counts) not in ([], mixture.counts):
        raise ValueError(
            f"data: expected sources that give {list(counts)} documents an epoch, as in the checkpoint, got "
            f"{mixture.counts}; an export (init) can be trained on with others"
        )


def of_all_ranks(own: Lanes) -> Lanes:
    """Lanes of every rank in their order: lane a * ranks + r is number a of rank r."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return own
    parts: list[Lanes] = [()] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, own)
    return tuple(lane for lanes in zip(*parts, strict=True) for lane in lanes)


@dataclass(frozen=True)
class DigitMixture:
    """Shares of the four kinds of documents."""

    text_to_image: float = 1.0
    image_to_text: float = 1.0
    sum: float = 1.0
    text: float = 0.1


class DigitsData(DocumentData):
    """The handwritten digits inside scikit-learn: drawn, read, added up, written about.

    Args:
        batch_tokens: most tokens of one packed sequence, which is one micro-batch on one device.
        mixture: shares of the kinds of documents.
        validation_documents: most documents of each kind in validation.
        prompts: documents of each kind that are continued in validation, always the same.
        seed: of every draw; linked to `seed_everything`.
        workers: processes that read documents beside the training process; what is trained on is the same for any number.
    """

    def __init__(
        self,
        batch_tokens: int,
        mixture: DigitMixture = DigitMixture(),
        validation_documents: int = 200,
        prompts: int = 20,
        seed: int = 0,
        workers: int = 0,
    ) -> None:
        super().__init__(batch_tokens, validation_documents, prompts, seed, workers)
        self.mixture = mixture

    def training_sources(self) -> list[Weighted]:
        """The four kinds over the training scans."""
        w = self.mixture
        return [
            Weighted(DigitsSource("text_to_image", "train"), w.text_to_image),
            Weighted(DigitsSource("image_to_text", "train"), w.image_to_text),
            Weighted(DigitsSource("sum", "train"), w.sum),
            Weighted(DigitsSource("text", "train"), w.text),
        ]

    def validation_sources(self) -> list[Source]:
        """The four kinds over the held-out scans."""
        return [DigitsSource(weighted.source.kind, "test") for weighted in self.training_sources()]  # type: ignore[arg-type]


@dataclass(frozen=True)
class ShapesMixture:
    """Shares of the six kinds of documents."""

    text_to_image: float = 1.0
    image_to_text: float = 1.0
    question: float = 1.0
    edit: float = 1.0
    count: float = 1.0
    steps: float = 1.0


class ShapesData(DocumentData):
    """Rendered scenes of coloured shapes: drawn, described, asked about, edited, counted, built step by step.

    Training documents never repeat; validation holds pairs of shape and colour that training never shows or names.

    Args:
        batch_tokens: most tokens of one packed sequence, which is one micro-batch on one device.
        size: pixels of the images' sides, 32 to 256.
        documents: documents of each kind that count as one epoch.
        mixture: shares of the kinds of documents.
        validation_documents: most documents of each kind in validation.
        prompts: documents of each kind that are continued in validation, always the same.
        seed: of every draw; linked to `seed_everything`.
        workers: processes that read documents beside the training process; what is trained on is the same for any number.
    """

    def __init__(
        self,
        batch_tokens: int,
        size: int = 32,
        documents: int = 10_000,
        mixture: ShapesMixture = ShapesMixture(),
        validation_documents: int = 200,
        prompts: int = 20,
        seed: int = 0,
        workers: int = 0,
    ) -> None:
        super().__init__(batch_tokens, validation_documents, prompts, seed, workers)
        self.size, self.documents, self.mixture = size, documents, mixture

    def training_sources(self) -> list[Weighted]:
        """The six kinds without the pairs held out."""
        w = self.mixture
        return [
            Weighted(self._source("text_to_image", "train"), w.text_to_image),
            Weighted(self._source("image_to_text", "train"), w.image_to_text),
            Weighted(self._source("question", "train"), w.question),
            Weighted(self._source("edit", "train"), w.edit),
            Weighted(self._source("count", "train"), w.count),
            Weighted(self._source("steps", "train"), w.steps),
        ]

    def validation_sources(self) -> list[Source]:
        """The kinds that are trained, on scenes with held-out pairs."""
        return [self._source(w.source.kind, "test") for w in self.training_sources() if w.used]  # type: ignore[arg-type]

    def _source(self, kind: ShapesKind, split: Split) -> ShapesSource:
        return ShapesSource(kind, split, self.size, self.documents)


@dataclass(frozen=True)
class FolderWeights:
    """Shares of drawing from captions and of captioning."""

    text_to_image: float = 1.0
    image_to_text: float = 1.0


class FolderData(DocumentData):
    """A folder of images with captions in `.txt` files beside them, or in a JSONL.

    Args:
        root: the folder.
        batch_tokens: most tokens of one packed sequence, which is one micro-batch on one device.
        weights: shares of the two kinds of documents.
        validation_share: share of the images that is held out.
        validation_documents: most documents of each kind in validation.
        prompts: documents of each kind that are continued in validation, always the same.
        seed: of every draw; linked to `seed_everything`.
        workers: processes that read documents beside the training process; what is trained on is the same for any number.
        broken_share: of the images, how many may be broken; those are skipped and named, more stop the run.
    """

    def __init__(
        self,
        root: Path,
        batch_tokens: int,
        weights: FolderWeights = FolderWeights(),
        validation_share: float = 0.1,
        validation_documents: int = 200,
        prompts: int = 20,
        seed: int = 0,
        workers: int = 0,
        broken_share: float = 0.01,
    ) -> None:
        super().__init__(batch_tokens, validation_documents, prompts, seed, workers, broken_share)
        self.root, self.weights, self.validation_share = Path(root), weights, validation_share
        self._read: dict[FolderSplit, tuple[FolderSource, FolderSource]] = {}

    def training_sources(self) -> list[Weighted]:
        """Both directions; documents of a JSONL have their own."""
        drawn, read = self._sources("train")
        both = [Weighted(drawn, self.weights.text_to_image), Weighted(read, self.weights.image_to_text)]
        return [Weighted(drawn, 1.0)] if drawn.kind == "document" else both

    def validation_sources(self) -> list[Source]:
        """The same over the held-out images."""
        drawn, read = self._sources("val")
        return [drawn] if drawn.kind == "document" else [drawn, read]

    def _sources(self, split: FolderSplit) -> tuple[FolderSource, FolderSource]:
        if split not in self._read:
            share = self.validation_share
            drawn = FolderSource(self.root, split, "text_to_image", share)
            self._read[split] = drawn, FolderSource(self.root, split, "image_to_text", share)
        return self._read[split]
