"""The `xformers` back end as far as a CPU can tell: its problems, its gathering and scattering, and its masks.

xformers has no kernels for a CPU, and is an extra: a kernel written out here stands for its kernels, and where it is
installed its own masks are compared.
"""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unimodal.attention import SegmentTable, choose_backend, dense_mask, packed_attention, xformers
from unimodal.attention.xformers import Group, Kernel, XformersAttention, problems

Spans = list[list[tuple[int, bool, bool]]]  # documents of (length, bidirectional, private)

TEXT, LEARNED, CLEAN, CAUSAL_PRIVATE = (False, False), (True, True), (True, False), (False, True)
SPAN = st.tuples(st.integers(1, 7), st.sampled_from([TEXT, LEARNED, CLEAN, CAUSAL_PRIVATE])).map(
    lambda s: (s[0], *s[1])
)  # fmt: skip
LAYOUTS = st.lists(st.lists(SPAN, min_size=1, max_size=7), min_size=1, max_size=4)
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def table(documents: Spans) -> SegmentTable:
    spans = [(d, *span) for d, document in enumerate(documents) for span in document]
    return SegmentTable(*(np.array(column) for column in zip(*spans, strict=True)))


def plan(documents: Spans, extra: int = 0, seed: int = 0) -> tuple[XformersAttention, torch.Tensor, int]:
    """The back end with a kernel that a CPU has, and where the tokens are among so many places."""
    one = table(documents)
    count = len(one) + extra
    inverse = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[: len(one)]
    return XformersAttention(one, inverse, count, kernel="written out"), inverse, count


def draw(count: int, heads: tuple[int, int], dtype: torch.dtype) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    h, k = heads
    return [torch.randn(count, n, 8, generator=rng).to(dtype) for n in (h, k, k, h)]


# --- a kernel for a CPU


def materialized(group: Group) -> torch.Tensor:
    """What xformers' masks of these names are, (M, L): 0 where a query sees a key."""
    blocks = []
    for m, n in zip(group.q_lengths, group.k_lengths, strict=True):
        seen = torch.ones(m, n, dtype=torch.bool)
        blocks.append(seen.tril(n - m) if group.causal else seen)
    return torch.zeros(sum(group.q_lengths), sum(group.k_lengths)).masked_fill_(~torch.block_diag(*blocks), -torch.inf)


def probabilities(q: torch.Tensor, k: torch.Tensor, group: Group) -> tuple[torch.Tensor, torch.Tensor]:
    """(H, M, L), and log-sum-exp."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = torch.einsum("mhe,lhe->hml", q, k) * q.shape[-1] ** -0.5 + materialized(group).to(q.dtype)
    return scores.softmax(-1), scores.logsumexp(-1)


def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, group: Group) -> tuple[torch.Tensor, torch.Tensor]:
    p, lse = probabilities(q, k, group)
    return torch.einsum("hml,lhe->mhe", p, v.repeat_interleave(q.shape[1] // v.shape[1], 1)), lse


def backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor,
    group: Group,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """From outputs and log-sum-exp, as FlashAttention has it (arXiv 2205.14135, section B.4)."""
    groups, scale = q.shape[1] // k.shape[1], q.shape[-1] ** -0.5
    keys, values = (x.repeat_interleave(groups, 1) for x in (k, v))
    scores = torch.einsum("mhe,lhe->hml", q, keys) * scale + materialized(group).to(q.dtype)
    p = (scores - lse[:, :, None]).exp()
    delta = (grad * out).sum(-1).T  # (H, M)
    ds = p * (torch.einsum("mhe,lhe->hml", grad, values) - delta[:, :, None]) * scale
    dk, dv = torch.einsum("hml,mhe->lhe", ds, q), torch.einsum("hml,mhe->lhe", p, grad)
    dk, dv = (x.unflatten(1, (-1, groups)).sum(2) for x in (dk, dv))
    return torch.einsum("hml,lhe->mhe", ds, keys), dk, dv


xformers.KERNELS["written out"] = Kernel(forward, backward)


# --- the plan


@given(documents=LAYOUTS)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_problems_say_the_rule(documents: Spans) -> None:
    one = table(documents)
    seen = torch.zeros(len(one), len(one), dtype=torch.bool)
    asked = torch.zeros(len(one), dtype=torch.long)
    for problem in problems(one):
        queries, keys = (torch.cat([torch.arange(a, b) for a, b in side]) for side in problem[1:])
        block = torch.ones(len(queries), len(keys), dtype=torch.bool)
        seen[queries[:, None], keys] = block.tril(len(keys) - len(queries)) if problem.causal else block
        asked[queries] += 1
        assert len(keys.unique()) == len(keys) >= len(queries)
    assert torch.equal(seen, dense_mask(one.tokens(CPU)))
    assert (asked == 1).all()


def test_text_is_one_problem_a_run() -> None:
    one = table([[(2, *TEXT), (3, *TEXT), (4, *LEARNED), (1, *TEXT), (4, *CLEAN), (2, *TEXT)], [(5, *TEXT)]])
    assert list(problems(one)) == [
        (False, ((5, 9),), ((0, 9),)),  # the private copy, over the text before it
        (True, ((0, 5), (9, 10)), ((0, 5), (9, 10))),  # text before and after it, which do not see it
        (False, ((10, 14),), ((0, 5), (9, 14))),
        (True, ((14, 16),), ((0, 5), (9, 16))),
        (True, ((16, 21),), ((16, 21),)),
    ]
    assert list(problems(table([[(2, *TEXT), (3, *CAUSAL_PRIVATE), (1, *TEXT)]]))) == [
        (True, ((2, 5),), ((0, 5),)),
        (True, ((0, 2), (5, 6)), ((0, 2), (5, 6))),
    ]


@given(documents=LAYOUTS, extra=st.integers(0, 9))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_masks_mapped_back_by_place_are_the_rule(documents: Spans, extra: int) -> None:
    """With xformers' own masks where it is installed: all of a group's, from the numbers that the operator is given."""
    attention, inverse, count = plan(documents, extra)
    seen = torch.zeros(count, count, dtype=torch.bool)
    for group, mine, theirs in xformers._groups(attention.lengths, attention.starts):
        for starts, lengths in ((group.q_starts, group.q_lengths), (group.k_starts, group.k_lengths)):
            assert starts.dtype == torch.int32
            assert starts.tolist() == [0, *np.cumsum(lengths)]
        visible = materialized(group) == 0
        query, key = visible.nonzero(as_tuple=True)
        seen[attention.queries[mine][query], attention.keys[theirs][key]] = True
    expected = torch.zeros_like(seen)
    expected[inverse[:, None], inverse] = dense_mask(table(documents).tokens(CPU))
    assert torch.equal(seen, expected)


@given(documents=LAYOUTS)
@settings(max_examples=30, deadline=None, derandomize=True)
def test_xformers_masks_are_what_is_meant(documents: Spans) -> None:
    pytest.importorskip("xformers")
    attention, *_ = plan(documents)
    for group, *_ in xformers._groups(attention.lengths, attention.starts):
        bias = xformers.bias(group)
        assert type(bias).__name__ == (
            "BlockDiagonalCausalFromBottomRightMask" if group.causal else "BlockDiagonalMask"
        )  # fmt: skip
        made = bias.materialize((sum(group.q_lengths), sum(group.k_lengths)))
        assert torch.equal(made, materialized(group))
        same = type(bias).from_seqlens(group.q_lengths, group.k_lengths, device=CPU)
        for side in ("q_seqinfo", "k_seqinfo"):
            ours, theirs = getattr(bias, side), getattr(same, side)
            assert torch.equal(ours.seqstart, theirs.seqstart)
            assert (ours.max_seqlen, ours.min_seqlen, ours.seqstart_py) == (
                theirs.max_seqlen, theirs.min_seqlen, theirs.seqstart_py,
            )  # fmt: skip


# --- the operator


@given(
    documents=LAYOUTS, heads=st.sampled_from([(2, 2), (4, 2), (3, 1)]), extra=st.integers(0, 9),
    seed=st.integers(0, 2**16),
)  # fmt: skip
@settings(max_examples=40, deadline=None, derandomize=True)
def test_equals_the_reference_forward_and_backward(
    documents: Spans, heads: tuple[int, int], extra: int, seed: int
) -> None:  # fmt: skip
    attention, inverse, count = plan(documents, extra, seed)
    *inputs, upstream = draw(count, heads, torch.float64)
    results = []
    for one in (attention, packed_attention("reference", table(documents), inverse, count)):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = one.layer(0)(*leaves)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, upstream)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-9)
    empty = torch.ones(count, dtype=torch.bool).index_fill_(0, inverse, False)
    assert all((x[empty] == 0).all() for x in results[0])


def test_sums_over_problems_are_kept_in_fp32() -> None:
    """The first token is a key of a hundred problems; bf16 would stop counting at 256."""
    attention, inverse, count = plan([[(1, *TEXT), *[(3, *LEARNED)] * 100]])
    q, k, v = (torch.zeros(count, 1, 8, dtype=torch.bfloat16) for _ in range(3))
    v.requires_grad_()
    out = attention.layer(0)(q, k, v)
    (gradient,) = torch.autograd.grad(out.sum(), v)
    assert gradient.dtype == torch.bfloat16
    assert gradient[inverse[0], 0, 0] == 76  # 1 + 300 / 4, where every query of a problem sees four keys alike


@pytest.mark.parametrize("heads", [(2, 2), (4, 2)])
def test_the_operator_keeps_its_promises_to_the_compiler(heads: tuple[int, int]) -> None:
    attention, _, count = plan([[(5, *TEXT), (9, *LEARNED), (3, *TEXT)], [(4, *CLEAN)]], 4)
    q, k, v, _ = draw(count, heads, torch.float32)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    layout = attention.queries, attention.keys, attention.lengths, attention.starts, attention.kernel
    torch.library.opcheck(xformers.block_attention, (*inputs, *layout))


# --- how xformers is called


class Operator:
    """An operator of xformers: a name, and how it keeps log-sum-exp."""

    def __init__(self, name: str, packed: bool) -> None:
        self.NAME, self.VARLEN_LSE_PACKED = name, packed


class Library:
    """`xformers.ops.fmha` as its source says it is (0.0.35), on a CPU."""

    MemoryEfficientAttentionFlashAttentionOp = Operator("flashF", True), Operator("flashB", True)
    MemoryEfficientAttentionCutlassOp = Operator("cutlassF", False), Operator("cutlassB", False)

    def memory_efficient_attention_forward_requires_grad(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, group: Group, op: Operator
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """q, k, v (1, M | L, H, E), or (1, M | L, K, G, E) with keys expanded."""
        assert op.NAME.endswith("F")
        assert q.shape[0] == 1
        assert q.shape[2:] == k.shape[2:] == v.shape[2:]
        if q.ndim == 5:
            assert k.stride(3) == 0
        flat = [x[0].flatten(1, -2) if x.ndim == 5 else x[0] for x in (q, k, v)]
        out, lse = forward(*flat, group)
        return out.view(q.shape), self.formatted(lse, group, op).unflatten(1, q.shape[2:-1])

    def formatted(self, lse: torch.Tensor, group: Group, op: Operator) -> torch.Tensor:
        """(1, H, M), or (n, H, longest and some more) with anything in the rest."""
        if op.VARLEN_LSE_PACKED:
            return lse[None]
        room = lse.new_full((len(group.q_lengths), len(lse), max(group.q_lengths) + 5), torch.nan)
        for row, part in zip(room, lse.split(group.q_lengths, 1), strict=True):
            row[:, : part.shape[1]] = part
        return room

    def memory_efficient_attention_backward(
        self, grad: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, q: torch.Tensor, k: torch.Tensor,
        v: torch.Tensor, group: Group, op: Operator,
    ) -> tuple[torch.Tensor, ...]:  # fmt: skip
        """Heads are not in groups here: no operator has that backward."""
        assert op.NAME.endswith("B")
        assert q.ndim == k.ndim == v.ndim == grad.ndim == out.ndim == 4
        assert q.shape[2:] == k.shape[2:] == v.shape[2:]
        if op.VARLEN_LSE_PACKED:
            assert lse.shape == (1, q.shape[2], q.shape[1])
            packed = lse[0]
        else:
            assert lse.shape == (len(group.q_lengths), q.shape[2], max(group.q_lengths))
            packed = torch.cat([row[:, :n] for row, n in zip(lse, group.q_lengths, strict=True)], 1)
        return tuple(x[None] for x in backward(grad[0], q[0], k[0], v[0], out[0], packed, group))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", [(2, 2), (4, 2)])
def test_the_library_is_called_as_it_wants(
    heads: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """Shapes, grouped heads and the two formats of log-sum-exp; a stand-in for what only a GPU can run."""
    library: Any = Library()
    monkeypatch.setattr(xformers, "_fmha", lambda: library)
    monkeypatch.setattr(xformers, "bias", lambda group: group)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    documents: Spans = [[(5, *TEXT), (6, *LEARNED), (6, *CLEAN), (3, *TEXT)], [(4, *CLEAN), (2, *CAUSAL_PRIVATE)]]
    attention, inverse, count = plan(documents, 3)
    attention.kernel = "xformers"
    *inputs, upstream = draw(count, heads, dtype)
    results = []
    for one in (attention, packed_attention("reference", table(documents), inverse, count)):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = one.layer(0)(*leaves)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, upstream)])
    for a, b in zip(*results, strict=True):
        assert (a.double() - b.double()).norm() <= (0.02 if dtype == torch.bfloat16 else 1e-5) * b.double().norm()
    assert xformers.kernel(CUDA) == "flashF in 16 bits, cutlassF in 32"


# --- where it runs


def test_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert xformers.missing(CUDA) == "install unimodal[xformers]"
    with pytest.raises(ValueError, match=r"xformers cannot run here: install unimodal\[xformers\]$"):
        choose_backend("xformers", CPU)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert xformers.missing(CPU) == "its kernels need CUDA, the device is cpu"

    def broken() -> None:
        raise ImportError("requires Flash-Attention\nof another version")

    monkeypatch.setattr(xformers, "_fmha", broken)
    assert xformers.missing(CUDA) == "xformers cannot be imported: requires Flash-Attention of another version"


def test_an_extension_that_does_not_load_is_told() -> None:
    library = pytest.importorskip("xformers._cpp_lib")
    problem = xformers.missing(CUDA)
    assert (problem is None) == (library._cpp_library_load_exception is None)
    assert problem is None or ("built for" in problem and "\n" not in problem)
