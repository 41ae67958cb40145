"""Colours of objects by a small random CLIP: crops, templates, batching, and the traps of swapped channels and GELU."""

import json

import numpy as np
import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

from unimodal.evaluation.clip_colours import (
    TEMPLATES,
    Clip,
    ClipColours,
    check_quick_gelu,
    crop,
    load_clip,
    tensors_sha256,
)
from unimodal.metrics.detection import Detection
from unimodal.metrics.geneval import COLOURS

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}


def build(quick=True, seed=0):
    torch.manual_seed(seed)
    return open_clip.CLIP(TINY["embed_dim"], TINY["vision_cfg"], TINY["text_cfg"], quick_gelu=quick).eval()


@pytest.fixture(scope="module")
def clip():
    network = build()
    transform = image_transform_v2(PreprocessCfg(size=32), is_train=False)
    return Clip(network, transform, open_clip.get_tokenizer("ViT-L-14-quickgelu"), "tiny")


def scene(seed=0, label="cat"):
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8))
    mask = np.zeros((40, 60), bool)
    mask[10:30, 20 + seed : 50] = rng.random((20, 30 - seed)) < 0.7
    mask[10, 20 + seed] = mask[29, 49] = True
    return image, Detection(label, (20.0 + seed, 10.0, 50.0, 30.0), 0.9, mask)


def test_the_crop_keeps_the_masks_pixels_and_greys_the_rest():
    image, detection = scene()
    cut = np.asarray(crop(image, detection))
    # As the official script does it: the whole image is composed first, and cut afterwards.
    grey = Image.new("RGB", image.size, "#999")
    whole = Image.composite(image, grey, Image.fromarray(detection.mask)).crop((20, 10, 50, 30))
    np.testing.assert_array_equal(cut, np.asarray(whole))
    assert (cut[~detection.mask[10:30, 20:50]] == 0x99).all()
    np.testing.assert_array_equal(
        np.asarray(crop(image, Detection("cat", detection.box, 0.9))), np.asarray(image)[10:30, 20:50]
    )


def test_what_is_behind_the_mask_changes_nothing(clip):
    image, detection = scene()
    changed = np.asarray(image).copy()
    changed[~detection.mask] = (255, 0, 0)
    colours = ClipColours(clip, "cpu")
    torch.testing.assert_close(
        colours.similarities([(image, detection)]), colours.similarities([(Image.fromarray(changed), detection)])
    )
    with pytest.raises(ValueError, match="mask: expected 40 x 60 pixels"):
        crop(image, Detection("cat", detection.box, 0.9, detection.mask[:-1]))


def test_similarities_are_those_of_the_script_one_object_at_a_time(clip):
    objects = [scene(0, "cat"), scene(1, "traffic light"), scene(2, "cat")]
    network, expected = clip.network, []
    with torch.no_grad():
        for image, detection in objects:
            columns = []
            for colour in COLOURS:
                texts = [
                    f"a photo of a {colour} {detection.label}",
                    f"a photo of a {colour}-colored {detection.label}",
                    f"a photo of a {colour} object",
                ]
                embedded = functional.normalize(network.encode_text(clip.tokenize(texts)), dim=-1).mean(0)
                columns.append(embedded / embedded.norm())
            seen = network.encode_image(clip.transform(crop(image, detection))[None])
            expected.append((seen / seen.norm()) @ torch.stack(columns, 1))
    ours = ClipColours(clip, "cpu").similarities(objects)
    torch.testing.assert_close(ours, torch.cat(expected), rtol=1e-4, atol=1e-5)
    assert ClipColours(clip, "cpu").names(objects) == [COLOURS[int(row.argmax())] for row in torch.cat(expected)]
    assert len(TEMPLATES) == 3


class Counting(nn.Module):
    """Counts what its network is asked."""

    def __init__(self, network):
        super().__init__()
        self.network, self.images, self.texts = network, [], []

    def encode_image(self, images):
        self.images.append(len(images))
        return self.network.encode_image(images)

    def encode_text(self, texts):
        self.texts.append(len(texts))
        return self.network.encode_text(texts)


def test_all_crops_of_all_images_are_one_batch_and_texts_are_embedded_once_a_class(clip):
    counting = Counting(clip.network)
    colours = ClipColours(Clip(counting, clip.transform, clip.tokenize, "counted"), "cpu")
    assert colours.names([]) == []
    assert counting.images == []
    objects = [scene(seed, label) for seed in range(4) for label in ("cat", "dog")]
    names = colours.names(objects)
    assert (counting.images, counting.texts) == ([8], [30, 30])
    assert colours.names(objects[::-1]) == names[::-1]
    assert (counting.images, counting.texts) == ([8, 8], [30, 30])
    small = ClipColours(Clip(counting, clip.transform, clip.tokenize, "counted"), "cpu", batch=3)
    assert small.names(objects) == names
    assert counting.images[2:] == [3, 3, 2]


def test_swapped_channels_are_seen(clip):
    image, detection = scene()
    swapped = Image.fromarray(np.asarray(image)[..., ::-1].copy())
    colours = ClipColours(clip, "cpu")
    assert not torch.allclose(colours.similarities([(image, detection)]), colours.similarities([(swapped, detection)]))


# --- loading


def test_plain_gelu_is_refused_with_the_reason(clip):
    check_quick_gelu(build(), "right")
    with pytest.raises(
        ValueError, match=r"--clip: wrong: expected a network with QuickGELU.*got plain GELU.*-quickgelu"
    ):
        check_quick_gelu(build(quick=False), "wrong")
    with pytest.raises(ValueError, match="got plain GELU"):
        ClipColours(Clip(build(quick=False), clip.transform, clip.tokenize, "wrong"), "cpu")
    # The trap itself: open_clip's plain name builds a network without it, the other one with it.
    assert not open_clip.get_model_config("ViT-L-14").get("quick_gelu")
    assert open_clip.get_model_config("ViT-L-14-quickgelu")["quick_gelu"] is True


@pytest.fixture
def folder(tmp_path):
    def make(quick):
        base = tmp_path / f"clip-{quick}"
        base.mkdir()
        config = {"model_cfg": TINY | ({"quick_gelu": quick} if quick is not None else {}), "preprocess_cfg": {}}
        (base / "open_clip_config.json").write_text(json.dumps(config))
        save_file(build().state_dict(), base / "open_clip_model.safetensors")
        return base

    return make


def test_a_folder_is_loaded_as_it_was_saved(folder):
    found = load_clip(str(folder(True)))
    assert tensors_sha256(found.network) == tensors_sha256(build())
    assert tensors_sha256(found.network) != tensors_sha256(build(seed=1))
    spec = ClipColours(found, "cpu").spec()
    assert (spec["network"], spec["activation"], spec["background"]) == ("clip-True", "QuickGELU", "#999")
    assert ClipColours(found, "cpu").names([scene()])[0] in COLOURS


def test_a_folder_or_name_that_means_plain_gelu_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="expected quick_gelu: true"):
        load_clip(str(folder(None)))
    with pytest.raises(ValueError, match=r"expected a folder with open_clip_config\.json"):
        load_clip(str(tmp_path))
    with pytest.raises(ValueError, match=r"got ViT-L-14 .a network's name"):
        load_clip("ViT-L-14")
    with pytest.raises(ValueError, match="--clip: expected openai, hf-hub"):
        load_clip("missing.safetensors")


@pytest.fixture
def tiny_architecture(tmp_path):
    for name, quick in (("tiny-quickgelu", True), ("tiny-gelu", False)):
        (tmp_path / f"{name}.json").write_text(json.dumps(TINY | {"quick_gelu": quick}))
        open_clip.add_model_config(tmp_path / f"{name}.json")
    yield
    for name in ("tiny-quickgelu", "tiny-gelu"):
        open_clip.factory._MODEL_CONFIGS.pop(name, None)


def test_a_file_is_loaded_into_the_architecture_with_quick_gelu(tmp_path, tiny_architecture):
    path = tmp_path / "weights.safetensors"
    save_file(build().state_dict(), path)
    assert tensors_sha256(load_clip(str(path), "tiny-quickgelu").network) == tensors_sha256(build())
    with pytest.raises(ValueError, match="got plain GELU"):
        load_clip(str(path), "tiny-gelu")
    torch.save({"text": torch.zeros(1)}, tmp_path / "other.bin")
    with pytest.raises(ValueError, match="expected weights that fit tiny-quickgelu"):
        load_clip(str(tmp_path / "other.bin"), "tiny-quickgelu")
    (tmp_path / "text.bin").write_text("nothing")
    with pytest.raises(ValueError, match="expected weights that fit"):
        load_clip(str(tmp_path / "text.bin"), "tiny-quickgelu")
