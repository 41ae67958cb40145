"""Unified text and image models: understand and generate both in one transformer."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from unimodal.decoding import DecodingSettings, decode
    from unimodal.documents import Document, Part
    from unimodal.model import UnifiedModel

__version__ = "0.1.0"
__all__ = ["DecodingSettings", "Document", "Part", "UnifiedModel", "__version__", "decode"]

_HOMES = {
    "DecodingSettings": "decoding", "Document": "documents", "Part": "documents", "UnifiedModel": "model",
    "decode": "decoding",
}  # fmt: skip


def __getattr__(name: str) -> object:
    # Nothing heavy is imported before it is asked for: `unimodal --help` answers at once.
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(f"unimodal.{_HOMES[name]}"), name)
    raise AttributeError(f"module unimodal has no attribute {name}")
