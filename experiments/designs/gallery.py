"""One picture of what every design draws: the first draws of each digit, none picked, a line a design."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from experiments.designs.running import Row
from experiments.designs.table import DESIGNS

DRAWS = 2
"""Of each digit."""
_TITLE, _GAP, _CELL = 130, 3, 36  # pixels: of a name, between lines, of a digit with its margin (`sample_grid`)


def gallery(rows: Sequence[Row], out: Path, path: Path) -> None:
    """A picture at `path` from the first runs' samples, which rows name within `out`; of runs that were done elsewhere
    nothing is here to be shown."""
    lines = []
    for design in DESIGNS:
        mine = [row for row in rows if row["name"] == design.name and row["at"] == "steps"]
        mine = [row for row in mine if (out / row["samples"]).is_file()]  # not of runs that were done elsewhere
        if mine:
            first = min(mine, key=lambda row: int(row["seed"]))
            lines.append((design.name, _line(out / first["samples"])))
    if not lines:
        path.unlink(missing_ok=True)
        return
    height = lines[0][1].height + _GAP
    picture = Image.new("RGB", (_TITLE + lines[0][1].width, height * len(lines)), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(16)
    for number, (name, line) in enumerate(lines):
        draw.text((8, number * height + line.height // 2), name, fill="black", font=font, anchor="lm")
        picture.paste(line, (_TITLE, number * height))
    picture.save(path, optimize=True)


def _line(path: Path) -> Image.Image:
    """Columns of a sheet that has a row a digit, laid side by side: all digits once, then again."""
    with Image.open(path) as sheet:
        cells = [
            sheet.crop((draw * _CELL, digit * _CELL, (draw + 1) * _CELL, (digit + 1) * _CELL))
            for draw in range(DRAWS)
            for digit in range(10)
        ]
    line = Image.new("RGB", (_CELL * len(cells) + 16 * (DRAWS - 1), _CELL), "white")
    for number, cell in enumerate(cells):
        line.paste(cell, (_CELL * number + 16 * (number // 10), 0))
    return line
