"""Folders of text models."""

from pathlib import Path

import pytest
from text_models import MODELS, write


@pytest.fixture
def qwen3(tmp_path: Path) -> Path:
    """A small Qwen3 folder of one file."""
    write(tmp_path / "qwen3", MODELS["qwen3"])
    return tmp_path / "qwen3"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """The same of many files."""
    write(tmp_path / "sharded", MODELS["qwen3"], "4KB")
    return tmp_path / "sharded"
