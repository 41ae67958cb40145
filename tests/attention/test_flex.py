"""The `flex` back end as far as a CPU can tell: its blocks against torch's, its outputs, gradients and graphs.

FlexAttention refuses gradients on a CPU, where it has no kernels for them. Where that refusal is lifted here, its own
backward runs as plain matrix products, which read the mask of each element but no block; the compiled forward reads blocks.
"""

import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.backends.debugging import aot_eager
from torch.fx.experimental import _config
from torch.nn.attention import flex_attention as torch_flex

from unimodal.attention import SegmentTable, dense_mask, packed_attention
from unimodal.attention.flex import BLOCK, FlexAttention, blocks, kernel, missing, padded, sight
from unimodal.backbone import Backbone, BackboneConfig, Experts

Spans = list[list[tuple[int, bool, bool]]]  # documents of (length, bidirectional, private)

TEXT, LEARNED, CLEAN, CAUSAL_PRIVATE = (False, False), (True, True), (True, False), (False, True)
LENGTHS = st.one_of(st.sampled_from([1, 127, 128, 129, 255, 256]), st.integers(1, 200))
SPAN = st.tuples(LENGTHS, st.sampled_from([TEXT, LEARNED, CLEAN, CAUSAL_PRIVATE])).map(lambda s: (s[0], *s[1]))
LAYOUTS = st.lists(st.lists(SPAN, min_size=1, max_size=6), min_size=1, max_size=3)
MANY = st.lists(st.lists(SPAN.map(lambda s: (1 + s[0] % 9, *s[1:])), min_size=1, max_size=3), min_size=20, max_size=60)
NAMES = [f"{full}{side}_{what}" for side in ("kv", "q") for full in ("", "full_") for what in ("num_blocks", "indices")]
CPU = torch.device("cpu")

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@pytest.fixture
def traced() -> Iterator[None]:
    """For functions that a compiler traces: a fresh one, and no run-time checks of shapes, which it cannot look through."""
    torch._dynamo.reset()
    jaxtyping.config.update("jaxtyping_disable", True)
    with _config.patch(use_duck_shape=False):
        yield
    jaxtyping.config.update("jaxtyping_disable", False)
    torch._dynamo.reset()


def table(documents: Spans) -> SegmentTable:
    spans = [(d, *span) for d, document in enumerate(documents) for span in document]
    return SegmentTable(*(np.array(column) for column in zip(*spans, strict=True)))


def plan(documents: Spans, extra: int = 0, seed: int = 0) -> tuple[FlexAttention, torch.Tensor, int]:
    """The back end, and where the tokens are among so many places."""
    one = table(documents)
    count = len(one) + extra
    inverse = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[: len(one)]
    return FlexAttention(one, inverse, count), inverse, count


def draw(count: int, heads: tuple[int, int], channels: int, dtype: torch.dtype, seed: int = 0) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    h, k = heads
    return [torch.randn(count, n, channels, generator=rng).to(dtype) for n in (h, k, k, h)]


# --- the plan


@given(documents=st.one_of(LAYOUTS, MANY), extra=st.integers(0, 130))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_blocks_equal_torchs_own(documents: Spans, extra: int) -> None:
    """Counts, numbers in order, by row and by column, of partial and full blocks; and the rows they stand for."""
    attention, _, count = plan(documents, extra)
    rows = padded(count)
    mask = attention.mask()
    expected = torch_flex.create_block_mask(mask.mask_mod, None, None, rows, rows, device="cpu")
    for name in NAMES:
        got, wanted = getattr(mask, name), getattr(expected, name)
        assert (got.dtype, got.shape, got.stride()) == (wanted.dtype, wanted.shape, wanted.stride()), name
        assert torch.equal(got, wanted), name
    assert torch.equal(mask.to_dense(), expected.to_dense())
    assert mask.shape == expected.shape
    assert mask.BLOCK_SIZE == expected.BLOCK_SIZE == (BLOCK, BLOCK)


@given(documents=st.one_of(LAYOUTS, MANY), extra=st.integers(0, 130))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_two_numbers_a_token_say_the_rule(documents: Spans, extra: int) -> None:
    one = table(documents)
    rows = padded(len(one) + extra)
    last, until = sight(one, rows)
    at = np.arange(rows)
    seen = (at <= last[:, None]) & (at[:, None] < until)
    expected = np.eye(rows, dtype=bool)  # what is no token sees itself
    expected[: len(one), : len(one)] = dense_mask(one.tokens(CPU)).numpy()
    assert np.array_equal(seen, expected)
    assert seen.any(1).all()


def test_a_hidden_block_is_absent_and_a_half_hidden_one_partial() -> None:
    one = table([[(128, *TEXT), (300, *LEARNED), (84, *CLEAN), (128, *TEXT)]])
    partial, full = blocks(*sight(one, padded(len(one))))
    # The text at the end: the first block of text whole, the private blocks absent but for the one shared with the
    # clean copy, and its own triangle.
    assert (full[4].tolist(), partial[4].tolist()) == ([True, *[False] * 4], [False, False, False, True, True])
    assert full[1].tolist() == [True, True, True, False, False]  # the private block sees all of itself
    assert partial[1].tolist() == [False, False, False, True, False]


def test_few_lengths_and_little_padding() -> None:
    made = {padded(places) for places in range(64, 16_385, 64)}
    assert all(rows % BLOCK == 0 for rows in made)
    assert all(places <= padded(places) <= max(places * 9 / 8, places + BLOCK) for places in range(1, 16_385))
    assert [sum(low < rows <= 2 * low for rows in made) for low in (2048, 4096, 8192)] == [8, 8, 8]


def test_a_plan_of_8192_tokens_is_quick() -> None:
    """A third of a millisecond on an idle core, and less than a busy one may need; the rule over S x S takes 500."""
    one = [((256, *CLEAN) if i % 2 else (444, *TEXT)) for i in range(24)]
    documents = [[*one[:-1], (36, *CLEAN)]]
    inverse = torch.arange(sum(n for n, *_ in documents[0]))
    times = []
    for _ in range(20):
        start = time.perf_counter()
        FlexAttention(table(documents), inverse, len(inverse))
        times.append(time.perf_counter() - start)
    assert min(times) < 5e-3


# --- outputs and gradients


@given(
    documents=LAYOUTS,
    heads=st.sampled_from([(2, 2), (4, 2)]),
    channels=st.sampled_from([8, 16]),
    extra=st.integers(0, 90),
)
@settings(max_examples=12, deadline=None, derandomize=True)
def test_outputs_equal_the_reference(documents: Spans, heads: tuple[int, int], channels: int, extra: int) -> None:
    attention, inverse, count = plan(documents, extra)
    q, k, v, _ = draw(count, heads, channels, torch.float64)
    with torch.no_grad():
        got = attention.layer(3)(q, k, v)
    expected = packed_attention("reference", table(documents), inverse, count).layer(3)(q, k, v)
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-9)


def test_gradients_are_refused_on_a_cpu() -> None:
    attention, _, count = plan([[(5, *TEXT)]])
    q, k, v, _ = draw(count, (2, 2), 16, torch.float32)
    with pytest.raises(NotImplementedError, match="does not support backward on CPU"):
        attention.layer(0)(q.requires_grad_(), k, v)


LAYERS: list[tuple[Spans, int]] = [  # and further places
    ([[(30, *TEXT), (64, *LEARNED), (64, *CLEAN), (20, *TEXT)], [(40, *TEXT)]], 38),
    ([[(100, *CAUSAL_PRIVATE), (50, *TEXT)], [(40, *CLEAN)]], 2),
    ([[(3, *TEXT)]] * 40, 100),
]  # one padded length, different layouts and places
LONGER: tuple[Spans, int] = ([[(300, *TEXT), (200, *CLEAN)]], 12)


@pytest.mark.parametrize("heads", [(2, 2), (4, 2)])
def test_gradients_equal_the_reference(heads: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)
    for documents, extra in [*LAYERS, LONGER]:
        attention, inverse, count = plan(documents, extra)
        *inputs, upstream = draw(count, heads, 8, torch.float64)
        results = []
        for one in (attention, packed_attention("reference", table(documents), inverse, count)):
            leaves = [x.clone().requires_grad_() for x in inputs]
            out = one.layer(0)(*leaves)
            results.append([out.detach(), *torch.autograd.grad(out, leaves, upstream)])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-9)


# --- within the compiled layer


CONFIG = BackboneConfig(
    width=32, depth=1, heads=4, kv_heads=2, mlp_width=40, vocabulary=50, positions="sequential", head_dim=16,
    experts=Experts(mlp=True),
)  # fmt: skip


def backbone(backend: Any = None) -> Backbone:
    """The same each time, or with a compiled layer, as training has it, by another compiler."""
    torch.manual_seed(0)
    made = Backbone(CONFIG).double()
    if backend is not None:
        layer: Any = type(made.layers[0]).step
        made._layer = torch.compile(layer, dynamic=True, fullgraph=True, backend=backend)
    return made


def step(made: Backbone, documents: Spans, extra: int, name: str) -> list[torch.Tensor]:
    """Hidden states and every gradient, as a training step has them."""
    one = table(documents)
    count = len(one) + extra
    rng = torch.Generator().manual_seed(1)
    inverse = torch.randperm(count, generator=rng)[: len(one)]
    attention = packed_attention(name, one, inverse, count)
    x = torch.randn(count, 32, generator=rng, dtype=torch.float64).requires_grad_()
    out = made(x, torch.arange(count)[:, None], (count // 3, count - count // 3), attention)
    weight = torch.zeros_like(out).index_copy(0, inverse, torch.randn(len(one), 32, generator=rng, dtype=torch.float64))
    parameters = [p for n, p in made.named_parameters() if n.startswith("layers")]
    return [out[inverse].detach(), *torch.autograd.grad(out, [x, *parameters], weight)]


class Graphs:
    """A compiler that keeps the arguments of FlexAttention in each graph, and leaves the rest to another."""

    def __init__(self, inner: Callable[..., Any]) -> None:
        self.inner, self.seen = inner, list[list[Any]]()

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        nodes = [node for node in graph.graph.nodes if node.target is torch.ops.higher_order.flex_attention]
        args = [torch.fx.node.map_arg(node.args, lambda a: a.meta.get("example_value", a.name)) for node in nodes]
        compiled = self.inner(graph, inputs)  # which may give up and ask for another graph
        self.seen += [torch.utils._pytree.tree_leaves(one) for one in args]
        return compiled


@pytest.mark.slow
@pytest.mark.usefixtures("traced")
def test_in_the_compiled_layer_lengths_are_constants(monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph a padded length, none a layout; nothing that FlexAttention is given has a symbol in it."""
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)
    graphs = Graphs(aot_eager)
    made, written_out = backbone(graphs), backbone()
    for documents, extra in LAYERS:
        expected = step(written_out, documents, extra, "reference")
        for a, b in zip(step(made, documents, extra, "flex"), expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-8)
    assert len(graphs.seen) == 1
    step(made, *LONGER, "flex")
    assert len(graphs.seen) == 2
    for rows, leaves in zip((256, 512), graphs.seen, strict=True):
        assert not any(isinstance(leaf, torch.SymInt) for leaf in leaves)
        shapes = [tuple(leaf.shape) for leaf in leaves if isinstance(leaf, torch.Tensor)]
        assert not any(isinstance(size, torch.SymInt) for shape in shapes for size in shape)
        assert shapes[:3] == [(1, 4, rows, 16), (1, 2, rows, 16), (1, 2, rows, 16)]
        assert [leaf for leaf in leaves if type(leaf) is int] == [rows, rows, BLOCK, BLOCK]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
@pytest.mark.usefixtures("traced")
def test_the_compiled_forward_reads_the_blocks() -> None:
    """Kernels for a CPU visit the blocks of the plan and mask the partial ones, as those for a GPU do."""
    attend = torch.compile(FlexAttention.__call__, dynamic=True, fullgraph=True)
    for documents, extra in [
        *LAYERS,
        ([[(128, *TEXT), (128, *LEARNED)], [(0 + 256 - 40 - 8, *CLEAN), (40, *TEXT)]], 0),
    ]:
        attention, inverse, count = plan(documents, extra)
        q, k, v, _ = draw(count, (4, 2), 16, torch.float32)
        with torch.no_grad():
            got = attend(attention, q, k, v)
        expected = packed_attention("reference", table(documents), inverse, count).layer(0)(q, k, v)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


# --- where it runs


def test_it_says_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no backward on a CPU; use sdpa" in (missing(CPU) or "")
    assert "need CUDA, the device is mps" in (missing(torch.device("mps")) or "")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "install triton" in (missing(torch.device("cuda")) or "")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert missing(torch.device("cuda")) is None
    assert "Triton" in kernel(torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_compiled_training_step_on_a_gpu(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    made = Backbone(CONFIG).to("cuda", dtype)
    made.compile()
    exact = Backbone(CONFIG).to("cuda", torch.float64)
    exact.load_state_dict(made.state_dict())
    for documents, extra in [*LAYERS, LONGER]:
        one = table(documents)
        count = len(one) + extra
        inverse = torch.randperm(count)[: len(one)].cuda()
        x = torch.randn(count, 32, device="cuda").to(dtype)
        results = []
        for network, name in ((made, "flex"), (exact, "reference")):
            leaf = x.to(network.embedding.weight.dtype).requires_grad_()
            attention = packed_attention(name, one, inverse, count)
            positions = torch.arange(count, device="cuda")[:, None]
            out = network(leaf, positions, (count // 3, count - count // 3), attention)[inverse]
            results.append([out.detach(), *torch.autograd.grad(out.square().sum(), leaf)])
        for a, b in zip(*results, strict=True):
            assert a.isfinite().all()
            assert (a.double() - b).norm() <= (0.05 if dtype == torch.bfloat16 else 1e-4) * b.norm()
