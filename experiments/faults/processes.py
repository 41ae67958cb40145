"""Faults of a process: what it computes, what it is killed by, what it has no room for."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from experiments.faults.items import DOCUMENTS, happened, write_tar
from experiments.faults.runs import PATIENCE, RUN, Ended, Process, arguments, steps
from experiments.faults.table import Row
from unimodal.training import UnifiedTraining

WHOLE = Path("..", "whole-run")


def fit(*options: str) -> list[str]:
    """A training that nothing is wrong with."""
    data = Path("data.tar")
    return arguments(RUN, data if data.is_file() else write_tar(data), "TarSource", *options)


def losses(path: Path) -> dict[int, str]:
    """The loss of every step, bit for bit; of one that was made again, the last."""
    return {step.step: step.loss for step in steps(path)}


def undisturbed() -> dict[int, str]:
    """The losses of a run that nothing happened to, made once."""
    if not (WHOLE / "run" / "run.json").is_file():
        home = Path.cwd()
        shutil.rmtree(WHOLE, ignore_errors=True)
        WHOLE.mkdir()
        os.chdir(WHOLE)
        try:
            assert Process(fit(), RUN).end().code == 0
        finally:
            os.chdir(home)
    return losses(WHOLE / "run.steps")


def spoil(*at: int) -> Callable[[], None]:
    """Makes the loss of some steps no number."""

    def patch() -> None:
        original = UnifiedTraining.training_step

        def step(self: UnifiedTraining, batch: Any, batch_idx: int) -> Any:
            return original(self, batch, batch_idx) * (float("nan") if self.trainer.global_step in at else 1.0)

        UnifiedTraining.training_step = step  # type: ignore[method-assign]

    return patch


def nan_loss() -> Row:
    """A loss that is no number, once."""
    run = Process(fit(), RUN, spoil(4))
    ended = run.end()
    message = ended.line("WARNING: nonfinite")
    made = steps(run.steps)
    documents = len(made[4].documents) if len(made) > 4 else 0
    equal = {s: loss for s, loss in losses(run.steps).items() if s < 5} == {
        s: loss for s, loss in undisturbed().items() if s < 5
    }
    ok = ended.clean and ended.code == 0 and len(made) == 12 and equal and bool(message)
    return Row(
        "NaN loss", "the loss of step 5 is not a number",
        happened(ended, "the step changes no weight, no moment and no average, and is counted; the run goes on"),
        f"what that step would have learned ({documents} documents)", message, ok,
    )  # fmt: skip


def nan_losses() -> Row:
    """Losses that stay no number."""
    run = Process(fit("--nonfinite.max_skipped", "3"), RUN, spoil(*range(4, 99)))
    ended = run.end()
    message = ended.line("unimodal: nonfinite.max_skipped")
    kept = {path.name for path in (RUN / "nonfinite" / "step_000007_rank_0").glob("*")}
    there = {"packs.json", "pack_0.safetensors", "pack_0_image_000.png"} <= kept
    ok = ended.clean and ended.code == 2 and there and (RUN / "checkpoints" / "step_000007.ckpt").is_file()
    done = "the run ends behind the third in a row with a checkpoint; that step's pack is saved as images, texts and tensors"
    return Row(
        "NaN loss that stays", "every loss from step 5 on is not a number, `--nonfinite.max_skipped 3`",
        happened(ended, done), "nothing: weights are those of step 4", message, ok,
    )  # fmt: skip


def gone_on(run: Process, *options: str) -> tuple[bool, Ended]:
    """Continue from the last checkpoint; whether all twelve steps are then those of an undisturbed run, bit for bit."""
    going_on = [*options, "--ckpt_path", "last"] if (RUN / "checkpoints" / "last.ckpt").exists() else list(options)
    ended = Process(fit(*going_on), RUN).end()
    return ended.clean and ended.code == 0 and losses(run.steps) == undisturbed(), ended


def again(before: int) -> str:
    """What a run that ended abruptly lost."""
    return f"nothing: continued with `--ckpt_path last`, all 12 losses are those of an undisturbed run, bit for bit " \
        f"({before} steps were made again)"  # fmt: skip


def children(pid: int) -> list[int]:
    """Processes that a process has started, the oldest first."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        state = stat(int(path.name))
        if state and int(state[1]) == pid:
            found.append(int(path.name))
    return sorted(found)


def alive(pid: int) -> bool:
    """Whether a process runs."""
    state = stat(pid)
    return bool(state) and state[0] != "Z"


def stat(pid: int) -> list[str]:
    """State and parent of a process; nothing, if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except (FileNotFoundError, ProcessLookupError):
        return []


def worker_killed() -> Row:
    """A loader's worker is killed, as by the kernel where memory ends."""
    run = Process(fit("--data.workers", "2"), RUN)
    run.until(6)
    workers = children(run.pid)
    run.kill(0)
    os.kill(workers[0], signal.SIGKILL)
    ended = run.end()
    message = ended.line("unimodal:", "data.workers")
    left, behind = stay(workers), len(losses(run.steps)) - checkpointed()
    equal, _ = gone_on(run)
    ok = ended.clean and ended.code == 2 and bool(message) and not left and ended.seconds < 30 and equal
    return Row(
        "a data worker killed", "one of two worker processes gets SIGKILL",
        happened(ended, f"the run ends {ended.seconds:.1f} s later with exit code 2; no worker is left"),
        again(behind), message, ok,
    )  # fmt: skip


def stay(workers: list[int]) -> bool:
    """Whether any of them is there five seconds later."""
    deadline = time.monotonic() + 5
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return any(map(alive, workers))


def checkpointed(run: Path = RUN) -> int:
    """Steps that the last checkpoint holds."""
    last = run / "checkpoints" / "last.ckpt"
    return int(last.resolve().stem.removeprefix("step_")) if last.exists() else 0


def rank_killed() -> Row:
    """One of two processes that train together is killed."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "unimodal.cli",
        *fit("--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.max_steps", "5000"),
    ]  # fmt: skip
    with Path("run.said").open("w") as said:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        launcher = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, env=environment)
        deadline = time.monotonic() + PATIENCE
        while not checkpointed() and launcher.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        ranks = {pid: Path(f"/proc/{pid}/environ").read_bytes() for pid in children(launcher.pid)}
        started = time.monotonic()
        os.kill(next(pid for pid, names in ranks.items() if b"\0RANK=1\0" in names), signal.SIGKILL)
        survivor = next(pid for pid, names in ranks.items() if b"\0RANK=0\0" in names)
        while alive(survivor) and time.monotonic() < started + 60:
            time.sleep(0.01)
        seconds = time.monotonic() - started
        code = launcher.wait()
    text = Path("run.said").read_text()
    ended = Ended(code, text.partition("torch/distributed/")[0], seconds)  # what follows is torchrun's
    message = ended.line("unimodal:", "every rank to go on")
    ok = bool(message) and code != 0 and seconds < 60 and "Traceback" not in ended.said
    return Row(
        "a rank killed", "the second of two gloo processes under torchrun gets SIGKILL",
        happened(ended, f"the other one ended {seconds:.1f} s later with the reason; torchrun ends with exit code {code}"),
        f"the steps behind the last checkpoint (step {checkpointed()}), which `--ckpt_path last` makes again", message, ok,
    )  # fmt: skip


def disk_full() -> Row:
    """No room in the run folder from some step on."""
    RUN.mkdir()
    command = [sys.executable, "-m", "unimodal.cli", *fit("--trainer.max_steps", "40")]
    fill = "while [ ! -e run/checkpoints/step_000004.ckpt ]; do sleep 0.02; done; cat /dev/zero > run/filler"
    run = f'({fill}) & "$@"; code=$?; rm run/filler; cp -a run kept; exit $code'
    script = f"mount -t tmpfs -o size=4m none run || exit 77\n{run}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = time.monotonic()
    fault = "the run folder is a tmpfs of 4 MB (a real mount), filled behind step 4"
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script, "sh", *command], capture_output=True, text=True,
                          check=False, env=environment, timeout=PATIENCE)  # fmt: skip
    if not Path("kept").is_dir():
        return Row("disk full", fault, "not provoked: no tmpfs can be mounted here", "?", done.stderr.strip(), ok=False)
    ended = Ended(done.returncode, done.stdout + done.stderr, time.monotonic() - started)
    Path("run.said").write_text(ended.said)
    message = ended.line("WARNING: checkpoint:", "No space left on device")
    steps_made = sum("checkpoint" in line for line in ended.said.splitlines())
    last = ended.line("unimodal:", "export")
    shutil.rmtree(RUN)
    Path("kept").rename(RUN)
    there = checkpointed()
    resumed = Process(fit("--trainer.max_steps", "40", "--ckpt_path", "last"), RUN).end()
    whole = resumed.clean and resumed.code == 0 and (RUN / "export").is_dir() and not (RUN / "filler").exists()
    ok = ended.clean and ended.code == 2 and bool(message) and bool(last) and there == 4 and whole and steps_made > 10
    what = "each missing checkpoint is said and all 40 steps are made; the export is not: exit code 2"
    return Row(
        "disk full", fault, happened(ended, what),
        f"nothing: with room, `--ckpt_path last` goes on from step {there} and writes the export", message, ok,
    )  # fmt: skip


def jump() -> None:
    """Let the wall clock of this process go backwards and forwards all the time."""
    real, jumps = time.time, itertools.cycle((0.0, -3600.0, 86400.0, -86400.0 * 400))
    time.time = lambda: real() + next(jumps)


def clock_jumps() -> Row:
    """A wall clock that cannot be trusted."""
    run = Process(fit("--trainer.enable_progress_bar", "true"), RUN, jump)
    ended = run.end()
    equal = losses(run.steps) == undisturbed()
    ok = ended.clean and ended.code == 0 and equal
    return Row(
        "clock jumps", "every call of Python's `time.time` jumps: an hour back, a day on, 400 days back",
        happened(ended, "losses are those of an undisturbed run, bit for bit; durations come from the monotonic clock"),
        "nothing", "", ok,
    )  # fmt: skip


def two_runs() -> Row:
    """A second run into the folder of one that goes on and has no checkpoint yet; and one after it was killed."""
    alone = ["--checkpoint.every_n_train_steps", "100000"]
    first = Process(fit(*alone, "--trainer.max_steps", "100000"), RUN)
    first.until(1)
    said = Path("second")
    second = Process(fit(*alone), said)
    refused = second.end()
    message = refused.line("unimodal:", "default_root_dir")
    before = len(steps(first.steps))
    time.sleep(0.3)
    unharmed = len(steps(first.steps)) > before
    first.kill(signal.SIGKILL)
    first.end()
    third = Process(fit(), Path("third")).end()
    ok = refused.clean and refused.code == 2 and bool(message) and unharmed and third.clean and third.code == 0
    return Row(
        "two runs into one folder", "the same command is given again while the first run has no checkpoint yet",
        happened(refused, "the second is refused with exit code 2, the first goes on; killed (-9), it frees the folder"),
        "nothing", message, ok,
    )  # fmt: skip


def told_to_stop(name: str, number: signal.Signals, fault: str) -> Row:
    """A signal reaches the training process and its workers, as those of a terminal and of SLURM do."""
    run = Process(fit("--data.workers", "2"), RUN)
    run.until(5)
    run.kill(number, group=True)
    ended = run.end()
    message = ended.line("stopped by signal")
    behind = len(losses(run.steps)) - checkpointed()
    equal, _ = gone_on(run)
    ok = ended.clean and ended.code == 128 + number and bool(message) and equal and behind == 0
    later = f"{ended.seconds:.1f} s later, with a checkpoint and exit code {ended.code}"
    done = f"the run ends behind the step in progress, {later}"
    return Row(name, fault, happened(ended, done), again(behind), message, ok)


def killed() -> Row:
    """kill -9, which nothing can be done about at that moment."""
    run = Process(fit("--data.workers", "2"), RUN)
    run.until(6)
    workers = children(run.pid)
    run.kill(signal.SIGKILL)
    ended = run.end()
    left = stay(workers)
    behind = len(losses(run.steps)) - checkpointed()
    equal, _ = gone_on(run)
    ok = ended.code == -signal.SIGKILL and not left and equal
    return Row(
        "kill -9", "SIGKILL in the middle of a step", happened(ended, "the run is gone; its workers end within a second"),
        again(behind), "", ok,
    )  # fmt: skip


ROWS: dict[str, Callable[[], Row]] = {
    "NaN loss": nan_loss,
    "NaN loss that stays": nan_losses,
    "a data worker killed": worker_killed,
    "a rank killed": rank_killed,
    "disk full": disk_full,
    "clock jumps": clock_jumps,
    "two runs into one folder": two_runs,
    "Ctrl-C": partial(told_to_stop, "Ctrl-C", signal.SIGINT, "SIGINT to the run and its workers"),
    "SIGTERM": partial(
        told_to_stop, "SIGTERM", signal.SIGTERM, "SIGTERM to the run and its workers, as a scheduler sends it"
    ),
    "SIGUSR1": partial(
        told_to_stop, "SIGUSR1", signal.SIGUSR1, "SIGUSR1 to the run and its workers, as SLURM sends it"
    ),
    "kill -9": killed,
}
assert DOCUMENTS > 100  # several steps an epoch
