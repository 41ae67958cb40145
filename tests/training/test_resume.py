"""Stop and resume = never stopped: loss for loss, weight for weight, whatever ended the run."""

import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from forking import Forks

from unimodal.cli import main
from unimodal.training import TokenizerTraining, UnifiedTraining

ROOT = Path(__file__).parents[2]
STEPS = 8
TRAINER = (
    "trainer: {max_steps: 8, val_check_interval: 6, precision: 32-true, accelerator: cpu, enable_progress_bar: false}"
)
TINY = {
    "unified": f"""
model:
  init_args:
    model:
      backbone: {{width: 32, depth: 2, heads: 2, kv_heads: 2, mlp_width: 48, vocabulary: 300}}
    warmup_steps: 3
    ema_decay: 0.7
data:
  init_args: {{batch_tokens: 512, validation_documents: 2, prompts: 1}}
{TRAINER}
checkpoint: {{every_n_train_steps: 2}}
""",
    "tokenizer": f"""
model:
  init_args:
    tokenizer:
      init_args: {{quantizer: {{init_args: {{entries: 16, dim: 4, revive_after: 2}}}}, channels: [8, 8]}}
    warmup_steps: 3
data:
  init_args: {{batch_size: 8}}
{TRAINER}
checkpoint: {{every_n_train_steps: 2}}
""",
}
RECIPES = {
    "unified": ROOT / "lightning_configs" / "models" / "digits_mot_flow.yaml",
    "tokenizer": ROOT / "lightning_configs" / "tokenizers" / "digits_vq.yaml",
}
MODULES: dict[str, type[lightning.LightningModule]] = {"unified": UnifiedTraining, "tokenizer": TokenizerTraining}


def arguments(kind: str, folder: Path, *options: str) -> list[str]:
    tiny = folder.parent / f"{kind}.yaml"
    tiny.write_text(TINY[kind])
    return ["fit", "-c", str(RECIPES[kind]), "-c", str(tiny), "--trainer.default_root_dir", str(folder), *options]


@dataclass
class Watched:
    """Losses and learning rates of every micro-batch, and a signal sent in the middle of a step."""

    kind: str
    seen: list[tuple[float, float]] = field(default_factory=list)
    stop: signal.Signals | None = None
    at: int = -1  # step in which the signal comes

    def run(self, folder: Path, *options: str) -> int:
        module = MODULES[self.kind]
        original, watched = module.training_step, self

        def step(self: Any, batch: Any, batch_idx: int) -> Any:
            loss = original(self, batch, batch_idx)
            watched.seen.append((float(loss), self.optimizers().param_groups[0]["lr"]))
            if watched.stop is not None and self.trainer.global_step == watched.at:
                os.kill(os.getpid(), watched.stop)
                watched.stop = None
            return loss

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "training_step", step)
            return main(arguments(self.kind, folder, *options))


def last(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def same(a: Any, b: Any, where: str = "") -> int:
    """Assert equality bit by bit; how many tensors were compared."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), f"{where} differs by {(a.double() - b.double()).abs().max()}"
        return 1
    if isinstance(a, dict):
        assert list(a) == list(b), where
        return sum(same(a[key], b[key], f"{where}.{key}") for key in a)
    if isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        return sum(same(x, y, f"{where}.{i}") for i, (x, y) in enumerate(zip(a, b, strict=True)))
    assert a == b, where
    return 0


def compare(whole: Path, resumed: Path) -> None:
    a, b = last(whole), last(resumed)
    assert a["global_step"] == b["global_step"] == STEPS
    data = next(key for key in a if key.endswith("Data"))
    for part in ("state_dict", "optimizer_states", "lr_schedulers", data):
        counted = same(a[part], b[part], part)
        assert counted > 10 or part not in ("state_dict", "optimizer_states")
    if "EMA" in a["callbacks"]:
        assert same(a["callbacks"]["EMA"], b["callbacks"]["EMA"], "EMA") > 10
    whole_export, resumed_export = (torch.frombuffer((f / "export" / "model.safetensors").read_bytes(), dtype=torch.uint8)
                                    for f in (whole, resumed))  # fmt: skip
    assert torch.equal(whole_export, resumed_export)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Undisturbed runs, one a kind and accumulation."""
    made: dict[tuple[str, int], tuple[Path, list[tuple[float, float]]]] = {}

    def get(kind: str, accumulate: int) -> tuple[Path, list[tuple[float, float]]]:
        if (kind, accumulate) not in made:
            folder = tmp_path_factory.mktemp("whole") / "run"
            watched = Watched(kind)
            assert watched.run(folder, "--trainer.accumulate_grad_batches", str(accumulate)) == 0
            made[kind, accumulate] = folder, watched.seen
        return made[kind, accumulate]

    return get


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "accumulate", "stop"),
    [("unified", 1, signal.SIGINT), ("unified", 2, signal.SIGTERM), ("tokenizer", 1, signal.SIGUSR1),
     ("tokenizer", 2, signal.SIGTERM)],
)  # fmt: skip
def test_a_stopped_run_goes_on_as_if_nothing_had_happened(
    kind: str, accumulate: int, stop: signal.Signals, whole: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    undisturbed, expected = whole(kind, accumulate)
    folder, options = tmp_path / "run", ["--trainer.accumulate_grad_batches", str(accumulate)]
    before = signal.getsignal(stop)
    first = Watched(kind, stop=stop, at=3)
    assert first.run(folder, *options) == 128 + stop
    assert signal.getsignal(stop) is before
    assert "--ckpt_path last" in capsys.readouterr().out
    assert last(folder)["global_step"] == 4  # the step in progress was finished
    assert not (folder / "export").exists()
    second = Watched(kind)
    assert second.run(folder, *options, "--ckpt_path", "last") == 0
    assert len(expected) == STEPS * accumulate
    assert first.seen + second.seen == expected
    compare(undisturbed, folder)


@pytest.mark.slow
def test_two_stops_in_a_row(whole: Any, tmp_path: Path) -> None:
    undisturbed, expected = whole("unified", 2)
    folder, options = tmp_path / "run", ["--trainer.accumulate_grad_batches", "2"]
    seen = []
    for at, more in ((1, []), (4, ["--ckpt_path", "last"])):
        watched = Watched("unified", stop=signal.SIGTERM, at=at)
        assert watched.run(folder, *options, *more) == 143
        seen += watched.seen
    watched = Watched("unified")
    assert watched.run(folder, *options, "--ckpt_path", "last") == 0
    assert seen + watched.seen == expected
    compare(undisturbed, folder)


@pytest.mark.slow
def test_the_position_counts_what_was_consumed(whole: Any, tmp_path: Path) -> None:
    """A worker packs ahead; what it holds is not consumed."""
    undisturbed, expected = whole("unified", 1)
    positions, options = [], ["--data.init_args.workers"]
    for workers in (0, 1):
        folder = tmp_path / str(workers) / "run"
        folder.parent.mkdir()
        watched = Watched("unified", stop=signal.SIGTERM, at=3)
        assert watched.run(folder, *options, str(workers)) == 143
        positions.append(last(folder)["DigitsData"]["lanes"])
        rest = Watched("unified")
        assert rest.run(folder, *options, str(1 - workers), "--ckpt_path", "last") == 0
        assert watched.seen + rest.seen == expected
        compare(undisturbed, folder)
    assert positions[0] == positions[1] != [[0]]
    assert last(undisturbed)["DigitsData"]["lanes"] > positions[0]


@pytest.mark.slow
def test_a_checkpoint_in_mid_run_is_where_it_says(whole: Any, tmp_path: Path) -> None:
    """Resuming from any periodic checkpoint, not only from the one of a stop."""
    undisturbed, expected = whole("unified", 2)
    folder = tmp_path / "run"
    watched = Watched("unified", stop=signal.SIGTERM, at=5)
    options = ["--trainer.accumulate_grad_batches", "2", "--checkpoint.keep_last", "9"]
    assert watched.run(folder, *options) == 143
    periodic = sorted(path.name for path in (folder / "checkpoints").glob("step_*.ckpt"))
    assert periodic == [f"step_00000{step}.ckpt" for step in (2, 3, 4, 6)]  # 3: the first validation is the best so far
    again = Watched("unified")
    second = tmp_path / "second"
    assert again.run(second, *options, "--ckpt_path", str(folder / "checkpoints" / "step_000002.ckpt")) == 0
    assert again.seen == expected[4:]
    compare(undisturbed, second)


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    """Processes to be killed."""
    with Forks("killed_training", "unimodal.training.lightning_cli") as made:
        yield made


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stop", "code", "reached"), [(signal.SIGTERM, 143, 6), (signal.SIGINT, 130, 6), (signal.SIGKILL, -9, 4)]
)
def test_a_killed_process_is_continued(
    stop: signal.Signals, code: int, reached: int, whole: Any, forks: Forks, tmp_path: Path
) -> None:
    undisturbed, expected = whole("unified", 1)
    folder = tmp_path / "run"
    command, log = [str(int(stop)), "5", *arguments("unified", folder)], tmp_path / "log"
    assert forks.run([sys.executable, "-m", "killed_training", *command], log) == code, log.read_text()
    assert "Traceback" not in log.read_text()
    assert last(folder)["global_step"] == reached
    watched = Watched("unified")
    assert watched.run(folder, "--ckpt_path", "last") == 0
    assert watched.seen == expected[reached:]
    compare(undisturbed, folder)
