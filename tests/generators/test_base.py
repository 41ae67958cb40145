"""What all generators share: guidance, sampling settings, blocks."""

from dataclasses import replace

import pytest
import torch

from unimodal_generators import AutoregressiveSettings, FlowSettings, SamplingSettings
from unimodal_generators.base import Block, Grid, TokenKind, guide


def outputs(branches: int) -> torch.Tensor:
    return torch.randn(branches, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.5, 1.0, 2.0, 7.5])
def test_one_condition(scale: float) -> None:
    c, u = outputs(2)
    torch.testing.assert_close(guide(torch.stack([c, u]), [scale]), u + scale * (c - u))


def test_scales_one_and_zero() -> None:
    c, u = outputs(2)
    torch.testing.assert_close(guide(torch.stack([c, u]), [1.0]), c, atol=1e-14, rtol=0)
    assert torch.equal(guide(torch.stack([c, u]), [0.0]), u)
    assert torch.equal(guide(c[None], []), c)


@pytest.mark.parametrize(("s_text", "s_image"), [(4.0, 2.0), (1.0, 2.0), (4.0, 1.0), (0.0, 3.0), (3.0, 0.0)])
def test_two_conditions_are_nested(s_text: float, s_image: float) -> None:
    """g = u_text + s_text (c - u_text); out = u_image + s_image (g - u_image): BAGEL's, token by token and by hand."""
    c, u_text, u_image = outputs(3)
    out = guide(torch.stack([c, u_text, u_image]), [s_text, s_image])
    for i in range(3):
        for j in range(4):
            g = u_text[i, j] + s_text * (c[i, j] - u_text[i, j])
            assert float(out[i, j]) == pytest.approx(float(u_image[i, j] + s_image * (g - u_image[i, j])))


def test_the_two_scales_are_not_interchangeable() -> None:
    c, u_text, u_image = torch.tensor(10.0), torch.tensor(4.0), torch.tensor(1.0)
    stacked = torch.stack([c, u_text, u_image])
    assert float(guide(stacked, [2.0, 3.0])) == 1 + 3 * ((4 + 2 * 6) - 1) == 46
    assert float(guide(stacked, [3.0, 2.0])) == 1 + 2 * ((4 + 3 * 6) - 1) == 43


def test_a_scale_a_condition() -> None:
    for scales in ([], [1.0, 1.0]):
        with pytest.raises(ValueError, match="argument"):
            guide(outputs(2), scales)


def test_override_changes_what_is_given() -> None:
    settings = FlowSettings(guidance=2.0, steps=5)
    assert settings.override(steps=9, solver="heun") == FlowSettings(guidance=2.0, steps=9, solver="heun")
    assert settings.override(steps=None, guidance=None) == settings
    assert settings.override() == settings
    assert settings.override(guidance=0.0).guidance == 0.0  # 0 is a value, not an absence
    assert settings == FlowSettings(guidance=2.0, steps=5)


def test_override_refuses_another_generator_s_settings() -> None:
    with pytest.raises(ValueError, match=r"steps: .* it has guidance, temperature, top_k, top_p"):
        AutoregressiveSettings().override(steps=3)
    with pytest.raises(ValueError, match=r"temperature: .* it has guidance, steps, solver, shift"):
        FlowSettings().override(guidance=1.0, temperature=0.5)
    with pytest.raises(ValueError, match="sampler"):
        SamplingSettings().override(sampler="ddim")
    assert AutoregressiveSettings().override(steps=None) == AutoregressiveSettings()


def test_pieces_of_a_block() -> None:
    whole = Block(Grid(2, 3), TokenKind.LEARNED, bidirectional=False, private=True, time=0.25, seed=9, n_targets=6)
    assert whole.length == 6
    assert whole.complete
    pieces = [whole.piece(i, 2) for i in (0, 2, 4)]
    assert [p.length for p in pieces] == [2, 2, 2]
    assert [p.offset for p in pieces] == [0, 2, 4]
    assert [p.complete for p in pieces] == [False, False, True]
    assert [replace(p, offset=0, count=None) for p in pieces] == [whole] * 3
    assert whole.piece(0, 6).complete
    assert not whole.piece(0, 5).complete
    assert pieces[0].piece(4, 2) == pieces[2]  # offsets count from the image's first token


def test_a_prefix_belongs_to_the_block_and_not_to_the_image() -> None:
    block = Block(Grid(2, 3), TokenKind.LEARNED, bidirectional=True, private=True, n_targets=6, prefix=1)
    assert (block.length, block.complete) == (7, True)
    assert replace(block, prefix=0).length == 6
    assert not replace(block, count=5).complete
    assert replace(block, count=5).length == 6


def test_kinds_are_as_expert_order_sorts_them() -> None:
    assert [kind.name for kind in sorted(TokenKind)] == ["TEXT", "UNDERSTANDING", "CLEAN", "LEARNED"]
