"""Weight-decay groups and learning-rate schedules."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from unimodal.training.optimizers import MuonAdamW, learning_rate_scale, parameter_groups, scheduled, split_matrices


class Net(nn.Module):
    """One of everything."""

    no_weight_decay = ("queries",)

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.linear = nn.Linear(4, 4)
        self.conv = nn.Conv2d(4, 4, 3)
        self.layer_norm = nn.LayerNorm((3, 4))  # a norm with two axes
        self.group_norm = nn.GroupNorm(2, 4)
        self.queries = nn.Parameter(torch.zeros(3, 4))
        self.gain = nn.Parameter(torch.zeros(4))
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight  # tied
        self.frozen = nn.Linear(4, 4).requires_grad_(False)


def test_norms_biases_embeddings_and_named_parameters_are_not_decayed() -> None:
    net = Net()
    decayed, kept = parameter_groups(net, 0.1)
    names = {id(p): n for n, p in net.named_parameters()}
    assert {names[id(p)] for p in decayed["params"]} == {"linear.weight", "conv.weight"}
    assert decayed["weight_decay"] == 0.1
    assert kept["weight_decay"] == 0
    listed = [*decayed["params"], *kept["params"]]
    assert len(listed) == len({id(p) for p in listed})
    assert {id(p) for p in listed} == {id(p) for p in net.parameters() if p.requires_grad}
    torch.optim.AdamW([decayed, kept])


def test_empty_groups_are_left_out_and_negative_decay_is_refused() -> None:
    assert [g["weight_decay"] for g in parameter_groups(nn.LayerNorm(3), 0.1)] == [0.0]
    assert [g["weight_decay"] for g in parameter_groups(nn.Linear(3, 3, bias=False), 0.1)] == [0.1]
    with pytest.raises(ValueError, match=r"weight_decay: expected .* got -1"):
        parameter_groups(nn.Linear(3, 3), -1.0)


def test_known_points_of_the_schedules() -> None:
    def scale(step: int, schedule: str) -> float:
        return learning_rate_scale(step, 10, 110, schedule, floor=0.2)  # type: ignore[arg-type]

    for schedule in ("constant", "linear", "cosine"):
        assert scale(0, schedule) == pytest.approx(0.1)
        assert scale(9, schedule) == scale(10, schedule) == pytest.approx(1)
    assert scale(60, "linear") == pytest.approx(0.6)
    assert scale(60, "cosine") == pytest.approx(0.6)
    assert scale(35, "linear") == pytest.approx(0.8)
    assert scale(35, "cosine") == pytest.approx(0.2 + 0.8 * (1 + 2**-0.5) / 2)
    assert [scale(110, "linear"), scale(110, "cosine"), scale(500, "cosine")] == pytest.approx([0.2] * 3)
    assert scale(500, "constant") == 1


@settings(max_examples=50, deadline=None)
@given(
    schedule=st.sampled_from(["constant", "cosine", "linear"]),
    warmup=st.integers(0, 20),
    total=st.integers(1, 60),
    floor=st.floats(0, 1),
)
def test_it_rises_then_falls_and_stays_within_bounds(schedule: str, warmup: int, total: int, floor: float) -> None:
    scales = [learning_rate_scale(s, warmup, total, schedule, floor) for s in range(80)]  # type: ignore[arg-type]
    assert all(0 < s <= 1 for s in scales[:warmup])
    assert scales[:warmup] == sorted(scales[:warmup])
    assert scales[warmup:] == sorted(scales[warmup:], reverse=True)
    assert min(scales[warmup:]) >= floor - 1e-12


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"warmup_steps": -1}, "warmup_steps: expected at least 0, got -1"),
        ({"floor": 1.5}, "floor: expected a share between 0 and 1, got 1.5"),
    ],
)
def test_numbers_out_of_range_are_refused(changed: dict[str, float], said: str) -> None:
    given = {"step": 0, "warmup_steps": 1, "total_steps": 9, "schedule": "linear", "floor": 0.0, **changed}
    with pytest.raises(ValueError, match=said):
        learning_rate_scale(**given)  # type: ignore[arg-type]


# ---- Muon beside AdamW


def muon_and_adamw(net: Net) -> MuonAdamW:
    matrices, groups = split_matrices(net, net.linear, 0.1)
    return MuonAdamW(matrices, groups, lr=1e-2, muon_lr=3e-2, betas=(0.9, 0.95), weight_decay=0.1)


def steps(net: Net, optimizer: torch.optim.Optimizer, number: int, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    for _ in range(number):
        for parameter in net.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=rng)
        optimizer.step()


def test_every_trained_parameter_has_one_optimizer() -> None:
    net = Net()
    matrices, groups = split_matrices(net, net.linear, 0.1)
    assert [id(p) for p in matrices] == [id(net.linear.weight)]
    shared = [p for group in groups for p in group["params"]]
    trained = {id(p) for p in net.parameters() if p.requires_grad}
    assert len(shared) == len({id(p) for p in shared}) == len(trained) - 1
    assert {id(p) for p in shared} | {id(net.linear.weight)} == trained
    assert {group["weight_decay"] for group in groups} == {0.0, 0.1}


def test_matrices_may_be_all_that_learns() -> None:
    net = Net()
    for parameter in net.parameters():
        parameter.requires_grad_(parameter is net.linear.weight)
    optimizer, before = muon_and_adamw(net), net.linear.weight.detach().clone()
    steps(net, optimizer, 2, seed=1)
    assert not torch.equal(net.linear.weight, before)
    other = muon_and_adamw(net)
    other.load_state_dict(optimizer.state_dict())
    steps(net, other, 1, seed=2)


def test_both_step_as_they_would_alone() -> None:
    torch.manual_seed(0)
    net, alone = Net(), Net()
    alone.load_state_dict(net.state_dict())
    steps(net, muon_and_adamw(net), 3, seed=1)
    matrices, groups = split_matrices(alone, alone.linear, 0.1)
    muon = torch.optim.Muon(matrices, lr=3e-2, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
    rng = torch.Generator().manual_seed(1)
    for _ in range(3):
        for parameter in alone.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=rng)
        muon.step()
        adamw.step()
    for (name, a), b in zip(net.named_parameters(), alone.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_loaded_state_goes_on_as_if_never_stopped() -> None:
    torch.manual_seed(0)
    net = Net()
    optimizer = muon_and_adamw(net)
    steps(net, optimizer, 2, seed=1)
    again = Net()
    again.load_state_dict(net.state_dict())
    resumed = muon_and_adamw(again)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, other in ((net, optimizer), (again, resumed)):
        steps(one, other, 3, seed=2)
    for a, b in zip(net.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert len(optimizer.state_dict()["state"]) == sum(p.requires_grad for p in net.parameters())


def test_one_schedule_moves_both_rates() -> None:
    net = Net()
    optimizer = muon_and_adamw(net)
    made = scheduled(optimizer, 10, warmup_steps=2, schedule="linear", floor=0.0)
    rates = []
    for _ in range(4):
        rates.append([group["lr"] for group in optimizer.muon.param_groups + optimizer.adamw.param_groups])
        steps(net, optimizer, 1, seed=0)
        made["lr_scheduler"]["scheduler"].step()  # type: ignore[index, call-overload]
    scales = [learning_rate_scale(i, 2, 10, "linear", 0.0) for i in range(4)]
    assert rates == [pytest.approx([3e-2 * s, 1e-2 * s, 1e-2 * s]) for s in scales]
    with pytest.raises(ValueError, match=r"trainer\.max_steps: expected at least 1 .* got -1"):
        scheduled(optimizer, -1, warmup_steps=0, schedule="constant", floor=0.0)


@pytest.mark.parametrize("muon", [False, True])
def test_a_run_goes_on_with_the_rates_it_is_given(muon: bool) -> None:
    """And as before where they are the same."""

    def made(net: Net, lr: float, decay: float, betas: tuple[float, float]) -> tuple[torch.optim.Optimizer, Any]:
        optimizer: torch.optim.Optimizer
        if muon:
            matrices, groups = split_matrices(net, net.linear, decay)
            optimizer = MuonAdamW(matrices, groups, lr=lr, muon_lr=3 * lr, betas=betas, weight_decay=decay)
        else:
            optimizer = torch.optim.AdamW(parameter_groups(net, decay), lr=lr, betas=betas)
        found: Any = scheduled(optimizer, 20, warmup_steps=2, schedule="linear", floor=0.0)
        return optimizer, found["lr_scheduler"]["scheduler"]

    def read(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
        return [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]

    net = Net()
    optimizer, schedule = made(net, 1e-2, 0.1, (0.9, 0.95))
    for step in range(7):
        steps(net, optimizer, 1, seed=step)
        schedule.step()
    saved = copy.deepcopy((optimizer.state_dict(), schedule.state_dict()))
    assert "_configured" not in saved[1]
    for lr, decay, betas in ((1e-2, 0.1, (0.9, 0.95)), (1e-3, 0.3, (0.5, 0.6))):
        again, its_schedule = made(net, lr, decay, betas)
        again.load_state_dict(copy.deepcopy(saved[0]))
        its_schedule.load_state_dict(copy.deepcopy(saved[1]))
        if lr == 1e-2:
            assert read(again) == read(optimizer)
        for _ in range(2):
            for group in again.param_groups:
                rate = 3 * lr if "momentum" in group else lr
                scale = learning_rate_scale(its_schedule.last_epoch, 2, 20, "linear", 0.0)
                assert group["lr"] == pytest.approx(rate * scale, rel=1e-12)
                assert group.get("betas", betas) == betas
                assert group["weight_decay"] in (0.0, decay)
            steps(net, again, 1, seed=9)
            its_schedule.step()
