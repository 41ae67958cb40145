"""Files: written whole or not at all, told apart by their hash, kept inside their folder, and named on one line."""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from torch import Tensor


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file that is in its place, and on the disk, once all of it is written, and not before; missing folders are made.

    Raises:
        OSError: no room, no permission. What was in the place stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def remove(path: Path) -> None:
    """A file, or a folder with all that is in it; nothing where nothing is."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write a whole file or nothing: under a temporary name first, then renamed; missing folders are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(path: Path) -> None:
    """Names in a folder are on the disk once the folder is."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def warn(message: str) -> None:
    """One line to the terminal, at once: something went wrong, and the run goes on."""
    print(f"WARNING: {message}", file=sys.stderr, flush=True)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def contained_path(name: object, base: Path, where: str) -> Path:
    """The file `name` under the folder `base`, which it may not leave, not even through a link.

    Raises:
        ValueError: not a relative path, or it ends outside `base`; the message begins with `where`.
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"{where}: image: expected a relative path, got {name!r}")
    if Path(name).is_absolute():
        raise ValueError(f"{where}: image: expected a relative path, got {name!r}")
    try:
        resolved = (base / name).resolve()
        inside = resolved.is_relative_to(base.resolve())
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{where}: image: expected a path, got {name!r} ({error})") from None
    if not inside:
        raise ValueError(f"{where}: image: expected a file inside the folder {base}, got {name!r}")
    return resolved


def read_state(path: Path) -> dict[str, Tensor]:
    """A state dict from .safetensors, or from what torch.save wrote, read with `weights_only=True`.

    Raises:
        ValueError: no such file, damaged, TorchScript, or anything but tensors in it.
    """
    import torch  # here: most that read and write files have no weights
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    from torch import Tensor

    # Whatever the two readers stumble over in a file of another kind.
    damage = (
        SafetensorError, OSError, EOFError, RuntimeError, ValueError, LookupError, TypeError, AttributeError,
        struct.error, UnpicklingError,
    )  # fmt: skip
    if not path.is_file():
        raise ValueError(f"weights: expected a file, got {path}, {'a folder' if path.is_dir() else 'which is missing'}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except damage as error:
        line = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(
            f"weights: expected .safetensors or a state dict of torch.save, got {path}: {line[:200]}"
        ) from None
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"weights: expected names to tensors in {path}, got {type(state).__name__}")
    return state


def read_yaml(path: Path, key: str) -> Any:
    """What a YAML file holds; ValueError naming the setting `key` for a file that is missing or is none."""
    if not path.is_file():
        raise ValueError(f"{key}: {path} does not exist")
    import yaml  # here, so that commands that read none start without it

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{key}: {path} is no YAML ({error})") from None


def printable(path: Path) -> str:
    """The path on one line, whatever characters it holds."""
    text = str(path)
    return text if text.isprintable() else repr(text)


def one_line(error: BaseException) -> str:
    """What an error says, on one line that is not long."""
    return " ".join(f"{error or type(error).__name__}".split())[:200]
