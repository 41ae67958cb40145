"""Models over tokens without a place: what a grid of one row would be, and refused where rows or places are needed."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import generator_cases
import pytest
import torch
from generator_cases import Case, GrayLevels
from PIL import Image

from unimodal.decoding import decode
from unimodal.decoding_settings import DecodingSettings, Inpaint
from unimodal.documents import Document, Part
from unimodal.model import UnifiedModel
from unimodal.packing import pack
from unimodal_generators import (
    Autoregressive,
    Diffusion,
    DiT,
    Flow,
    ImageGenerator,
    Masked,
    NextScale,
    ParallelNext,
    Queries,
    Regression,
    TokenDiffusion,
)
from unimodal_tokenizers import CodecTokenizer, Grid, TokenLayout

Make = Callable[..., UnifiedModel]


class GrayRow(GrayLevels):
    """The same gray levels, said to lie nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.layout = TokenLayout("sequence", dim=1, stride=2, codebooks=(16,), length=16, image=(8, 8))

    def decode_batch(
        self, tokens: torch.Tensor, grid: Grid, rngs: Sequence[torch.Generator] | None = None
    ) -> torch.Tensor:
        return super().decode_batch(tokens, Grid(4, 4), rngs)


@pytest.fixture
def both(make: Make, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], tuple[UnifiedModel, UnifiedModel]]:
    """One model, over a grid and over a sequence of the same tokens; positions do not look at places."""

    def build(generator: Any) -> tuple[UnifiedModel, UnifiedModel]:
        models = []
        for tokenizer in (GrayLevels, GrayRow):
            monkeypatch.setitem(generator_cases.CASES, "either", Case(generator, tokenizer))
            models.append(make("either", image_sizes=[(8, 8)]))
        models[1].load_state_dict(models[0].state_dict())
        return models[0], models[1]

    return build


GENERATORS = [
    Autoregressive,
    functools.partial(Autoregressive, inputs="codes", token_noise=0.2),
    functools.partial(Autoregressive, vocabulary="shared"),
    Masked,
    ParallelNext,
]


@pytest.mark.parametrize("generator", GENERATORS)
def test_a_sequence_is_learned_and_drawn_as_a_grid_without_places(
    generator: Any, both: Any, mixed: list[Document]
) -> None:
    results = []
    for model in both(generator):
        documents = [model.sequencer.document(d, (0, 0, i), train=False) for i, d in enumerate(mixed)]
        with torch.no_grad():
            loss = model(pack(documents, model.backbone.config.experts, model.generator.reads))
        settings = DecodingSettings(start="image", max_tokens=4, max_images=2)
        drawn = decode(model, mixed[:2], settings, [0, 1])
        results.append(({k: float(t.sum) for k, t in loss.items()}, [[i.tobytes() for i in d.images] for d in drawn]))
    assert results[0] == results[1]
    assert len(results[0][1][0]) >= 1


@pytest.mark.parametrize("generator", [
    Flow, Diffusion, Regression, NextScale,
    functools.partial(TokenDiffusion, head_width=16, head_depth=1),
    functools.partial(Queries, denoiser=functools.partial(DiT, width=16, depth=1, heads=2), queries=3),
])  # fmt: skip
def test_generators_of_other_tokens_refuse_a_sequence(generator: Callable[..., ImageGenerator]) -> None:
    kind = "multiscale" if generator is NextScale else "continuous"
    with pytest.raises(ValueError, match=rf"tokenizer: \w+ takes {kind} tokens, got sequence"):
        generator(GrayRow().layout, 32)


@pytest.mark.parametrize("settings", [{"shuffle": 2}, {"end_of_row": True}])
def test_what_needs_rows_is_refused(settings: dict[str, Any]) -> None:
    name = next(iter(settings))
    with pytest.raises(ValueError, match=f"generator.{name}: expected none with tokens of a sequence"):
        Autoregressive(GrayRow().layout, 32, **settings)


def test_what_needs_places_and_other_sizes_is_refused(both: Any, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model = both(Masked)[1]
    prompt = Document((Part("a handwritten seven", learn=False),))
    given = Inpaint(Image.new("RGB", (8, 8)), Image.new("L", (8, 8)))
    with pytest.raises(ValueError, match="inpaint: tokens of a GrayRow lie at no place of the image"):
        decode(model, [prompt], DecodingSettings(start="image", max_images=1), [0], [given])
    monkeypatch.setitem(generator_cases.CASES, "either", Case(Masked, GrayRow))
    with pytest.raises(ValueError, match="image size: expected 8x8, the one this tokenizer has, got 4x8 pixels"):
        make("either")  # which also has images of 4x8


def test_a_model_draws_jpegs(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Untrained, it writes any bytes, and they are an image."""
    codec = functools.partial(CodecTokenizer, (8, 8), 40, colours=1)
    monkeypatch.setitem(generator_cases.CASES, "jpeg", Case(Autoregressive, codec))
    model = make("jpeg", image_sizes=[(8, 8)])
    prompt = Document((Part("a handwritten seven", learn=False),))
    (drawn,) = decode(model, [prompt], DecodingSettings(start="image", max_tokens=1, max_images=1), [0])
    assert drawn.images[0].size == (8, 8)
