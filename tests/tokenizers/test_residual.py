"""Multi-scale and residual quantization: against the algorithms written out slowly, coarser decoding, and bad input."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shape_checks import first_checked
from torch import Tensor, nn
from torch.nn import functional as F

from unimodal_tokenizers import (
    CodebookTokenizer,
    Grid,
    GridTokenizer,
    ImageTokens,
    MultiscaleTokenizer,
    MultiscaleVQ,
    TokenLayout,
)
from unimodal_tokenizers.quantizers import EuclideanQuantizer, ResidualQuantizer
from unimodal_tokenizers.quantizers.base import squared_distance
from unimodal_tokenizers.quantizers.search import nearest_code_of_any_length

SMALL: dict[str, Any] = {"channels": [8, 16], "blocks": 1}


def some(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def stirred(tokenizer: CodebookTokenizer) -> CodebookTokenizer:
    """Weights that hide nothing: zero-initialised convolutions are not zero any more."""
    with torch.no_grad():
        for name, parameter in tokenizer.named_parameters():
            if "phi" in name:
                parameter += 0.2 * torch.randn_like(parameter)
            if "codebook" in name:
                parameter *= 0.4
    return tokenizer


def multiscale(scales: tuple[int, ...] = (1, 2, 4), **changed: Any) -> MultiscaleVQ:
    torch.manual_seed(0)
    made = stirred(MultiscaleVQ(**{"codebook": 32, "dim": 4, "scales": scales, **SMALL, **changed}))
    assert isinstance(made, MultiscaleVQ)
    return made


def residual() -> GridTokenizer:
    torch.manual_seed(0)
    made = stirred(GridTokenizer(ResidualQuantizer(entries=16, codebooks=3, dim=4), **SMALL))
    assert isinstance(made, GridTokenizer)
    return made


BOTH = pytest.mark.parametrize("make", [multiscale, residual])


# The search


@settings(max_examples=30, deadline=None)
@given(tokens=st.integers(0, 40), entries=st.integers(2, 20), rows=st.integers(0, 7), seed=st.integers(0, 999))
def test_codes_of_any_length_are_found(tokens: int, entries: int, rows: int, seed: int) -> None:
    z, codes = some(seed, tokens, 3, dtype=torch.float64), 2 * some(seed + 1, entries, 3, dtype=torch.float64)
    plain = torch.cdist(z, codes).argmin(-1)
    assert torch.equal(nearest_code_of_any_length(z, codes, max_bytes=rows * entries * 8), plain)


def test_a_code_s_length_says_something() -> None:
    quantizer = EuclideanQuantizer(4, 2)
    with torch.no_grad():
        quantizer.codebook.weight.copy_(torch.tensor([[1.0, 0], [3, 0], [0, 1], [0, 3]]))
    assert quantizer.vectors_to_ids(torch.tensor([[1.2, 0], [2.5, 0.1], [0, 9], [0, 0.1]])).tolist() == [0, 1, 3, 2]
    z = some(0, 20, 2)
    result = quantizer.eval()(z)
    torch.testing.assert_close(result.quantized, quantizer.codes[result.ids])
    assert float(result.terms["commitment"]) == pytest.approx(
        float(torch.cdist(z, quantizer.codes.detach()).min(-1).values.square().mean())
    )


# Multi-scale: VAR, algorithms 1 and 2, an image and a scale at a time


def slowly(tokenizer: MultiscaleVQ, f: Tensor, grid: Grid) -> tuple[list[int], list[Tensor]]:
    """Ids of one image (D, h, w), and what is said of it after each scale."""
    codes, rest, said, ids = tokenizer.quantizer.codes.to(f), f, torch.zeros_like(f), []
    sums = []
    for k, (rows, columns) in enumerate(grid.sizes):
        small = F.adaptive_avg_pool2d(rest[None], (rows, columns))[0]
        chosen = [int((codes - small[:, r, c]).square().sum(-1).argmin()) for r in range(rows) for c in range(columns)]
        x = codes[chosen].T.reshape(1, -1, rows, columns)
        if (rows, columns) != (grid.h, grid.w):
            x = F.interpolate(x, (grid.h, grid.w), mode="bicubic")
        phi = tokenizer.phi[k]
        x = (x + F.conv2d(x, phi.weight, phi.bias, padding=1))[0]
        said, rest = said + x, rest - x
        ids += chosen
        sums.append(said)
    return ids, sums


@pytest.mark.parametrize("size", [(8, 8), (4, 8), (12, 6)])
def test_scales_by_hand(size: tuple[int, int]) -> None:
    tokenizer = multiscale().double().eval()
    images = some(1, 3, 3, *size, dtype=torch.float64)
    tokens = tokenizer.encode(images)
    grid = tokens.grids[0]
    with torch.no_grad():
        f = tokenizer.encoder(images)
        expected = [slowly(tokenizer, one, grid) for one in f]
        said = tokenizer.accumulate(tokens.values.unflatten(0, (3, -1)), grid)
    assert tokens.values.tolist() == [i for ids, _ in expected for i in ids]
    assert len(said) == 3
    for k, one in enumerate(said):
        torch.testing.assert_close(one, torch.stack([sums[k] for _, sums in expected]))
    result = tokenizer(images)
    errors = [(f - one).square().sum(1).mean() for one in said]
    torch.testing.assert_close(result.terms["codebook"], torch.stack(errors).mean())
    torch.testing.assert_close(result.terms["commitment"], torch.stack(errors).mean())
    torch.testing.assert_close(tokenizer.decode(tokens), result.images)
    assert result.counts.tolist() == torch.bincount(tokens.values, minlength=32).tolist()


def test_gradients_of_both_terms_by_hand() -> None:
    """The codes and their convolutions go to the encoder's output, the encoder goes to what they say."""
    tokenizer = multiscale().double().eval()
    vectors, grid = some(1, 2 * 16, 4, dtype=torch.float64).requires_grad_(), Grid(4, 4, ((1, 1), (2, 2), (4, 4)))
    result = tokenizer.quantize(vectors, grid)
    shared = [tokenizer.quantizer.codebook.weight, *tokenizer.phi.parameters()]
    codebook = torch.autograd.grad(result.terms["codebook"], shared, retain_graph=True)
    (commitment,) = torch.autograd.grad(result.terms["commitment"], vectors, retain_graph=True)
    g = some(2, 32, 4, dtype=torch.float64)
    (straight,) = torch.autograd.grad((result.quantized * g).sum(), vectors)
    assert torch.equal(straight, g)
    said = tokenizer.accumulate(result.ids.unflatten(0, (2, -1)), grid)  # differentiable in codes and convolutions
    rows = [x.permute(0, 2, 3, 1).flatten(0, 2) for x in said]
    slow = sum(squared_distance(vectors.detach(), x) for x in rows) / 3
    for got, expected in zip(codebook, torch.autograd.grad(slow, shared), strict=True):
        torch.testing.assert_close(got, expected)
        assert got.abs().sum() > 0
    torch.testing.assert_close(commitment, sum(2 * (vectors - x).detach() / 32 for x in rows) / 3)


def test_one_scale_quantizes_once() -> None:
    tokenizer = multiscale((4,))
    with torch.no_grad():
        for parameter in tokenizer.phi.parameters():
            parameter.zero_()
    tokenizer.eval()
    images = some(0, 2, 3, 8, 8)
    tokens = tokenizer.encode(images)
    assert tokens.grids == (Grid(4, 4, ((4, 4),)),) * 2
    with torch.no_grad():
        z = tokenizer.encoder(images).permute(0, 2, 3, 1).flatten(0, 2)
    assert torch.equal(tokens.values, tokenizer.quantizer.vectors_to_ids(z))
    torch.testing.assert_close(tokenizer.decode(tokens), tokenizer(images).images)


@pytest.mark.slow
def test_more_scales_lower_the_error() -> None:
    """After a short training, images are the better the more scales decode."""
    torch.manual_seed(0)
    tokenizer = MultiscaleVQ(codebook=64, dim=4, channels=[16, 16], blocks=1, scales=[1, 2, 4], revive_after=10)
    colours = some(5, 32, 3, 4, 4).tanh()
    images = F.interpolate(colours, (8, 8), mode="nearest")
    optimizer = torch.optim.Adam(tokenizer.parameters(), 5e-3)
    for _ in first_checked(range(150)):
        result = tokenizer(images)
        loss = F.mse_loss(result.images, images) + result.terms["codebook"] + 0.25 * result.terms["commitment"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    tokenizer.eval()
    tokens = tokenizer.encode(images)
    with torch.no_grad():
        errors = [float(F.mse_loss(tokenizer.decode(tokens.first(k)), images)) for k in (1, 2, 3)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.5 * errors[0]
    assert torch.equal(tokenizer.decode(tokens.first(3)), tokenizer.decode(tokens))


def test_the_first_scales_of_many_images() -> None:
    a, b = Grid(4, 4, ((1, 1), (2, 2), (4, 4))), Grid(2, 4, ((1, 1), (1, 2), (2, 4)))
    assert (a.length, b.length, a.lengths, b.lengths) == (21, 11, [1, 4, 16], [1, 2, 8])
    tokens = ImageTokens(torch.arange(32), (a, b))
    coarse = tokens.first(2)
    assert coarse.values.tolist() == [0, 1, 2, 3, 4, 21, 22, 23]
    assert coarse.grids == (Grid(4, 4, ((1, 1), (2, 2))), Grid(2, 4, ((1, 1), (1, 2))))
    for wrong in (0, 4):
        with pytest.raises(ValueError, match=f"scales: expected between 1 and 3, got {wrong}"):
            tokens.first(wrong)


def test_scales_of_other_shapes_are_shares_of_their_own() -> None:
    layout = TokenLayout("multiscale", dim=4, stride=2, codebooks=(8,), scales=(1, 2, 3, 4))
    assert layout.grid(8, 8) == Grid(4, 4, ((1, 1), (2, 2), (3, 3), (4, 4)))
    assert layout.grid(4, 8) == Grid(2, 4, ((1, 1), (1, 2), (2, 3), (2, 4)))
    assert layout.grid(16, 16) == Grid(8, 8, ((2, 2), (4, 4), (6, 6), (8, 8)))
    assert layout.grid(2, 2).sizes == ((1, 1),) * 4
    assert TokenLayout("discrete", dim=4, stride=2).grid(4, 8).sizes == ((2, 4),)


def test_a_new_codebook_takes_what_the_scales_leave() -> None:
    """The first batch fills the codebook from coarse to fine, and every entry is in use at once."""
    torch.manual_seed(0)
    tokenizer = MultiscaleVQ(codebook=24, dim=4, scales=(1, 2, 4), revive_after=5, **SMALL)
    result = tokenizer(some(0, 4, 3, 8, 8))  # 4 + 16 + 64 tokens
    assert (result.counts > 0).all()
    assert tokenizer.quantizer.revive_after == 15  # three batches of the codebook are one of images
    (result.images.square().mean() + result.terms["codebook"] + result.terms["commitment"]).backward()
    assert [n for n, p in tokenizer.named_parameters() if p.grad is None] == []


# Residual


def test_codebooks_by_hand() -> None:
    tokenizer = residual().double().eval()
    images = some(1, 2, 3, 8, 12, dtype=torch.float64)
    tokens = tokenizer.encode(images)
    assert tokens.values.shape == (2 * 24, 3)
    with torch.no_grad():
        f = tokenizer.encoder(images).permute(0, 2, 3, 1).flatten(0, 2)
    said, errors, ids = torch.zeros_like(f), [], []
    for quantizer in tokenizer.quantizer.quantizers:
        ids.append(torch.cdist(f - said, quantizer.codes).argmin(-1))
        said = said + quantizer.codes[ids[-1]]
        errors.append((f - said).square().sum(-1).mean())
    assert torch.equal(tokens.values, torch.stack(ids, 1))
    torch.testing.assert_close(tokenizer.lookup(tokens.values), said)
    first = tokenizer.quantizer.quantizers[0].codes[ids[0]] + tokenizer.quantizer.quantizers[1].codes[ids[1]]
    torch.testing.assert_close(tokenizer.lookup(tokens.values[:, :2]), first)
    result = tokenizer(images)
    torch.testing.assert_close(result.terms["codebook"], torch.stack(errors).sum())
    torch.testing.assert_close(result.terms["commitment"], torch.stack(errors).sum())
    torch.testing.assert_close(tokenizer.decode(tokens), result.images)
    expected = [torch.bincount(i, minlength=16).tolist() for i in ids]
    assert result.counts.tolist() == expected


def test_each_codebook_learns_what_is_left_for_it() -> None:
    """Gradients: of commitment, the sum over codebooks of f's distance to what is said so far; of the codes, their own."""
    tokenizer = residual().double().eval()
    f = some(3, 20, 4, dtype=torch.float64).requires_grad_()
    result = tokenizer.quantize(f, Grid(4, 5))
    weights = [q.codebook.weight for q in tokenizer.quantizer.quantizers]
    (commitment,) = torch.autograd.grad(result.terms["commitment"], f, retain_graph=True)
    codebooks = torch.autograd.grad(result.terms["codebook"], weights, retain_graph=True)
    g = some(4, 20, 4, dtype=torch.float64)
    (straight,) = torch.autograd.grad((result.quantized * g).sum(), f)
    torch.testing.assert_close(straight, g)
    said, slow = torch.zeros_like(f).detach(), torch.zeros_like(f).detach()
    for q, weight in enumerate(weights):
        left = (f - said).detach()
        e = weight[result.ids[:, q]]
        (own,) = torch.autograd.grad((left - e).square().sum(-1).mean(), weight)
        torch.testing.assert_close(codebooks[q], own)
        said = said + e.detach()
        slow = slow + 2 * (f.detach() - said) / 20
    torch.testing.assert_close(commitment, slow)


def test_every_parameter_of_a_residual_tokenizer_gets_a_gradient() -> None:
    tokenizer = residual()
    result = tokenizer(some(0, 4, 3, 8, 8))
    # Were the codebooks to draw their entries from the same tokens, all but the first would be zeros.
    assert ((result.counts > 0).float().mean(-1) > 0.4).all()
    (result.images.square().mean() + result.terms["codebook"] + result.terms["commitment"]).backward()
    assert [n for n, p in tokenizer.named_parameters() if p.grad is None] == []


# Both


@BOTH
def test_a_batch_gives_what_its_images_give_alone(make: Any) -> None:
    tokenizer = make().double().eval()
    images = [some(i, 3, *size, dtype=torch.float64) for i, size in enumerate([(8, 8), (4, 8), (8, 8)])]
    tokens = tokenizer.encode_each(images)
    alone = ImageTokens.cat([tokenizer.encode(image[None]) for image in images])
    assert torch.equal(tokens.values, alone.values)
    assert tokens.grids == alone.grids
    for image, one in zip(tokenizer.decode_each(tokens), alone.split(), strict=True):
        torch.testing.assert_close(image, tokenizer.decode(one)[0])


@BOTH
def test_evaluation_and_encoding_change_nothing(make: Any) -> None:
    tokenizer = make()
    before = copy.deepcopy(tokenizer.state_dict())
    tokenizer.encode(some(0, 2, 3, 8, 8))  # in training mode
    tokenizer.eval()(some(0, 2, 3, 8, 8))
    for name, value in tokenizer.state_dict().items():
        assert torch.equal(value, before[name]), name


@BOTH
def test_half_precision_is_quantized_in_single_precision(make: Any) -> None:
    tokenizer = make().eval()
    grid, vectors = tokenizer.layout.grid(8, 8), some(0, 16, 4).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        result = tokenizer.quantize(vectors, grid)
    assert result.quantized.dtype == torch.float32
    assert torch.equal(result.ids, tokenizer.quantize(vectors.float(), grid).ids)


@BOTH
def test_layouts_say_what_the_tokens_are(make: Any) -> None:
    tokenizer = make()
    several = isinstance(tokenizer, GridTokenizer)
    assert tokenizer.layout.kind == ("discrete" if several else "multiscale")
    assert tokenizer.layout.codebooks == ((16,) * 3 if several else (32,))
    assert isinstance(tokenizer, MultiscaleTokenizer) is not several
    assert all(isinstance(m.codebook, nn.Embedding) for m in tokenizer.modules() if isinstance(m, EuclideanQuantizer))


def test_shapes_that_do_not_fit_are_refused() -> None:
    scales, books = multiscale(), residual()
    with pytest.raises(ValueError, match=r"tokens: expected ids \(B, 21\), got shape \(1, 20\)"):
        scales.decode_batch(torch.zeros(1, 20, dtype=torch.int64), scales.layout.grid(8, 8))
    with pytest.raises(ValueError, match=r"tokens: expected ids \(T,\), got shape \(3, 2\)"):
        scales.lookup(torch.zeros(3, 2, dtype=torch.int64))
    for grid in (Grid(4, 4), Grid(4, 4, ((1, 1), (3, 3), (4, 4))), Grid(4, 4, ((1, 1), (2, 2), (4, 4), (8, 8)))):
        with pytest.raises(ValueError, match="tokens: expected the first scales of Grid"):
            scales.decode_batch(torch.zeros(1, grid.length, dtype=torch.int64), grid)
    with pytest.raises(ValueError, match=r"tokens: expected ids \(B, 4, 3\), got shape \(1, 4\)"):
        books.decode_batch(torch.zeros(1, 4, dtype=torch.int64), Grid(2, 2))
    with pytest.raises(ValueError, match=r"tokens: expected ids \(T, 3\), got shape \(4, 4\)"):
        books.lookup(torch.zeros(4, 4, dtype=torch.int64))
    for tokenizer, shape in ((scales, (21,)), (books, (16, 3))):
        with pytest.raises(ValueError, match="tokens: expected ids from 0 to"):
            tokenizer.decode(ImageTokens(torch.full(shape, 99), (tokenizer.layout.grid(8, 8),)))


@pytest.mark.parametrize("scales", [[], [0, 2], [2, 2], [4, 1]])
def test_scales_that_do_not_rise_are_refused(scales: list[int]) -> None:
    with pytest.raises(ValueError, match="scales: expected rising numbers of rows"):
        MultiscaleVQ(codebook=8, dim=4, scales=scales, **SMALL)


def test_a_single_codebook_is_no_residual() -> None:
    with pytest.raises(ValueError, match=r"codebooks: expected at least 2 \(EuclideanQuantizer has one\), got 1"):
        ResidualQuantizer(entries=8, codebooks=1, dim=4)
