"""The console script: help is cheap, and bad input is one line, exit code 2 and nothing left behind."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from unimodal.cli import main

ROOT = Path(__file__).parents[1]
FLOW = ROOT / "lightning_configs" / "models" / "digits_mot_flow.yaml"
VQ = ROOT / "lightning_configs" / "models" / "digits_vq_ar.yaml"
TINY = """
model:
  init_args:
    model:
      backbone: {width: 32, depth: 2, heads: 2, kv_heads: 2, mlp_width: 48, vocabulary: 300}
      sequence: {image_sizes: [[8, 8]], context_length: 192, drop_text: 0.1, drop_images: 0}
    warmup_steps: 1
data:
  init_args: {batch_tokens: 512, validation_documents: 4, prompts: 1}
trainer: {max_steps: 2, val_check_interval: 100, precision: 32-true, accelerator: cpu, enable_progress_bar: false}
"""
COMMANDS = [
    [], ["fit"], ["validate"], ["test"], ["predict"], ["generate"], ["generate", "image"], ["generate", "document"],
    ["describe"], ["data"], ["data", "check"], ["evaluate"], ["evaluate", "digits"], ["import"], ["import", "hf"],
    ["export"], ["export", "hf"],
]  # fmt: skip
Refused = Callable[..., str]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(TINY)
    return path


def train(recipe: Path, tiny: Path, run: Path, *options: str) -> Path:
    assert main(["fit", "-c", str(recipe), "-c", str(tiny), "--trainer.default_root_dir", str(run), *options]) == 0
    return run


@pytest.fixture(scope="module")
def run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(FLOW, tiny, tmp_path_factory.mktemp("flow") / "run")


@pytest.fixture(scope="module")
def autoregressive(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = ["--model.init_args.tokenizer_weights", "null", "--model.init_args.model.sequence.drop_text", "0"]
    guidance = ["--model.init_args.model.generator.init_args.sampling.guidance", "1"]
    return train(VQ, tiny, tmp_path_factory.mktemp("autoregressive") / "run", *options, *guidance)


@pytest.fixture
def export(run: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(run / "export", tmp_path / "export"))


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """Run a command that must fail as every bad input does; its one line."""

    def check(*args: Any, names: str | tuple[str, ...], absent: Path | None = None) -> str:
        capsys.readouterr()
        code = main([str(arg) for arg in args])
        captured = capsys.readouterr()
        lines = captured.err.splitlines()
        assert code == 2, captured
        assert len(lines) == 1, captured.err
        assert lines[0].startswith("unimodal: ")
        assert "Traceback" not in captured.out + captured.err
        assert len(lines[0]) < 3000
        for name in [names] if isinstance(names, str) else names:
            assert name in lines[0], lines[0]
        if absent is not None:
            assert not absent.exists(), sorted(absent.rglob("*"))
            assert not list(absent.parent.glob(".writing-*"))
        return lines[0]

    return check


# ---- help


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: "_".join(command) or "none")
def test_help_imports_nothing_heavy(command: list[str]) -> None:
    code = (
        "import sys\nfrom unimodal.cli import main\n"
        "try:\n    code = main(sys.argv[1:])\nexcept SystemExit as e:\n    code = e.code\n"
        "heavy = {'torch', 'lightning', 'numpy', 'PIL', 'sklearn'} & set(sys.modules)\n"
        "assert not heavy, heavy\nsys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *command, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert f"usage: unimodal {' '.join(command)}".strip() in done.stdout


def test_documents_are_read_without_torch() -> None:
    """Two seconds of every process that only reads data."""
    code = "import sys, unimodal.documents, unimodal.images, unimodal.evaluation.compare; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_help_lists_exactly_the_commands_that_work(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines() if re.match(r" {4}\w", line)]
    assert listed == [
        "fit", "validate", "test", "predict", "generate", "describe", "evaluate", "tokenize", "import", "export",
        "consolidate", "data",
    ]  # fmt: skip


def test_the_script_reports_on_standard_error_and_exits_with_2() -> None:
    command = [sys.executable, "-m", "unimodal.cli", "fitt"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("unimodal: argument COMMAND: invalid choice: 'fitt'")


def test_a_solver_that_does_not_exist_is_named(run: Path, tmp_path: Path) -> None:
    # In a process without the tests' own type checks.
    command = [sys.executable, "-m", "unimodal.cli", *map(str, draw(run, tmp_path / "out", "--solver", "rk45"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert "rk45" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("args", "name"),
    [
        (["fitt"], "fitt"),
        (["generate"], "image|document"),
        (["generate", "film"], "film"),
        (["generate", "image", "--run", "r", "--out", "o"], "--prompt"),
        (["generate", "image", "--run", "r", "--prompt", "a"], "--out"),
        (["generate", "image", "--run", "r", "--prompt", "a", "--prompts", "b", "--out", "o"], "--prompts"),
        (["generate", "image", "--run", "r", "--prompt", "a", "--out", "o", "-n", "x"], "-n"),
        (["generate", "image", "--run", "r", "--prompt", "a", "--out", "o", "--sede", "1"], "--sede"),
        (["describe", "--run", "r", "a.png", "--weights", "mean"], "mean"),
        (["evaluate", "letters"], "letters"),
    ],
)
def test_unknown_commands_and_arguments(args: list[str], name: str, refused: Refused) -> None:
    refused(*args, names=name)


# ---- recipes


@pytest.mark.parametrize(
    ("yaml", "name"),
    [
        ("model: {init_args: {lrr: 1.0e-3}}", "lrr"),
        ("model: {init_args: {model: {genrator: 3}}}", "genrator"),
        ("model: {init_args: {model: {generator: {init_args: {time_shfit: 3}}}}}", "time_shfit"),
        ("model: {init_args: {model: {generator: {init_args: {sampling: {stps: 3}}}}}}", "stps"),
        ("model: {init_args: {model: {tokenizer: {init_args: {pach: 3}}}}}", "pach"),
        ("model: {init_args: {model: {backbone: {witdh: 3}}}}", "witdh"),
        ("model: {init_args: {model: {backbone: {experts: {mpl: true}}}}}", "mpl"),
        ("model: {init_args: {model: {sequence: {context: 3}}}}", "context"),
        ("data: {init_args: {btach_tokens: 3}}", "btach_tokens"),
        ("data: {init_args: {mixture: {summ: 3}}}", "summ"),
        ("trainer: {max_stepz: 3}", "max_stepz"),
        ("checkpoint: {every_step: 3}", "every_step"),
        ("trianer: {max_steps: 3}", "trianer"),
        ("model: {init_args: {lr: abc}}", "lr"),
        ("model: {init_args: {betas: [0.9]}}", "betas"),
        ("model: {init_args: {betas: [0.9, 1.5]}}", "betas: expected numbers from 0 to below 1"),
        ("model: {init_args: {lr: -1}}", "lr: expected a number of 0 or more, got -1"),
        ("model: {init_args: {lr_floor: 2}}", "lr_floor: expected a share from 0 to 1, got 2"),
        ("model: {init_args: {warmup_steps: -1}}", "warmup_steps: expected 0 or more"),
        ("model: {init_args: {schedule: cosin}}", "schedule"),
        ("model: {init_args: {model: {backbone: {width: x}}}}", "width"),
        ("model: {init_args: {model: {backbone: {heads: 3}}}}", "heads"),
        ("model: {init_args: {model: {sequence: {image_sizes: [8, 8]}}}}", "image_sizes"),
        ("model: {init_args: {model: {sequence: {image_sizes: [[7, 8]]}}}}", "7x8"),
        ("model: {init_args: {model: {sequence: {image_sizes: []}}}}", "image_sizes"),
        ("model: {init_args: {model: {sequence: {drop_text: 1.5}}}}", "drop_text"),
        ("model: {init_args: {ema_decay: 2}}", "ema_decay"),
        ("model: {init_args: {weight_decay: -1}}", "weight_decay"),
        ("model: {init_args: {warmup_steps: -1}}", "warmup_steps"),
        ("data: {init_args: {batch_tokens: many}}", "batch_tokens"),
        ("data: {init_args: {batch_tokens: 64}}", "batch_tokens"),
        ("data: {init_args: {workers: -1}}", "workers"),
        ("data: {init_args: {mixture: {sum: -2}}}", "sum"),
        ("model: {init_args: {model: {backbone: {depth: -1}}}}", "depth"),
        ("model: {init_args: {model: {backbone: {vocabulary: 100}}}}", "vocabulary"),
        ("trainer: {max_steps: many}", "max_steps"),
        ("trainer: {precision: half}", "precision"),
        (
            "trainer: {precision: bf16-true}",
            "trainer.precision: expected 32-true or bf16-mixed or 16-mixed, got bf16-true",
        ),
        ("trainer: {accelerator: abacus}", "abacus"),
        ("model: {class_path: unimodal.training.Nope}", "Nope"),
        ("model: {init_args: {model: {generator: {class_path: unimodal_generators.Nope}}}}", "Nope"),
        ("model: {init_args: {model: {tokenizer: {class_path: no_such_package.Nope}}}}", "no_such_package"),
        ("model: {init_args: {model: {tokenizer: {class_path: unimodal_tokenizers.GridTokenizer}}}}", "quantizer"),
        ("data: {class_path: unimodal.data.Nope}", "Nope"),
    ],
)
def test_a_wrong_key_or_value_is_named(yaml: str, name: str, tiny: Path, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "wrong.yaml").write_text(yaml)
    out = tmp_path / "run"
    overlay = ["-c", tiny, "-c", tmp_path / "wrong.yaml"]
    line = refused("fit", "-c", FLOW, *overlay, "--trainer.default_root_dir", out, names=name, absent=out)
    assert "Namespace" not in line


@pytest.mark.parametrize(
    ("option", "value", "name"),
    [
        ("--model.init_args.lrr", "1", "lrr"),
        ("--model.init_args.lr", "abc", "abc"),
        ("--trainer.max_stepz", "1", "max_stepz"),
        ("--data.init_args.batch_tokens", "abc", "abc"),
        ("--sed", "1", "sed"),
        ("--seed_everything", "abc", "abc"),
        ("--init", "nowhere", "nowhere"),
        ("--model.init_args.tokenizer_weights", "nowhere", "nowhere"),
        ("--model.init_args.image_weight", "-2", "image_weight: expected a number of 0 or more, got -2.0"),
        ("--trainer.limit_train_batches", "1", "trainer.limit_train_batches: expected 1.0"),
        ("--trainer.overfit_batches", "1", "trainer.limit_train_batches: expected 1.0, and no overfit_batches"),
        ("--trainer.accumulate_grad_batches", "0", "trainer.accumulate_grad_batches: expected at least 1, got 0"),
    ],
)
def test_wrong_options_are_named(
    option: str, value: str, name: str, tiny: Path, tmp_path: Path, refused: Refused
) -> None:
    out = tmp_path / "run"
    refused(
        "fit", "-c", FLOW, "-c", tiny, "--trainer.default_root_dir", out, option, value, names=name, absent=out
    )  # fmt: skip


@pytest.mark.parametrize(
    ("content", "name"), [("model: [1, {a:\n b", "no YAML"), ("", "holds none"), ("3", "holds none")]
)
def test_a_file_that_is_no_recipe(content: str, name: str, tmp_path: Path, refused: Refused) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    refused("fit", "-c", path, names=(str(path), name))
    refused("fit", "-c", tmp_path / "none.yaml", names=str(tmp_path / "none.yaml"))


# ---- checkpoints


class Payload:
    """Unpickling this makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_checkpoints_that_cannot_be_continued(tiny: Path, run: Path, tmp_path: Path, refused: Refused) -> None:
    out = tmp_path / "run"
    fit = ["fit", "-c", FLOW, "-c", tiny, "--trainer.default_root_dir", out]
    last = run / "checkpoints" / "last.ckpt"
    refused(*fit, "--ckpt_path", "last", names=("last", str(out)), absent=out)
    refused(*fit, "--ckpt_path", tmp_path / "none.ckpt", names="none.ckpt", absent=out)
    refused("validate", *fit[1:], names="last.ckpt", absent=out)
    short = tmp_path / "short.ckpt"
    for size in (0, 100, 5000, len(last.read_bytes()) - 10):
        short.write_bytes(last.read_bytes()[:size])
        refused(*fit, "--ckpt_path", short, names="short.ckpt", absent=out)
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    refused(*fit, "--ckpt_path", tmp_path / "other.ckpt", names="other.ckpt", absent=out)
    wide = ["--model.init_args.model.backbone.width", "64"]
    refused(*fit, "--ckpt_path", last, *wide, names=("backbone.embedding.weight", "[300, 32]", "[300, 64]"), absent=out)
    refused(*fit, "--ckpt_path", last, "--seed_everything", "5", names=("seed_everything", "0", "5"), absent=out)


def test_a_checkpoint_never_runs_code(tiny: Path, run: Path, tmp_path: Path, refused: Refused) -> None:
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    marker = tmp_path / "marker"
    checkpoint["extra"] = Payload(marker)
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    evil = copy / "checkpoints" / "last.ckpt"
    torch.save(checkpoint, evil)
    out = tmp_path / "run"
    fit = ["fit", "-c", FLOW, "-c", tiny, "--trainer.default_root_dir", out]
    refused(*fit, "--ckpt_path", evil, names=("last.ckpt", "more than weights"), absent=out)
    refused(*fit, "--ckpt_path", evil, "--weights_only", "false", names="", absent=out)
    draw = ["generate", "image", "--run", copy, "--prompt", "a", "--out", out, "--weights", "raw"]
    refused(*draw, names=("last.ckpt", "more than weights"), absent=out)
    assert not marker.exists()
    torch.load(evil, weights_only=False)
    assert marker.exists()  # it does work where nobody refuses it


def test_code_in_checkpoints_cannot_be_allowed(tiny: Path, run: Path, tmp_path: Path, refused: Refused) -> None:
    out = tmp_path / "run"
    last = ["--ckpt_path", run / "checkpoints" / "last.ckpt", "--weights_only", "false"]
    fit = ["fit", "-c", FLOW, "-c", tiny, "--trainer.default_root_dir", out]
    refused(*fit, *last, names="weights_only", absent=out)


def test_a_folder_that_holds_a_run_is_not_overwritten(tiny: Path, run: Path, refused: Refused) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    refused("fit", "-c", FLOW, "-c", tiny, "--trainer.default_root_dir", run, names=(str(run), "--ckpt_path last"))
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_a_failure_never_removes_a_folder_that_was_there(tiny: Path, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    wrong = ["--data.init_args.batch_tokens", "64"]
    refused("fit", "-c", FLOW, "-c", tiny, "--trainer.default_root_dir", tmp_path, *wrong, names="batch_tokens")
    assert (tmp_path / "mine.txt").read_text() == "keep"


# ---- exports


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def draw(folder: Path, out: Path, *options: object) -> list[object]:
    return ["generate", "image", "--run", folder, "--prompt", "a handwritten six", "--out", out, *options]


def test_folders_that_hold_no_model(run: Path, tmp_path: Path, refused: Refused) -> None:
    out = tmp_path / "out"
    refused(*draw(tmp_path / "none", out), names=str(tmp_path / "none"), absent=out)
    (tmp_path / "empty").mkdir()
    refused(*draw(tmp_path / "empty", out), names=(str(tmp_path / "empty"), "no export"), absent=out)
    refused(*draw(run / "run.json", out), names="run.json", absent=out)


@pytest.mark.parametrize("name", ["export.json", "config.json", "model.safetensors", "tokenizer.json"])
def test_a_missing_or_damaged_file_of_an_export_is_named(
    name: str, export: Path, tmp_path: Path, refused: Refused
) -> None:
    out, path = tmp_path / "out", export / name
    content = path.read_bytes()
    for size in (0, 7, len(content) // 2, len(content) - 5):
        path.write_bytes(content[:size])
        refused(*draw(export, out), names=name, absent=out)
    path.unlink()
    refused(*draw(export, out), names=str(export) if name == "export.json" else name, absent=out)


def test_a_newer_format_is_refused_by_number(export: Path, tmp_path: Path, refused: Refused) -> None:
    edit(export / "export.json", lambda record: record.update(format_version=2))
    refused(*draw(export, tmp_path / "out"), names=("format_version 2", "up to 1"), absent=tmp_path / "out")


def test_an_export_says_what_does_not_fit(export: Path, tmp_path: Path, refused: Refused) -> None:
    out = tmp_path / "out"
    edit(export / "config.json", lambda record: record.get("init_args", record)["backbone"].update(width=64))
    refused(*draw(export, out), names=("backbone.embedding.weight", "[300, 32]", "[300, 64]"), absent=out)
    edit(export / "config.json", lambda record: record.get("init_args", record)["backbone"].update(wdith=64))
    refused(*draw(export, out), names="wdith", absent=out)
    edit(export / "export.json", lambda record: record.update(kind="tokenizer"))
    refused(*draw(export, out), names=("model", "tokenizer"), absent=out)


@pytest.mark.parametrize(
    "value",
    [
        {"class_path": "planted_module.Thing"},
        "planted_module.Thing",
        "{class_path: planted_module.Thing}",
        {"class_path": "unimodal.planted_module.Thing"},
        {"class_path": "unimodal.export.os.mkdir", "init_args": {"path": "marker"}},
        {"class_path": "unimodal.training.run.subprocess.Popen", "init_args": {"args": ["mkdir", "marker"]}},
        {"class_path": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("part", ["tokenizer", "generator"])
def test_an_export_imports_and_runs_nothing_foreign(
    part: str, value: object, export: Path, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "marker"
    (tmp_path / "planted_module.py").write_text(f"import os\nos.mkdir({str(marker)!r})\nclass Thing: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    edit(export / "config.json", lambda record: record.get("init_args", record).update({part: value}))
    refused(*draw(export, tmp_path / "out"), names="export: ", absent=tmp_path / "out")
    assert not marker.exists()
    assert "planted_module" not in sys.modules


# ---- pictures and prompts


def test_what_is_no_image_is_named(run: Path, tmp_path: Path, refused: Refused) -> None:
    describe = ["describe", "--run", run]
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "empty.png").touch()
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:60])
    for name, said in (("text.png", ""), ("empty.png", "empty"), ("half.png", ""), ("none.png", "none.png")):
        refused(*describe, tmp_path / name, names=(name, said))
    refused(*describe, tmp_path, names=str(tmp_path))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "I;16", "CMYK"])
def test_every_ordinary_image_mode_is_read(
    mode: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / ("picture.tif" if mode == "CMYK" else "picture.png")
    if mode == "I;16":
        Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000).save(path)
    else:
        Image.new(mode, (8, 8)).save(path)
    assert Image.open(path).mode == mode
    assert main(["describe", "--run", str(run), str(path), "--max-tokens", "2"]) == 0
    assert capsys.readouterr().err == "(ema weights)\n"


def test_prompts_that_are_none(run: Path, tmp_path: Path, refused: Refused) -> None:
    out = tmp_path / "out"
    image = ["generate", "image", "--run", run, "--out", out]
    document = ["generate", "document", "--run", run, "--out", out]
    refused(*image, "--prompt", "", names="prompt", absent=out)
    refused(*image, "--prompt", " \t", names="prompt", absent=out)
    refused(*document, "--prompt", "", names="prompt", absent=out)
    refused(*image, "--prompts", tmp_path / "none.txt", names="none.txt", absent=out)
    (tmp_path / "empty.txt").touch()
    refused(*image, "--prompts", tmp_path / "empty.txt", names="empty.txt", absent=out)
    (tmp_path / "gap.txt").write_text("a handwritten six\n\na handwritten two\n")
    refused(*image, "--prompts", tmp_path / "gap.txt", names=("prompt", "line 2"), absent=out)
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    refused(*image, "--prompts", tmp_path / "bytes.txt", names="bytes.txt", absent=out)
    refused(*document, "--prompt", tmp_path / "none.md", names="none.md", absent=out)
    (tmp_path / "empty.md").write_text("  \n")
    refused(*document, "--prompt", tmp_path / "empty.md", names="empty", absent=out)
    (tmp_path / "link.md").write_text("two ![](missing.png) plus")
    refused(*document, "--prompt", tmp_path / "link.md", names="missing.png", absent=out)


def test_more_than_the_context_holds(run: Path, tmp_path: Path, refused: Refused) -> None:
    out = tmp_path / "out"
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "many.md").write_text("![](a.png)\n" * 60)
    line = refused(
        "generate", "document", "--run", run, "--prompt", tmp_path / "many.md", "--out", out,
        names=("context_length 192", "tokens"), absent=out,
    )  # fmt: skip
    assert next(int(word) for word in line.split() if word.isdigit() and word != "0") > 192
    refused(*draw(run, out)[:4], "--prompt", "long " * 200, "--out", out, names="192", absent=out)


def test_settings_that_the_recipe_does_not_have(
    run: Path, autoregressive: Path, tmp_path: Path, refused: Refused
) -> None:
    out = tmp_path / "out"
    refused(*draw(run, out, "--size", "16x8"), names=("16x8", "8x8"), absent=out)
    refused(*draw(run, out, "--size", "big"), names="big", absent=out)
    refused(*draw(run, out, "--top-k", "3"), names="top_k", absent=out)
    refused(*draw(run, out, "--steps", "0"), names="steps", absent=out)
    refused(*draw(run, out, "--solver", "heun", "--steps", "20"), names="steps", absent=out)
    refused(*draw(run, out, "--shift", "-1"), names="shift", absent=out)
    refused(*draw(run, out, "--set", "renorm"), names=("--set", "NAME=VALUE", "renorm"), absent=out)
    refused(*draw(run, out, "--set", "renorm=some"), names=("renorm", "none or channel or global", "some"), absent=out)
    refused(*draw(run, out, "--set", "interval=[0, x]"), names=("interval", "a finite number", "x"), absent=out)
    refused(*draw(run, out, "--set", "steps=2.5"), names=("steps", "a whole number", "2.5"), absent=out)
    refused(*draw(run, out, "--set", "steps=null"), names=("steps", "a whole number", "None"), absent=out)
    twice = [*draw(run, out, "--set", "steps=2"), "--steps", "3"]
    refused(*twice, names=("--set", "steps", "once", "twice"), absent=out)
    refused(*draw(run, out, "--set", "colour=red"), names=("colour", "renorm"), absent=out)
    refused(*draw(run, out, "--image-guidance", "2"), names=("image_guidance", "have no images"), absent=out)
    refused(*draw(run, out, "-n", "0"), names="-n", absent=out)
    refused(*draw(run, out, "--batch", "0"), names="--batch", absent=out)
    refused(*draw(run, out, "--device", "abacus"), names="abacus", absent=out)
    refused(*draw(run, out, "--weights", "raw")[:3], run / "export", *draw(run, out, "--weights", "raw")[4:],
            names="last.ckpt", absent=out)  # fmt: skip
    refused(*draw(autoregressive, out, "--steps", "3"), names="steps", absent=out)
    refused(*draw(autoregressive, out, "--guidance", "2"), names=("guidance", "drop_text"), absent=out)
    refused(*draw(autoregressive, out, "--temperature", "-1"), names="temperature", absent=out)
    refused("evaluate", "digits", "--run", run, "--out", out, "--size", "8x8", names="--size", absent=out)


def test_what_cannot_be_inpainted(run: Path, tmp_path: Path, refused: Refused) -> None:
    out = tmp_path / "out"
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    Image.new("L", (8, 16)).save(tmp_path / "tall.png")
    Image.new("RGB", (16, 16)).save(tmp_path / "big.png")
    a, tall, big = (str(tmp_path / name) for name in ("a.png", "tall.png", "big.png"))
    refused(*draw(run, out, "--inpaint", a), names="--redraw", absent=out)
    refused(*draw(run, out, "--redraw", a), names="--inpaint", absent=out)
    refused(*draw(run, out, "--inpaint", a, "--redraw", tall), names=("redraw", "8x8", "8x16"), absent=out)
    refused(*draw(run, out, "--inpaint", big, "--redraw", big), names=("inpaint", "8x8", "16x16"), absent=out)
    refused(
        "generate", "document", "--run", run, "--prompt", "six", "--out", out, "--stop", "", names="stop", absent=out
    )


def test_out_must_be_a_folder(run: Path, tmp_path: Path, refused: Refused) -> None:
    out = tmp_path / "out"
    out.write_text("mine")
    refused(*draw(run, out), names=str(out))
    refused("generate", "document", "--run", run, "--prompt", "six", "--out", out, names=str(out))
    refused("evaluate", "digits", "--run", run, "--out", out, names=str(out))
    assert out.read_text() == "mine"


def test_compiling_without_a_compiler_is_refused(
    run: Path, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unimodal.export.can_compile", lambda: (False, "no C++ compiler"))
    args = "generate", "image", "--run", run, "--prompt", "a", "--out", tmp_path / "o", "--compile"
    refused(*args, names="--compile: this machine cannot, it has no C++ compiler", absent=tmp_path / "o")
