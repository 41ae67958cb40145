"""The benchmarks on tiny sizes: every row runs, with and without a peer, and what they count is counted right."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experiments.benchmarks import __main__ as cpu
from experiments.benchmarks import gpu, models, results, runner
from experiments.benchmarks.cases import Settings, relative, worst
from experiments.benchmarks.decoding import PastCopies
from experiments.benchmarks.flops import train_flops, weights_per_token
from experiments.benchmarks.memory import peak_bytes
from experiments.benchmarks.results import Goal, Result, speedup
from experiments.benchmarks.timing import Timing, interleave, threads
from unimodal.attention import SegmentTable, dense_mask

ROOT = Path(__file__).resolve().parents[1]
PROMISED = {
    "name", "value", "unit", "peer", "goal", "met", "compiled", "best", "median", "peer_best", "peer_median",
    "value_median", "correct", "command", "note",
}  # fmt: skip
ISSUE = {
    "train_fp32", "train_bf16", "flops_share_fp32", "flops_share_bf16_1t", "flops_share_bf16_2t", "mot_tax",
    "attention_fp32", "attention_bf16", "packing", "mask_plan_ms", "t2i_fp32", "t2i_bf16", "guidance", "decode_b1",
    "decode_b8", "cache_step", "pack_growth", "loss_memory",
}  # fmt: skip
NEED_TRANSFUSION = {"train_fp32", "train_bf16", "t2i_fp32", "t2i_bf16"}

# --- rows


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every row of the CPU, in a process without transfusion-pytorch and without the run-time checks of shapes."""
    out = tmp_path_factory.mktemp("bench") / "bench.json"
    code = (
        "import sys; sys.modules['transfusion_pytorch'] = None\n"
        "from experiments.benchmarks.__main__ import main\n"
        f"sys.exit(main(['--quick', '--out', {str(out)!r}]))"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    found = json.loads(out.read_text())
    found["printed"] = ran.stdout
    return found


@pytest.mark.slow
def test_every_row_of_the_table_is_there_and_right(report: dict[str, Any]) -> None:
    rows = {row["name"]: row for row in report["results"]}
    assert rows.keys() >= ISSUE
    for name, row in rows.items():
        assert row.keys() >= PROMISED
        assert name in report["printed"]
        if name in NEED_TRANSFUSION:
            assert (row["value"], row["met"], row["note"]) == (None, None, results.INSTALL)
            assert row["best"] > 0
        else:
            assert row["value"] is not None, row["note"]
            assert row["met"] is not None or not row["goal"]
        if row["correct"] is not None:
            assert row["correct"] <= row["tolerance"], name
        assert row["command"] == f"python -m experiments.benchmarks --only {name}"
    assert rows["cache_step"]["extra"]["past_bytes_copied"] == 0 < rows["cache_step"]["extra"]["peer_past_bytes_copied"]
    assert rows["recompiles"]["extra"]["graphs_of_warm_up"] > 0 == rows["recompiles"]["extra"]["breaks"]


@pytest.mark.slow
def test_the_file_names_machine_and_versions(report: dict[str, Any]) -> None:
    machine = report["machine"]
    assert machine.keys() >= {"cpu", "cores", "threads", "memory_gb", "gemm_peak_gflops", "copy_gb_per_s"}
    assert machine["gemm_peak_gflops"].keys() >= {"fp32_1t", "bf16_1t"}
    assert report["versions"].keys() >= {"torch", "transformers", "transfusion-pytorch", "python"}


@pytest.fixture(scope="module")
def tiny() -> Settings:
    """The GPU's rows, shrunk, on the CPU."""
    return Settings(quick=True, repeats=1)


@pytest.mark.parametrize("name", [name for name in gpu.GOALS if name not in cpu.GOALS])
def test_rows_of_the_gpu_run_at_a_tiny_size(name: str, tiny: Settings) -> None:
    row = runner.run(name, gpu.CASES[name], gpu.GOALS[name], tiny, "experiments.benchmarks.gpu")
    assert row.value is not None, row.note
    if row.correct is not None:
        assert row.tolerance is not None
        assert row.correct <= row.tolerance


def test_a_row_that_fails_says_why_and_the_rest_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(settings: Settings) -> Result:
        raise RuntimeError("no such kernel\nand more")

    monkeypatch.setitem(cpu.CASES, "packing", broken)
    out = tmp_path / "bench.json"
    assert cpu.main(["--quick", "--out", str(out), "--only", "packing", "plan_overhead"]) == 1
    first, second = json.loads(out.read_text())["results"]
    assert first["note"] == "failed: RuntimeError: no such kernel"
    assert (first["value"], first["met"]) == (None, None)
    assert second["value"] > 0


@pytest.mark.parametrize("arguments", [["--only", "trian"], ["--repeats", "0"]])
def test_a_mistyped_command_is_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cpu.main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert arguments[1] in said.err


def test_without_a_gpu_its_bench_is_refused_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert capsys.readouterr().err == "error: bench-gpu needs a CUDA device, found none\n"


# --- what is counted


def random_table(seed: int) -> SegmentTable:
    rng = np.random.default_rng(seed)
    n = 12
    bidirectional = rng.random(n) < 0.5
    return SegmentTable(
        np.sort(rng.integers(0, 4, n)), rng.integers(1, 6, n), bidirectional, bidirectional & (rng.random(n) < 0.5)
    )


@pytest.mark.parametrize("seed", range(8))
def test_allowed_pairs_are_those_of_the_dense_mask(seed: int) -> None:
    table = random_table(seed)
    assert table.pairs == int(dense_mask(table.tokens(torch.device("cpu"))).sum())


def test_useful_flops_are_weights_and_pairs_of_one_expert_a_token() -> None:
    model = models.unified(models.TINY, (2,))
    packed = models.batch(model, 3, 11, 2)
    matrices = [p for name, p in model.backbone.layers[0].named_parameters() if p.ndim == 2 and "image" not in name]
    assert weights_per_token(models.TINY) == sum(p.numel() for p in matrices)
    assert len(packed) == 3 * (11 + 4)
    pairs = int(dense_mask(packed.table.tokens(torch.device("cpu"))).sum())
    layers = 6 * len(packed) * sum(p.numel() for p in matrices) + 12 * pairs * models.TINY.width
    table = model.backbone.tables[0]
    targets, image = 3 * 10, 3 * 4  # all text but the first token is learned
    ends = 6 * table.numel() * targets + 6 * models.TINY.width * models.LATENT * image
    assert train_flops(models.TINY, packed, models.LATENT) == models.TINY.depth * layers + ends


def test_the_common_shape_is_that_of_the_peer() -> None:
    model = models.unified(models.PEER_S)
    packed = models.batch(model, 8, 64, 8)
    kinds = {"text": len(packed.text_ids), "image": len(packed.image_reads)}
    assert kinds == {"text": 8 * 64, "image": 8 * 64}
    assert len(packed) == 1024  # one copy of each image
    assert train_flops(models.PEER_S, packed, 16) == pytest.approx(31.07e9, rel=1e-3)


def test_live_bytes_count_what_is_alive_at_once() -> None:
    def run() -> torch.Tensor:
        a = torch.zeros(1000)  # 4000
        b = a + 1  # 8000
        del a
        c = b.view(10, 100)  # a view: nothing
        return c.sum() + torch.zeros(500).sum()  # 6000

    peak, _ = peak_bytes(run)
    assert peak == 8000


def test_copies_of_the_past_are_seen_and_reading_it_is_none() -> None:
    past = torch.randn(2, 64, 8)
    with PastCopies([past], 64 * 8 * 4) as mode:
        past[:, -1] = 1.0  # a new token, written in place
        torch.nn.functional.scaled_dot_product_attention(past[:, :1], past, past)
    assert mode.copied == 0
    fresh = torch.zeros(2, 65, 8)
    with PastCopies([past], 64 * 8 * 4) as mode:
        fresh[:, torch.arange(64)] = past
    assert mode.copied == past.numel() * 4
    with PastCopies([past], 64 * 8 * 4) as mode:
        torch.cat([past, past[:, :1]], dim=1)
    assert mode.copied >= past.numel() * 4


# --- timing


def test_candidates_run_in_turn() -> None:
    calls: list[str] = []
    candidates = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    times = interleave(candidates, 3, warmup=1, inner=2, wait=lambda: calls.append("-"))
    warm, rest = calls[:4], calls[4:]
    assert warm == ["a", "b", "c", "-"]
    rounds = ["".join(rest[i : i + 9]) for i in range(0, len(rest), 9)]
    assert rounds == ["aa-bb-cc-", "bb-cc-aa-", "cc-aa-bb-"]
    assert {name: len(t.seconds) for name, t in times.items()} == {"a": 3, "b": 3, "c": 3}


def test_best_and_median_are_both_kept() -> None:
    row = speedup(Timing((1.0, 2.0, 3.0)), Timing((8.0, 6.0, 4.0)), peer="other")
    assert (row.best, row.median, row.peer_best, row.peer_median) == (1.0, 2.0, 4.0, 6.0)
    assert (row.value, row.value_median) == (4.0, 3.0)


def test_threads_are_set_and_put_back() -> None:
    before = torch.get_num_threads()
    with threads(2):
        assert torch.get_num_threads() == 2
    assert torch.get_num_threads() == before


# --- goals and tables


def test_goals_have_a_direction() -> None:
    assert Goal(2.0, "x").met(2.0)
    assert not Goal(2.0, "x").met(1.99)
    assert Goal(1.02, "x", at_most=True).met(1.0)
    assert not Goal(0, "graphs", at_most=True).met(1.0)


@pytest.mark.parametrize("error", [0.2, float("nan")])
def test_a_wrong_result_meets_no_goal(error: float) -> None:
    row = Result("a", 100.0, "x", correct=error, tolerance=0.1).judged(Goal(2.0, "x"), "command")
    assert row.met is False
    assert "wrong" in row.note


def test_errors_are_relative_to_the_largest_number_and_keep_nan() -> None:
    assert relative(torch.tensor([1.0, 10.0]), torch.tensor([2.0, 10.0])) == pytest.approx(0.1)
    nan = torch.tensor([float("nan")])
    assert np.isnan(worst([(nan, torch.ones(1)), (torch.ones(1), torch.ones(1))]))


def test_the_readme_takes_its_table_from_the_results(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    row = Result("packing", 7.5, "x", peer="a | b", correct=1e-6).judged(Goal(7.0, "x"), "c")
    machine = {"cpu": "Some CPU", "cores": 2, "threads": 2, "gemm_peak_gflops": {"fp32_1t": 1}, "copy_gb_per_s": {}}
    results.write(tmp_path / "results" / "cpu.json", machine, {"torch": "2"}, [row])
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{results.BEGIN}\nold\n{results.END}\nafter\n")
    results.update_readme(tmp_path)
    text = readme.read_text()
    assert "old" not in text
    assert "### Some CPU" in text
    assert "| packing | 7.5 x | - | >= 7 | yes | - | a / b | 1.0e-06 |" in text
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    results.update_readme(tmp_path)
    assert readme.read_text() == text
    readme.write_text("no marks")
    with pytest.raises(ValueError, match="marks"):
        results.update_readme(tmp_path)


def test_what_the_bench_installs_is_pinned() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    pins = re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert {re.split(r"[^\w.-]", line)[0] for line in extras["bench"]} <= set(pins)
