"""Three stages: compact tokens, what they unfold into, pixels."""

from typing import Any

import pytest
import torch

from unimodal_tokenizers import FrozenEncoder, Grid, SemanticHead, StagedTokenizer

SHAPE: dict[str, Any] = {"dim": 3, "patch": 2, "width": 16, "depths": (1, 1, 1), "heads": 2}


def made(**options: Any) -> StagedTokenizer:
    torch.manual_seed(0)
    return StagedTokenizer(**{**SHAPE, **options})


def images(count: int = 4, height: int = 8, width: int = 8) -> torch.Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_images_of_any_size_together_or_alone() -> None:
    t = made().eval()
    mixed = [images(1)[0], images(1, 4, 8)[0], images(2)[1]]
    with torch.no_grad():
        tokens = t.encode_each(mixed)
        assert tokens.grids == (Grid(4, 4), Grid(2, 4), Grid(4, 4))
        assert tokens.values.shape == (40, 3)
        assert t.features(tokens).shape == (40, 16)
        for image, one in zip(mixed, tokens.split(), strict=True):
            torch.testing.assert_close(t.encode(image[None]).values, one.values)
            torch.testing.assert_close(t(image[None]).images, t.decode(one))


def test_tokens_have_mean_0_and_deviation_1() -> None:
    t = made().train()
    for _ in range(300):  # 0.98 ** 300 of the first guess is left
        t.encode(images(16))
    values = t.eval().encode(images(16)).values.detach()
    torch.testing.assert_close(values.mean(0), torch.zeros(3), atol=0.02, rtol=0)
    torch.testing.assert_close(values.std(0), torch.ones(3), atol=0.02, rtol=0)


@pytest.mark.parametrize("causal", [False, True])
def test_a_causal_expansion_follows_a_generator(causal: bool) -> None:
    """Of 16 tokens, what token 6 unfolds into: by 0 to 6 alone, or by all."""
    t = made(causal=causal).eval()
    tokens = t.encode(images(1))
    values = tokens.values.detach().requires_grad_()
    t.features(type(tokens)(values, tokens.grids))[6, 0].backward()
    assert values.grad is not None
    seen = (values.grad.abs().sum(1) > 1e-9).tolist()
    assert seen == ([True] * 7 + [False] * 9 if causal else [True] * 16)


def test_it_learns_to_draw_and_to_mean() -> None:
    teacher = FrozenEncoder(
        "vit_tiny_patch16_224", {"img_size": 8, "patch_size": 2, "embed_dim": 12, "depth": 1, "num_heads": 2}
    )
    semantic = SemanticHead(width=16, depth=1, heads=2, dim=16, teacher=teacher)
    t = made(semantic=semantic).train()
    optimizer = torch.optim.AdamW([p for p in t.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(40):
        result = t(images())
        losses.append([float((result.images - images()).square().mean()), float(result.terms["semantic"])])
        optimizer.zero_grad()
        ((result.images - images()).square().mean() + result.terms["semantic"]).backward()
        optimizer.step()
    assert losses[-1][0] < 0.7 * losses[0][0]
    assert losses[-1][1] < 0.7 * losses[0][1]
    assert not [
        n
        for n, p in t.named_parameters()
        if p.requires_grad and (p.grad is None or not p.grad.any()) and n != "semantic.asked"
    ]
    assert t.last_layer is t.pixels_out.weight


def test_bad_settings_images_and_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="patch, dim: expected at least 1, got 0 and 3"):
        made(patch=0)
    t = made().eval()
    with pytest.raises(ValueError, match="stride 2, got 5x4"):
        t.encode(images(1, 5, 4))
    with pytest.raises(ValueError, match=r"tokens: expected .*\(16, 3\).* got \(16, 2\)"):
        t.decode_batch(torch.zeros(1, 16, 2), Grid(4, 4))
    with pytest.raises(ValueError, match=r"tokens: expected vectors \(T, 3\), got shape \(4, 2\)"):
        t.lookup(torch.zeros(4, 2))
