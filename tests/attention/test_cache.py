"""The key/value cache: sequences of different lengths, appended to, against attention over everything at once."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from unimodal.attention import KVCache

H, K, E, LAYERS = 4, 2, 8, 2
Step = tuple[list[int], list[int], bool]  # sequences, new tokens of each, bidirectional

STEPS: list[Step] = [
    ([0, 1, 2], [5, 2, 1], False),
    ([2, 0], [4, 4], True),
    ([1], [3], False),
    ([0, 1, 2], [1, 1, 1], False),
    ([1, 2], [1, 6], True),
    ([0, 2], [1, 7], False),  # the longest sequence gets the fewest tokens
]
ROUTES = ["written out", "operator"]  # how a layer calls its view


def cache(
    sequences: int = 3, capacity: int = 32, dtype: torch.dtype = torch.float64, heads: int = K, channels: int = E
) -> KVCache:  # fmt: skip
    return KVCache(LAYERS, sequences, capacity, heads, channels, device=torch.device("cpu"), dtype=dtype)


def attend(
    kept: KVCache, sequences: list[int], counts: list[int], whole: bool, qkv: list[torch.Tensor], layer: int = 0,
    route: str = "written out",
) -> torch.Tensor:  # fmt: skip
    """Outputs (R, T, H, E) of a view."""
    view = kept.view(sequences, counts, whole)
    one = view.layer(layer) if route == "written out" else view.packed().layer(layer)
    return one(*(x.flatten(0, 1) for x in qkv)).unflatten(0, (len(counts), -1))


class Scratch:
    """The same, recomputed from scratch: the whole past of one sequence, key by key."""

    def __init__(self, sequences: int) -> None:
        self.past: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in range(sequences)]

    def attend(self, sequence: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, whole: bool) -> torch.Tensor:
        old = self.past[sequence]
        new = [*old, *zip(k, v, strict=True)]
        groups = q.shape[1] // k.shape[1]
        rows = []
        for i, query in enumerate(q):
            seen = new if whole else new[: len(old) + i + 1]
            keys = torch.stack([a for a, _ in seen]).repeat_interleave(groups, 1)
            values = torch.stack([b for _, b in seen]).repeat_interleave(groups, 1)
            weights = (torch.einsum("he,nhe->hn", query, keys) / E**0.5).softmax(-1)
            rows.append(torch.einsum("hn,nhe->he", weights, values))
        return torch.stack(rows)

    def keep(self, sequence: int, k: torch.Tensor, v: torch.Tensor) -> None:
        self.past[sequence] += list(zip(k, v, strict=True))


def tokens(
    counts: list[int], rng: torch.Generator, poison: float = 7.0, heads: int = K, channels: int = E
) -> list[torch.Tensor]:  # fmt: skip
    """q, k, v (R, T, heads, E), where rows are padded with `poison`."""
    out = []
    for n in (H, heads, heads):
        x = torch.randn(len(counts), max(counts), n, channels, generator=rng, dtype=torch.float64)
        for row, count in zip(x, counts, strict=True):
            row[count:] = poison
        out.append(x)
    return out


def test_the_layout() -> None:
    kept = KVCache(2, 3, 7, 5, 8, device=torch.device("cpu"), dtype=torch.bfloat16)
    assert kept.k.shape == kept.v.shape == (2, 3, 5, 7, 8)  # layers, N, K, capacity, E: a head's past is contiguous
    assert kept.k.is_contiguous()
    assert kept.k.dtype == torch.bfloat16
    assert (kept.capacity, kept.lengths) == (7, [0, 0, 0])


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("layer", range(LAYERS))
def test_appending_equals_recomputing_from_scratch(layer: int, route: str) -> None:
    rng, kept, scratch = torch.Generator().manual_seed(0), cache(), Scratch(3)
    for sequences, counts, whole in STEPS:
        q, k, v = tokens(counts, rng)
        out = attend(kept, sequences, counts, whole, [q, k, v], layer, route)
        for row, (s, n) in enumerate(zip(sequences, counts, strict=True)):
            expected = scratch.attend(s, q[row, :n], k[row, :n], v[row, :n], whole)
            torch.testing.assert_close(out[row, :n], expected, atol=1e-12, rtol=1e-10)
            scratch.keep(s, k[row, :n], v[row, :n])
        kept.advance(sequences, counts)
    assert kept.lengths == [len(past) for past in scratch.past] == [11, 7, 19]


@st.composite
def steps(draw: st.DrawFn) -> tuple[list[Step], list[bool]]:
    """Calls for any of five sequences in any order, and which of them are kept."""
    made = []
    for _ in range(draw(st.integers(1, 5))):
        sequences = draw(st.lists(st.integers(0, 4), min_size=1, max_size=5, unique=True))
        even = draw(st.booleans())
        one = st.integers(1, 4)
        counts = [draw(one)] * len(sequences) if even else [draw(one) for _ in sequences]
        made.append((sequences, counts, draw(st.booleans())))
    return made, [draw(st.booleans()) for _ in made]


@pytest.mark.parametrize("route", ROUTES)
@given(calls=steps(), heads=st.sampled_from([1, 2, 4]), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_any_calls_equal_recomputing_from_scratch(
    route: str, calls: tuple[list[Step], list[bool]], heads: int, seed: int
) -> None:  # fmt: skip
    """Runs of neighbours, single rows and rows in any order, kept and only looked at, with and without grouped heads."""
    rng, kept, scratch = torch.Generator().manual_seed(seed), cache(5, heads=heads), Scratch(5)
    for (sequences, counts, whole), keep in zip(*calls, strict=True):
        before = [(kept.k[:, s, :, :n].clone(), kept.v[:, s, :, :n].clone()) for s, n in enumerate(kept.lengths)]
        q, k, v = tokens(counts, rng, heads=heads)
        out = attend(kept, sequences, counts, whole, [q, k, v], 1, route)
        assert out.isfinite().all()
        for row, (s, n) in enumerate(zip(sequences, counts, strict=True)):
            expected = scratch.attend(s, q[row, :n], k[row, :n], v[row, :n], whole)
            torch.testing.assert_close(out[row, :n], expected, atol=1e-12, rtol=1e-10)
            if keep:
                scratch.keep(s, k[row, :n], v[row, :n])
        for s, (past_k, past_v) in enumerate(before):  # bit by bit, up to each length
            assert torch.equal(kept.k[:, s, :, : past_k.shape[2]], past_k)
            assert torch.equal(kept.v[:, s, :, : past_v.shape[2]], past_v)
        if keep:
            kept.advance(sequences, counts)
    assert kept.lengths == [len(past) for past in scratch.past]


def test_layers_are_apart() -> None:
    rng, kept = torch.Generator().manual_seed(1), cache(1)
    q, k, v = tokens([4], rng)
    attend(kept, [0], [4], False, [q, k, v], layer=1)
    assert kept.k[0].abs().sum() == 0
    torch.testing.assert_close(kept.k[1, 0, :, :4], k[0].transpose(0, 1))
    torch.testing.assert_close(kept.v[1, 0, :, :4], v[0].transpose(0, 1))


@pytest.mark.parametrize("route", ROUTES)
def test_a_view_that_is_not_kept_leaves_no_trace(route: str) -> None:
    rng, kept = torch.Generator().manual_seed(2), cache()
    attend(kept, [0, 1, 2], [3, 3, 3], False, tokens([3, 3, 3], rng))
    kept.advance([0, 1, 2], [3, 3, 3])
    before = kept.k[..., :3, :].clone(), kept.v[..., :3, :].clone()
    qkv = tokens([2, 2], rng)
    first = attend(kept, [0, 2], [2, 2], False, qkv)
    for _ in range(3):
        attend(kept, [0, 1, 2], [6, 6, 6], True, tokens([6, 6, 6], rng), route=route)
        attend(kept, [2, 0], [1, 9], False, tokens([1, 9], rng), route=route)
    assert kept.lengths == [3, 3, 3]
    assert torch.equal(kept.k[..., :3, :], before[0])
    assert torch.equal(kept.v[..., :3, :], before[1])
    assert torch.equal(attend(kept, [0, 2], [2, 2], False, qkv), first)


@pytest.mark.parametrize("whole", [False, True])
def test_padding_changes_nothing(whole: bool) -> None:
    """Whatever stands in padded rows, outputs of real rows and everything kept are the same, and nothing is NaN."""
    results = []
    for poison in (0.0, 50.0):
        rng, kept = torch.Generator().manual_seed(3), cache()
        for counts in ([1, 6, 3], [4, 1, 2]):
            out = attend(kept, [0, 1, 2], counts, whole, tokens(counts, rng, poison))
            kept.advance([0, 1, 2], counts)
            assert out.isfinite().all()
        results.append([out[0], out[1, :1], out[2, :2]])
        results[-1] += [kept.k[0, s, :, :n] for s, n in enumerate(kept.lengths)]
        results[-1] += [kept.v[0, s, :, :n] for s, n in enumerate(kept.lengths)]
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_padding_is_written_nowhere() -> None:
    kept, rng = cache(2, capacity=10), torch.Generator().manual_seed(4)
    attend(kept, [0, 1], [1, 5], False, tokens([1, 5], rng))
    assert kept.k[0, 0, :, 1:].abs().sum() == 0
    assert kept.v[0, 0, :, 1:].abs().sum() == 0
    assert kept.k[0, 1, :, 5:].abs().sum() == 0
    assert (kept.k[0, 1, :, :5].abs().sum(-1) > 0).all()


def test_a_full_sequence_beside_one_with_room() -> None:
    """Only real tokens count against the capacity: a batch holds whatever each of its documents holds alone."""
    kept, rng = cache(2, capacity=10), torch.Generator().manual_seed(5)
    attend(kept, [0], [9], False, tokens([9], rng))
    kept.advance([0], [9])
    q, k, v = tokens([1, 10], rng)
    together = attend(kept, [0, 1], [1, 10], False, [q, k, v])
    alone = [attend(kept, [s], [n], False, [x[s : s + 1, :n] for x in (q, k, v)]) for s, n in ((0, 1), (1, 10))]
    torch.testing.assert_close(together[0, :1], alone[0][0], atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(together[1], alone[1][0], atol=1e-12, rtol=1e-10)


def test_more_than_the_capacity_is_refused() -> None:
    kept = cache(2, capacity=10)
    kept.advance([1], [8])
    kept.view([1], [2], False)
    with pytest.raises(ValueError, match="needs 11 tokens, the session holds 10"):
        kept.view([0, 1], [1, 3], False)
    assert kept.capacity == 10


def test_a_coarser_cache_answers_in_the_type_of_the_query() -> None:
    kept, rng = cache(1, dtype=torch.bfloat16), torch.Generator().manual_seed(6)
    qkv = [x.float() for x in tokens([4], rng)]
    out = attend(kept, [0], [4], True, qkv)
    exact = attend(cache(1, dtype=torch.float32), [0], [4], True, qkv)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, exact, atol=0.05, rtol=0.05)  # bf16 keeps 8 bits
    assert not torch.equal(out, exact)


# --- in place


class Copies(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes outside of the cache, and whether the cache was written."""

    def __init__(self, kept: KVCache) -> None:
        super().__init__()
        self.own = {x.untyped_storage().data_ptr() for x in (kept.k, kept.v)}
        self.largest, self.writes = 0, 0

    def __torch_dispatch__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        out = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, torch.Tensor):
                held = x.untyped_storage().data_ptr() in self.own
                self.largest = max(self.largest, 0 if held else x.numel())
                self.writes += held and func._schema.is_mutable
        return out


PAST, WIDE = 200, 64  # tokens held, and channels of a head: a mask is smaller than what it is over
CALLS: list[Step] = [
    ([0, 1, 2, 3], [1, 1, 1, 1], False),  # one token a sequence, as text is written
    ([1, 2], [4, 4], True),  # some rows, neighbours
    ([3, 0], [2, 2], True),  # two runs of one row
    ([0, 1, 3], [1, 3, 2], False),  # different lengths: with a mask
]


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize(("sequences", "counts", "whole"), CALLS)
def test_the_past_is_never_copied(
    sequences: list[int], counts: list[int], whole: bool, uneven: bool, heads: int
) -> None:  # fmt: skip
    """Nothing as large as the past of one sequence, all of its key heads, is made; new tokens are written in place."""
    rng, kept = torch.Generator().manual_seed(7), cache(4, PAST + 8, heads=heads, channels=WIDE)
    kept.k.normal_(generator=rng)
    kept.v.normal_(generator=rng)
    kept.advance([0, 1, 2, 3], [PAST, PAST - 7 * uneven, PAST, PAST - uneven])
    where = kept.k.data_ptr(), kept.v.data_ptr()
    q, k, v = tokens(counts, rng, heads=heads, channels=WIDE)
    with Copies(kept) as copies:
        out = attend(kept, sequences, counts, whole, [q, k, v])
    mask = len(counts) * max(counts) * (PAST + 8) * H // heads  # for each query of a key head
    assert copies.largest <= max(q.numel(), mask) < heads * PAST * WIDE
    assert copies.writes > 0
    assert (kept.k.data_ptr(), kept.v.data_ptr()) == where
    for row, (s, n) in enumerate(zip(sequences, counts, strict=True)):
        start = kept.lengths[s]
        assert torch.equal(kept.k[0, s, :, start : start + n], k[row, :n].transpose(0, 1))
    assert out.isfinite().all()


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_a_first_prompt_needs_no_mask(kv_heads: int) -> None:
    """It is causal; written out, its mask would grow with the square of the prompt."""
    rng = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, 9, heads, E, generator=rng, dtype=torch.float64) for heads in (4, kv_heads, kv_heads))
    device = torch.device("cpu")
    outputs = []
    for packed in (False, True):
        kept = KVCache(1, 2, 16, kv_heads, E, device=device, dtype=torch.float64)
        view = kept.view([0, 1], [9, 9], False)
        assert all(run.mask is None for run in view.runs)
        layer = (view.packed() if packed else view).layer(0)
        outputs.append(layer(*(x.flatten(0, 1) for x in (q, k, v))).unflatten(0, (2, 9)))
    for out in outputs:
        for row in range(2):
            torch.testing.assert_close(out[row], scratch_causal(q[row], k[row], v[row]), atol=1e-12, rtol=1e-10)


def scratch_causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Query by query, with every key head repeated."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    rows = []
    for i, query in enumerate(q):
        weights = (torch.einsum("he,nhe->hn", query, k[: i + 1]) / E**0.5).softmax(-1)
        rows.append(torch.einsum("hn,nhe->he", weights, v[: i + 1]))
    return torch.stack(rows)
