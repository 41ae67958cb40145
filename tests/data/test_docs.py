"""The examples of docs/data.md, as they stand, on data of the formats they are about."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from data_formats import (
    caption_rows,
    edit_tar,
    image_folder,
    img2dataset,
    llava,
    mmc4_jsonl,
    obelics_tar,
    parquet_rows,
    png,
    write_jsonl,
)  # fmt: skip
from jsonargparse import ArgumentParser

from unimodal.cli import main
from unimodal.data import MixtureData, MixtureImageData
from unimodal.export import ExportInfo, save_export
from unimodal.tokenize import tokenize
from unimodal_tokenizers import PatchTokenizer

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
EXAMPLES = [block for block in BLOCKS if "MixtureImageData" not in block]
IMAGES = [block for block in BLOCKS if "MixtureImageData" in block]
RECIPE = ROOT / "lightning_configs" / "models" / "digits_mot_flow.yaml"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    datasets = pytest.importorskip("datasets")
    folder = tmp_path_factory.mktemp("docs")
    data = folder / "data"
    img2dataset(data / "pairs")
    obelics_tar(data / "obelics")
    mmc4_jsonl(data / "mmc4" / "docs.jsonl")
    llava(data / "llava")
    edit_tar(data / "edits")
    rows = [
        {"source_img": {"bytes": png(n)}, "instruction": "darker", "target_img": {"bytes": png(n)}} for n in range(6)
    ]
    parquet_rows(data / "edits.parquet", rows)
    parquet_rows(data / "prose" / "0.parquet", [{"text": f"line {n}"} for n in range(6)])
    parts = [{"text": "three ", "learn": False}, {"image": "pictures/3.png"}]
    (data / "pictures").mkdir()
    for n in range(6):
        (data / "pictures" / f"{n}.png").write_bytes(png(n))
        (data / "pictures" / f"{n}.txt").write_text(f"shade {n}")
    write_jsonl(data / "documents.jsonl", [{"kind": "x", "parts": parts}] * 6)
    image_folder(data / "imagefolder")
    for name in ("saved", "held_out"):
        made = datasets.Dataset.from_list(caption_rows(9)).cast_column("image", datasets.Image())
        made.save_to_disk(str(data / name))
    setting = yaml.safe_load(RECIPE.read_text())["model"]["init_args"]["model"]["tokenizer"]
    saved = ExportInfo("tokenizer", "raw", "patch", "unknown")
    save_export(folder / "patch", PatchTokenizer(**setting["init_args"]), setting, saved)
    tokenize(folder / "patch", data / "pictures", data / "tokens", [(8, 8)], device="cpu")
    return folder


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_an_example_reads_its_data(number: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(MixtureData, "data")
    data = parser.instantiate(parser.parse_object(yaml.safe_load(EXAMPLES[number]))).data
    assert isinstance(data, MixtureData)
    for source in (*(weighted.source for weighted in data.training_sources()), *data.validation_sources()):
        documents = [source.document(index, np.random.default_rng(index)) for index in range(len(source))]
        assert documents
        assert all(any(part.learn for part in document.parts) for document in documents)
        assert {document.kind for document in documents} == {source.kind}


def test_the_three_lines_of_the_readme_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they stand, and with what the README says of interleaved documents."""
    monkeypatch.chdir(tmp_path)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```yaml\n(data:\n.*?)```", readme, re.DOTALL)
    assert len(block.splitlines()) == 3
    assert "`JsonlSource` and `paths: docs.jsonl`" in readme
    img2dataset(tmp_path / "shards")
    (tmp_path / "pictures").mkdir()
    for n in range(3):
        (tmp_path / "pictures" / f"{n}.png").write_bytes(png(n))
    parts = [{"text": "three ", "learn": False}, {"image": "pictures/1.png"}]
    write_jsonl(tmp_path / "docs.jsonl", [{"kind": "x", "parts": parts}] * 6)
    for mine in (block, block.replace("TarSource", "JsonlSource").replace("paths: shards", "paths: docs.jsonl")):
        (tmp_path / "mine.yaml").write_text(mine)
        quick = [
            "--trainer.accelerator",
            "cpu",
            "--trainer.enable_progress_bar",
            "false",
            "--trainer.fast_dev_run",
            "true",
        ]
        assert main(["fit", "-c", str(RECIPE), "-c", "mine.yaml", *quick, "--data.prompts", "0"]) == 0


def test_every_container_and_layout_has_an_example() -> None:
    assert (len(EXAMPLES), len(IMAGES)) == (9, 1)
    for name in (
        "TokenSource",
        "TarSource",
        "JsonlSource",
        "ParquetSource",
        "HuggingFaceSource",
        "FolderSource",
        "Pairs",
        "Mmc4",
    ):
        assert any(f"unimodal.data.{name}" in example for example in EXAMPLES)
    assert all(len(example.splitlines()) <= 14 for example in BLOCKS)


def test_the_example_of_images_gives_those_of_its_data(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(MixtureImageData, "data")
    data = parser.instantiate(parser.parse_object(yaml.safe_load(IMAGES[0]))).data
    sources = [*(weighted.source for weighted in data.training_sources()), *data.validation_sources()]
    found = [image for s in sources for i in range(len(s)) for image in s.document(i, np.random.default_rng(0)).images]
    assert len(found) == 8 + 2 * 6


@pytest.mark.slow
def test_all_of_them_train_together(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(folder)
    merged: dict[str, Any] = {"sources": {}, "validation": {}, "batch_tokens": 512}
    for number, example in enumerate(EXAMPLES):
        settings = yaml.safe_load(example)["data"]["init_args"]
        # Without weights, which one of them has: all sources have one or none.
        named = {f"{name}{number}": {"source": entry["source"]} for name, entry in settings["sources"].items()}
        merged["sources"] |= named
        merged["validation"] |= named
    merged["validation"] = {name: e for name, e in merged["validation"].items() if not name.startswith("rows6")}
    path = tmp_path / "data.yaml"
    config = {"data": {"class_path": "unimodal.data.MixtureData", "init_args": merged}}
    path.write_text(yaml.safe_dump(config))
    tiny = [
        "--model.model.backbone.width",
        "32",
        "--model.model.backbone.depth",
        "1",
        "--model.model.backbone.heads",
        "2",
    ]
    tiny += ["--model.model.backbone.kv_heads", "2", "--model.model.backbone.mlp_width", "32"]
    quick = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--trainer.fast_dev_run", "true"]
    quick += ["--data.validation_documents", "1", "--data.prompts", "0"]
    assert main(["fit", "-c", str(RECIPE), "-c", str(path), *tiny, *quick]) == 0
