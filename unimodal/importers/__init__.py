"""Weights of other systems, both ways."""

from unimodal.importers.huggingface import check_text, load_text, read_config, save_text

__all__ = ["check_text", "load_text", "read_config", "save_text"]
