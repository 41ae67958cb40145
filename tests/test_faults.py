"""The table of faults is what its command left; and of its rows those that no other test provokes."""

import csv
import json
import os
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forking import script

from experiments.faults import items, processes, refused
from experiments.faults.runs import Ended
from experiments.faults.table import PAGE, Row, page, read, write
from unimodal.cli import main
from unimodal.data import TarSource
from unimodal.data.source import BrokenDocument
from unimodal.data.stream import _obey_parent
from unimodal.training.lightning_cli import _lock, first_rank
from unimodal.training.logs import Board, Table
from unimodal.training.run import from_outside


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(autouse=True)
def folder(out: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder of its own beside the others."""
    path = out / "".join(c if c.isalnum() else "-" for c in request.node.name)
    path.mkdir()
    monkeypatch.chdir(path)
    return path


# ---- the table


def test_the_page_is_what_the_results_say() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(read())


def test_every_fault_has_a_row_and_all_are_as_they_should_be() -> None:
    rows = read()
    assert [row.name for row in rows] == list(items.ROWS | processes.ROWS | refused.ROWS)
    assert all(row.ok for row in rows)
    assert all(row.fault and row.happened and row.lost for row in rows)
    assert sum(bool(row.message) for row in rows) > 15


def test_a_row_takes_its_own_place_and_what_is_wrong_is_marked(folder: Path) -> None:
    rows = [Row(str(i), "f", "h", "l", "a | b `c`", i != 1) for i in range(3)]
    write(rows, folder / "rows.json")
    write([Row("1", "f", "h", "l", "", False)], folder / "rows.json")
    found = read(folder / "rows.json")
    assert [row.name for row in found] == ["0", "1", "2"]
    assert "| 0 | f | h | l | `a \\| b 'c'` |" in page(found)
    assert "| 1 (NOT AS EXPECTED) | f | h | l | none |" in page(found)


# ---- rows


def test_what_a_workers_end_interrupts_is_not_what_is_told() -> None:
    def interrupted() -> None:
        try:
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
        finally:
            raise RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 2 vs 1")

    with pytest.raises(RuntimeError, match="unexpected pos") as caught:
        interrupted()
    assert "(DataLoader worker (pid 7) is killed by signal: Killed.)" in str(from_outside(caught.value, stepped=False))
    # Of one process alone, it is another matter.
    assert from_outside(RuntimeError("Connection closed by peer"), stepped=True) is None


NCCL = "NCCL error in: /torch/csrc/distributed/c10d/NCCLUtils.cpp:94, "


@pytest.mark.parametrize(
    ("said", "lost"),
    [
        ("[/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:3", True),
        ("[/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 1800000ms for recv operation", True),
        ("wait timeout after 1800000ms, keys: /default_pg/0", True),
        ("Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown or crash?", True),
        (NCCL + "remote process exited or there was a network error, NCCL version 2.27.5\nncclRemoteError: ...", True),
        ("[Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=9, OpType=ALLREDUCE)", True),
        (NCCL + "invalid usage (run with NCCL_DEBUG=WARN), NCCL version 2.27.5\nDuplicate GPU detected", False),
        (NCCL + "unhandled system error (run with NCCL_DEBUG=INFO for details), NCCL version 2.27.5", False),
        (NCCL + "unhandled cuda error, NCCL version 2.27.5", False),
        ("CUDA out of memory. Tried to allocate 2.00 GiB", False),
    ],
)
def test_another_ranks_end_is_told_by_the_words_of_each_library(
    said: str, lost: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"is_initialized": True, "get_rank": 2}.items():
        monkeypatch.setattr(f"torch.distributed.{name}", lambda value=value: value)
    assert bool(from_outside(RuntimeError(said), stepped=True)) is lost
    assert from_outside(RuntimeError(said), stepped=False) is None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_worker_ends_for_its_parents_word_alone(number: signal.Signals) -> None:
    """What a terminal or SLURM sends to all of them is the training's to answer."""
    ready, tell = os.pipe()
    worker = os.fork()
    if not worker:
        _obey_parent(0)
        os.write(tell, b"x")
        time.sleep(60)
        os._exit(9)
    os.read(ready, 1)
    stranger = os.fork()
    if not stranger:
        os.kill(worker, number)
        os._exit(0)
    os.waitpid(stranger, 0)
    time.sleep(0.2)
    assert os.waitpid(worker, os.WNOHANG) == (0, 0)
    os.kill(worker, signal.SIGTERM)
    assert os.waitpid(worker, 0) == (worker, 0)


def test_a_folder_is_held_until_its_process_ends(capsys: pytest.CaptureFixture[str]) -> None:
    ready, tell = os.pipe()
    root = Path("run")
    pid = os.fork()
    if not pid:
        lock = _lock(root)
        if not os.fork():  # a worker, which lives on
            time.sleep(3)
            os._exit(0)
        os.write(tell, b"x")
        time.sleep(60)
        os._exit(lock is None)
    os.read(ready, 1)
    try:
        assert main(processes.fit()) == 2
        said = capsys.readouterr().err
        held = f"expected a folder that no other run writes to, got run, held by process {pid} on "
        assert said.startswith(f"unimodal: trainer.default_root_dir: {held}")
        assert os.listdir(root) == [".lock"]
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert _lock(root) is not None


def test_one_rank_holds_the_folder_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    assert first_rank()
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert first_rank()
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert not first_rank()


def test_a_text_bomb_is_a_broken_image() -> None:
    source = TarSource(str(items.write_tar(Path("a.tar"), image=items.bomb(8, 200 * 10**6))))
    with pytest.raises(BrokenDocument, match=r"a.tar: 00050: 00050.png: expected a whole image, got"):
        source.document(items.BROKEN, np.random.default_rng(0))


# ---- runs, from a process that has not trained itself: autograd's threads do not survive a fork

RUNS = """
import json, os, signal
from dataclasses import asdict
from pathlib import Path
import torch
torch.set_num_threads(1)
import unimodal.training.lightning_cli
from forking import free_port
from experiments.faults.processes import checkpointed, children, fit, jump, losses
from experiments.faults.runs import Process

def into(name, command):
    return [name if word == "run" else word for word in command]

clocks = [Process(into(name, fit("--trainer.max_steps", "4")), Path(name), before)
          for name, before in (("right", None), ("jumping", jump))]
codes = [run.end().code for run in clocks]
found = {"clocks": [codes, *({str(s): loss for s, loss in losses(run.steps).items()} for run in clocks)]}

run = Process(fit("--data.workers", "1", "--trainer.max_steps", "200"), Path("run"))
run.until(2)
(worker,) = children(run.pid)
run.kill(0)
os.kill(worker, signal.SIGKILL)
found["worker"] = asdict(run.end())

def two_ranks(name):  # of a training without end, behind their third step
    command = into(name, fit("--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.max_steps", "2000"))
    shared = {"TORCHELASTIC_RUN_ID": "test", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0",
              "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    ranks = [Process(command, Path(f"{name}{r}"), RANK=str(r), LOCAL_RANK=str(r), **shared) for r in range(2)]
    ranks[0].until(3)
    return ranks

ranks = two_ranks("told")
ranks[1].kill(signal.SIGTERM)
found["told"] = [asdict(rank.end()) for rank in ranks]
found["made"] = [len(losses(rank.steps)) for rank in ranks]
found["checkpointed"] = checkpointed(Path("told"))
ranks = two_ranks("pair")
ranks[1].kill(signal.SIGKILL)
found["killed"] = ranks[1].end().code
ranks[0].kill(0)
found["rank"] = asdict(ranks[0].end())
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def runs(out: Path) -> dict[str, Any]:
    """What became of a run whose clock jumps, of one whose worker is killed, and of one that loses a rank."""
    (out / "runs").mkdir()
    found: dict[str, Any] = json.loads(script(RUNS, folder=out / "runs").stdout.splitlines()[-1])
    return found


@pytest.mark.slow
def test_a_worker_that_is_killed_ends_the_run_in_one_line(runs: dict[str, Any]) -> None:
    ended = Ended(**runs["worker"])
    assert (ended.code, ended.clean) == (2, True), ended.said
    assert ended.seconds < 30
    # Which of torch's two messages is quoted depends on who notices first.
    assert ended.line("unimodal: data.workers: expected worker processes", "DataLoader worker (pid", "--ckpt_path last")


@pytest.mark.slow
def test_no_loss_depends_on_the_clock(runs: dict[str, Any]) -> None:
    codes, right, jumping = runs["clocks"]
    assert codes == [0, 0]
    assert right == jumping
    assert len(right) == 4


@pytest.mark.slow
def test_a_rank_that_is_told_to_stop_stops_all_behind_one_step(runs: dict[str, Any]) -> None:
    for rank in runs["told"]:
        ended = Ended(**rank)
        assert ended.clean, ended.said
    assert runs["made"] == [runs["checkpointed"]] * 2
    assert runs["made"][0] < 2000


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_the_other_with_the_reason(runs: dict[str, Any]) -> None:
    assert runs["killed"] == -signal.SIGKILL
    ended = Ended(**runs["rank"])
    assert (ended.code, ended.clean) == (2, True), ended.said
    assert ended.seconds < 30
    assert ended.line("unimodal: trainer.devices: expected every rank to go on", "(rank 0 saw: ", "--ckpt_path last")


# ---- logs on a full disk


@contextmanager
def full(room: int) -> Iterator[None]:
    """No file may grow beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_metrics_wait_for_room_and_none_is_lost(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, path = Table(folder, "logs"), folder / "logs" / "version_0" / "metrics.csv"

    def log(step: int, **values: float) -> None:
        table.log_metrics(values, step)
        table.save()

    log(1, a=0.5)
    log(2, a=1.5)
    before = path.read_bytes()
    with full(len(before) + 2):
        log(3, a=2.5)
        assert path.read_bytes() == before
        log(4, a=3.5, b=7.0)  # a new column, for which the file is written anew
        assert path.read_bytes() == before
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert said[0].startswith(f"WARNING: {path} could not be written ([Errno 27] File too large")
    assert said[0].endswith("training goes on, its rows wait in memory")
    log(5, b=8.0)
    rows = list(csv.DictReader(path.open()))
    assert [row["step"] for row in rows] == ["1", "2", "3", "4", "5"]
    assert [(row["a"], row["b"]) for row in rows[2:]] == [("2.5", ""), ("3.5", "7.0"), ("", "8.0")]
    assert os.listdir(path.parent) == ["metrics.csv"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_board_goes_on_in_a_new_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    board = Board(folder, "board")
    board.log_metrics({"a": 1.0}, 1)
    board.save()
    with full(10):
        for step in range(2, 40):
            board.log_metrics({"a": 1.0}, step)
            board.save()
        board.finalize("success")
    assert "(TensorBoard) could not be written ([Errno 27] File too large" in capsys.readouterr().err
    board.log_metrics({"a": 1.0}, 40)
    board.finalize("success")
    newest = max(folder.rglob("events.out.tfevents.*"), key=lambda p: p.stat().st_size)
    assert newest.stat().st_size > 80
