"""The README's picture: samples of several scored runs side by side.

python -m experiments.digits.picture out/demo out/demo-vq --to docs/samples.png
"""

import argparse
from pathlib import Path

from PIL import Image

GAP = 24  # pixels between two runs
WIDTH = 900  # of the picture, so that it stays small in the repository


def main(argv: list[str] | None = None) -> None:
    """Paste `samples.png` of each folder in a row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="folders that `unimodal evaluate digits` wrote")
    parser.add_argument("--to", type=Path, required=True)
    args = parser.parse_args(argv)
    sheets = [Image.open(folder / "samples.png").convert("RGB") for folder in args.folders]
    width = sum(sheet.width for sheet in sheets) + GAP * (len(sheets) - 1)
    picture = Image.new("RGB", (width, max(sheet.height for sheet in sheets)), "white")
    left = 0
    for sheet in sheets:
        picture.paste(sheet, (left, 0))
        left += sheet.width + GAP
    if width > WIDTH:
        picture = picture.resize((WIDTH, round(picture.height * WIDTH / width)), Image.Resampling.BOX)
    picture.quantize(64).save(args.to)


if __name__ == "__main__":
    main()
