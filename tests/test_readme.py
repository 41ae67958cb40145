"""The README's Python runs as it stands, on a tiny model."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from unimodal.model import UnifiedModel

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_every_block_of_python_runs(
    make: Callable[..., UnifiedModel], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 2
    opened: list[str] = []
    model = make("flow")

    def pretrained(folder: str) -> UnifiedModel:
        opened.append(folder)
        return model

    # A model that was taught nothing writes blanks and nothing at all: let it say a word.
    monkeypatch.setattr(UnifiedModel, "from_pretrained", pretrained)
    say = model.text.encode("n")[0]
    logits = model.backbone.logits

    def spoken(hidden):  # type: ignore[no-untyped-def]
        scores = logits(hidden)
        scores[:, say] += 1e6
        return scores

    monkeypatch.setattr(model.backbone, "logits", spoken)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert opened == ["out/demo/run", "out/shapes/run"]
    assert (tmp_path / "seven.png").is_file()
    assert len(names["variations"]) == 4  # type: ignore[arg-type]
    assert len(names["joined"].images) == 3  # type: ignore[attr-defined]
    assert names["continued"].parts[-1].text.strip("n") == ""  # type: ignore[attr-defined]
