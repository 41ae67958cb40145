"""GenEval's colour classifier: OpenAI's CLIP ViT-L/14 chooses one of ten colours for an object cut out of its image.

Letters: N objects or texts, D width of the joint space, K colours (10), T templates (3).

The object's mask keeps its pixels, the rest becomes grey #999, the box is cut out, and CLIP's own transform follows.
OpenAI's weights were trained with QuickGELU; open_clip builds `ViT-L-14` with plain GELU (since 2.29, with only a warning),
which shifts every embedding. A network with plain GELU is therefore refused.

The official script runs CLIP under autocast (half precision on CUDA), this one in float32.

`unimodal.metrics.clip` loads CLIP for scores of sets and shares no line with this: there any network of open_clip by name
with the activation of its weights, here OpenAI's alone, from folders and hubs too, found by its own modules to be QuickGELU.
"""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from jaxtyping import Float
from open_clip.transform import PreprocessCfg, image_transform_v2
from open_clip.transformer import QuickGELU
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from unimodal.environment import usable_device
from unimodal.files import file_sha256
from unimodal.metrics.detection import Detection
from unimodal.metrics.geneval import COLOURS

ARCHITECTURE = "ViT-L-14-quickgelu"
HUB = ("openai", "hf-hub:timm/vit_large_patch14_clip_224.openai")
"""Names under which OpenAI's weights are downloaded."""
OFFICIAL_SHA256 = "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"
"""Of OpenAI's ViT-L-14.pt, as its address says."""
BACKGROUND = "#999"
TEMPLATES = ("a photo of a {colour} {label}", "a photo of a {colour}-colored {label}", "a photo of a {colour} object")


@dataclass(frozen=True)
class Clip:
    """A joint network of images and texts.

    Attributes:
        network: has `encode_image` and `encode_text` of open_clip.
        transform: a PIL image to what `encode_image` takes.
        tokenize: texts to what `encode_text` takes.
        name: where it came from.
    """

    network: nn.Module
    transform: Callable[[Image.Image], Tensor]
    tokenize: Callable[[list[str]], Tensor]
    name: str


def is_official(weights: str) -> bool:
    """Whether OpenAI's own weights are meant: by the name they are downloaded under, or by the file's hash."""
    return weights in HUB or (Path(weights).is_file() and file_sha256(Path(weights)) == OFFICIAL_SHA256)


def check_clip(weights: str) -> None:
    """ValueError where `load_clip` would find nothing; nothing is loaded."""
    path = Path(weights)
    if path.is_dir():
        _check_config(path)
    elif not (weights.startswith("hf-hub:") or weights == "openai" or path.is_file()):
        raise ValueError(
            f"--clip: expected openai, hf-hub:owner/name, a file or a folder of weights, got {weights}"
            + (" (a network's name: with OpenAI's weights it must be the one with QuickGELU, which openai takes)"
               if weights.startswith("ViT") else "")
        )  # fmt: skip


def load_clip(weights: str, architecture: str = ARCHITECTURE) -> Clip:
    """OpenAI's CLIP through open_clip.

    Args:
        weights: "openai" (downloaded by open_clip), "hf-hub:owner/name", a folder with open_clip_config.json, or a file
            of weights for the architecture (safetensors, or tensors that torch.load takes with weights_only).
        architecture: open_clip's name of the network, for "openai" and for files.

    Raises:
        ValueError: no such weights, they do not fit, or the network has plain GELU.
    """
    check_clip(weights)
    path = Path(weights)
    name: str = architecture
    pretrained: str | None = weights
    if path.is_dir() or weights.startswith("hf-hub:"):
        name, pretrained = f"local-dir:{path}" if path.is_dir() else weights, None
    try:
        network = open_clip.create_model(name, pretrained=pretrained, precision="fp32", require_pretrained=True)
    except (RuntimeError, OSError, KeyError, pickle.UnpicklingError) as error:
        line = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"--clip: {weights}: expected weights that fit {name}, got {line}") from error
    check_quick_gelu(network, weights)
    transform = image_transform_v2(PreprocessCfg(**network.visual.preprocess_cfg), is_train=False)
    # A local path says nothing on another machine; the tensors' hash tells weights apart.
    return Clip(network, transform, open_clip.get_tokenizer(name), path.name if path.exists() else weights)


def _check_config(folder: Path) -> None:
    path = folder / "open_clip_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ValueError(f"--clip: {folder}: expected a folder with open_clip_config.json, got none in it") from None
    if not isinstance(config, dict) or not config.get("model_cfg", {}).get("quick_gelu"):
        raise ValueError(
            f"--clip: {path}: expected quick_gelu: true, as OpenAI's weights were trained, got a network with plain GELU"
        )


def check_quick_gelu(network: nn.Module, name: str) -> None:
    """ValueError for a network that has plain GELU, or has no QuickGELU."""
    plain = any(isinstance(module, nn.GELU) for module in network.modules())
    quick = any(isinstance(module, QuickGELU) for module in network.modules())
    if plain or not quick:
        raise ValueError(
            f"--clip: {name}: expected a network with QuickGELU, as OpenAI's weights were trained, got "
            f"{'plain GELU' if plain else 'another activation'}; open_clip's name for the right one ends in -quickgelu"
        )


class ClipColours:
    """Names the colours of objects.

    Args:
        clip: the network.
        device: "auto" is CUDA where there is one.
        batch: objects in one forward, at most.
    """

    def __init__(self, clip: Clip, device: str = "auto", batch: int = 256) -> None:
        check_quick_gelu(clip.network, clip.name)
        self.clip, self.batch = clip, batch
        self.device = usable_device(device)
        clip.network.eval().requires_grad_(False).to(self.device)
        self._texts: dict[str, Tensor] = {}

    def names(self, objects: Sequence[tuple[Image.Image, Detection]]) -> list[str]:
        """A colour for each object: all crops of all images in one go.

        Args:
            objects: the whole image, and what was found in it; with its mask.
        """
        if not objects:
            return []
        return [COLOURS[i] for i in self.similarities(objects).argmax(1).tolist()]

    @torch.inference_mode()
    def similarities(self, objects: Sequence[tuple[Image.Image, Detection]]) -> Float[Tensor, "N K"]:
        """Cosines between each object and the ten colours of its class."""
        features = []
        for start in range(0, len(objects), self.batch):
            some = objects[start : start + self.batch]
            crops = torch.stack([self.clip.transform(crop(image, detection)) for image, detection in some])
            encode: Any = self.clip.network.encode_image
            features.append(functional.normalize(encode(crops.to(self.device)), dim=-1))
        texts = torch.stack([self._colours(detection.label) for _, detection in objects])  # (N, K, D)
        return torch.einsum("nd,nkd->nk", torch.cat(features), texts)

    def _colours(self, label: str) -> Float[Tensor, "K D"]:
        """Embeddings of the colours of a class; made once."""
        if label not in self._texts:
            texts = [template.format(colour=colour, label=label) for colour in COLOURS for template in TEMPLATES]
            encode: Any = self.clip.network.encode_text
            embedded = functional.normalize(encode(self.clip.tokenize(texts).to(self.device)), dim=-1)
            means = embedded.unflatten(0, (len(COLOURS), len(TEMPLATES))).mean(1)
            self._texts[label] = functional.normalize(means, dim=-1)
        return self._texts[label]

    def spec(self) -> dict[str, Any]:
        """Which network, and how it is used."""
        return {
            "network": self.clip.name,
            "activation": "QuickGELU",
            "tensors_sha256": tensors_sha256(self.clip.network),
            "templates": list(TEMPLATES),
            "background": BACKGROUND,
            "precision": "float32",
        }


def crop(image: Image.Image, detection: Detection) -> Image.Image:
    """The object on grey, cut to its box.

    Raises:
        ValueError: the mask has another size than the image.
    """
    left, top, right, bottom = (round(side) for side in detection.box)
    cut = image.convert("RGB").crop((left, top, right, bottom))
    if detection.mask is None:
        return cut
    if detection.mask.shape != (image.height, image.width):
        raise ValueError(f"mask: expected {image.height} x {image.width} pixels, got {detection.mask.shape}")
    mask = Image.fromarray(detection.mask).crop((left, top, right, bottom))
    return Image.composite(cut, Image.new("RGB", cut.size, BACKGROUND), mask)


def tensors_sha256(network: nn.Module) -> str:
    """SHA-256 of a network's tensors as float32 with their names, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
