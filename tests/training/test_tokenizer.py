"""Training of tokenizers with codebooks: it learns, logs, draws, resumes exactly and refuses what cannot be."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from unimodal.training.tokenizer import CodebookCounts, TokenizerTraining, write_reconstructions
from unimodal_tokenizers import GridTokenizer, MultiscaleVQ, PatchTokenizer
from unimodal_tokenizers.frozen import FrozenEncoder
from unimodal_tokenizers.quantizers import MovingAverageQuantizer, ResidualQuantizer, TextCodebook, VectorQuantizer
from unimodal_tokenizers.semantic import SemanticHead

CODES: dict[str, Any] = {"dim": 4, "revive_after": 2}
SMALL: dict[str, Any] = {"channels": [8, 16], "blocks": 1}
TOKENIZERS: dict[str, Callable[[], Any]] = {
    "vq": lambda: GridTokenizer(VectorQuantizer(64, **CODES), **SMALL),
    "multiscale": lambda: MultiscaleVQ(codebook=128, scales=[1, 2, 4], **CODES, **SMALL),
    "residual": lambda: GridTokenizer(ResidualQuantizer(64, codebooks=2, **CODES), **SMALL),
}


def bars(count: int) -> list[Tensor]:
    """Images of one bright row or column each."""
    images = torch.full((count, 3, 8, 8), -1.0)
    for i in range(count):
        if i % 2:
            images[i, :, (i // 2) % 8] = 1
        else:
            images[i, :, :, (i // 2) % 8] = 1
    return list(images)


def training(name: str = "vq", **changed: Any) -> TokenizerTraining:
    torch.manual_seed(0)
    tokenizer = TOKENIZERS[name]()
    settings = {"lr": 1e-2, "l1_weight": 0.5, "l2_weight": 1.0, **changed}
    return TokenizerTraining(tokenizer, **settings)


def trainer(folder: Path, steps: int, **changed: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "barebones": False}
    return L.Trainer(
        accelerator="cpu", default_root_dir=folder, max_steps=steps, num_sanity_val_steps=0,
        **{"enable_checkpointing": False, **quiet, **changed},
    )  # fmt: skip


def fit(folder: Path, model: TokenizerTraining, steps: int, ckpt_path: Path | None = None, **changed: Any) -> L.Trainer:
    runner = trainer(folder, steps, **changed)
    data = DataLoader(bars(16), batch_size=2)  # 32 tokens for 64 entries: revival at every step
    runner.fit(model, data, DataLoader(bars(4), batch_size=4), ckpt_path=ckpt_path)
    return runner


@pytest.mark.parametrize("name", TOKENIZERS)
def test_it_learns_logs_every_term_and_draws(tmp_path: Path, name: str) -> None:
    model = training(name, warmup_steps=2)
    runner = trainer(tmp_path, 40)
    data = DataLoader(bars(16), batch_size=16)
    runner.validate(model, data, verbose=False)
    before = float(runner.callback_metrics["val/psnr"])
    runner.fit(model, data, data)
    logged = {name: float(value) for name, value in runner.callback_metrics.items()}
    for stage in ("train", "val"):
        for term in ("l1", "l2", "codebook", "commitment", "loss", "codebook_usage", "codebook_perplexity"):
            assert math.isfinite(logged[f"{stage}/{term}"])
        assert logged[f"{stage}/loss"] == pytest.approx(
            0.5 * logged[f"{stage}/l1"] + logged[f"{stage}/l2"]
            + logged[f"{stage}/codebook"] + 0.25 * logged[f"{stage}/commitment"],
            rel=1e-4,
        )  # fmt: skip
    assert logged["val/psnr"] > before + 3
    images = torch.stack(bars(16))
    model.eval()
    error = (model(images) - images).square().mean((1, 2, 3))
    assert logged["val/psnr"] == pytest.approx(float((10 * torch.log10(4 / error)).mean()), abs=0.01)
    ids = model.tokenizer.encode(images).values
    books, entries = len(model.tokenizer.layout.codebooks), model.tokenizer.layout.codebooks[0]
    used = sum(len(column.unique()) for column in ids.view(-1, books).unbind(1))  # of all codebooks
    assert logged["val/codebook_usage"] == pytest.approx(used / (books * entries))
    assert 1 <= logged["val/codebook_perplexity"] <= entries
    with Image.open(tmp_path / "samples" / "reconstruction_step_40.png") as picture:
        assert picture.size == (16 * 68 + 4, 2 * 68 + 4)  # 64 pixels an image, 4 between


@pytest.mark.parametrize("name", TOKENIZERS)
def test_stop_and_resume_equals_never_stopped(tmp_path: Path, name: str) -> None:
    # The first epoch's eight batches in one go, and cut in the middle of training at an epoch's end.
    whole, first, second = (training(name, schedule="constant") for _ in range(3))
    fit(tmp_path / "whole", whole, 16)
    runner = fit(tmp_path / "first", first, 8)
    runner.save_checkpoint(tmp_path / "stopped.ckpt")
    torch.manual_seed(7)
    fit(tmp_path / "second", second, 16, ckpt_path=tmp_path / "stopped.ckpt")
    idle = [value for key, value in whole.state_dict().items() if key.endswith("idle")]
    assert all((value > 0).any() for value in idle)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_the_rate_follows_the_schedule_and_decay_spares_the_codebook(tmp_path: Path) -> None:
    model = training(warmup_steps=4, lr_floor=0.1, weight_decay=0.05)
    runner = fit(tmp_path, model, 8)
    decayed, kept = runner.optimizers[0].param_groups
    assert decayed["lr"] == kept["lr"] == pytest.approx(1e-3)  # the floor, after the last step
    assert decayed["weight_decay"] == 0.05
    assert kept["weight_decay"] == 0
    assert any(p is model.tokenizer.quantizer.codebook.weight for p in kept["params"])


def test_a_recipe_s_weights_replace_the_tokenizer_s_and_terms_are_logged_without_them(tmp_path: Path) -> None:
    model = training(weights={"commitment": 2.0})
    logged = {name: float(value) for name, value in fit(tmp_path, model, 1).callback_metrics.items()}
    own = 0.5 * logged["train/l1"] + logged["train/l2"] + logged["train/codebook"] + 2 * logged["train/commitment"]
    assert logged["train/loss"] == pytest.approx(own)


def test_a_codebook_that_learns_without_gradients_moves_once_an_optimizer_step(tmp_path: Path) -> None:
    tokenizer = GridTokenizer(MovingAverageQuantizer(64, **CODES), **SMALL)
    fit(tmp_path, TokenizerTraining(tokenizer, lr=1e-2, l1_weight=0.5, l2_weight=1.0), 3, accumulate_grad_batches=2)
    assert int(tokenizer.quantizer.steps) == 3
    assert float(tokenizer.quantizer.mass.sum()) > 0


def test_a_schedule_without_an_end_is_refused(tmp_path: Path) -> None:
    class Endless(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
        def __iter__(self) -> Any:
            return iter(bars(2))

    runner = trainer(tmp_path, -1, max_epochs=-1)
    with pytest.raises(ValueError, match=r"trainer\.max_steps: expected at least 1"):
        runner.fit(training(), DataLoader(Endless(), batch_size=2))


def test_counts_add_up() -> None:
    counts = CodebookCounts(3)
    counts.update(torch.tensor([1, 0, 2]))
    counts.update(torch.tensor([1, 0, 0]))
    assert counts.compute().tolist() == [2, 0, 2]
    several = CodebookCounts(2, codebooks=2)
    several.update(torch.tensor([[1, 0], [2, 3]]))
    several.update(torch.tensor([[1, 0], [0, 1]]))
    assert several.compute().tolist() == [[2, 0], [2, 4]]


def test_the_picture_shows_images_above_reconstructions(tmp_path: Path) -> None:
    white, black = torch.ones(2, 3, 32, 64), -2 * torch.ones(2, 3, 32, 64)  # out of range is clamped
    write_reconstructions(white, black, tmp_path / "new" / "grid.png")
    with Image.open(tmp_path / "new" / "grid.png") as picture:
        assert picture.size == (2 * 132 + 4, 2 * 68 + 4)
        assert picture.getpixel((10, 10)) == (255, 255, 255)
        assert picture.getpixel((10, 80)) == (0, 0, 0)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"l1_weight": -1.0}, "l1_weight: expected at least 0, got -1"),
        ({"l1_weight": 0.0, "l2_weight": 0.0}, "l1_weight, l2_weight: expected at least one above 0"),
        ({"weights": {"commitment": -1.0}}, r"weights\.commitment: expected at least 0, got -1"),
        ({"weights": {"kl": 1.0}}, r"weights: expected terms of GridTokenizer \(codebook, commitment\), got kl"),
    ],
)
def test_weights_that_cannot_be_are_refused(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        training(**changed)


def test_a_tokenizer_without_weights_is_refused() -> None:
    with pytest.raises(ValueError, match=r"tokenizer: expected one that is trained .* got PatchTokenizer"):
        TokenizerTraining(PatchTokenizer(2), lr=1.0, l1_weight=1.0, l2_weight=0.0)


def test_a_teacher_without_weights_is_said(tmp_path: Path) -> None:
    """It would be distilled as if it knew something."""
    options = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}
    semantic = SemanticHead(16, 1, 2, 4, teacher=FrozenEncoder("vit_tiny_patch16_224", options))
    tokenizer = GridTokenizer(VectorQuantizer(8, 4), [8], 1, semantic=semantic)
    with pytest.warns(UserWarning, match=r"model\.encoder_weights: none given: what the FrozenEncoder holds"):
        TokenizerTraining(tokenizer, lr=1e-3, l1_weight=1.0, l2_weight=0.0)
    with pytest.warns(UserWarning, match=r"model\.text_embeddings: none given: what the TextCodebook holds"):
        TokenizerTraining(GridTokenizer(TextCodebook(8, 4, 6), [8], 1), lr=1e-3, l1_weight=1.0, l2_weight=0.0)
