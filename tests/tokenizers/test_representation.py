"""Representations: a frozen encoder's features, normalised, and a decoder that is trained."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from unimodal.export import ExportInfo, load_export, save_export
from unimodal.training.tokenizer import TokenizerTraining
from unimodal_tokenizers import Grid, GridTokenizer, PatchTokenizer, Representation
from unimodal_tokenizers.quantizers import VectorQuantizer

NAME = "vit_tiny_patch16_224"
OPTIONS = {"img_size": 8, "patch_size": 2, "embed_dim": 16, "depth": 2, "num_heads": 2}


def made(seed: int = 0, options: dict[str, Any] | None = None, **settings: Any) -> Representation:
    torch.manual_seed(seed)
    settings = {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2, **settings}
    return Representation(NAME, {**OPTIONS, **(options or {})}, **settings)


def images(count: int = 4, height: int = 8, width: int = 8) -> torch.Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_tokens_are_the_encoder_s_patch_features() -> None:
    """Pixels as timm wants them, no class token, row by row."""
    tokenizer = made().eval()
    tokens = tokenizer.encode(images())
    assert tokens.grids == (Grid(4, 4),) * 4
    assert (tokenizer.layout.kind, tokenizer.layout.dim, tokenizer.layout.stride) == ("continuous", 16, 2)
    with torch.no_grad():
        features = tokenizer.encoder.network.forward_features(images() / 2 / 0.5)[
            :, 1:
        ]  # mean and deviation 0.5 of [0, 1]
    torch.testing.assert_close(tokens.values, features.flatten(0, 1) / (1 + 1e-5) ** 0.5)  # statistics begin as 0, 1


@pytest.mark.parametrize("dim", [None, 3])
def test_stored_statistics_normalise_every_channel(dim: int | None) -> None:
    tokenizer = made(dim=dim).train()
    assert not tokenizer.encoder.network.training
    for _ in range(400):  # 0.98 ** 400 of the first guess is left
        tokenizer(images(16))
    tokenizer.eval()
    values = tokenizer.encode(images(16)).values.detach()
    torch.testing.assert_close(values.mean(0), torch.zeros(dim or 16), atol=0.02, rtol=0)
    torch.testing.assert_close(values.std(0), torch.ones(dim or 16), atol=0.02, rtol=0)
    again = {name: value.clone() for name, value in tokenizer.state_dict().items()}
    tokenizer.encode(images())
    assert all(torch.equal(value, again[name]) for name, value in tokenizer.state_dict().items())


def test_images_of_any_size_together_or_alone() -> None:
    tokenizer = made().eval()
    mixed = [images(1)[0], images(1, 4, 8)[0], images(2)[1]]
    with torch.no_grad():
        tokens = tokenizer.encode_each(mixed)
        assert tokens.grids == (Grid(4, 4), Grid(2, 4), Grid(4, 4))
        for one, image in zip(tokens.split(), mixed, strict=True):
            torch.testing.assert_close(tokenizer.encode(image[None]).values, one.values, atol=1e-5, rtol=1e-5)
        for pixels, one in zip(tokenizer.decode_each(tokens), tokens.split(), strict=True):
            torch.testing.assert_close(tokenizer.decode(one)[0], pixels, atol=1e-5, rtol=1e-5)


def test_pixels_lie_where_their_tokens_do() -> None:
    """A decoder without layers draws each patch from its own token."""
    tokenizer = made(decoder_depth=0).eval()
    tokens = tokenizer.encode(images(1))
    before = tokenizer.decode(tokens)[0]
    tokens.values[6] += 1.0  # row 1, column 2
    changed = (tokenizer.decode(tokens)[0] - before).abs().amax(0) > 1e-6
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[2:4, 4:6] = True
    assert torch.equal(changed, expected)


def test_only_the_decoder_learns(tmp_path: Path) -> None:
    """Under the LightningModule of all tokenizers: better pictures, the same encoder, an export that gives both back."""
    teacher = timm.create_model(NAME, num_classes=10, **OPTIONS)
    save_file(teacher.state_dict(), tmp_path / "encoder.safetensors")
    model = TokenizerTraining(
        made(dim=8), lr=1e-2, l1_weight=0.0, l2_weight=1.0, encoder_weights=tmp_path / "encoder.safetensors"
    )
    runner = L.Trainer(
        accelerator="cpu", default_root_dir=tmp_path, max_steps=60, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    data = DataLoader(list(images(16)), batch_size=16)
    runner.validate(model, data, verbose=False)
    before = float(runner.callback_metrics["val/psnr"])
    runner.fit(model, data, data)
    assert float(runner.callback_metrics["val/psnr"]) > before + 1
    assert float(runner.callback_metrics["train/loss"]) == float(runner.callback_metrics["train/l2"])
    assert "val/codebook_usage" not in runner.callback_metrics
    own = model.tokenizer.encoder.network.state_dict()
    assert all(torch.equal(own[name], value) for name, value in teacher.state_dict().items() if name in own)
    config = {
        "class_path": "unimodal_tokenizers.Representation",
        "init_args": {"encoder": NAME, "options": OPTIONS, "dim": 8, "decoder_width": 16, "decoder_depth": 1,
                      "decoder_heads": 2},
    }  # fmt: skip
    save_export(tmp_path / "export", model.tokenizer, config, ExportInfo("tokenizer", "raw", "test", "unknown"))
    loaded = load_export(tmp_path / "export", "tokenizer")
    model.tokenizer.eval()
    assert torch.equal(loaded(images()).images, model.tokenizer(images()).images)  # type: ignore[operator]


def test_encoder_weights_that_cannot_be_are_refused(tmp_path: Path) -> None:
    tokenizer = made()
    with pytest.raises(ValueError, match=r"encoder_weights: .*none\.safetensors is missing"):
        tokenizer.encoder.load(tmp_path / "none.safetensors")
    state = {name: w.clone() for name, w in tokenizer.encoder.network.state_dict().items()}
    for wrong, message in (
        ({**state, "extra": torch.zeros(1)}, "does not fit vit_tiny_patch16_224: extra"),
        ({name: w for name, w in state.items() if name != "pos_embed"}, "pos_embed"),
        ({**state, "pos_embed": torch.zeros(1, 3, 16)}, "pos_embed"),
    ):
        save_file(wrong, tmp_path / "wrong.safetensors")
        with pytest.raises(ValueError, match=message):
            tokenizer.encoder.load(tmp_path / "wrong.safetensors")
    vq = GridTokenizer(VectorQuantizer(64, 4), channels=[8, 16], blocks=1)
    with pytest.raises(ValueError, match="encoder_weights: expected none for this GridTokenizer"):
        TokenizerTraining(vq, lr=1.0, l1_weight=1.0, l2_weight=0.0, encoder_weights=tmp_path / "wrong.safetensors")
    with pytest.raises(ValueError, match="got PatchTokenizer"):
        TokenizerTraining(PatchTokenizer(2), lr=1.0, l1_weight=1.0, l2_weight=0.0)


@pytest.mark.parametrize(("settings", "message"), [
    ({"encoder": "vit_unknown"}, "encoder: expected a vision transformer's name in timm, without a tag, got vit_unknown"),
    ({"encoder": f"{NAME}.augreg_in21k"}, "without a tag"),
    ({"encoder": "resnet18"}, "encoder: expected .* got resnet18"),
    ({"dim": 0}, "dim: expected at least 1, or none for all of the encoder's channels, got 0"),
    ({"decoder_width": 18}, "decoder_width: expected a multiple of 4"),
])  # fmt: skip
def test_encoders_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Representation(**{"encoder": NAME, "options": OPTIONS, **settings})


def test_the_decoder_learns_from_noised_tokens() -> None:
    """Half normal deviations an image, anew each batch, none outside training; resumed, the same."""
    tokenizer = made(noise=0.5).train()
    zeros = torch.zeros(400, 4, 16)
    state = {name: value.clone() for name, value in tokenizer.state_dict().items()}
    first, second = tokenizer._noised(zeros), tokenizer._noised(zeros)
    assert not torch.equal(first, second)
    assert float(first.square().mean()) == pytest.approx(0.25, rel=0.2)
    assert float(first.std((1, 2)).std()) > 0.1  # not one for all
    tokenizer.load_state_dict({**state, "steps": torch.tensor(1)})
    assert torch.equal(tokenizer._noised(zeros), second)
    assert not torch.equal(tokenizer(images()).images, tokenizer.decode(tokenizer.encode(images())))
    tokenizer.eval()
    assert torch.equal(tokenizer(images()).images, tokenizer.decode(tokenizer.encode(images())))
    with pytest.raises(ValueError, match="noise: expected at least 0, got -1"):
        made(noise=-1.0)


def test_a_projection_to_few_channels_learns_with_the_decoder() -> None:
    tokenizer = made(dim=2).train()
    assert tokenizer.encode(images()).values.shape == (64, 2)
    (tokenizer(images()).images - images()).square().mean().backward()
    learned = {name: p for name, p in tokenizer.named_parameters() if p.requires_grad}
    assert "project.weight" in learned
    assert not [name for name, p in learned.items() if p.grad is None or not p.grad.any()]


def test_sizes_that_do_not_fit_are_refused() -> None:
    tokenizer = made().eval()
    with pytest.raises(ValueError, match="stride 2, got 5x4"):
        tokenizer.encode(images(1, 5, 4))
    with pytest.raises(ValueError, match=r"tokens: expected .*\(16, 16\).* got \(16, 3\)"):
        tokenizer.decode_batch(torch.zeros(1, 16, 3), Grid(4, 4))
    with pytest.raises(ValueError, match=r"tokens: expected vectors \(T, 16\), got shape \(4, 3\)"):
        tokenizer.lookup(torch.zeros(4, 3))


def test_whoever_trains_on_pixels_does_not_import_timm() -> None:
    code = "import sys, unimodal_tokenizers; sys.exit('timm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
