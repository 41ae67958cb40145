"""A small vision transformer that learns which coloured shapes a scene shows: a frozen encoder without downloads.

Letters: B scenes, K pairs of a shape and a colour.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from experiments.digits.teacher import NAME, fit, save
from unimodal.data.shapes import COLOURS, SHAPES, Scene, ShapesSource, Split, render
from unimodal.packing import to_tensor

OPTIONS: dict[str, Any] = {
    "img_size": 32, "patch_size": 4, "embed_dim": 64, "depth": 3, "num_heads": 4, "class_token": False,
    "global_pool": "avg",
}  # fmt: skip
"""What lightning_configs/tokenizers/shapes_representation.yaml says too."""
PAIRS = [(shape, colour) for shape in SHAPES for colour in COLOURS]
_TEST = 400
_CERTAIN = 0.5


def scenes(split: Split, count: int) -> tuple[Float[Tensor, "B 3 32 32"], Float[Tensor, "B K"]]:
    """Images in [-1, 1], which is also what this model of timm's takes, and 1 for every pair that is there, else 0."""
    source = ShapesSource("text_to_image", split, documents=count, seed=1)
    found: list[Scene] = []
    for number in range(count):
        found += [piece for piece, _ in source.draft(number, np.random.default_rng()) if isinstance(piece, Scene)]
    there = [{thing.kind for thing in scene.things} for scene in found]
    shown = torch.tensor([[float(pair in kinds) for pair in PAIRS] for kinds in there])  # (B, K)
    return to_tensor([np.asarray(render(scene)) for scene in found]), shown


def train(steps: int, seed: int = 0, batch: int = 64, count: int = 10_000) -> tuple[nn.Module, float]:
    """A classifier of `count` training scenes, and of how many of unseen ones it says exactly which pairs are there.

    Unseen are other scenes without the pairs held out: of those it could say nothing.
    """
    torch.manual_seed(seed)
    model = timm.create_model(NAME, num_classes=len(PAIRS), pretrained=False, dynamic_img_size=True, **OPTIONS)
    images, shown = scenes("train", count + _TEST)
    rng = torch.Generator().manual_seed(seed)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(steps):
            at = torch.randint(count, (batch,), generator=rng)
            yield images[at], shown[at]

    fit(model, batches(), F.binary_cross_entropy_with_logits, steps)
    with torch.no_grad():
        said = model(images[count:]).sigmoid() > _CERTAIN  # (B, K)
    return model, float((said == shown[count:].bool()).all(1).float().mean())


def main(argv: list[str] | None = None) -> int:
    """Train it, write its weights."""
    parser = argparse.ArgumentParser("python -m experiments.shapes.teacher", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the safetensors file to write")
    parser.add_argument("--steps", type=int, default=600)
    args = parser.parse_args(argv)
    model, accuracy = train(args.steps)
    save(model, args.out, args.steps, accuracy)
    return 0


if __name__ == "__main__":
    sys.exit(main())
