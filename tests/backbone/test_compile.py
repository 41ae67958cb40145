"""Runs `compiled.py` where functions are as they were written: without the run-time checks of shapes."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_compiled_equals_written_out() -> None:
    file = Path(__file__).with_name("compiled.py")
    options = ["-o", "addopts=--import-mode=importlib --strict-markers", "-p", "no:cacheprovider", "-q"]
    command = [sys.executable, "-m", "pytest", *options, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=file.parents[2], check=False, timeout=900)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert "passed" in done.stdout or "skipped" in done.stdout
