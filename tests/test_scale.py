"""The sizing table: what the page shows is what was written down, and follows from it by hand."""

import json

import pytest

from experiments.scale import __main__ as scale
from unimodal.training.ranks import Weights

RECORD = json.loads(scale.RESULTS.read_text())


def model(name: str) -> scale.Model:
    found = RECORD["models"][name]
    return scale.Model(**{**found, "weights": Weights(**found["weights"])})


def test_the_page_shows_the_file_and_the_file_follows_from_its_measurements() -> None:
    rows = [scale.row(name, model(name), gpus) for name in scale.MODELS for gpus in scale.GPUS]
    assert [vars(r) for r in rows] == [pytest.approx(r) for r in RECORD["rows"]]
    text = scale.PAGE.read_text(encoding="utf-8")
    assert scale.page(text, rows) == text


def test_a_row_by_hand() -> None:
    """A 7B in two copies of four parts."""
    m = model("7B")
    p = m.parameters
    row = scale.row("7B", m, 8)
    assert (row.replicas, row.shards) == (2, 4)
    assert row.state_gb * 1e9 == pytest.approx(20 * p / 4, rel=1e-3)
    assert row.checkpoint_gb * 1e9 == pytest.approx(16 * p, rel=1e-3)
    assert 7.5e9 < p < 7.7e9
    assert 6 * 6.5e9 < m.flops < 6 * 7.6e9  # a text token and half of the head, an image token and attention
    assert row.tokens_per_second == pytest.approx(8 * 989e12 * 0.4 / (m.flops * 4 / 3))
    assert row.days_per_trillion == pytest.approx(1e12 / row.tokens_per_second / 86400)
    layers, rest = m.weights.layers, m.weights.root
    assert row.traffic_gb * 1e9 == pytest.approx(0.75 * (layers + rest + 4 * p) + 2 * 0.5 * p, rel=1e-3)
    assert model("14B-MoT").parameters > 1.8 * p
