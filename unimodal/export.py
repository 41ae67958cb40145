"""Exports: a folder with config, safetensors and text tokenizer, loadable by a process that never saw the data.

export.json        format_version, kind, recipe, git commit, licence, which weights
config.json        class_path and init_args the object is built from
model.safetensors  weights (of a trained model: their moving average)
tokenizer.json     text tokenizer (models only)
"""

import json
import os
import re
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from pydoc import locate
from typing import Any, Literal

import torch
from jsonargparse import ArgumentError, ArgumentParser
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from unimodal.environment import can_compile, usable_device
from unimodal.model import UnifiedModel
from unimodal.shards import write
from unimodal.text import TextTokenizer
from unimodal_tokenizers.base import ImageTokenizer

FORMAT_VERSION = 1
PACKAGES = ("unimodal.", "unimodal_tokenizers.", "unimodal_generators.")
KINDS: dict[str, type[nn.Module]] = {"model": UnifiedModel, "tokenizer": ImageTokenizer}
_FOLDERS = {"model": "run", "tokenizer": "tokenizer"}  # options that such a folder is given by


@dataclass(frozen=True)
class ExportInfo:
    """Where an export comes from."""

    kind: str  # "model" or "tokenizer"
    weights: str  # "ema" or "raw"
    recipe: str
    commit: str
    licence: str = "Apache-2.0"
    format_version: int = FORMAT_VERSION


def save_export(folder: Path, module: nn.Module, config: dict[str, Any], info: ExportInfo) -> None:
    """Write an export; the folder appears complete or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".export-") as temporary:
        new = Path(temporary) / "export"
        new.mkdir()
        save_file(
            {name: t.detach().cpu().contiguous() for name, t in module.state_dict().items()}, new / "model.safetensors"
        )
        (new / "config.json").write_text(json.dumps(standalone(config, module), indent=2) + "\n")
        (new / "export.json").write_text(json.dumps(asdict(info), indent=2) + "\n")
        if isinstance(module, UnifiedModel):
            module.text.save(new / "tokenizer.json")
        if folder.exists():
            os.replace(folder, Path(temporary) / "old")
        os.replace(new, folder)


def standalone(config: dict[str, Any], module: nn.Module) -> dict[str, Any]:
    """The config with a tokenizer of published weights as its settings: its weights are in the export, their folder not."""
    if not isinstance(module, UnifiedModel):
        return getattr(module, "config", None) or config
    if module.tokenizer.config is None:
        return config
    return {**config, "init_args": {**config["init_args"], "tokenizer": module.tokenizer.config}}


def read_info(folder: Path) -> ExportInfo:
    """What an export says of itself."""
    record = _read_json(folder, "export.json")
    version = record.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise ValueError(f"export: {folder} has format_version {version}, this version reads up to {FORMAT_VERSION}")
    unknown = set(record) ^ set(ExportInfo.__dataclass_fields__)
    if unknown:
        raise ValueError(f"export: {folder}/export.json: unknown or missing {', '.join(sorted(unknown))}")
    return ExportInfo(**record)


def load_export(folder: Path, kind: str) -> nn.Module:
    """Build what an export holds and load its weights.

    Raises:
        ValueError: the folder, a file in it or a weight is missing, truncated, or not what the config builds.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"export: expected a folder, got {folder}, which does not exist")
    info = read_info(folder)
    if info.kind != kind:
        raise ValueError(f"export: expected a {kind}, got {folder}, which is a {info.kind}")
    module = build(_read_json(folder, "config.json"), kind)
    load_weights(module, read_weights(folder), str(folder))
    if isinstance(module, UnifiedModel):
        module.text = TextTokenizer.load(folder / "tokenizer.json")
    return module.eval()


def build(config: dict[str, Any], kind: str) -> nn.Module:
    """Instantiate from class_path and init_args of an export; only classes of this project are imported."""
    _check_class_paths(config)
    return instantiate(config, kind, "export: config.json")


def instantiate(config: dict[str, Any], kind: str, source: str) -> nn.Module:
    """Instantiate from class_path and init_args that the user wrote; `source` names where, for messages."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(KINDS[kind], kind, required=True)
    try:
        parsed = parser.parse_object({kind: config})
        module = getattr(parser.instantiate(parsed), kind)
    except (ArgumentError, ValueError) as error:  # of the config, or of the class that it names
        raise ValueError(f"{source} does not build a {kind}: {one_line(str(error))}") from error
    if module.config is None:  # published weights come with settings of their own
        module.config = config
    return module


class Weights(Mapping[str, Tensor]):
    """Tensors of a safetensors file, each read when it is asked for: a rank that wants its part holds one at a time."""

    def __init__(self, path: Path) -> None:
        self._file = safe_open(path, framework="pt")
        self._names = tuple(self._file.keys())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def read_weights(folder: Path, key: str = "export") -> Weights:
    """The safetensors of an export; `key` is the setting that named it, for messages."""
    path = folder / "model.safetensors"
    if not path.is_file():
        raise ValueError(f"{key}: {path} is missing")
    try:
        return Weights(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{key}: {path} is truncated or no safetensors file ({error})") from error


def load_tokenizer_weights(tokenizer: ImageTokenizer, folder: Path, key: str) -> None:
    """Weights of an export into a tokenizer of the same make; `key` is the setting that named the folder.

    Raises:
        ValueError: the folder, or a weight, is missing, damaged, or of another tokenizer. Names and shapes alone would not
            tell: LFQ's and BSQ's are the same.
    """
    weights = read_weights(folder, key)
    with torch.random.fork_rng(devices=[]):  # what is built here draws weights that nobody keeps
        given = build(_read_json(folder, "config.json"), "tokenizer")
    check_makes(tokenizer, given, key, folder)
    load_weights(tokenizer, weights, str(folder), key)


def check_makes(tokenizer: nn.Module, given: nn.Module, key: str, folder: Path) -> None:
    """ValueError where two tokenizers differ in what no weight shows; `key` named the folder of the second."""
    own, theirs = _makes(tokenizer), _makes(given)
    if own != theirs:
        name = next(name for name in {**own, **theirs} if own.get(name) != theirs.get(name))
        expected, got = (makes.get(name, "none") for makes in (own, theirs))
        raise ValueError(f"{key}: expected {name or 'a tokenizer'} to be {expected}, {folder} has {got}")


def _makes(tokenizer: nn.Module) -> dict[str, str]:
    """The classes of a tokenizer's parts, with those settings that no weight shows, by where they are."""
    makes = {name: f"{type(part).__name__}({part.extra_repr()})" for name, part in tokenizer.named_modules()}
    return {**makes, "layout": str(tokenizer.layout)}


def load_weights(
    module: nn.Module,
    weights: Mapping[str, Tensor],
    source: str,
    key: str = "weights",
    may_lack: Collection[str] = (),
) -> None:
    """Load every weight, or none and name every mismatch.

    Args:
        module: it takes them.
        weights: by name.
        source: where they come from, for messages.
        key: the setting that named them, likewise.
        may_lack: names that stay as they are where they are missing.
    """
    check_weights(module, weights, source, key, may_lack)
    own = module.state_dict()
    if any(isinstance(tensor, DTensor) for tensor in own.values()):
        for name in own.keys() & weights.keys():
            write(own[name], weights[name])
    else:
        module.load_state_dict({**own, **weights})


def check_weights(
    module: nn.Module,
    weights: Mapping[str, Tensor],
    source: str,
    key: str = "weights",
    may_lack: Collection[str] = (),
) -> None:
    """Refuse weights that do not fit, naming every mismatch."""
    own = module.state_dict()
    problems = [f"{name} is missing" for name in own if name not in weights and name not in may_lack]
    problems += [f"{name} is unknown" for name in weights if name not in own]
    problems += [
        f"{name} has shape {list(weights[name].shape)}, expected {list(own[name].shape)}"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    if problems:
        more = f", and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise ValueError(f"{key}: {source} does not fit this model: {'; '.join(problems[:20])}{more}")


def read_checkpoint(
    path: Path, device: Literal["cpu", "meta"] = "cpu", wanted: Callable[[tuple[str | int, ...]], bool] | None = None
) -> dict[str, Any]:
    """A training checkpoint, without running any code it might carry.

    Args:
        path: a file, or a folder that a sharded run has written.
        device: on `meta`, shapes without values.
        wanted: by the keys that lead to a tensor, which of a folder's are read; None reads all.
    """
    if not path.exists():
        raise ValueError(f"checkpoint: {path} does not exist")
    try:
        if path.is_dir():  # of a sharded run
            from unimodal.training.sharded_files import consolidated

            return consolidated(path, wanted or (lambda place: device != "meta"))
        return torch.load(path, map_location=device, mmap=device == "meta", weights_only=True)
    except Exception as error:  # torch raises many types for a damaged file
        raise ValueError(
            f"checkpoint: {path} is damaged, or holds more than weights ({type(error).__name__})"
        ) from error


def load_run(run: Path, weights: str = "ema") -> UnifiedModel:
    """The model of a run folder (or of an export folder itself), with averaged or last raw weights."""
    model = _load_run(run, weights, "model")
    assert isinstance(model, UnifiedModel)
    return model


def load_tokenizer(run: Path, weights: str = "ema") -> ImageTokenizer:
    """The image tokenizer of a run folder (or of an export folder itself), likewise."""
    tokenizer = _load_run(run, weights, "tokenizer")
    assert isinstance(tokenizer, ImageTokenizer)
    return tokenizer


def _load_run(run: Path, weights: str, kind: str) -> nn.Module:
    folder = run / "export" if (run / "export").is_dir() or not (run / "export.json").is_file() else run
    if weights not in ("ema", "raw"):
        raise ValueError(f"weights: expected ema or raw, got {weights}")
    if not run.is_dir():
        raise ValueError(f"{_FOLDERS[kind]}: expected a folder, got {run}, which does not exist")
    if not folder.is_dir():
        if kind == "tokenizer" and _is_published(run):
            raise ValueError(
                f"{_FOLDERS[kind]}: expected an export, got the published weights {run}; "
                f"`unimodal import tokenizer {run} --out EXPORT` makes one of them"
            )
        raise ValueError(f"{_FOLDERS[kind]}: {run} holds no export yet (it is written when training ends)")
    module = load_export(folder, kind)
    if weights == "raw":
        path = run / "checkpoints" / "last.ckpt"
        state = read_checkpoint(path).get("state_dict", {})
        raw = {name.removeprefix(f"{kind}."): t for name, t in state.items() if name.startswith(f"{kind}.")}
        load_weights(module, raw, str(path))
    return module


def _is_published(folder: Path) -> bool:
    """Whether a config.json says its class as diffusers and transformers do."""
    path = folder / "config.json"
    said = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    return any(f'"{key}"' in said for key in ("_class_name", "architectures", "model_type"))


def open_model(run: Path, weights: str = "ema", device: str = "auto", compiled: bool = False) -> UnifiedModel:
    """The model of a run on a device, as the commands use it."""
    place = usable_device(device)
    model = load_run(run, weights)
    model.to(place)
    if compiled:
        able, why = can_compile()
        if not able:
            raise ValueError(f"--compile: this machine cannot, it has {why}")
        model.backbone.compile_decoding()
    return model


def one_line(message: str) -> str:
    """The innermost reasons of a nested parser message, on one line."""
    lines = [line for line in message.splitlines() if line.strip()] or [message]
    skipped = ("- Expected a <class 'NoneType'>", "Given value")
    telling = [line for line in lines if not line.strip().startswith(skipped)] or lines
    depth = max(len(line) - len(line.lstrip()) for line in telling)
    deepest = [line.strip().removeprefix("- ") for line in telling if len(line) - len(line.lstrip()) == depth]
    given = [line.split("Given value: ", 1)[1] for line in lines if "Given value: " in line] if len(deepest) > 1 else []
    reason = "; or ".join(line.rstrip(".") for line in deepest) + "".join(
        f". Got value: {value}" for value in given[:1]
    )
    reason, _, got = reason.partition(". Got value: ")
    if got and not got.startswith(("Namespace(", "NestedArg(")):
        reason += f", got {got if len(got) <= 60 else got[:57] + '...'}"
    reason = re.sub(r"<class '([^']+)'>", r"\1", reason)
    keys = [line.split('"')[1] for line in lines if 'arser key "' in line]
    prefix = ".".join(keys[:-1] if keys and f'"{keys[-1]}"' in reason else keys)
    return f"{prefix}: {reason}" if prefix and prefix not in reason else reason


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    if not path.is_file():
        raise ValueError(f"export: {path} is missing")
    try:
        record = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"export: {path} is no JSON ({error})") from error
    if not isinstance(record, dict):
        raise ValueError(f"export: {path} holds no object")
    return record


def _check_class_paths(config: Any, key: str = "") -> None:
    """Refuse what would import or call anything but a class of this project. The parser reads strings as paths and YAML."""
    if isinstance(config, dict):
        for name, value in config.items():
            if name == "class_path":
                found = locate(value) if isinstance(value, str) and value.startswith(PACKAGES) else None
                if not (isinstance(found, type) and f"{found.__module__}.".startswith(PACKAGES)):
                    raise ValueError(f"export: class_path {value} is not of this project, it is not imported")
            else:
                _check_class_paths(value, f"{key}.{name}".removeprefix("."))
    elif isinstance(config, list):
        for value in config:
            _check_class_paths(value, key)
    elif isinstance(config, str) and not re.fullmatch(r"[\w\- ]*", config):
        raise ValueError(f"export: config.json: {key}: expected a word, got {config[:60]!r}")
