"""What a run will need: counted against what it does need."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from unimodal.attention import SegmentTable, dense_mask
from unimodal.backbone import Experts, Lora, Moe
from unimodal.cli import main
from unimodal.documents import Document
from unimodal.model import UnifiedModel
from unimodal.packing import BUCKET, PackedSequence, pack
from unimodal.training import UnifiedTraining
from unimodal.training import plan as planning
from unimodal.training.flops import useful_flops
from unimodal.training.plan import Memory, Plan, describe
from unimodal.training.ranks import Ranks, Weights
from unimodal.training.stages import freeze

ROOT = Path(__file__).parents[2]
FLOW = ROOT / "lightning_configs" / "models" / "digits_mot_flow.yaml"
VQ = ROOT / "lightning_configs" / "models" / "digits_vq_ar.yaml"
TOKENIZER = ROOT / "lightning_configs" / "tokenizers" / "digits_vq.yaml"
SMALL = """
model: {init_args: {model: {backbone: {width: 32, depth: 3, heads: 2, kv_heads: 2, mlp_width: 48, vocabulary: 300}}}}
data: {init_args: {batch_tokens: 512}}
trainer: {max_steps: 40, precision: 32-true, accelerator: cpu}
"""
Make = Callable[..., UnifiedModel]
FULL = Experts(attention=True, mlp=True, norms=True)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "SECONDS", 0.0)


def packed(model: UnifiedModel, documents: list[Document], bucket: int = BUCKET) -> PackedSequence:
    sequenced = [model.sequencer.document(d, (0, 0, i), train=False) for i, d in enumerate(documents)]
    return pack(sequenced, model.backbone.config.experts, model.generator.reads, bucket)


# ---- counting


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 9), st.booleans(), st.booleans()), min_size=1, max_size=12))
def test_allowed_pairs_are_those_of_the_mask(segments: list[tuple[bool, int, bool, bool]]) -> None:
    new, length, bidirectional, private = (np.array(column) for column in zip(*segments, strict=True))
    table = SegmentTable(np.cumsum(new), length, bidirectional, private)
    assert table.pairs == int(dense_mask(table.tokens(torch.device("cpu"))).sum())


def test_pairs_are_not_looked_at_one_by_one() -> None:
    n = 1_000_000
    table = SegmentTable(np.zeros(1, int), np.array([n]), np.array([False]), np.array([False]))
    assert table.pairs == n * (n + 1) // 2


MOE = Moe(experts=4, top_k=2, width=16, shared=1)
CASES: list[tuple[dict[str, Any], list[str]]] = [
    ({"experts": FULL}, []), ({"experts": FULL}, ["text"]), ({"experts": FULL}, ["image.mlp", "text.attention"]),
    ({"experts": Experts()}, []), ({"experts": Experts()}, ["shared"]),
    ({"experts": Experts(mlp=True)}, []), ({"experts": Experts(mlp=True)}, ["text", "shared"]),
    ({"experts": Experts(lora=Lora(2, 4.0))}, []), ({"experts": Experts(lora=Lora(2, 4.0))}, ["shared"]),
    ({"time": "adaln"}, []), ({"time": "adaln"}, ["modulation"]), ({"time": "token"}, []),
    ({"backbone": {"qkv_bias": True, "tied_head": False, "added_tokens": 8, "head_dim": 12}}, ["head"]),
    ({"experts": Experts(), "backbone": {"moe": MOE}}, []),
    ({"generator": "autoregressive"}, []), ({"generator": "codes"}, ["generator"]), ({"generator": "squares"}, []),
    ({"generator": "shared", "backbone": {"tied_head": False}}, []), ({"generator": "shared"}, ["embedding"]),
]  # fmt: skip


@pytest.mark.parametrize(("case", "frozen"), CASES, ids=str)
def test_useful_flops_are_those_of_a_step_without_filling(
    make: Make, mixed: list[Document], case: dict[str, Any], frozen: list[str]
) -> None:
    """Counted by torch, operator by operator; attention is an operator of its own, which it does not know."""
    model = make(**case)
    freeze(model, frozen)
    p = packed(model, mixed, bucket=1)
    with FlopCounterMode(display=False) as counter:
        sum(term.sum for term in model(p).values()).backward()
    found, config = useful_flops(model, p), model.backbone.config
    # To torch, the weighted sum of a token's small MLPs is a product too; and two images are made up for compilers.
    besides = 6 * 2 * config.moe.top_k * 32 * len(p) if config.moe else 0
    besides += 2 * (4 if "modulation" in frozen else 6) * 2 * 6 * 32 * 32 if config.adaln else 0
    assert found.total - found.attention + besides == counter.get_total_flops()
    assert found.attention == 12 * 2 * config.heads * config.head_size * p.table.pairs
    assert found == useful_flops(model, packed(model, mixed))  # whatever fills up


def test_the_formula_of_a_dense_layer(make: Make, mixed: list[Document]) -> None:
    """6 L (d h e + 2 d k e + h e d + 3 d f) a token, and 6 d V a text target."""
    model = make("flow", experts=Experts())
    p = packed(model, mixed)
    d, h, k, e, f, layers = 32, 2, 1, 16, 48, 2
    found = useful_flops(model, p)
    assert found.layers == 6 * layers * (d * h * e + 2 * d * k * e + h * e * d + 3 * d * f) * len(p)
    assert found.head == 6 * d * 300 * len(p.text_targets)
    assert found.tokenizer == 0  # it only cuts patches


def test_counting_leaves_gradients_alone(make: Make, mixed: list[Document]) -> None:
    model = make("flow")
    p = packed(model, mixed)
    sum(term.sum for term in model(p).values()).backward()
    before = {n: q.grad.clone() for n, q in model.named_parameters() if q.grad is not None}
    useful_flops(model, p)
    after = {n: q.grad for n, q in model.named_parameters() if q.grad is not None}
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    model.zero_grad()
    useful_flops(model, p)
    assert all(q.grad is None for q in model.parameters())


# ---- memory


def test_what_layers_keep_is_what_a_step_keeps(make: Make, mixed: list[Document]) -> None:
    """One layer, measured, times the layers, and what is around them: all that is saved for backward."""
    model = make("flow", backbone={"depth": 5})
    p = packed(model, mixed)
    layer, around = planning.Probe(model, p, torch.device("cpu")).kept()
    whole = planning._saved(lambda: list(model(p).values()), model)
    # The text loss keeps gradients of its inputs, which are counted elsewhere.
    loss = 4 * (len(p.text_targets) * 32 + 300 * 32)
    assert 5 * layer + around + loss == pytest.approx(whole, rel=0.05)


def test_measuring_does_not_change_what_is_planned(make: Make, mixed: list[Document]) -> None:
    model = make("flow", backbone={"depth": 3})
    model.backbone.checkpointing = True
    before = {n: v.clone() for n, v in model.state_dict().items()}
    probe = planning.Probe(model, packed(model, mixed), torch.device("cpu"))
    again = probe.kept()
    optimizers = [probe.optimizer_seconds(UnifiedTraining(model, lr=1e-3, muon_lr=muon)) for muon in (None, 1e-2)]
    assert min(*probe.layer_seconds(), probe.product_rate(), *optimizers) > 0
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    assert len(model.backbone.layers) == 3
    assert all(q.grad is None for q in model.parameters())
    model.backbone.checkpointing = False
    assert planning.Probe(model, packed(model, mixed), torch.device("cpu")).kept() == again  # as if kept, either way


def test_frozen_layers_keep_less(make: Make, mixed: list[Document]) -> None:
    p = packed(make("flow"), mixed)
    trained, _ = planning.Probe(make("flow"), p, torch.device("cpu")).kept()
    model = make("flow")
    freeze(model, ["text", "image"])
    frozen, _ = planning.Probe(model, p, torch.device("cpu")).kept()
    assert frozen < trained


def test_the_peak_is_the_sum() -> None:
    memory = Memory(
        weights=1,
        gradients=2,
        moments=4,
        average=8,
        layers=10,
        layer=1000,
        layer_input=16,
        around=32,
        gathered=0,
        loss=64,
    )
    assert memory.peak(checkpoint_layers=False) == 111 + 10_000
    assert memory.peak(checkpoint_layers=True) == 111 + 160 + 1000


# ---- the command


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planning never trains."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("trained")

    monkeypatch.setattr(lightning.Trainer, "_run", refuse)


def made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, recipe: Path, *options: str) -> Plan:
    """The plan behind what the command prints."""
    plans: list[Plan] = []
    make = planning.make_plan

    def keep(*args: Any) -> Plan:
        plans.append(make(*args))
        return plans[-1]

    monkeypatch.setattr(planning, "make_plan", keep)
    small = tmp_path / "small.yaml"
    small.write_text(SMALL)
    assert main(["fit", "-c", str(recipe), "-c", str(small), "--plan", *options]) == 0
    return plans[0]


@pytest.mark.usefixtures("untrained")
def test_a_plan_is_printed_and_nothing_else_happens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    plan = made(monkeypatch, tmp_path, FLOW)
    said = capsys.readouterr().out
    assert said.strip() == describe(plan)
    assert [p.name for p in tmp_path.iterdir()] == ["small.yaml"]
    for word in ("text.attention", "image.mlp", "embedding", "head (the embedding)", "generator", "tokenizer",
                 "moments of the optimizer", "moving average", "if computed again", "one chunk of logits", "GFLOP/s",
                 "checkpoint_layers: false", "bytes and seconds are estimates", "for 40 steps"):  # fmt: skip
        assert word in said, word
    assert max(map(len, said.splitlines())) <= 125


@pytest.mark.usefixtures("untrained")
def test_the_numbers_of_a_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plan = made(monkeypatch, tmp_path, FLOW, "--trainer.accumulate_grad_batches", "3")
    d, f, layers = 32, 48, 3
    expert = {"attention": layers * (4 * d * d + 2 * 16), "mlp": layers * 3 * d * f, "norms": (2 * layers + 1) * d}
    for name in ("text", "image"):
        assert {part: plan.parameters[f"{name}.{part}"] for part in expert} == {p: (n, 0) for p, n in expert.items()}
    assert plan.parameters["embedding"] == (300 * d, 0)
    trained = sum(n for n, _ in plan.parameters.values())
    m = plan.memory
    assert (m.weights, m.gradients, m.moments, m.average) == (4 * trained, 4 * trained, 8 * trained, 4 * trained)
    assert m.layers == 3
    assert m.layer_input == 4 * d * sum(plan.packed.splits)
    assert m.layer > 5 * m.layer_input
    assert 450 < len(plan.packed) <= 512
    assert (plan.steps, plan.packs, plan.ranks, plan.dtype) == (40, 3, Ranks(), torch.float32)
    assert plan.bound_seconds == 3 * plan.flops.total / plan.speed.products
    speed, layer = plan.speed, plan.flops.layers + plan.flops.attention
    assert min(vars(speed).values()) > 0
    pack = layer / speed.layer + (plan.flops.total - layer) / speed.products + speed.around + speed.packing
    assert plan.step_seconds == pytest.approx(3 * pack + speed.optimizer)
    two = replace(plan, ranks=Ranks(replicas=2))  # each lays out its own packs
    assert two.step_seconds == plan.step_seconds


@pytest.mark.usefixtures("untrained")
def test_a_recipe_with_a_frozen_tokenizer_and_recomputed_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model.init_args.tokenizer_weights", "null", "--model.init_args.checkpoint_layers", "true"]
    plan = made(monkeypatch, tmp_path, VQ, *options, "--model.init_args.freeze", "[shared.mlp]", "--trainer.precision",
                "bf16-mixed")  # fmt: skip
    trained, frozen = plan.parameters["tokenizer"]
    assert (trained, frozen > 1000) == (0, True)
    assert plan.parameters["shared.mlp"] == (0, 3 * 3 * 32 * 48)
    assert plan.flops.tokenizer > 0
    assert plan.dtype == torch.bfloat16
    assert plan.checkpoint_layers
    said = capsys.readouterr().out
    assert "with checkpoint_layers: true" in said
    assert "time on cpu, bfloat16" in said
    peak = plan.memory.peak(checkpoint_layers=True)
    assert peak < plan.memory.peak(checkpoint_layers=False)
    assert f"{peak / 1e6:,.1f} MB" in said


@pytest.mark.usefixtures("untrained")
def test_what_was_not_measured_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = made(monkeypatch, tmp_path, FLOW, "--data.init_args.workers", "1")
    assert plan.speed.packing == 0  # beside the training process
    for changes, note in (
        ({"compiles": True}, "not as they are compiled"),
        ({"ranks": Ranks(2)}, "not measured together"),
    ):
        assert note not in describe(plan)
        assert note in describe(replace(plan, **changes))


@pytest.mark.usefixtures("untrained")
def test_a_plan_leaves_a_run_that_is_there_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    last.parent.mkdir(parents=True)
    last.write_bytes(b"of a run")
    made(monkeypatch, tmp_path, FLOW, "--trainer.default_root_dir", str(tmp_path / "run"))
    assert [p.name for p in (tmp_path / "run").rglob("*")] == ["checkpoints", "last.ckpt"]
    assert last.read_bytes() == b"of a run"


def test_traffic_of_rings_counted_one_message_at_a_time() -> None:
    """A ring of n ranks gathers, or sums and cuts, in n - 1 messages of a part each."""
    w = Weights(copied=7, layers=6400, layer=1600, root=320, trained=3200)

    def ring(n: int, size: float) -> float:
        return sum(size / n for _ in range(n - 1))

    assert w.traffic(Ranks(), 3) == 0
    assert w.traffic(Ranks(replicas=4), 3) == 2 * ring(4, 3200)  # summed and cut, then gathered; once a step
    assert w.traffic(Ranks(shards=8), 3) == 3 * (2 * ring(8, 6400) + ring(8, 320) + ring(8, 3200))
    assert w.traffic(Ranks(2, 4), 1) == 2 * ring(4, 6400) + ring(4, 320) + ring(4, 3200) + 2 * ring(2, 800)
    assert [w.held(Ranks(shards=n)) for n in (1, 2, 8)] == [7 + 6720 // n for n in (1, 2, 8)]
    assert w.traffic(Ranks(shards=8), 1, 0.5) == 2 * ring(8, 3200) + ring(8, 320) + ring(8, 3200)  # layers in bf16
    assert (w.gathered(Ranks()), w.gathered(Ranks(replicas=8))) == (0, 3200)  # DDP's buckets
    assert w.gathered(Ranks(2, 4)) == 3 * 1600 + 2 * 320


@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize(("strategy", "ranks"), [
    ("trainer: {strategy: ddp, devices: 8, num_nodes: 2, accelerator: gpu}", Ranks(16)),
    ("trainer: {strategy: sharded, devices: 4}", Ranks(1, 4)),
    ("trainer: {strategy: {class_path: unimodal.training.Sharded, init_args: {replicas: 2}}, devices: 8, num_nodes: 8}",
     Ranks(2, 32)),
])  # fmt: skip
def test_a_plan_for_ranks_that_are_not_here(
    strategy: str, ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    alone = made(monkeypatch, tmp_path, FLOW).memory
    (tmp_path / "ranks.yaml").write_text(strategy)
    plan = made(monkeypatch, tmp_path, FLOW, "-c", str(tmp_path / "ranks.yaml"))
    said, m = capsys.readouterr().out, plan.memory
    assert plan.ranks == ranks
    assert m.gradients == -(-alone.gradients // ranks.shards)
    assert (m.layer, m.loss) == (alone.layer, alone.loss)
    assert (m.weights < alone.weights) == (ranks.shards > 1)
    assert m.gathered > 0 == alone.gathered
    assert f"memory of a rank of {ranks.count}" in said
    assert f"on {ranks.count} ranks" in said
    assert "received by a rank a step" in said
    assert "an image" in said


def test_what_cannot_be_planned_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "-c", str(TOKENIZER), "--plan", "--trainer.accelerator", "cpu"]) == 2
    assert capsys.readouterr().err == (
        "unimodal: --plan: expected a recipe of a unified model, got one of TokenizerTraining\n"
    )
    assert main(["validate", "-c", str(FLOW), "--plan"]) == 2
    assert capsys.readouterr().err == "unimodal: --plan: expected the command fit, got validate\n"
    assert not (tmp_path / "out").exists()


def test_the_help_names_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--help"]) == 0
    assert re.search(r"^  --plan +\(fit\)", capsys.readouterr().out, flags=re.M)
