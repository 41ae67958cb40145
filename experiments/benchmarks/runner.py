"""The loop over rows, and the command line that the CPU's and the GPU's rows share."""

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from experiments.benchmarks.cases import FAILURES, Case, Settings
from experiments.benchmarks.machine import versions
from experiments.benchmarks.results import Goal, Result, table, write


def run(name: str, case: Case, goal: Goal | None, settings: Settings, command: str) -> Result:
    """One row; what fails says why and leaves the others alone."""
    torch._dynamo.reset()
    try:
        result = case(settings)
    except FAILURES as error:
        line = next(iter(str(error).splitlines()), "")
        result = Result(name, None, "", note=f"failed: {type(error).__name__}: {line}")
    settings.release()
    result.name = name
    return result.judged(goal, f"python -m {command} --only {name}")


def main(
    argv: list[str] | None, *, command: str, about: str | None, goals: Mapping[str, Goal | None],
    cases: Mapping[str, Case], device: str, out: Path, probe: Callable[[bool], dict[str, Any]],
) -> int:  # fmt: skip
    """Measure, print the table, write the file; 1 when a row failed, 2 for a row that is none."""
    parser = argparse.ArgumentParser(f"python -m {command}", description=about)
    parser.add_argument("--out", type=Path, default=out, help=f"result file (default {out})")
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"some of {', '.join(goals)}")
    parser.add_argument("--repeats", type=int, default=12, metavar="N", help="runs of each candidate")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, once: shows that rows run, not how fast")
    args = parser.parse_args(argv)
    names = args.only or list(goals)
    for name in names:
        if name not in goals:
            print(f"error: --only: expected some of {', '.join(goals)}, got {name}", file=sys.stderr)
            return 2
    if args.repeats < 1:
        print(f"error: --repeats: expected at least 1, got {args.repeats}", file=sys.stderr)
        return 2
    machine = probe(args.quick)
    print({key: value for key, value in machine.items() if value}, flush=True)
    settings = Settings(quick=args.quick, device=device, repeats=1 if args.quick else args.repeats)
    rows: list[Result] = []
    for name in names:
        started = time.monotonic()
        rows.append(run(name, cases[name], goals[name], settings, command))
        print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)
        write(args.out, machine, versions(), rows)  # after every row: an interrupted run keeps what it has
    print(table(rows))
    print(f"written to {args.out}")
    return int(any(row.note.startswith("failed") for row in rows))
