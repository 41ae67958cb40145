"""Train and score the published designs on the same documents; leave a table, plots, samples and one JSON of rows.

Every part is skipped where its result lies in --out already, and a training that was stopped goes on where it stood: give
the same command again.
"""

import argparse
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from experiments.designs.report import write_report
from experiments.designs.running import Row, Run, Runner, plan
from experiments.designs.table import WORLDS, Design, World, chosen
from unimodal.environment import describe_installation
from unimodal.files import write_atomically

SEEDS = 3


def main(argv: list[str] | None = None) -> int:
    """Plan, train, score, report."""
    parser = argparse.ArgumentParser("python -m experiments.designs", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for runs, scores and the report")
    parser.add_argument("--world", choices=tuple(WORLDS), default="digits", help="what is drawn and read (digits)")
    parser.add_argument("--only", nargs="+", metavar="DESIGN", help="these alone; the others' rows stay as they are")
    parser.add_argument("--seeds", type=int, help=f"runs a design ({SEEDS}; 1 with --quick)")
    parser.add_argument("--steps", type=int, help="optimizer steps a run (the world's own)")
    parser.add_argument("--quick", action="store_true", help="fewer steps, one seed")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, each with its share of the threads (1)")
    parser.add_argument("--plan", action="store_true", help="say what would be trained, and what it costs, and end")
    args = parser.parse_args(argv)
    world: World = WORLDS[args.world]
    steps = args.steps or (world.quick_steps if args.quick else world.steps)
    seeds = args.seeds or (1 if args.quick else SEEDS)
    for name, value, least in (("--steps", steps, 2), ("--seeds", seeds, 1), ("--jobs", args.jobs, 1)):
        if value < least:
            parser.error(f"{name}: expected at least {least}, got {value}")
    try:
        designs = chosen(args.only)
    except ValueError as error:
        parser.error(str(error))
    print(describe_installation())
    runs = [plan(design, world, seed, steps) for seed in range(seeds) for design in designs]
    # The budget is that of the cheapest of all designs, whichever are asked for: rows of two calls must compare.
    budget = min(run.flops for run in every(designs, runs, world, steps))
    describe(runs, budget)
    if args.plan:
        return 0
    return train(runs, budget, Runner(args.out, threads(args.jobs)), args.jobs)


def every(designs: tuple[Design, ...], runs: list[Run], world: World, steps: int) -> list[Run]:
    """A run of each design there is, planned where it is not among those asked for."""
    rest = [design for design in chosen(None) if design not in designs]
    return [*runs, *(plan(design, world, 0, steps) for design in rest)]


def threads(jobs: int) -> int | None:
    """Of each process: torch's own number when one runs alone, else a fair share."""
    if jobs == 1:
        return None
    import torch

    return max(1, torch.get_num_threads() // jobs)


def describe(runs: list[Run], budget: float) -> None:
    """What will be trained."""
    print(f"{'run':20}{'steps':>7}{'PFLOP':>8}{'documents':>11}{'M parameters':>14}{'steps at equal FLOPs':>22}")
    for run in runs:
        last = run.stages[-1]
        documents = sum(stage.steps * stage.cost.documents for stage in run.stages)
        print(
            f"{run.name:20}{sum(s.steps for s in run.stages):7}{run.flops / 1e15:8.4f}{documents:11,.0f}"
            f"{last.cost.parameters / 1e6:14.2f}{run.flops and run.steps_within(budget):22}"
        )


def train(runs: list[Run], budget: float, runner: Runner, jobs: int) -> int:
    """All of them; a run that fails leaves the others alone, and its last line is said."""
    rows_file = runner.out / "rows.json"
    rows: list[Row] = json.loads(rows_file.read_text()) if rows_file.is_file() else []
    for name in dict.fromkeys(run.design.tokenizer for run in runs):
        if name is not None:
            print(f"tokenizer {name}", flush=True)
            runner.tokenizer(name)
    failed = 0
    with ThreadPoolExecutor(jobs) as pool:
        started = time.monotonic()
        asked = {pool.submit(runner.scored, run, budget): run for run in runs}
        for done in as_completed(asked):
            run = asked[done]
            try:
                new = done.result()
            except RuntimeError as error:
                failed += 1
                print(f"{run.name}: {error}", file=sys.stderr, flush=True)
                continue
            mine = {(row["name"], row["seed"]) for row in new}
            rows = [row for row in rows if (row["name"], row["seed"]) not in mine] + new
            write_atomically(rows_file, (json.dumps(rows, indent=2) + "\n").encode())
            shown = ", ".join(f"{key} {100 * new[-1][key]:.1f} %" for key in (run.world.drawn, run.world.read))
            print(f"{time.monotonic() - started:7.0f} s  {run.name}: {shown}", flush=True)
    if rows:
        write_report(rows, runs[0].world, runner.out)
        print(f"{runner.out / 'report.md'} and rows.json; samples in runs/NAME-SEED/at_STEPS/index.html")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
