"""A small vision transformer that learns to name the digits: the frozen encoder of recipes that need one offline.

Letters: B scans.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from unimodal.data.digits import Split, digit_images
from unimodal.packing import to_tensor

NAME = "vit_tiny_patch16_224"
OPTIONS: dict[str, Any] = {
    "img_size": 8, "patch_size": 2, "embed_dim": 64, "depth": 3, "num_heads": 4, "class_token": False, "global_pool": "avg",
}  # fmt: skip
"""What lightning_configs/tokenizers/digits_representation.yaml says too."""


def scans(split: Split) -> tuple[Tensor, Tensor]:
    """Images (B, 3, 8, 8) in [-1, 1], which is also what this model of timm's takes, and their digits (B,)."""
    data = digit_images(split)
    return to_tensor([np.asarray(image) for image in data.images()]), torch.from_numpy(data.labels.copy())


def train(steps: int, seed: int = 0, batch: int = 128) -> tuple[nn.Module, float]:
    """A classifier of the training scans, and its accuracy on those of the test split."""
    torch.manual_seed(seed)
    model = timm.create_model(NAME, num_classes=10, pretrained=False, dynamic_img_size=True, **OPTIONS)
    images, labels = scans("train")
    rng = torch.Generator().manual_seed(seed)
    draws = (torch.randint(len(images), (batch,), generator=rng) for _ in range(steps))
    fit(model, ((images[at], labels[at]) for at in draws), F.cross_entropy, steps)
    images, labels = scans("test")
    with torch.no_grad():
        accuracy = float((model(images).argmax(1) == labels).float().mean())
    return model, accuracy


def fit(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    loss_of: Callable[[Tensor, Tensor], Tensor],
    steps: int,
) -> None:
    """Teach a network to say of images what they show, over as many batches as there are steps; it is at rest afterwards."""
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    for images, shown in batches:
        loss = loss_of(model(images), shown)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()


def save(model: nn.Module, out: Path, steps: int, accuracy: float) -> None:
    """Write its weights, say how good it is."""
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: w.contiguous() for name, w in model.state_dict().items()}, out)
    print(json.dumps({"weights": str(out), "steps": steps, "accuracy": round(accuracy, 4)}))


def main(argv: list[str] | None = None) -> int:
    """Train it, write its weights."""
    parser = argparse.ArgumentParser("python -m experiments.digits.teacher", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the safetensors file to write")
    parser.add_argument("--steps", type=int, default=600)
    args = parser.parse_args(argv)
    model, accuracy = train(args.steps)
    save(model, args.out, args.steps, accuracy)
    return 0


if __name__ == "__main__":
    sys.exit(main())
