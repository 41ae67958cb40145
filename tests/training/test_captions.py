"""Tokenizers that learn from captions: by the command, resumed exactly, refused without texts."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from unimodal.cli import main
from unimodal.data.digits import caption, digit_images
from unimodal.export import load_tokenizer
from unimodal.packing import to_tensor

RECIPE = Path(__file__).parents[2] / "lightning_configs" / "tokenizers" / "digits_contrastive.yaml"
SMALL = """
data: {init_args: {batch_size: 24}}
trainer: {max_steps: 80, val_check_interval: 40, accelerator: cpu, enable_progress_bar: false}
model:
  init_args:
    tokenizer: {init_args: {quantizer: {init_args: {entries: 32}}, channels: [8, 16]}}
    weights: {contrastive: 1.0}
    schedule: constant
checkpoint: {every_n_train_steps: 40}
"""


def fit(folder: Path, *more: str) -> int:
    (folder.parent / "small.yaml").write_text(SMALL)
    given = ["-c", str(RECIPE), "-c", str(folder.parent / "small.yaml"), "--trainer.default_root_dir", str(folder)]
    return main(["fit", *given, *more])


@pytest.mark.slow
def test_codes_come_to_say_what_captions_say_and_runs_resume(tmp_path: Path) -> None:
    assert fit(tmp_path / "run") == 0
    record = [line.split(",") for line in next((tmp_path / "run").rglob("metrics.csv")).read_text().splitlines()]
    column = record[0].index("val/contrastive")
    values = [float(row[column]) for row in record[1:] if row[column]]
    assert values[-1] < values[0]
    tokenizer = load_tokenizer(tmp_path / "run")
    scans = digit_images("test")
    x = to_tensor([np.asarray(image) for image in scans.images()])
    words = [caption(i) for i in range(10)]
    semantic = tokenizer.semantic
    with torch.no_grad():
        ids = tokenizer.encode(x)
        vectors = tokenizer.lookup(ids.values).view(len(x), ids.grids[0].length, -1)
        right = semantic(vectors, ids.grids[0], x, [words[label] for label in scans.labels])["contrastive"]
        wrong = semantic(vectors, ids.grids[0], x, [words[(label + 1) % 10] for label in scans.labels])["contrastive"]
    assert right < wrong - 0.5

    stopped = tmp_path / "stopped"
    assert fit(stopped, "--trainer.max_steps", "40") == 0
    assert fit(stopped, "--ckpt_path", "last") == 0
    again = load_tokenizer(stopped).state_dict()
    for name, value in tokenizer.state_dict().items():
        assert torch.equal(value, again[name]), name


def test_images_without_texts_are_refused_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(tmp_path / "run", "--data.init_args.captions", "false") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("unimodal:")]
    assert line.endswith("data.captions: expected true, because the tokenizer reads texts, got images alone")
    record = yaml.safe_load(RECIPE.read_text())
    assert record["data"]["init_args"]["captions"] is True
