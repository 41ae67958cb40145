"""Masked prediction of image ids: what is hidden and learned, and which of the drawn ids stay."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from generator_cases import GrayLevels
from PIL import Image
from sampling_cases import begun, sampled
from shape_checks import first_checked

from unimodal.decoding import Session, decode
from unimodal.decoding_settings import DecodingSettings
from unimodal.documents import Document, Part
from unimodal.model import UnifiedModel
from unimodal.packing import Run, pack, to_tensor
from unimodal_generators import Autoregressive, FlowSettings, Masked, MaskedSettings, ParallelNext
from unimodal_generators.base import Block, Corrupted, Embeddings, Grid, ImageTokens, Known, TokenKind
from unimodal_generators.choice import choose
from unimodal_generators.unmasking import SCHEDULES, least, remaining
from unimodal_tokenizers.base import TokenLayout

V, HIDDEN = 16, 16  # ids are 0 to 15
LAYOUT = TokenLayout("discrete", dim=1, stride=2, codebooks=(V,))
GRIDS = (Grid(4, 4), Grid(2, 4), Grid(1, 3))
Make = Callable[..., UnifiedModel]


def masked(kind: type[Masked] = Masked, **settings: object) -> Masked:
    torch.manual_seed(0)
    made = kind(LAYOUT, 32, **settings)
    made.bind(GrayLevels())
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return made


def tokens(grids: Sequence[Grid] = GRIDS, seed: int = 1) -> ImageTokens:
    rng = torch.Generator().manual_seed(seed)
    return ImageTokens(torch.randint(V, (sum(g.length for g in grids),), generator=rng), tuple(grids))


def block(grid: Grid, k: int, seed: int) -> Block:
    """One with k hidden ids."""
    n = grid.length
    return Block(grid, TokenKind.LEARNED, bidirectional=True, private=True, time=1 - k / n, seed=seed, n_targets=k)


BLOCKS = [block(g, k, s) for g, k, s in zip(GRIDS, (5, 8, 1), (5, 6, 2**62), strict=True)]


# ---- what is hidden


def test_so_many_ids_are_hidden_and_learned() -> None:
    data = tokens()
    corrupted = masked().corrupt(data, BLOCKS)
    where = (corrupted.inputs == HIDDEN).nonzero()[:, 0]
    assert [int((i == HIDDEN).sum()) for i in corrupted.inputs.split([16, 8, 3])] == [5, 8, 1]
    assert corrupted.where is not None
    assert corrupted.targets is not None
    assert torch.equal(corrupted.where, where)
    assert torch.equal(corrupted.targets, data.values[where])
    shown = corrupted.inputs != HIDDEN
    assert torch.equal(corrupted.inputs[shown], data.values[shown])
    torch.testing.assert_close(corrupted.time, torch.tensor([11 / 16, 0.0, 2 / 3]))


def test_which_are_hidden_is_the_block_s_own() -> None:
    made, data = masked(), tokens()
    together = made.corrupt(data, BLOCKS).inputs
    for i, start in enumerate((0, 16, 24)):
        alone = made.corrupt(data.select([i]), [BLOCKS[i]]).inputs
        assert torch.equal(alone, together[start : start + GRIDS[i].length])
    torch.manual_seed(123)
    assert torch.equal(made.corrupt(data, BLOCKS).inputs, together)
    others = [made.corrupt(data.select([0]), [block(GRIDS[0], 5, seed)]).inputs == HIDDEN for seed in range(200)]
    share = torch.stack(others).float().mean(0)
    assert (share - 5 / 16).abs().max() < 0.12  # every place alike


def test_a_hidden_id_is_not_read() -> None:
    made, data = masked(), tokens()
    corrupted = made.corrupt(data, BLOCKS)
    assert corrupted.where is not None
    other = data.values.clone()
    other[corrupted.where] = (other[corrupted.where] + 1) % V
    again = made.corrupt(ImageTokens(other, data.grids), BLOCKS)
    assert torch.equal(made.embed(again).values, made.embed(corrupted).values)
    assert again.targets is not None
    assert not torch.equal(again.targets, corrupted.targets)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_fall_from_all_to_none(schedule: str) -> None:
    gamma = [SCHEDULES[schedule](r) for r in np.linspace(0, 1, 101)]
    assert (gamma[0], gamma[-1]) == (1.0, pytest.approx(0.0, abs=1e-12))
    assert all(a > b for a, b in itertools.pairwise(gamma))


@pytest.mark.parametrize(("schedule", "mean"), [
    ("cosine", 2 / math.pi), ("linear", 1 / 2), ("square", 2 / 3), ("cubic", 3 / 4), ("root", 1 / 3),
])  # fmt: skip
def test_a_plan_hides_as_many_as_its_schedule_says(schedule: str, mean: float) -> None:
    made, grid, rng = masked(schedule=schedule), Grid(8, 16), np.random.default_rng(0)
    blocks = [made.plan(grid, rng)[0] for _ in range(4000)]
    counts = np.array([b.n_targets for b in blocks])
    assert counts.min() >= 1
    assert counts.max() <= 128
    assert counts.mean() / 128 == pytest.approx(mean + 0.5 / 128, abs=0.015)  # rounded up
    assert [round((1 - b.time) * 128) for b in blocks] == counts.tolist()
    for one in blocks[:20]:
        assert len(made.corrupt(tokens([grid]), [one]).targets) == one.n_targets  # type: ignore[arg-type]


def test_one_id_at_least_is_hidden() -> None:
    made = masked(schedule="cubic")
    assert {made.plan(Grid(1, 1), np.random.default_rng(s))[0].n_targets for s in range(50)} == {1}
    assert {made.plan(Grid(1, 2), np.random.default_rng(s))[0].n_targets for s in range(200)} == {1, 2}


def test_a_plan_is_a_function_of_its_generator() -> None:
    made = masked()
    (one,), (same,), (other,) = (made.plan(GRIDS[0], np.random.default_rng(s)) for s in (1, 1, 2))
    assert one == same
    assert one.seed != other.seed
    assert (one.kind, one.bidirectional, one.private, one.length) == (TokenKind.LEARNED, True, True, 16)
    (context,) = made.plan_context(GRIDS[0])
    assert (context.kind, context.bidirectional, context.private) == (TokenKind.CLEAN, True, False)
    assert (context.time, context.n_targets) == (1.0, 0)
    clean = made.context(tokens())
    assert torch.equal(clean.inputs, tokens().values)
    assert clean.targets is None


# ---- what is learned


@pytest.mark.parametrize("inputs", ["ids", "codes"])
def test_every_hidden_id_reads_the_same(inputs: str) -> None:
    made = masked(inputs=inputs)
    corrupted = made.corrupt(tokens(), BLOCKS)
    rows = []
    for i in corrupted.inputs.tolist():
        read = torch.tensor(i) if inputs == "ids" else torch.tensor([i / 7.5 - 1])
        rows.append(made.hidden if i == HIDDEN else made.embedding(read))
    torch.testing.assert_close(made.embed(corrupted).values, torch.stack(rows), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("weighting", ["hidden", "bound"])
def test_the_loss_is_of_hidden_ids_alone(weighting: str) -> None:
    """The slow way, one id at a time: value, count and every gradient."""
    made, data = masked(weighting=weighting).double(), tokens()
    corrupted = made.corrupt(data, BLOCKS)
    hidden = torch.randn(27, 32, dtype=torch.float64, requires_grad=True)
    term = made.loss(hidden, Embeddings(hidden), corrupted)["image"]
    total, shares = torch.zeros((), dtype=torch.float64), [5 / 16] * 16 + [1.0] * 8 + [1 / 3] * 3
    for i, (state, read) in enumerate(zip(hidden, corrupted.inputs.tolist(), strict=True)):
        if read == HIDDEN:
            weight = 1 / shares[i] if weighting == "bound" else 1.0
            total = total + weight * F.cross_entropy(made.head(state), data.values[i])
    assert term.count == (14 if weighting == "hidden" else 27)
    torch.testing.assert_close(term.sum, total, atol=1e-6, rtol=1e-6)  # times are in fp32
    leaves = [hidden, *made.head.parameters()]
    slow = torch.autograd.grad(total, leaves)
    for got, expected in zip(torch.autograd.grad(term.sum, leaves), slow, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)
    assert torch.equal(slow[0].abs().sum(-1) > 0, corrupted.inputs == HIDDEN)


@pytest.mark.parametrize("weighting", ["hidden", "bound"])
def test_a_plan_knows_what_the_loss_will_count(weighting: str) -> None:
    made = masked(weighting=weighting)
    blocks = [made.plan(g, np.random.default_rng(i))[0] for i, g in enumerate(GRIDS)]
    corrupted = made.corrupt(tokens(), blocks)
    hidden = torch.randn(27, 32)
    assert made.loss(hidden, Embeddings(hidden), corrupted)["image"].count == sum(b.n_targets for b in blocks)


def test_the_bound_is_what_all_ids_cost() -> None:
    """Where states do not depend on what is hidden, every number of hidden ids gives the whole cost on average."""
    made, grid = masked(weighting="bound"), Grid(1, 3)
    data, hidden = tokens([grid]), torch.randn(3, 32)
    whole = F.cross_entropy(made.head(hidden), data.values, reduction="sum").item()
    for k in (1, 2, 3):
        found = {}
        for seed in range(60):
            corrupted = made.corrupt(data, [block(grid, k, seed)])
            assert corrupted.where is not None
            found[tuple(corrupted.where.tolist())] = made.loss(hidden, Embeddings(hidden), corrupted)["image"]
        assert sorted(found) == list(itertools.combinations(range(3), k))
        assert {term.count for term in found.values()} == {3}
        assert np.mean([term.sum.item() for term in found.values()]) == pytest.approx(whole, rel=1e-5)
    linear = masked(schedule="linear")  # makes these numbers equally likely
    ks = [linear.plan(grid, np.random.default_rng(s))[0].n_targets for s in range(3000)]
    assert np.bincount(ks)[1:] / 3000 == pytest.approx([1 / 3] * 3, abs=0.03)


@pytest.mark.parametrize("weighting", ["hidden", "bound"])
def test_no_images_are_an_exact_zero(weighting: str) -> None:
    made, none = masked(weighting=weighting), ImageTokens(torch.empty(0, dtype=torch.long), ())
    corrupted = made.corrupt(none, [])
    embedded = made.embed(corrupted)
    loss = made.loss(embedded.values, embedded, corrupted)["image"]
    assert (loss.sum.detach().item(), loss.count) == (0.0, 0)
    loss.sum.backward()
    assert all(p.grad is not None and not p.grad.any() for p in made.parameters())


def test_what_the_model_counts_is_what_was_announced(make: Make) -> None:
    for generator in ("masked", "bound", "parallel"):
        model = make(generator)
        documents = [Document((Part("seven", learn=False), Part(picture(i)))) for i in range(3)]
        p = pack([model.sequencer.document(d, (0, i)) for i, d in enumerate(documents)],
                 model.backbone.config.experts, model.generator.reads)  # fmt: skip
        with torch.no_grad():
            assert model(p)["image"].count == p.counts["image"]
        assert (p.counts["image"] == 48) == (generator == "bound")


# ---- how many stay


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_counts_follow_the_schedule_where_there_is_room(schedule: str) -> None:
    published = [math.floor(SCHEDULES[schedule](i / 8) * 1024) for i in range(1, 9)]
    assert remaining(SCHEDULES[schedule], 1024, 8) == published
    assert remaining(SCHEDULES["linear"], 10, 5) == [8, 6, 4, 2, 0]  # floats come to a little less than 2
    for n, steps in itertools.product(range(20), range(1, 24)):
        left = [n, *remaining(SCHEDULES[schedule], n, steps)]
        shown = [a - b for a, b in itertools.pairwise(left)]
        assert len(shown) == steps
        assert left[-1] == 0
        assert min(shown) >= (1 if steps <= n else 0)
        assert steps < n or max(shown) <= 1


def test_the_least_of_each_image() -> None:
    scores = torch.tensor([3.0, 1.0, 2.0, 1.0, 9.0, 8.0, 7.0])
    assert least(scores, [4, 3], [2, 1]).tolist() == [False, True, False, True, False, False, True]
    assert least(scores, [4, 3], [1, 0]).tolist() == [False, True, False, False, False, False, False]
    assert least(scores, [4, 3], [4, 3]).all()


# ---- sampling


def picture(seed: int, height: int = 8, width: int = 8) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


class Counted:
    """A session that counts what is asked of the network, and of how many branches."""

    def __init__(self, session: Session) -> None:
        self.session, self.widths = session, list[int | None]()

    @property
    def branches(self) -> int:
        return self.session.branches

    @property
    def last(self) -> torch.Tensor:
        return self.session.last

    def peek(self, embeddings: Embeddings, blocks: Sequence[Block], branches: int | None = None) -> torch.Tensor:
        self.widths.append(branches)
        return self.session.peek(embeddings, blocks, branches)

    def append(self, embeddings: Embeddings, blocks: Sequence[Block]) -> torch.Tensor:
        raise AssertionError("masked appends nothing")

    def rows(self, indices: Sequence[int]) -> "Counted":
        return Counted(self.session.rows(indices))


def scores(model: UnifiedModel, session: Session, ids: Sequence[int], grid: Grid, scale: float) -> torch.Tensor:
    """Guided logits of every id of one image, some of them hidden."""
    read = Corrupted(torch.tensor(ids), torch.zeros(1), (grid,))
    with torch.no_grad():
        hidden = session.peek(model.generator.embed(read), [block(grid, 1, 0)])  # (G, n, C)
        if model.generator.reads == "previous":
            hidden = torch.cat([session.last, hidden[:, :-1]], dim=1)
        out = model.generator.logits(hidden)
    return out[1] + scale * (out[0] - out[1]) if len(out) == 2 else out[0]


@pytest.mark.parametrize("steps", [1, 2, 7, 16])
@pytest.mark.parametrize("guided", [False, True])
def test_steps_are_network_evaluations(make: Make, steps: int, guided: bool) -> None:
    model = make("masked")
    session = Counted(begun(model, ["seven"], guided))
    settings = MaskedSettings(guidance=3.0 if guided else 1.0, steps=steps, interval=(0.0, 0.5))
    states = sampled(session, model, [Grid(4, 4)], settings, [0])
    assert len(session.widths) == len(states) == steps
    assert session.widths == [2 if guided and i / steps <= 0.5 else 1 for i in range(steps)]
    for state in states:  # previews too are images
        assert state.values.shape == (16,)
        assert state.values.dtype == torch.long
        assert 0 <= state.values.min() <= state.values.max() < V


@pytest.mark.parametrize("generator", ["masked", "parallel"])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_one_step_draws_every_id_by_itself(make: Make, generator: str, scale: float) -> None:
    model = make(generator).double()
    settings = MaskedSettings(guidance=scale, steps=1, temperature=0.8, top_k=9, top_p=0.9)
    (final,) = sampled(begun(model, ["seven"], scale != 1), model, [Grid(4, 4)], settings, [11])
    logits = scores(model, begun(model, ["seven"], scale != 1), [HIDDEN] * 16, Grid(4, 4), scale)
    rng = torch.Generator().manual_seed(11)
    assert final.values.tolist() == [int(choose(row[None], [rng], 0.8, 9, 0.9)) for row in logits]


@pytest.mark.parametrize("generator", ["masked", "parallel"])
@pytest.mark.parametrize("heat", [0.0, 3.0])
def test_steps_by_hand(make: Make, generator: str, heat: float) -> None:
    """Draw all, keep the surest, in plain Python; the noise on what is sure falls linearly: 3/4, 1/2, 1/4 of it, none."""
    model, grid, n, steps = make(generator).double(), Grid(4, 4), 16, 4
    settings = MaskedSettings(guidance=2.0, steps=steps, choice_temperature=heat)
    states = sampled(begun(model, ["seven"], True), model, [grid], settings, [11])
    session, rng, ids = begun(model, ["seven"], True), torch.Generator().manual_seed(11), [HIDDEN] * n
    for i, left in enumerate([math.floor(math.cos(math.pi / 2 * s / 4) * n) for s in (1, 2, 3, 4)]):
        logits = scores(model, session, ids, grid, 2.0)
        drawn = [int(choose(row[None], [rng], 1.0)) for row in logits]
        sure = [float(row.log_softmax(-1)[d]) for row, d in zip(logits, drawn, strict=True)]
        if heat and i < steps - 1:
            noise = torch.rand(n, generator=rng, dtype=torch.float64)
            tau = heat * (0.75, 0.5, 0.25)[i]
            sure = [s - tau * math.log(-math.log(u)) for s, u in zip(sure, noise.tolist(), strict=True)]
        whole = [d if old == HIDDEN else old for d, old in zip(drawn, ids, strict=True)]
        assert states[i].values.tolist() == whole
        hidden = sorted((j for j in range(n) if ids[j] == HIDDEN), key=lambda j: sure[j])[:left]
        ids = [HIDDEN if j in hidden else whole[j] for j in range(n)]
    assert HIDDEN not in ids
    assert states[-1].values.tolist() == ids


@pytest.mark.parametrize("generator", ["masked", "parallel"])
def test_an_image_does_not_depend_on_its_neighbours(make: Make, generator: str) -> None:
    model = make(generator).double()
    settings = MaskedSettings(guidance=2.0, steps=4, top_k=12, top_p=0.9)
    prompts, grids, seeds = ["a handwritten seven", "three", ""], [Grid(4, 4), Grid(2, 4), Grid(4, 4)], [3, 4, 5]
    together = sampled(begun(model, prompts, True), model, grids, settings, seeds)[-1].split()
    for i, one in enumerate(together):
        alone = sampled(begun(model, prompts[i : i + 1], True), model, grids[i : i + 1], settings, seeds[i : i + 1])
        assert torch.equal(one.values, alone[-1].values)
    again = sampled(begun(model, prompts, True), model, grids, settings, [3, 4, 6])[-1].split()
    assert torch.equal(again[1].values, together[1].values)
    assert not torch.equal(again[2].values, together[2].values)


def test_temperature_zero_leaves_nothing_to_chance(make: Make) -> None:
    model = make("masked").double()

    def drawn(seed: int, **settings: float) -> list[int]:
        chosen = MaskedSettings(steps=4, **settings)  # type: ignore[arg-type]
        return sampled(begun(model, ["seven"]), model, [Grid(4, 4)], chosen, [seed])[-1].values.tolist()

    assert drawn(1, temperature=0.0) == drawn(2, temperature=0.0, choice_temperature=9.0)
    assert drawn(1, temperature=0.0) == drawn(3, top_k=1, choice_temperature=0.0)
    assert drawn(1) != drawn(2)


@pytest.mark.parametrize("share", [0.0, 0.4, 0.9, 1.0])
def test_given_ids_are_kept_and_read(make: Make, share: float) -> None:
    model, grids = make("masked").double(), [Grid(4, 4), Grid(2, 4)]
    given, settings = tokens(grids, seed=3), MaskedSettings(steps=5, temperature=0.0)
    mask = torch.rand(24, generator=torch.Generator().manual_seed(0)) < share
    prompts = ["seven", "three"]
    states = sampled(begun(model, prompts), model, grids, settings, [0, 1], Known(given, mask))
    assert len(states) == 5
    for state in states:
        assert torch.equal(state.values[mask], given.values[mask])
    free = sampled(begun(model, prompts), model, grids, settings, [0, 1])[-1].values
    if share == 0:
        assert torch.equal(states[-1].values, free)
    if share == 0.4:  # the first step reads them already
        read = [i if m else HIDDEN for i, m in zip(given.values.tolist(), mask.tolist(), strict=True)]
        first = scores(model, begun(model, prompts[:1]), read[:16], grids[0], 1.0).argmax(-1)
        assert torch.equal(states[0].values[:16][~mask[:16]], first[~mask[:16]])
        assert not torch.equal(states[-1].values[~mask], free[~mask])


# ---- a model that has learned the next id


def test_a_model_of_next_ids_goes_on_in_parallel(make: Make) -> None:
    """Its weights fit; what it reads as context stays as it was, and so does what it says first."""
    learned, model = make("autoregressive").double(), make("parallel").double()
    lacking = model.load_state_dict(learned.state_dict(), strict=False)
    assert (lacking.missing_keys, lacking.unexpected_keys) == (["generator.hidden"], [])
    grid, image = Grid(4, 4), tokens([Grid(4, 4)])
    ids = (model.text.special.eoi, *model.text.encode("three"))
    states = []
    for one in (learned, model):
        session, generator = begun(one, ["seven"]), one.generator
        with torch.no_grad():
            no_codes = torch.empty(*session.last.shape[:2], 0, dtype=torch.long)
            said = isinstance(generator, Autoregressive)
            first = generator.head.logits(session.last, no_codes) if said else generator.logits(session.last)
            hidden = session.append(generator.embed(generator.context(image)), generator.plan_context(grid))
            session.append_text([Run(ids, (False,) * len(ids))])
        states.append((first, hidden, session.last))
    for ours, theirs in zip(*states, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)
    first = scores(model, begun(model, ["seven"]), [HIDDEN] * 16, grid, 1.0)[0]
    torch.testing.assert_close(first, states[0][0][0, 0], atol=1e-12, rtol=1e-12)
    assert isinstance(learned.generator, Autoregressive)
    assert (ParallelNext.reads, ParallelNext.repeats) == ("previous", True)


# ---- refusals


def test_settings_that_mean_nothing_are_refused(make: Make) -> None:
    for settings, message in (
        ({"steps": 0}, "steps: expected 1 or more, got 0"),
        ({"temperature": -1.0}, "temperature: .* got -1"),
        ({"top_p": 0.0}, "top_p: .* got 0"),
        ({"choice_temperature": -0.5}, r"choice_temperature: .* got -0\.5"),
    ):
        with pytest.raises(ValueError, match=message):
            MaskedSettings(**settings)  # type: ignore[arg-type]
    model = make("masked")
    with pytest.raises(ValueError, match=r"steps: expected at most one an id \(8\), got 9"):
        sampled(begun(model, ["a", "b"]), model, GRIDS[:2], MaskedSettings(steps=9), [0, 1])
    with pytest.raises(ValueError, match="sampling: expected MaskedSettings, got FlowSettings"):
        sampled(begun(model, ["a"]), model, GRIDS[:1], FlowSettings(), [0])  # type: ignore[arg-type]


def test_what_it_cannot_learn_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="tokenizer: Masked takes discrete or sequence tokens, got continuous"):
        Masked(TokenLayout("continuous", dim=12, stride=2), 32)
    with pytest.raises(ValueError, match="tokenizer: Masked learns one codebook, got 2"):
        Masked(replace(LAYOUT, codebooks=(V, V)), 32)
    with pytest.raises(ValueError, match=r"schedule: expected one of cosine, linear, .* got sine"):
        masked(schedule="sine")


# ---- learning


@pytest.mark.parametrize("generator", ["masked", "parallel"])
def test_overfits_four_images(make: Make, generator: str) -> None:
    """Each of four captions gives the very ids of its image, in two steps."""
    model = make(generator, learn_end=False, drop_text=0.0, context_length=96)
    words = ["one", "two", "three", "four"]
    noise = [np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8) for i in range(4)]
    learned = [Document((Part(w, learn=False), Part(Image.fromarray(p)))) for w, p in zip(words, noise, strict=True)]
    steps = 160
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
    image = MaskedSettings(steps=2, temperature=0.0)
    settings = DecodingSettings(start="image", max_tokens=0, max_images=1, image=image)
    drawn = decode(model, prompts, settings, [1, 2, 3, 4])
    expected = model.tokenizer.encode(to_tensor(noise)).values
    got = model.tokenizer.encode(to_tensor([np.asarray(d.images[0]) for d in drawn])).values
    assert torch.equal(got, expected)
