"""Quantizers against vector-quantize-pytorch, or against their formulas written out without regard to memory."""

from typing import Any

import pytest
import torch
import vector_quantize_pytorch as library
from torch import Tensor
from torch.nn import functional as F

from unimodal_tokenizers.quantizers import (
    BSQ,
    FSQ,
    IBQ,
    LFQ,
    EuclideanQuantizer,
    MovingAverageQuantizer,
    Quantizer,
    ResidualQuantizer,
    SimVQ,
    SubCodebooks,
    VectorQuantizer,
    codebook_usage,
    search,
)
from unimodal_tokenizers.quantizers.binary import bit_entropy, mean_code_probability


def some(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture
def in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven vectors at a time, for 32 entries in double precision."""
    monkeypatch.setattr(search, "HOST_BYTES", 7 * 32 * 8)


# FSQ


@pytest.mark.parametrize("levels", [[8, 5, 5, 5], [7, 4, 3], [3]])
def test_fsq_is_the_library_s(levels: list[int]) -> None:
    ours, theirs = FSQ(levels), library.FSQ(levels)
    z = 3 * some(0, 500, len(levels), dtype=torch.float32)
    a, b = z.clone().requires_grad_(), z.clone().requires_grad_()
    result, (quantized, ids) = ours(a), theirs(b[None])
    torch.testing.assert_close(result.quantized, quantized[0])
    assert torch.equal(result.ids, ids[0].long())
    g = some(1, *z.shape, dtype=torch.float32)
    (result.quantized * g).sum().backward()
    (quantized[0] * g).sum().backward()
    torch.testing.assert_close(a.grad, b.grad)
    every = torch.arange(ours.codebooks[0])
    torch.testing.assert_close(ours.ids_to_vectors(every), theirs.indices_to_codes(every[None])[0])


def test_fsq_reaches_every_code_and_keeps_zero() -> None:
    quantizer = FSQ([5, 4, 3])
    assert codebook_usage(quantizer(2 * some(0, 5000, 3)).counts) == 1
    assert torch.equal(quantizer(torch.zeros(1, 3)).quantized, torch.zeros(1, 3))


# LFQ and BSQ


@pytest.mark.parametrize("codebooks", [1, 2])
def test_lfq_is_the_library_s(codebooks: int) -> None:
    ours = LFQ(bits=6, codebooks=codebooks, temperature=4.0, diversity=0.7)
    theirs = library.LFQ(
        codebook_size=2 ** (6 // codebooks), num_codebooks=codebooks, entropy_loss_weight=0.1, commitment_loss_weight=0.25,
        diversity_gamma=0.7,
    )  # fmt: skip
    z = some(0, 300, 6, dtype=torch.float32)
    a, b = z.clone().requires_grad_(), z.clone().requires_grad_()
    result = ours(a)
    (quantized, ids, loss), parts = theirs(b[None], inv_temperature=1 / 4.0, return_loss_breakdown=True)
    assert torch.equal(result.quantized, quantized[0])
    assert torch.equal(result.ids, ids[0].long())
    assert torch.equal(ours.ids_to_vectors(result.ids), theirs.indices_to_codes(ids)[0])
    torch.testing.assert_close(
        result.terms["entropy"], parts.per_sample_entropy - 0.7 * parts.batch_entropy, rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(result.terms["commitment"], parts.commitment)
    (0.1 * result.terms["entropy"] + 0.25 * result.terms["commitment"]).backward()
    loss.backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-6)


def test_bsq_is_the_library_s_but_for_the_entropy_of_all() -> None:
    z = some(0, 300, 5, dtype=torch.float32)
    ours, theirs = BSQ(bits=5, temperature=0.2), library.LFQ(codebook_size=32, spherical=True)
    result = ours(z)
    (quantized, ids, _), parts = theirs(z[None], inv_temperature=5.0, return_loss_breakdown=True)
    torch.testing.assert_close(result.quantized, quantized[0])
    torch.testing.assert_close(result.quantized.norm(dim=-1), torch.ones(300))
    assert torch.equal(result.ids, ids[0].long())
    torch.testing.assert_close(ours.ids_to_vectors(result.ids), theirs.indices_to_codes(ids)[0])
    u = F.normalize(z, dim=-1)
    p = torch.stack([(-(u + 5**-0.5).square() / 0.2).exp(), (-(u - 5**-0.5).square() / 0.2).exp()])
    p = p / p.sum(0)  # (2, P, 5): of both values of every bit
    together = -(p.mean(1) * p.mean(1).log()).sum()
    torch.testing.assert_close(result.terms["entropy"], parts.per_sample_entropy - together, rtol=1e-4, atol=1e-5)
    assert together > parts.batch_entropy  # an upper bound


@pytest.mark.parametrize("bits", [1, 2, 5])
def test_the_mean_probability_of_codes_without_the_matrix(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "HOST_BYTES", 200)
    z, g = some(0, 23, bits), some(1, 2**bits)
    a, b = z.clone().requires_grad_(), z.clone().requires_grad_()
    codes = torch.tensor([[1.0 if k >> (bits - 1 - i) & 1 else -1.0 for i in range(bits)] for k in range(2**bits)])
    slow = (-torch.cdist(b, codes.double()).square()).softmax(-1)
    p = mean_code_probability(4 * a)
    torch.testing.assert_close(p, slow.mean(0))
    torch.testing.assert_close(bit_entropy(4 * a).sum(-1), -(slow * slow.log()).sum(-1))
    for loss in ((p * g).sum(), (slow.mean(0) * g).sum()):
        loss.backward()
    torch.testing.assert_close(a.grad, b.grad)


def test_certain_bits_have_finite_gradients() -> None:
    for quantizer in (LFQ(bits=4), BSQ(bits=4)):
        z = (100 * some(0, 8, 4, dtype=torch.float32)).abs().requires_grad_()  # all choose one code, for sure
        quantizer(z).terms["entropy"].backward()
        assert z.grad is not None
        assert z.grad.isfinite().all()


@pytest.mark.parametrize("quantizer", [LFQ(3), BSQ(3)], ids=["lfq", "bsq"])
def test_a_channel_of_zero_is_a_bit_of_zero(quantizer: LFQ | BSQ) -> None:
    result = quantizer(torch.tensor([[0.0, 1.0, -0.0]]))
    assert result.ids.tolist() == [0b010]
    assert torch.equal(result.quantized.sign(), torch.tensor([[-1.0, 1.0, -1.0]]))
    assert torch.equal(quantizer.ids_to_vectors(result.ids), result.quantized)


def test_bits_beyond_any_codebook_are_several_codebooks() -> None:
    quantizer = BSQ(bits=36, codebooks=3)
    ids = quantizer(some(0, 10, 36)).ids
    assert quantizer.codebooks == (4096,) * 3
    assert ids.shape == (10, 3)
    torch.testing.assert_close(quantizer.double().ids_to_vectors(ids), some(0, 10, 36).sign() / 6)


# SimVQ and IBQ


def test_simvq_is_the_library_s() -> None:
    torch.manual_seed(0)
    ours, theirs = SimVQ(32, 4), library.SimVQ(dim=4, codebook_size=32, rotation_trick=False)
    with torch.no_grad():
        theirs.frozen_codebook.copy_(ours.entries)
        theirs.code_transform.weight.copy_(ours.map.weight)
    z = some(0, 100, 4, dtype=torch.float32)
    result, (quantized, ids, loss) = ours(z), theirs(z[None])
    torch.testing.assert_close(result.quantized, quantized[0])
    assert torch.equal(result.ids, ids[0])
    mine = (result.terms["codebook"] + 0.25 * result.terms["commitment"]) / 4  # theirs is a mean over channels
    torch.testing.assert_close(mine, loss)
    mine.backward()
    loss.backward()
    torch.testing.assert_close(ours.map.weight.grad, theirs.code_transform.weight.grad)


def test_one_choice_moves_every_code_of_simvq() -> None:
    quantizer = SimVQ(32, 4)
    before = quantizer.say(torch.arange(32)).detach()
    quantizer(some(0, 1, 4, dtype=torch.float32)).terms["codebook"].backward()
    with torch.no_grad():
        quantizer.map.weight -= 0.1 * quantizer.map.weight.grad
    assert ((quantizer.say(torch.arange(32)) - before).abs().sum(-1) > 1e-6).all()


@pytest.mark.usefixtures("in_parts")
def test_ibq_by_its_formulas() -> None:
    quantizer = IBQ(32, 4, temperature=0.5, diversity=0.7).double()
    with torch.no_grad():
        quantizer.codebook.weight.mul_(1 + some(2, 32, 1).abs())
    z, g = some(0, 40, 4), some(1, 40, 4)
    a, b = z.clone().requires_grad_(), z.clone().requires_grad_()
    result = quantizer(a)
    codes = quantizer.codebook.weight.detach().clone().requires_grad_()
    logits = b @ codes.T
    soft = logits.softmax(-1)
    hard = F.one_hot(logits.argmax(-1), 32).double()
    z_q, chosen = (hard - soft.detach() + soft) @ codes, hard @ codes
    p = (logits / 0.5).softmax(-1)
    slow = {
        "double": (z_q - b).square().mean(),
        "commitment": (chosen.detach() - b).square().mean(),
        "codebook": (chosen - b.detach()).square().mean(),
        "entropy": -(p * p.log()).sum(-1).mean() + 0.7 * (p.mean(0) * p.mean(0).log()).sum(),
    }
    assert torch.equal(result.ids, logits.argmax(-1))
    torch.testing.assert_close(result.quantized, z_q)
    for name, term in slow.items():
        torch.testing.assert_close(result.terms[name], term)
    both = ((result.quantized, result.terms), (z_q, slow))
    for quantized, terms in both:
        ((quantized * g).sum() + sum(w * terms[n] for n, w in quantizer.weights.items())).backward()
    torch.testing.assert_close(a.grad, b.grad)
    torch.testing.assert_close(quantizer.codebook.weight.grad, codes.grad)
    assert (codes.grad.abs().sum(-1) > 0).all()  # every code learns, chosen or not


# Moving averages


def test_moving_averages_by_hand() -> None:
    quantizer = MovingAverageQuantizer(6, 2, decay=0.8, revive_after=1000).double()
    quantizer.idle.zero_()
    codes, mass, sums = quantizer.codes.clone(), torch.zeros(6).double(), torch.zeros(6, 2).double()
    for step in range(5):
        z = some(step, 30, 2)
        result = quantizer(z)
        chosen = torch.cdist(z, codes).argmin(-1)
        assert torch.equal(result.ids, chosen)
        torch.testing.assert_close(quantizer.codes, codes)  # a pass alone moves nothing
        quantizer.after_step()
        for k in range(6):
            mass[k] = 0.8 * mass[k] + 0.2 * (chosen == k).sum()
            sums[k] = 0.8 * sums[k] + 0.2 * z[chosen == k].sum(0)
            if mass[k] > 0:
                codes[k] = sums[k] / mass[k]
        torch.testing.assert_close(quantizer.codes, codes)
        torch.testing.assert_close(quantizer.mass, mass)


def test_accumulated_batches_are_one_large_batch() -> None:
    whole, parts = (MovingAverageQuantizer(16, 3, revive_after=2).double() for _ in range(2))
    for step in range(5):
        z = some(step, 24, 3)
        whole(z)
        for part in z.chunk(3):
            parts(part)
        for quantizer in (whole, parts):
            quantizer.after_step()
    for key, value in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[key], value)
    assert (whole.idle > 0).any()


def test_the_first_step_fills_the_codebook_and_dead_entries_become_vectors() -> None:
    quantizer, z = MovingAverageQuantizer(16, 3, revive_after=2), some(0, 40, 3, dtype=torch.float32)
    quantizer(z)
    quantizer.after_step()
    assert codebook_usage(quantizer(z).counts) > 0.8
    quantizer.after_step()
    near = z[torch.cdist(z, z[:1]).squeeze(-1).argsort()[:4]]
    for _ in range(3):
        quantizer(near)
        quantizer.after_step()
    dead = torch.cdist(quantizer.codes, near).min(-1).values
    assert (dead < 1e-5).sum() >= 4  # so many vectors, each once


def test_a_vector_that_overflowed_does_not_stay_in_the_codebook() -> None:
    whole, spoilt = (MovingAverageQuantizer(8, 3) for _ in range(2))
    for step in range(3):
        z = some(step, 40, 3, dtype=torch.float32)
        whole(z)
        bad = torch.tensor([[torch.inf, 0.0, 0.0], [torch.nan, 1.0, 0.0], [0.0, -torch.inf, 1.0]])
        spoilt(torch.cat([z, bad]) if step else z)  # the first step draws the codebook from all there are
        whole.after_step()
        spoilt.after_step()
    for name in ("codes", "mass"):
        torch.testing.assert_close(getattr(spoilt, name), getattr(whole, name))


def test_a_revived_entry_has_no_past() -> None:
    quantizer = MovingAverageQuantizer(4, 2, revive_after=2)
    quantizer.codes.copy_(torch.tensor([[9.0, 9.0], [-9.0, -9.0], [9.0, -9.0], [-9.0, 9.0]]))
    quantizer.mass.fill_(5.0)
    quantizer.idle.zero_()
    for _ in range(2):
        quantizer(torch.tensor([[8.0, 8.0], [7.0, 7.0], [8.0, 7.0]]))
        quantizer.after_step()
    assert quantizer.mass[0] > 4
    assert torch.equal(quantizer.mass[1:], torch.zeros(3))
    assert torch.equal(quantizer.idle, torch.zeros(4, dtype=torch.int64))


# Several codebooks


def test_sub_codebooks_quantize_slices() -> None:
    quantizer = SubCodebooks(EuclideanQuantizer(16, 3), 2).double().eval()
    with torch.no_grad():
        quantizer.quantizers[1].codebook.weight += 0.1  # type: ignore[union-attr,operator]
    z = some(0, 30, 6)
    result = quantizer(z)
    slices = [inner(part) for inner, part in zip(quantizer.quantizers, z.chunk(2, -1), strict=True)]
    assert torch.equal(result.quantized, torch.cat([part.quantized for part in slices], -1))
    assert torch.equal(result.ids, torch.stack([part.ids for part in slices], 1))
    assert torch.equal(result.counts, torch.stack([part.counts for part in slices]))
    torch.testing.assert_close(result.terms["commitment"], (z - result.quantized).square().sum(-1).mean())


# Bad input


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: FSQ([]), r"levels: expected at least 3 of each channel .* got \[\]"),
        (lambda: FSQ([8, 2]), r"levels: expected at least 3 of each channel \(LFQ has 2\) .* got \[8, 2\]"),
        (lambda: FSQ([64] * 5), "levels: .* at most 16777216 entries"),
        (lambda: LFQ(0), "bits: expected a multiple of codebooks, of at most 24 bits each, got 0 bits for 1"),
        (lambda: LFQ(25), "bits: .* got 25 bits for 1"),
        (lambda: LFQ(6, codebooks=4), "bits: .* got 6 bits for 4"),
        (lambda: LFQ(6, temperature=0.0), "temperature: expected above 0, got 0"),
        (lambda: BSQ(1), "bits: expected at least 2"),
        (lambda: SimVQ(1, 4), "entries: expected between 2 and 16777216, got 1"),
        (lambda: SimVQ(4, 0), "dim: expected at least 1 channel, got 0"),
        (lambda: IBQ(4, 4, temperature=-1.0), "temperature: expected above 0, got -1"),
        (lambda: MovingAverageQuantizer(4, 4, decay=1.0), "decay: expected at least 0 and below 1, got 1"),
        (lambda: MovingAverageQuantizer(4, 4, revive_after=0), "revive_after: expected at least 1 step, got 0"),
        (lambda: SubCodebooks(VectorQuantizer(4, 4), 1), "codebooks: expected at least 2"),
        (lambda: SubCodebooks(ResidualQuantizer(4, 2, 4), 2), "quantizer: expected one with one codebook, got 2"),
    ],
)
def test_settings_that_cannot_be_are_refused(make: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()


def test_slices_that_learn_without_gradients_move_after_a_step() -> None:
    both, z = SubCodebooks(MovingAverageQuantizer(8, 2), 2), some(0, 40, 4, dtype=torch.float32)
    before = both.ids_to_vectors(torch.arange(8).repeat(2, 1).T)
    both(z)
    both.after_step()
    after = both.ids_to_vectors(torch.arange(8).repeat(2, 1).T)
    assert not torch.equal(before, after)
    for one, part in zip(after.chunk(2, dim=1), z.chunk(2, dim=1), strict=True):
        alone = MovingAverageQuantizer(8, 2)
        alone(part)
        alone.after_step()
        assert torch.equal(alone.codes, one)


# What a term may move


@pytest.mark.parametrize(
    "quantizer",
    [
        VectorQuantizer(16, 4), EuclideanQuantizer(16, 4), SimVQ(16, 4), MovingAverageQuantizer(16, 4), LFQ(4),
        IBQ(16, 4, temperature=1.0), SubCodebooks(EuclideanQuantizer(16, 2), 2), ResidualQuantizer(16, 2, 4),
    ],
    ids=lambda quantizer: type(quantizer).__name__,
)  # fmt: skip
def test_commitment_moves_vectors_and_the_codebook_term_moves_codes(quantizer: Quantizer) -> None:
    z = F.normalize(some(0, 30, 4), dim=-1).requires_grad_()
    terms = quantizer.double().eval()(z).terms
    learned = [parameter for parameter in quantizer.parameters() if parameter.requires_grad]
    (moved,) = torch.autograd.grad(terms["commitment"], z, retain_graph=True)
    assert moved.any()
    if "codebook" in terms:
        (still,) = torch.autograd.grad(terms["codebook"], z, retain_graph=True, allow_unused=True)
        assert still is None or not still.any()
        assert torch.cat(
            [g.flatten() for g in torch.autograd.grad(terms["codebook"], learned, retain_graph=True)]
        ).any()
    for gradient in torch.autograd.grad(terms["commitment"], learned, allow_unused=True) if learned else []:
        assert gradient is None or not gradient.any()


def test_terms_weigh_what_their_papers_say() -> None:
    for quantizer in (VectorQuantizer(16, 4), EuclideanQuantizer(16, 4), SimVQ(16, 4), ResidualQuantizer(16, 2, 4)):
        assert quantizer.weights == {"codebook": 1.0, "commitment": 0.25}
    assert MovingAverageQuantizer(16, 4).weights == {"commitment": 0.25}
    assert SubCodebooks(VectorQuantizer(16, 4), 2).weights == {"codebook": 1.0, "commitment": 0.25}
    assert IBQ(16, 4).weights == {"double": 1.0, "commitment": 1.0, "codebook": 0.25, "entropy": 0.05}


def test_ibq_begins_with_codes_that_are_all_chosen() -> None:
    """Largest products prefer long codes: of random lengths, few would be chosen, and the others never learn."""
    quantizer = IBQ(256, 8)
    assert codebook_usage(quantizer(some(0, 20_000, 8, dtype=torch.float32)).counts) > 0.99
    torch.testing.assert_close(quantizer.codebook.weight.norm(dim=-1), torch.ones(256))


# Against the library's vector quantizers: ours differ in what the project needs of them (search in parts, one move a step)


@pytest.mark.parametrize("cosine", [False, True])
def test_the_nearest_code_is_the_library_s(cosine: bool) -> None:
    ours = (VectorQuantizer if cosine else EuclideanQuantizer)(32, 4).eval()
    theirs = library.VectorQuantize(4, 32, use_cosine_sim=cosine, freeze_codebook=True, kmeans_init=False).eval()
    codes = F.normalize(ours.codebook.weight.detach(), dim=-1) if cosine else ours.codebook.weight.detach()
    theirs._codebook.embed.copy_(codes[None])
    z = some(0, 200, 4, dtype=torch.float32)
    quantized, ids, _ = theirs(z[None])
    assert torch.equal(ours(z).ids, ids[0])
    torch.testing.assert_close(ours(z).quantized, quantized[0])


def test_codes_that_move_are_the_library_s_without_its_smoothing() -> None:
    ours = MovingAverageQuantizer(8, 4, decay=0.9, revive_after=100).train()
    theirs = library.VectorQuantize(4, 8, decay=0.9, kmeans_init=False, eps=1e-12, threshold_ema_dead_code=0).train()
    start = some(0, 8, 4, dtype=torch.float32)
    ours.codes.copy_(start)
    ours.mass.fill_(1.0)
    ours.idle.zero_()
    theirs._codebook.embed.copy_(start[None])
    theirs._codebook.embed_avg.copy_(start[None])
    theirs._codebook.cluster_size.fill_(1.0)
    for step in range(5):
        z = some(step + 1, 300, 4, dtype=torch.float32)
        result, (quantized, ids, _) = ours(z), theirs(z[None])
        assert torch.equal(result.ids, ids[0])
        torch.testing.assert_close(result.quantized, quantized[0])
        ours.after_step()
        torch.testing.assert_close(ours.codes, theirs._codebook.embed[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.mass, theirs._codebook.cluster_size[0])


def test_residuals_are_the_library_s() -> None:
    ours = ResidualQuantizer(32, codebooks=3, dim=4).eval()
    theirs = library.ResidualVQ(
        dim=4, codebook_size=32, num_quantizers=3, freeze_codebook=True, kmeans_init=False
    ).eval()
    for mine, layer in zip(ours.quantizers, theirs.layers, strict=True):
        layer._codebook.embed.copy_(mine.codebook.weight.detach()[None])
    z = some(0, 200, 4, dtype=torch.float32)
    quantized, ids, _ = theirs(z[None])
    assert torch.equal(ours(z).ids, ids[0])
    torch.testing.assert_close(ours(z).quantized, quantized[0])
