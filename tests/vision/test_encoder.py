"""Understanding encoders: shapes of what timm gives, weights from a file, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from unimodal.vision import VisionEncoder
from unimodal_tokenizers.base import Grid

VIT = {"img_size": 8, "patch_size": 2, "embed_dim": 16, "depth": 2, "num_heads": 2}
NETWORKS: dict[str, tuple[dict[str, Any], tuple[int, int], Grid]] = {
    "vit_tiny_patch16_224": ({**VIT, "dynamic_img_size": True}, (4, 8), Grid(2, 4)),  # a class token
    "vit_small_patch14_reg4_dinov2": ({**VIT, "img_size": 8}, (8, 8), Grid(4, 4)),  # and registers
    "vit_base_patch16_siglip_224": ({**VIT, "img_size": (8, 4)}, (8, 4), Grid(4, 2)),  # neither
    "eva02_tiny_patch14_224": ({**VIT, "embed_dim": 24}, (8, 8), Grid(4, 4)),
    "convnext_tiny": ({"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8)}, (64, 96), Grid(2, 3)),  # channels first
    "resnet18": ({}, (64, 32), Grid(2, 1)),
    "swin_tiny_patch4_window7_224": ({"img_size": (64, 96), "depths": (1, 1, 1, 1)}, (64, 96), Grid(2, 3)),  # last
}


@pytest.mark.parametrize("name", NETWORKS)
def test_features_are_one_a_patch(name: str) -> None:
    settings, size, grid = NETWORKS[name]
    encoder = VisionEncoder(name, settings)
    assert encoder.grid(*size) == grid
    images = torch.rand(2, 3, *size) * 2 - 1
    tokens = encoder(images)
    assert tokens.grids == (grid, grid)
    assert tokens.values.shape == (2 * grid.length, encoder.layout.dim)
    alone = torch.cat([encoder(image[None]).values for image in images])
    torch.testing.assert_close(tokens.values, alone, atol=1e-5, rtol=1e-4)
    tokens.values.sum().backward()
    unread = [n for n, p in encoder.named_parameters() if p.requires_grad and p.grad is None]
    assert not unread


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "convnext_tiny"])
def test_a_feature_is_of_its_own_place(name: str) -> None:
    """Row-major, whatever order of axes the network has: what changes in one patch is told there most."""
    settings, size, grid = NETWORKS[name]
    encoder, image = VisionEncoder(name, settings), torch.zeros(1, 3, *size)
    other, stride = image.clone(), encoder.layout.stride
    other[:, :, -stride:, :stride] = 1.0  # the last row's first patch
    changed = (encoder(other).values - encoder(image).values).abs().sum(-1)
    assert int(changed.argmax()) == (grid.h - 1) * grid.w


def test_pixels_are_scaled_as_the_weights_were_trained() -> None:
    encoder = VisionEncoder("vit_small_patch14_reg4_dinov2", VIT)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(encoder.mean.flatten(), mean)
    images = torch.rand(2, 3, 8, 8)  # from 0 to 1
    expected = encoder.network.forward_features((images - mean.view(3, 1, 1)) / std.view(3, 1, 1))[:, 5:]
    torch.testing.assert_close(encoder(images * 2 - 1).values, expected.flatten(0, 1), atol=1e-5, rtol=1e-4)


def test_images_of_any_size_keep_their_order() -> None:
    encoder = VisionEncoder("vit_tiny_patch16_224", {**VIT, "dynamic_img_size": True})
    images = [torch.rand(3, h, w) for h, w in ((8, 8), (4, 8), (8, 8), (8, 4))]
    together = encoder.encode_each(images)
    assert together.grids == (Grid(4, 4), Grid(2, 4), Grid(4, 4), Grid(4, 2))
    alone = torch.cat([encoder(image[None]).values for image in images])
    torch.testing.assert_close(together.values, alone, atol=1e-5, rtol=1e-4)


def test_images_are_resized_where_a_size_is_asked_for() -> None:
    encoder = VisionEncoder("vit_tiny_patch16_224", VIT, size=(8, 8))
    assert encoder.grid(31, 17) == Grid(4, 4)
    assert encoder(torch.rand(1, 3, 31, 17)).grids == (Grid(4, 4),)
    image = torch.rand(1, 3, 8, 8)
    assert torch.equal(encoder(image).values, VisionEncoder.forward(encoder, image).values)
    big = image.repeat_interleave(2, -1).repeat_interleave(2, -2)
    small = torch.nn.functional.interpolate(big, (8, 8), mode="bicubic", antialias=True)
    torch.testing.assert_close(encoder(big).values, encoder(small).values)


def test_a_document_does_not_depend_on_its_neighbours_in_training() -> None:
    encoder = VisionEncoder("resnet18", {"drop_rate": 0.5, "drop_path_rate": 0.5}).train()
    images = torch.rand(2, 3, 32, 32)
    before = encoder.network.bn1.running_mean.clone()
    torch.testing.assert_close(encoder(images).values[:1], encoder(images[:1]).values)
    assert torch.equal(encoder.network.bn1.running_mean, before)
    assert encoder.training
    assert not encoder.network.training


@pytest.mark.parametrize(("kind", "matrices"), [("linear", 1), ("mlp", 2)])
def test_connectors(kind: Any, matrices: int) -> None:
    connector = VisionEncoder("vit_tiny_patch16_224", VIT, connector=kind).connect(32)
    assert connector(torch.rand(5, 16)).shape == (5, 32)
    assert sum(p.ndim == 2 for p in connector.parameters()) == matrices


# ---- weights


def test_weights_come_from_a_file(tmp_path: Path) -> None:
    """In timm's own format, with another number of positions, which are resized as timm does it."""
    given = timm.create_model("vit_tiny_patch16_224", num_classes=0, global_pool="", **{**VIT, "img_size": 16})
    save_file(given.state_dict(), tmp_path / "vit.safetensors")
    encoder = VisionEncoder("vit_tiny_patch16_224", VIT)
    mean = encoder.mean.clone()
    encoder.load(str(tmp_path / "vit.safetensors"))
    own, theirs = encoder.network.state_dict(), given.state_dict()
    different = {key for key in own if own[key].shape != theirs[key].shape or not torch.equal(own[key], theirs[key])}
    assert different == {"pos_embed"}
    assert torch.equal(encoder.mean, mean)
    assert all(p.requires_grad for p in encoder.network.parameters())


def test_nothing_is_downloaded_unless_the_hub_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked, create = [], timm.create_model

    def watched(name: str, pretrained: bool = False, **settings: Any) -> torch.nn.Module:
        asked.append((name, pretrained))
        return create(name, pretrained=False, **settings)

    monkeypatch.setattr(timm, "create_model", watched)
    encoder = VisionEncoder("vit_base_patch16_siglip_224", {**VIT, "depth": 1})
    assert asked == [("vit_base_patch16_siglip_224", False)]
    encoder.load("hub:webli")
    encoder.load("hub")
    assert asked[1:] == [("vit_base_patch16_siglip_224.webli", True), ("vit_base_patch16_siglip_224", True)]
    with pytest.raises(ValueError, match=r"weights: expected a file, got .*webli, which is missing"):
        encoder.load("webli")


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    other = VisionEncoder("vit_tiny_patch16_224", {**VIT, "embed_dim": 32})
    save_file(other.network.state_dict(), tmp_path / "wide.safetensors")
    encoder = VisionEncoder("vit_tiny_patch16_224", VIT)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    with pytest.raises(ValueError, match=r"^weights: .*wide.safetensors does not fit vit_tiny_patch16_224: ") as error:
        encoder.load(str(tmp_path / "wide.safetensors"))
    assert "\n" not in str(error.value)
    (tmp_path / "text.safetensors").write_text("no weights")
    with pytest.raises(ValueError, match=r"weights: expected \.safetensors"):
        encoder.load(str(tmp_path / "text.safetensors"))
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


# ---- refusals


@pytest.mark.parametrize(
    ("name", "settings", "size", "message"),
    [
        ("vit_of_mine", {}, None, "vision.name: expected an architecture of timm .*, got vit_of_mine"),
        ("vit_tiny_patch16_224.augreg_in21k", {}, None, "vision.name: .* without a tag"),
        ("hf-hub:timm/resnet18", {}, None, "vision.name: .* got hf-hub:timm/resnet18"),
        ("vit_tiny_patch16_224", {"patches": 3}, None, "vision.settings: expected what vit_tiny_patch16_224 takes"),
        ("vit_tiny_patch16_224", {"pretrained": True}, None, "vision.settings: .* got pretrained"),
        ("vit_tiny_patch16_224", {"checkpoint_path": "x"}, None, "vision.settings: .* got checkpoint_path"),
        ("vit_tiny_patch16_224", VIT, (8, 7), "vision.size: .* got 8x7"),
        ("resnet18", {}, (40, 32), "image size: expected multiples of the stride 32, got 40x32"),
    ],
)
def test_what_cannot_be_is_refused(name: str, settings: dict[str, Any], size: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VisionEncoder(name, settings, size)


def test_a_size_the_network_does_not_take_is_refused_with_its_key() -> None:
    encoder = VisionEncoder("vit_tiny_patch16_224", VIT)
    with pytest.raises(
        ValueError, match=r"vision\.size: vit_tiny_patch16_224 reads images of 8x8 pixels alone .*, got 4x8"
    ):
        encoder(torch.zeros(1, 3, 4, 8))
