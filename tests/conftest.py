"""Tiny models that every test may ask for, and one thread, so that tests do not fight over the cores."""

import functools
import gc
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import shape_checks  # before anything that it checks
import torch
from generator_cases import CASES, TIMED, WHOLE
from PIL import Image

from unimodal.backbone import BackboneConfig, Experts
from unimodal.documents import Document, Part
from unimodal.model import UnifiedModel
from unimodal.sequence_rules import SequenceRules
from unimodal.text import TextTokenizer
from unimodal.vision import VisionEncoder
from unimodal_generators import Flow

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """A fit that is refused in this process leaves its group and threads that Lightning gave it: neither may be forked."""
    yield
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="module")
def shapes_of_this_file() -> None:
    """Every file checks the shapes of its own calls."""
    shape_checks.begin_file()


CORPUS = ["a handwritten seven", "a handwritten three", "three plus seven equals ten", "grün, 数字 and \U0001f600"]
FULL = Experts(attention=True, mlp=True, norms=True)


def encoder(**settings: Any) -> VisionEncoder:
    """A vision transformer of one layer over squares of 4 x 4 pixels."""
    shape = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2, "dynamic_img_size": True}
    return VisionEncoder("vit_tiny_patch16_224", settings=shape, **settings)


def build(
    generator: str = "flow", experts: Experts = FULL, width: int = 32, time: str = "add",
    backbone: dict[str, Any] | None = None, noise: float = 0.15, **rules: object,
) -> UnifiedModel:  # fmt: skip
    """A model of two layers; `backbone` has further settings of it. `noise` on weights: no zero must hide a mistake."""
    torch.manual_seed(0)
    case = CASES[generator]
    shape = {"width": width, "depth": 2, "heads": 2, "kv_heads": 1, "mlp_width": 48, "vocabulary": 300}
    shape |= {"positions": "block" if case.generator is Flow else "sequential", "adaln": time == "adaln"}
    config = BackboneConfig(experts=experts, **shape | (backbone or {}))
    settings = {
        "image_sizes": [(8, 8), (4, 8)],
        "context_length": 192,
        "drop_text": 0.1,
        "context": case.context,
        **rules,
    }
    made = functools.partial(case.generator, time=time) if generator in TIMED else case.generator
    vision = None if settings["context"] == "clean" else encoder()
    model = UnifiedModel(case.tokenizer(), made, config, SequenceRules(**settings), vision)
    model.text = TextTokenizer.train(CORPUS, 300)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 1 and parameter.is_floating_point():
                parameter += noise * torch.randn_like(parameter)
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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: begun last, one of them would keep one process busy after the others."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish(session: pytest.Session) -> None:
    """What thousands of tests and all that they import hold is looked through by no collector, nor by that of each fit."""
    gc.collect()
    gc.freeze()
    if "unimodal.training.run" in sys.modules:  # it unfreezes at its end
        sys.modules["unimodal.training.run"].gc = SimpleNamespace(  # type: ignore[attr-defined]
            collect=lambda: gc.collect(1), freeze=lambda: None, unfreeze=lambda: None
        )


def pytest_sessionfinish() -> None:
    """As it was: modules take themselves down through the collector."""
    gc.unfreeze()


@pytest.fixture(scope="session")
def make() -> Callable[..., UnifiedModel]:
    """`build`, for tests that vary the model."""
    return build


@pytest.fixture(scope="session", params=WHOLE)
def model(request: pytest.FixtureRequest) -> UnifiedModel:
    """One model a generator."""
    return build(request.param)


@pytest.fixture
def mixed() -> list[Document]:
    """One document of each kind."""
    return documents()
