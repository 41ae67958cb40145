"""The key/value cache: sequences of different lengths, appended to, against attention over everything at once."""

import pytest
import torch

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


def cache(sequences: int = 3, capacity: int = 32, dtype: torch.dtype = torch.float64) -> KVCache:
    return KVCache(LAYERS, sequences, capacity, K, E, device=torch.device("cpu"), dtype=dtype)


class Scratch:
    """The same, recomputed from scratch: the whole past of one sequence, key by key."""

    def __init__(self, sequences: int) -> None:
        self.past: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in range(sequences)]

    def attend(self, sequence: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, whole: bool) -> torch.Tensor:
        old = self.past[sequence]
        new = [*old, *zip(k, v, strict=True)]
        rows = []
        for i, query in enumerate(q):
            seen = new if whole else new[: len(old) + i + 1]
            keys = torch.stack([a for a, _ in seen]).repeat_interleave(H // K, 1)
            values = torch.stack([b for _, b in seen]).repeat_interleave(H // K, 1)
            weights = (torch.einsum("he,nhe->hn", query, keys) / E**0.5).softmax(-1)
            rows.append(torch.einsum("hn,nhe->he", weights, values))
        return torch.stack(rows)

    def keep(self, sequence: int, k: torch.Tensor, v: torch.Tensor) -> None:
        self.past[sequence] += list(zip(k, v, strict=True))


def tokens(counts: list[int], rng: torch.Generator, poison: float = 7.0) -> list[torch.Tensor]:
    """q, k, v (R, T, heads, E), where rows are padded with `poison`."""
    out = []
    for heads in (H, K, K):
        x = torch.randn(len(counts), max(counts), heads, E, generator=rng, dtype=torch.float64)
        for row, count in zip(x, counts, strict=True):
            row[count:] = poison
        out.append(x)
    return out


@pytest.mark.parametrize("layer", range(LAYERS))
def test_appending_equals_recomputing_from_scratch(layer: int) -> None:
    rng, kept, scratch = torch.Generator().manual_seed(0), cache(), Scratch(3)
    for sequences, counts, whole in STEPS:
        q, k, v = tokens(counts, rng)
        out = kept.view(sequences, counts, whole)(layer, *(x.flatten(0, 1) for x in (q, k, v)))
        out = out.unflatten(0, (len(counts), -1))
        for row, (s, n) in enumerate(zip(sequences, counts, strict=True)):
            expected = scratch.attend(s, q[row, :n], k[row, :n], v[row, :n], whole)
            torch.testing.assert_close(out[row, :n], expected, atol=1e-12, rtol=1e-10)
            scratch.keep(s, k[row, :n], v[row, :n])
        kept.advance(sequences, counts)
    assert kept.lengths == [len(past) for past in scratch.past] == [11, 7, 19]


def test_layers_are_apart() -> None:
    rng, kept = torch.Generator().manual_seed(1), cache(1)
    q, k, v = (x.flatten(0, 1) for x in tokens([4], rng))
    kept.view([0], [4], False)(1, q, k, v)
    assert kept.k[0].abs().sum() == 0
    torch.testing.assert_close(kept.k[1, 0, :4], k)


def test_a_view_that_is_not_kept_leaves_no_trace() -> None:
    rng, kept = torch.Generator().manual_seed(2), cache()
    kept.view([0, 1, 2], [3, 3, 3], False)(0, *(x.flatten(0, 1) for x in tokens([3, 3, 3], rng)))
    kept.advance([0, 1, 2], [3, 3, 3])
    q, k, v = (x.flatten(0, 1) for x in tokens([2, 2], rng))
    first = kept.view([0, 2], [2, 2], False)(0, q, k, v)
    for _ in range(3):
        kept.view([0, 1, 2], [6, 6, 6], True)(0, *(x.flatten(0, 1) for x in tokens([6, 6, 6], rng)))
    assert kept.lengths == [3, 3, 3]
    torch.testing.assert_close(kept.view([0, 2], [2, 2], False)(0, q, k, v), first, atol=0, rtol=0)


@pytest.mark.parametrize("whole", [False, True])
def test_padding_changes_nothing(whole: bool) -> None:
    """Whatever stands in padded rows, outputs of real rows and everything kept are the same, and nothing is NaN."""
    results = []
    for poison in (0.0, 50.0):
        rng, kept = torch.Generator().manual_seed(3), cache()
        for counts in ([1, 6, 3], [4, 1, 2]):
            view = kept.view([0, 1, 2], counts, whole)
            out = view(0, *(x.flatten(0, 1) for x in tokens(counts, rng, poison)))
            kept.advance([0, 1, 2], counts)
            assert out.isfinite().all()
        rows = out.unflatten(0, (3, -1))
        results.append([rows[0], rows[1, :1], rows[2, :2]])
        results[-1] += [kept.k[0, s, :n] for s, n in enumerate(kept.lengths)]
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_padding_is_written_nowhere() -> None:
    kept, rng = cache(2, capacity=10), torch.Generator().manual_seed(4)
    kept.view([0, 1], [1, 5], False)(0, *(x.flatten(0, 1) for x in tokens([1, 5], rng)))
    assert kept.k[0, 0, 1:].abs().sum() == 0
    assert kept.v[0, 0, 1:].abs().sum() == 0


def test_a_full_sequence_beside_one_with_room() -> None:
    """Only real tokens count against the capacity: a batch holds whatever each of its documents holds alone."""
    kept, rng = cache(2, capacity=10), torch.Generator().manual_seed(5)
    kept.view([0], [9], False)(0, *(x.flatten(0, 1) for x in tokens([9], rng)))
    kept.advance([0], [9])
    q, k, v = tokens([1, 10], rng)
    together = kept.view([0, 1], [1, 10], False)(0, *(x.flatten(0, 1) for x in (q, k, v))).unflatten(0, (2, 10))
    alone = [kept.view([s], [n], False)(0, q[s, :n], k[s, :n], v[s, :n]) for s, n in ((0, 1), (1, 10))]
    torch.testing.assert_close(together[0, :1], alone[0], atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(together[1], alone[1], atol=1e-12, rtol=1e-10)


def test_more_than_the_capacity_is_refused() -> None:
    kept = cache(2, capacity=10)
    kept.advance([1], [8])
    kept.view([1], [2], False)
    with pytest.raises(ValueError, match="needs 11 tokens, the session holds 10"):
        kept.view([0, 1], [1, 3], False)
    assert kept.capacity == 10


def test_a_coarser_cache_answers_in_the_type_of_the_query() -> None:
    kept, rng = cache(1, dtype=torch.bfloat16), torch.Generator().manual_seed(6)
    q, k, v = (x.flatten(0, 1).float() for x in tokens([4], rng))
    out = kept.view([0], [4], True)(0, q, k, v)
    exact = cache(1, dtype=torch.float32).view([0], [4], True)(0, q, k, v)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, exact, atol=0.05, rtol=0.05)
    assert not torch.equal(out, exact)
