"""How long one image takes: asked for alone, after a first that warms up, the median of some."""

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median

from experiments.designs.table import WORLDS
from unimodal.decoding import decode
from unimodal.decoding_settings import DecodingSettings
from unimodal.documents import Document, Part
from unimodal.export import open_model
from unimodal.files import write_atomically

IMAGES = 10


def main(argv: list[str] | None = None) -> int:
    """Time it, write it down."""
    parser = argparse.ArgumentParser("python -m experiments.designs.seconds", description=__doc__)
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--world", choices=tuple(WORLDS), required=True, help="whose prompts are asked")
    parser.add_argument("--out", type=Path, required=True, help="JSON to write")
    args = parser.parse_args(argv)
    model = open_model(args.run)
    settings = DecodingSettings("image", max_tokens=0, max_images=1)
    prompts, taken = WORLDS[args.world].prompts, []
    for number in range(IMAGES + 1):
        document = Document((Part(prompts[number % len(prompts)], learn=False),))
        started = time.perf_counter()
        decode(model, [document], settings, [number])
        taken.append(time.perf_counter() - started)
    write_atomically(args.out, json.dumps({"seconds_an_image": median(taken[1:])}).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
