"""Every back end against the reference: outputs and gradients on random layouts, with places that no token has.

Back ends that only a GPU runs are in `test_flex` and `test_xformers` too, as far as a CPU can tell.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from unimodal.attention import (
    BACKENDS,
    PackedAttention,
    SegmentTable,
    choose_backend,
    dense_mask,
    describe,
    packed_attention,
    sdpa,
)

Spans = list[list[tuple[int, bool, bool]]]  # documents of (length, bidirectional, private)

TEXT, LEARNED, CLEAN, CAUSAL_PRIVATE = (False, False), (True, True), (True, False), (False, True)
KINDS = [TEXT, LEARNED, CLEAN, CAUSAL_PRIVATE]
SPAN = st.tuples(st.integers(1, 30), st.sampled_from(KINDS)).map(lambda span: (span[0], *span[1]))
LAYOUTS = st.lists(st.lists(SPAN, min_size=1, max_size=7), min_size=1, max_size=5)
GROUPS = st.sampled_from([(2, 2), (4, 2), (3, 1)])  # query heads, key/value heads
LIMITS = st.sampled_from([(256, 256), (24, 16), (1, 8), (9, 1)])  # SHORT, ROWS of the tiles
CPU = torch.device("cpu")
# Largest error, absolute and relative: what a sum of some hundred rounded terms may lose.
EXACT = {torch.float64: (1e-12, 1e-9), torch.float32: (2e-5, 1e-4)}
GPU = {torch.float32: (1e-4, 1e-3)}  # kernels that split products of fp32 lose some more


def table(documents: Spans) -> SegmentTable:
    spans = [(d, *span) for d, document in enumerate(documents) for span in document]
    return SegmentTable(*(np.array(column) for column in zip(*spans, strict=True)))


def places(one: SegmentTable, extra: int, rng: torch.Generator) -> tuple[torch.Tensor, int]:
    """Random places of the tokens among `extra` more."""
    count = len(one) + extra
    return torch.randperm(count, generator=rng)[: len(one)], count


def draw(
    count: int, heads: tuple[int, int], rng: torch.Generator, dtype: torch.dtype, channels: int = 8
) -> list[torch.Tensor]:
    """q, k, v and a gradient from above; places that no token has are not special."""
    h, k = heads
    return [torch.randn(count, n, channels, generator=rng).to(dtype) for n in (h, k, k, h)]


def both_ways(attention: PackedAttention, inputs: list[torch.Tensor], upstream: torch.Tensor) -> list[torch.Tensor]:
    """The output, and the gradients of q, k and v."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = attention.layer(0)(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


@contextmanager
def tiles(short: int, rows: int, plain: bool = False) -> Iterator[None]:
    """Limits of the tiles, and matrix products in place of fused kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sdpa, "SHORT", short)
        patch.setattr(sdpa, "ROWS", rows)
        if plain:
            patch.setattr(sdpa._Tile, "forward", sdpa._Tile.plain_forward)
            patch.setattr(
                sdpa._Tile, "backward", lambda self, q, k, v, o, do, lse: self.plain_backward(q, k, v, do)
            )  # fmt: skip
        yield


def assert_equal(
    got: list[torch.Tensor], expected: list[torch.Tensor], inverse: torch.Tensor,
    tolerance: dict[torch.dtype, tuple[float, float]] = EXACT,
) -> None:  # fmt: skip
    """Within `tolerance`; in bf16, whose rounding is 0.4 %, within 2 % of the norm. Zero where there is no token."""
    empty = torch.ones(len(got[0]), dtype=torch.bool, device=inverse.device).index_fill_(0, inverse, False)
    for name, a, b in zip(("output", "q", "k", "v"), got, expected, strict=True):
        assert a.isfinite().all(), name
        assert (a[empty] == 0).all(), name
        if a.dtype == torch.bfloat16:
            assert (a.double() - b.double()).norm() <= 0.02 * b.double().norm() + 0.02, name
        else:
            atol, rtol = tolerance[a.dtype]
            torch.testing.assert_close(a, b, atol=atol, rtol=rtol, msg=lambda text, name=name: f"{name}: {text}")


# --- the reference


@given(documents=LAYOUTS, extra=st.integers(0, 20), seed=st.integers(0, 2**16))
@settings(max_examples=15, deadline=None, derandomize=True)
def test_the_reference_is_a_softmax_over_visible_keys(documents: Spans, extra: int, seed: int) -> None:
    """One query at a time, in float64, with heads counted by hand."""
    one, rng = table(documents), torch.Generator().manual_seed(seed)
    inverse, count = places(one, extra, rng)
    q, k, v, _ = draw(count, (4, 2), rng, torch.float64)
    out = packed_attention("reference", one, inverse, count).layer(0)(q, k, v)
    mask = dense_mask(one.tokens(CPU))
    expected = torch.zeros_like(out)
    for i, place in enumerate(inverse):
        keys = inverse[mask[i]]
        for head in range(4):
            weights = (k[keys, head // 2] @ q[place, head] / 8**0.5).softmax(0)
            expected[place, head] = weights @ v[keys, head // 2]
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=1e-10)


# --- tiles


@pytest.mark.parametrize("plain", [False, True], ids=["fused", "plain"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@given(documents=LAYOUTS, heads=GROUPS, limits=LIMITS, extra=st.integers(0, 20), seed=st.integers(0, 2**16))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_tiles_equal_the_reference_forward_and_backward(
    plain: bool, dtype: torch.dtype, documents: Spans, heads: tuple[int, int], limits: tuple[int, int], extra: int,
    seed: int,
) -> None:  # fmt: skip
    one, rng = table(documents), torch.Generator().manual_seed(seed)
    inverse, count = places(one, extra, rng)
    *inputs, upstream = draw(count, heads, rng, dtype)
    exact = torch.promote_types(dtype, torch.float32)
    reference = packed_attention("reference", one, inverse, count)
    expected = both_ways(reference, [x.to(exact) for x in inputs], upstream.to(exact))
    with tiles(*limits, plain):
        got = both_ways(packed_attention("sdpa", one, inverse, count), inputs, upstream)
    assert all(x.dtype == dtype for x in got)
    assert_equal(got, expected, inverse)


def planned(documents: Spans, short: int = 8, rows: int = 8) -> list[sdpa.Tile]:
    with tiles(short, rows):
        return sdpa._plan(table(documents))[0]


def test_short_documents_of_about_one_length_are_one_tile() -> None:
    made = planned([[(5, *TEXT)], [(3, *TEXT), (4, *CLEAN)], [(40, *TEXT)], [(8, *LEARNED)]], short=16)
    batch = [tile for tile in made if tile.n > 1]
    assert [(tile.n, tile.stride, tile.rows) for tile in batch] == [(3, 16, (0, 16))]
    assert {tile.n for tile in made} == {1, 3}


@pytest.mark.parametrize(
    ("document", "expected"),  # rows, keys, width of the mask
    [
        ([(10, *CLEAN)], [((0, 8), ((0, 10),), 0), ((8, 10), ((0, 10),), 0)]),  # longer than ROWS
        ([(10, *LEARNED)], [((0, 8), ((0, 10),), 0), ((8, 10), ((0, 10),), 0)]),  # private and longer than ROWS
        ([(10, *TEXT)], [((0, 8), ((0, 8),), 8), ((8, 10), ((0, 10),), 2)]),
        ([(10, *CAUSAL_PRIVATE)], [((0, 8), ((0, 8),), 8), ((8, 10), ((0, 10),), 2)]),
        ([(3, *TEXT), (4, *CLEAN), (3, *TEXT)], [  # text, an image alone, text that sees both
            ((0, 3), ((0, 3),), 3), ((3, 7), ((0, 7),), 0), ((7, 10), ((0, 10),), 3),
        ]),
        ([(3, *TEXT), (4, *LEARNED), (3, *TEXT)], [  # the private block is missing from the keys
            ((0, 3), ((0, 3),), 3), ((3, 7), ((0, 7),), 0), ((7, 10), ((0, 3), (7, 10)), 3),
        ]),
        ([(3, *TEXT), (1, *LEARNED), (1, *CLEAN), (2, *TEXT), (3, *TEXT)], [  # small segments share a tile
            ((0, 7), ((0, 7),), 7), ((7, 10), ((0, 3), (4, 10)), 3),
        ]),
    ],
)  # fmt: skip
def test_tiles_of_a_long_document(document: list[tuple[int, bool, bool]], expected: list[tuple]) -> None:
    assert [(tile.rows, tile.keys, tile.masked) for tile in planned([document])] == expected


@given(documents=LAYOUTS, limits=LIMITS)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_every_row_is_in_one_tile_and_sees_something(documents: Spans, limits: tuple[int, int]) -> None:
    """Padding too: a row without keys would be NaN."""
    with tiles(*limits):
        made, position, real, masks = sdpa._plan(table(documents))
    rows = np.zeros(len(position), dtype=int)
    for tile in made:
        height = tile.rows[1] - tile.rows[0]
        for document in range(tile.n):
            base = tile.base + document * tile.stride
            rows[base + tile.rows[0] : base + tile.rows[1]] += 1
        if tile.masked:
            mask = masks[tile.mask : tile.mask + tile.n * height * tile.masked].view(-1, tile.masked)
            assert (mask == 0).any(1).all()
            assert tile.masked <= sum(b - a for a, b in tile.keys)
    assert (rows == 1).all()
    assert np.bincount(position[real]).tolist() == [1] * len(table(documents))


@pytest.mark.parametrize("length", [1, sdpa.STEP - 1, sdpa.STEP, sdpa.STEP + 1, sdpa.SHORT, sdpa.SHORT + 1])
def test_padding_at_the_edges_of_a_step(length: int) -> None:
    one = table([[(length, *TEXT)], [(3, *TEXT)], [(length, *CLEAN)]])
    rng = torch.Generator().manual_seed(1)
    inverse, count = places(one, 5, rng)
    *inputs, upstream = draw(count, (2, 1), rng, torch.float32)
    expected = both_ways(packed_attention("reference", one, inverse, count), inputs, upstream)
    assert_equal(both_ways(packed_attention("sdpa", one, inverse, count), inputs, upstream), expected, inverse)


LONG: Spans = [[(100, *TEXT), (400, *LEARNED), (400, *CLEAN), (60, *TEXT)], [(20, *TEXT)], [(30, *TEXT), (9, *CLEAN)]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_limits_as_they_are_met_in_training(dtype: torch.dtype) -> None:
    one, rng = table(LONG), torch.Generator().manual_seed(2)
    inverse, count = places(one, 45, rng)
    *inputs, upstream = draw(count, (4, 2), rng, dtype, channels=16)
    exact = torch.promote_types(dtype, torch.float32)
    reference = packed_attention("reference", one, inverse, count)
    expected = both_ways(reference, [x.to(exact) for x in inputs], upstream.to(exact))
    assert_equal(both_ways(packed_attention("sdpa", one, inverse, count), inputs, upstream), expected, inverse)


@pytest.mark.parametrize("heads", [(2, 2), (4, 2)])
def test_the_operator_keeps_its_promises_to_the_compiler(heads: tuple[int, int]) -> None:
    one, rng = table([[(5, *TEXT), (9, *LEARNED), (3, *TEXT)], [(4, *CLEAN)]]), torch.Generator().manual_seed(3)
    inverse, count = places(one, 4, rng)
    with tiles(6, 4):
        plan = packed_attention("sdpa", one, inverse, count)
    assert isinstance(plan, sdpa.SdpaAttention)
    q, k, v, _ = draw(count, heads, rng, torch.float32)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    layout = plan.gather, plan.scatter, plan.empty, plan.tiles, plan.masks
    torch.library.opcheck(sdpa.tiled_attention, (*inputs, *layout))


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        out = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("document", [[(4096, *TEXT)], [(1000, *TEXT), (1500, *LEARNED), (1500, *CLEAN), (96, *TEXT)]])
def test_nothing_as_large_as_the_whole_mask_is_made(
    document: list[tuple[int, bool, bool]], dtype: torch.dtype
) -> None:  # fmt: skip
    one, rng = table([document]), torch.Generator().manual_seed(4)
    inverse, count = places(one, 0, rng)
    q, k, v, grad = draw(count, (2, 1), rng, dtype)
    with Largest() as planning:
        plan = packed_attention("sdpa", one, inverse, count)
    assert planning.elements < count * (sdpa.ROWS + 1)  # all masks end to end: those of rows among themselves
    assert isinstance(plan, sdpa.SdpaAttention)
    with Largest() as largest:
        layout = plan.gather, plan.scatter, plan.empty, plan.tiles, plan.masks
        # The functions under the operators: a mode is not told what an operator calls.
        out, *saved = sdpa.tiled_attention._init_fn(q, k, v, *layout)
        sdpa.tiled_attention_backward._init_fn(grad, out, *saved, *layout)
    assert sdpa.ROWS * 256 <= largest.elements <= 2 * sdpa.ROWS * count  # both heads of one tile; S x S is 8 times that
    assert out.isfinite().all()


# --- every back end


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_a_hidden_token_changes_nothing(backend: str) -> None:
    """A private block, and every other document, are out of reach of forward and backward alike."""
    one = table([[(3, *TEXT), (4, *LEARNED), (4, *CLEAN), (2, *TEXT)], [(5, *TEXT)]])
    rng = torch.Generator().manual_seed(0)
    inverse, count = places(one, 3, rng)
    q, k, v, _ = draw(count, (2, 1), rng, torch.float32)
    k, v = k.requires_grad_(), v.requires_grad_()
    out = packed_attention(backend, one, inverse, count).layer(0)(q, k, v)
    gradients = torch.autograd.grad(out[inverse[7:13]].sum(), [k, v])  # read by the clean copy and the text behind it
    for gradient in gradients:
        by_position = gradient[inverse].abs().sum((1, 2))
        assert (by_position[3:7] == 0).all()  # the learned copy
        assert (by_position[13:] == 0).all()  # the other document
    assert (gradients[1][inverse][:3].abs().sum((1, 2)) > 0).all()


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_every_layer_is_attended_alike(backend: str) -> None:
    one, rng = table([[(4, *TEXT), (3, *CLEAN)]]), torch.Generator().manual_seed(5)
    inverse, count = places(one, 2, rng)
    attention = packed_attention(backend, one, inverse, count)
    assert isinstance(attention, PackedAttention)
    q, k, v, _ = draw(count, (2, 1), rng, torch.float32)
    assert torch.equal(attention.layer(0)(q, k, v), attention.layer(7)(q, k, v))


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"attention: expected auto or one of flex, reference, sdpa, xformers, got flash"
    ):
        choose_backend("flash", CPU)


def test_the_choice_by_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_backend("auto", CPU) == "sdpa"
    available = BACKENDS["flex"]._replace(missing=lambda device: None)
    monkeypatch.setitem(BACKENDS, "flex", available)
    assert choose_backend("auto", torch.device("cuda")) == "flex"
    monkeypatch.setitem(BACKENDS, "flex", available._replace(missing=lambda device: "install triton"))
    with pytest.raises(ValueError, match=r"^backbone.attention: flex cannot run here: install triton$"):
        choose_backend("flex", torch.device("cuda"))
    assert choose_backend("auto", torch.device("cuda")) == "sdpa"  # which the log says


@pytest.mark.parametrize("backend", ["auto", "reference", "sdpa"])
def test_the_log_names_back_end_kernel_and_device(backend: str) -> None:
    chosen = choose_backend(backend, CPU)
    assert describe(backend, CPU) == f"attention: {chosen} ({BACKENDS[chosen].kernel(CPU)}) on cpu"
    assert BACKENDS[chosen].kernel(CPU)


# --- on a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
@pytest.mark.parametrize("backend", sorted(set(BACKENDS) - {"reference"}))
def test_all_back_ends_on_a_gpu(backend: str, heads: tuple[int, int], dtype: torch.dtype) -> None:
    device = torch.device("cuda")
    problem = BACKENDS[backend].missing(device)
    if problem is not None:
        pytest.skip(problem)
    assert describe(backend, device).startswith(f"attention: {backend} (")
    rng = torch.Generator().manual_seed(6)
    for documents in (LONG, [[(5, *TEXT)]], [[(128, *TEXT), (128, *LEARNED), (128, *CLEAN), (127, *CAUSAL_PRIVATE)]]):
        one = table(documents)
        inverse, count = places(one, 45, rng)
        inverse = inverse.to(device)
        *inputs, upstream = (x.to(device) for x in draw(count, heads, rng, dtype, channels=64))
        exact = [x.double() for x in (*inputs, upstream)]
        expected = both_ways(packed_attention("reference", one, inverse, count), exact[:3], exact[3])
        got = both_ways(packed_attention(backend, one, inverse, count), inputs, upstream)
        assert_equal(got, [x.to(torch.float32) for x in expected], inverse, GPU)


def test_gradients_of_keys_keep_their_precision_over_many_tiles() -> None:
    """The first keys of a long document are seen by every tile; their sum must not be rounded once a tile."""
    one = table([[(4096, *TEXT)]])
    rng = torch.Generator().manual_seed(0)
    *inputs, upstream = draw(len(one), (1, 1), rng, torch.bfloat16)
    places = torch.arange(len(one))

    def errors(x: list[torch.Tensor], upstream: torch.Tensor) -> list[torch.Tensor]:
        return both_ways(packed_attention("sdpa", one, places, len(one)), x, upstream)

    got, exact = errors(inputs, upstream), errors([x.double() for x in inputs], upstream.double())
    first = [float((a[:64].double() - b[:64]).norm() / b[:64].norm()) for a, b in zip(got[1:], exact[1:], strict=True)]
    assert max(first[1:]) < 0.008  # bf16 keeps 8 bits: 0.4 % a rounding
