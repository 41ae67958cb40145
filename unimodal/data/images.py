"""LightningDataModules of plain images, for training tokenizers. Batches are float32 (B, 3, H, W) in [-1, 1]."""

from abc import abstractmethod
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from unimodal.data.digits import digit_images
from unimodal.data.folder import FolderSource
from unimodal.data.shapes import ShapesSource
from unimodal.packing import fit_image, to_tensor


class ImageData(LightningDataModule):
    """Endless batches in an order that is a function of (seed, epoch); held-out images in their own order.

    Args:
        batch_size: images of a batch on one device.
        seed: of the order; linked to `seed_everything`.
    """

    def __init__(self, batch_size: int, seed: int = 0) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"data.batch_size: expected at least 1, got {batch_size}")
        self.batch_size, self.seed = batch_size, seed
        self.first = 0  # batch that the run goes on with

    @abstractmethod
    def images(self, split: str) -> Dataset[Tensor]:
        """Map-style images of "train" or "val"."""

    def train_dataloader(self) -> DataLoader[Tensor]:
        """From where the run stands; `max_steps` ends it."""
        trainer = self.trainer
        assert trainer is not None
        images = self.images("train")
        stream = _Batches(images, self.batch_size, self.seed, self.first, trainer.global_rank, trainer.world_size)
        # A generator of its own: the loader's draw must not move the random state of the run.
        return DataLoader(stream, batch_size=None, generator=torch.Generator())

    def val_dataloader(self) -> DataLoader[Tensor]:
        """Every held-out image once."""
        return DataLoader(self.images("val"), batch_size=self.batch_size, generator=torch.Generator())

    test_dataloader = val_dataloader
    predict_dataloader = val_dataloader

    def state_dict(self) -> dict[str, Any]:
        """Batches consumed by finished optimizer steps."""
        trainer = self.trainer
        assert trainer is not None
        return {"batches": trainer.global_step * trainer.accumulate_grad_batches, "seed": self.seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        if state_dict["seed"] != self.seed:
            raise ValueError(f"seed_everything: the checkpoint was trained with {state_dict['seed']}, got {self.seed}")
        self.first = state_dict["batches"]


class _Batches(IterableDataset):
    """Batch b of rank r: places (b * ranks + r) * batch_size and on, in the concatenation of all epochs' permutations."""

    def __init__(self, images: Dataset[Tensor], size: int, seed: int, first: int, rank: int, ranks: int) -> None:
        self.images, self.size, self.seed = images, size, seed
        self.first, self.rank, self.ranks = first, rank, ranks
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def __iter__(self) -> Iterator[Tensor]:
        batch = self.first
        while True:
            start = (batch * self.ranks + self.rank) * self.size
            yield torch.stack([self.images[self._index(place)] for place in range(start, start + self.size)])
            batch += 1

    def _index(self, place: int) -> int:
        epoch, number = divmod(place, len(self.images))  # type: ignore[arg-type]  # map-style: it has a length
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng((self.seed, epoch)).permutation(len(self.images))  # type: ignore[arg-type]
        return int(self._order[number])


class _Pictures(Dataset):
    def __init__(self, pictures: list[Any], size: tuple[int, int]) -> None:
        self.pictures, self.size = pictures, size

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Tensor:
        picture = self.pictures[index]
        return to_tensor([fit_image(picture() if callable(picture) else picture, [self.size])])[0]


class DigitImageData(ImageData):
    """The scans inside scikit-learn.

    Args:
        batch_size: images of a batch on one device.
        seed: of the order; linked to `seed_everything`.
    """

    def images(self, split: str) -> Dataset[Tensor]:
        """Training scans, or those no training ever sees."""
        return _Pictures(list(digit_images("train" if split == "train" else "test").images()), (8, 8))


class ShapesImageData(ImageData):
    """Rendered scenes of coloured shapes, as `unimodal.data.ShapesData` draws them from captions.

    Every validation scene holds a pair of shape and colour that training never shows.

    Args:
        batch_size: images of a batch on one device.
        size: pixels of the images' sides, 32 to 256.
        scenes: training scenes, each drawn at its first use and kept.
        validation_scenes: held-out scenes.
        seed: of the order; linked to `seed_everything`. The scenes are the same whatever it is.
    """

    def __init__(
        self, batch_size: int, size: int = 32, scenes: int = 10_000, validation_scenes: int = 400, seed: int = 0
    ) -> None:
        super().__init__(batch_size, seed)
        self.training = ShapesSource("text_to_image", "train", size, scenes, seed=0)
        self.held_out = ShapesSource("text_to_image", "test", size, validation_scenes, seed=0)

    def images(self, split: str) -> Dataset[Tensor]:
        """The scenes of a split."""
        source = self.training if split == "train" else self.held_out

        @cache
        def scene(index: int) -> Any:
            return source.document(index, np.random.default_rng()).images[0]

        return _Pictures([partial(scene, index) for index in range(len(source))], (source.size, source.size))


class FolderImageData(ImageData):
    """The images of a folder that `unimodal.data.FolderData` reads, captions left aside.

    Args:
        root: the folder.
        image_size: (height, width) in pixels that images are scaled and cropped to.
        batch_size: images of a batch on one device.
        validation_share: share of the images that is held out.
        seed: of the order; linked to `seed_everything`.
    """

    def __init__(
        self, root: Path, image_size: tuple[int, int], batch_size: int, validation_share: float = 0.1, seed: int = 0
    ) -> None:
        super().__init__(batch_size, seed)
        self.root, self.image_size, self.validation_share = Path(root), image_size, validation_share

    def images(self, split: str) -> Dataset[Tensor]:
        """Every image of the split's documents."""
        source = FolderSource(self.root, "train" if split == "train" else "val", "image_to_text", self.validation_share)

        def loader(index: int) -> Any:
            return lambda: source.document(index, np.random.default_rng(0)).images[0]

        return _Pictures([loader(index) for index in range(len(source))], self.image_size)
