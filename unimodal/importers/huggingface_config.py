"""config.json of a Hugging Face folder as a backbone's settings, and back."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from unimodal.backbone import BackboneConfig, RopeScaling
from unimodal.backbone.positions import SCHEMES, Rotary
from unimodal.importers.huggingface_files import read_json, tensor_names

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
# What a folder decides; all else of a backbone is the recipe's.
KEYS = (
    "width", "depth", "heads", "kv_heads", "mlp_width", "vocabulary", "head_dim", "qkv_bias", "qk_norm", "tied_head",
    "rope_theta", "rope_scaling", "norm_eps",
)  # fmt: skip


def read_config(folder: str | Path, **overrides: Any) -> BackboneConfig:
    """The backbone a folder's weights fit. `positions` must be among `overrides`, whatever a folder cannot say may be.

    Raises:
        ValueError: an architecture or a setting that `Backbone` does not compute.
    """
    record = read_json(Path(folder) / "config.json")
    kind = record.get("model_type")
    if kind not in ARCHITECTURES:
        raise ValueError(f"config.json: model_type: expected {', '.join(ARCHITECTURES)}, got {kind}")
    _refuse(record)
    biased = kind == "qwen2" or bool(record.get("attention_bias"))
    if kind != "qwen2" and biased and any(name.endswith(".o_proj.bias") for name in tensor_names(Path(folder))):
        raise ValueError("config.json: attention_bias: expected biases of q, k and v only, got one of o as well")
    width, heads = _whole(record, "hidden_size"), _whole(record, "num_attention_heads")
    head_dim = record.get("head_dim") or (128 if kind == "qwen3" else None)  # 128: Qwen3's when it is not written
    theta, scaling = _rope(record)
    found = {
        "width": width, "heads": heads, "depth": _whole(record, "num_hidden_layers"),
        "kv_heads": heads if record.get("num_key_value_heads") is None else _whole(record, "num_key_value_heads"),
        "mlp_width": _whole(record, "intermediate_size"), "vocabulary": _whole(record, "vocab_size"),
        "head_dim": None if head_dim is not None and head_dim * heads == width else head_dim,
        "qkv_bias": biased, "qk_norm": kind == "qwen3", "tied_head": bool(record.get("tie_word_embeddings", False)),
        "rope_theta": theta, "rope_scaling": scaling, "norm_eps": float(record.get("rms_norm_eps", 1e-6)),
    }  # fmt: skip
    return BackboneConfig(**{**found, **overrides})


def _refuse(record: dict[str, Any]) -> None:
    """Settings under which these architectures compute something else."""
    if record.get("quantization_config") is not None:
        raise ValueError("config.json: quantization_config: expected none (plain weights are read), got one")
    if record.get("hidden_act", "silu") != "silu":
        raise ValueError(f"config.json: hidden_act: expected silu, got {record['hidden_act']}")
    if record.get("mlp_bias"):
        raise ValueError("config.json: mlp_bias: expected false, got true")
    if (partial := record.get("partial_rotary_factor")) not in (None, 1, 1.0):
        raise ValueError(f"config.json: partial_rotary_factor: expected 1, got {partial}")
    layers = record.get("layer_types")
    if layers is not None and set(layers) - {"full_attention"}:
        raise ValueError(
            f"config.json: layer_types: expected full_attention only, got {', '.join(sorted(set(layers)))}"
        )
    sliding = record.get("use_sliding_window") and record.get("sliding_window") is not None
    if layers is None and sliding and record.get("max_window_layers", 28) < _whole(record, "num_hidden_layers"):
        raise ValueError(
            f"config.json: sliding_window: expected one that is not in use, got {record['sliding_window']}"
        )


def _rope(record: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """Base and stretch: `rope_parameters` of transformers 5, `rope_theta` and `rope_scaling` of older ones."""
    given = record.get("rope_scaling") or record.get("rope_parameters") or {}
    if any(isinstance(value, dict) for value in given.values()):
        raise ValueError("config.json: rope_parameters: expected one set for all layers, got several")
    theta = float(given.get("rope_theta") or record.get("rope_theta") or 10_000.0)
    kind = given.get("rope_type", given.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind not in ("linear", "llama3", "yarn"):
        raise ValueError(f"config.json: rope_scaling: expected default, linear, llama3 or yarn, got {kind}")
    if given.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise ValueError(f"config.json: partial_rotary_factor: expected 1, got {given['partial_rotary_factor']}")
    if kind == "linear":
        return theta, RopeScaling("linear", _number(given, "factor"))
    longest = record.get("max_position_embeddings")
    length = record.get("original_max_position_embeddings") or given.get("original_max_position_embeddings", longest)
    if kind == "llama3":
        factors = {name: _number(given, name) for name in ("low_freq_factor", "high_freq_factor")}
        return theta, RopeScaling("llama3", _number(given, "factor"), length, **factors)
    return theta, _yarn(given, length, longest)


def _yarn(given: dict[str, Any], length: int | None, longest: int | None) -> RopeScaling:
    if given.get("truncate", True) is not True:
        raise ValueError(f"config.json: rope_scaling.truncate: expected true, got {given['truncate']}")
    if given.get("factor") is None and length and longest:
        given = {**given, "factor": longest / length}
    factor, attention = _number(given, "factor"), given.get("attention_factor")
    if attention is None and given.get("mscale") and given.get("mscale_all_dim"):
        scales = _number(given, "mscale"), _number(given, "mscale_all_dim")
        above, below = (0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0 for scale in scales)
        attention = above / below
    beta = {"beta_fast": given.get("beta_fast") or 32.0, "beta_slow": given.get("beta_slow") or 1.0}
    return RopeScaling("yarn", factor, length, **beta, attention_factor=attention)


def _number(record: dict[str, Any], key: str) -> float:
    value = record.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"config.json: {key}: expected a number, got {value}")
    return float(value)


def _whole(record: dict[str, Any], key: str) -> int:
    value = record.get(key)
    if type(value) is not int:
        raise ValueError(f"config.json: {key}: expected a whole number, got {value}")
    return value


def config_mismatches(backbone: BackboneConfig, folder: Path) -> list[str]:
    """What keeps a folder's weights from meaning the same in a backbone, by key."""
    theirs, ours = read_config(folder, positions=backbone.positions), backbone
    # Unset means width / heads.
    theirs, ours = replace(theirs, head_dim=theirs.head_size), replace(ours, head_dim=ours.head_size)
    problems = [
        f"backbone.{key}: expected {getattr(theirs, key)}, got {getattr(ours, key)}"
        for key in KEYS
        if key != "rope_scaling" and getattr(theirs, key) != getattr(ours, key)
    ]
    if theirs.rope_scaling != ours.rope_scaling and not problems:
        scheme = SCHEMES[ours.positions]  # scalings are equal that turn alike: their kinds leave some fields unread
        a, b = (Rotary(scheme, c.head_size, c.rope_theta, c.rope_scaling) for c in (theirs, ours))
        if a.scale != b.scale or (a.frequency != b.frequency).any():
            problems.append(f"backbone.rope_scaling: expected {theirs.rope_scaling}, got {ours.rope_scaling}")
    if ours.embedding_scale != 1.0:
        problems.append(f"backbone.embedding_scale: expected 1.0, got {ours.embedding_scale}")
    if ours.moe is not None:
        problems.append("backbone.moe: expected none (their MLPs are dense), got one")
    return problems


def config_record(config: BackboneConfig, vocabulary: int, context_length: int | None) -> dict[str, Any]:
    """config.json of the architecture that computes this."""
    if config.moe is not None or config.embedding_scale != 1.0:
        key, got = ("moe", "one") if config.moe is not None else ("embedding_scale", config.embedding_scale)
        raise ValueError(f"backbone.{key}: none of {', '.join(ARCHITECTURES)} has it, got {got}")
    if config.qk_norm and config.qkv_bias:
        raise ValueError("backbone.qkv_bias: expected false with qk_norm (as Qwen3 has it), got true")
    kind = "qwen3" if config.qk_norm else "qwen2" if config.qkv_bias else "llama"
    if kind == "llama" and config.width % config.heads:
        raise ValueError(f"backbone.heads: Llama's divide width {config.width}, got {config.heads}")
    scaling, length = _scaling_record(config.rope_scaling), context_length or 2048
    if config.rope_scaling is not None and config.rope_scaling.original_length is not None:
        length = round(config.rope_scaling.factor * config.rope_scaling.original_length)
    record = {
        "architectures": [ARCHITECTURES[kind]], "model_type": kind, "vocab_size": vocabulary,
        "hidden_size": config.width, "num_hidden_layers": config.depth, "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads, "head_dim": config.head_size, "intermediate_size": config.mlp_width,
        "hidden_act": "silu", "rms_norm_eps": config.norm_eps, "tie_word_embeddings": config.tied_head,
        "max_position_embeddings": length, "bos_token_id": None, "eos_token_id": None,
        # transformers 5 reads the first, older ones the other two
        "rope_parameters": {"rope_theta": config.rope_theta, **(scaling or {"rope_type": "default"})},
        "rope_theta": config.rope_theta, "rope_scaling": scaling,
    }  # fmt: skip
    own = {"llama": {"attention_bias": False, "mlp_bias": False}, "qwen2": {}, "qwen3": {"attention_bias": False}}[kind]
    return {**record, **own, **({} if kind == "llama" else {"use_sliding_window": False})}


def _scaling_record(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    named = {
        "linear": (), "llama3": ("low_freq_factor", "high_freq_factor"),
        "yarn": ("beta_fast", "beta_slow", "attention_factor"),
    }[scaling.kind]  # fmt: skip
    read = {name: getattr(scaling, name) for name in named if getattr(scaling, name) is not None}
    if scaling.kind != "linear":
        read["original_max_position_embeddings"] = scaling.original_length
    return {"rope_type": scaling.kind, "factor": scaling.factor, **read}
