"""Plain images for tokenizers: the scenes are those of the world, and held-out ones are kept apart."""

import numpy as np
import torch

from unimodal.data import ShapesImageData
from unimodal.data.shapes import HELD_OUT, Scene, ShapesSource, render
from unimodal.packing import to_tensor


def test_scenes_are_those_of_the_world_and_held_out_ones_are_apart() -> None:
    data = ShapesImageData(batch_size=2, scenes=6, validation_scenes=4)
    for split, name, count in (("train", "train", 6), ("val", "test", 4)):
        images, source = data.images(split), ShapesSource("text_to_image", name, documents=count, seed=0)  # type: ignore[arg-type]
        assert len(images) == count  # type: ignore[arg-type]
        for index in range(count):
            (scene,) = (s for s, _ in source.draft(index, np.random.default_rng()) if isinstance(s, Scene))
            assert torch.equal(images[index], to_tensor([np.asarray(render(scene))])[0])
            assert torch.equal(images[index], images[index])  # the second time it is kept
            assert any(thing.kind in HELD_OUT for thing in scene.things) == (split == "val")


def test_the_seed_orders_the_scenes_and_does_not_change_them() -> None:
    one, other = (ShapesImageData(batch_size=2, scenes=3, seed=seed).images("train") for seed in (0, 1))
    assert all(torch.equal(one[index], other[index]) for index in range(3))
