"""A small vision transformer that learns what every patch of a scene shows: a frozen encoder without downloads.

Letters: B scenes, N patches in rows, K answers: to which shape, and then to which colour, the background last of both.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from experiments.digits.teacher import NAME, fit, save
from unimodal.data.shapes import COLOURS, SHAPES, Scene, ShapesSource, Split, render
from unimodal.data.shapes.render import visible, window
from unimodal.packing import to_tensor

PATCH = 4
OPTIONS: dict[str, Any] = {
    "img_size": 32, "patch_size": PATCH, "embed_dim": 64, "depth": 3, "num_heads": 4, "class_token": False,
    "global_pool": "avg",
}  # fmt: skip
"""What lightning_configs/tokenizers/shapes_representation.yaml says too."""
SHAPE, COLOUR = (*SHAPES, "background"), (*COLOURS, "background")
_TEST = 400
_LEAST = 0.25  # of a patch: what covers less of it is not what it shows


def shown(scene: Scene) -> Int64[np.ndarray, "2 N"]:
    """Which shape and which colour every patch shows: those of the thing that covers most of it."""
    cover = np.zeros((len(scene.things) + 1, scene.size, scene.size), np.float32)
    for layer, thing, seen in zip(cover, scene.things, visible(scene), strict=False):
        layer[window(thing)] = seen
    n = scene.size // PATCH
    share = cover.reshape(-1, n, PATCH, n, PATCH).mean((2, 4)).reshape(-1, n * n)
    share[-1] = _LEAST
    kinds = [(SHAPE.index(thing.shape), COLOUR.index(thing.colour)) for thing in scene.things]
    return np.array([*kinds, (len(SHAPES), len(COLOURS))])[share.argmax(0)].T


def scenes(split: Split, count: int) -> tuple[Float[Tensor, "B 3 32 32"], Int64[Tensor, "B 2 N"]]:
    """Images in [-1, 1], which is also what this model of timm's takes, and what their patches show."""
    source = ShapesSource("text_to_image", split, documents=count, seed=1)
    found: list[Scene] = []
    for number in range(count):
        found += [piece for piece, _ in source.draft(number, np.random.default_rng()) if isinstance(piece, Scene)]
    images = to_tensor([np.asarray(render(scene)) for scene in found])
    return images, torch.from_numpy(np.stack([shown(scene) for scene in found]))


def loss_of(answers: Float[Tensor, "B N K"], there: Int64[Tensor, "B 2 N"]) -> Float[Tensor, ""]:
    """Cross-entropy of shapes and of colours."""
    shape, colour = answers.mT.split([len(SHAPE), len(COLOUR)], dim=1)  # (B, ., N)
    return F.cross_entropy(shape, there[:, 0]) + F.cross_entropy(colour, there[:, 1])


def train(steps: int, seed: int = 0, batch: int = 64, count: int = 10_000) -> tuple[nn.Module, float]:
    """A network that was asked about `count` training scenes, and how much of things in unseen ones it names.

    That is the share of patches that do not show the background whose shape and colour are both right. Unseen are other
    scenes without the pairs held out.
    """
    torch.manual_seed(seed)
    answers = len(SHAPE) + len(COLOUR)
    network = timm.create_model(NAME, num_classes=answers, pretrained=False, dynamic_img_size=True, **OPTIONS)
    network.global_pool = ""  # it answers for every patch
    images, there = scenes("train", count + _TEST)
    rng = torch.Generator().manual_seed(seed)
    draws = (torch.randint(count, (batch,), generator=rng) for _ in range(steps))
    fit(network, ((images[at], there[at]) for at in draws), loss_of, steps)
    with torch.no_grad():
        shape, colour = network(images[count:]).split([len(SHAPE), len(COLOUR)], dim=2)
    right = torch.stack([shape.argmax(2), colour.argmax(2)], 1) == there[count:]  # (B, 2, N)
    return network, float(right.all(1)[there[count:, 0] < len(SHAPES)].float().mean())


def main(argv: list[str] | None = None) -> int:
    """Train it, write its weights."""
    parser = argparse.ArgumentParser("python -m experiments.shapes.teacher", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the safetensors file to write")
    parser.add_argument("--steps", type=int, default=1600)
    args = parser.parse_args(argv)
    model, accuracy = train(args.steps)
    save(model, args.out, args.steps, accuracy)
    return 0


if __name__ == "__main__":
    sys.exit(main())
