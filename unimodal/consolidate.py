"""An export from a checkpoint: of a sharded run, which leaves none, and of a run that was stopped."""

from pathlib import Path
from typing import Any, Literal

import yaml

from unimodal.export import KINDS, ExportInfo, build, load_weights, read_checkpoint, save_export
from unimodal.model import UnifiedModel
from unimodal.text import TextTokenizer


def consolidate(run: Path, checkpoint: Path | None = None, weights: Literal["ema", "raw"] = "ema") -> Path:
    """Write `export/` of a run folder from its last checkpoint, in one process that has room for the weights twice.

    Args:
        run: with the `config.yaml` that `fit` wrote.
        checkpoint: another one.
        weights: averaged, or of the last step.

    Returns:
        The export's folder.

    Raises:
        ValueError: a file is missing or damaged, or the checkpoint is of another model.
    """
    path = checkpoint or run / "checkpoints" / "last.ckpt"
    kind, config = _built_from(run / "config.yaml")
    names = read_checkpoint(path, "meta").get("callbacks", {}).get("EMA", {}).get("shadow", {})
    averaged = names if weights == "ema" else {}

    def wanted(place: tuple[str | int, ...]) -> bool:  # what the average has is not read twice
        return place[0] == "callbacks" if averaged.keys() & {place[-1]} else place[0] == "state_dict"

    found = read_checkpoint(path, wanted=wanted)
    if not {"state_dict", "callbacks"} <= set(found):
        raise ValueError(f"checkpoint: expected one of a training, got {path}, which holds something else")
    tensors = dict(found["state_dict"])
    if weights == "ema":
        if "EMA" not in found["callbacks"]:
            raise ValueError(f"weights: {path} has no moving average; ask for raw")
        tensors |= found["callbacks"]["EMA"]["shadow"]
    module = build(config, kind)
    own = {name.removeprefix(f"{kind}."): t for name, t in tensors.items() if name.startswith(f"{kind}.")}
    load_weights(module, own, str(path))
    if isinstance(module, UnifiedModel):
        module.text = TextTokenizer.from_json(found["text_tokenizer"])
    origin = found["callbacks"].get("RunFolder", {})
    info = ExportInfo(kind, weights, origin.get("recipe", run.name), origin.get("commit", "unknown"))
    save_export(run / "export", module, config, info)
    return run / "export"


def _built_from(path: Path) -> tuple[str, dict[str, Any]]:
    """What was trained, and the config it was built from."""
    if not path.is_file():
        raise ValueError(f"run: expected a run folder of fit, got {path.parent}, which has no {path.name}")
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))["model"]["init_args"]
        kind = next(kind for kind in KINDS if kind in settings)
        return kind, settings[kind]
    except (yaml.YAMLError, UnicodeDecodeError, LookupError, TypeError, StopIteration) as error:
        raise ValueError(f"run: {path} is not what fit wrote ({type(error).__name__})") from error
