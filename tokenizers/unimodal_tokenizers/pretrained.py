"""Published weights: a folder with config.json and safetensors, or the name of one on the Hugging Face hub.

The config's class says which tokenizer they make. Nothing else is read, nothing is unpickled, no code of a folder is run,
and nothing is downloaded but the config and the weights that a name with `hub:` stands for.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from unimodal_tokenizers.base import ImageTokenizer
from unimodal_tokenizers.codes import ChameleonTokenizer, Emu3Tokenizer, JanusTokenizer, MagvitTokenizer
from unimodal_tokenizers.kl import KLTokenizer
from unimodal_tokenizers.latents import DCTokenizer, RAETokenizer, WanTokenizer

NAME = r"[\w-][\w.-]*"
HUB = re.compile(rf"hub:({NAME}/{NAME})((?:/{NAME})*)(?:@([\w./-]+))?")  # OWNER/NAME, its folder, a revision
WEIGHTS = ("diffusion_pytorch_model.safetensors", "model.safetensors", "pytorch_model.safetensors")
INSIDE = re.compile(r"(model\.)?vqmodel\.")  # where a whole model of transformers keeps its image tokenizer
LISTED = 5  # names of a mismatch that a message holds

Scale = float | Sequence[float] | None
Config = Mapping[str, Any]
Arguments = dict[str, Any]


def from_pretrained(source: str, scale: Scale = None, shift: Scale = None) -> ImageTokenizer:
    """A tokenizer with published weights.

    An export of a model that was trained with it holds its weights and settings, and needs the source no more.

    Args:
        source: a folder, or `hub:OWNER/NAME`, `hub:OWNER/NAME/FOLDER`, each with `@REVISION` if wanted.
        scale: of continuous latents, (z - shift) * scale; None: the config says it.
        shift: likewise.

    Raises:
        ValueError: no such folder; a class that is not known here; scale or shift given nowhere, given for codes, or no
            finite numbers; weights that are pickled, missing, damaged, or of another tokenizer.
    """
    place = _Place.of(source)
    record = _config(place)
    published, settings = _published(record, place)
    tokenizer_class, arguments = PUBLISHED[published]
    if issubclass(tokenizer_class, KLTokenizer | DCTokenizer | WanTokenizer | RAETokenizer):
        init_args = arguments(settings) | _scale_and_shift(published, settings, scale, shift, place)
    elif scale is not None or shift is not None:
        raise ValueError(f"scale, shift: expected none for the ids of {published}, got {scale} and {shift}")
    else:
        init_args = arguments(settings)
    init_args = json.loads(json.dumps(init_args))  # lists, as an export writes them
    try:
        tokenizer = tokenizer_class(**init_args)
    except (ValueError, TypeError) as error:
        key = str(error).partition(":")[0]
        given = {"scale": scale, "shift": shift}.get(key) is not None  # then the config is not to blame
        raise ValueError(str(error) if given else f"source: {place}/config.json: {error}") from error
    _load(tokenizer, _tensors(place, nested="vq_config" in record), place)
    tokenizer.config = {"class_path": f"unimodal_tokenizers.{tokenizer_class.__name__}", "init_args": init_args}
    return tokenizer


# --- what a config means


def _diffusers(settings: Config) -> Arguments:
    return {"options": {name: value for name, value in settings.items() if name not in ("latents_mean", "latents_std")}}


def _rae(settings: Config) -> Arguments:
    return {"options": dict(settings)}  # it shifts and scales by itself


def _kl(settings: Config) -> Arguments:
    """The arguments that `KLTokenizer` has of its own, and the rest; what a config leaves out is diffusers' default."""
    from diffusers import AutoencoderKL

    defaults = {n: p.default for n, p in signature(AutoencoderKL.__init__).parameters.items() if n != "self"}
    options = {**defaults, **settings}
    own = {
        "dim": "latent_channels", "channels": "block_out_channels", "blocks": "layers_per_block",
        "groups": "norm_num_groups", "attention": "mid_block_add_attention",
    }  # fmt: skip
    named = {ours: options.pop(theirs) for ours, theirs in own.items()}
    stated = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
    return {**named, "options": {name: value for name, value in options.items() if name not in stated}}


def _transformers(settings: Config) -> Arguments:
    """The settings of the class itself: those that any model of transformers has decide nothing here."""
    from transformers import ChameleonVQVAEConfig, Emu3VQVAEConfig, JanusVQVAEConfig

    known = {"emu3_vqgan": Emu3VQVAEConfig, "janus_vqgan": JanusVQVAEConfig, "chameleon_vqgan": ChameleonVQVAEConfig}
    fields = known[settings["model_type"]].__annotations__
    return {"options": {name: value for name, value in settings.items() if name in fields}}


PUBLISHED: dict[str, tuple[type[Any], Callable[[Config], Arguments]]] = {
    "AutoencoderKL": (KLTokenizer, _kl),
    "AutoencoderDC": (DCTokenizer, _diffusers),
    "AutoencoderKLWan": (WanTokenizer, _diffusers),
    "AutoencoderRAE": (RAETokenizer, _rae),
    "Emu3VQVAE": (Emu3Tokenizer, _transformers),
    "JanusVQVAE": (JanusTokenizer, _transformers),
    "ChameleonVQVAE": (ChameleonTokenizer, _transformers),
    "MAGVITv2": (MagvitTokenizer, dict),
}
MODEL_TYPES = {"emu3": "Emu3VQVAE", "janus": "JanusVQVAE", "chameleon": "ChameleonVQVAE"}


def _published(record: Config, place: "_Place") -> tuple[str, Config]:
    """The name of the published class, and the part of the config that is about it."""
    kind = str(record.get("model_type", "")).removesuffix("_vqgan")
    if kind in MODEL_TYPES:
        settings = {**record.get("vq_config", record), "model_type": f"{kind}_vqgan"}
        return MODEL_TYPES[kind], settings
    names = [str(record.get("_class_name", "")), *map(str, record.get("architectures") or ())]
    for name in names:
        for known in PUBLISHED:
            if name.lower() == known.lower():  # Show-o has spelt its class in two ways
                return known, {key: value for key, value in record.items() if not key.startswith("_")}
    said = ", ".join(filter(None, names)) or "none"
    raise ValueError(f"source: {place}/config.json: expected one of the classes {', '.join(PUBLISHED)}, got {said}")


def _scale_and_shift(published: str, settings: Config, scale: Scale, shift: Scale, place: "_Place") -> Arguments:
    """What was given, or else what the config says; nothing is taken from the defaults of a class."""
    _check_numbers("scale", scale, divides=True)
    _check_numbers("shift", shift)
    if published != "AutoencoderRAE":  # whose mean and deviation are the network's own
        for name in ("scaling_factor", "shift_factor", "latents_mean", "latents_std"):
            divides = name in ("scaling_factor", "latents_std")
            _check_numbers(f"source: {place}/config.json: {name}", settings.get(name), divides)
    mean, std = settings.get("latents_mean"), settings.get("latents_std")
    said: dict[str, Scale] = {"scale": settings.get("scaling_factor"), "shift": settings.get("shift_factor")}
    if published == "AutoencoderRAE":
        said = {"scale": 1.0, "shift": 0.0} if mean is not None and std is not None else {"scale": None, "shift": None}
    elif mean is not None and std is not None:
        factor = settings.get("scaling_factor") or 1.0
        said = {"scale": [factor / s for s in _flat(std)], "shift": _flat(mean)}
    elif published == "AutoencoderDC" or settings.get("shift_factor", 0.0) is None:
        said["shift"] = 0.0  # the class knows no shift, or the config says that there is none
    found = {"scale": said["scale"] if scale is None else scale, "shift": said["shift"] if shift is None else shift}
    found = {name: float(value) if isinstance(value, int) else value for name, value in found.items()}
    if missing := [name for name, value in found.items() if value is None]:
        hint = (
            "; a YAML with class_path unimodal_tokenizers.from_pretrained and init_args {source, scale, shift} says them to "
            "`unimodal import tokenizer`: latents are (z - shift) * scale, Stable Diffusion's have 0.18215 and 0.0"
        )
        raise ValueError(
            f"{', '.join(missing)}: expected numbers, got none, and the config of this {published} has none{hint}"
        )
    return found


def _check_numbers(key: str, value: Any, divides: bool = False) -> None:
    """ValueError for anything but None, or one finite number or several, none of them 0 if something is divided by them."""
    for number in () if value is None else _flat(value):
        wrong = isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number)
        if wrong or (divides and number == 0):
            raise ValueError(f"{key}: expected finite numbers{' other than 0' * divides}, got {number!r:.60}")


def _flat(value: Any) -> list[Any]:
    """The numbers of a list, or the one that there is."""
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]


# --- files


@dataclass(frozen=True)
class _Place:
    """A folder, here or on the hub."""

    folder: Path | None
    repository: str = ""
    subfolder: str = ""
    revision: str | None = None

    @staticmethod
    def of(source: str) -> "_Place":
        if source.startswith("hub:"):
            match = HUB.fullmatch(source)
            if match is None:
                raise ValueError(f"source: expected hub:OWNER/NAME, hub:OWNER/NAME/FOLDER or @REVISION, got {source}")
            return _Place(None, match[1], match[2].strip("/"), match[3])
        if not Path(source).is_dir():
            raise ValueError(f"source: expected a folder or hub:OWNER/NAME, got {source}, which is no folder")
        return _Place(Path(source))

    def __str__(self) -> str:
        return str(self.folder or "/".join(filter(None, (f"hub:{self.repository}", self.subfolder))))

    def file(self, name: str) -> Path | None:
        """A file of it, downloaded if it is on the hub; None where there is no such file."""
        if self.folder is not None:
            return self.folder / name if (self.folder / name).is_file() else None
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

        try:
            return Path(
                hf_hub_download(self.repository, name, subfolder=self.subfolder or None, revision=self.revision)
            )
        except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
            if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
                return None
            line = next(iter(str(error).splitlines()), type(error).__name__)
            raise ValueError(f"source: {self}: {name} cannot be downloaded: {line}") from error


def _config(place: _Place) -> Config:
    path = place.file("config.json")
    if path is None:
        raise ValueError(f"source: {place}/config.json is missing")
    return _object(path, f"{place}/config.json")


def _object(path: Path, name: str) -> Config:
    """What a JSON file holds; `name` is what messages call it, which may be on the hub."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"source: {name} is no JSON ({error})") from error
    if not isinstance(record, dict):
        raise ValueError(f"source: {name} holds no object")
    return record


def _tensors(place: _Place, nested: bool) -> dict[str, Tensor]:
    """All weights, or those of the image tokenizer inside a whole model, under the names they have there."""
    tensors: dict[str, Tensor] = {}
    for name in _files(place, nested):
        path = place.file(name)
        if path is None:
            raise ValueError(f"source: {place}/{name} is missing")
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 (no mapping)
                    if not nested or INSIDE.match(key):
                        tensors[INSIDE.sub("", key, count=1) if nested else key] = file.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"source: {place}/{name} is truncated or no safetensors file ({error})") from error
    return tensors


def _files(place: _Place, nested: bool) -> list[str]:
    """The safetensors that hold them: one, or those that an index lists."""
    for name in WEIGHTS:
        if place.file(name) is not None:
            return [name]
        index = place.file(f"{name}.index.json")
        if index is None:
            continue
        listed = _object(index, f"{place}/{name}.index.json").get("weight_map")
        if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()):
            raise ValueError(
                f"source: {place}/{name}.index.json: weight_map: expected the file of each weight, got {listed!r:.60}"
            )
        files = {file for key, file in listed.items() if not nested or INSIDE.match(key)}
        if any(Path(file).name != file or not file.endswith(".safetensors") for file in files):
            raise ValueError(f"source: {place}/{name}.index.json: expected safetensors of the folder, got {files}")
        return sorted(files)
    here = [] if place.folder is None else list(place.folder.iterdir())
    pickled = any(path.suffix in (".bin", ".ckpt", ".pt", ".pth") for path in here)
    why = "pickled weights, which are not read" if pickled else "none of them"
    raise ValueError(f"source: expected {' or '.join(WEIGHTS)} in {place}, got {why}")


# --- weights


def _load(tokenizer: Any, tensors: Mapping[str, Tensor], place: _Place) -> None:
    """Every weight, or none and the names of what does not fit."""
    network: nn.Module = tokenizer.network
    ignored = [re.compile(pattern) for pattern in getattr(network, "_keys_to_ignore_on_load_unexpected", None) or ()]
    if isinstance(tokenizer, MagvitTokenizer):
        ignored = [re.compile(r"quantize\.(embedding|power_vals)$")]  # tables of what the signs say
    own = network.state_dict()
    found = {_present_name(name): tensor for name, tensor in tensors.items()}
    decoder = {}
    if isinstance(tokenizer, ChameleonTokenizer):
        decoder = {name: found.pop(name) for name in list(found) if name.startswith("decoder.")}
    found = {name: t for name, t in found.items() if name in own or not any(p.search(name) for p in ignored)}
    _check(own, found, type(tokenizer).__name__, place)
    network.load_state_dict(found)
    if decoder:
        decoder = {name.removeprefix("decoder."): tensor for name, tensor in decoder.items()}
        _check(tokenizer.decoder.state_dict(), decoder, "the decoder", place)
        tokenizer.decoder.load_state_dict(decoder)


def _present_name(name: str) -> str:
    """Attention's weights as diffusers names them now; those of Stable Diffusion 1 and 2 have older names."""
    names = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    return re.sub(
        r"(attentions\.\d+\.)(query|key|value|proj_attn)(?=\.(weight|bias)$)", lambda m: m[1] + names[m[2]], name
    )


def _check(own: Mapping[str, Tensor], found: Mapping[str, Tensor], what: str, place: _Place) -> None:
    problems = [f"{name} is missing" for name in own if name not in found]
    problems += [f"{name} is unknown" for name in found if name not in own]
    problems += [
        f"{name} has shape {list(found[name].shape)}, expected {list(own[name].shape)}"
        for name in own
        if name in found and found[name].shape != own[name].shape
    ]
    if problems:
        more = f", and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
        raise ValueError(f"source: the weights of {place} do not fit {what}: {'; '.join(problems[:LISTED])}{more}")
