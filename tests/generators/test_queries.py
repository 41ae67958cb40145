"""Learned queries: what the denoiser is told, the way there written out slowly, and how an image is sampled."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sampling_cases import begun, sampled
from shape_checks import first_checked
from torch.nn import functional as F

from unimodal.backbone import BackboneConfig
from unimodal.decoding import Session, decode
from unimodal.decoding_settings import DecodingSettings
from unimodal.documents import Document, Part
from unimodal.model import UnifiedModel
from unimodal.packing import PackedSequence, pack
from unimodal.sequence_rules import SequenceRules
from unimodal.training.flops import useful_flops
from unimodal.training.stages import freeze
from unimodal_generators import ChoiceSettings, DiT, FlowSettings, Queries, Sana
from unimodal_generators.base import Block, Embeddings, Grid, ImageTokens, TokenKind
from unimodal_generators.denoisers import Attention, grid_embedding
from unimodal_tokenizers.base import TokenLayout
from unimodal_tokenizers.patch import PatchTokenizer

Make = Callable[..., UnifiedModel]
LAYOUT = TokenLayout("continuous", dim=12, stride=2)
GRIDS = (Grid(4, 4), Grid(2, 4), Grid(4, 4))
DENOISER = functools.partial(DiT, width=16, depth=2, heads=2)


def shaken(module: torch.nn.Module) -> Any:
    """Without the zeros it begins with, which would hide a mistake."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.15 * torch.randn_like(parameter)
    return module


def queries(**settings: Any) -> Queries:
    torch.manual_seed(0)
    return shaken(Queries(LAYOUT, 32, **{"denoiser": DENOISER, "queries": 3, **settings}))


def tokens(grids: Sequence[Grid] = GRIDS, seed: int = 1) -> ImageTokens:
    rng = torch.Generator().manual_seed(seed)
    return ImageTokens(torch.randn(sum(g.length for g in grids), 12, generator=rng), tuple(grids))


def planned(made: Queries, grids: Sequence[Grid] = GRIDS) -> list[Block]:
    return [block for i, g in enumerate(grids) for block in made.plan(g, np.random.default_rng(i))]


def packed(model: UnifiedModel, documents: Sequence[Document], key: int = 0) -> PackedSequence:
    laid = [model.sequencer.document(d, (key, i), train=False) for i, d in enumerate(documents)]
    return pack(laid, model.backbone.config.experts, model.generator.reads)


# ---- what is laid out and learned


def test_a_plan_is_of_queries_and_counts_the_image() -> None:
    made = queries()
    (one,), (same,), (other,) = (made.plan(Grid(4, 4), np.random.default_rng(s)) for s in (1, 1, 2))
    assert one == same
    assert (one.seed, one.time) != (other.seed, other.time)
    assert (one.grid, one.length, one.n_targets) == (Grid(1, 3), 3, 16)
    assert (one.kind, one.bidirectional, one.private) == (TokenKind.LEARNED, True, True)
    assert not queries(private=False).plan(Grid(4, 4), np.random.default_rng(0))[0].private
    (context,) = made.plan_context(Grid(4, 4))
    assert (context.kind, context.length, context.private) == (TokenKind.CLEAN, 16, False)


def test_images_are_noised_by_their_block() -> None:
    made, data = queries(), tokens()
    blocks = planned(made)
    corrupted = made.corrupt(data, blocks)
    at = 0
    for block, own in zip(blocks, data.split(), strict=True):
        noise = torch.randn(own.values.shape, generator=torch.Generator().manual_seed(block.seed))
        rows = slice(at, at := at + len(own.values))
        torch.testing.assert_close(corrupted.inputs[rows], (1 - block.time) * noise + block.time * own.values)
        torch.testing.assert_close(corrupted.targets[rows], own.values - noise)
    torch.testing.assert_close(corrupted.time, torch.tensor([b.time for b in blocks]))
    values = made.embed(corrupted).values
    assert torch.equal(values, torch.cat([made.queries] * 3))
    assert made.embed(made.context(data)).values.shape == (40, 32)


def attend(attention: Attention, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """One image, head by head, key by key."""
    size = x.shape[1] // attention.heads
    q, (k, v) = attention.q(x), attention.kv(y).chunk(2, dim=-1)
    heads = []
    for h in range(attention.heads):
        own = slice(h * size, (h + 1) * size)
        scores = q[:, own] @ k[:, own].T / math.sqrt(size)
        heads.append(scores.softmax(-1) @ v[:, own])
    return attention.out(torch.cat(heads, dim=-1))


def drawn_slowly(dit: DiT, x: torch.Tensor, t: float, condition: torch.Tensor, grid: Grid) -> torch.Tensor:
    """One image's velocity; `condition` is (L, Q, K)."""
    frequency = torch.exp(-math.log(10_000) * torch.arange(128) / 128)
    angle = 1000 * t * frequency
    c = F.silu(dit.time_in(torch.cat([angle.cos(), angle.sin()])))
    places = []
    for row in range(grid.h):
        for column in range(grid.w):
            low = torch.exp(-math.log(10_000) * torch.arange(4) / 4)
            places.append(torch.cat([(row * low).cos(), (row * low).sin(), (column * low).cos(), (column * low).sin()]))
    h = dit.patch_in(x) + torch.stack(places)

    def norm(x: torch.Tensor) -> torch.Tensor:
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()

    for number, block in enumerate(dit.blocks):
        layer = condition[0] if len(condition) == 1 or number < len(dit.blocks) / 2 else condition[1]
        a, b, g, a2, b2, g2 = block.modulation(c).chunk(6)
        own = norm(h) * (1 + b) + a
        h = h + g * attend(block.attention, own, own)
        h = h + attend(block.cross, norm(h), layer)
        h = h + g2 * block.mlp(norm(h) * (1 + b2) + a2)
    a, b = dit.last(c).chunk(2)
    return dit.velocity_out(norm(h) * (1 + b) + a)


@pytest.mark.parametrize("layers", [1, 2])
def test_the_denoiser_written_out(layers: int) -> None:
    torch.manual_seed(0)
    dit = shaken(DiT(12, width=16, depth=2, heads=2)).double()
    x, t = torch.randn(2, 8, 12, dtype=torch.float64), torch.tensor([0.3, 0.9], dtype=torch.float64)
    condition = torch.randn(2, layers, 3, 16, dtype=torch.float64)
    torch.set_default_dtype(torch.float64)
    try:
        expected = [drawn_slowly(dit, x[i], float(t[i]), condition[i], Grid(2, 4)) for i in range(2)]
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(dit(x, t, condition, Grid(2, 4)), torch.stack(expected), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["queries", "ladder", "dream"])
def test_the_loss_written_out(name: str, make: Make, mixed: list[Document]) -> None:
    """Document by document in a session, image by image through the denoiser: the same sum, and the same gradients."""
    model = make(name).double()
    made = model.generator
    assert isinstance(made, Queries)
    total = torch.zeros((), dtype=torch.float64)
    for i, document in enumerate(mixed):
        laid = model.sequencer.document(document, (0, i), train=False)
        p = pack([laid], model.backbone.config.experts, "own")
        corrupted = made.corrupt(model.encode(p.images).select(p.learned_images), p.learned_blocks)
        hidden = hidden_at_queries(model, p)
        at, asked = 0, 0
        for grid, t in zip(corrupted.grids, corrupted.time, strict=True):
            own = hidden[asked : (asked := asked + len(made.queries))]
            conditions = [c(x) for c, x in zip(made.connectors, own.chunk(len(made.layers), 1), strict=True)]
            rows = slice(at, at := at + grid.length)
            v = made.denoiser(corrupted.inputs[rows][None], t[None], torch.stack(conditions)[None], grid)[0]
            total = total + (v - corrupted.targets[rows]).square().mean(-1).sum()
    term = model(packed(model, mixed))["image"]
    assert term.count == 16 + 2 * 16
    torch.testing.assert_close(term.sum, total, atol=1e-7, rtol=1e-9)
    learning = [made.queries, *made.connectors.parameters(), *made.denoiser.parameters()]
    for fast, slow in zip(torch.autograd.grad(term.sum, learning), torch.autograd.grad(total, learning), strict=True):
        torch.testing.assert_close(fast, slow, atol=1e-7, rtol=1e-6)


def hidden_at_queries(model: UnifiedModel, p: PackedSequence) -> torch.Tensor:
    """Streams behind the layers that are read, by hooks of their own; the last one normed."""
    kept: dict[int, torch.Tensor] = {}
    forward = model.backbone._layer

    def watched(layer: Any, *args: Any) -> Any:
        xs, loss = forward(layer, *args)
        kept[len(kept)] = torch.cat(xs)
        return xs, loss

    model.backbone._layer = watched
    try:
        model(p)
    finally:
        model.backbone._layer = forward
    kept[1] = model.backbone.last_norm(list(kept[1].split(p.splits)), tuple(range(len(p.splits))))
    return torch.cat([kept[layer % 2] for layer in model.generator.layers], dim=1)[p.image_reads]


def test_a_session_gives_the_states_that_training_reads(make: Make, mixed: list[Document]) -> None:
    model = make("ladder").double()
    document = mixed[0]  # a text, then an image
    with torch.no_grad():
        expected = hidden_at_queries_without_gradient(model, packed(model, [document]))
        session = begun(model, [document.parts[0].text])
        block = model.generator.plan(Grid(4, 4), np.random.default_rng(0))[0]
        found = session.append(Embeddings(model.generator.queries.clone()), [block])[0]
    assert found.shape == (5, 64)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-8)
    torch.testing.assert_close(session.last[0, 0], found[-1, 32:], atol=0, rtol=0)


def hidden_at_queries_without_gradient(model: UnifiedModel, p: PackedSequence) -> torch.Tensor:
    with torch.enable_grad():
        return hidden_at_queries(model, p).detach()


def test_no_images_are_an_exact_zero(make: Make) -> None:
    model = make("queries")
    losses = model(packed(model, [Document((Part("three plus seven"),))]))
    assert (losses["image"].sum.item(), losses["image"].count) == (0.0, 0)
    torch.stack([term.sum for term in losses.values()]).sum().backward()
    for name, parameter in model.generator.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_a_fresh_denoiser_predicts_zero() -> None:
    dit = DiT(12, width=16, depth=2, heads=2)
    assert not dit(torch.randn(2, 8, 12), torch.rand(2), torch.randn(2, 1, 3, 16), Grid(2, 4)).any()


def test_a_frozen_backbone_teaches_its_queries(make: Make, mixed: list[Document]) -> None:
    model = make("queries")
    freeze(model, ["text", "image", "embedding"])
    model(packed(model, mixed[:1]))["image"].sum.backward()
    assert all(p.grad is None for p in model.backbone.parameters())
    assert model.generator.queries.grad.abs().max() > 0


def test_places_are_told_apart() -> None:
    added = grid_embedding(Grid(5, 7), 16, torch.device("cpu"))
    assert torch.cdist(added, added).fill_diagonal_(1.0).min() > 0.05


def test_its_work_is_counted(make: Make, mixed: list[Document]) -> None:
    for name in ("queries", "ladder"):
        model = make(name)
        assert useful_flops(model, packed(model, mixed)).generator > 0


# ---- sampling


class Counted:
    """A session that counts, and says of how many branches it was asked."""

    def __init__(self, session: Session) -> None:
        self.session, self.asked = session, []

    def peek(self, embeddings: Embeddings, blocks: Sequence[Block], branches: int | None = None) -> torch.Tensor:
        self.asked.append(branches)
        return self.session.peek(embeddings, blocks, branches)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.session, name)


@pytest.mark.parametrize(("solver", "steps", "previews"), [("euler", 1, 1), ("euler", 6, 6), ("heun", 5, 3)])
def test_the_backbone_is_asked_once(solver: Any, steps: int, previews: int, make: Make) -> None:
    model = make("queries")
    session, evaluations = Counted(begun(model, ["seven", "three"], guided=True)), []
    model.generator.denoiser.register_forward_hook(lambda module, inputs, output: evaluations.append(len(output)))
    settings = FlowSettings(guidance=3.0, steps=steps, solver=solver, interval=(0.5, 1.0))
    states = sampled(session, model, [Grid(4, 4)] * 2, settings, [0, 1])
    assert session.asked == [None]
    assert len(evaluations) == steps
    assert (evaluations[0], evaluations[-1]) == (2, 2 if steps == 1 else 4)  # guidance begins half way
    assert len(states) == previews


def test_one_euler_step_by_hand(make: Make) -> None:
    model = make("ladder")
    made = model.generator
    session = begun(model, ["seven"], guided=True)
    (final,) = sampled(session, model, [Grid(4, 4)], FlowSettings(guidance=2.5, steps=1), [11])
    noise = torch.randn(16, 12, generator=torch.Generator().manual_seed(11), dtype=torch.float64).float()
    with torch.no_grad():
        block = made.plan(Grid(4, 4), np.random.default_rng(0))
        hidden = begun(model, ["seven"], guided=True).append(Embeddings(made.queries.clone()), block)  # (2, 5, 64)
        c, u = (made.denoiser(noise[None], torch.zeros(1), made.connect(one), Grid(4, 4))[0] for one in hidden)
    torch.testing.assert_close(final.values, noise + u + 2.5 * (c - u), atol=1e-4, rtol=1e-4)


def test_queries_stay_or_go(make: Make) -> None:
    for name, stay in (("queries", 0), ("ladder", 5)):
        model = make(name)
        session = begun(model, ["seven"])
        before = session.length(0)
        sampled(session, model, [Grid(4, 4)], FlowSettings(steps=1), [0])
        assert session.length(0) == before + stay


def test_an_image_does_not_depend_on_its_neighbours(make: Make) -> None:
    model = make("queries").double()
    settings = FlowSettings(guidance=2.0, steps=3, shift=2.0, renorm="global")
    prompts, grids, seeds = ["a handwritten seven", "three", ""], [Grid(4, 4), Grid(2, 4), Grid(4, 4)], [3, 4, 5]
    together = sampled(begun(model, prompts, True), model, grids, settings, seeds)[-1].split()
    for i, one in enumerate(together):
        final = sampled(begun(model, prompts[i : i + 1], True), model, grids[i : i + 1], settings, seeds[i : i + 1])[-1]
        torch.testing.assert_close(one.values, final.values, atol=1e-9, rtol=1e-9)
    again = sampled(begun(model, prompts, True), model, grids, settings, [3, 4, 6])[-1].split()
    assert (again[2].values - together[2].values).abs().mean() > 0.1


@pytest.mark.parametrize(("solver", "steps", "error"), [("euler", 200, 1e-2), ("heun", 99, 1e-3)])
def test_gaussian_data_in_closed_form(solver: Any, steps: int, error: float, make: Make) -> None:
    """Data N(m, s^2): x_1 = m + s x_0, through the exact velocity in the denoiser's place; the error is Wasserstein-2."""
    model, m, s = make("queries").double(), 0.7, 0.3

    def exact(x: torch.Tensor, t: torch.Tensor, condition: torch.Tensor, grid: Grid) -> torch.Tensor:
        t = t[:, None, None]
        variance = (1 - t) ** 2 + (t * s) ** 2
        return m + (t * s**2 - (1 - t)) / variance * (x - t * m)

    model.generator.denoiser.forward = exact
    (*_, final) = sampled(begun(model, ["seven"]), model, [Grid(4, 4)], FlowSettings(steps=steps, solver=solver), [2])
    noise = torch.randn(16, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (x, y), (a, b) = noise[0, :2], final.values[0, :2]  # every step is affine, and so is the way
    slope = (b - a) / (y - x)
    torch.testing.assert_close(final.values, a + slope * (noise - x))
    assert math.hypot(slope - s, a - slope * x - m) < error


def test_documents_go_on_behind_their_images(make: Make) -> None:
    for name in ("queries", "dream"):
        model = make(name).double()
        settings = DecodingSettings("image", 8, 2, temperature=1.0, image=FlowSettings(steps=1, guidance=2.0))
        prompts = [Document((Part("three", learn=False),)), Document((Part("a handwritten", learn=False),))]
        together = decode(model, prompts, settings, [5, 6])
        for one, prompt, seed in zip(together, prompts, [5, 6], strict=True):
            (alone,) = decode(model, [prompt], settings, [seed])
            assert [p.content if p.is_text else p.content.tobytes() for p in alone.parts] == [
                p.content if p.is_text else p.content.tobytes() for p in one.parts
            ]
            assert len(one.parts) > len(prompt.parts) + 1


@pytest.mark.parametrize(("name", "image"), [("queries", 16), ("ladder", 21), ("dream", 9)])
def test_room_for_an_image(name: str, image: int, make: Make) -> None:
    """16 patches or 4 features, and 5 queries where they stay."""
    prompt = Document((Part("three", learn=False),))
    words = 1 + len(make(name).text.encode("three"))
    settings = DecodingSettings("image", max_tokens=0, max_images=1, image=FlowSettings(steps=1))
    assert decode(make(name, context_length=words + image + 2), [prompt], settings, [0])[0].images
    with pytest.raises(ValueError, match=f"prompt 0: {words} tokens and an image of {image} are more"):
        decode(make(name, context_length=words + image + 1), [prompt], settings, [0])


def quarters(seed: int) -> Image.Image:
    """Four plain colours."""
    colours = np.random.default_rng(seed).integers(0, 256, (2, 2, 3), dtype=np.uint8)
    return Image.fromarray(colours.repeat(4, 0).repeat(4, 1))


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [False, True])
def test_overfits_four_images(frozen: bool, make: Make) -> None:
    """Each of four captions draws its own image, also through a backbone that learns nothing."""
    model = make("queries", learn_end=False, drop_text=0.0, context_length=96)
    if frozen:
        freeze(model, ["text", "image", "embedding"])
    words = ["one", "two", "three", "four"]
    learned = [Document((Part(word, learn=False), Part(quarters(i))), "") for i, word in enumerate(words)]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2, weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=450, pct_start=0.1)
    for step in first_checked(range(450)):
        documents = [model.sequencer.document(d, (step, i)) for i, d in enumerate(learned * 2)]
        term = model(pack(documents, model.backbone.config.experts, model.generator.reads))["image"]
        optimizer.zero_grad()
        (term.sum / term.count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    prompts = [Document((Part(word, learn=False),)) for word in words]
    settings = DecodingSettings(start="image", max_tokens=0, max_images=1, image=FlowSettings(steps=20))
    for drawn, own in zip(decode(model, prompts, settings, [1, 2, 3, 4]), learned, strict=True):
        pixels = np.asarray(drawn.images[0], dtype=float)
        errors = {d.text: np.abs(pixels - np.asarray(d.images[0], dtype=float)).mean() for d in learned}
        assert errors.pop(own.text) < 25
        assert min(errors.values()) > 50


# ---- Sana


def test_sana_counts_time_from_the_data() -> None:
    torch.manual_seed(0)
    settings = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "num_cross_attention_heads": 2,
                "cross_attention_head_dim": 8, "cross_attention_dim": 16, "caption_channels": 24,
                "sample_size": 4}  # fmt: skip
    sana = Sana(12, settings)
    assert (sana.condition_dim, sana.ladder) == (24, False)
    x, t, condition = torch.randn(2, 8, 12), torch.tensor([0.25, 1.0]), torch.randn(2, 1, 3, 24)
    v = sana(x, t, condition, Grid(2, 4))
    latents = x.unflatten(1, (2, 4)).permute(0, 3, 1, 2)  # (B, D, h, w)
    out = sana.network(latents, condition[:, 0], torch.tensor([750.0, 0.0])).sample  # of noise - data
    torch.testing.assert_close(v, -out.permute(0, 2, 3, 1).flatten(1, 2))
    times = 0.0005 + 0.001 * torch.arange(40)
    with torch.no_grad():
        low = sana.bfloat16()(x[:1].expand(40, -1, -1), times, condition[:1].expand(40, -1, -1, -1), Grid(2, 4))
    assert len(low.unique(dim=0)) == 40  # near the noise, where bf16 has eleven times for these
    made = queries(denoiser=functools.partial(Sana, settings=settings))
    blocks = planned(made)
    corrupted = made.corrupt(tokens(), blocks)
    term = made.loss(torch.randn(9, 32), made.embed(corrupted), corrupted)["image"]
    assert term.count == 40
    assert term.sum.isfinite()


# ---- refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"time_shift": 0.0}, r"time_shift: expected a number above 0, got 0\.0"),
        ({"time_mean": math.inf}, r"time_mean: expected a number, got inf"),
        ({"time_std": -1.0}, r"time_std: expected 0 or more, got -1\.0"),
        ({"queries": 0}, r"generator\.queries: expected at least 1, got 0"),
        ({"layers": ()}, r"generator\.layers: expected one layer, .* got \[\]"),
        ({"denoiser": functools.partial(DiT, width=18, depth=1, heads=3)}, r"denoiser\.width: .* heads 3, got 18"),
        ({"denoiser": functools.partial(DiT, width=16, depth=0, heads=2)}, r"denoiser\.depth: .* got 0"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        queries(**settings)


def test_layers_that_are_not_there_are_refused() -> None:
    shape = BackboneConfig(32, 2, 2, 1, 48, 300, "sequential")
    made = functools.partial(Queries, denoiser=DENOISER, layers=(0, 2))
    with pytest.raises(ValueError, match=r"generator\.layers: expected layers of backbone\.depth 2, got 2"):
        UnifiedModel(PatchTokenizer(2), made, shape, SequenceRules([(8, 8)], 64))


def test_discrete_tokenizers_and_other_settings_are_refused(make: Make) -> None:
    with pytest.raises(ValueError, match="tokenizer: Queries takes continuous tokens, got discrete"):
        Queries(TokenLayout("discrete", dim=8, stride=2, codebooks=(16,)), 32, DENOISER)
    model = make("queries")
    with pytest.raises(ValueError, match="sampling: expected FlowSettings, got ChoiceSettings"):
        sampled(begun(model, ["seven"]), model, [Grid(4, 4)], ChoiceSettings(), [0])
    with pytest.raises(ValueError, match=r"steps: .* got 2"):
        sampled(begun(model, ["seven"]), model, [Grid(4, 4)], FlowSettings(steps=2, solver="heun"), [0])
