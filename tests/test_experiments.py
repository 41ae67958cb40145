"""The demo on recipes made small: every step of it runs, and scores and a page are left."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from experiments.digits.__main__ import main
from unimodal.cli import main as run
from unimodal.export import load_export

CONFIGS = Path(__file__).parents[1] / "lightning_configs"
KEYS = {
    "judge_accuracy", "asked_digit", "image_to_text", "sums_text", "sums_drawn", "frechet", "frechet_real",
    "frechet_noise", "precision", "recall", "copies", "copies_real", "train_seconds", "parameters",
}  # fmt: skip


def small(recipe: Path, folder: Path, changes: dict[str, Any]) -> Path:
    """A copy of a recipe with some keys (dotted) changed."""
    config = yaml.safe_load(recipe.read_text())
    for key, value in changes.items():
        level = config
        *parents, last = key.split(".")
        for parent in parents:
            level = level[parent]
        assert isinstance(level, dict), key
        level[last] = value
    path = folder / recipe.name
    path.write_text(yaml.safe_dump(config))
    return path


STEPS = {"trainer.max_steps": 3, "trainer.val_check_interval": 3}
MODEL = {
    **STEPS, "model.init_args.model.backbone.width": 32, "model.init_args.model.backbone.mlp_width": 48,
    "model.init_args.model.backbone.depth": 1, "data.init_args.batch_tokens": 512,
    "data.init_args.validation_documents": 2, "data.init_args.prompts": 1,
}  # fmt: skip


def check(out: Path, printed: str) -> None:
    scores = json.loads((out / "scores.json").read_text())
    assert set(scores) >= KEYS
    assert all(isinstance(scores[key], (int, float)) for key in KEYS)
    assert scores["train_seconds"] > 0
    assert scores["judge_accuracy"] > 0.97
    page = (out / "index.html").read_text()
    assert page.count("data:image/png") >= 3  # curves, grid, sums
    assert "asked_digit" in printed
    assert f"open {out / 'index.html'}" in printed
    assert "precision" in printed


@pytest.fixture(autouse=True)
def written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The run-time checks of shapes cannot be compiled."""
    monkeypatch.setattr("experiments.digits.__main__.can_compile", lambda: (False, "not in tests"))


@pytest.mark.slow
def test_the_demo_ends_with_scores_and_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = {"model.init_args.model.generator.init_args.sampling.steps": 1}
    recipe = small(CONFIGS / "models" / "digits_mot_flow.yaml", tmp_path, {**MODEL, **steps})
    stale = tmp_path / "out" / "run" / "checkpoints" / "last.ckpt"  # of an earlier demo: this one starts afresh
    stale.parent.mkdir(parents=True)
    stale.write_text("stale")
    assert main(["--recipe", str(recipe), "--out", str(tmp_path / "out")]) == 0
    check(tmp_path / "out", capsys.readouterr().out)


@pytest.mark.slow
def test_the_demo_trains_a_tokenizer_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = small(CONFIGS / "models" / "digits_vq_ar.yaml", tmp_path, MODEL)
    tokenizer = small(CONFIGS / "tokenizers" / "digits_vq.yaml", tmp_path, {**STEPS, "data.init_args.batch_size": 8})
    out = tmp_path / "out"
    assert main(["--recipe", str(recipe), "--tokenizer", str(tokenizer), "--out", str(out)]) == 0
    check(out, capsys.readouterr().out)
    assert (out / "tokenizer" / "export" / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tokenizer", "recipe"),
    [
        ("kl", "digits_mot_flow"), ("fsq", "digits_vq_ar"), ("rvq", "digits_vq_ar"), ("sequence", "digits_vq_ar"),
        ("dynamic", "digits_vq_ar"), ("multiscale", "digits_var_nextscale"),
    ],
)  # fmt: skip
def test_the_demo_takes_another_tokenizer_by_its_recipe(
    tokenizer: str, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One option, and the recipe's own tokenizer is out of the game: what was trained is what the model holds."""
    scored = []
    monkeypatch.setattr(
        "experiments.digits.__main__.unimodal",
        lambda call: scored.append(call) or 0 if call[0] == "evaluate" else run(call),
    )
    few = small(CONFIGS / "models" / f"{recipe}.yaml", tmp_path, MODEL)
    path = CONFIGS / "tokenizers" / f"digits_{tokenizer}.yaml"
    whole = "data" in yaml.safe_load(path.read_text())  # others are read on top of the VQ's
    base = path if whole else CONFIGS / "tokenizers" / "digits_vq.yaml"
    theirs = [str(small(base, tmp_path, {**STEPS, "data.init_args.batch_size": 8})), *([] if whole else [str(path)])]
    out = tmp_path / "out"
    assert main(["--recipe", str(few), "--tokenizer", *theirs, "--out", str(out)]) == 0
    trained, held = (
        load_export(out / "tokenizer" / "export", "tokenizer"),
        load_export(out / "run" / "export", "model").tokenizer,
    )
    assert type(held) is type(trained)
    for key, value in trained.state_dict().items():
        assert torch.equal(held.state_dict()[key], value), key
    assert [call[0] for call in scored] == ["evaluate"]


def test_a_step_that_fails_ends_the_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--recipe", str(tmp_path / "none.yaml"), "--out", str(tmp_path / "out")])
    assert end.value.code == 2
    assert "none.yaml" in capsys.readouterr().err
