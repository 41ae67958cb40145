"""What all tests of data share."""

import sys
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` fetches nothing, and keeps what it makes in a folder of the test's."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    if "datasets" in sys.modules:  # it has read the environment
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
