"""The flow generator: what it learns, how it tells time, and how it samples."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from sampling_cases import begun, sampled
from shape_checks import first_checked

from unimodal.backbone import BackboneConfig, Experts
from unimodal.decoding import Session, decode
from unimodal.decoding_settings import DecodingSettings
from unimodal.documents import Document, Part
from unimodal.model import UnifiedModel
from unimodal.packing import pack
from unimodal.sequence_rules import SequenceRules
from unimodal_generators import (
    ChoiceSettings,
    ConvNeXtCoder,
    Flow,
    FlowSettings,
    LinearCoder,
    UNetCoder,
)
from unimodal_generators.base import Block, Corrupted, Embeddings, Grid, ImageTokens, TokenKind
from unimodal_tokenizers.base import TokenLayout
from unimodal_tokenizers.diffusion import timestep_embedding
from unimodal_tokenizers.patch import PatchTokenizer

TIMES = ("add", "token", "adaln")
CODERS = {
    "linear": LinearCoder,
    "unet": partial(UNetCoder, patch=2, channels=8),
    "convnext": partial(ConvNeXtCoder, channels=8),
}
LAYOUT = TokenLayout("continuous", dim=12, stride=2)
GRIDS = (Grid(4, 4), Grid(2, 4), Grid(1, 3))


def flow(width: int = 32, **settings: object) -> Flow:
    torch.manual_seed(0)
    made = Flow(LAYOUT, width, **settings)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return made


def tokens(grids: Sequence[Grid] = GRIDS, seed: int = 1) -> ImageTokens:
    rng = torch.Generator().manual_seed(seed)
    return ImageTokens(torch.randn(sum(g.length for g in grids), 12, generator=rng), tuple(grids))


def block(grid: Grid, time: float, seed: int) -> Block:
    return Block(grid, TokenKind.LEARNED, bidirectional=True, private=True, time=time, seed=seed, n_targets=grid.length)


BLOCKS = [block(g, t, s) for g, t, s in zip(GRIDS, (0.0, 0.3, 1.0), (5, 6, 2**62), strict=True)]


def test_the_target_is_data_minus_noise() -> None:
    data = tokens()
    corrupted = flow().corrupt(data, BLOCKS)
    noise = torch.cat(
        [torch.randn(b.length, 12, generator=torch.Generator().manual_seed(b.seed)) for b in BLOCKS]
    )  # one generator an image
    assert corrupted.targets is not None
    torch.testing.assert_close(corrupted.targets, data.values - noise)
    torch.testing.assert_close(corrupted.time, torch.tensor([0.0, 0.3, 1.0]))
    torch.testing.assert_close(corrupted.inputs[:16], noise[:16])  # t = 0 is noise
    torch.testing.assert_close(corrupted.inputs[16:24], 0.7 * noise[16:24] + 0.3 * data.values[16:24])
    torch.testing.assert_close(corrupted.inputs[24:], data.values[24:])  # t = 1 is data


def test_going_along_the_velocity_reaches_the_data() -> None:
    data, corrupted = tokens(), flow().corrupt(tokens(), BLOCKS)
    assert corrupted.targets is not None
    time = torch.cat([t.expand(g.length) for t, g in zip(corrupted.time, GRIDS, strict=True)])[:, None]
    torch.testing.assert_close(corrupted.inputs + (1 - time) * corrupted.targets, data.values, atol=1e-5, rtol=1e-5)


def test_noise_is_the_block_s_own() -> None:
    """The same seed gives the same noise, whatever else is in the batch; another seed gives other noise."""
    made, data = flow(), tokens()
    together = made.corrupt(data, BLOCKS).inputs
    for i, start in enumerate((0, 16, 24)):
        alone = made.corrupt(data.select([i]), [BLOCKS[i]]).inputs
        torch.testing.assert_close(alone, together[start : start + GRIDS[i].length], atol=1e-6, rtol=1e-6)
    torch.manual_seed(123)
    assert torch.equal(made.corrupt(data, BLOCKS).inputs, together)
    other = made.corrupt(data.select([0]), [block(GRIDS[0], 0.0, 6)]).inputs
    assert (other - together[:16]).abs().mean() > 0.5


def test_context_is_the_data_at_time_one() -> None:
    made, data = flow(), tokens()
    context = made.context(data)
    assert torch.equal(context.inputs, data.values)
    assert torch.equal(context.time, torch.ones(3))
    assert context.targets is None
    (planned,) = made.plan_context(GRIDS[0])
    assert (planned.kind, planned.bidirectional, planned.private) == (TokenKind.CLEAN, True, False)
    assert (planned.time, planned.n_targets, planned.length) == (1.0, 0, 16)


def test_a_plan_is_a_function_of_its_generator() -> None:
    made = flow()
    (one,), (same,), (other,) = (made.plan(GRIDS[0], np.random.default_rng(s)) for s in (1, 1, 2))
    assert one == same
    assert one.seed != other.seed
    assert one.time != other.time
    assert (one.kind, one.bidirectional, one.private, one.n_targets) == (TokenKind.LEARNED, True, True, 16)


@pytest.mark.parametrize(("mean", "shift"), [(0.0, 1.0), (-0.5, 1.0), (0.0, 3.0)])
def test_training_times_are_logit_normal_and_shifted(mean: float, shift: float) -> None:
    made, rng = flow(time_mean=mean, time_std=0.8, time_shift=shift), np.random.default_rng(0)
    times = np.array([made.plan(GRIDS[0], rng)[0].time for _ in range(4000)])
    noise = 1 - times  # its fraction was moved by s u / (1 + (s - 1) u), so the odds of it by s
    logits = np.log(times / noise) + np.log(shift)
    assert logits.mean() == pytest.approx(mean, abs=0.05)
    assert logits.std() == pytest.approx(0.8, abs=0.03)


def test_embeddings_are_patches_plus_their_image_s_time() -> None:
    made = flow()
    corrupted = made.corrupt(tokens(), BLOCKS)
    values = made.embed(corrupted).values
    rows = []
    for i, image in enumerate(corrupted.inputs.split([16, 8, 3])):
        time = made.time_in(timestep_embedding(corrupted.time[i : i + 1]))
        rows += [made.coder.patch_in(token) + time[0] for token in image]
    torch.testing.assert_close(values, torch.stack(rows), atol=1e-5, rtol=1e-5)


def test_a_token_of_time_stands_before_its_image() -> None:
    made = flow(time="token")
    corrupted = made.corrupt(tokens(), BLOCKS)
    embedded = made.embed(corrupted)
    assert embedded.condition is None
    rows = []
    for i, image in enumerate(corrupted.inputs.split([16, 8, 3])):
        rows += [made.time_in(timestep_embedding(corrupted.time[i : i + 1]))[0], *map(made.coder.patch_in, image)]
    torch.testing.assert_close(embedded.values, torch.stack(rows), atol=1e-5, rtol=1e-5)
    blocks = [*made.plan(GRIDS[0], np.random.default_rng(0)), *made.plan_context(GRIDS[0])]
    assert [(b.prefix, b.length, b.n_targets, b.complete) for b in blocks] == [(1, 17, 16, True), (1, 17, 0, True)]


def test_a_condition_of_time_stands_beside_its_image() -> None:
    made = flow(time="adaln")
    corrupted = made.corrupt(tokens(), BLOCKS)
    embedded = made.embed(corrupted)
    torch.testing.assert_close(embedded.values, made.coder.patch_in(corrupted.inputs))
    torch.testing.assert_close(embedded.condition, made.time_in(timestep_embedding(corrupted.time)))
    clean = made.embed(made.context(tokens())).condition  # t = 1, for every image
    torch.testing.assert_close(clean, made.time_in(timestep_embedding(torch.ones(3))))
    assert made.conditions
    assert not flow().conditions
    assert flow().embed(corrupted).condition is None


@pytest.mark.parametrize(("time", "adaln", "message"), [
    ("adaln", False, r"generator\.time: adaln needs backbone\.adaln: true, got false"),
    ("add", True, r"backbone\.adaln: true needs generator\.time: adaln, got a Flow without it"),
    ("token", True, r"backbone\.adaln: true needs generator\.time: adaln, got a Flow without it"),
    (None, True, r"backbone\.adaln: true needs generator\.time: adaln, got a Autoregressive without it"),
])  # fmt: skip
def test_a_condition_needs_a_reader_and_a_reader_a_condition(
    make: Callable[..., UnifiedModel], time: str | None, adaln: bool, message: str
) -> None:
    generator = {"generator": "autoregressive"} if time is None else {"time": time}
    with pytest.raises(ValueError, match=message):
        make(**generator, backbone={"adaln": adaln})


@pytest.mark.parametrize("time", TIMES)
def test_nobody_reads_the_time_token(make: Callable[..., UnifiedModel], time: str) -> None:
    """Image losses are read at patches, one a patch, wherever time is."""
    model = make("flow", time=time)
    document = Document((Part("seven", learn=False), Part(picture(3)), Part(" and", learn=True)))
    packed = pack([model.sequencer.document(document, (0, 0, 0))], model.backbone.config.experts, "own")
    start = int(packed.table.start[1]) + (time == "token")
    assert packed.inverse[start : start + 16].tolist() == packed.image_reads.tolist()
    assert packed.counts["image"] == 16
    assert len(packed) == sum(packed.table.length.tolist())
    rows = packed.image_rows[packed.inverse]  # text, learned copy, clean copy, text
    assert rows.tolist() == np.repeat([0, 1, 2, 0], packed.table.length).tolist()


def adaptive(experts: Experts, time: str) -> UnifiedModel:
    """As a recipe would build it: fresh weights."""
    torch.manual_seed(0)
    config = BackboneConfig(
        width=32, depth=2, heads=2, kv_heads=1, mlp_width=48, vocabulary=300, positions="mrope", experts=experts,
        adaln=time == "adaln",
    )  # fmt: skip
    rules = SequenceRules([(8, 8)], 128)
    return UnifiedModel(PatchTokenizer(2), lambda layout, width: Flow(layout, width, time=time), config, rules)


@pytest.mark.parametrize("experts", [Experts(), Experts(True, True, True)], ids=("dense", "mot"))
def test_modulation_begins_as_nothing_and_learns(
    make: Callable[..., UnifiedModel], mixed: list[Document], experts: Experts
) -> None:
    """At first as if time were never told; then gradients reach the modulation, and through it the time embedding."""
    on, off = adaptive(experts, "adaln"), adaptive(experts, "add")
    on.text = off.text = make("flow").text
    state = {name: v for name, v in on.state_dict().items() if "modulation" not in name}
    for name in list(state):
        if name.startswith("generator.time_in.2"):
            state[name] = torch.zeros_like(state[name])  # nothing is added
    off.load_state_dict(state)
    for model in (on, off):
        torch.nn.init.ones_(model.generator.coder.patch_out.weight)
    packed = pack([on.sequencer.document(mixed[2], (0, 0, 0))], experts, "own")
    losses, others = on(packed), off(packed)
    for name in ("text", "image"):
        assert torch.equal(losses[name].sum, others[name].sum)
    sum(term.sum for term in losses.values()).backward()
    for name, parameter in on.named_parameters():
        if "modulation" in name:
            assert parameter.grad.any(), name
    with torch.no_grad():
        for name, parameter in on.named_parameters():
            if "modulation" in name:
                parameter -= 1e-3 * parameter.grad
    on.zero_grad()
    sum(term.sum for term in on(packed).values()).backward()
    assert all(p.grad.any() for p in on.generator.time_in.parameters())


def test_times_are_told_apart() -> None:
    embedded = timestep_embedding(torch.linspace(0, 1, 21))
    assert embedded.shape == (21, 256)
    assert (torch.cdist(embedded, embedded) + 1e9 * torch.eye(21)).min() > 1.0
    torch.testing.assert_close(embedded[0], torch.cat([torch.ones(128), torch.zeros(128)]))


def test_the_loss_is_a_sum_over_tokens_of_channel_means() -> None:
    made = flow()
    corrupted = made.corrupt(tokens(), BLOCKS)
    hidden = torch.randn(27, 32, generator=torch.Generator().manual_seed(3))
    losses = made.loss(hidden, made.embed(corrupted), corrupted)
    assert corrupted.targets is not None
    total = 0.0
    for state, target in zip(hidden, corrupted.targets, strict=True):
        v = (made.coder.patch_out.weight @ state + made.coder.patch_out.bias).detach()
        total += sum(float(a - b) ** 2 for a, b in zip(v, target, strict=True)) / 12
    assert list(losses) == ["image"]
    assert losses["image"].count == 27
    assert float(losses["image"].sum.detach()) == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("coder", CODERS)
@pytest.mark.parametrize("time", TIMES)
def test_no_images_are_an_exact_zero(time: str, coder: str) -> None:
    made, none = flow(time=time, coder=CODERS[coder]), ImageTokens(torch.empty(0, 12), ())
    corrupted = made.corrupt(none, [])
    embedded = made.embed(corrupted)
    loss = made.loss(embedded.values, embedded, corrupted)["image"]
    assert (loss.sum.detach().item(), loss.count) == (0.0, 0)
    assert made.embed(made.context(none)).values.shape == (0, 32)
    (loss.sum + (0.0 if embedded.condition is None else embedded.condition.sum())).backward()
    assert all(p.grad is not None and not p.grad.any() for p in made.parameters())


def test_a_fresh_generator_predicts_zero() -> None:
    x, t = torch.randn(3, 12), torch.tensor([[0.0], [0.5], [0.9]])
    at = Corrupted(x, t[:, 0], (Grid(1, 1),) * 3)
    for coder in CODERS.values():
        made, other = (Flow(LAYOUT, 32, predicts=p, coder=coder) for p in ("velocity", "data"))
        assert made.predict(torch.randn(3, 32), made.embed(at), at).abs().max() == 0
        towards = other.predict(torch.randn(3, 32), other.embed(at), at)
        torch.testing.assert_close(x + (1 - t) * towards, torch.zeros(3, 12))  # the data it points at


def test_the_loss_is_of_velocities_whatever_is_predicted() -> None:
    """Weights of a velocity and of the data it points at are worth the same; near the data both differences shrink."""
    data, blocks = tokens(), [block(g, t, s) for g, t, s in zip(GRIDS, (0.1, 0.6, 0.98), (5, 6, 7), strict=True)]
    made, other = flow(12), flow(12, predicts="data")
    corrupted = made.corrupt(data, blocks)
    assert corrupted.targets is not None
    time = torch.cat([t.expand(g.length) for t, g in zip(corrupted.time, GRIDS, strict=True)])[:, None]  # (T, 1)
    for net in (made, other):
        net.coder.patch_out = torch.nn.Identity()  # hidden states are what the last layer gives
    v = torch.randn_like(data.values)
    x1 = corrupted.inputs + (1 - time) * v
    for far, chosen in ((True, time < 0.95), (False, time >= 0.95)):
        scale = torch.ones(1) if far else (1 - time[chosen[:, 0]]) / 0.05
        expected = (((v - corrupted.targets)[chosen[:, 0]] * scale) ** 2).mean(-1).sum()
        kept = [i for i, b in enumerate(blocks) if (b.time < 0.95) == far]
        part, same = (net.corrupt(data.select(kept), [blocks[i] for i in kept]) for net in (made, other))
        embedded = made.embed(part)
        got = other.loss(x1[chosen[:, 0]], embedded, same)["image"].sum
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
        if far:
            torch.testing.assert_close(made.loss(v[chosen[:, 0]], embedded, part)["image"].sum, expected)


def test_velocity_is_in_full_precision() -> None:
    at = Corrupted(torch.randn(3, 12), torch.zeros(1), (Grid(1, 3),))
    for predicts in ("velocity", "data"):
        made = flow(predicts=predicts).bfloat16()
        assert made.predict(torch.randn(3, 32).bfloat16(), made.embed(at), at).dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "value"), [("time_shift", 0.0), ("time_shift", math.nan), ("time_std", -0.1), ("time_mean", math.nan)]
)
def test_times_that_cannot_be_drawn_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected .*, got {value}"):
        flow(**{name: value})


def test_discrete_tokenizers_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="tokenizer: Flow takes continuous tokens, got discrete"):
        Flow(TokenLayout("discrete", dim=1, stride=2, codebooks=(16,)), 32)


def picture(seed: int, height: int = 8, width: int = 8) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


class Counted:
    """A session that counts what is asked of the network, and of how many tokens."""

    def __init__(self, session: Session) -> None:
        self.session, self.peeks = session, 0
        self.widths: list[int | None] = []

    @property
    def branches(self) -> int:
        return self.session.branches

    @property
    def last(self) -> torch.Tensor:
        return self.session.last

    def peek(self, embeddings: Embeddings, blocks: Sequence[Block], branches: int | None = None) -> torch.Tensor:
        self.peeks += 1
        self.widths.append(branches)
        return self.session.peek(embeddings, blocks, branches)

    def append(self, embeddings: Embeddings, blocks: Sequence[Block]) -> torch.Tensor:
        raise AssertionError("flow appends nothing")

    def rows(self, indices: Sequence[int]) -> "Counted":
        return Counted(self.session.rows(indices))


@pytest.mark.parametrize(("solver", "steps", "previews"), [
    ("euler", 1, 1), ("euler", 2, 2), ("euler", 7, 7), ("heun", 1, 1), ("heun", 3, 2), ("heun", 9, 5),
])  # fmt: skip
@pytest.mark.parametrize("guided", [False, True])
def test_steps_are_network_evaluations(
    make: Callable[..., UnifiedModel], solver: str, steps: int, previews: int, guided: bool
) -> None:
    model = make("flow")
    session = Counted(begun(model, ["seven"], guided))
    settings = FlowSettings(guidance=3.0 if guided else 1.0, steps=steps, solver=solver)  # type: ignore[arg-type]
    states = sampled(session, model, [Grid(4, 4)], settings, [0])
    assert session.peeks == steps
    assert len(states) == previews
    assert all(state.values.shape == (16, 12) for state in states)


@pytest.mark.parametrize(("solver", "steps"), [("heun", 2), ("heun", 20), ("euler", 0), ("heun", 0)])
def test_counts_a_solver_cannot_make_are_refused(make: Callable[..., UnifiedModel], solver: str, steps: int) -> None:
    model = make("flow")
    with pytest.raises(ValueError, match=f"steps: .* got {steps}"):
        sampled(begun(model, ["seven"]), model, [Grid(4, 4)], FlowSettings(steps=steps, solver=solver), [0])  # type: ignore[arg-type]


@pytest.mark.parametrize("time", TIMES)
def test_one_euler_step_by_hand(make: Callable[..., UnifiedModel], time: str) -> None:
    """Noise of the document's generator, the velocity at t = 0 of its patches, guided: nothing else."""
    model = make("flow", time=time)
    session = begun(model, ["seven"], guided=True)
    (final,) = sampled(session, model, [Grid(4, 4)], FlowSettings(guidance=2.5, steps=1), [11])
    noise = torch.randn(16, 12, generator=torch.Generator().manual_seed(11), dtype=torch.float64).float()
    with torch.no_grad():
        embedded = model.generator.embed(Corrupted(noise, torch.zeros(1), (Grid(4, 4),)))
        prefix = int(time == "token")
        whole = Block(Grid(4, 4), TokenKind.LEARNED, bidirectional=True, private=True, prefix=prefix)
        hidden = session.peek(embedded, [whole])[:, prefix:]
        c, u = model.generator.coder.patch_out(hidden)
    torch.testing.assert_close(final.values, noise + u + 2.5 * (c - u), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("solver", "time"), [("euler", "add"), ("heun", "add"), ("euler", "token"), ("euler", "adaln")]
)
def test_an_image_does_not_depend_on_its_neighbours(make: Callable[..., UnifiedModel], solver: str, time: str) -> None:
    model = make("flow", time=time).double()
    settings = FlowSettings(guidance=2.0, steps=3, solver=solver, shift=2.0)  # type: ignore[arg-type]
    prompts, grids, seeds = ["a handwritten seven", "three", ""], [Grid(4, 4), Grid(2, 4), Grid(4, 4)], [3, 4, 5]
    together = sampled(begun(model, prompts, True), model, grids, settings, seeds)[-1].split()
    for i, one in enumerate(together):
        (alone,) = sampled(begun(model, prompts[i : i + 1], True), model, grids[i : i + 1], settings, seeds[i : i + 1])[
            -1
        ].split()
        torch.testing.assert_close(one.values, alone.values, atol=1e-9, rtol=1e-9)
    again = sampled(begun(model, prompts, True), model, grids, settings, [3, 4, 6])[-1].split()
    torch.testing.assert_close(again[1].values, together[1].values, atol=1e-9, rtol=1e-9)
    assert (again[2].values - together[2].values).abs().mean() > 0.1


def test_settings_of_another_generator_are_refused(make: Callable[..., UnifiedModel]) -> None:
    model = make("flow")
    with pytest.raises(ValueError, match="sampling: expected FlowSettings, got ChoiceSettings"):
        sampled(begun(model, ["seven"]), model, [Grid(4, 4)], ChoiceSettings(), [0])  # type: ignore[arg-type]


@pytest.mark.parametrize("time", TIMES)
def test_a_session_holds_every_token_an_image_takes(make: Callable[..., UnifiedModel], time: str) -> None:
    """Prompts with images, and images drawn, up to the last token of the context."""
    image = 16 + (time == "token")
    prompt = Document((Part("seven", learn=False), Part(picture(1), learn=False)))
    settings = DecodingSettings(start="image", max_tokens=0, max_images=1, image=FlowSettings(steps=1))
    model = make("flow", time=time, context_length=192)
    words = len(model.text.encode("seven"))
    needed = 1 + words + 1 + image + 1 + 1 + image + 1  # bos, words, (boi, image, eoi) twice
    model.sequence = replace(model.sequence, context_length=needed)
    (drawn,) = decode(model, [prompt], settings, [0])
    assert len(drawn.images) == 2
    model.sequence = replace(model.sequence, context_length=needed - 1)
    with pytest.raises(ValueError, match=f"prompt 0: {words + image + 3} tokens and an image of {image} are more"):
        decode(model, [prompt], settings, [0])
    model.sequence = replace(model.sequence, context_length=words + image + 2)
    with pytest.raises(ValueError, match=f"prompt 0: it has {words + image + 3} tokens"):
        decode(model, [prompt], settings, [0])


@pytest.mark.parametrize("time", TIMES)
def test_documents_go_on_behind_their_images(make: Callable[..., UnifiedModel], time: str) -> None:
    """Text and images in turn, of two sizes and many at once, equal each document alone."""
    model = make("flow", time=time).double()
    image = FlowSettings(steps=1, guidance=2.0)
    settings = DecodingSettings(start="image", max_tokens=8, max_images=2, temperature=1.0, image=image)
    prompts = [
        Document((Part("three", learn=False), Part(picture(1), learn=False))),
        Document((Part(picture(2, 4, 8), learn=False), Part("seven", learn=False))),
        Document((Part("a handwritten", learn=False),)),
    ]
    together = decode(model, prompts, settings, [5, 6, 8])
    for one, prompt, seed in zip(together, prompts, [5, 6, 8], strict=True):
        (alone,) = decode(model, [prompt], settings, [seed])
        assert [p.text if p.is_text else p.image.tobytes() for p in alone.parts] == [
            p.text if p.is_text else p.image.tobytes() for p in one.parts
        ]
        assert len(one.images) > len(prompt.images)
        assert len(one.parts) > len(prompt.parts) + 1


def quarters(seed: int) -> Image.Image:
    """Four plain colours."""
    colours = np.random.default_rng(seed).integers(0, 256, (2, 2, 3), dtype=np.uint8)
    return Image.fromarray(colours.repeat(4, 0).repeat(4, 1))


@pytest.mark.slow
@pytest.mark.parametrize("time", TIMES)
def test_overfits_four_images(make: Callable[..., UnifiedModel], time: str) -> None:
    """Each of four captions draws its own image: a mean error below 20 of 255 levels, where the others are over 50 away."""
    model = make("flow", time=time, learn_end=False, drop_text=0.0, context_length=96)
    words = ["one", "two", "three", "four"]
    learned = [Document((Part(word, learn=False), Part(quarters(i))), "") for i, word in enumerate(words)]
    steps = 200
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2, weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps, pct_start=0.1)
    for step in first_checked(range(steps)):
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
        assert errors.pop(own.text) < 20
        assert min(errors.values()) > 50
