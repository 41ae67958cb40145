"""What all generators share: guidance, sampling settings, blocks."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
import torch

from unimodal.model import UnifiedModel
from unimodal_generators import (
    ChoiceSettings,
    DiffusionSettings,
    Flow,
    FlowSettings,
    SamplingSettings,
    TokenDiffusionSettings,
)
from unimodal_generators.base import Block, Branch, DenoisingSettings, Grid, TokenKind, guide
from unimodal_tokenizers import diffusion


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
    assert DiffusionSettings(clip=1.0).override(clip=None).clip is None  # None is a value where a setting may have it
    with pytest.raises(ValueError, match="steps: expected a whole number, got None"):
        settings.override(steps=None)
    assert settings.override() == settings
    assert settings.override(guidance=0.0).guidance == 0.0  # 0 is a value, not an absence
    assert settings == FlowSettings(guidance=2.0, steps=5)


@pytest.mark.parametrize(
    ("kind", "name", "value", "expected"),
    [
        (FlowSettings, "steps", 2.5, "a whole number"),
        (FlowSettings, "steps", "4", "a whole number"),
        (FlowSettings, "steps", True, "a whole number"),
        (FlowSettings, "shift", math.inf, "a finite number or RootShift or LogShift"),
        (FlowSettings, "guidance", True, "a finite number"),
        (FlowSettings, "guidance", 10**400, "a finite number"),
        (FlowSettings, "renorm", "foo", "none or channel or global"),
        (FlowSettings, "interval", (0.5,), r"2 values \(a finite number, a finite number\)"),
        (ChoiceSettings, "guidance", math.nan, "a finite number"),
        (ChoiceSettings, "image_guidance", -math.inf, "a finite number"),
        (ChoiceSettings, "combine", "foo", "nested or additive"),
        (TokenDiffusionSettings, "solver", "UniPC", "euler or heun or ddpm or none"),
        (DiffusionSettings, "clip", "1", "a finite number or none"),
    ],
)
def test_what_is_no_setting_is_refused_in_words(
    kind: type[SamplingSettings], name: str, value: Any, expected: str
) -> None:
    for made in (lambda: kind(**{name: value}), lambda: kind().override(**{name: value})):
        with pytest.raises(ValueError, match=rf"^{name}: expected {expected}, got {re.escape(repr(value))}$"):
            made()


@dataclass(frozen=True)
class Mine(FlowSettings):
    """As somebody else may write them."""

    LIMIT: ClassVar[int] = 3
    weights: tuple[float, ...] = ()
    rule: Callable[[int], int] | None = None
    anything: Any = None


def test_settings_of_one_s_own_have_any_type() -> None:
    mine = Mine(weights=[1, 2.5], rule=abs, anything={}, steps=3)  # type: ignore[arg-type]
    assert (mine.weights, mine.rule, mine.anything, mine.LIMIT) == ((1.0, 2.5), abs, {}, 3)
    with pytest.raises(ValueError, match="weights: expected a finite number, got 'x'"):
        mine.override(weights=("x",))


def test_a_generator_names_its_settings(monkeypatch: pytest.MonkeyPatch, make: Callable[..., UnifiedModel]) -> None:
    monkeypatch.delattr(Flow, "settings")
    with pytest.raises(ValueError, match="settings: expected Flow to name the class of its sampler's settings"):
        make("flow")


def test_settings_are_taken_as_command_lines_and_yaml_give_them() -> None:
    given = FlowSettings(guidance=2, interval=[0, 1], steps=np.int64(3))  # type: ignore[arg-type]
    assert given == FlowSettings(guidance=2.0, interval=(0.0, 1.0), steps=3)
    assert [type(v) for v in (given.guidance, *given.interval, given.steps)] == [float, float, float, int]


def test_override_refuses_another_generator_s_settings() -> None:
    with pytest.raises(ValueError, match=r"steps: .* it has guidance, .*temperature, top_k, top_p"):
        ChoiceSettings().override(steps=3)
    with pytest.raises(ValueError, match=r"temperature: .* it has guidance, .*steps, solver, shift"):
        FlowSettings().override(guidance=1.0, temperature=0.5)
    with pytest.raises(ValueError, match="sampler"):
        SamplingSettings().override(sampler="ddim")


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


# ---- settings of guidance


def test_branches_are_those_that_guidance_needs() -> None:
    whole, no_text, no_image, nothing = Branch(), Branch(text=False), Branch(images=False), Branch(False, False)
    assert SamplingSettings().branches == (whole,)
    assert SamplingSettings(guidance=3.0).branches == (whole, no_text)
    assert SamplingSettings(image_guidance=3.0).branches == (whole, no_image)
    assert SamplingSettings(3.0, 2.0).branches == (whole, no_text, no_image)
    assert SamplingSettings(3.0, 2.0, "additive").branches == (whole, no_text, nothing)
    assert SamplingSettings(1.0, 2.0, "additive").branches == (whole, no_text, nothing)


@pytest.mark.parametrize(("s_text", "s_image"), [(4.0, 2.0), (1.0, 2.0), (4.0, 1.0), (0.0, 3.0)])
def test_settings_guide_by_the_papers_formulas(s_text: float, s_image: float) -> None:
    settings = SamplingSettings(s_text, s_image)
    c, *rest = found = outputs(len(settings.branches))
    text = rest[0] + s_text * (c - rest[0]) if s_text != 1 else c
    wanted = rest[-1] + s_image * (text - rest[-1]) if s_image != 1 else text
    torch.testing.assert_close(settings.guide(found, 0.5), wanted)
    additive = SamplingSettings(s_text, s_image, "additive")
    found = outputs(len(additive.branches))
    if len(found) == 3:  # InstructPix2Pix, eq. 3
        c, image, none = found
        torch.testing.assert_close(additive.guide(found, 0.5), none + s_image * (image - none) + s_text * (c - image))


def test_both_scales_one_are_the_condition_itself() -> None:
    assert SamplingSettings().guide(outputs(1), 0.5) is not None
    for combine in ("nested", "additive"):
        settings = SamplingSettings(1.0, 1.0, combine)  # type: ignore[arg-type]
        assert len(settings.branches) == 1
        assert torch.equal(settings.guide(outputs(1), 0.5), outputs(1)[0])


def test_guidance_acts_within_its_interval_alone() -> None:
    settings = SamplingSettings(guidance=2.0, interval=(0.25, 0.75))
    assert [settings.active(p) for p in (0.0, 0.24, 0.25, 0.5, 0.75, 0.76, 1.0)] == [1, 1, 2, 2, 2, 1, 1]
    assert torch.equal(settings.guide(outputs(2)[:1], 0.2), outputs(2)[0])
    with pytest.raises(ValueError, match="guidance: expected outputs of 2 branches, got 3"):
        settings.guide(outputs(3), 0.5)


@pytest.mark.parametrize("combine", ["nested", "additive"])
def test_each_scale_has_an_interval_of_its_own(combine: Literal["nested", "additive"]) -> None:
    both = SamplingSettings(3.0, 2.0, combine, interval=(0.0, 0.6), image_interval=(0.4, 1.0))
    assert [both.active(p) for p in (0.2, 0.5, 0.8)] == [2, 3, 3]
    text = SamplingSettings(3.0, interval=(0.0, 0.6))
    always = SamplingSettings(3.0, 2.0, combine)
    found = outputs(3)
    torch.testing.assert_close(both.guide(found[:2], 0.2), text.guide(found[:2], 0.2))
    torch.testing.assert_close(both.guide(found, 0.5), always.guide(found, 0.5))
    c, one, other = found
    images = other + 2 * (c - other) if combine == "nested" else other + 2 * (one - other) + c - one
    torch.testing.assert_close(both.guide(found, 0.8), images)
    alone = SamplingSettings(1.0, 2.0, image_interval=(0.5, 1.0))
    assert [alone.active(p) for p in (0.2, 0.5)] == [1, 2]
    torch.testing.assert_close(alone.guide(found[:2], 0.5), one + 2 * (c - one))
    assert SamplingSettings(3.0, 2.0, interval=(0.5, 0.5)).active(0.2) == 1  # where nothing else is said, one for both


@pytest.mark.parametrize("renorm", ["channel", "global"])
def test_renormalised_guidance_is_never_longer(renorm: Literal["channel", "global"]) -> None:
    settings = DenoisingSettings(guidance=4.0, renorm=renorm)
    found, plain = outputs(2), DenoisingSettings(guidance=4.0)
    c, out, free = found[0], settings.guide_images(found, [1, 2], 0.5), plain.guide_images(found, [1, 2], 0.5)
    assert torch.equal(free, plain.guide(found, 0.5))
    pieces = [slice(0, 1), slice(1, 3)] if renorm == "global" else [slice(i, i + 1) for i in range(3)]
    for piece in pieces:  # each image (or token) has the shorter of both lengths, and its direction
        wanted = min(c[piece].norm(), free[piece].norm())
        torch.testing.assert_close(out[piece].norm(), wanted)
        torch.testing.assert_close(out[piece] / out[piece].norm(), free[piece] / free[piece].norm())
    least = DenoisingSettings(guidance=4.0, renorm=renorm, renorm_min=1.0)
    torch.testing.assert_close(least.guide_images(found, [1, 2], 0.5), free)  # nothing may be taken away


@pytest.mark.parametrize("settings", [
    DenoisingSettings(guidance=3.0, renorm="global"), DenoisingSettings(guidance=3.0, rescale=0.7),
    DenoisingSettings(guidance=3.0, renorm="channel", rescale=1.0),
])  # fmt: skip
def test_an_image_is_normalised_by_itself(settings: DenoisingSettings) -> None:
    found = outputs(2).repeat(1, 3, 1) * torch.arange(1.0, 10.0, dtype=torch.float64)[:, None]
    together = settings.guide_images(found, [2, 4, 3], 0.5)
    alone = [settings.guide_images(part, [part.shape[1]], 0.5) for part in found.split([2, 4, 3], dim=1)]
    torch.testing.assert_close(together, torch.cat(alone), atol=0, rtol=0)


def test_rescaling_brings_the_deviation_back() -> None:
    found = outputs(2)
    out = DenoisingSettings(guidance=5.0, rescale=1.0).guide_images(found, [3], 0.5)
    torch.testing.assert_close(out.std(), found[0].std())
    half = DenoisingSettings(guidance=5.0, rescale=0.5).guide_images(found, [3], 0.5)
    torch.testing.assert_close(half, (out + DenoisingSettings(guidance=5.0).guide(found, 0.5)) / 2)


def test_an_image_of_one_value_has_no_deviation_to_bring_back() -> None:
    found = torch.tensor([[[1.0], [2.0]], [[3.0], [5.0]]])  # two branches, two images of one token of one channel
    settings = DenoisingSettings(guidance=3.0, rescale=0.5)
    torch.testing.assert_close(settings.guide_images(found, [1, 1], 0.5), settings.guide(found, 0.5))


@pytest.mark.parametrize(("settings", "named"), [
    ({"interval": (0.5, 0.2)}, "interval: .* got 0.5, 0.2"), ({"interval": (-0.1, 1.0)}, "interval"),
    ({"rescale": 1.5}, "rescale: .* got 1.5"), ({"renorm_min": -1.0}, "renorm_min: .* got -1.0"),
])  # fmt: skip
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        DenoisingSettings(**settings)


def every_settings() -> list[type[SamplingSettings]]:
    """Of all generators."""
    found, left = [], [SamplingSettings]
    while left:
        found.append(left.pop())
        left += found[-1].__subclasses__()
    return found


@pytest.mark.parametrize("kind", every_settings())
def test_every_setting_may_be_given_what_it_is(kind: type[SamplingSettings]) -> None:
    """Whatever type it has: unions and classes too."""
    made = kind()
    for name in (field.name for field in fields(kind)):
        value = getattr(made, name)
        assert getattr(made.override(**{name: value}), name) == value


def test_unions_take_each_of_their_members() -> None:
    assert FlowSettings().override(shift=3).shift == 3.0
    assert FlowSettings().override(shift=diffusion.LogShift()).shift == diffusion.LogShift()
    assert TokenDiffusionSettings().override(steps=8).steps == 8
    with pytest.raises(ValueError, match="steps: expected a whole number or none, got 'many'"):
        TokenDiffusionSettings().override(steps="many")


@pytest.mark.parametrize("name", ["flow", "diffusion", "queries", "token_random", "token_raster"])
def test_times_and_noise_are_exact_whatever_weights_are_in(make: Callable[..., UnifiedModel], name: str) -> None:
    model = make(name).bfloat16()
    grid, rng = model.tokenizer.layout.grid(8, 8), np.random.default_rng(0)
    blocks = [replace(b, time=0.123456789) for _ in range(2) for b in model.generator.plan(grid, rng)]
    tokens = model.tokenizer.encode(torch.rand(2, 3, 8, 8).bfloat16())
    corrupted = model.generator.corrupt(tokens, blocks)
    torch.testing.assert_close(corrupted.time, torch.full((2,), 0.123456789), rtol=1e-6, atol=0)
    for name, value in vars(corrupted).items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            assert value.dtype == torch.float32, name
    assert model.generator.embed(corrupted).values.dtype == torch.bfloat16
