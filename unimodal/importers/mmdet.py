"""The Mask2Former of mmdetection, Swin backbone, COCO instances, as weights of transformers' Mask2Former.

Letters: C channels, K kernel positions (4), O outputs.

GenEval's detector is `mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco`. mmdetection 2.x and 3.x computed the same network
under different names; both are read. What is more than a new name: the patch merging of mmdetection unfolds (channel,
row, column) where transformers concatenates (column, row, channel); q, k and v are one matrix in mmdetection.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

from unimodal.files import file_sha256

State = Mapping[str, Tensor]
WEIGHTS, CONFIG = "model.safetensors", "config.json"
KNOWN = {
    "743b7d99": "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco_20220504_001756-743b7d99.pth",
    "c9d0c4f2": "mask2former_swin-s-p4-w7-224_8xb2-lsj-50e_coco_20220504_001756-c9d0c4f2.pth",
}
"""First eight hexadecimal digits of the SHA-256 of the published files, which their names end in (2.x and 3.x)."""
COCO_CLASSES = 80

_LEVELS, _POINTS, _CORNERS = 3, 4, 4
_SWIN = "model.pixel_level_module.encoder.swin"
_NORMS = "model.pixel_level_module.encoder.hidden_states_norms"
_PIXEL = "model.pixel_level_module.decoder"
_MODULE = "model.transformer_module"
# Order of the four pixels of a merged patch in transformers, as places in mmdetection's (row * 2 + column).
_MERGED = [0, 2, 1, 3]


@dataclass(frozen=True)
class Converted:
    """A network for transformers.

    Attributes:
        config: its sizes.
        state: every parameter and buffer it saves.
    """

    config: Mask2FormerConfig
    state: dict[str, Tensor]


def convert_checkpoint(checkpoint: str | Path, out: str | Path) -> Path:
    """Write a folder with config.json and model.safetensors that `Mask2FormerDetector` reads.

    The safetensors' metadata keep the checkpoint's name and SHA-256, so that results can say which detector scored them.

    Args:
        checkpoint: mmdetection's .pth file, 2.x or 3.x.
        out: folder to write, empty or new.

    Returns:
        The folder.

    Raises:
        ValueError: no such file, something else than this network, or a folder that holds a detector already.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    if (out / WEIGHTS).exists() or (out.exists() and not out.is_dir()):
        raise ValueError(f"--out: expected a new folder, got {out}, which holds a file already")
    state, _ = read_checkpoint(checkpoint)
    converted = convert(state)
    digest = file_sha256(checkpoint)
    out.mkdir(parents=True, exist_ok=True)
    converted.config.save_pretrained(out)
    metadata = {"format": "pt", "source": checkpoint.name, "source_sha256": digest, "converted_by": "unimodal mmdet 1"}
    save_file(converted.state, out / WEIGHTS, metadata)
    return out


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and plain metadata of an mmdetection checkpoint; nothing but tensors, numbers and texts is unpickled.

    Raises:
        ValueError: the file is missing, holds other objects, or has no `state_dict`.
    """
    if not path.is_file():
        raise ValueError(f"CHECKPOINT: expected a .pth file of mmdetection, got {path}, which does not exist")
    # Training logs put numpy's numbers into the metadata; these make them and can do nothing else.
    number: Any = np.float64(0).__reduce__()[0]
    allowed: list[Any] = [(number, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    allowed += [np.dtype, np.dtypes.Float64DType]
    try:
        with torch.serialization.safe_globals(allowed):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"CHECKPOINT: expected tensors and plain metadata in {path.name}, got {line}") from error
    state = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"CHECKPOINT: expected a state_dict of tensors in {path.name}, got none")
    meta = content.get("meta")
    return dict(state), meta if isinstance(meta, dict) else {}


def convert(state: State) -> Converted:
    """Tensors under transformers' names, each source tensor used exactly once.

    Raises:
        ValueError: a tensor is missing, left over, or of a shape that does not fit; a panoptic or another network.
    """
    source = {_two(name): tensor for name, tensor in state.items()}
    config = read_config(source)
    taken: set[str] = set()
    target: dict[str, Tensor] = {}
    for rule in _rules(config):
        if rule.source not in source:
            raise ValueError(f"CHECKPOINT: expected the tensor {rule.source}, got a file without it")
        taken.add(rule.source)
        target.update(rule.make(source[rule.source].float()))
    for name in _checked_indices(source, config):
        taken.add(name)
    left = sorted(set(source) - taken)
    if left:
        raise ValueError(f"CHECKPOINT: expected no tensor but those of Mask2Former with Swin, got {left[0]}")
    last = target[f"{_NORMS}.stage{len(config.backbone_config.depths)}.weight"]
    # transformers builds these two and this network never uses them.
    target[f"{_SWIN}.layernorm.weight"], target[f"{_SWIN}.layernorm.bias"] = (
        torch.ones_like(last),
        torch.zeros_like(last),
    )
    empty = torch.ones(config.num_labels + 1)
    empty[-1] = config.no_object_weight
    target["criterion.empty_weight"] = empty
    _check_fit(config, target)
    return Converted(config, {name: tensor.clone() for name, tensor in target.items()})


def _check_fit(config: Mask2FormerConfig, state: State) -> None:
    """ValueError where the network has another tensor, or one of another shape."""
    with torch.device("meta"):
        network = Mask2FormerForUniversalSegmentation(config)
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    for name in [*expected, *state]:
        found = tuple(state[name].shape) if name in state else None
        if expected.get(name) != found:
            raise ValueError(f"CHECKPOINT: {name}: expected shape {expected.get(name)}, got {found}")


def _two(name: str) -> str:
    """The name that mmdetection 2.x gave a tensor, from either version's."""
    pixels, queries = {"self_attn": "attentions.0"}, {"cross_attn": "attentions.0", "self_attn": "attentions.1"}
    attention = pixels if ".encoder." in name else queries
    if name.startswith("panoptic_head.") and ".layers." in name:
        for new, old in attention.items():
            name = re.sub(rf"(layers\.\d+)\.{new}\.", rf"\1.{old}.", name)
        name = re.sub(r"(layers\.\d+)\.ffn\.", r"\1.ffns.0.", name)
    return name


def read_config(state: State) -> Mask2FormerConfig:
    """Sizes of the network from the shapes of its tensors (2.x names).

    Raises:
        ValueError: they are not those of Mask2Former with a Swin backbone and COCO's 80 classes.
    """

    def shape(name: str) -> tuple[int, ...]:
        if name not in state:
            raise ValueError(f"CHECKPOINT: expected Mask2Former with a Swin backbone, got a file without {name}")
        return tuple(state[name].shape)

    table = "backbone.stages.{}.blocks.0.attn.w_msa.relative_position_bias_table"
    classes = shape("panoptic_head.cls_embed.weight")[0] - 1
    if classes != COCO_CLASSES:
        raise ValueError(f"CHECKPOINT: expected COCO's {COCO_CLASSES} classes (instances), got {classes} classes")
    places = shape(table.format(0))[0]
    window = (round(places**0.5) + 1) // 2
    embed = shape("backbone.patch_embed.projection.weight")
    depths = [_count(state, rf"backbone\.stages\.{i}\.blocks\.(\d+)\.") for i in range(4)]
    width = shape("panoptic_head.query_feat.weight")[1]
    first = "panoptic_head.pixel_decoder.encoder.layers.0"
    offsets = shape(f"{first}.attentions.0.sampling_offsets.weight")[0]
    hidden = shape("backbone.stages.0.blocks.0.ffn.layers.0.0.weight")[0]
    backbone = SwinConfig(
        embed_dim=embed[0],
        patch_size=embed[2],
        depths=depths,
        num_heads=[shape(table.format(i))[1] for i in range(4)],
        window_size=window,
        mlp_ratio=hidden / embed[0],
        drop_path_rate=0.0,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    return Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=width,
        mask_feature_size=shape("panoptic_head.pixel_decoder.mask_feature.weight")[0],
        hidden_dim=width,
        encoder_feedforward_dim=shape(f"{first}.ffns.0.layers.0.0.weight")[0],
        dim_feedforward=shape("panoptic_head.transformer_decoder.layers.0.ffns.0.layers.0.0.weight")[0],
        encoder_layers=_count(state, r"panoptic_head\.pixel_decoder\.encoder\.layers\.(\d+)\."),
        decoder_layers=_count(state, r"panoptic_head\.transformer_decoder\.layers\.(\d+)\.")
        + 1,  # queries count as one
        num_attention_heads=offsets // (_LEVELS * _POINTS * 2),
        num_queries=shape("panoptic_head.query_feat.weight")[0],
        num_labels=classes,
        dropout=0.0,
    )


def _count(state: State, pattern: str) -> int:
    found = {int(match[1]) for name in state if (match := re.match(pattern, name))}
    if found != set(range(len(found))) or not found:
        raise ValueError(f"CHECKPOINT: expected tensors {pattern} counted from 0, got {sorted(found)}")
    return len(found)


# --- the names


@dataclass(frozen=True)
class _Rule:
    """One source tensor and what is made of it."""

    source: str
    make: Callable[[Tensor], dict[str, Tensor]]


def _rename(source: str, target: str) -> _Rule:
    return _Rule(source, lambda tensor: {target: tensor})


def _both(source: str, target: str) -> Iterator[_Rule]:
    """Weight and bias."""
    for kind in ("weight", "bias"):
        yield _rename(f"{source}.{kind}", f"{target}.{kind}")


def _rules(config: Mask2FormerConfig) -> Iterator[_Rule]:
    yield from _swin_rules(config.backbone_config.depths)
    yield from _pixel_rules(config.encoder_layers)
    yield from _decoder_rules(config.decoder_layers - 1)


def _swin_rules(depths: list[int]) -> Iterator[_Rule]:
    yield from _both("backbone.patch_embed.projection", f"{_SWIN}.embeddings.patch_embeddings.projection")
    yield from _both("backbone.patch_embed.norm", f"{_SWIN}.embeddings.norm")
    for stage, depth in enumerate(depths):
        yield from _both(f"backbone.norm{stage}", f"{_NORMS}.stage{stage + 1}")
        for block in range(depth):
            yield from _swin_block(
                f"backbone.stages.{stage}.blocks.{block}", f"{_SWIN}.encoder.layers.{stage}.blocks.{block}"
            )
        if stage < len(depths) - 1:
            source, target = f"backbone.stages.{stage}.downsample", f"{_SWIN}.encoder.layers.{stage}.downsample"
            for name in ("reduction.weight", "norm.weight", "norm.bias"):
                yield _merged(f"{source}.{name}", f"{target}.{name}")


def _swin_block(source: str, target: str) -> Iterator[_Rule]:
    yield from _both(f"{source}.norm1", f"{target}.layernorm_before")
    yield from _both(f"{source}.norm2", f"{target}.layernorm_after")
    yield from _both(f"{source}.ffn.layers.0.0", f"{target}.mlp.fc1")
    yield from _both(f"{source}.ffn.layers.1", f"{target}.mlp.fc2")
    attention, to = f"{source}.attn.w_msa", f"{target}.attention"
    yield from _both(f"{attention}.proj", f"{to}.o_proj")
    table = "relative_position_bias_table"
    yield _rename(f"{attention}.{table}", f"{to}.relative_position_bias.{table}")
    for kind in ("weight", "bias"):
        yield _split(f"{attention}.qkv.{kind}", [f"{to}.{p}_proj.{kind}" for p in "qkv"])


def _pixel_rules(layers: int) -> Iterator[_Rule]:
    source = "panoptic_head.pixel_decoder"
    yield _rename(f"{source}.level_encoding.weight", f"{_PIXEL}.level_embed")
    yield from _both(f"{source}.mask_feature", f"{_PIXEL}.mask_projection")
    for level in range(_LEVELS):  # both count from the coarsest
        yield from _both(f"{source}.input_convs.{level}.conv", f"{_PIXEL}.input_projections.{level}.0")
        yield from _both(f"{source}.input_convs.{level}.gn", f"{_PIXEL}.input_projections.{level}.1")
    for old, new in (("lateral_convs.0", "adapter_1"), ("output_convs.0", "layer_1")):  # the finest level
        yield _rename(f"{source}.{old}.conv.weight", f"{_PIXEL}.{new}.0.weight")
        yield from _both(f"{source}.{old}.gn", f"{_PIXEL}.{new}.1")
    for layer in range(layers):
        old, new = f"{source}.encoder.layers.{layer}", f"{_PIXEL}.encoder.layers.{layer}"
        for name in ("sampling_offsets", "attention_weights", "value_proj", "output_proj"):
            yield from _both(f"{old}.attentions.0.{name}", f"{new}.self_attn.{name}")
        yield from _both(f"{old}.ffns.0.layers.0.0", f"{new}.fc1")
        yield from _both(f"{old}.ffns.0.layers.1", f"{new}.fc2")
        yield from _both(f"{old}.norms.0", f"{new}.self_attn_layer_norm")
        yield from _both(f"{old}.norms.1", f"{new}.final_layer_norm")


def _decoder_rules(layers: int) -> Iterator[_Rule]:
    head = "panoptic_head"
    yield _rename(f"{head}.query_embed.weight", f"{_MODULE}.queries_embedder.weight")
    yield _rename(f"{head}.query_feat.weight", f"{_MODULE}.queries_features.weight")
    yield _rename(f"{head}.level_embed.weight", f"{_MODULE}.level_embed.weight")
    yield from _both(f"{head}.cls_embed", "class_predictor")
    yield from _both(f"{head}.transformer_decoder.post_norm", f"{_MODULE}.decoder.layernorm")
    for number, place in enumerate((0, 2, 4)):  # ReLUs stand between
        to = f"{_MODULE}.decoder.mask_predictor.mask_embedder.{number}.0"
        yield from _both(f"{head}.mask_embed.{place}", to)
    for layer in range(layers):
        old, new = f"{head}.transformer_decoder.layers.{layer}", f"{_MODULE}.decoder.layers.{layer}"
        # The first attention looks at the image and is one module in both, the second at the queries and is split.
        for kind in ("weight", "bias"):
            yield _rename(f"{old}.attentions.0.attn.in_proj_{kind}", f"{new}.cross_attn.in_proj_{kind}")
            yield _split(f"{old}.attentions.1.attn.in_proj_{kind}", [f"{new}.self_attn.{p}_proj.{kind}" for p in "qkv"])
        yield from _both(f"{old}.attentions.0.attn.out_proj", f"{new}.cross_attn.out_proj")
        yield from _both(f"{old}.attentions.1.attn.out_proj", f"{new}.self_attn.out_proj")
        yield from _both(f"{old}.ffns.0.layers.0.0", f"{new}.fc1")
        yield from _both(f"{old}.ffns.0.layers.1", f"{new}.fc2")
        for number, norm in enumerate(("cross_attn_layer_norm", "self_attn_layer_norm", "final_layer_norm")):
            yield from _both(f"{old}.norms.{number}", f"{new}.{norm}")


def _split(source: str, targets: list[str]) -> _Rule:
    """Equal parts of the rows."""
    return _Rule(source, lambda tensor: dict(zip(targets, tensor.chunk(len(targets)), strict=True)))


def _merged(source: str, target: str) -> _Rule:
    return _Rule(source, lambda tensor: {target: _merge_order(tensor)})


def _merge_order(tensor: Tensor) -> Tensor:
    """Patch merging's last axis from (C, K) with K = row * 2 + column to (K', C) with K' = column * 2 + row."""
    pairs = tensor.unflatten(-1, (-1, _CORNERS))  # (..., C, K)
    return pairs[..., _MERGED].transpose(-1, -2).flatten(-2)


def _checked_indices(state: State, config: Mask2FormerConfig) -> Iterator[str]:
    """Names of the buffers that say which bias belongs to which pair of pixels, once found to be those of transformers."""
    window = config.backbone_config.window_size
    places = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)  # (2, N)
    apart = places[:, :, None] - places[:, None, :] + window - 1  # (2, N, N): rows, columns
    expected = apart[0] * (2 * window - 1) + apart[1]
    for name, tensor in state.items():
        if name.endswith(".attn.w_msa.relative_position_index"):
            if not torch.equal(tensor.long(), expected):
                raise ValueError(f"CHECKPOINT: {name}: expected the index of a {window} x {window} window, got another")
            yield name
