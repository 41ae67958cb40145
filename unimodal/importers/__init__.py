"""Weights of other systems, both ways."""

from unimodal.importers.huggingface import load_text, read_config, save_text

__all__ = ["load_text", "read_config", "save_text"]
