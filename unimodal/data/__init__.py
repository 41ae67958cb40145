"""Sources of documents, mixtures, and the loader that packs them."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from unimodal.data.module import DigitsData, DocumentData, FolderData

__all__ = ["DigitsData", "DocumentData", "FolderData"]


def __getattr__(name: str) -> object:
    # Sources are used where lightning is not wanted; the data modules are what needs it.
    if name in __all__:
        from unimodal.data import module

        return getattr(module, name)
    raise AttributeError(f"module {__name__} has no attribute {name}")
