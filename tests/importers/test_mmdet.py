"""The converted Mask2Former computes what mmdetection's modules compute, and nothing else is taken for it."""

import hashlib
import importlib.util
import json
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import Mask2FormerForUniversalSegmentation

from unimodal.importers import mmdet

_spec = importlib.util.spec_from_file_location("mmdet_reference", Path(__file__).with_name("mmdet_reference.py"))
reference = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reference)
TINY = reference.TINY


@pytest.fixture(scope="module")
def state():
    return reference.checkpoint(TINY)


@pytest.fixture(scope="module")
def network(state):
    return load(mmdet.convert(state))


def load(converted):
    network = Mask2FormerForUniversalSegmentation(converted.config).eval()
    assert not any(network.load_state_dict(converted.state, strict=True))
    return network.double()


def images(height=64, width=96, seed=3):
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


# 64 x 96: windows of 3 need padding at every stage but one, and the last stage is smaller than a window; 68 x 100: odd
# maps are padded before they are merged.
@pytest.mark.parametrize(("height", "width"), [(64, 96), (68, 100)])
@torch.no_grad()
def test_swin_computes_the_same_maps(network, state, height, width):
    ours = network.model.pixel_level_module.encoder(images(height, width)).feature_maps
    theirs = reference.Reference(state, TINY).swin(images(height, width))
    assert [m.shape for m in ours] == [m.shape for m in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert b.std() > 0.1
        close(a, b)


@torch.no_grad()
def test_the_pixel_decoder_computes_the_same_features(network, state):
    maps = reference.Reference(state, TINY).swin(images())
    ours = network.model.pixel_level_module.decoder(maps)
    features, outs = reference.Reference(state, TINY).pixels(maps)
    assert features.std() > 0.1
    close(ours.mask_features, features)
    for a, b in zip(ours.multi_scale_features, outs, strict=True):
        close(a, b)


@torch.no_grad()
def test_the_whole_network_computes_the_same_logits(network, state):
    ours = network(pixel_values=images())
    classes, masks = reference.Reference(state, TINY).forward(images())
    assert ours.class_queries_logits.shape == (2, TINY.queries, 81)
    assert ours.masks_queries_logits.shape == (2, TINY.queries, 16, 24)
    assert min(classes.std(), masks.std()) > 0.1
    assert 0.05 < (masks > 0).double().mean() < 0.95  # masked attention hides some places and not all
    close(ours.class_queries_logits, classes)
    close(ours.masks_queries_logits, masks)


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [
        lambda s: {n: t[[*range(1, len(t)), 0]] if n.endswith("qkv.weight") else t for n, t in s.items()},
        lambda s: {n: t[:, [*range(1, t.shape[1]), 0]] if "reduction" in n else t for n, t in s.items()},
        lambda s: {
            n: t.flip(0) if n.endswith(("level_embed.weight", "level_encoding.weight")) else t for n, t in s.items()
        },
        lambda s: {n: t.roll(1, 0) if "bias_table" in n else t for n, t in s.items()},
    ],
)
def test_the_comparison_sees_every_kind_of_slip(network, state, change):
    classes, _ = reference.Reference(change(state), TINY).forward(images())
    assert not torch.allclose(network(pixel_values=images()).class_queries_logits, classes, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("version", [2, 3])
def test_the_published_network_has_exactly_these_tensors(version):
    state = reference.checkpoint(reference.Sizes(), version, device="meta")
    converted = mmdet.convert(state)  # refuses what is missing, left over or of another shape
    with torch.device("meta"):
        expected = Mask2FormerForUniversalSegmentation(converted.config).state_dict()
    assert {n: t.shape for n, t in converted.state.items()} == {n: t.shape for n, t in expected.items()}
    config, swin = converted.config, converted.config.backbone_config
    assert (swin.embed_dim, swin.depths, swin.num_heads, swin.window_size) == (96, [2, 2, 18, 2], [3, 6, 12, 24], 7)
    assert (swin.mlp_ratio, swin.patch_size, config.num_queries, config.num_labels) == (4, 4, 100, 80)
    assert (config.encoder_layers, config.decoder_layers, config.num_attention_heads) == (6, 10, 8)
    assert (config.encoder_feedforward_dim, config.dim_feedforward, config.hidden_dim) == (1024, 2048, 256)


def test_every_tensor_reaches_the_network_once(state):
    marked = {n: torch.full(t.shape, i) if t.is_floating_point() else t for i, (n, t) in enumerate(state.items())}
    converted = mmdet.convert(marked)
    unused = ("swin.layernorm.", "criterion.empty_weight")
    seen = {int(v) for n, t in converted.state.items() if not any(u in n for u in unused) for v in t.unique()}
    assert seen == {i for i, (n, t) in enumerate(state.items()) if t.is_floating_point()}
    values = sum(t.numel() for n, t in converted.state.items() if not any(u in n for u in unused))
    assert values == sum(t.numel() for t in state.values() if t.is_floating_point())


def test_both_versions_of_names_are_one_network(state):
    three = dict(zip(reference.names(TINY, 3), state.values(), strict=True))
    assert set(three) != set(state)
    two, other = mmdet.convert(state).state, mmdet.convert(three).state
    assert two.keys() == other.keys()
    assert all(torch.equal(two[name], other[name]) for name in two)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("panoptic_head.level_embed.weight"), "expected the tensor panoptic_head.level_embed.weight"),
        (lambda s: s.update({"panoptic_head.extra": torch.zeros(1)}), "got panoptic_head.extra"),
        (lambda s: s.update({"panoptic_head.cls_embed.weight": torch.zeros(134, 32)}), "80 classes .* got 133"),
        (lambda s: s.pop("backbone.patch_embed.projection.weight"), "got a file without backbone.patch_embed"),
        (lambda s: s.update({"backbone.norm0.weight": torch.zeros(9)}), r"stage1.weight: expected shape \(8,\), got \(9,\)"),
        (
            lambda s: s.update({"backbone.stages.0.blocks.0.attn.w_msa.relative_position_index": torch.zeros(9, 9).long()}),
            "expected the index of a 3 x 3 window",
        ),
    ],
)  # fmt: skip
def test_another_network_is_refused(state, change, message):
    changed = dict(state)
    change(changed)
    with pytest.raises(ValueError, match=message):
        mmdet.convert(changed)


# --- files


def save(path, state, meta):
    torch.save({"meta": meta, "state_dict": OrderedDict(state)}, path)
    return path


def test_a_checkpoint_becomes_a_folder_once(state, tmp_path):
    meta = {"CLASSES": ("person",), "mmdet_version": "2.24.1", "config": "x = 1", "best": np.float64(0.4)}
    source = save(tmp_path / "mask2former.pth", state, meta)
    out = mmdet.convert_checkpoint(source, tmp_path / "detector")
    with safe_open(out / mmdet.WEIGHTS, "pt") as file:
        metadata = file.metadata()
    assert metadata["source"] == "mask2former.pth"
    assert metadata["source_sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    assert json.loads((out / mmdet.CONFIG).read_text())["model_type"] == "mask2former"
    network, notes = Mask2FormerForUniversalSegmentation.from_pretrained(out, output_loading_info=True)
    assert not any(notes[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = mmdet.convert(state).state
    assert all(torch.equal(tensor, expected[name]) for name, tensor in network.state_dict().items())
    with pytest.raises(ValueError, match="expected a new folder"):
        mmdet.convert_checkpoint(source, out)


class Harmful:
    """What a pickle could run."""

    def __reduce__(self):
        return (print, ("ran",))


def test_nothing_but_tensors_and_plain_values_is_read(state, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"expected tensors and plain metadata in bad\.pth"):
        mmdet.read_checkpoint(save(tmp_path / "bad.pth", state, {"hook": Harmful()}))
    assert "ran" not in capsys.readouterr().out
    (tmp_path / "text.pth").write_text("no checkpoint")
    with pytest.raises(ValueError, match="CHECKPOINT: expected tensors"):
        mmdet.read_checkpoint(tmp_path / "text.pth")
    with pytest.raises(ValueError, match="does not exist"):
        mmdet.read_checkpoint(tmp_path / "missing.pth")
    torch.save({"model": state}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="expected a state_dict"):
        mmdet.read_checkpoint(tmp_path / "other.pth")
