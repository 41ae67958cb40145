"""Files that carry code, or are damaged: refused in one line."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from experiments.faults.items import happened
from experiments.faults.processes import WHOLE, fit, undisturbed
from experiments.faults.runs import RUN, Ended, Process
from experiments.faults.table import Row

PAYLOAD = Path("payload")


class Payload:
    """Makes a file when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(PAYLOAD),)


def refusal(name: str, fault: str, ended: Ended, *words: str) -> Row:
    """A command that was refused, and ran nothing."""
    message = ended.line("unimodal:", *words)
    ok = ended.clean and ended.code == 2 and bool(message) and not PAYLOAD.exists()
    done = "refused with exit code 2; the code in it did not run" if not PAYLOAD.exists() else "the code in it RAN"
    return Row(name, fault, happened(ended, done), "nothing", message, ok)


def pickled() -> Row:
    """A checkpoint that brings code."""
    undisturbed()
    checkpoint = torch.load(WHOLE / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    torch.save({**checkpoint, "more": Payload()}, "evil.ckpt")
    ended = Process(fit("--ckpt_path", "evil.ckpt"), RUN).end()
    assert not PAYLOAD.exists()
    torch.load("evil.ckpt", weights_only=False)  # a control: this is what the command must not do
    assert PAYLOAD.is_dir()
    PAYLOAD.rmdir()
    return refusal(
        "a checkpoint with code in it", "a `.ckpt` whose pickle makes a folder when it is read", ended, "evil.ckpt"
    )


def weights_only() -> Row:
    """The switch that would let a checkpoint's code run."""
    ended = Process(fit("--weights_only", "false"), RUN).end()
    return refusal(
        "weights_only false",
        "`--weights_only false`, Lightning's switch for pickled checkpoints",
        ended,
        "weights_only",
    )


def exported() -> Path:
    """An export of an undisturbed run."""
    undisturbed()
    shutil.copytree(WHOLE / "run" / "export", "export")
    return Path("export")


def draw(folder: Path) -> Ended:
    """Use an export."""
    return Process(["generate", "image", "--run", str(folder), "--prompt", "a", "--out", "drawn"], RUN).end()


def truncated_export() -> Row:
    """Weights that were copied in part."""
    weights = exported() / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    return refusal("a truncated export", "half of `model.safetensors` is missing", draw(Path("export")), "truncated")


def foreign_class() -> Row:
    """An export that names a class of another package."""
    path = exported() / "config.json"
    config = json.loads(path.read_text())
    config["init_args"]["tokenizer"] = {
        "class_path": "subprocess.Popen",
        "init_args": {"args": ["mkdir", str(PAYLOAD)]},
    }
    path.write_text(json.dumps(config))
    ended = draw(Path("export"))
    return refusal(
        "an export of a foreign class", "`class_path: subprocess.Popen` in its `config.json`", ended, "class_path"
    )


ROWS: dict[str, Callable[[], Row]] = {
    "a checkpoint with code in it": pickled,
    "weights_only false": weights_only,
    "a truncated export": truncated_export,
    "an export of a foreign class": foreign_class,
}
