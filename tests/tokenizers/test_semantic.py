"""Meaning: a frozen encoder's features and texts, compared with what quantized vectors say."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from unimodal_tokenizers import (
    FrozenEncoder,
    Grid,
    GridTokenizer,
    SemanticHead,
    SequenceTokenizer,
    StagedTokenizer,
    TextEncoder,
)
from unimodal_tokenizers.quantizers import VectorQuantizer
from unimodal_tokenizers.semantic import contrastive_loss, cosine_distance

NAME = "vit_tiny_patch16_224"
OPTIONS = {"img_size": 8, "patch_size": 4, "embed_dim": 12, "depth": 1, "num_heads": 2}


def teacher() -> FrozenEncoder:
    torch.manual_seed(7)
    return FrozenEncoder(NAME, OPTIONS)


TEXTS = ["a cat", "two dogs", "a cat", ""]


def reader(length: int = 8) -> TextEncoder:
    torch.manual_seed(3)
    return TextEncoder(8, 1, 2, length)


def head(**options: Any) -> SemanticHead:
    torch.manual_seed(0)
    return SemanticHead(**{"width": 16, "depth": 1, "heads": 2, "dim": 4, **options})


def images(count: int = 4) -> torch.Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1


def random(*shape: int, seed: int = 2) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tokenizer(kind: str, semantic: SemanticHead) -> Any:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"patch": 4, "width": 16, "heads": 2}
    if kind == "grid":
        return GridTokenizer(VectorQuantizer(16, 4), channels=[8, 16], blocks=1, semantic=semantic)
    if kind == "sequence":
        quantizer = VectorQuantizer(16, 4)
        return SequenceTokenizer(quantizer, **shape, image=(8, 8), tokens=3, depth=1, semantic=semantic)
    return StagedTokenizer(dim=3, **shape, depths=(1, 1, 1), semantic=semantic)


# ---- the terms


def test_cosines_and_clips_loss_by_hand() -> None:
    x, y = random(2, 3, 4), random(2, 3, 4, seed=3)
    cosines = [x[i, j] @ y[i, j] / (x[i, j].norm() * y[i, j].norm()) for i in range(2) for j in range(3)]
    torch.testing.assert_close(cosine_distance(x, y), 1 - torch.stack(cosines).mean())

    a, t = random(5, 4), random(5, 4, seed=3)
    s = 3.0 * F.normalize(a, dim=1) @ F.normalize(t, dim=1).T  # CLIP, figure 3
    clip = (F.cross_entropy(s, torch.arange(5)) + F.cross_entropy(s.T, torch.arange(5))) / 2
    torch.testing.assert_close(contrastive_loss(a, t, torch.arange(5), torch.tensor(3.0)), clip)


def test_a_text_said_twice_is_one_text() -> None:
    a, two = random(3, 4), random(2, 4, seed=3)
    said = [0, 1, 0]
    s = 2.0 * F.normalize(a, dim=1) @ F.normalize(two, dim=1).T
    finds = -sum(s[i].log_softmax(0)[u] for i, u in enumerate(said)) / 3
    found = -(s[:, 0].log_softmax(0)[[0, 2]].mean() + s[:, 1].log_softmax(0)[1]) / 2
    torch.testing.assert_close(contrastive_loss(a, two, torch.tensor(said), torch.tensor(2.0)), (finds + found) / 2)


@pytest.mark.parametrize("grid", [Grid(1, 3), Grid(4, 4), Grid(2, 2)])
def test_a_head_reads_its_channels_wherever_the_vectors_lie(grid: Grid) -> None:
    semantic = head(dim=3, first=2, teacher=teacher(), text=reader())
    vectors = random(4, grid.length, 8).requires_grad_()
    terms = semantic(vectors, grid, images(), TEXTS)
    assert set(terms) == set(semantic.weights) == {"semantic", "contrastive"}
    for term in terms.values():
        (grad,) = torch.autograd.grad(term, vectors, retain_graph=True)
        read = grad.abs().amax((0, 1)) > 0
        assert read.tolist() == [False, False, True, True, True, False, False, False]
    sum(terms.values()).backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in semantic.parameters() if p.requires_grad)
    assert not any(p.requires_grad for p in semantic.teacher.parameters())


def test_the_teacher_stays_as_it_is() -> None:
    semantic = head(teacher=FrozenEncoder(NAME, {**OPTIONS, "proj_drop_rate": 0.5})).train()
    assert semantic.training
    assert not semantic.teacher.network.training
    assert torch.equal(semantic.teacher(images()), semantic.teacher(images()))


def test_texts_are_read_by_themselves_to_their_end() -> None:
    encoder = reader()
    said = encoder(TEXTS)
    assert torch.equal(said[0], said[2])
    assert not said[3].any()  # nothing
    for text, vector in zip(TEXTS, said, strict=True):  # what stands beside a text, or behind it, changes nothing
        torch.testing.assert_close(encoder([text])[0], vector)
    padded = reader(12)
    padded.load_state_dict({**encoder.state_dict(), "places": torch.cat([encoder.places, torch.ones(4, 8)])})
    torch.testing.assert_close(padded(TEXTS), said)
    assert torch.equal(encoder(["two dogs and more"])[0], said[1])  # eight bytes of it
    assert not torch.equal(encoder(["tac a"])[0], said[0])  # an order
    assert encoder(["grün"]).isfinite().all()
    with pytest.raises(ValueError, match=r"text\.length: expected at least 1 byte, got 0"):
        reader(0)


# ---- in tokenizers


@pytest.mark.parametrize("kind", ["grid", "sequence", "staged"])
def test_vectors_come_to_mean_what_the_teacher_says(kind: str) -> None:
    wide = 16 if kind == "staged" else 4
    made = tokenizer(kind, head(dim=wide, teacher=teacher())).train()
    optimizer = torch.optim.AdamW([p for p in made.parameters() if p.requires_grad], lr=1e-2)
    terms = []
    for _ in range(20):
        result = made(images())
        terms.append(float(result.terms["semantic"]))
        optimizer.zero_grad()
        result.terms["semantic"].backward()  # alone: what it moves, it moves
        optimizer.step()
    assert terms[-1] < 0.7 * terms[0]
    assert made.weights["semantic"] == 1.0
    encoder = next(p for name, p in made.named_parameters() if name.startswith(("encoder", "patches_in")))
    assert encoder.grad is not None
    assert encoder.grad.any()


@pytest.mark.parametrize("kind", ["grid", "sequence", "staged"])
def test_texts_come_with_the_images(kind: str) -> None:
    wide = 16 if kind == "staged" else 4
    made = tokenizer(kind, head(dim=wide, text=reader())).train()
    result = made(images(), TEXTS)
    assert set(made.weights) >= set(result.terms) >= {"contrastive"}
    with pytest.raises(ValueError, match="texts: expected 4 with 4 images, got none"):
        made(images())
    with pytest.raises(ValueError, match="texts: expected 4 with 4 images, got 3"):
        made(images(), TEXTS[:3])
    with pytest.raises(ValueError, match="texts: expected none with 4 images, got 4"):
        tokenizer(kind, head(dim=wide, teacher=teacher())).train()(images(), TEXTS)


# ---- what cannot be


@pytest.mark.parametrize(("options", "message"), [
    ({"text": None}, "semantic: expected a teacher, a text encoder or both, got none"),
    ({"depth": 0}, "semantic.depth: expected at least 1, got 0"),
    ({"dim": 0}, "semantic: expected dim from 1 and first from 0, got 0 and 0"),
    ({"first": -1}, "got 4 and -1"),
])  # fmt: skip
def test_bad_heads_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        head(**{"text": reader(), **options})


@pytest.mark.parametrize("kind", ["grid", "sequence", "staged"])
def test_channels_that_are_not_there_are_refused(kind: str) -> None:
    has = 16 if kind == "staged" else 4
    with pytest.raises(ValueError, match=f"semantic.dim: expected channels of the tokenizer's {has}, got 16 from 1 on"):
        tokenizer(kind, head(dim=16, first=1, text=reader()))


def test_teachers_are_loaded_whole_or_not_at_all(tmp_path: Path) -> None:
    one = teacher()
    save_file(
        {f"{k}": v + 1 for k, v in one.network.state_dict().items()} | {"head.bias": torch.zeros(2)}, tmp_path / "w"
    )
    before = one(images())
    one.load(tmp_path / "w")
    assert not torch.equal(one(images()), before)
    with pytest.raises(ValueError, match=r"encoder_weights: .*none is missing"):
        one.load(tmp_path / "none")
    save_file({"extra": torch.zeros(1)}, tmp_path / "wrong")
    with pytest.raises(ValueError, match="does not fit vit_tiny_patch16_224"):
        one.load(tmp_path / "wrong")
    with pytest.raises(ValueError, match="stride 4, got 6x8"):
        one(torch.zeros(1, 3, 6, 8))
    assert math.isfinite(float(before.sum()))
