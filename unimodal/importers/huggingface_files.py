"""Files of a Hugging Face folder: which tensors they say they hold, and their JSON."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of one tensor."""

    path: Path
    shape: tuple[int, ...]
    dtype: str


def tensor_names(folder: Path) -> list[str]:
    """Tensors of a folder; none where it holds no weights."""
    return list(headers_of(folder)[0]) if (folder / WEIGHTS).is_file() or (folder / INDEX).is_file() else []


def headers_of(folder: Path) -> tuple[dict[str, Header], list[str]]:
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
    found = read_json(folder / INDEX).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise ValueError(f"import: {folder / INDEX}: weight_map: expected the file of each tensor, got none")
    for file in found.values():
        if not isinstance(file, str) or Path(file).name != file:
            raise ValueError(f"import: {folder / INDEX}: weight_map: expected files of the folder, got {file}")
    return found


def read_json(path: Path) -> dict[str, Any]:
    """An object of a JSON file; ValueError where there is none."""
    if not path.is_file():
        raise ValueError(f"import: {path} is missing")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"import: {path} is no JSON ({error})") from error
    if not isinstance(record, dict):
        raise ValueError(f"import: {path} holds no object")
    return record


def write_json(path: Path, record: dict[str, Any]) -> None:
    """An object as a JSON file."""
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
