"""Weights of other systems, both ways."""

from unimodal.importers.huggingface import check_text, load_text, save_text
from unimodal.importers.huggingface_config import read_config

__all__ = ["check_text", "load_text", "read_config", "save_text"]
