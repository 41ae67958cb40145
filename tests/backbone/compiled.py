"""Compiled training and compiled sessions against the same, written out; and that neither is compiled twice.

Run by `test_compile.py` in a process without the run-time checks of shapes, which no compiler can look through.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from unimodal.backbone import BackboneConfig, Experts, Lora, RopeScaling
from unimodal.decoding import decode
from unimodal.decoding_settings import DecodingSettings
from unimodal.documents import Document, Part
from unimodal.environment import can_compile
from unimodal.model import UnifiedModel
from unimodal.packing import PackedSequence, pack

pytestmark = pytest.mark.skipif(not can_compile()[0], reason=can_compile()[1])


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    counters.clear()


def packed(model: UnifiedModel, documents: list[Document], seed: int = 0) -> PackedSequence:
    drafts = [model.sequencer.document(d, (seed, 0, i), train=False) for i, d in enumerate(documents)]
    return pack(drafts, model.backbone.config.experts, model.generator.reads)


def trained(model: UnifiedModel, batch: PackedSequence, bf16: bool) -> list[torch.Tensor]:
    """Both losses, and every gradient."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        losses = model(batch)
    sum(term.sum for term in losses.values()).backward()  # type: ignore[union-attr]
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return [term.sum.detach() for term in losses.values()] + gradients


def random_documents(rng: np.random.Generator, mixed: list[Document], number: int) -> list[Document]:
    """Every seventh pack is text only, every seventh after it one image only."""
    if number % 7 == 0:
        return [Document((Part("three plus " * int(rng.integers(1, 9))),), "text")] * int(rng.integers(1, 9))
    if number % 7 == 1:
        return [Document((mixed[0].parts[1],), "image")]
    short = Document((Part("a handwritten seven"[: int(rng.integers(1, 19))]),), "text")
    return [(*mixed, short)[int(rng.integers(5))] for _ in range(int(rng.integers(1, 12)))]


MODELS: dict[str, tuple[str, dict[str, Any], int]] = {
    "flow": ("flow", {}, 60),
    "codes": ("codes", {}, 60),
    "adaln and lora": ("flow", {"time": "adaln", "experts": Experts(lora=Lora(2, 4.0))}, 30),
    "time token": ("flow", {"time": "token"}, 30),
}


@pytest.mark.parametrize("name", MODELS)
def test_one_graph_serves_every_layout(make: Callable[..., UnifiedModel], mixed: list[Document], name: str) -> None:
    generator, settings, layouts = MODELS[name]
    model, rng = make(generator, **settings).train(), np.random.default_rng(0)
    model.backbone.compile()
    for number in range(layouts):
        losses = model(packed(model, random_documents(rng, mixed, number), number))
        sum(term.sum for term in losses.values()).backward()  # type: ignore[union-attr]
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.parametrize(("bf16", "tolerance"), [(False, 1e-5), (True, 0.03)])
@pytest.mark.parametrize("settings", [{}, {"checkpointing": True}], ids=["kept", "recomputed"])
def test_compiled_layers_give_the_same_losses_and_gradients(
    make: Callable[..., UnifiedModel], mixed: list[Document], bf16: bool, tolerance: float, settings: dict[str, bool]
) -> None:
    model = make("flow").train()
    batch = packed(model, mixed)
    expected = trained(model, batch, bf16)
    for name, value in settings.items():
        setattr(model.backbone, name, value)
    model.backbone.compile()
    got = trained(model, batch, bf16)
    assert counters["stats"]["unique_graphs"] == 1
    for a, b in zip(got, expected, strict=True):
        assert float((a - b).norm()) <= tolerance * (float(b.norm()) + 1e-3)


@pytest.mark.parametrize("generator", ["flow", "codes"])
def test_a_compiled_session_writes_the_same_documents(
    make: Callable[..., UnifiedModel], mixed: list[Document], generator: str
) -> None:
    """Prompts of different lengths, guidance, text and images; in float64, where ids and pixels are equal."""
    model = make(generator).double()
    settings = DecodingSettings(
        "image", max_tokens=12, max_images=2, image=model.generator.sampling.override(guidance=2.0)
    )
    prompts = [Document(d.parts[:1], d.kind) for d in mixed]
    expected = decode(model, prompts, settings, [1, 2, 3, 4])
    model.backbone.compile_decoding()
    got = decode(model, prompts, settings, [1, 2, 3, 4])
    for a, b in zip(got, expected, strict=True):
        assert [p.text if not p.is_image else p.image.tobytes() for p in a.parts] == [
            p.text if not p.is_image else p.image.tobytes() for p in b.parts
        ]
    assert any(p.is_image for d in got for p in d.parts[1:])
    assert counters["stats"]["unique_graphs"] <= 2 * len(model.backbone.config.experts.names)


def test_two_compiled_networks_keep_apart(make: Callable[..., UnifiedModel], mixed: list[Document]) -> None:
    """Of different depth, in one process: what is compiled for the first must not serve the second."""
    prompts = [Document(mixed[3].parts, "text")]
    for depth in (2, 3):
        model = make("flow", backbone={"depth": depth}).double()
        expected = decode(model, prompts, DecodingSettings(max_tokens=8, max_images=0), [0])
        model.backbone.compile_decoding()
        assert decode(model, prompts, DecodingSettings(max_tokens=8, max_images=0), [0]) == expected


def test_settings_from_python_are_refused_too() -> None:
    """Here, because the run-time checks of types would come first."""
    with pytest.raises(ValueError, match=r"rope_scaling.kind: expected linear, llama3 or yarn, got dynamic"):
        RopeScaling("dynamic", 2.0, 100)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"experts.lora.parts: expected attention or mlp, .* got foo"):
        Lora(2, 1.0, parts=("foo",))  # type: ignore[arg-type]
    shape = {"width": 32, "depth": 1, "heads": 2, "kv_heads": 1, "mlp_width": 48, "vocabulary": 300}
    with pytest.raises(ValueError, match=r"backbone.positions: expected sequential, .* got foo"):
        BackboneConfig(positions="foo", **shape)  # type: ignore[arg-type]
