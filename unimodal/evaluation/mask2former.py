"""GenEval's detector without mmdetection: the converted network, and mmdetection's own steps before and behind it.

Letters: B images, H x W their pixels, h x w pixels of a mask's logits, Q queries, C classes, N detections.

Before (mmdetection 2.x, `mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco.py`): keep the ratio and fit into (1333, 800) as
OpenCV does it on 8-bit pixels, pad to a multiple of 32 with grey 128 on the right and below, normalise. Behind: class
probabilities without the void class, the 100 best of all pairs of query and class, mask logits to the padded size, cropped,
to the image's size, positive ones are the mask; the score is class probability times the mean probability inside the mask.

`resize_8bit` follows OpenCV's published fixed-point arithmetic of INTER_LINEAR; it was not compared with OpenCV itself.
mmdetection 3.x pads with zeros behind the normalisation; square images are not padded at all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional
from transformers import Mask2FormerForUniversalSegmentation
from transformers.utils import logging

from unimodal.environment import usable_device
from unimodal.importers.mmdet import CONFIG, KNOWN, WEIGHTS
from unimodal.metrics.detection import Detection

LABELS = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli", "carrot",
    "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet", "tv", "laptop",
    "computer mouse", "tv remote", "computer keyboard", "cell phone", "microwave", "oven", "toaster", "sink",
    "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip
"""COCO's classes in COCO's order, three of them as GenEval calls them: computer mouse, tv remote, computer keyboard."""
LONG_SIDE, SHORT_SIDE = 1333, 800
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # RGB, 0..255
PADDING, DIVISOR = 128, 32
MOST = 100
"""Pairs of query and class that are looked at."""

_BITS = 11  # OpenCV's INTER_RESIZE_COEF_BITS
_AT_ONCE = 16  # masks that are upsampled at once: memory


# --- before the network


def fitted_size(height: int, width: int) -> tuple[int, int]:
    """Height and width after fitting an image into 1333 x 800 (either way up), rounded as mmcv rounds."""
    scale = min(LONG_SIDE / max(height, width), SHORT_SIDE / min(height, width))
    return int(height * scale + 0.5), int(width * scale + 0.5)


@dataclass(frozen=True)
class _Taps:
    """Two source pixels for each target pixel, and their weights 0 .. 2048; all (target,) int32."""

    first: Tensor
    second: Tensor
    first_weight: Tensor
    second_weight: Tensor

    @classmethod
    def of(cls, source: int, target: int, device: torch.device, *, columns: bool) -> _Taps:
        scale = 1.0 / (target / source)
        place = ((np.arange(target) + 0.5) * scale - 0.5).astype(np.float32)
        first = np.floor(place).astype(np.int64)
        share = place - first.astype(np.float32)
        if columns:  # beyond the border one pixel has all the weight; of rows, the border's is taken twice
            share[(first < 0) | (first >= source - 1)] = 0
        weights = [np.rint(s * np.float32(1 << _BITS)) for s in (np.float32(1) - share, share)]
        numbers = (first.clip(0, source - 1), (first + 1).clip(0, source - 1), *weights)
        return cls(*(torch.from_numpy(n.astype(np.int32)).to(device) for n in numbers))


def resize_8bit(images: UInt8[Tensor, "B 3 H W"], size: tuple[int, int]) -> UInt8[Tensor, "B 3 height width"]:
    """Bilinear, without antialiasing, in OpenCV's fixed point: 11 bits a weight, columns first, then rows."""
    columns = _Taps.of(images.shape[3], size[1], images.device, columns=True)
    rows = _Taps.of(images.shape[2], size[0], images.device, columns=False)
    pixels = images.int()
    wide = pixels[..., columns.first] * columns.first_weight + pixels[..., columns.second] * columns.second_weight
    wide = wide >> 4  # at most 255 * 2048 / 16: products below fit 32 bits
    above = wide[..., rows.first, :] * rows.first_weight[:, None] >> 16
    below = wide[..., rows.second, :] * rows.second_weight[:, None] >> 16
    return ((above + below + 2) >> 2).clamp(0, 255).to(torch.uint8)


def prepare(images: UInt8[Tensor, "B 3 H W"]) -> tuple[Float[Tensor, "B 3 height width"], tuple[int, int]]:
    """What the network sees of RGB images of one size, and the size they fill of it."""
    size = fitted_size(images.shape[2], images.shape[3])
    fitted = resize_8bit(images, size)
    below, right = -size[0] % DIVISOR, -size[1] % DIVISOR
    padded = functional.pad(fitted, (0, right, 0, below), value=PADDING).float()
    mean, std = (torch.tensor(values, device=images.device)[:, None, None] for values in (MEAN, STD))
    return (padded - mean) / std, size


# --- behind the network


@dataclass(frozen=True)
class Found:
    """Objects in one image, on the network's device.

    Attributes:
        labels: numbers of `LABELS`.
        boxes: x1, y1, x2, y2, tight around the mask, x2 and y2 outside.
        scores: class probability times mean probability inside the mask.
        masks: pixels of each.
    """

    labels: list[int]
    boxes: list[tuple[float, float, float, float]]
    scores: list[float]
    masks: Bool[Tensor, "N H W"]


def find(
    classes: Float[Tensor, "Q C"],
    masks: Float[Tensor, "Q h w"],
    padded: tuple[int, int],
    filled: tuple[int, int],
    original: tuple[int, int],
    least: float = 0.0,
) -> Found:
    """The objects of one image that score more than `least`.

    Args:
        classes: class logits, void last.
        masks: mask logits of the padded input.
        padded: height and width of the network's input.
        filled: the part of it that is image.
        original: the image's own size.
        least: nothing is lost by it: a score is at most its class probability, so only masks of those above are made.
    """
    probabilities = classes.softmax(-1)[:, :-1].flatten()
    best, places = probabilities.topk(min(MOST, len(probabilities)))
    above = best > torch.tensor(least, dtype=best.dtype)
    best, places = best[above], places[above]
    query, label = places // (classes.shape[1] - 1), places % (classes.shape[1] - 1)
    used, of = query.unique(return_inverse=True)
    pixels, inside = _masks(masks[used], padded, filled, original)
    scores = best * inside[of]
    right = scores > torch.tensor(least, dtype=best.dtype)
    boxes = _boxes(pixels)[of][right].tolist()
    kept = pixels[of][right]
    return Found(label[right].tolist(), [(b[0], b[1], b[2], b[3]) for b in boxes], scores[right].tolist(), kept)


def _masks(
    logits: Float[Tensor, "N h w"], padded: tuple[int, int], filled: tuple[int, int], original: tuple[int, int]
) -> tuple[Bool[Tensor, "N H W"], Float[Tensor, " N"]]:
    """Masks at the image's size, and the mean probability inside each; 0 for an empty one."""
    if not len(logits):
        return logits.new_zeros((0, *original), dtype=torch.bool), logits.new_zeros(0)
    pixels, inside = [], []
    for some in logits.split(_AT_ONCE):
        whole = functional.interpolate(some[None], padded, mode="bilinear", align_corners=False)
        cropped = whole[:, :, : filled[0], : filled[1]]
        own = functional.interpolate(cropped, original, mode="bilinear", align_corners=False)[0]
        mask = own > 0
        inside.append((own.sigmoid() * mask).flatten(1).sum(1) / (mask.flatten(1).sum(1) + 1e-6))
        pixels.append(mask)
    return torch.cat(pixels), torch.cat(inside)


def _boxes(masks: Bool[Tensor, "N H W"]) -> Float[Tensor, "N 4"]:
    """Tight boxes; zeros for an empty mask."""
    ends = []
    for along in (masks.any(1), masks.any(2)):  # columns, rows
        length = along.shape[1]
        numbers = torch.arange(length, device=masks.device)
        first = torch.where(along, numbers, length).amin(1)
        last = torch.where(along, numbers + 1, 0).amax(1)
        ends.append((torch.where(along.any(1), first, 0), last))
    (x1, x2), (y1, y2) = ends
    return torch.stack([x1, y1, x2, y2], 1).float()


# --- the detector


class Mask2FormerDetector:
    """The converted network, in float32.

    Args:
        folder: what `convert_checkpoint` wrote.
        device: "auto" is CUDA where there is one.
        batch: images in one forward, at most.

    Raises:
        ValueError: the folder is not such a one.
    """

    def __init__(self, folder: str | Path, device: str = "auto", batch: int = 8) -> None:
        self.folder, self.batch = Path(folder), batch
        self.metadata = read_metadata(self.folder)
        self.device = usable_device(device)
        network, notes = _load(self.folder)
        wrong = [*notes["missing_keys"], *notes["unexpected_keys"], *notes["mismatched_keys"]]
        if wrong:
            raise ValueError(f"--detector: {self.folder}: expected the converted Mask2Former, got {wrong[0]} amiss")
        self.network = network.eval().requires_grad_(False).to(self.device)

    @property
    def official(self) -> bool:
        """Whether it was converted from one of the published checkpoints, by its hash."""
        return is_official(self.metadata)

    def detect(
        self, images: Sequence[Image.Image], least: Sequence[float], masks: Sequence[bool]
    ) -> list[list[Detection]]:
        """What is in each image.

        Args:
            images: RGB, of any sizes; those of one size share a forward.
            least: for each, what scores must exceed.
            masks: for each, whether detections carry their pixels (H x W bytes each).
        """
        found: list[list[Detection]] = [[] for _ in images]
        by_size: dict[tuple[int, int], list[int]] = {}
        for number, image in enumerate(images):
            by_size.setdefault(image.size, []).append(number)
        for numbers in by_size.values():
            for start in range(0, len(numbers), self.batch):
                some = numbers[start : start + self.batch]
                results = self._forward([images[i] for i in some], [least[i] for i in some])
                for i, result in zip(some, results, strict=True):
                    found[i] = _detections(result, masks[i])
        return found

    @torch.inference_mode()
    def _forward(self, images: Sequence[Image.Image], least: Sequence[float]) -> list[Found]:
        stacked = torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in images]))
        pixels, filled = prepare(stacked.permute(0, 3, 1, 2).to(self.device))
        # TF32 convolutions move confidences by more than rounding does.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            out = self.network(pixel_values=pixels)
        padded = (pixels.shape[2], pixels.shape[3])
        original = (images[0].height, images[0].width)
        return [
            find(classes, masks, padded, filled, original, bound)
            for classes, masks, bound in zip(out.class_queries_logits, out.masks_queries_logits, least, strict=True)
        ]

    def spec(self) -> dict[str, Any]:
        """Which network, and how it is used."""
        return {
            "network": "mask2former swin, mmdetection's weights in transformers",
            "source": self.metadata.get("source"),
            "source_sha256": self.metadata.get("source_sha256"),
            "official": self.official,
            "resize": f"opencv bilinear 8-bit into {LONG_SIDE}x{SHORT_SIDE}, padding {PADDING} to {DIVISOR}",
            "precision": "float32",
        }


def _load(folder: Path) -> tuple[Mask2FormerForUniversalSegmentation, dict[str, Any]]:
    """The network, and what did not fit; without transformers' progress bar."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        return Mask2FormerForUniversalSegmentation.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    finally:
        if shown:
            logging.enable_progress_bar()


def _detections(found: Found, with_masks: bool) -> list[Detection]:
    pixels = found.masks.cpu().numpy() if with_masks else [None] * len(found.labels)
    rows = zip(found.labels, found.boxes, found.scores, pixels, strict=True)
    return [Detection(LABELS[label], box, score, mask) for label, box, score, mask in rows]


def read_metadata(folder: Path) -> dict[str, str]:
    """What the conversion noted in a detector's folder.

    Raises:
        ValueError: it is none.
    """
    path = folder / WEIGHTS
    if not path.is_file() or not (folder / CONFIG).is_file():
        raise ValueError(f"--detector: expected a folder with {CONFIG} and {WEIGHTS}, got {folder}")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        kind = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("model_type")
    except (SafetensorError, ValueError, AttributeError) as error:
        raise ValueError(f"--detector: {folder}: expected safetensors and JSON, got {error}") from None
    if kind != "mask2former" or "source_sha256" not in metadata:
        raise ValueError(
            f"--detector: {folder}: expected a detector that `unimodal import mask2former` wrote, got {kind}"
        )
    return dict(metadata)


def is_official(metadata: Mapping[str, str]) -> bool:
    """Whether the converted checkpoint was a published one."""
    return metadata.get("source_sha256", "")[:8] in KNOWN
