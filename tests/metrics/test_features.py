"""Each resize against the library it comes from; networks load from files alone; the wrong activation is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x
from torchmetrics.image.fid import NoTrainInceptionV3

from unimodal.files import read_state
from unimodal.metrics import clip, inception
from unimodal.metrics.clip import ClipFeatures, ShortestFirst, SquareFirst
from unimodal.metrics.dino import DinoFeatures, shrunk_positions
from unimodal.metrics.features import PixelFeatures, as_drawn, centre_square, load_strictly
from unimodal.metrics.inception import RESIZES, InceptionFeatures


def picture(width: int = 61, height: int = 47, seed: int = 0) -> Image.Image:
    """Smooth ramps and hard noise: every kernel treats them otherwise."""
    rng = np.random.default_rng(seed)
    ramp = (
        np.linspace(0, 255, width)[None, :, None] * np.linspace(0.2, 1, height)[:, None, None] * np.array([1, 0.7, 0.4])
    )
    noise = rng.integers(0, 256, (height, width, 3)) * (rng.random((height, width, 1)) < 0.3)
    return Image.fromarray(np.clip(ramp * 0.6 + noise * 0.4, 0, 255).astype(np.uint8))


def batch(*images: Image.Image) -> torch.Tensor:
    return torch.stack([as_drawn(image) for image in images])


# ---- images


def test_pixels_come_as_drawn_and_squares_from_the_middle() -> None:
    image = picture()
    found = as_drawn(image)
    assert (found.dtype, found.shape) == (torch.uint8, (3, 47, 61))
    assert found[:, 5, 9].tolist() == np.asarray(image)[5, 9].tolist()
    square = centre_square(image)
    assert square.size == (47, 47)
    assert square.getpixel((0, 3)) == image.getpixel((7, 3))
    assert as_drawn(image.convert("L")).shape == (3, 47, 61)


def test_pixel_features_are_means_of_boxes_and_no_fid() -> None:
    features = PixelFeatures(4)
    image = picture(32, 24)
    found = features(features.prepare(image)[None])[0].reshape(3, 4, 4)
    slow = np.asarray(image, dtype=float).reshape(4, 6, 4, 8, 3).mean((1, 3)).transpose(2, 0, 1) / 255
    np.testing.assert_allclose(found.numpy(), slow, atol=1.1 / 255)
    assert (features.name, features.width, features.measure("frechet")) == ("pixels48", 48, "frechet_pixels48")
    np.testing.assert_array_equal(features.of_images(batch(image)).flatten(), found.flatten())
    with pytest.raises(ValueError, match="size: expected at least 1"):
        PixelFeatures(0)


# ---- Inception


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in the published file's format and under its name."""
    torch.manual_seed(0)
    network = inception.EmptyInception()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0  # statistics of the next batch: else nothing of an image arrives at the last layer
    with torch.no_grad():
        network.train()(batch(*(picture(seed=seed) for seed in range(4))))
    state = {k: v for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}
    path = tmp_path_factory.mktemp("weights") / "pt_inception-2015-12-05-6726825d.pth"
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def features(weights: Path) -> InceptionFeatures:
    return InceptionFeatures(weights)


@pytest.fixture(scope="module")
def original(weights: Path) -> FeatureExtractorInceptionV3:
    names = ["64", "192", "768", "2048", "logits_unbiased"]
    network = inception.EmptyInception()
    network.features_list = names
    network.load_state_dict(torch.load(weights, weights_only=True), strict=False)
    return network.eval()


def test_every_layer_is_torch_fidelitys(features: InceptionFeatures, original: FeatureExtractorInceptionV3) -> None:
    images = batch(picture(), picture(seed=1))
    with torch.no_grad():
        theirs = dict(zip(original.features_list, original(images), strict=True))
        for layer, width in inception.LAYERS.items():
            features.layer = layer
            found = features(images)
            assert found.shape == (2, width)
            torch.testing.assert_close(found, theirs[layer], rtol=1e-4, atol=1e-5)
        features.layer = "2048"
        torch.testing.assert_close(features.logits(features(images)), theirs["logits_unbiased"], rtol=1e-4, atol=1e-5)


def test_tf1_resize_is_torch_fidelitys_and_not_torchmetrics_default(weights: Path) -> None:
    images = batch(picture())
    found = RESIZES["tf1"]().numbers(images)
    slow = interpolate_bilinear_2d_like_tensorflow1x(images.float(), size=(299, 299), align_corners=False)
    torch.testing.assert_close(found * 128 + 128, slow)
    assert float(found[0, 0, 0, 0]) == (float(images[0, 0, 0, 0]) - 128) / 128  # corner at corner
    seen: list[torch.Tensor] = []
    for antialias in (False, True):
        network = NoTrainInceptionV3.__new__(NoTrainInceptionV3)
        nn.Module.__init__(network)
        network.use_antialias, network.features_list = antialias, ["64"]
        network.Conv2d_1a_3x3 = network.Conv2d_2a_3x3 = network.Conv2d_2b_3x3 = nn.Identity()
        network.MaxPool_1 = Keep(seen)
        network._torch_fidelity_forward(images)
    torch.testing.assert_close(found, seen[0])  # antialias=False
    assert (found - seen[1]).abs().mean() > 0.01


class Keep(nn.Module):
    def __init__(self, seen: list[torch.Tensor]) -> None:
        super().__init__()
        self.seen = seen

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(x)
        return x


def test_clean_resize_is_pillows_bicubic_of_float_channels() -> None:
    resize = RESIZES["clean"]()
    for image in (picture(), picture(700, 500)):
        found = resize.preparation(image)
        for c, band in enumerate(image.split()):
            slow = band.convert("F").resize((299, 299), Image.Resampling.BICUBIC)
            np.testing.assert_allclose(found[c].numpy(), np.asarray(slow), atol=1e-3)
        assert (found != found.round()).any()  # not quantised
    checks = Image.fromarray((np.indices((40, 40)).sum(0) // 5 % 2 * 255).astype(np.uint8)).convert("RGB")
    assert resize.preparation(checks).max() > 255  # nor clipped
    torch.testing.assert_close(resize.numbers(found[None]) * 128 + 128, found[None])


def test_pytorch_resize_has_no_antialias_and_pytorch_fids_range() -> None:
    images = batch(picture(640, 512))
    found = RESIZES["pytorch"]().numbers(images)
    slow = F.interpolate(images.float() / 255, size=(299, 299), mode="bilinear", align_corners=False)
    torch.testing.assert_close((found + 1) / 2, slow)
    smooth = F.interpolate(images.float() / 255, size=(299, 299), mode="bilinear", antialias=True)
    assert ((found + 1) / 2 - smooth).abs().mean() > 0.01
    white = torch.full((1, 3, 299, 299), 255, dtype=torch.uint8)
    assert RESIZES["pytorch"]().numbers(white).max() == 1
    assert RESIZES["tf1"]().numbers(white).max() == 127 / 128  # another range: not the same numbers


def test_crop8_resize_crops_and_quantises() -> None:
    image = picture(700, 500)
    found = RESIZES["crop8"]().preparation(image)
    slow = image.crop((100, 0, 600, 500)).resize((299, 299), Image.Resampling.BICUBIC)
    assert found.dtype == torch.uint8
    np.testing.assert_array_equal(found.permute(1, 2, 0).numpy(), np.asarray(slow))
    assert RESIZES["crop8"]().numbers(torch.full((1, 3, 299, 299), 255, dtype=torch.uint8)).max() == 1


def test_each_resize_gives_other_features(features: InceptionFeatures) -> None:
    images = batch(picture(350, 310))
    found = {}
    for name, resize in RESIZES.items():
        features.resize, features.preparation = resize(), resize().preparation
        with torch.no_grad():
            found[name] = features.of_images(images)
            torch.testing.assert_close(found[name], features(features.prepare(picture(350, 310))[None]))
        assert features.spec()["resize"] == name
    features.resize, features.preparation = RESIZES["tf1"](), RESIZES["tf1"]().preparation
    names = list(found)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            assert not torch.allclose(found[a], found[b], rtol=1e-4), (a, b)


def test_only_the_last_pooled_layer_of_the_published_weights_makes_a_fid(
    features: InceptionFeatures, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = features.spec()
    assert spec["weights"]["file"] == weights.name
    assert len(spec["weights"]["sha256"]) == 64
    assert spec["published_weights"] is False  # random ones, whatever the file is called
    json.dumps(spec)
    assert features.measure("frechet") == "frechet_inception2048"  # weights of another hash
    monkeypatch.setattr(inception, "PUBLISHED_SHA256", features.weights["sha256"][:8])
    known = InceptionFeatures(weights)
    assert (known.measure("frechet"), known.measure("kernel")) == ("fid", "kid")
    assert InceptionFeatures(weights, layer="64").measure("frechet") == "frechet_inception64"


def test_features_do_not_depend_on_the_batch_or_on_training_mode(features: InceptionFeatures) -> None:
    images = batch(picture(), picture(seed=1), picture(seed=2))
    with torch.no_grad():
        together = features.train()(images)
        alone = torch.cat([features(image[None]) for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert not any(module.training for module in features.modules())
    assert not any(parameter.requires_grad for parameter in features.parameters())


class Bomb:
    fired = False

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return setattr, (Bomb, "fired", True)


def test_weights_that_are_missing_pickled_or_others_fail_at_once(tmp_path: Path, weights: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.pth, which is missing"):
        InceptionFeatures(tmp_path / "none.pth")
    with pytest.raises(ValueError, match="layer: expected one of 64, 192, 768, 2048, logits_unbiased, got 100"):
        InceptionFeatures(weights, layer="100")
    torch.save({"a": Bomb()}, tmp_path / "bomb.pth")
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "script.pt")
    torch.save({"state_dict": {"fc.weight": torch.zeros(2)}}, tmp_path / "other.pth")
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "text.safetensors").write_text("hello")
    for name in ("bomb.pth", "script.pt", "text.pth", "text.safetensors"):
        with pytest.raises(ValueError, match=r"expected \.safetensors or a state dict of torch\.save") as caught:
            read_state(tmp_path / name)
        assert "\n" not in str(caught.value)
    assert not Bomb.fired
    with pytest.raises(ValueError, match="expected names to tensors"):
        read_state(tmp_path / "tensor.pth")
    with pytest.raises(ValueError, match=r"it lacks .* and \d+ others, has another shape of fc.weight"):
        InceptionFeatures(tmp_path / "other.pth")
    with pytest.raises(ValueError, match="it also has more"):
        load_strictly(nn.Linear(2, 2), {**nn.Linear(2, 2).state_dict(), "more": torch.zeros(1)}, tmp_path)


# ---- DINOv2


def cubic(x: float) -> float:
    a, x = -0.75, abs(x)  # torch's constant
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def test_positions_are_shrunk_as_dinov2_does_and_not_as_timm_does() -> None:
    grid, side = 37, 16
    positions = torch.randn(1, 1 + grid * grid, 2, generator=torch.Generator().manual_seed(0))
    found = shrunk_positions(positions, side)
    rows = np.zeros((side, grid))
    for i in range(side):
        centre = (i + 0.5) * grid / (side + 0.1) - 0.5
        for j in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            rows[i, min(max(j, 0), grid - 1)] += cubic(centre - j)
    slow = np.einsum("ia,jb,abd->ijd", rows, rows, positions[0, 1:].reshape(grid, grid, 2).numpy())
    np.testing.assert_allclose(found[0, 1:].reshape(side, side, 2).numpy(), slow, atol=1e-4)
    assert (found[:, 0] == positions[:, 0]).all()
    theirs = timm.layers.resample_abs_pos_embed(positions, (side, side))
    assert (theirs - found).abs().mean() > 0.1
    assert shrunk_positions(found, side) is found


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> tuple[DinoFeatures, Any]:
    """A small one from a file with DINOv2's own names, and timm's network with the same weights."""
    torch.manual_seed(0)
    network = timm.create_model("vit_small_patch14_dinov2", num_classes=0)
    state = {}
    for name, value in network.state_dict().items():  # DINOv2's own file
        state[name] = torch.randn(value.shape) * 0.02 if name == "pos_embed" else value
    state["mask_token"] = torch.zeros(1, 384)
    network.load_state_dict({k: v for k, v in state.items() if k != "mask_token"})
    path = tmp_path_factory.mktemp("dino") / "dinov2_vits14_pretrain.pth"
    torch.save(state, path)
    return DinoFeatures(path, "vit_small_patch14_dinov2"), network.eval()


def test_dino_is_the_class_token_at_224(dino: tuple[DinoFeatures, Any]) -> None:
    features, network = dino
    images = batch(picture(300, 260))
    x = F.interpolate(images.float(), size=(224, 224), mode="bicubic", antialias=True)
    mean, std = torch.tensor([0.485, 0.456, 0.406]) * 255, torch.tensor([0.229, 0.224, 0.225]) * 255
    x = (x - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    with torch.no_grad():
        found = features(images)
        tokens = network.patch_embed.proj(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([network.cls_token, tokens], 1) + shrunk_positions(network.pos_embed, 16)
        slow = network.norm(network.blocks(tokens))[:, 0]
    torch.testing.assert_close(found, slow, rtol=1e-4, atol=1e-5)
    assert (features.name, features.width) == ("dinov2_384", 384)
    assert features.measure("frechet") == "frechet_dinov2_384"  # FD-DINOv2 is that of the large one
    assert features.spec()["antialias"] is True


def test_dino_refuses_other_models_and_missing_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model: expected a name of timm ending in _dinov2"):
        DinoFeatures(tmp_path / "x.pth", "vit_small_patch16_224")
    with pytest.raises(ValueError, match=r"x\.pth, which is missing"):
        DinoFeatures(tmp_path / "x.pth", "vit_small_patch14_dinov2")


# ---- CLIP

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small models that differ in their activation, and a file of weights."""
    folder = tmp_path_factory.mktemp("clip")
    for name, quick in (("tiny", False), ("tiny-quickgelu", True)):
        (folder / f"{name}.json").write_text(json.dumps(TINY | {"quick_gelu": quick}))
        open_clip.add_model_config(folder / f"{name}.json")
    torch.manual_seed(0)
    network = open_clip.create_model("tiny-quickgelu", load_weights=False)
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    save_file({k: v.contiguous() for k, v in network.state_dict().items()}, folder / "clip.safetensors")
    return folder / "clip.safetensors"


def test_clip_embeds_as_open_clip_does(tiny: Path) -> None:
    features = ClipFeatures("tiny-quickgelu", tiny)
    network = open_clip.create_model("tiny-quickgelu", pretrained=str(tiny)).eval()
    _, preprocess = open_clip.create_model_and_transforms("tiny-quickgelu", pretrained=str(tiny))[1:]
    image, texts = picture(), ["a red circle", "two dogs " * 60]
    with torch.no_grad():
        torch.testing.assert_close(
            features(features.prepare(image)[None]), network.encode_image(preprocess(image)[None], normalize=True)
        )
        tokens = open_clip.get_tokenizer("tiny-quickgelu")(texts)
        torch.testing.assert_close(features.texts(texts), network.encode_text(tokens, normalize=True))
    assert features.spec()["activation"] == "QuickGELU"
    assert features.width == 16


def test_the_activation_is_that_of_the_name_and_changes_the_features(tiny: Path) -> None:
    quick, plain = ClipFeatures("tiny-quickgelu", tiny), ClipFeatures("tiny", tiny)
    pixels = quick.prepare(picture())[None]
    with torch.no_grad():
        assert not torch.allclose(quick(pixels), plain(pixels), atol=1e-4)
    assert plain.spec()["activation"] == "GELU"


@pytest.mark.parametrize("model", ["ViT-L-14", "ViT-L-14-336", "ViT-B-32"])
def test_openais_weights_are_refused_under_a_plain_name(model: str) -> None:
    with pytest.raises(
        ValueError, match=rf"openai were trained with QuickGELU: expected {model}-quickgelu, got {model}"
    ):
        ClipFeatures(model, "openai")


def test_others_weights_are_refused_with_quick_gelu_and_files_of_openai_without(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="trained with GELU: expected ViT-L-14, got ViT-L-14-quickgelu"):
        ClipFeatures("ViT-L-14-quickgelu", "laion2b_s32b_b82k")
    for name in ("vit_base.openai/model.safetensors", "openai-clip.safetensors"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(tiny.read_bytes())
        with pytest.raises(ValueError, match="OpenAI's weights, were trained with QuickGELU"):
            ClipFeatures("tiny", path)
        ClipFeatures("tiny-quickgelu", path)
    config = tmp_path / "hub" / "open_clip_config.json"
    config.parent.mkdir()
    (config.parent / "open_clip_model.safetensors").write_bytes(tiny.read_bytes())
    config.write_text(json.dumps({"model_cfg": TINY | {"quick_gelu": True}}))
    with pytest.raises(ValueError, match="expected tiny-quickgelu, got tiny"):
        ClipFeatures("tiny", config.with_name("open_clip_model.safetensors"))
    known = "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"  # ViT-L-14.pt of OpenAI
    monkeypatch.setattr(clip, "file_record", lambda path: {"file": path.name, "sha256": known})
    with pytest.raises(ValueError, match="expected tiny-quickgelu, got tiny"):
        ClipFeatures("tiny", tiny)


def test_unknown_clip_models_and_missing_files_fail_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model: expected a name of open_clip"):
        ClipFeatures("ViT-Z", "openai")
    with pytest.raises(ValueError, match=r"weights: expected a file or one of openai.*, got .*none\.safetensors"):
        ClipFeatures("ViT-L-14-quickgelu", tmp_path / "none.safetensors")


def test_framings_crop_before_and_after_the_resize() -> None:
    image = picture(61, 47)
    square = image.crop((7, 0, 54, 47)).resize((32, 32), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(SquareFirst(32)(image).permute(1, 2, 0).numpy(), np.asarray(square))
    shorter = image.resize((41, 32), Image.Resampling.BICUBIC)
    found = ShortestFirst(32)(image).permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(found, np.asarray(shorter)[:, 4:36])
    assert (found != np.asarray(square)).any()
