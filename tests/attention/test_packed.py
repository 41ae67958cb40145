"""Every back end against the reference: outputs and gradients on random layouts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unimodal.attention import BACKENDS, PackedAttention, TokenTable, dense_mask, describe, packed_attention
from unimodal.attention.packed import SdpaAttention

Spans = list[list[tuple[int, bool, bool]]]  # documents of (length, bidirectional, private)

TEXT, LEARNED, CLEAN = (False, False), (True, True), (True, False)
CAUSAL_PRIVATE = (False, True)
SPAN = st.tuples(st.integers(1, 7), st.sampled_from([TEXT, LEARNED, CLEAN, CAUSAL_PRIVATE])).map(
    lambda s: (s[0], *s[1])
)
LAYOUTS = st.lists(st.lists(SPAN, min_size=1, max_size=6), min_size=1, max_size=5)
GROUPS = st.sampled_from([(2, 2), (4, 2), (3, 1)])  # query heads, key/value heads
OTHERS = sorted(set(BACKENDS) - {"reference"})


def table(documents: Spans) -> TokenTable:
    spans = [(d, *span) for d, document in enumerate(documents) for span in document]
    lengths = torch.tensor([n for _, n, _, _ in spans])
    return TokenTable(
        document=torch.tensor([d for d, *_ in spans]).repeat_interleave(lengths),
        block=torch.arange(len(spans)).repeat_interleave(lengths),
        bidirectional=torch.tensor([b for *_, b, _ in spans]).repeat_interleave(lengths),
        private=torch.tensor([p for *_, p in spans]).repeat_interleave(lengths),
        document_lengths=tuple(sum(n for n, _, _ in document) for document in documents),
    )


def permutation(n: int, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    order = torch.randperm(n, generator=rng)
    return order, order.argsort()


def both_ways(attention: PackedAttention, inputs: list[torch.Tensor], upstream: torch.Tensor) -> list[torch.Tensor]:
    """The output, and the gradients of q, k and v."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = attention(0, *leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def draw(n: int, heads: tuple[int, int], rng: torch.Generator, dtype: torch.dtype) -> list[torch.Tensor]:
    """q, k, v and a gradient from above."""
    h, k = heads
    return [torch.randn(n, count, 8, generator=rng).to(dtype) for count in (h, k, k, h)]


@pytest.mark.parametrize("backend", OTHERS)
@given(documents=LAYOUTS, heads=GROUPS, seed=st.integers(0, 2**16))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_equals_the_reference_forward_and_backward(
    backend: str, documents: Spans, heads: tuple[int, int], seed: int
) -> None:
    one, rng = table(documents), torch.Generator().manual_seed(seed)
    order, inverse = permutation(len(one), rng)
    *inputs, upstream = draw(len(one), heads, rng, torch.float32)
    expected = both_ways(packed_attention("reference", one, order, inverse), inputs, upstream)
    got = both_ways(packed_attention(backend, one, order, inverse), inputs, upstream)
    for name, a, b in zip(("output", "q", "k", "v"), got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("backend", OTHERS)
@given(documents=LAYOUTS, heads=GROUPS, seed=st.integers(0, 2**16))
@settings(max_examples=15, deadline=None, derandomize=True)
def test_equals_the_reference_in_bf16(backend: str, documents: Spans, heads: tuple[int, int], seed: int) -> None:
    one, rng = table(documents), torch.Generator().manual_seed(seed)
    order, inverse = permutation(len(one), rng)
    *inputs, upstream = draw(len(one), heads, rng, torch.bfloat16)
    exact = both_ways(packed_attention("reference", one, order, inverse), [x.float() for x in inputs], upstream.float())
    got = both_ways(packed_attention(backend, one, order, inverse), inputs, upstream)
    for a, b in zip(got, exact, strict=True):
        assert a.dtype == torch.bfloat16
        assert (a.float() - b).norm() <= 0.02 * b.norm() + 0.02  # bf16 keeps 8 bits: errors near 0.4 % a rounding


@given(documents=LAYOUTS, seed=st.integers(0, 2**16))
@settings(max_examples=20, deadline=None, derandomize=True)
def test_the_reference_is_a_softmax_over_visible_keys(documents: Spans, seed: int) -> None:
    """One query at a time, in float64, with heads counted by hand."""
    one, rng = table(documents), torch.Generator().manual_seed(seed)
    order, inverse = permutation(len(one), rng)
    q, k, v, _ = draw(len(one), (4, 2), rng, torch.float64)
    out = packed_attention("reference", one, order, inverse)(0, q, k, v)
    mask = dense_mask(one)
    for i in range(len(one)):
        keys = [j for j in range(len(one)) if mask[order[i], order[j]]]
        for head in range(4):
            scores = torch.stack([q[i, head] @ k[j, head // 2] for j in keys]) / 8**0.5
            expected = sum(w * v[j, head // 2] for w, j in zip(scores.softmax(0), keys, strict=True))
            torch.testing.assert_close(out[i, head], expected, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_a_hidden_token_changes_nothing(backend: str) -> None:
    """A private block, and every other document, are out of reach of forward and backward alike."""
    one = table([[(3, *TEXT), (4, *LEARNED), (4, *CLEAN), (2, *TEXT)], [(5, *TEXT)]])
    rng = torch.Generator().manual_seed(0)
    order, inverse = permutation(len(one), rng)
    q, k, v, _ = draw(len(one), (2, 1), rng, torch.float32)
    k, v = k.requires_grad_(), v.requires_grad_()
    out = packed_attention(backend, one, order, inverse)(0, q, k, v)
    gradients = torch.autograd.grad(out[inverse[7:13]].sum(), [k, v])  # read by the clean copy and the text behind it
    for gradient in gradients:
        by_position = gradient[inverse].abs().sum((1, 2))
        assert (by_position[3:7] == 0).all()  # the learned copy
        assert (by_position[13:] == 0).all()  # the other document
    assert (gradients[1][inverse][:3].abs().sum((1, 2)) > 0).all()


@pytest.mark.parametrize("length", [1, SdpaAttention.STEP - 1, SdpaAttention.STEP, SdpaAttention.STEP + 1])
def test_padding_at_the_edges_of_a_step(length: int) -> None:
    one = table([[(length, *TEXT)], [(3, *TEXT)], [(length, *CLEAN)]])
    rng = torch.Generator().manual_seed(1)
    order, inverse = permutation(len(one), rng)
    *inputs, upstream = draw(len(one), (2, 1), rng, torch.float32)
    expected = both_ways(packed_attention("reference", one, order, inverse), inputs, upstream)
    for a, b in zip(both_ways(packed_attention("sdpa", one, order, inverse), inputs, upstream), expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_an_unknown_name_is_refused() -> None:
    one = table([[(2, *TEXT)]])
    with pytest.raises(ValueError, match=r"attention: expected one of reference, sdpa, got flash"):
        packed_attention("flash", one, torch.arange(2), torch.arange(2))


@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_the_log_names_back_end_and_device(backend: str) -> None:
    assert describe(backend, torch.device("cpu")).startswith(f"attention: {backend} (")
    assert describe(backend, torch.device("cpu")).endswith("on cpu")
