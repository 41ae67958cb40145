"""Sequences: the two transformers written out, queries that see none behind them, prefixes that decode."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from unimodal_tokenizers import Grid, SequenceTokenizer
from unimodal_tokenizers.quantizers import MovingAverageQuantizer, ResidualQuantizer, VectorQuantizer
from unimodal_tokenizers.transformer import Transformer, causal_queries, images_to_patches, patches_to_images, places

SHAPE: dict[str, Any] = {"image": (8, 12), "patch": 4, "tokens": 5, "width": 16, "depth": 2, "heads": 2}


def made(quantizer: nn.Module | None = None, **options: Any) -> SequenceTokenizer:
    """With a codebook of outputs: the first batch makes it."""
    torch.manual_seed(0)
    tokenizer = SequenceTokenizer(quantizer or VectorQuantizer(16, 4), **{**SHAPE, **options})
    for parameter in tokenizer.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, std=0.3)  # no zero and no one must hide a mistake
    tokenizer.train()(images(8))
    tokenizer.steps.zero_()
    return tokenizer.eval()


def images(count: int = 4, height: int = 8, width: int = 12) -> torch.Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def by_hand(transformer: Transformer, x: torch.Tensor, sees: Any) -> torch.Tensor:
    """Layer by layer, head by head, row by row."""
    for layer in transformer.layers:
        q, k, v = layer.attn.qkv(layer.norm1(x)).chunk(3, dim=-1)
        rows = torch.zeros_like(x)
        for head in range(2):
            part = slice(8 * head, 8 * head + 8)
            for i in range(x.shape[1]):
                seen = [j for j in range(x.shape[1]) if sees(i, j)]
                scores = (q[:, i : i + 1, part] * k[:, seen, part]).sum(-1) / 8**0.5
                rows[:, i, part] = (scores.softmax(-1)[..., None] * v[:, seen, part]).sum(1)
        x = x + layer.attn.proj(rows)
        x = x + layer.mlp.fc2(nn.functional.gelu(layer.mlp.fc1(layer.norm2(x))))
    return transformer.norm(x)


@pytest.mark.parametrize("causal", [False, True])
def test_both_transformers_written_out(causal: bool) -> None:
    t = made(causal=causal).double()
    x = images(2).double()
    patches = []
    for image in x:  # 2 x 3 squares of 4 x 4 pixels
        for row in range(2):
            for column in range(3):
                square = image[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
                patches.append(square.permute(1, 2, 0).flatten())
    read = t.patches_in(torch.stack(patches).view(2, 6, 48)) + places(Grid(2, 3), t.queries)
    shares = [range(6 * i // 5, -(-6 * (i + 1) // 5)) for i in range(5)]  # whole patches that a fifth of them touches
    queries = torch.stack([read[:, list(share)].mean(1) for share in shares], dim=1) + t.queries
    read = torch.cat([read, queries], dim=1)
    vectors = t.codes_out(by_hand(t.encoder, read, lambda i, j: j < 6 or not causal or 6 <= j <= i)[:, 6:])
    torch.testing.assert_close(t.images_to_vectors(x), vectors)

    n = 3
    codes = t.codes_in(vectors[:, :n]) + t.ranks[:n]
    near = torch.stack([codes[:, 5 * i // 6] if 5 * i // 6 < n else torch.zeros_like(codes[:, 0]) for i in range(6)], 1)
    drawn = t.drawn + places(Grid(2, 3), t.queries) + near
    pixels = t.pixels_out(by_hand(t.decoder, torch.cat([codes, drawn], dim=1), lambda i, j: True)[:, n:])
    expected = torch.zeros(2, 3, 8, 12).double()
    for i in range(6):
        row, column = divmod(i, 3)
        square = pixels[:, i].view(2, 4, 4, 3).permute(0, 3, 1, 2)
        expected[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = square
    torch.testing.assert_close(t.vectors_to_images(vectors[:, :n]), expected)


def test_the_mask_is_the_one_that_is_drawn() -> None:
    assert causal_queries.__doc__ is not None
    drawn = [line.split() for line in causal_queries.__doc__.splitlines() if set(line.split()) & {"0", "1"}]
    assert causal_queries(2, 3).int().tolist() == [[int(x) for x in row] for row in drawn]


@settings(max_examples=10, deadline=None)
@given(h=st.integers(1, 3), w=st.integers(1, 3), p=st.integers(1, 4))
def test_patches_come_back(h: int, w: int, p: int) -> None:
    x = images(2, h * p, w * p)
    assert torch.equal(patches_to_images(images_to_patches(x, p), Grid(h, w), p), x)


def test_an_id_of_causal_queries_depends_on_none_behind_it() -> None:
    for causal in (True, False):
        t = made(causal=causal)
        t.images_to_vectors(images(1))[0, 2].sum().backward()
        assert t.queries.grad is not None
        seen = (t.queries.grad.abs().sum(1) > 1e-9).tolist()
        assert seen == ([True] * 3 + [False] * 2 if causal else [True] * 5)


@pytest.mark.parametrize("quantizer", [
    lambda: VectorQuantizer(16, 4), lambda: ResidualQuantizer(entries=16, codebooks=2, dim=4),
])  # fmt: skip
def test_ids_survive_their_codes_and_images_are_alone(quantizer: Any) -> None:
    t = made(quantizer())
    tokens = t.encode(images())
    books = t.layout.codebooks
    assert tokens.grids == (Grid(1, 5),) * 4
    assert tokens.values.shape == ((20,) if len(books) == 1 else (20, len(books)))
    vectors = t.lookup(tokens.values)
    if len(books) == 1:
        assert torch.equal(t.quantizer.vectors_to_ids(vectors), tokens.values)
    else:  # a residual has other ids that say the same
        torch.testing.assert_close(t.lookup(t.quantizer.vectors_to_ids(vectors)), vectors, atol=1e-4, rtol=0)
    for image, one in zip(images(), tokens.split(), strict=True):
        assert torch.equal(t.encode(image[None]).values, one.values)
    torch.testing.assert_close(t.decode(tokens), t(images()).images)
    before = copy.deepcopy(t.state_dict())
    t.train().encode(images())
    assert all(torch.equal(value, before[name]) for name, value in t.state_dict().items())


def test_prefixes_decode_as_they_were_trained() -> None:
    t = made(shortest=2).train()
    state = copy.deepcopy(t.state_dict())
    lengths: list[int] = []
    for _ in range(40):
        before = t.steps.clone()
        n = t._length()
        t.steps.copy_(before)
        quantized = t.quantizer(t.images_to_vectors(images()).flatten(0, 1)).quantized.unflatten(0, (4, 5))
        torch.testing.assert_close(t(images()).images, t.vectors_to_images(quantized[:, :n]))
        lengths.append(n)
    assert set(lengths) == {2, 3, 4, 5}
    t.load_state_dict(state)  # resumed at step 20: the same choices
    t.steps.fill_(20)
    assert [t._length() for _ in range(20)] == lengths[20:]
    t.eval()
    tokens = t.encode(images())
    assert t.steps == 40
    vectors = t.lookup(tokens.values).unflatten(0, (4, 5))
    for n in (2, 3, 5):
        torch.testing.assert_close(t.decode(tokens.prefix(n)), t.vectors_to_images(vectors[:, :n]))
    torch.testing.assert_close(t(images()).images, t.decode(tokens))  # all of them, outside training


def test_every_parameter_learns_what_it_should() -> None:
    t = made(causal=True).train()
    result = t(images())
    (result.images.square().mean() + sum(result.terms.values())).backward()
    assert not [name for name, p in t.named_parameters() if p.grad is None or not p.grad.any()]
    assert set(result.terms) == set(t.weights)
    assert result.counts is not None
    assert int(result.counts.sum()) == 20
    assert t.last_layer is t.pixels_out.weight


def test_a_codebook_that_learns_without_gradients_moves_after_a_step() -> None:
    tokenizer = made(MovingAverageQuantizer(16, 4)).train()
    codes = tokenizer.quantizer.codes
    before = codes.clone()
    tokenizer(images())
    assert torch.equal(codes, before)
    tokenizer.after_step()
    assert not torch.equal(codes, before)


@pytest.mark.parametrize(("options", "message"), [
    ({"image": (8, 10)}, r"image: expected multiples of patch = 4, got \[8, 10\]"),
    ({"tokens": 0}, "tokens: expected at least 1, got 0"),
    ({"shortest": 6}, "shortest: expected from 1 to tokens = 5, got 6"),
    ({"shortest": 0}, "shortest: expected from 1"),
    ({"width": 18}, "width: expected a multiple of 4 and of heads = 2, got 18"),
    ({"depth": -1}, "depth: expected at least 0 layers, got -1"),
])  # fmt: skip
def test_bad_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SequenceTokenizer(VectorQuantizer(16, 4), **{**SHAPE, **options})


def test_bad_images_and_tokens_are_refused() -> None:
    t = made(shortest=3)
    with pytest.raises(ValueError, match=r"image size: expected 8x12, .* got 8x8 pixels"):
        t.encode(images(1, 8, 8))
    with pytest.raises(ValueError, match="image size: expected 8x12"):
        t(images(1, 8, 8))
    with pytest.raises(ValueError, match=r"tokens: expected 3 to 5 of an image .* got 2"):
        t.decode(t.encode(images()).prefix(2))
    with pytest.raises(ValueError, match=r"tokens: expected 5 of an image .* got 4"):
        made().decode(t.encode(images()).prefix(4))
    with pytest.raises(ValueError, match=r"tokens: expected 5 ids of 1 codebooks, got shape \(1, 5, 2\)"):
        t.decode_batch(torch.zeros(1, 5, 2, dtype=torch.long), Grid(1, 5))
    with pytest.raises(ValueError, match="tokens: expected ids from 0 to 15, got 0 to 16"):
        t.decode_batch(torch.tensor([[0, 1, 2, 3, 16]]), Grid(1, 5))
