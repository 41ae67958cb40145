"""What micro-batches hold and ask for, counted while a run goes on: tokens, images, useful FLOPs.

A *unit* is something that comes in numbers, each with as many FLOPs: a token of an expert, a visible pair, a target ...
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from lightning import LightningModule
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from unimodal.data.image_stream import ImageBatch, taken_apart
from unimodal.packing import PackedSequence
from unimodal.shards import together
from unimodal.training.flops import image_flops, modulation_flops, pair_flops, target_flops, token_flops

if TYPE_CHECKING:
    from unimodal.model import UnifiedModel
    from unimodal.training.tokenizer import TokenizerTraining

Precision = Callable[[], AbstractContextManager[Any]]
"""Under which a run computes."""


class Work(ABC):
    """Counts the micro-batches of one rank.

    Attributes:
        rates: useful FLOPs of a unit, forward and backward, by its name; those still missing are in `missing`.
    """

    rates: dict[str, float]

    @abstractmethod
    def units(self, batch: Any) -> dict[str, int]:
        """What a micro-batch that was just trained on holds, `tokens` and `images` among it: numbers of the host alone."""

    @abstractmethod
    def begin(self, batch: Any) -> None:
        """A micro-batch is about to be trained on."""

    def missing(self, units: Mapping[str, int]) -> list[str]:
        """Units whose rate must be measured."""
        return []

    def measure(self, missing: Sequence[str], precision: Precision) -> dict[str, float]:
        """Rates of what is missing, as far as this rank can tell. All ranks call it together."""
        return {}


def work_of(module: LightningModule) -> Work | None:
    """What counts for a module: packs of a model, images of a tokenizer; nothing for what is neither."""
    part = getattr(module, "part", None)
    return PackWork(module) if part == "model" else ImageWork(module) if part == "tokenizer" else None


class PackWork(Work):
    """Packs of a unified model.

    Of layers, attention and text head every pack is counted by formulas, exactly as `useful_flops` does. Generator,
    tokenizer and vision encoder are counted while they run over one pack each; another pack counts in proportion, to its
    learned and clean image tokens and to the pixels they read. That is exact where images have one size, and otherwise if
    these networks are linear in it.

    Args:
        module: with the model; its weights may be sharded.
    """

    MEASURED = ("learned", "clean", "pixels", "understood")

    def __init__(self, module: LightningModule) -> None:
        model: UnifiedModel = module.model  # type: ignore[assignment]
        self._module, self.model, backbone = module, model, model.backbone
        self.rates = {f"expert {i}": token_flops(backbone, i) for i in range(len(backbone.config.experts.names))}
        self.rates |= {"modulations": modulation_flops(backbone), "pairs": pair_flops(backbone)}
        self.rates["targets"] = target_flops(backbone)
        self._seen: dict[str, PackedSequence] = {}  # a pack for each unit that is not measured yet

    def begin(self, batch: PackedSequence) -> None:
        """Keep the first pack with something that is to be measured."""
        if any(name not in self.rates for name in self.MEASURED):
            self._seen = dict.fromkeys(self.missing(self.units(batch)), batch) | self._seen

    def units(self, batch: PackedSequence) -> dict[str, int]:
        """By what asks for FLOPs."""
        stored = 0 if batch.stored is None else len(batch.stored.grids)
        units = {f"expert {i}": tokens for i, tokens in enumerate(batch.tokens)}
        return units | {
            "tokens": len(batch), "images": stored + sum(len(stack) for stack in batch.images),
            "modulations": len(batch.learned_images) + len(batch.context_images), "pairs": batch.table.pairs,
            "targets": len(batch.text_targets), "learned": sum(block.length for block in batch.learned_blocks),
            "clean": sum(block.length for block in batch.context_blocks),
            "pixels": sum(pixels(stack) for stack in batch.images[: batch.tokenized]),
            "understood": sum(pixels(image) for image in batch.understood),
        }  # fmt: skip

    def missing(self, units: Mapping[str, int]) -> list[str]:
        """Those that a network's own FLOPs are in proportion to."""
        return [name for name in self.MEASURED if units[name] and name not in self.rates]

    def measure(self, missing: Sequence[str], precision: Precision) -> dict[str, float]:
        """Rates of units that this rank has packs with."""
        found: dict[str, float] = {}
        devices = [self._module.device] if self._module.device.type == "cuda" else []
        with together(self.model), torch.random.fork_rng(devices), precision():
            for name, pack in self._seen.items():
                if name not in found:
                    found |= self._rates(pack)
        self._seen = {}
        return found

    def _rates(self, pack: PackedSequence) -> dict[str, float]:
        units = self.units(pack)
        both, tokenizer, vision = image_flops(self.model, pack)
        learned, _, _ = image_flops(self.model, replace(pack, context_images=(), context_blocks=()))
        flops = {"learned": learned, "clean": both - learned, "pixels": tokenizer, "understood": vision}
        return {name: n / units[name] for name, n in flops.items() if units[name]}


class ImageWork(Work):
    """Images that a tokenizer is trained on.

    The FLOPs of an image are counted once for each size, and once more with the adversary, on copies of the networks: what
    counts computes other last digits, and a run must not depend on what it is watched by.
    """

    def __init__(self, module: LightningModule) -> None:
        self._module: TokenizerTraining = module  # type: ignore[assignment]
        self.rates = {}

    def begin(self, batch: ImageBatch) -> None:
        """Whether the adversary learns from it is known before the step."""
        adversary = self._module.adversary
        against = adversary is not None and self._module.global_step >= adversary.start_step
        height, width = taken_apart(batch)[0].shape[-2:]
        self._unit = f"image {height}x{width}{' against' if against else ''}"

    def units(self, batch: ImageBatch) -> dict[str, int]:
        """Images, and the tokens that they are made into."""
        images, _ = taken_apart(batch)
        tokens = len(images) * self._module.tokenizer.layout.grid(*images.shape[-2:]).length
        return {"tokens": tokens, "images": len(images), self._unit: len(images)}

    def missing(self, units: Mapping[str, int]) -> list[str]:
        """Sizes that are new."""
        return [name for name in units if name.startswith("image ") and name not in self.rates]

    def measure(self, missing: Sequence[str], precision: Precision) -> dict[str, float]:
        """FLOPs of one image of each size, whether this rank has seen any: networks may talk to those of other ranks."""
        devices = [self._module.device] if self._module.device.type == "cuda" else []
        with torch.random.fork_rng(devices), precision():
            return {name: float(self._flops(name)) for name in missing}

    def _flops(self, unit: str) -> int:
        """Of a step over an image, and a text where texts are read: every term and its gradient."""
        module, (_, size, *against) = self._module, unit.split()
        images = torch.zeros(1, 3, *map(int, size.split("x")), device=module.device)
        tokenizer, perceptual, adversary = copy.deepcopy((module.tokenizer, module.perceptual, module.adversary))
        with FlopCounterMode(display=False) as counter:
            result = tokenizer(images, ("",)) if module.reads_texts else tokenizer(images)
            y = result.images.float()
            loss = F.l1_loss(y, images) + sum(result.terms.values())
            if perceptual is not None:
                loss = loss + perceptual(images, y).mean()
            if against and adversary is not None:
                generator = adversary.of_generator(y)
                balance = adversary.balance(loss, generator, tokenizer.last_layer)
                loss = loss + balance * generator + adversary.of_discriminator(images, y)
            loss.backward()
        return counter.get_total_flops()


def pixels(images: Tensor) -> int:
    """Of images `(..., 3, H, W)`."""
    return images.numel() // 3
