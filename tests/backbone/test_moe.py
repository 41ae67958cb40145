"""Learned routers: what they compute, their losses, and how training weighs them."""

import copy
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from unimodal.backbone import Backbone, BackboneConfig, Experts, Moe
from unimodal.backbone.moe import RoutedMLP
from unimodal.documents import Document
from unimodal.model import UnifiedModel
from unimodal.packing import PackedSequence, pack
from unimodal.training import UnifiedTraining

MOES = [
    Moe(experts=4, top_k=2, width=6),
    Moe(experts=5, top_k=1, width=4, shared=1),
    Moe(experts=3, top_k=3, width=8, shared=2, balance=0.5, z=0.0),
]
MOE = Moe(experts=4, top_k=2, width=16, shared=1, balance=0.3, z=0.2)
FULL = Experts(attention=True, mlp=True, norms=True)
Make = Callable[..., UnifiedModel]


def routed(moe: Moe, dtype: torch.dtype = torch.float64) -> RoutedMLP:
    torch.manual_seed(0)
    made = RoutedMLP(8, moe).to(dtype)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_()
    return made


def tokens(n: int = 11, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, 8, generator=torch.Generator().manual_seed(1), dtype=dtype)


def one(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = (gate_up @ x).chunk(2)
    return down @ (F.silu(gate) * up)


def by_hand(made: RoutedMLP, x: Tensor) -> tuple[Tensor, Tensor]:
    """A loop over tokens and all experts; and the loss, summed over tokens."""
    moe, rows = made.moe, []
    chosen, likely, z = torch.zeros(moe.experts), torch.zeros(moe.experts, dtype=x.dtype), 0.0
    for token in x:
        logits = made.router.weight @ token
        p = logits.softmax(0)
        kept = torch.zeros_like(p)
        kept[p.topk(moe.top_k).indices] = 1.0
        weights = p * kept / (p * kept).sum()
        y = sum(w * one(token, *expert) for w, *expert in zip(weights, made.gate_up, made.down, strict=True))
        if moe.shared:  # each of them a slice of one wide SwiGLU
            gates, ups = (part.split(moe.width) for part in made.shared_gate_up.chunk(2))
            for gate, up, down in zip(gates, ups, made.shared_down.split(moe.width, 1), strict=True):
                y = y + one(token, torch.cat([gate, up]), down)
        rows.append(y)
        chosen, likely, z = chosen + kept.detach(), likely + p, z + logits.logsumexp(0) ** 2
    f, mean = chosen / (len(x) * moe.top_k), likely / len(x)
    balance = moe.experts * (f * mean).sum()
    return torch.stack(rows), len(x) * (moe.balance * balance + moe.z * z / len(x))


@pytest.mark.parametrize("moe", MOES, ids=str)
def test_it_is_a_loop_over_tokens_and_experts(moe: Moe) -> None:
    """Forward and backward, of input and every weight."""
    found: list[list[Tensor]] = []
    weights = torch.randn(11, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for compute in (RoutedMLP.forward, by_hand):
        made, x = routed(moe), tokens().requires_grad_()
        y, loss = compute(made, x)
        ((y * weights).sum() + loss).backward()
        found.append([y, loss, x.grad, *(p.grad for p in made.parameters())])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-10, rtol=1e-10)


def test_all_experts_for_every_token_are_a_weighted_dense_layer() -> None:
    made, x = routed(Moe(experts=3, top_k=3, width=5)), tokens()
    weights = (x @ made.router.weight.T).softmax(-1)  # (n, E)
    gate, up = torch.einsum("efc,nc->enf", made.gate_up, x).chunk(2, dim=-1)
    dense = torch.einsum("ne,enf,ecf->nc", weights, F.silu(gate) * up, made.down)
    torch.testing.assert_close(made(x)[0], dense, atol=1e-12, rtol=1e-12)


def test_no_token_is_dropped_however_many_an_expert_gets() -> None:
    made = routed(Moe(experts=8, top_k=1, width=4))
    x = tokens(64).abs()
    with torch.no_grad():
        made.router.weight.zero_()
        made.router.weight[5] = 1.0  # all tokens choose it
    y, _ = made(x)
    expected = torch.stack([one(token, made.gate_up[5], made.down[5]) for token in x])
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_balance_loss_is_one_when_balanced(top_k: int) -> None:
    """Tokens choose every expert equally often, all with equal probabilities: E sum f P = E E (1 / E) (1 / E)."""
    made = routed(Moe(experts=4, top_k=top_k, width=4, balance=0.7, z=0.0))
    loss = made.loss(torch.zeros(12, 4), torch.full((4,), 3 * top_k))
    assert float(loss) == pytest.approx(12 * 0.7)


@pytest.mark.parametrize(("top_k", "expected"), [(1, 4.0), (2, 2.0)])
def test_the_balance_loss_is_e_over_k_when_collapsed(top_k: int, expected: float) -> None:
    made = routed(Moe(experts=4, top_k=top_k, width=4, balance=0.7, z=0.0))
    logits = torch.full((12, 4), -100.0)
    logits[:, :top_k] = 100.0
    counts = torch.zeros(4, dtype=torch.long)
    counts[:top_k] = 12
    assert float(made.loss(logits, counts)) == pytest.approx(12 * 0.7 * expected)


def test_the_z_loss_by_hand() -> None:
    made = routed(Moe(experts=2, top_k=1, width=4, balance=0.0, z=0.1))
    logits = torch.tensor([[0.0, 0.0], [3.0, 1.0]])
    expected = 0.1 * (np.log(2) ** 2 + np.log(np.exp(3) + np.exp(1)) ** 2)
    assert float(made.loss(logits, torch.tensor([1, 1]))) == pytest.approx(expected)


@pytest.mark.parametrize("moe", MOES, ids=str)
def test_no_tokens_give_exact_zeros_and_no_missing_gradient(moe: Moe) -> None:
    made = routed(moe)
    y, loss = made(tokens(0))
    assert y.shape == (0, 8)
    assert float(loss.detach()) == 0.0
    (y.sum() + loss).backward()
    for name, parameter in made.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_experts_that_nobody_chose_get_zero() -> None:
    made = routed(Moe(experts=8, top_k=1, width=4))
    made(tokens(1))[0].sum().backward()
    assert made.gate_up.grad is not None
    assert made.gate_up.grad.flatten(1).any(1).sum() == 1


def test_the_router_is_in_full_precision_under_autocast() -> None:
    made, x = routed(Moe(experts=4, top_k=2, width=6), torch.float32), tokens(dtype=torch.float32)
    _, exact = made(x)
    with torch.autocast("cpu", torch.bfloat16):
        y, loss = made(x)
    assert y.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    assert torch.equal(loss, exact)
    torch.testing.assert_close(y.float(), made(x)[0], atol=0.3, rtol=0.05)


def test_where_nothing_is_learned_there_is_no_loss() -> None:
    with torch.no_grad():
        assert routed(MOES[0])(tokens())[1] is None


def test_what_writes_to_the_residual_stream_begins_smaller() -> None:
    torch.manual_seed(0)
    config = BackboneConfig(
        width=128, depth=8, heads=4, kv_heads=4, mlp_width=4, vocabulary=9, positions="sequential",
        moe=Moe(experts=4, top_k=2, width=64, shared=1),
    )  # fmt: skip
    for name, parameter in Backbone(config).named_parameters():
        if ".mlp." in name:
            expected = 0.005 if name.endswith("down") else 0.02
            assert float(parameter.detach().std()) == pytest.approx(expected, rel=0.1), name


# ---- in the model


def packed(model: UnifiedModel, documents: Sequence[Document], bucket: int = 64, first: int = 0) -> PackedSequence:
    sequenced = [model.sequencer.document(d, (0, 0, first + i), train=False) for i, d in enumerate(documents)]
    return pack(sequenced, model.backbone.config.experts, model.generator.reads, bucket)


def recorded(model: UnifiedModel) -> list[tuple[Tensor, Tensor]]:
    """Inputs and losses of every routed layer, in the order of calls."""
    calls: list[tuple[Tensor, Tensor]] = []
    for module in model.modules():
        if isinstance(module, RoutedMLP):
            module.register_forward_hook(lambda _, inputs, output: calls.append((inputs[0], output[1])))
    return calls


@pytest.mark.parametrize("experts", [Experts(), FULL, Experts(mlp=True)], ids=("dense", "full", "mlp"))
def test_what_fills_a_slice_up_is_not_routed(make: Make, mixed: list[Document], experts: Experts) -> None:
    """Losses and gradients do not depend on how far slices are filled up, nor does a router ever see it."""
    found = []
    for bucket in (1, 64, 256):
        model = make("flow", experts=experts, backbone={"moe": MOE})
        calls = recorded(model)
        p = packed(model, mixed, bucket)
        assert (sum(p.splits) > len(p)) == (bucket > 1)
        losses = model(p)
        assert sum(len(x) for x, _ in calls) == 2 * len(p)  # two layers
        sum(term.sum for term in losses.values()).backward()
        found.append(({n: t.sum for n, t in losses.items()}, {n: q.grad for n, q in model.named_parameters()}))
    for losses, gradients in found[1:]:
        torch.testing.assert_close(losses, found[0][0], atol=1e-5, rtol=1e-5)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, found[0][1][name], atol=1e-4, rtol=1e-4)


def test_each_modality_has_a_router_of_its_own(make: Make, mixed: list[Document]) -> None:
    model = make("flow", experts=FULL, backbone={"moe": MOE})
    routers = {name for name in model.state_dict() if name.endswith("router.weight")}
    expected = {f"backbone.layers.{i}.mlp.experts.{name}.router.weight" for i in range(2) for name in ("text", "image")}
    assert routers == expected
    calls = recorded(model)
    p = packed(model, mixed)
    term = model(p)["router"]
    assert [len(x) for x, _ in calls] == 2 * list(p.tokens)
    assert term.count == len(p)
    # A sum over tokens, a mean over layers.
    torch.testing.assert_close(term.sum, sum(loss for _, loss in calls) / 2)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_loss_is_given_out_once_and_only_in_training(
    make: Make, mixed: list[Document], checkpointing: bool
) -> None:
    model = make("flow", backbone={"moe": MOE})
    model.backbone.checkpointing = checkpointing
    p = packed(model, mixed)
    term = model(p)["router"]
    assert model.backbone.router_loss() is None
    term.sum.backward()
    assert model.backbone.router_loss() is None  # also behind a backward that ran layers again
    with torch.no_grad():
        assert set(model(p)) == {"text", "image"}
    model.backbone.layers[0].mlp[0].router.weight.data.mul_(2.0)
    assert float(model(p)["router"].sum.detach()) != pytest.approx(float(term.sum.detach()), rel=1e-3)
    assert set(make("flow")(packed(make("flow"), mixed))) == {"text", "image"}


def module(model: UnifiedModel, accumulate: int = 1) -> Any:
    """The training as a trainer on one device would drive it, and what it logs."""
    made = UnifiedTraining(model, lr=1e-3)
    made._trainer = SimpleNamespace(  # type: ignore[assignment]
        world_size=1,
        accumulate_grad_batches=accumulate,
        log_every_n_steps=1,
        max_steps=10,
        global_step=0,
        testing=False,
    )
    logged: dict[str, float] = {}
    made.log = lambda name, value, **_: logged.__setitem__(name, float(value))  # type: ignore[method-assign]
    return made, logged


def test_training_adds_a_mean_over_tokens_and_logs_it(make: Make, mixed: list[Document]) -> None:
    model = make("flow", backbone={"moe": MOE})
    p = packed(model, mixed)
    assert p.counts["router"] == len(p) == sum(p.tokens)
    training, logged = module(model)
    loss = training.training_step(p.announce(p.counts), 0)
    means = {name: term.sum / term.count for name, term in model(p).items()}
    assert set(means) == {"text", "image", "router"}
    torch.testing.assert_close(loss, sum(means.values()))
    assert {name: value for name, value in logged.items() if name.startswith("train/")} == pytest.approx(
        {f"train/{n}": float(m.detach()) for n, m in means.items()} | {"train/loss": loss.item()}
    )


def test_validation_is_of_the_data_s_losses_alone(make: Make, mixed: list[Document]) -> None:
    model = make("flow", backbone={"moe": MOE})
    training, logged = module(model)
    with torch.no_grad():
        training.on_validation_epoch_start()
        training.validation_step(packed(model, mixed[2:3]), 0)
        training.on_validation_epoch_end()
    assert set(logged) == {"val/sum/text", "val/sum/image", "val/loss"}


@pytest.mark.parametrize("split", [1, 2, 3])
def test_accumulated_packs_weigh_by_their_tokens(make: Make, mixed: list[Document], split: int) -> None:
    """Balance is that of each pack, which is what data-parallel ranks would have too."""
    model = make("flow", backbone={"moe": MOE}).double()
    packs = [packed(model, mixed[:split]), packed(model, mixed[split:], first=split)]
    counts = {name: sum(p.counts[name] for p in packs) for name in packs[0].counts}
    terms = [model(p) for p in packs]
    expected = sum(sum(t[n].sum for t in terms) / counts[n] for n in ("text", "image", "router"))
    theirs = copy.deepcopy(model)
    expected.backward()
    training, _ = module(theirs, accumulate=2)
    for i, p in enumerate(packs):
        (training.training_step(p.announce(counts), i) / 2).backward()
    for (name, ours), other in zip(model.named_parameters(), theirs.parameters(), strict=True):
        if ours.requires_grad:
            torch.testing.assert_close(other.grad, ours.grad, atol=1e-8, rtol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
