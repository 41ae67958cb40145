"""Sources of documents, mixtures, and the loaders that pack them."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from unimodal.data.folder import FolderSource
    from unimodal.data.hub import HuggingFaceSource
    from unimodal.data.images import DigitImageData, FolderImageData, ImageData, MixtureImageData, ShapesImageData
    from unimodal.data.jsonl import JsonlSource
    from unimodal.data.layouts import Conversation, Edit, Interleaved, Mmc4, Pairs, Parts, Text
    from unimodal.data.mixture import MixtureData
    from unimodal.data.module import DigitsData, DocumentData, FolderData, ShapesData
    from unimodal.data.parquet import ParquetSource
    from unimodal.data.tar import TarSource
    from unimodal.data.token_files import TokenSource
    from unimodal.data.tokenized import TokenData

_ROOMS = {
    "folder": ["FolderSource"],
    "hub": ["HuggingFaceSource"],
    "images": ["DigitImageData", "FolderImageData", "ImageData", "MixtureImageData", "ShapesImageData"],
    "jsonl": ["JsonlSource"],
    "layouts": ["Conversation", "Edit", "Interleaved", "Mmc4", "Pairs", "Parts", "Text"],
    "mixture": ["MixtureData"],
    "module": ["DigitsData", "DocumentData", "FolderData", "ShapesData"],
    "parquet": ["ParquetSource"],
    "tar": ["TarSource"],
    "token_files": ["TokenSource"],
    "tokenized": ["TokenData"],
}
__all__ = [
    "Conversation", "DigitImageData", "DigitsData", "DocumentData", "Edit", "FolderData", "FolderImageData",
    "FolderSource", "HuggingFaceSource", "ImageData", "Interleaved", "JsonlSource", "MixtureData", "MixtureImageData",
    "Mmc4", "Pairs", "ParquetSource", "Parts", "ShapesData", "ShapesImageData", "TarSource", "Text", "TokenData",
    "TokenSource",
]  # fmt: skip


def __getattr__(name: str) -> object:
    # Sources are used where lightning is not wanted; only the data modules need it.
    for room, names in _ROOMS.items():
        if name in names:
            return getattr(import_module(f"unimodal.data.{room}"), name)
    raise AttributeError(f"module {__name__} has no attribute {name}")
