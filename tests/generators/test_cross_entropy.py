"""The chunked cross-entropy of a linear head: equal to the plain one, forward and backward, and never as large."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from unimodal_generators import cross_entropy
from unimodal_generators.cross_entropy import linear_cross_entropy

M, C, SIZES = 23, 8, (30, 5, 11)


def inputs(
    rows: int = M, sizes: Sequence[int] = SIZES, bias: bool = True, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, list[Tensor], Tensor, Tensor | None]:
    """Hidden states, tables, targets and bias; all ask for gradients."""
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, C, generator=rng, dtype=dtype).requires_grad_()
    tables = [torch.randn(n, C, generator=rng, dtype=dtype).requires_grad_() for n in sizes]
    b = torch.randn(sum(sizes), generator=rng, dtype=dtype).requires_grad_() if bias else None
    return hidden, tables, torch.randint(sum(sizes), (rows,), generator=rng), b


def plain(hidden: Tensor, tables: Sequence[Tensor], targets: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.cross_entropy(F.linear(hidden, torch.cat(list(tables)), bias), targets, reduction="sum")


def gradients(loss: Tensor, *leaves: Tensor | None) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [leaf for leaf in leaves if leaf is not None]))


@pytest.fixture(params=[1, 3 * 46, 7 * 46 + 5, 2**24], ids=lambda budget: f"budget {budget}")
def budget(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """One row a chunk, three, seven, or all at once."""
    monkeypatch.setattr(cross_entropy, "BUDGET", request.param)
    return request.param


def test_weights_are_of_rows(budget: int) -> None:
    """Each row's loss, and all that it asks for, times its weight; weights themselves are constants."""
    hidden, tables, targets, b = inputs()
    weights = torch.rand(M, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weights[3] = 0.0
    ours = linear_cross_entropy(hidden, tables, targets, b, weights)
    rows = F.cross_entropy(F.linear(hidden, torch.cat(tables), b), targets, reduction="none")
    expected = sum((w * row for w, row in zip(weights, rows, strict=True)), torch.zeros(()))
    torch.testing.assert_close(ours, expected, atol=1e-10, rtol=1e-10)
    pairs = zip(gradients(ours, hidden, *tables, b), gradients(expected, hidden, *tables, b), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("sizes", [(46,), (30, 16), (30, 5, 11)], ids=str)
def test_it_is_the_plain_one(budget: int, sizes: tuple, bias: bool) -> None:
    """Value and every gradient, also behind another weight."""
    hidden, tables, targets, b = inputs(sizes=sizes, bias=bias)
    ours, expected = linear_cross_entropy(hidden, tables, targets, b), plain(hidden, tables, targets, b)
    torch.testing.assert_close(ours, expected, atol=1e-10, rtol=1e-10)
    for scale in (1.0, -0.3):
        pairs = zip(
            gradients(linear_cross_entropy(hidden, tables, targets, b) * scale, hidden, *tables, b),
            gradients(plain(hidden, tables, targets, b) * scale, hidden, *tables, b),
            strict=True,
        )
        for one, other in pairs:
            torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-10)


def test_in_fp32_to_the_fifth_digit(budget: int) -> None:
    hidden, tables, targets, b = inputs(dtype=torch.float32)
    loss = linear_cross_entropy(hidden, tables, targets, b)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, plain(hidden, tables, targets, b), atol=1e-5, rtol=1e-5)
    found = gradients(loss, hidden, *tables, b)
    for one, other in zip(found, gradients(plain(hidden, tables, targets, b), hidden, *tables, b), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_gradients_are_those_of_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "BUDGET", 2 * 46)
    hidden, tables, targets, b = inputs(rows=5)
    assert torch.autograd.gradcheck(
        lambda h, bias, *t: linear_cross_entropy(h, list(t), targets, bias), (hidden, b, *tables)
    )


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_under_autocast_products_are_in_bf16_and_the_rest_is_not(budget: int, weights: torch.dtype) -> None:
    hidden, tables, targets, b = inputs(dtype=weights)
    leaves = [hidden, *tables, b]
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, tables, targets, b)
        logits = F.linear(hidden, torch.cat(tables)).float() + b.float()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, F.cross_entropy(logits, targets, reduction="sum"), atol=1e-3, rtol=1e-3)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = gradients(plain(exact[0], exact[1:-1], targets, exact[-1]), *exact)
    for leaf, one, other in zip(leaves, gradients(loss, *leaves), expected, strict=True):
        assert one.dtype == leaf.dtype
        torch.testing.assert_close(one.double(), other, atol=0.1, rtol=0.05)


def test_a_double_model_stays_double_under_autocast() -> None:
    """As F.linear does: autocast leaves doubles alone."""
    hidden, tables, targets, b = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, tables, targets, b)
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, plain(hidden, tables, targets, b), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("frozen", [(0,), (1, 2), (0, 1, 2)], ids=str)
def test_frozen_tables_get_nothing_and_change_nothing(budget: int, frozen: tuple) -> None:
    hidden, tables, targets, b = inputs()
    expected = gradients(plain(hidden, tables, targets, b), hidden, *tables, b)
    for i in frozen:
        tables[i].requires_grad_(False)
    linear_cross_entropy(hidden, tables, targets, b).backward()
    leaves = [hidden, *tables, b]
    for i, (leaf, gradient) in enumerate(zip(leaves, expected, strict=True)):
        if i - 1 in frozen:
            assert leaf.grad is None
        else:
            torch.testing.assert_close(leaf.grad, gradient, atol=1e-10, rtol=1e-10)


def test_hidden_states_may_be_frozen_too(budget: int) -> None:
    hidden, tables, targets, b = inputs()
    expected = gradients(plain(hidden, tables, targets, b), *tables, b)
    found = gradients(linear_cross_entropy(hidden.detach(), tables, targets, b), *tables, b)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-10)
    nothing = linear_cross_entropy(hidden.detach(), [t.detach() for t in tables], targets)
    assert not nothing.requires_grad


def test_without_gradients_none_are_made(budget: int) -> None:
    hidden, tables, targets, b = inputs()
    expected = plain(hidden, tables, targets, b)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), Recorder() as recorder:
            loss = linear_cross_entropy(hidden, tables, targets, b)
        assert not loss.requires_grad
        torch.testing.assert_close(loss, expected.detach(), atol=1e-10, rtol=1e-10)
        assert not any("softmax" in name for name in recorder.names)


@pytest.mark.parametrize("bias", [False, True])
def test_no_rows_are_an_exact_zero(budget: int, bias: bool) -> None:
    hidden, tables, targets, b = inputs(rows=0, bias=bias)
    loss = linear_cross_entropy(hidden, tables, targets, b)
    assert loss.item() == 0.0
    loss.backward()
    for leaf in (hidden, *tables, *([b] if bias else [])):
        assert leaf.grad is not None
        assert not leaf.grad.any()


def test_one_table_may_be_embedding_and_head() -> None:
    """Gradients of both uses add up."""
    found = []
    for compute in (linear_cross_entropy, plain):
        _, (table, *_), _, _ = inputs()
        ids = torch.arange(12)
        compute(F.embedding(ids, table) * 2.0, [table], ids + 3).backward()
        found.append(table.grad)
    torch.testing.assert_close(*found, atol=1e-10, rtol=1e-10)


def test_a_graph_may_be_asked_twice() -> None:
    """Once a loss, where losses are weighed by their gradients."""
    hidden, tables, targets, b = inputs()
    loss = linear_cross_entropy(hidden, tables, targets, b)
    first = torch.autograd.grad(3.0 * loss, [hidden, *tables, b], retain_graph=True)
    again = torch.autograd.grad(loss, [hidden, *tables, b])
    for one, other in zip(first, again, strict=True):
        torch.testing.assert_close(one, 3.0 * other)


class Recorder(TorchDispatchMode):
    """What is computed, and the largest tensor that comes out of it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.names.add(str(func))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


@pytest.mark.parametrize("bias", [False, True])
def test_all_logits_are_never_held(monkeypatch: pytest.MonkeyPatch, bias: bool) -> None:
    rows, sizes = 400, (300, 20)
    hidden, tables, targets, b = inputs(rows, sizes, bias, torch.float32)
    monkeypatch.setattr(cross_entropy, "BUDGET", 16 * 320)
    with Recorder() as recorder:
        linear_cross_entropy(hidden, tables, targets, b).backward()
    assert recorder.largest == 16 * 320  # one chunk of logits
    with Recorder() as recorder:
        plain(hidden, tables, targets, b).backward()
    assert recorder.largest == rows * 320
