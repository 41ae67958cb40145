"""Llama, Qwen2, Qwen2.5 and Qwen3 (dense, text) in Hugging Face's format: config.json with safetensors, both ways.

Letters: V rows of the vocabulary, C width, O output channels.

Tensors go one by one: a source tensor is read, copied into its rows of every expert's parameter, and let go, so a model and
its checkpoint are never in memory together. Everything is checked before anything is written.
"""

import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from unimodal.backbone import Backbone, BackboneConfig
from unimodal.backbone.adapters import LoraLinear
from unimodal.backbone.transformer import Routed, Vocabulary
from unimodal.importers.huggingface_config import config_mismatches, config_record
from unimodal.importers.huggingface_files import INDEX, WEIGHTS, Header, headers_of, write_json
from unimodal.shards import write
from unimodal.text import TextTokenizer

SHARD_BYTES = 5 * 10**9


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
        files, problems = headers_of(folder)
        problems += _tensor_mismatches(config, files)
    if problems:
        more = f", and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise ValueError(f"import: {folder} does not fit this model: {'; '.join(problems[:20])}{more}")
    return files


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
    record = config_record(config, config.rows if added else config.vocabulary, context_length)
    record["dtype"] = str(backbone.embedding.weight.dtype).removeprefix("torch.")
    if tokenizer is not None and tokenizer.special.eos < record["vocab_size"]:
        record |= {"bos_token_id": tokenizer.special.bos, "eos_token_id": tokenizer.special.eos}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".export-") as temporary:
        new = Path(temporary) / "export"
        new.mkdir()
        _write_shards(backbone, index, added, shard_bytes, new)
        write_json(new / "config.json", record)
        if tokenizer is not None:
            (new / "tokenizer.json").write_text(tokenizer.bpe.to_str(), encoding="utf-8")
            write_json(new / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
        os.replace(new, folder)


def _expert_index(config: BackboneConfig, expert: str) -> int:
    """Which expert; a dense model is the one all its names mean."""
    experts = config.experts
    known = dict.fromkeys((*experts.names, experts.text, experts.understanding, experts.clean, experts.learned))
    if expert not in known:
        raise ValueError(f"expert: expected one of {', '.join(known)}, got {expert}")
    return experts.names.index(expert) if len(experts.names) > 1 else 0


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
        write_json(folder / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map})


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
