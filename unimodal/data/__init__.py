"""Sources of documents, mixtures, and the loaders that pack them."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from unimodal.data.images import DigitImageData, FolderImageData, ImageData, ShapesImageData
    from unimodal.data.module import DigitsData, DocumentData, FolderData, ShapesData

__all__ = [
    "DigitImageData", "DigitsData", "DocumentData", "FolderData", "FolderImageData", "ImageData", "ShapesData",
    "ShapesImageData",
]  # fmt: skip


def __getattr__(name: str) -> object:
    # Sources are used where lightning is not wanted; only the data modules need it.
    if name in __all__:
        from unimodal.data import images, module

        return getattr(images if "Image" in name else module, name)
    raise AttributeError(f"module {__name__} has no attribute {name}")
