"""Llama, Qwen2, Qwen2.5 and Qwen3 (dense, text) in Hugging Face's format: config.json with safetensors, both ways.

Letters: V rows of the vocabulary, C width, O output channels.

Tensors go one by one: a source tensor is read, copied into its rows of every expert's parameter, and let go, so a model and
its checkpoint are never in memory together. Everything is checked before anything is written.
"""

import json
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from unimodal.backbone import Backbone, BackboneConfig, RopeScaling
from unimodal.backbone.adapters import LoraLinear
from unimodal.backbone.positions import SCHEMES, Rotary
from unimodal.backbone.transformer import Routed, Vocabulary
from unimodal.shards import write
from unimodal.text import TextTokenizer

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
# What a folder decides; all else of a backbone is the recipe's.
KEYS = (
    "width", "depth", "heads", "kv_heads", "mlp_width", "vocabulary", "head_dim", "qkv_bias", "qk_norm", "tied_head",
    "rope_theta", "rope_scaling", "norm_eps",
)  # fmt: skip


# --- config.json


def read_config(folder: str | Path, **overrides: Any) -> BackboneConfig:
    """The backbone a folder's weights fit. `positions` must be among `overrides`, whatever a folder cannot say may be.

    Raises:
        ValueError: an architecture or a setting that `Backbone` does not compute.
    """
    record = _read_json(Path(folder) / "config.json")
    kind = record.get("model_type")
    if kind not in ARCHITECTURES:
        raise ValueError(f"config.json: model_type: expected {', '.join(ARCHITECTURES)}, got {kind}")
    _refuse(record)
    biased = kind == "qwen2" or bool(record.get("attention_bias"))
    if kind != "qwen2" and biased and any(name.endswith(".o_proj.bias") for name in _names(Path(folder))):
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


# --- which tensor is which rows of which parameter


@dataclass(frozen=True)
class Place:
    """Where a tensor of theirs is held: rows from `start` of parameter `name` of `module`, or of each of its experts."""

    module: str
    name: str
    start: int
    shape: tuple[int, ...]

    def of(self, module: nn.Module) -> tuple[nn.Module, str]:
        """Who owns the parameter, and under which name, in one expert's module."""
        path, _, name = self.name.rpartition(".")
        return module.get_submodule(path), name

    @property
    def rows(self) -> slice:
        """Of the parameter."""
        return slice(self.start, self.start + self.shape[0])


def layout(config: BackboneConfig) -> dict[str, Place]:
    """Every tensor of a checkpoint, in the order transformers would write them, and where it is held."""
    c, f, v, e = config.width, config.mlp_width, config.vocabulary, config.head_size
    q, kv = config.heads * e, config.kv_heads * e
    places = {"model.embed_tokens.weight": Place("embedding", "weight", 0, (v, c))}
    for i in range(config.depth):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        for section, start, rows in (("q", 0, q), ("k", q, kv), ("v", q + kv, kv)):
            name = f"{theirs}.self_attn.{section}"
            places[f"{name}_proj.weight"] = Place(f"{ours}.qkv", "weight", start, (rows, c))
            if config.qkv_bias:
                places[f"{name}_proj.bias"] = Place(f"{ours}.qkv", "bias", start, (rows,))
            if config.qk_norm and section != "v":
                places[f"{name}_norm.weight"] = Place(f"{ours}.qk_norm", section, 0, (e,))
        places |= {
            f"{theirs}.self_attn.o_proj.weight": Place(f"{ours}.o", "weight", 0, (c, q)),
            f"{theirs}.mlp.gate_proj.weight": Place(f"{ours}.mlp", "gate_up.weight", 0, (f, c)),
            f"{theirs}.mlp.up_proj.weight": Place(f"{ours}.mlp", "gate_up.weight", f, (f, c)),
            f"{theirs}.mlp.down_proj.weight": Place(f"{ours}.mlp", "down.weight", 0, (c, f)),
            f"{theirs}.input_layernorm.weight": Place(f"{ours}.attention_norm", "weight", 0, (c,)),
            f"{theirs}.post_attention_layernorm.weight": Place(f"{ours}.mlp_norm", "weight", 0, (c,)),
        }
    places["model.norm.weight"] = Place("norm", "weight", 0, (c,))
    if not config.tied_head:
        places["lm_head.weight"] = Place("head", "weight", 0, (v, c))
    return places


# --- reading


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of one tensor."""

    path: Path
    shape: tuple[int, ...]
    dtype: str


def load_text(backbone: Backbone, folder: str | Path) -> None:
    """Copy a text model into every expert, and into what experts share; a backbone on the meta device comes to the CPU.

    Adapters, modulation and added rows keep their initial values. Weights take the backbone's type.

    Raises:
        ValueError: the folder is no text model, is damaged, or does not fit; nothing was changed.
    """
    files, places = check_text(backbone.config, folder), layout(backbone.config)
    with torch.no_grad():
        for path in sorted({header.path for header in files.values()}):
            with safe_open(path, framework="pt") as shard:
                for name in (n for n in places if files[n].path == path):
                    _write(backbone, places[name], shard.get_tensor(name))
        _initialise_rest(backbone)


def check_text(config: BackboneConfig, folder: str | Path) -> dict[str, Header]:
    """Refuse a folder whose weights do not fit, naming up to 20 reasons; what its files say of every tensor."""
    folder = Path(folder)
    problems = config_mismatches(config, folder)
    files: dict[str, Header] = {}
    if not problems:
        files, problems = _headers(folder)
        problems += _tensor_mismatches(config, files)
    if problems:
        more = f", and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise ValueError(f"import: {folder} does not fit this model: {'; '.join(problems[:20])}{more}")
    return files


def _names(folder: Path) -> list[str]:
    """Tensors of a folder; none where it holds no weights."""
    return list(_headers(folder)[0]) if (folder / WEIGHTS).is_file() or (folder / INDEX).is_file() else []


def _headers(folder: Path) -> tuple[dict[str, Header], list[str]]:
    """Every tensor of a folder but rotary buffers, and what is wrong with its files."""
    listed = {} if (folder / WEIGHTS).is_file() else _weight_map(folder)
    headers: dict[str, Header] = {}
    problems = []
    for path in sorted({folder / file for file in listed.values()}) or [folder / WEIGHTS]:
        if not path.is_file():
            raise ValueError(f"import: {path} is missing")
        try:
            with safe_open(path, framework="pt") as shard:
                for name in shard.keys():  # noqa: SIM118 (no mapping)
                    if name in headers:
                        problems.append(f"{name} is in {headers[name].path.name} and in {path.name}")
                    part = shard.get_slice(name)
                    headers[name] = Header(path, tuple(part.get_shape()), part.get_dtype())
        except (SafetensorError, OSError) as error:
            raise ValueError(f"import: {path} is truncated or no safetensors file ({error})") from error
    problems += [f"{name} is not in {file}" for name, file in listed.items() if name not in headers]
    return {n: h for n, h in headers.items() if not n.endswith("rotary_emb.inv_freq")}, problems


def _weight_map(folder: Path) -> dict[str, str]:
    if not (folder / INDEX).is_file():
        pickled = " (pickled weights are not read)" if any(folder.glob("*.bin")) else ""
        raise ValueError(f"import: expected {WEIGHTS} or {INDEX} in {folder}, got neither{pickled}")
    found = _read_json(folder / INDEX).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise ValueError(f"import: {folder / INDEX}: weight_map: expected the file of each tensor, got none")
    for file in found.values():
        if not isinstance(file, str) or Path(file).name != file:
            raise ValueError(f"import: {folder / INDEX}: weight_map: expected files of the folder, got {file}")
    return found


def _tensor_mismatches(config: BackboneConfig, files: dict[str, Header]) -> list[str]:
    """Tensors that are missing, left over, of another shape or no floating point numbers."""
    places, head = layout(config), "lm_head.weight"
    problems = [f"{name} is missing" for name in places if name not in files]
    for name, header in files.items():
        if name in places and header.shape != places[name].shape:
            problems.append(f"{name} has shape {list(header.shape)}, expected {list(places[name].shape)}")
        elif name in places and header.dtype not in ("F64", "F32", "F16", "BF16"):
            problems.append(f"{name} has type {header.dtype}, expected floating point numbers")
        elif name not in places and not (config.tied_head and name == head):
            problems.append(f"{name} is unknown")
    embedding = "model.embed_tokens.weight"
    if config.tied_head and head in files and embedding in files and not _equal(files, embedding, head):
        problems.append(f"{head} differs from {embedding}, which backbone.tied_head makes one")
    return problems


def _equal(files: dict[str, Header], a: str, b: str, rows: int = 4096) -> bool:
    """Whether two tensors are equal, a stretch of rows at a time."""
    if files[a].shape != files[b].shape:
        return False
    with safe_open(files[a].path, framework="pt") as x, safe_open(files[b].path, framework="pt") as y:
        one, two = x.get_slice(a), y.get_slice(b)
        starts = range(0, files[a].shape[0], rows)
        return all(torch.equal(one[i : i + rows], two[i : i + rows]) for i in starts)


def _write(backbone: Backbone, place: Place, tensor: Float[Tensor, "O *C"]) -> None:
    """Into every expert's rows."""
    held = backbone.get_submodule(place.module)
    for module in held.experts.values() if isinstance(held, Routed) else [held]:
        write(_parameter(*place.of(module)), tensor, place.start)


def _parameter(owner: nn.Module, name: str) -> nn.Parameter:
    """A parameter, which gets memory when it is first asked for."""
    parameter = getattr(owner, name)
    if parameter.is_meta:
        memory = torch.empty_like(parameter, device="cpu")
        parameter = nn.Parameter(memory, requires_grad=parameter.requires_grad)
        setattr(owner, name, parameter)
    return parameter


def _initialise_rest(backbone: Backbone) -> None:
    """What a text model has not, and the meta device gave no values: as it begins in a new backbone."""
    rng = torch.Generator().manual_seed(backbone.seed)
    for path, owner in backbone.named_modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            if not parameter.is_meta:
                continue
            made = _parameter(owner, name)
            made.copy_(backbone.initial(path, owner, name, made, rng))


# --- writing


def save_text(
    backbone: Backbone,
    folder: str | Path,
    expert: str = "text",
    *,
    added: bool = False,
    shard_bytes: int = SHARD_BYTES,
    context_length: int | None = None,
    tokenizer: TextTokenizer | None = None,
) -> None:
    """Write one expert as a folder that transformers loads; it appears complete or not at all.

    Args:
        backbone: whose weights; an adapter of the expert is added to the weights it adapts.
        folder: new or empty.
        expert: whose.
        added: whether the rows of `added_tokens` follow those of the vocabulary, or are dropped.
        shard_bytes: most bytes of a file, unless one tensor is larger.
        context_length: what the config says was the longest document, where `rope_scaling` does not say it.
        tokenizer: written beside the weights.

    Raises:
        ValueError: no such expert, or no architecture of theirs computes what this backbone does.
    """
    folder = Path(folder)
    config = backbone.config
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"export: expected a new or empty folder, got {folder}")
    index = _expert_index(config, expert)
    record = _config_record(config, config.rows if added else config.vocabulary, context_length)
    record["dtype"] = str(backbone.embedding.weight.dtype).removeprefix("torch.")
    if tokenizer is not None and tokenizer.special.eos < record["vocab_size"]:
        record |= {"bos_token_id": tokenizer.special.bos, "eos_token_id": tokenizer.special.eos}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".export-") as temporary:
        new = Path(temporary) / "export"
        new.mkdir()
        _write_shards(backbone, index, added, shard_bytes, new)
        _write_json(new / "config.json", record)
        if tokenizer is not None:
            (new / "tokenizer.json").write_text(tokenizer.bpe.to_str(), encoding="utf-8")
            _write_json(new / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
        os.replace(new, folder)


def _expert_index(config: BackboneConfig, expert: str) -> int:
    """Which expert; a dense model is the one all its names mean."""
    experts = config.experts
    known = dict.fromkeys((*experts.names, experts.text, experts.understanding, experts.clean, experts.learned))
    if expert not in known:
        raise ValueError(f"expert: expected one of {', '.join(known)}, got {expert}")
    return experts.names.index(expert) if len(experts.names) > 1 else 0


def _config_record(config: BackboneConfig, vocabulary: int, context_length: int | None) -> dict[str, Any]:
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


def _write_shards(backbone: Backbone, expert: int, added: bool, shard_bytes: int, folder: Path) -> None:
    """One shard in memory at a time; an index where there are several."""
    places, size = layout(backbone.config), backbone.embedding.weight.element_size()
    tables = backbone.config.added_tokens * backbone.config.width if added else 0
    sizes = {
        n: size * (math.prod(p.shape) + (tables if p.module in ("embedding", "head") else 0)) for n, p in places.items()
    }
    shards = list(_shards(sizes, shard_bytes))
    files = [WEIGHTS] if len(shards) == 1 else [
        f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)
    ]  # fmt: skip
    for file, names in zip(files, shards, strict=True):
        save_file(
            {n: _read(backbone, places[n], expert, added) for n in names}, folder / file, metadata={"format": "pt"}
        )
    if len(shards) > 1:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        _write_json(folder / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map})


def _shards(sizes: dict[str, int], most: int) -> Iterator[Sequence[str]]:
    """Names in order, as many a shard as fit."""
    names: list[str] = []
    total = 0
    for name, size in sizes.items():
        if names and total + size > most:
            yield names
            names, total = [], 0
        names.append(name)
        total += size
    yield names


def _read(backbone: Backbone, place: Place, expert: int, added: bool) -> Float[Tensor, "O *C"]:
    """One tensor as they hold it: a copy on the CPU."""
    held = backbone.get_submodule(place.module)
    owner, name = place.of(held[expert] if isinstance(held, Routed) else held)
    if isinstance(owner, LoraLinear):
        assert isinstance(held, Routed)
        base, _ = place.of(held.experts["shared"])
        assert isinstance(base, nn.Linear)
        weight = _merged(base, owner) if name == "weight" else getattr(base, name)
    else:
        weight = getattr(owner, name)
    rows = weight.detach()[place.rows]
    if added and isinstance(owner, Vocabulary) and owner.added is not None:
        rows = torch.cat([rows, owner.added.detach()])
    return rows.cpu().clone()


def _merged(base: nn.Linear, adapter: LoraLinear) -> Float[Tensor, "O C"]:
    """W + (alpha / r) B A, a section at a time."""
    pairs = zip(adapter.lora_B.split(adapter.sections), adapter.lora_A.split(adapter.rank), strict=True)
    return base.weight + adapter.scale * torch.cat([b @ a for b, a in pairs])


# --- files


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"import: {path} is missing")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"import: {path} is no JSON ({error})") from error
    if not isinstance(record, dict):
        raise ValueError(f"import: {path} holds no object")
    return record


def _write_json(path: Path, record: dict[str, Any]) -> None:
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
