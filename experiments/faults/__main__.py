"""Provoke every fault, and leave a table: results/faults.json, and docs/faults.md made of it."""

import argparse
import os
import shutil
import sys
import time
from pathlib import Path

import torch

import unimodal.training.lightning_cli  # noqa: F401  # before anything is forked
from experiments.faults import items, processes, refused
from experiments.faults.table import PAGE, RESULTS, Row, page, read, write
from unimodal.environment import describe_installation
from unimodal.files import write_atomically

ROWS = items.ROWS | processes.ROWS | refused.ROWS


def main(argv: list[str] | None = None) -> int:
    """Provoke and report; 1 if something was not as it should be."""
    parser = argparse.ArgumentParser("python -m experiments.faults", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/faults"), help="folder for data and runs (out/faults)")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=tuple(ROWS), help="provoke these alone")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # what has threads must not be forked
    print(describe_installation())
    args.out.mkdir(parents=True, exist_ok=True)
    home, found = Path.cwd(), []
    os.chdir(args.out)  # messages then name files alike on every machine
    shutil.rmtree("whole-run", ignore_errors=True)  # of an earlier call: the code may have changed since
    for name in args.only or ROWS:
        started = time.monotonic()
        row = provoke(name)
        found.append(row)
        print(f"{'ok ' if row.ok else 'BAD'} {name} ({time.monotonic() - started:.0f} s): {row.message}", flush=True)
    os.chdir(home)
    write(found)
    write_atomically(PAGE, page(read()).encode())
    print(f"{RESULTS}, {PAGE}")
    return int(not all(row.ok for row in found))


def provoke(name: str) -> Row:
    """One row, in a new folder of its own."""
    home, folder = Path.cwd(), Path(name.replace(" ", "-").replace("/", "-").strip("-."))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    os.chdir(folder)
    try:
        return ROWS[name]()
    finally:
        os.chdir(home)


if __name__ == "__main__":
    sys.exit(main())
