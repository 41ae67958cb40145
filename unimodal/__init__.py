"""Unified text and image models: understand and generate both in one transformer."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from unimodal.decoding import decode, stream
    from unimodal.decoding_settings import DecodingSettings, Inpaint, Piece
    from unimodal.documents import Document, Part
    from unimodal.model import UnifiedModel
    from unimodal.refine import best_of, look_again, reads_back

__version__ = "0.1.0"
__all__ = [
    "DecodingSettings", "Document", "Inpaint", "Part", "Piece", "UnifiedModel", "__version__", "best_of", "decode",
    "look_again", "reads_back", "stream",
]  # fmt: skip

_HOMES = {
    "DecodingSettings": "decoding_settings", "Document": "documents", "Inpaint": "decoding_settings", "Part": "documents",
    "Piece": "decoding_settings", "UnifiedModel": "model", "best_of": "refine", "decode": "decoding", "look_again": "refine",
    "reads_back": "refine", "stream": "decoding",
}  # fmt: skip


def __getattr__(name: str) -> object:
    # Nothing heavy is imported before it is asked for: `unimodal --help` answers at once.
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(f"unimodal.{_HOMES[name]}"), name)
    raise AttributeError(f"module unimodal has no attribute {name}")
