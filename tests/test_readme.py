"""What the documents say runs as it stands: the README's Python, CONTRIBUTING's example; and lists are whole."""

import re
import sys
import textwrap
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from unimodal.cli import main
from unimodal.decoding import stream
from unimodal.decoding_settings import DecodingSettings
from unimodal.documents import GENERATED, Document, Part
from unimodal.export import load_tokenizer
from unimodal.model import UnifiedModel
from unimodal_tokenizers import quantizers

ROOT = Path(__file__).parents[1]
PROMPT = Document((Part("a handwritten seven", learn=False),), "text_to_image")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_block_of_python_runs(
    make: Callable[..., UnifiedModel],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 2
    opened: list[str] = []
    model = make("flow")
    model.generator.sampling = model.generator.sampling.override(guidance=2.0)  # as its recipes have it

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
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert opened == ["out/demo/run", "out/shapes/run"]
    assert (tmp_path / "seven.png").is_file()
    for name, images in (
        ("edited", 2),
        ("joined", 3),
        ("answered", 1),
        ("continued", 0),
        ("inpainted", 1),
        ("best", 1),
    ):
        assert len(names[name].images) == images, name
    for name in ("read", "answered", "continued"):
        written = names[name].parts[-1]
        assert written.role == GENERATED
        assert set(written.text) == {"n"}
    assert len({document.images[-1].tobytes() for document in names["variations"]}) == 4
    before, after = (np.asarray(image) for image in (names["picture"], names["inpainted"].images[-1]))
    half = len(before) // 2
    assert np.array_equal(before[half:], after[half:])
    assert not np.array_equal(before[:half], after[:half])
    assert names["led"].images[-1].tobytes() != names["picture"].tobytes()
    assert len(names["tries"]) == 3  # it says nothing but "n", which never fits
    said = capsys.readouterr().out
    assert "n" in said


def test_every_kind_of_piece_that_the_readme_streams_comes(make: Callable[..., UnifiedModel]) -> None:
    """Its loop shows text, previews and images."""
    (loop,) = re.findall(r"for piece in stream\(.*\n.*\n", README)
    assert "previews=True" in loop
    assert "print(piece.text or piece.preview or piece.image)" in loop
    pieces = list(stream(make("flow"), [PROMPT], DecodingSettings("image", 3, 1, temperature=1.5), [0], previews=True))
    assert {(p.text != "", p.preview is not None, p.image is not None) for p in pieces} == {
        (True, False, False),
        (False, True, False),
        (False, False, True),
    }


def test_every_tokenizer_recipe_stands_in_the_list_of_tokenizers() -> None:
    listed = (ROOT / "docs" / "tokenizers.md").read_text()
    for recipe in (ROOT / "lightning_configs" / "tokenizers").glob("*.yaml"):
        laid_over = not re.search(r"^(data|class_path):", recipe.read_text(), re.MULTILINE)
        assert f"`{recipe.stem}`" + " +" * laid_over in listed, recipe.stem


def test_a_quantizer_of_ones_own_is_one_file_and_one_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CONTRIBUTING.md's, as it stands there."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    name = "unimodal_tokenizers.quantizers.signs"
    module = types.ModuleType(name)
    exec(textwrap.dedent(text.split("```python")[1].split("```")[0]), module.__dict__)
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(quantizers, "signs", module, raising=False)
    (tmp_path / "signs.yaml").write_text(textwrap.dedent(text.split("```yaml")[1].split("```")[0]))
    files = ["-c", ROOT / "lightning_configs" / "tokenizers" / "digits_vq.yaml", "-c", tmp_path / "signs.yaml"]
    small = ["--data.init_args.batch_size", "4", "--trainer.max_steps", "1", "--trainer.accelerator", "cpu",
             "--trainer.precision", "32-true", "--trainer.default_root_dir", tmp_path / "run"]  # fmt: skip
    assert main([str(word) for word in ["fit", *files, *small]]) == 0
    assert type(load_tokenizer(tmp_path / "run").quantizer).__name__ == "Signs"
