"""Tiny models that every test may ask for, and one thread, so that tests do not fight over the cores."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from unimodal.backbone import BackboneConfig, Experts
from unimodal.documents import Document, Part
from unimodal.model import UnifiedModel
from unimodal.packing import SequenceRules
from unimodal.text import TextTokenizer
from unimodal_generators import Autoregressive, ConvNeXtCoder, Diffusion, DiffusionSettings, Flow, UNetCoder
from unimodal_tokenizers.base import Grid, ImageTokenizer, TokenLayout
from unimodal_tokenizers.patch import PatchTokenizer

torch.set_num_threads(1)


class GrayLevels(ImageTokenizer):
    """A discrete tokenizer without weights: the gray level of each 2 x 2 square, in 16 steps."""

    def __init__(self) -> None:
        super().__init__()
        self.layout = TokenLayout("discrete", dim=1, stride=2, codebooks=(16,))

    def encode_batch(self, images: torch.Tensor, rng: torch.Generator | None = None) -> torch.Tensor:
        gray = torch.nn.functional.avg_pool2d(images.mean(1, keepdim=True), 2)
        return ((gray + 1) * 7.5).round().long().flatten(1)

    def decode_batch(self, tokens: torch.Tensor, grid: Grid, rng: torch.Generator | None = None) -> torch.Tensor:
        gray = (tokens.float() / 7.5 - 1).unflatten(1, (1, *grid))
        return gray.repeat(1, 3, 1, 1).repeat_interleave(2, -1).repeat_interleave(2, -2)

    def lookup(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens.float()[:, None] / 7.5 - 1


CORPUS = ["a handwritten seven", "a handwritten three", "three plus seven equals ten", "grün, 数字 and \U0001f600"]
FULL = Experts(attention=True, mlp=True, norms=True)
GENERATORS: dict[str, Callable[..., Any]] = {
    "flow": Flow,
    "unet": functools.partial(Flow, coder=functools.partial(UNetCoder, patch=2, channels=8)),
    "convnext": functools.partial(Flow, coder=functools.partial(ConvNeXtCoder, channels=16)),
    "diffusion": functools.partial(Diffusion, sampling=DiffusionSettings(steps=8, eta=1.0)),
    "autoregressive": Autoregressive,
    "codes": functools.partial(Autoregressive, inputs="codes", token_noise=0.2),
}


def build(
    generator: str = "flow", experts: Experts = FULL, width: int = 32, time: str = "add",
    backbone: dict[str, Any] | None = None, **rules: object,
) -> UnifiedModel:  # fmt: skip
    """A model of two layers with random, non-degenerate weights; `backbone` has further settings of it."""
    torch.manual_seed(0)
    shape = {"width": width, "depth": 2, "heads": 2, "kv_heads": 1, "mlp_width": 48, "vocabulary": 300}
    shape |= {"positions": "block" if generator == "flow" else "sequential", "adaln": time == "adaln"}
    config = BackboneConfig(experts=experts, **shape | (backbone or {}))
    settings = {"image_sizes": [(8, 8), (4, 8)], "context_length": 192, "drop_text": 0.1, **rules}
    discrete = generator in ("autoregressive", "codes")
    tokenizer = GrayLevels() if discrete else PatchTokenizer(2)
    made = GENERATORS[generator] if discrete else functools.partial(GENERATORS[generator], time=time)
    model = UnifiedModel(tokenizer, made, config, SequenceRules(**settings))
    model.text = TextTokenizer.train(CORPUS, 300)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 1 and parameter.is_floating_point():
                parameter += 0.15 * torch.randn_like(parameter)  # zero-initialised layers must not hide a mistake
    return model.eval()


def picture(seed: int, height: int = 8, width: int = 8) -> Image.Image:
    """Random pixels."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def interleaved(seed: int = 0) -> Document:
    """Text and images, context and targets, in turn."""
    return Document(
        (
            Part(picture(seed), learn=False),
            Part(" plus ", learn=False),
            Part(picture(seed + 1, 4, 8), learn=False),
            Part(" equals twelve", learn=True),
            Part(picture(seed + 2), learn=True),
            Part(picture(seed + 3), learn=True),
            Part(" done", learn=True),
        ),
        "sum",
    )


def documents() -> list[Document]:
    """One of each kind."""
    return [
        Document((Part("a handwritten seven", learn=False), Part(picture(10))), "text_to_image"),
        Document((Part(picture(11), learn=False), Part("a handwritten three")), "image_to_text"),
        interleaved(20),
        Document((Part("three plus seven equals ten"),), "text"),
    ]


@pytest.fixture(scope="session")
def make() -> Callable[..., UnifiedModel]:
    """`build`, for tests that vary the model."""
    return build


@pytest.fixture(scope="session", params=["flow", "unet", "diffusion", "autoregressive", "codes"])
def model(request: pytest.FixtureRequest) -> UnifiedModel:
    """One model a generator."""
    return build(request.param)


@pytest.fixture
def mixed() -> list[Document]:
    """One document of each kind."""
    return documents()
