"""What a number depends on, written down beside it."""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from unimodal.decoding_settings import DecodingSettings
from unimodal.documents import Part
from unimodal.evaluation.benchmark import Benchmark, Item
from unimodal.evaluation.lazy_images import LazyImage
from unimodal.export import read_info
from unimodal.files import file_sha256

_LIBRARIES = (
    "unimodal", "torch", "torchvision", "transformers", "timm", "open_clip_torch", "torchmetrics", "torch-fidelity",
    "pillow", "numpy", "scipy",
)  # fmt: skip


def items_sha256(items: list[Item]) -> str:
    """SHA-256 of what is asked: names, tasks, texts, truths, choices, and images by pixels or by their files' digests."""
    digest = hashlib.sha256()
    for item in items:
        parts = [part.text if part.is_text else _digest(part) for part in item.prompt.parts]
        record = [item.id, item.task, parts, dict(item.truth), list(item.choices)]
        digest.update(json.dumps(record, sort_keys=True, ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()


def _digest(part: Part) -> str:
    """Stands for an image; images of large sets are not read for it."""
    return part.digest if isinstance(part, LazyImage) else hashlib.sha256(part.image.tobytes()).hexdigest()


def benchmark_record(benchmark: Benchmark, items: list[Item]) -> dict[str, Any]:
    """What was asked and how it is judged."""
    return {
        "name": benchmark.name,
        "version": benchmark.version,
        "items": len(items),
        "samples": benchmark.samples,
        "items_sha256": items_sha256(items),
        **benchmark.spec(),
    }


def model_record(run: Path, weights: str) -> dict[str, Any]:
    """Which model: its recipe, commit, and the hash of the weights that were used."""
    folder = run if (run / "export.json").is_file() else run / "export"
    info = read_info(folder)
    file = run / "checkpoints" / "last.ckpt" if weights == "raw" else folder / "model.safetensors"
    # An export's may be raw too, whatever was asked for: a run without an average has no others.
    used = "raw" if weights == "raw" else info.weights
    return {"recipe": info.recipe, "commit": info.commit, "weights": used, "sha256": file_sha256(file)}


def sampling_record(settings: DecodingSettings) -> dict[str, Any]:
    """How answers are drawn and written."""
    return json.loads(json.dumps(asdict(settings)))  # tuples as they come back from a file


def versions() -> dict[str, str]:
    """Libraries that scores may depend on; those not installed are left out."""
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
