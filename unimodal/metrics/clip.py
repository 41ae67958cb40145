"""Features of CLIP for CMMD and CLIPScore, through open_clip, with the activation that the weights were trained with.

OpenAI's weights were trained with QuickGELU. open_clip builds them with it under names that end in `-quickgelu` alone (since
2.29; before, every name did), and warns otherwise: scores then come from a wrong network. Here that is refused.

Letters: B images or texts, D the width, S the side of the images.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import open_clip
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from unimodal.files import read_state
from unimodal.metrics.features import (
    TextImageFeatures,
    as_drawn,
    centre_square,
    file_record,
    load_strictly,
)

OPENAI = "openai"
SCORE_MODEL, CMMD_MODEL = "ViT-L-14-quickgelu", "ViT-L-14-336-quickgelu"


class SquareFirst:
    """Centre crop, then Pillow's bicubic: CMMD's.

    Args:
        side: S.
    """

    name = "centre square, then bicubic"

    def __init__(self, side: int) -> None:
        self.side = side

    def __call__(self, image: Image.Image) -> UInt8[Tensor, "3 S S"]:
        """The image in the network's size."""
        return as_drawn(centre_square(image.convert("RGB")).resize((self.side, self.side), Image.Resampling.BICUBIC))


class ShortestFirst:
    """Pillow's bicubic so that the shorter side fits, then centre crop: CLIP's own, and CLIPScore's.

    Args:
        side: S.
    """

    name = "bicubic by the shorter side, then centre crop"

    def __init__(self, side: int) -> None:
        from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

        self.frame = Compose([Resize(side, InterpolationMode.BICUBIC), CenterCrop(side)])

    def __call__(self, image: Image.Image) -> UInt8[Tensor, "3 S S"]:
        """The image in the network's size."""
        return as_drawn(self.frame(image.convert("RGB")))


Framing = type[SquareFirst] | type[ShortestFirst]


class ClipFeatures(TextImageFeatures):
    """CLIP's embeddings of unit length, of images and of texts.

    Args:
        model: open_clip's name; with OpenAI's weights one that ends in -quickgelu.
        weights: file (.safetensors or torch.save), or a tag of open_clip such as `openai`, which it downloads.
        framing: how images become squares.

    Raises:
        ValueError: an unknown model or tag, an activation that is not the weights', or a file that is missing or does not
            fit.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, model: str = SCORE_MODEL, weights: Path | str = OPENAI, framing: Framing = ShortestFirst
    ) -> None:
        record = _checked_weights(model, weights)
        if "tag" in record:
            network = open_clip.create_model(model, pretrained=record["tag"])
        else:
            state = read_state(Path(weights))
            with _quiet():
                network = open_clip.create_model(model, load_weights=False)
            load_strictly(network, _without_sizes(state), Path(weights))
        side = network.visual.image_size
        side = side if isinstance(side, int) else side[0]
        kind = {"cmmd": "cmmd"} if model == CMMD_MODEL and framing is SquareFirst else {}
        kind |= {"clip_score": "clip_score"} if model == SCORE_MODEL and framing is ShortestFirst else {}
        super().__init__(f"clip_{model}", int(network.visual.output_dim), framing(side), kind)
        self.model, self.weights, self.framing = model, record, framing.name
        self.network = network.requires_grad_(False).eval()
        self.tokenizer = open_clip.get_tokenizer(model)
        for name in ("mean", "std"):
            values = torch.tensor(getattr(network.visual, f"image_{name}")).view(3, 1, 1)
            self.register_buffer(name, values, persistent=False)

    def forward(self, pixels: UInt8[Tensor, "B 3 S S"]) -> Float[Tensor, "B D"]:
        """Embeddings of prepared images."""
        return F.normalize(self.network.encode_image((pixels.float() / 255 - self.mean) / self.std), dim=-1)

    def texts(self, texts: Sequence[str]) -> Float[Tensor, "B D"]:
        """Embeddings of texts, cut at the network's length."""
        return F.normalize(self.network.encode_text(self.tokenizer(list(texts)).to(self.mean.device)), dim=-1)

    def spec(self) -> dict[str, Any]:
        """Model, activation, weights, framing, dtype."""
        quick = bool(open_clip.get_model_config(self.model).get("quick_gelu", False))
        return {
            "name": self.name, "network": f"{self.model}, open_clip", "activation": "QuickGELU" if quick else "GELU",
            "weights": self.weights, "resize": self.framing, "kernel": "bicubic", "antialias": True,
            "quantised": "8 bit", "dtype": str(next(self.network.parameters()).dtype).removeprefix("torch."),
        }  # fmt: skip


@contextmanager
def _quiet() -> Iterator[None]:
    """Without open_clip's warning that nothing is loaded: the weights come next."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _checked_weights(model: str, weights: Path | str) -> dict[str, str]:
    """The record of the weights; ValueError where they cannot be this model's."""
    config = open_clip.get_model_config(model)
    if config is None:
        raise ValueError(f"model: expected a name of open_clip such as {SCORE_MODEL}, got {model}")
    quick = bool(config.get("quick_gelu", False))
    path = Path(weights)
    if not path.is_file():
        base = model.removesuffix("-quickgelu")
        tags = open_clip.list_pretrained_tags_by_model(base)
        if str(weights) not in tags:
            raise ValueError(f"weights: expected a file or one of {', '.join(tags) or 'no tags'}, got {weights}")
        trained = bool(open_clip.get_pretrained_cfg(base, str(weights)).get("quick_gelu", False))
        if trained != quick:
            _refuse_activation(model, f"the weights {weights}", trained)
        return {"tag": str(weights)}
    record = file_record(path)
    if not quick and _looks_like_openai(path, record["sha256"]):
        _refuse_activation(model, f"{path}, which are OpenAI's weights,", True)
    return record


def _refuse_activation(model: str, weights: str, quick: bool) -> None:
    right = f"{model}-quickgelu" if quick else model.removesuffix("-quickgelu")
    activation = "QuickGELU" if quick else "GELU"
    raise ValueError(f"model: {weights} were trained with {activation}: expected {right}, got {model}")


def _looks_like_openai(path: Path, sha256: str) -> bool:
    """By name, by the files that open_clip knows, or by what Hugging Face's folder says beside the file."""
    urls = [open_clip.get_pretrained_url(name, OPENAI) for name in open_clip.list_pretrained_models_by_tag(OPENAI)]
    if sha256 in {part for url in urls for part in url.split("/")}:
        return True
    if OPENAI in path.name.lower() or OPENAI in path.resolve().parent.name.lower():
        return True
    config = path.with_name("open_clip_config.json")
    return config.is_file() and bool(json.loads(config.read_text())["model_cfg"].get("quick_gelu", False))


def _without_sizes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """OpenAI's own files hold three numbers beside the weights."""
    return {k: v for k, v in state.items() if k not in ("input_resolution", "context_length", "vocab_size")}
