"""Processes of tests. What trains is forked of a process that has not trained: autograd's threads do not survive a fork."""

import inspect
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

TOGETHER = """
import importlib.util, json, sys
import torch
torch.set_num_threads(1)
file, name, calls = sys.argv[1:]
spec = importlib.util.spec_from_file_location("forked", file)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
for ranks, arguments in json.loads(calls):
    torch.multiprocessing.start_processes(getattr(module, name), arguments, nprocs=ranks, start_method="fork")
"""


def environment() -> dict[str, str]:
    """Of a process that finds the same modules, and has one thread."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def script(code: str, *arguments: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process of its own. AssertionError: it did not end with 0."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False, cwd=folder,
        env=environment(), timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    return done


def together(function: Callable[..., None], *calls: tuple[int, tuple[object, ...]]) -> None:
    """Call a function of a test file, `function(rank, *arguments)`, once on each of so many ranks, for each of the calls."""
    script(TOGETHER, inspect.getfile(function), function.__name__, json.dumps(calls))


def free_port() -> str:
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def fork(work: Callable[[], int | None]) -> int:
    """A copy of this process that does the work and ends with what it gives, or 99; the copy's number."""
    pid = os.fork()
    if pid:
        return pid
    code: object = 99
    try:
        code = work()
    except SystemExit as end:
        code = end.code
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))


def fork_ranks(work: Callable[[], int | None], ranks: int) -> list[int]:
    """Copies with the environment of torchrun."""
    port = free_port()

    def ranked(rank: int) -> int | None:
        if ranks > 1:
            os.environ.update(
                TORCHELASTIC_RUN_ID="test", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks),
                LOCAL_WORLD_SIZE=str(ranks), GROUP_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
            )  # fmt: skip
        return work()

    return [fork(lambda rank=rank: ranked(rank)) for rank in range(ranks)]


def ended(pids: Sequence[int]) -> list[int]:
    """Wait for copies; what each ended with."""
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


SERVER = """
import importlib, json, os, sys
import torch
from forking import ended, fork
torch.set_num_threads(1)
for name in sys.argv[1:]:
    importlib.import_module(name)
answers = os.fdopen(os.dup(1), "w")

def run(name, arguments, log):
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1), os.dup2(file, 2)
    return importlib.import_module(name).main(arguments)

for line in sys.stdin:
    (code,) = ended([fork(lambda: run(*json.loads(line)))])
    answers.write(f"{code}\\n")
    answers.flush()
"""


class Forks:
    """Runs `python -m module arguments...` often; only a first process, with the modules given, has to import."""

    def __init__(self, *modules: str) -> None:
        command = [sys.executable, "-c", SERVER, *modules]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()
        )

    def __enter__(self) -> "Forks":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.process.communicate()
        self.process.wait()

    def run(self, command: Sequence[str], log: Path) -> int:
        """Its exit code, as `subprocess.run` has it; its output is added to the log."""
        python, option, module, *arguments = command
        assert (python, option) == (sys.executable, "-m")
        log.parent.mkdir(parents=True, exist_ok=True)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([module, arguments, str(log)]) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def check(self, command: Sequence[str], log: Path) -> None:
        """AssertionError: it did not end with 0."""
        code = self.run(command, log)
        assert code == 0, f"{' '.join(command)} ended with {code}: {log.read_text()[-3000:]}"
