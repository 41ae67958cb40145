"""Rows of runs that another machine has done: the comparison reports them, and does not do them again."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from experiments.designs.running import Row, Run, digest

KEYS = {"name", "seed", "world", "at", "planned_steps", "settings", "machine"}
"""What a row needs to be told from others."""


def read_rows(paths: Iterable[Path]) -> list[Row]:
    """All rows of some `rows.json` that this experiment left.

    Raises:
        ValueError: a file that is none, or two rows of one point of a run.
    """
    found: dict[tuple[object, ...], Row] = {}
    for path in paths:
        try:
            rows = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"--rows: {path}: expected a rows.json of this command: {error}") from None
        if not isinstance(rows, list) or not all(isinstance(row, dict) and set(row) >= KEYS for row in rows):
            raise ValueError(f"--rows: {path}: expected a list of rows, each with {', '.join(sorted(KEYS))}")
        for row in rows:
            key = (row["world"], row["name"], row["seed"], row["planned_steps"], row["at"])
            if key in found:
                raise ValueError(f"--rows: {path}: expected one row of {_called(row)}, got two")
            found[key] = row
    return list(found.values())


def given(rows: Sequence[Row], runs: Iterable[Run], flops: float) -> dict[str, list[Row]]:
    """By the names of runs, the rows of those that are done at each of their points.

    Args:
        rows: what was read.
        runs: of one world.
        flops: of a run at equal FLOPs.

    Raises:
        ValueError: a run that was done by other settings than today's.
    """
    found = {}
    for run in runs:
        same = {"world": run.world.name, "name": run.design.name, "seed": run.seed, "planned_steps": run.steps}
        mine = {row["at"]: row for row in rows if all(row[key] == value for key, value in same.items())}
        if any(row["settings"] != digest(run, flops) for row in mine.values()):
            raise ValueError(f"--rows: {run.name} was trained or scored by other settings than today's: leave it out")
        points = run.points(flops)
        if mine and set(points) <= set(mine):
            found[run.name] = [mine[at] for at in points]
    return found


def left_over(rows: Sequence[Row], reported: Iterable[Row]) -> list[str]:
    """What rows are of that are not reported, in words."""
    known = {id(row) for row in reported}
    return [_called(row) for row in rows if id(row) not in known]


def _called(row: Row) -> str:
    return f"{row['world']} {row['name']}-{row['seed']}-{row['planned_steps']} at equal {row['at']}"
