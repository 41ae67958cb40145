"""Files: written whole or not at all, told apart by their hash, and kept inside the folder they belong to."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


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
