"""The table of the comparison, what it says of the aims, and a picture of originals beside reconstructions."""

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from experiments.tokenizers.photographs import held_out_tiles
from experiments.tokenizers.table import TABLE
from unimodal.files import write_atomically

Row = dict[str, Any]
AIM = 3.0
"""dB above the baseline, of `kl` and `vq`."""
USAGE = 0.9
"""Share of a codebook that the training photographs use."""
_LABEL = 150  # pixels of a name beside its pictures


def write_report(found: Sequence[tuple[Path, Row]], out: Path) -> None:
    """report.md, rows.json and reconstructions.png of all runs there are."""
    rows = [row for _, row in found]
    write_atomically(out / "rows.json", (json.dumps(rows, indent=2) + "\n").encode())
    write_atomically(out / "report.md", (table(rows) + "\n" + aims(rows) + machines(rows)).encode())
    shown = sorted({row["held_out"] for row in rows})[:1]
    if shown:
        picture([(folder, row) for folder, row in found if row["held_out"] == shown[0]], shown[0]).save(
            out / "reconstructions.png"
        )


def by_name(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows of each tokenizer, in the order of the comparison; baselines first."""
    found: defaultdict[str, list[Row]] = defaultdict(list)
    for row in rows:
        found[row["name"]].append(row)
    return {name: found[name] for name in ("pca", "k-means", *(entry.name for entry in TABLE)) if name in found}


def of(rows: Sequence[Row], key: str) -> float | None:
    """Mean of a column over the photographs held out; None where it is not there."""
    values = [row[key] for row in rows if key in row]
    return mean(values) if values else None


def usage(rows: Sequence[Row]) -> float | None:
    """Of several codebooks, the least used one's share on the training photographs."""
    keys = {key for row in rows for key in row if row["steps"] and key.startswith("training_codebook_usage")}
    return min((value for key in keys if (value := of(rows, key)) is not None), default=None)


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    heads = (
        "tokenizer",
        "after",
        "rate",
        "PSNR, dB (each)",
        "SSIM",
        "codebook used",
        "encode / decode, images/s",
        "parameters",
        "trained in, CPU s",
    )
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for name, mine in by_name(rows).items():
        bits, numbers = of(mine, "bits_per_pixel"), of(mine, "numbers_per_pixel")
        rate = f"{numbers:.2f} numbers/pixel" if bits is None else f"{bits:.3f} bits/pixel"
        each = ", ".join(f"{row['psnr']:.1f}" for row in sorted(mine, key=lambda row: row["held_out"]))
        used, encode, decode = usage(mine), of(mine, "encode_per_second"), of(mine, "decode_per_second")
        seconds = of(mine, "cpu_seconds")
        cells = [
            name, mine[0].get("paper", "baseline"), rate, f"{of(mine, 'psnr'):.2f} ({each})", f"{of(mine, 'ssim'):.3f}",
            "" if used is None else f"{100 * used:.1f} %",
            "" if encode is None else f"{encode:.0f} / {decode:.0f}",
            f"{mine[0]['parameters'] / 1e6:.2f} M" if mine[0].get("parameters") else "",
            "" if seconds is None else f"{seconds:.0f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def machines(rows: Sequence[Row]) -> str:
    """Where the runs were made."""
    named = sorted({f"{row['machine']} ({row['device']}, {row['precision']})" for row in rows if "machine" in row})
    return "".join(f"- measured on {one}\n" for one in named)


def aims(rows: Sequence[Row]) -> str:
    """Each aim with what was measured."""
    named = by_name(rows)
    psnr = {name: of(mine, "psnr") for name, mine in named.items()}
    lines = []

    def say(what: str, good: bool | None, measured: str) -> None:
        lines.append(
            f"- {what}: {'not measured' if good is None else f'{measured}, ' + ('met' if good else 'not met')}"
        )

    for name, base in (("kl", "pca"), ("vq", "k-means")):
        gain = None if name not in psnr or base not in psnr else psnr[name] - psnr[base]  # type: ignore[operator]
        say(f"{name} at least {AIM:g} dB above {base}", None if gain is None else gain >= AIM, f"{gain or 0:.2f} dB")
    used = usage(named["vq"]) if "vq" in named else None
    say(f"vq uses at least {100 * USAGE:.0f} %", None if used is None else used >= USAGE, f"{100 * (used or 0):.1f} %")
    plain = usage(named["vq, any length"]) if "vq, any length" in named else None
    for name in ("fsq", "lfq"):
        own = usage(named[name]) if name in named else None
        both = own is not None and plain is not None
        say(
            f"{name} uses more than plain vq (any length)", own > plain if both else None,  # type: ignore[operator]
            f"{100 * (own or 0):.1f} % and {100 * (plain or 0):.1f} %",
        )  # fmt: skip
    depth = [psnr.get(name) for name in ("vq, any length", "residual, 2", "residual, 4")]
    rising = None if None in depth else bool(depth[0] < depth[1] < depth[2])  # type: ignore[operator]
    say("PSNR rises with residual depth 1, 2, 4", rising, ", ".join(f"{value or 0:.2f}" for value in depth) + " dB")
    return "\n".join(lines) + "\n"


def picture(found: Sequence[tuple[Path, Row]], held_out: str) -> Image.Image:
    """The first tiles of a photograph, and under them what each tokenizer makes of them."""
    order = list(by_name([row for _, row in found]))
    made = {row["name"]: np.load(folder / "pictures.npy", allow_pickle=False) for folder, row in found}
    count = len(next(iter(made.values())))
    originals = torch.stack(held_out_tiles(held_out)[:count]).numpy()
    lines = [("original", originals), *((name, made[name]) for name in order)]
    side = originals.shape[-1]
    sheet = Image.new("RGB", (_LABEL + count * (side + 2), len(lines) * (side + 2)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (name, images) in enumerate(lines):
        draw.text((4, i * (side + 2) + side // 2 - 6), name, fill="black")
        for j, image in enumerate(images):
            sheet.paste(Image.fromarray(image.transpose(1, 2, 0)), (_LABEL + j * (side + 2), i * (side + 2)))
    return sheet
