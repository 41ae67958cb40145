"""lmms-eval, installed beside us and run for real on two made-up tasks."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from unimodal.decoding import decode
from unimodal.decoding_settings import DecodingSettings
from unimodal.documents import Document, Part
from unimodal.evaluation.likelihood import log_likelihoods
from unimodal.export import ExportInfo, build, save_export
from unimodal.images import load_image
from unimodal.model import UnifiedModel
from unimodal.text import TextTokenizer

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed: pip install -e .[lmms]")
ROOT = Path(__file__).resolve().parents[2]
CHOICES = ["red", "blue", "green and blue"]
QUESTIONS = ["What is it?", "Which colour is this?", "And now?"]
UTILS = """
from PIL import Image
def visual(doc):
    return [Image.open(doc["image"]).convert("RGB")]
def result(doc, results):
    return {"right": float(results[0] == doc["answer"])}
"""
CONFIG = {
    "class_path": "unimodal.UnifiedModel",
    "init_args": {
        "tokenizer": {"class_path": "unimodal_tokenizers.PatchTokenizer", "init_args": {"patch": 4}},
        "generator": {"class_path": "unimodal_generators.Flow", "init_args": {}},
        "backbone": {
            "width": 16, "depth": 2, "heads": 2, "kv_heads": 2, "mlp_width": 32, "vocabulary": 300, "positions": "block",
            "experts": {"attention": True, "mlp": True, "norms": True},
        },
        "sequence": {"image_sizes": [[8, 8]], "context_length": 192},
    },
}  # fmt: skip


def exported(folder: Path) -> UnifiedModel:
    torch.manual_seed(0)
    model = build(CONFIG, "model")
    assert isinstance(model, UnifiedModel)
    model.text = TextTokenizer.train([*CHOICES, *QUESTIONS], 300)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    save_export(folder, model, CONFIG, ExportInfo("model", "raw", "tiny", "unknown"))
    return model.eval()


def prompt(image: Path, text: str) -> Document:
    return Document((Part(load_image(image), learn=False), Part(text, learn=False)))


def written(model: UnifiedModel, document: Document) -> str:
    (done,) = decode(model, [document], DecodingSettings(max_tokens=6, max_images=0), [0])
    return "".join(part.text for part in done.parts[2:])


def tasks(folder: Path, model: UnifiedModel) -> None:
    """Answers such that what is right is known: of three questions the model writes one, and likes one choice."""
    rows: list[dict[str, Any]] = []
    for number, question in enumerate(QUESTIONS):
        image = folder / f"{number}.png"
        Image.new("RGB", (8, 8), ("red", "blue", "green")[number]).save(image)
        said = written(model, prompt(image, question)).strip()
        (scores,) = log_likelihoods(model, [prompt(image, question)], [[f" {choice}" for choice in CHOICES]])
        means = [score.mean for score in scores]
        # The first: what the model does; the others: something else (the least likely choice).
        choice = means.index(max(means)) if number == 0 else means.index(min(means))
        rows.append({
            "image": str(image), "question": question, "answer": said if number == 0 else said + "!",
            "choices": CHOICES, "choice": CHOICES[choice],
        })  # fmt: skip
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {
        "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test",
        "doc_to_text": "{{question}}", "metadata": [{"version": 1.0}],
    }  # fmt: skip
    written_task = common | {
        "task": "tiny_written", "output_type": "generate_until", "doc_to_target": "{{answer}}",
        "generation_kwargs": {"max_new_tokens": 6, "temperature": 0, "do_sample": False},
        "metric_list": [{"metric": "right", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    chosen_task = common | {
        "task": "tiny_chosen", "output_type": "multiple_choice", "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{choice}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    (folder / "utils.py").write_text(UTILS)
    functions = {"doc_to_visual": "!function utils.visual"}
    for name, task, more in (
        ("written", written_task, functions | {"process_results": "!function utils.result"}),
        ("chosen", chosen_task, functions),
    ):
        lines = [f"{key}: {value}" for key, value in more.items()]
        (folder / f"tiny_{name}.yaml").write_text(yaml.safe_dump(task) + "\n".join(lines) + "\n")


def entry_point(folder: Path) -> None:
    """What `pip install` writes for the entry point of pyproject.toml, also where we are not installed."""
    made = folder / "unimodal_entry-0.dist-info"
    made.mkdir(parents=True)
    (made / "METADATA").write_text("Metadata-Version: 2.1\nName: unimodal-entry\nVersion: 0\n")
    (made / "entry_points.txt").write_text(
        "[lmms_eval.models]\nunimodal = unimodal.evaluation.adapters.lmms_eval:manifest\n"
    )


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    paths = (folder / "site", ROOT, ROOT / "tokenizers", ROOT / "generators")
    offline = {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(folder / "hf"),
        "CUDA_VISIBLE_DEVICES": "",
    }
    return subprocess.run(
        [sys.executable, "-m", "lmms_eval", "--model", "unimodal", "--device", "cpu", *arguments],
        capture_output=True, text=True, check=False, cwd=folder, timeout=500,
        env=os.environ | offline | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.mark.slow
def test_both_kinds_of_tasks(tmp_path: Path) -> None:
    model = exported(tmp_path / "export")
    (tmp_path / "tasks").mkdir()
    tasks(tmp_path / "tasks", model)
    entry_point(tmp_path / "site")
    done = run(
        tmp_path, "--model_args", f"run={tmp_path / 'export'}", "--tasks", "tiny_written,tiny_chosen", "--batch_size", "2",
        "--include_path", str(tmp_path / "tasks"), "--output_path", str(tmp_path / "out"), "--log_samples",
    )  # fmt: skip
    print(done.stdout[-3000:])
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = (tmp_path / "out").rglob("*results.json")
    scores = json.loads(results.read_text())["results"]
    assert scores["tiny_written"]["right,none"] == pytest.approx(1 / 3)
    assert scores["tiny_chosen"]["acc,none"] == pytest.approx(1 / 3)  # a wrong sign would give 2 / 3
    (samples,) = (tmp_path / "out").rglob("*tiny_written*.jsonl")
    said = {row["doc_id"]: row["filtered_resps"] for row in map(json.loads, samples.read_text().splitlines())}
    for number, question in enumerate(QUESTIONS):
        answer = said[number][0] if isinstance(said[number], list) else said[number]
        assert answer == written(model, prompt(tmp_path / "tasks" / f"{number}.png", question))
