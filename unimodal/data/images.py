"""LightningDataModules of images, for training tokenizers: float32 (B, 3, H, W) in [-1, 1], with texts if asked."""

from abc import abstractmethod
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from lightning import LightningDataModule
from PIL import Image

from unimodal.data.broken import BrokenItems, Exchange
from unimodal.data.digits import Split, caption, digit_images
from unimodal.data.folder import FolderSource, Task
from unimodal.data.image_stream import HeldOutImages, ImagePosition, ImageStream
from unimodal.data.mixture import Entry, MixtureData
from unimodal.data.module import of_all_ranks, refuse_limit, refuse_other
from unimodal.data.shapes import ShapesSource
from unimodal.data.source import Source, Stored, whole
from unimodal.data.stream import Mixture, Weighted
from unimodal.documents import Document, Part


class ImageData(LightningDataModule):
    """Endless batches of all images of documents, whose order is a function of (seed, epoch); held-out ones in their order.

    Args:
        image_size: (height, width) in pixels that images are scaled and cropped to.
        batch_size: images of a batch on one device.
        seed: of every draw; linked to `seed_everything`.
        workers: processes that read documents beside the training process; what is trained on is the same for any number.
        broken_share: of a source's documents, how many may be broken; those are skipped and named, more stop the run.
        captions: whether texts of a document come with its images, for a tokenizer that reads them; one without is broken.
    """

    def __init__(
        self, image_size: tuple[int, int], batch_size: int, seed: int = 0, workers: int = 0, broken_share: float = 0.01,
        captions: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        BrokenItems(broken_share)  # refuses what is no share, where it enters
        for name, value, least in (("batch_size", batch_size, 1), ("workers", workers, 0)):
            if value < least:
                raise ValueError(f"data.{name}: expected at least {least}, got {value}")
        if min(image_size) < 1:
            raise ValueError(f"data.image_size: expected (height, width) of at least 1, got {list(image_size)}")
        self.image_size, self.batch_size, self.seed = image_size, batch_size, seed
        self.workers, self.broken_share, self.captions = workers, broken_share, captions
        # Of the run that is continued: where all its lanes stood, what its epochs were made of, what it left out.
        self._resumed = ImagePosition()
        self._counts: list[int] = []
        self._identities: dict[str, str] = {}
        self._left_out: dict[str, Any] = {}
        self._stream: ImageStream | None = None
        self._first = 0  # optimizer step that the stream began with

    @abstractmethod
    def training_sources(self) -> list[Weighted]:
        """Sources of documents to train on, and their weights."""

    @abstractmethod
    def validation_sources(self) -> list[Source]:
        """Sources of held-out documents."""

    def train_dataloader(self) -> ImageStream:
        """The stream of this rank, from where the run stands; `max_steps` ends it."""
        trainer = self.trainer
        assert trainer is not None
        refuse_limit(trainer)
        mixture = Mixture(self.training_sources(), self.seed)
        refuse_other(mixture, self._counts, self._identities)
        _refuse_tokens([weighted.source for weighted in mixture.sources])
        self._stream = ImageStream(
            mixture, self.image_size, self.batch_size, self._resumed, rank=trainer.global_rank,
            ranks=trainer.world_size, accumulate=trainer.accumulate_grad_batches, captions=self.captions,
            workers=self.workers, broken_share=self.broken_share, left_out=self._left_out, exchange=Exchange.over_ranks(),
        )  # fmt: skip
        self._counts, self._identities, self._first = mixture.counts, mixture.identities, trainer.global_step
        return self._stream

    def val_dataloader(self) -> HeldOutImages:
        """Every held-out image once, on every rank."""
        sources = self.validation_sources()
        _refuse_tokens(sources)
        return HeldOutImages(sources, self.image_size, self.batch_size, self.seed, self.captions)

    test_dataloader = val_dataloader
    predict_dataloader = val_dataloader

    def state_dict(self) -> dict[str, Any]:
        """Where every lane of every rank stands behind the last finished optimizer step, which all ranks ask at once."""
        (lanes, given), left_out = self._resumed, self._left_out
        if self._stream is not None:
            assert self.trainer is not None
            steps = self.trainer.global_step - self._first
            position, left_out = self._stream.behind(steps), self._stream.left_out(steps)
            lanes, given = of_all_ranks(position.lanes), of_all_ranks(position.given)
        return {
            "lanes": [list(lane) for lane in lanes], "given": [list(lane) for lane in given], "counts": self._counts,
            "seed": self.seed, "sources": self._identities, "left_out": left_out,
        }  # fmt: skip

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there, with any number of ranks, batches a step, images a batch and workers."""
        if state_dict["seed"] != self.seed:
            raise ValueError(f"seed_everything: the checkpoint was trained with {state_dict['seed']}, got {self.seed}")
        if "given" not in state_dict:
            raise ValueError(
                "ckpt_path: expected a checkpoint that counts images by lanes, got one of an earlier version"
            )
        lanes, given = (tuple(tuple(lane) for lane in state_dict[name]) for name in ("lanes", "given"))
        self._resumed, self._counts = ImagePosition(lanes, given), state_dict["counts"]
        # Not in checkpoints of before, as those of documents.
        self._identities, self._left_out = state_dict.get("sources", {}), state_dict.get("left_out", {})


def _refuse_tokens(sources: Iterable[Source]) -> None:
    for source in sources:
        if isinstance(whole(source), Stored):
            raise ValueError(f"data: {source.kind}: expected images as pixels, got token files")


class Pictures:
    """Images that are at hand, each a document of its own.

    Args:
        count: how many.
        picture: the one of a number.
        seed: of their order.
        text: what is said of it; None: nothing.
    """

    kind = "image"

    def __init__(
        self, count: int, picture: Callable[[int], Image.Image], seed: int, text: Callable[[int], str] | None = None
    ) -> None:
        self.count, self.picture, self.seed, self.text = count, picture, seed, text

    def __len__(self) -> int:
        return self.count

    def document(self, index: int, rng: np.random.Generator) -> Document:
        """The image at `index`; nothing is drawn from `rng`."""
        said = () if self.text is None else (Part(self.text(index), learn=False),)
        return Document((*said, Part(self.picture(index))), self.kind)

    def order(self, epoch: int, rng: np.random.Generator) -> Int[np.ndarray, " n"]:
        """Any order; the one that the numbers in the recipes were measured with."""
        return np.random.default_rng((self.seed, epoch)).permutation(self.count)

    def corpus(self) -> Iterable[str]:
        """Nothing is said."""
        return ()


class DigitImageData(ImageData):
    """The scans inside scikit-learn.

    Args:
        batch_size: images of a batch on one device.
        seed: of the order; linked to `seed_everything`.
        captions: whether the caption of each scan comes with it.
    """

    def __init__(self, batch_size: int, seed: int = 0, captions: bool = False) -> None:
        super().__init__((8, 8), batch_size, seed, captions=captions)

    def training_sources(self) -> list[Weighted]:
        """Training scans."""
        return [Weighted(self._pictures("train"), 1.0)]

    def validation_sources(self) -> list[Source]:
        """Those no training ever sees."""
        return [self._pictures("test")]

    def _pictures(self, split: Split) -> Pictures:
        scans = digit_images(split)
        images = scans.images()
        return Pictures(len(images), images.__getitem__, self.seed, lambda index: caption(int(scans.labels[index])))


class ShapesImageData(ImageData):
    """Rendered scenes of coloured shapes, as `unimodal.data.ShapesData` draws them from captions.

    Every validation scene holds a pair of shape and colour that training never shows.

    Args:
        batch_size: images of a batch on one device.
        size: pixels of the images' sides, 32 to 256.
        scenes: training scenes, each drawn at its first use and kept.
        validation_scenes: held-out scenes.
        seed: of the order; linked to `seed_everything`. The scenes are the same whatever it is.
        captions: whether a caption of each scene comes with it.
    """

    def __init__(
        self, batch_size: int, size: int = 32, scenes: int = 10_000, validation_scenes: int = 400, seed: int = 0,
        captions: bool = False,
    ) -> None:  # fmt: skip
        super().__init__((size, size), batch_size, seed, captions=captions)
        self.training = ShapesSource("text_to_image", "train", size, scenes, seed=0)
        self.held_out = ShapesSource("text_to_image", "test", size, validation_scenes, seed=0)

    def training_sources(self) -> list[Weighted]:
        """Scenes without the pairs held out."""
        return [Weighted(self._pictures(self.training), 1.0)]

    def validation_sources(self) -> list[Source]:
        """Scenes with them."""
        return [self._pictures(self.held_out)]

    def _pictures(self, scenes: ShapesSource) -> Pictures:
        @cache
        def scene(index: int) -> Document:
            return scenes.document(index, np.random.default_rng())

        return Pictures(len(scenes), lambda index: scene(index).images[0], self.seed, lambda index: scene(index).text)


class FolderImageData(ImageData):
    """All images of a folder, with captions or without; or those of its one JSONL, as `unimodal.data.FolderData` reads it.

    Args:
        root: the folder.
        image_size: (height, width) in pixels that images are scaled and cropped to.
        batch_size: images of a batch on one device.
        validation_share: share of the documents that is held out.
        seed: of every draw; linked to `seed_everything`.
        workers: processes that read documents beside the training process; what is trained on is the same for any number.
        broken_share: of the documents, how many may be broken; those are skipped and named, more stop the run.
        captions: whether texts of a document come with its images, for a tokenizer that reads them; one without is broken.
    """

    def __init__(
        self,
        root: Path,
        image_size: tuple[int, int],
        batch_size: int,
        validation_share: float = 0.1,
        seed: int = 0,
        workers: int = 0,
        broken_share: float = 0.01,
        captions: bool = False,
    ) -> None:
        super().__init__(image_size, batch_size, seed, workers, broken_share, captions)
        self.root, self.validation_share = Path(root), validation_share
        self.task: Task = "text_to_image" if captions else "image"

    def training_sources(self) -> list[Weighted]:
        """Every document that is not held out."""
        return [Weighted(FolderSource(self.root, "train", self.task, self.validation_share))]

    def validation_sources(self) -> list[Source]:
        """The others."""
        return [FolderSource(self.root, "val", self.task, self.validation_share)]


class MixtureImageData(ImageData):
    """The images of any sources, mixed by weight as in `unimodal.data.MixtureData`.

    Args:
        sources: by name.
        image_size: (height, width) in pixels that images are scaled and cropped to.
        batch_size: images of a batch on one device.
        validation: held-out sources by name; none: a share of each training source is held out.
        validation_share: that share; which documents these are depends on their numbers alone.
        seed: of every draw; linked to `seed_everything`.
        workers: processes that read documents beside the training process; what is trained on is the same for any number.
        broken_share: of a source's documents, how many may be broken; those are skipped and named, more stop the run.
        captions: whether texts of a document come with its images, for a tokenizer that reads them; one without is broken.
    """

    def __init__(
        self,
        sources: dict[str, Entry],
        image_size: tuple[int, int],
        batch_size: int,
        validation: dict[str, Entry] | None = None,
        validation_share: float = 0.05,
        seed: int = 0,
        workers: int = 0,
        broken_share: float = 0.01,
        captions: bool = False,
    ) -> None:
        super().__init__(image_size, batch_size, seed, workers, broken_share, captions)
        self.documents = MixtureData(1, sources, validation, validation_share)  # nothing is packed

    def training_sources(self) -> list[Weighted]:
        """What is not held out."""
        return self.documents.training_sources()

    def validation_sources(self) -> list[Source]:
        """What is."""
        return self.documents.validation_sources()
