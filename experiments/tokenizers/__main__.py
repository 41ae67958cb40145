"""Train every tokenizer on photographs, hold one out in turn, and compare: table, picture and one JSON of rows.

Each run is written when it is done and skipped where it lies in --out already: give the same command again after a stop.
"""

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor

from experiments.tokenizers import baselines
from experiments.tokenizers.photographs import TEST, PhotographData, held_out_tiles, training_tiles
from experiments.tokenizers.report import write_report
from experiments.tokenizers.table import ENTRIES, Entry, chosen
from unimodal.environment import choose_precision, describe_installation
from unimodal.evaluation.reconstruction import Tally, peak_signal_to_noise, reconstruct, structural_similarity
from unimodal.evaluation.run import machine
from unimodal.files import write_atomically
from unimodal.packing import to_tensor
from unimodal.training import TokenizerTraining
from unimodal_tokenizers import ImageTokenizer, TrainableTokenizer

BATCH = 16
SHOWN = 6
"""Tiles of the held-out photograph in the picture."""
_TIMED = 32  # images whose encoding and decoding is timed, three times


def main(argv: list[str] | None = None) -> int:
    """Train, measure, report."""
    parser = argparse.ArgumentParser("python -m experiments.tokenizers", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for runs and the report")
    parser.add_argument("--steps", type=int, default=1000, help="optimizer steps a tokenizer (1000)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="train these alone")
    parser.add_argument(
        "--held-out", nargs="+", choices=TEST, default=list(TEST), help="photographs to hold out in turn"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.steps < 1:
        parser.error(f"--steps: expected at least 1, got {args.steps}")
    try:
        entries = chosen(args.only)
    except ValueError as error:
        parser.error(str(error))
    print(describe_installation())
    runs = args.out / "runs"
    for held_out in args.held_out:
        for name, k in (("pca", 4), ("k-means", ENTRIES)):
            once(runs / f"{name}-{held_out}", {}, partial(baseline, name, k, held_out))
        for entry in entries:
            trained = f"-{args.seed}-{args.steps}" if isinstance(entry.build(), TrainableTokenizer) else ""
            folder = runs / f"{entry.name.replace(', ', '-').replace(' ', '-')}-{held_out}{trained}"
            row = once(folder, settings(entry), partial(row_of, entry, held_out, args.steps, args.seed))
            seconds = row.get("train_seconds", 0)
            print(f"{entry.name}, without {held_out}: {row['psnr']:.2f} dB in {seconds:.0f} s", flush=True)
    found = [(path.parent, json.loads(path.read_text())) for path in sorted(runs.glob("*/row.json"))]
    write_report([(folder, row) for folder, row in found if row["steps"] in (0, args.steps)], args.out)
    print(f"{args.out / 'report.md'}, rows.json, reconstructions.png")
    return 0


def settings(entry: Entry) -> dict[str, Any]:
    """What a row says of its run that may have changed since: of an earlier version, it is made again."""
    L.seed_everything(0, verbose=False)
    tokenizer = entry.build()
    start = hashlib.sha256()
    for name, value in tokenizer.state_dict().items():
        start.update(name.encode() + value.contiguous().numpy().tobytes())
    plain = {
        f"{name}.{key}": value
        for name, part in tokenizer.named_modules() for key, value in vars(part).items()
        if not key.startswith("_") and isinstance(value, bool | int | float | str | tuple | list | dict)
    }  # fmt: skip
    held = hashlib.sha256(repr((sorted(plain.items()), entry.weights)).encode())
    return {
        "precision": choose_precision()[0],
        "start_sha256": start.hexdigest()[:16],
        "settings_sha256": held.hexdigest()[:16],
    }


def once(
    folder: Path, expected: dict[str, Any], work: Callable[[], tuple[dict[str, Any], list[Tensor]]]
) -> dict[str, Any]:
    """The row of a run, from its folder if it is as expected, or made now; its pictures lie beside it."""
    path = folder / "row.json"
    found: dict[str, Any] | None = json.loads(path.read_text()) if path.is_file() else None
    if found is None or found != found | expected:
        row, pictures = work()
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / "pictures.npy", torch.stack(pictures).numpy(), allow_pickle=False)
        found = row | expected
        write_atomically(path, (json.dumps(found, indent=2) + "\n").encode())
    return found


def baseline(name: str, k: int, held_out: str) -> tuple[dict[str, Any], list[Tensor]]:
    """A baseline's row, and what it makes of the first tiles."""
    fitted = baselines.fit(name, k, training_tiles(held_out))
    tiles = held_out_tiles(held_out)
    made = [baselines.through(fitted, tile) for tile in tiles]
    pixels = baselines.PATCH**2
    rate = {"numbers_per_pixel": k / pixels} if name == "pca" else {"bits_per_pixel": np.log2(k) / pixels}
    return {"name": name, "held_out": held_out, "seed": 0, "steps": 0, **quality(tiles, made), **rate}, made[:SHOWN]


def row_of(entry: Entry, held_out: str, steps: int, seed: int) -> tuple[dict[str, Any], list[Tensor]]:
    """A tokenizer's row, once it is trained where it can be, and what it makes of the first tiles."""
    L.seed_everything(seed, verbose=False)
    tokenizer = entry.build()
    place, took = torch.device("cpu"), {"steps": 0}
    if isinstance(tokenizer, TrainableTokenizer):
        place, took = train(tokenizer, entry.weights, held_out, steps, seed)
    tokenizer.eval().to(place)
    tiles, seen = held_out_tiles(held_out), training_tiles(held_out)
    made, tally = measured(tokenizer, tiles, place)
    _, trained = measured(tokenizer, seen, place)  # how much of a codebook is used
    usage = {f"training_{key}": value for key, value in trained.measures().items() if "codebook" in key}
    row = {
        "name": entry.name, "paper": entry.paper, "held_out": held_out, "seed": seed,
        "device": str(place), "machine": machine(), **took, "parameters": sum(p.numel() for p in tokenizer.parameters()),
        **quality(tiles, made), **tally.measures(), **usage, **speed(tokenizer, seen[:_TIMED], place),
    }  # fmt: skip
    return row, made[:SHOWN]


def train(
    tokenizer: TrainableTokenizer, weights: dict[str, float] | None, held_out: str, steps: int, seed: int
) -> tuple[torch.device, dict[str, Any]]:
    """Fit it to all photographs but one; where that was, and what it took."""
    precision, _ = choose_precision()
    module = TokenizerTraining(
        tokenizer, lr=2e-3, l1_weight=0.5, l2_weight=1.0, weights=weights, warmup_steps=min(50, steps),
        lr_floor=0.01, samples=0,
    )  # fmt: skip
    trainer = L.Trainer(
        max_steps=steps, accelerator="auto", devices=1, precision=precision,  # type: ignore[arg-type]
        logger=False, enable_checkpointing=False, gradient_clip_val=1.0, enable_model_summary=False, limit_val_batches=0,
        enable_progress_bar=sys.stderr.isatty(),
    )  # fmt: skip
    started, worked = time.perf_counter(), time.process_time()  # the clock runs on where a run is stopped for a while
    trainer.fit(module, datamodule=PhotographData(held_out, BATCH, seed))
    took = {"train_seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - worked}
    return trainer.strategy.root_device, {"steps": steps, **took}


def measured(tokenizer: ImageTokenizer, tiles: list[Tensor], place: torch.device) -> tuple[list[Tensor], Tally]:
    """What it makes of tiles, and what they come to in tokens."""
    made, tally = [], Tally(tokenizer.layout, tokenizer.end)
    for start in range(0, len(tiles), BATCH):
        part = tiles[start : start + BATCH]
        images, tokens = reconstruct(tokenizer, [tile.to(place) for tile in part])
        made += [image.cpu() for image in images]
        tally.add(tokens, sum(tile[0].numel() for tile in part))
    return made, tally


def quality(originals: list[Tensor], made: list[Tensor]) -> dict[str, float]:
    """Means over tiles."""
    pairs = list(zip(originals, made, strict=True))
    return {
        "psnr": float(np.mean([peak_signal_to_noise(x, y) for x, y in pairs])),
        "ssim": float(np.mean([structural_similarity(x, y) for x, y in pairs])),
    }


@torch.no_grad()
def speed(tokenizer: ImageTokenizer, tiles: list[Tensor], place: torch.device) -> dict[str, float]:
    """Images a second, best of three: encoding and decoding by themselves."""
    images = torch.cat([to_tensor([tile.permute(1, 2, 0).numpy()]) for tile in tiles]).to(place)  # (B, 3, s, s)
    wait = torch.cuda.synchronize if place.type == "cuda" else lambda: None
    tokens = tokenizer.encode(images)
    found = {}
    for name, call in (("encode", lambda: tokenizer.encode(images)), ("decode", lambda: tokenizer.decode(tokens))):
        times = []
        for _ in range(3):
            wait()
            started = time.perf_counter()
            call()
            wait()
            times.append(time.perf_counter() - started)
        found[f"{name}_per_second"] = len(images) / min(times)
    return found


if __name__ == "__main__":
    sys.exit(main())
