"""Many commands, each in a process of its own, of which only the first has to import: the others are forks of it."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

SERVER = """
import importlib, json, os, sys
import torch
torch.set_num_threads(1)
for name in sys.argv[1:]:
    importlib.import_module(name)
answers = os.fdopen(os.dup(1), "w")
for line in sys.stdin:
    name, arguments, log = json.loads(line)
    pid = os.fork()
    if not pid:
        code = 99
        try:
            file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(file, 1), os.dup2(file, 2)
            code = importlib.import_module(name).main(arguments)
        except SystemExit as end:
            code = end.code
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code or 0)
    answers.write(f"{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\\n")
    answers.flush()
"""


class Forks:
    """Runs `python -m module arguments...`, with the modules given imported before."""

    def __init__(self, *modules: str) -> None:
        command = [sys.executable, "-c", SERVER, *modules]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
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
