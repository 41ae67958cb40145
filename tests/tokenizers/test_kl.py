"""The variational autoencoder from scratch: its term, its noise, its scale, its training."""

from pathlib import Path
from typing import Any

import pytest
import torch

from unimodal.export import ExportInfo, load_export, save_export
from unimodal.training.tokenizer import TokenizerTraining
from unimodal_tokenizers import KLTokenizer
from unimodal_tokenizers.kl import kl_to_normal


def made(seed: int = 0, **settings: Any) -> KLTokenizer:
    torch.manual_seed(seed)
    return KLTokenizer(**{"dim": 3, "channels": [8, 16], "blocks": 1, **settings})


def images(count: int = 4, height: int = 8, width: int = 8, seed: int = 1) -> torch.Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_the_term_is_the_divergence_in_nats_a_token() -> None:
    """Added up over channels, a mean over the rest, by torch's own formula in float64."""
    rng = torch.Generator().manual_seed(0)
    m, log_s2 = (torch.randn(2, 3, 4, 5, generator=rng, dtype=torch.float64) for _ in range(2))
    posterior = torch.distributions.Normal(m, (log_s2 / 2).exp())
    expected = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum(1).mean()
    torch.testing.assert_close(kl_to_normal(m, log_s2), expected)
    assert kl_to_normal(torch.zeros(1, 2, 1, 1), torch.zeros(1, 2, 1, 1)) == 0


def test_the_layout_and_what_is_learned() -> None:
    tokenizer = made(attention=True).train()
    layout = tokenizer.layout
    assert (layout.kind, layout.dim, layout.stride, layout.codebooks) == ("continuous", 3, 2, ())
    assert dict(tokenizer.weights) == {"kl": 1e-6}
    result = tokenizer(images(height=6))
    assert result.images.shape == (4, 3, 6, 8)
    assert result.counts is None
    (result.images.square().mean() + result.terms["kl"]).backward()
    assert not [name for name, p in tokenizer.named_parameters() if p.grad is None]
    assert tokenizer.last_layer is tokenizer.network.decoder.conv_out.weight


def test_evaluation_takes_the_mean_and_training_samples() -> None:
    tokenizer = made().eval()
    with torch.no_grad():
        posterior = tokenizer.network.encode(images()).latent_dist
        mean, noisy = (tokenizer.network.decode(z).sample for z in (posterior.mean, posterior.mean + posterior.std))
        assert torch.equal(tokenizer(images()).images, mean)
        assert int(tokenizer.steps) == 0
        first, second = (tokenizer.train()(images()).images for _ in range(2))
    assert not torch.allclose(first, mean)
    assert not torch.allclose(first, second)  # other noise every step
    assert (first - mean).abs().mean() < 3 * (noisy - mean).abs().mean()
    again, another = (_seeded(seed)(images()).images for seed in (0, 1))
    assert torch.equal(again, first)  # of the same step and seed the same
    assert not torch.equal(another, first)


def _seeded(seed: int) -> KLTokenizer:
    torch.manual_seed(0)
    return KLTokenizer(dim=3, channels=[8, 16], blocks=1, seed=seed).train()


def test_stopped_and_resumed_sees_the_same_noise() -> None:
    whole, other = made().train(), made(seed=3).train()
    for _ in range(3):
        whole(images())
    other.load_state_dict(whole.state_dict())
    torch.rand(7)  # the global generator has no say
    assert torch.equal(whole(images()).images, other(images()).images)


def test_scale_and_shift_are_measured_where_none_are_given() -> None:
    """After the first batch exactly its own, then an average that follows the data."""
    tokenizer = made().train()
    seen = []
    tokenizer.network.decode = lambda z, decode=tokenizer.network.decode: seen.append(z.detach()) or decode(z)
    tokenizer(images(16))
    torch.testing.assert_close(tokenizer.shift.flatten(), seen[0].mean((0, 2, 3)))
    deviation = seen[0].var((0, 2, 3), correction=0).sqrt()
    torch.testing.assert_close(tokenizer.scale.flatten(), 1 / deviation, rtol=1e-4, atol=0)
    for seed in range(15):
        tokenizer(images(8, seed=seed))
    values = tokenizer.eval().encode(images(32), torch.Generator().manual_seed(0)).values
    torch.testing.assert_close(values.mean(0), torch.zeros(3), atol=0.15, rtol=0)
    torch.testing.assert_close(values.std(0), torch.ones(3), atol=0.15, rtol=0)
    fixed = made(scale=[0.5, 1.0, 2.0], shift=0.25).train()
    fixed(images())
    assert fixed.scale.flatten().tolist() == [0.5, 1.0, 2.0]
    assert fixed.shift.flatten().tolist() == [0.25]


@torch.no_grad()
def test_tokens_are_normalised_latents_and_come_back() -> None:
    tokenizer = made(scale=0.5, shift=0.25).eval()
    z = tokenizer.network.encode(images(width=6)).latent_dist.mean  # (B, D, h, w)
    tokens = tokenizer.encode(images(width=6))
    torch.testing.assert_close(tokens.values, ((z - 0.25) * 0.5).permute(0, 2, 3, 1).reshape(-1, 3))
    torch.testing.assert_close(tokenizer.decode(tokens), tokenizer.network.decode(z).sample, atol=1e-5, rtol=1e-5)


def test_a_tokenizer_that_was_trained_is_exported(tmp_path: Path) -> None:
    tokenizer = made().train()
    tokenizer(images())
    config = {
        "class_path": "unimodal_tokenizers.KLTokenizer",
        "init_args": {"dim": 3, "channels": [8, 16], "blocks": 1},
    }
    save_export(tmp_path / "export", tokenizer, config, ExportInfo("tokenizer", "raw", "test", "unknown"))
    loaded = load_export(tmp_path / "export", "tokenizer")
    assert torch.equal(loaded.encode(images()).values, tokenizer.eval().encode(images()).values)


def test_training_weighs_the_term() -> None:
    module = TokenizerTraining(made(), lr=1.0, l1_weight=1.0, l2_weight=0.0, weights={"kl": 0.5})
    x = images()
    result = module.tokenizer.eval()(x)
    _, loss = module._sums(module._terms(x, result))
    torch.testing.assert_close(loss, (result.images - x).abs().mean() + 0.5 * result.terms["kl"])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"scale": 1.0}, "scale, shift: expected both or neither, got 1.0 and None"),
        ({"scale": [1.0, 2.0], "shift": 0.0}, "scale: expected 1 number or 3"),
        ({"scale": 0.0, "shift": 0.0}, "scale: expected numbers above 0, got 0.0"),
        ({"channels": [8, 12]}, r"channels: expected multiples of groups = 8, at least one, got \[8, 12\]"),
        ({"dim": 0}, "dim: expected at least 1, got 0"),
        ({"channels": []}, "channels: expected multiples of groups = 8, at least one"),
        ({"options": {"depth": 1}}, "options: expected settings of AutoencoderKL, got depth"),
        ({"options": {"latent_channels": 1}}, "options: expected settings that have no argument of their own"),
        ({"options": {"act_fn": "sing"}}, "options: expected what AutoencoderKL takes, got"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        made(**settings)


def test_an_image_that_the_stride_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="image size: expected multiples of the stride 2, got 7x8"):
        made()(images(height=7))
