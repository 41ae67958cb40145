"""Weight-decay groups and learning-rate schedules."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from unimodal.training.optimizers import learning_rate_scale, parameter_groups


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
