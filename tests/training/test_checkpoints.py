"""Checkpoints: whole or not at all, the last and the best kept, damage seen, a full disk survived; killed runs go on."""

import json
import os
import random
import resource
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from forking import script
from lightning import LightningModule, Trainer
from PIL import Image

from unimodal.cli import main
from unimodal.training import checkpoints
from unimodal.training.checkpoints import CheckpointFiles, Checkpoints, RandomStates, damage, newest_intact

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "lightning_configs" / "models" / "digits_mot_flow.yaml"
FOLDER = ROOT / "lightning_configs" / "data" / "folder.yaml"
TINY = """
model:
  init_args:
    model:
      backbone: {width: 16, depth: 1, heads: 1, kv_heads: 1, mlp_width: 16, vocabulary: 300}
    warmup_steps: 3
    ema_decay: 0.7
data:
  init_args: {batch_tokens: 256, validation_documents: 1, prompts: 1}
trainer:
  {max_steps: 6, val_check_interval: 100, precision: 32-true, accelerator: cpu, enable_progress_bar: false, logger: false}
checkpoint: {every_n_train_steps: 1}
"""

# ---- files


def content() -> dict[str, Any]:
    return {"weights": torch.arange(3000.0), "step": 3, "nested": {"list": [1, 2.5, "three"]}}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path, files = tmp_path / "new" / "step_000003.ckpt", CheckpointFiles()
    files.save_checkpoint(content(), path)
    assert files.written
    assert damage(path) is None
    found = torch.load(path, weights_only=True)
    assert torch.equal(found.pop("weights"), content()["weights"])
    assert found == {"step": 3, "nested": {"list": [1, 2.5, "three"]}}
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_the_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, done = tmp_path / "step_000003.ckpt", []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda f: (done.append(("fsync", path.exists())), fsync(f))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append(("replace", path.exists())), replace(a, b))[1])
    CheckpointFiles().save_checkpoint(content(), path)
    assert done == [("fsync", False), ("replace", False), ("fsync", True)]


def test_every_damage_that_matters_is_seen(tmp_path: Path) -> None:
    """A flipped bit anywhere is seen, or changes nothing that is read."""
    path, rng = tmp_path / "step_000003.ckpt", np.random.default_rng(0)
    CheckpointFiles().save_checkpoint(content(), path)
    whole, seen, silent = path.read_bytes(), 0, 0
    assert len(whole) > 12000
    for at in [
        *rng.integers(0, len(whole), 60),
        *range(len(whole) - 120, len(whole), 2),
    ]:  # the archive's table is last
        damaged = bytearray(whole)
        damaged[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        if damage(path) is not None:
            seen += 1
            continue
        assert torch.equal(torch.load(path, weights_only=True)["weights"], content()["weights"])
        silent += 1
    assert seen > 3 * silent
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert damage(path) is not None, length
    path.unlink()
    assert "FileNotFoundError" in str(damage(path))


def test_a_damaged_checkpoint_is_passed_over_aloud(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert newest_intact(tmp_path) is None
    for step in (2, 10, 6):
        CheckpointFiles().save_checkpoint(content(), tmp_path / f"step_{step:06d}.ckpt")
    assert newest_intact(tmp_path) == tmp_path / "step_000010.ckpt"  # a crash before the link was made
    (tmp_path / "last.ckpt").symlink_to("step_000006.ckpt")
    assert newest_intact(tmp_path) == tmp_path / "last.ckpt"  # step 10 is of a run that was left
    assert capsys.readouterr().err == ""
    os.truncate(tmp_path / "step_000006.ckpt", 5000)
    assert newest_intact(tmp_path) == tmp_path / "step_000002.ckpt"
    (line,) = capsys.readouterr().err.splitlines()
    broken = tmp_path / "step_000006.ckpt"
    assert line.startswith(f"WARNING: checkpoint: {broken} is damaged and passed over (BadZipFile")
    os.truncate(tmp_path / "step_000002.ckpt", 0)
    with pytest.raises(ValueError, match=r"ckpt_path: expected an undamaged checkpoint in .*, got 2 damaged ones"):
        newest_intact(tmp_path)


@pytest.mark.parametrize("room", [0, 1000, 13000])
def test_a_full_disk_is_reported_and_leaves_what_was_there(
    room: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, files = tmp_path / "step_000003.ckpt", CheckpointFiles()
    files.save_checkpoint(content(), path)
    before = path.read_bytes()
    assert len(before) > room
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)  # a write beyond it fails as on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        files.save_checkpoint({**content(), "step": 4}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not files.written
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"WARNING: checkpoint: {path} could not be written ([Errno 27] File too large")
    assert line.endswith("training goes on, earlier ones are kept")
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == before
    files.save_checkpoint(content(), path)
    assert files.written


# ---- which are kept

MODULE = Mock(spec=LightningModule, device=torch.device("cpu"))


class Run:
    """A trainer, as far as the callback looks at it."""

    __class__ = Trainer  # type: ignore[assignment]

    def __init__(self, folder: Path, callback: Checkpoints) -> None:
        self.default_root_dir, self.callback = str(folder), callback
        self.global_step, self.is_global_zero, self.sanity_checking = 0, True, False
        self.state, self.callback_metrics = SimpleNamespace(fn="fit"), {"val/loss": torch.tensor(9.0)}
        self.strategy = SimpleNamespace(broadcast=lambda value: value)
        callback.setup(self, MODULE, "fit")  # type: ignore[arg-type]
        callback.on_train_start(self, MODULE)  # type: ignore[arg-type]

    def save_checkpoint(self, path: Path) -> None:
        self.callback.files.save_checkpoint({"step": self.global_step}, path)

    def go(self, steps: int, losses: dict[int, float] | None = None) -> None:
        for _ in range(steps):
            self.global_step += 1
            self.callback.on_train_batch_end(self)  # type: ignore[arg-type]
            if losses and self.global_step in losses:
                self.callback_metrics["val/loss"] = torch.tensor(losses[self.global_step])
                self.callback.on_validation_end(self, MODULE)  # type: ignore[arg-type]


def kept(folder: Path) -> list[str]:
    return sorted(p.name for p in (folder / "checkpoints").glob("step_*.ckpt"))


def named(folder: Path, name: str) -> str:
    return os.readlink(folder / "checkpoints" / name)


def test_the_last_and_the_best_are_kept(tmp_path: Path) -> None:
    run = Run(tmp_path, Checkpoints(2, keep_last=2))
    run.go(5)
    assert kept(tmp_path) == ["step_000002.ckpt", "step_000004.ckpt"]
    assert named(tmp_path, "last.ckpt") == "step_000004.ckpt"
    assert not (tmp_path / "checkpoints" / "best.ckpt").exists()
    run.go(7, {7: 3.0, 8: 2.0, 10: 2.5, 12: float("nan")})
    assert kept(tmp_path) == ["step_000008.ckpt", "step_000010.ckpt", "step_000012.ckpt"]  # 7 was the best before 8
    assert (named(tmp_path, "last.ckpt"), named(tmp_path, "best.ckpt")) == ("step_000012.ckpt", "step_000008.ckpt")
    best = json.loads((tmp_path / "checkpoints" / "best.json").read_text())
    assert best == {"monitor": "val/loss", "value": 2.0, "step": 8}
    # Another process goes on, and knows what was best; what a killed one left is swept out.
    (tmp_path / "checkpoints" / ".step_000014.ckpt.123.tmp").write_bytes(b"half")
    again = Run(tmp_path, Checkpoints(2, keep_last=1))
    assert not list((tmp_path / "checkpoints").glob(".*"))
    again.global_step = again.callback._step = 12
    again.go(2, {13: 2.2})
    assert kept(tmp_path) == ["step_000008.ckpt", "step_000014.ckpt"]
    again.go(1, {15: 1.0})
    assert kept(tmp_path) == ["step_000015.ckpt"]
    again.callback.on_train_end(again, MODULE)  # type: ignore[arg-type]
    assert kept(tmp_path) == ["step_000015.ckpt"]


def test_high_may_be_good_and_a_monitor_must_be_logged(tmp_path: Path) -> None:
    run = Run(tmp_path, Checkpoints(100, mode="max"))
    run.go(3, {1: 1.0, 2: 3.0, 3: 2.0})
    assert named(tmp_path, "best.ckpt") == "step_000002.ckpt"
    Run(tmp_path / "none", Checkpoints(100, monitor=None)).go(2, {1: 1.0})
    assert not (tmp_path / "none" / "checkpoints").exists()
    with pytest.raises(ValueError, match=r"checkpoint\.monitor: expected one of val/loss, got val/los"):
        Run(tmp_path / "wrong", Checkpoints(100, monitor="val/los")).go(2, {1: 1.0})
    for key in ("every_n_train_steps", "keep_last"):
        with pytest.raises(ValueError, match=rf"checkpoint\.{key}: expected 1 or more, got 0"):
            Checkpoints(**{key: 0})  # type: ignore[arg-type]


def test_nothing_is_removed_for_what_could_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path, Checkpoints(1, keep_last=1))
    run.go(1, {1: 5.0})

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.torch, "save", full)
        run.go(2, {2: 1.0})
    assert kept(tmp_path) == ["step_000001.ckpt"]
    assert named(tmp_path, "last.ckpt") == named(tmp_path, "best.ckpt") == "step_000001.ckpt"
    run.go(1, {4: 3.0})  # better than the best that there is
    assert kept(tmp_path) == ["step_000004.ckpt"]
    assert named(tmp_path, "best.ckpt") == "step_000004.ckpt"


def test_random_states_come_back(tmp_path: Path) -> None:
    def draw() -> list[float]:
        return [float(torch.rand(())), np.random.rand(), np.random.randn(), random.random(), random.gauss(0, 1)]

    trainer = Mock(spec=Trainer, world_size=1, global_rank=0)
    first, second = RandomStates(), RandomStates()
    draw()
    torch.save(first.state_dict(), tmp_path / "state")
    expected = draw()
    assert draw() != expected
    second.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    second.on_train_start(trainer, MODULE)
    assert draw() == expected
    trainer.world_size = 2  # there is no such place
    second.on_train_start(trainer, MODULE)
    assert draw() != expected


# ---- whole runs


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: an epoch of it has 34 documents, two or three steps."""
    folder, rng = tmp_path_factory.mktemp("data") / "pictures", np.random.default_rng(0)
    folder.mkdir()
    for i in range(20):
        Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"number {i}" + " more" * (i % 7))
    return folder


def arguments(folder: Path, pictures: Path, *options: str) -> list[str]:
    tiny = folder.parent / "tiny.yaml"
    tiny.write_text(TINY)
    return ["fit", "-c", str(RECIPE), "-c", str(FOLDER), "-c", str(tiny), "--data.root", str(pictures),
            "--trainer.default_root_dir", str(folder), *options]  # fmt: skip


DRIVER = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
import unimodal.training.lightning_cli
from forking import ended, fork_ranks
from unimodal.cli import main
from unimodal.training import UnifiedTraining, checkpoints

original = UnifiedTraining.training_step
def step(self, batch, batch_idx):
    loss = original(self, batch, batch_idx)
    loss = loss + 1e-3 * torch.rand(())  # of the global generator
    with open(os.environ["LOG"], "a") as log:
        log.write(f"{self.trainer.global_step} {float(loss).hex()} {list(batch.numbers)}\\n".replace(", ", ","))
    if self.trainer.global_step == int(os.environ.get("KILL_AT", -1)):
        os.kill(os.getpid(), signal.SIGKILL)
    return loss
UnifiedTraining.training_step = step

def start(arguments, ranks=1, **environment):
    def work():
        rank = os.environ.get("RANK", "0")
        os.setpgid(0, 0)
        folder = arguments[arguments.index("--trainer.default_root_dir") + 1]
        os.environ.update(environment, LOG=f"{folder}.log.{rank}")
        with open(os.environ["LOG"], "a") as log:
            log.write("begin\\n")
        return main(arguments)
    return fork_ranks(work, ranks)

plan = json.loads(sys.argv[1])
"""
KILLED = """
assert ended(start(plan["whole"])) == [0]
write, rng = checkpoints.Writer.write, random.Random(0)
def slowly(self, data):  # so that many a kill comes while a checkpoint is written
    time.sleep(1e-3)
    return write(self, data)
checkpoints.Writer.write = slowly
folder, log = Path(plan["folder"]), Path(plan["folder"] + ".log.0")
log.touch()
def go_on():
    going_on = ["--ckpt_path", "last"] if (folder / "checkpoints" / "last.ckpt").exists() else []
    return start([*plan["killed"], "--data.workers", str(rng.choice([0, 1, 3])), *going_on])
found = {"killed": 0, "writing": 0}
for kill in range(10):
    lines, size, (pid,) = rng.randrange(2), log.stat().st_size, go_on()
    if kill == 3:
        time.sleep(0.1 + rng.random())  # before there is any step
    else:
        options = os.WEXITED | os.WNOHANG | os.WNOWAIT
        while log.read_bytes()[size:].count(b"\\n") <= lines + 1 and os.waitid(os.P_PID, pid, options) is None:
            time.sleep(0.002)
        time.sleep(rng.random() * 0.2)
    os.killpg(pid, signal.SIGKILL)
    found["killed"] += ended([pid]) == [-9]
    found["writing"] += bool(list((folder / "checkpoints").glob(".step*.tmp")))
found["code"] = ended(go_on())
print(json.dumps(found))
"""
RANKS = """
import shutil
def pair(name, *more, **environment):
    return ended(start([*plan[name], *more], 2, **environment))
found = {"whole": pair("whole"), "killed": pair("killed", KILL_AT="3")}
for name in ("one", "other"):
    shutil.copytree(f"{plan['folder']}/killed/checkpoints", f"{plan['folder']}/{name}/checkpoints", symlinks=True)
found["resumed"] = pair("killed", "--ckpt_path", "last")
found["one"] = ended(start([*plan["one"], "--ckpt_path", "last"]))
found["other"] = ended(start([*plan["other"], "--ckpt_path", "last"]))
print(json.dumps(found))
"""


def drive(code: str, plan: dict[str, Any]) -> dict[str, Any]:
    """What the code found, in a process of its own."""
    done = script(DRIVER + code, json.dumps(plan))
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    found["said"] = done.stderr
    return found


def logged(folder: Path, rank: int = 0) -> dict[int, list[tuple[str, str]]]:
    """Losses, bit for bit, and documents of every step; of a step that was made again, as it was made last."""
    steps: dict[int, list[tuple[str, str]]] = {}
    previous = -1
    for line in Path(f"{folder}.log.{rank}").read_text().splitlines():
        if line == "begin":  # a step that was begun and made again has one line of each
            previous = -1
            continue
        step, loss, numbers = line.split()
        if int(step) != previous:
            steps[int(step)] = []
        previous = int(step)
        steps[previous].append((loss, numbers))
    return steps


def documents(*ranks: dict[int, list[tuple[str, str]]]) -> list[int]:
    """The numbers of all documents that were seen."""
    return [n for steps in ranks for packs in steps.values() for _, numbers in packs for n in json.loads(numbers)]


def end_of(folder: Path) -> dict[str, Any]:
    """The last checkpoint, without the clock."""
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    del checkpoint["callbacks"]["RunFolder"]
    return checkpoint


def same(a: Any, b: Any) -> bool:
    """Bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def each_once(seen: list[int], lanes: list[list[int]]) -> int:
    """Assert that of every epoch each document was seen once, or is still to come; how many documents were begun."""
    assert len(seen) == len(set(seen))
    begun = max(lane[0] for lane in lanes)
    coming = {n for lane in lanes for n in (*lane[1:], *range(lane[0], begun, len(lanes)))}
    assert coming.isdisjoint(seen)
    assert coming | set(seen) == set(range(begun))
    return begun


@pytest.mark.slow
def test_killed_ten_times_at_random_moments_and_nothing_differs(pictures: Path, tmp_path: Path) -> None:
    """Losses, documents, weights, both optimizers' moments, average, schedule, random states, position."""
    options = ["--model.init_args.muon_lr", "0.01", "--trainer.max_steps", "32"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    plan = {"folder": str(killed), "whole": arguments(whole, pictures, *options),
            "killed": arguments(killed, pictures, *options)}  # fmt: skip
    found = drive(KILLED, plan)
    assert (found["killed"], found["code"]) == (10, [0]), found["said"][-3000:]
    assert "Traceback" not in found["said"]
    assert found["writing"] >= 1
    a, b = logged(whole), logged(killed)
    assert list(a) == sorted(b) == list(range(32))
    assert all(a[step] == b[step] for step in a)
    assert each_once(documents(b), end_of(killed)["FolderData"]["lanes"]) > 4 * 34
    assert same(end_of(whole), end_of(killed))
    assert len(end_of(killed)["optimizer_states"][0]["state"]) > 10
    export = [(folder / "export" / "model.safetensors").read_bytes() for folder in (whole, killed)]
    assert export[0] == export[1]


@pytest.mark.slow
def test_two_ranks_go_on_as_two_as_one_and_as_one_with_other_accumulation(pictures: Path, tmp_path: Path) -> None:
    whole, killed, one, other = (tmp_path / name for name in ("whole", "killed", "one", "other"))
    two = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    plan = {
        "folder": str(tmp_path), "whole": arguments(whole, pictures, *two), "killed": arguments(killed, pictures, *two),
        "one": arguments(one, pictures, "--trainer.accumulate_grad_batches", "2"),
        "other": arguments(other, pictures, "--trainer.accumulate_grad_batches", "3"),
    }  # fmt: skip
    found = drive(RANKS, plan)
    assert found["whole"] == found["resumed"] == [0, 0], found["said"][-3000:]
    assert all(found["killed"]) and -9 in found["killed"]  # noqa: PT018
    assert found["one"] == found["other"] == [0], found["said"][-3000:]
    expected = [logged(whole, rank) for rank in (0, 1)]
    assert [logged(killed, rank) for rank in (0, 1)] == expected
    assert same(end_of(killed), end_of(whole))
    assert len(end_of(whole)["FolderData"]["lanes"]) == len(end_of(whole)["callbacks"]["RandomStates"]["ranks"]) == 2
    before = [{step: packs for step, packs in ranks.items() if step < 3} for ranks in expected]
    # One rank in place of two: the same packs, summed in another order.
    assert list(logged(one)) == list(logged(other)) == [3, 4, 5]
    for step, packs in logged(one).items():
        assert [numbers for _, numbers in packs] == [ranks[step][0][1] for ranks in expected]
    for folder in (one, other):
        seen = documents(*before, logged(folder))
        assert each_once(seen, end_of(folder)["FolderData"]["lanes"]) > 34
    for name, value in end_of(whole)["state_dict"].items():
        torch.testing.assert_close(end_of(one)["state_dict"][name], value, rtol=1e-4, atol=1e-5)


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "run"
    assert main(arguments(whole, pictures, "--trainer.max_steps", "5")) == 0
    assert main(arguments(folder, pictures, "--trainer.max_steps", "4")) == 0
    shutil.rmtree(folder / "export")
    os.truncate(folder / "checkpoints" / "step_000004.ckpt", 9000)
    capsys.readouterr()
    step = str(folder / "checkpoints" / "step_000004.ckpt")
    assert main(arguments(folder, pictures, "--ckpt_path", step)) == 2  # asked for by name
    assert "damaged" in capsys.readouterr().err
    assert main(arguments(folder, pictures, "--trainer.max_steps", "5", "--ckpt_path", "last")) == 0
    assert f"WARNING: checkpoint: {step} is damaged and passed over" in capsys.readouterr().err
    a, b = end_of(whole), end_of(folder)
    assert a["global_step"] == b["global_step"] == 5
    assert same(a["FolderData"], b["FolderData"])


def test_a_run_survives_a_full_disk(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, write = tmp_path / "run", checkpoints.Writer.write

    def full(self: Any, data: Any) -> int:
        if "step_000002" in self.file.name or "step_000003" in self.file.name:
            self.error = self.error or OSError(28, "No space left on device")
        return write(self, data)

    monkeypatch.setattr(checkpoints.Writer, "write", full)
    assert main(arguments(folder, pictures, "--trainer.max_steps", "3")) == 0
    said = capsys.readouterr().err
    assert (
        said.count("could not be written ([Errno 28] No space left on device); training goes on") == 3
    )  # 2, 3, the end
    assert sorted(os.listdir(folder / "checkpoints")) == ["last.ckpt", "step_000001.ckpt"]
    assert end_of(folder)["global_step"] == 1
    assert (folder / "export").is_dir()


def test_sources_that_changed_are_refused(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, mine = tmp_path / "run", tmp_path / "mine"
    shutil.copytree(pictures, mine)
    assert main(arguments(folder, mine, "--trainer.max_steps", "1")) == 0
    for name in ("0.png", "1.png", "2.png"):
        (mine / name).unlink()
    capsys.readouterr()
    assert main(arguments(folder, mine, "--trainer.max_steps", "2", "--ckpt_path", "last")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "data: expected sources that give [17, 17] documents an epoch, as in the checkpoint, got [15, 15]" in line
