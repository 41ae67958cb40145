"""A representation whose decoder draws pixels by flow matching: against its equations written out."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from unimodal.export import ExportInfo, load_export, save_export
from unimodal.training.tokenizer import TokenizerTraining
from unimodal_tokenizers import DiffusionRepresentation, Grid, Representation
from unimodal_tokenizers.base import ImageTokens
from unimodal_tokenizers.quantizers.base import step_generator

NAME = "vit_tiny_patch16_224"
OPTIONS = {"img_size": 8, "patch_size": 2, "embed_dim": 16, "depth": 2, "num_heads": 2}
SETTINGS: dict[str, Any] = {"decoder_width": 16, "decoder_depth": 2, "decoder_heads": 2}


def made(**settings: Any) -> DiffusionRepresentation:
    torch.manual_seed(0)
    return DiffusionRepresentation(NAME, OPTIONS, **{**SETTINGS, **settings})


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def images(count: int = 4, height: int = 8, width: int = 8) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.1])  # of the last some times are next to the data
def test_the_loss_is_the_error_of_the_velocity_at_drawn_times(shift: float) -> None:
    tokenizer, x = made(shift=shift).train(), images()
    tokenizer.steps.fill_(7)
    tokens, rng = tokenizer.encode_batch(x), step_generator(1, 7)
    u = torch.randn(4, generator=rng).sigmoid()
    t = u / (u + shift * (1 - u))
    noise = torch.randn(x.shape, generator=rng)
    noised = torch.stack([(1 - t[i]) * noise[i] + t[i] * x[i] for i in range(4)])
    data = torch.cat([tokenizer.data(noised[i : i + 1], t[i : i + 1], tokens[i : i + 1], Grid(4, 4)) for i in range(4)])
    left = (1 - t)[:, None, None, None]
    v, expected = (data - noised) / left, x - noise
    near = left < 0.05
    v, expected = torch.where(near, v * left / 0.05, v), torch.where(near, expected * left / 0.05, expected)
    result = tokenizer(x)
    torch.testing.assert_close(result.terms["velocity"], (v - expected).square().mean())
    torch.testing.assert_close(result.images, data)
    assert int(tokenizer.steps) == 8
    assert not torch.equal(tokenizer(x).terms["velocity"], result.terms["velocity"])  # other draws
    tokenizer.steps.fill_(7)
    assert torch.equal(tokenizer(x).images, result.images)  # as if never stopped


def test_outside_training_it_draws_and_nothing_moves() -> None:
    tokenizer, x = made(noise=0.5).eval(), images()
    first = tokenizer(x)
    assert torch.equal(first.images, tokenizer.decode(tokenizer.encode(x)))
    assert torch.equal(first.terms["velocity"], tokenizer(x).terms["velocity"])
    assert int(tokenizer.steps) == 0


@pytest.mark.parametrize(("solver", "steps", "shift"), [("euler", 6, 2.0), ("euler", 6, 0.1), ("heun", 7, 2.0)])
def test_an_image_is_the_solver_s_in_exactly_so_many_evaluations(
    solver: Any, steps: int, shift: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, x = made(solver=solver, steps=steps, shift=shift).eval(), images()
    tokens, calls, plain = tokenizer.encode_batch(x), [], tokenizer.data

    def counted(*args: Any) -> Tensor:
        calls.append(args[1][0].item())
        return plain(*args)

    monkeypatch.setattr(tokenizer, "data", counted)
    drawn = tokenizer.decode_batch(tokens, Grid(4, 4))
    assert len(calls) == steps
    assert calls[0] == 0
    if solver == "euler":
        y = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)).expand(4, -1, -1, -1)
        times = [(i / 6) / (i / 6 + shift * (1 - i / 6)) for i in range(7)]
        for t, s in pairwise(times):
            v = (plain(y, torch.full((4,), t), tokens, Grid(4, 4)) - y) / max(1 - t, 0.05)
            y = y + (s - t) * v
        torch.testing.assert_close(drawn, y)


def test_an_image_does_not_depend_on_those_beside_it_and_a_generator_draws_another() -> None:
    tokenizer, x = made(steps=4).eval(), images()
    tokens = tokenizer.encode(x)
    together = tokenizer.decode(tokens)
    for one, image in zip(tokens.split(), together, strict=True):
        torch.testing.assert_close(tokenizer.decode(one)[0], image, atol=1e-5, rtol=0)
    drawn = [tokenizer.decode(tokens, generators(*seeds)) for seeds in ((1, 2, 3, 4), (1, 2, 3, 4), (5, 2, 3, 4))]
    assert torch.equal(drawn[0], drawn[1])
    changed = (drawn[0] - drawn[2]).abs().amax((1, 2, 3)) > 1e-3
    assert changed.tolist() == [True, False, False, False]  # each its own noise
    for one, seed, image in zip(tokens.split(), (1, 2, 3, 4), drawn[0], strict=True):
        torch.testing.assert_close(tokenizer.decode(one, generators(seed))[0], image, atol=1e-5, rtol=0)
    several = tokenizer.decode_each(ImageTokens.cat([tokens, tokenizer.encode(images(2, 4, 8))]), generators(*range(6)))
    torch.testing.assert_close(several[5], tokenizer.decode(tokenizer.encode(images(2, 4, 8)), generators(4, 5))[1])
    with pytest.raises(ValueError, match="rngs: expected one for each of 4 images, got 1"):
        tokenizer.decode(tokens, generators(1))
    wide = tokenizer.encode(images(1, 4, 8))
    assert tokenizer.decode(wide).shape == (1, 3, 4, 8)


@pytest.mark.slow
def test_it_learns_to_draw_what_the_tokens_say_by_its_own_term_alone(tmp_path: Path) -> None:
    model = TokenizerTraining(made(dim=8, steps=8), lr=1e-2, l1_weight=0.0, l2_weight=0.0)
    runner = L.Trainer(
        accelerator="cpu", default_root_dir=tmp_path, max_steps=250, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    greys = images(16, 4, 4).mean((1, 2, 3), keepdim=True) + torch.linspace(-1, 1, 16)[:, None, None, None]
    data = DataLoader(list(greys.clamp(-1, 1).expand(16, 3, 8, 8)), batch_size=16)
    runner.fit(model, data, data)
    assert float(runner.callback_metrics["val/psnr"]) > 15
    other = model.tokenizer.eval()
    config = {
        "class_path": "unimodal_tokenizers.DiffusionRepresentation",
        "init_args": {"encoder": NAME, "options": OPTIONS, "dim": 8, "steps": 8, **SETTINGS},
    }
    save_export(tmp_path / "export", other, config, ExportInfo("tokenizer", "raw", "test", "unknown"))
    loaded = load_export(tmp_path / "export", "tokenizer")
    assert torch.equal(loaded.decode(loaded.encode(images())), other.decode(other.encode(images())))  # type: ignore[operator]


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="steps: the heun solver makes an odd number of network evaluations, got 4"):
        made(solver="heun", steps=4)
    with pytest.raises(ValueError, match=r"tokens: expected .*\(16, 16\).* got \(16, 3\)"):
        made().decode_batch(torch.zeros(1, 16, 3), Grid(4, 4))
    with pytest.raises(ValueError, match="l1_weight, l2_weight: expected at least one above 0"):
        TokenizerTraining(Representation(NAME, OPTIONS, **SETTINGS), lr=1.0, l1_weight=0.0, l2_weight=0.0)
