"""Features for FID from PNG files against the bare network on images that lie ready."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from experiments.benchmarks.cases import Case, Settings, relative
from experiments.benchmarks.results import Result
from experiments.benchmarks.timing import interleave
from unimodal.evaluation.image_files import ImageFiles, Loading, feature_batches, image_paths
from unimodal.metrics.inception import EmptyInception, InceptionFeatures, TensorFlowResize
from unimodal.metrics.moments import StreamingMoments

SIDE, BATCH = 256, 32


@contextmanager
def network_and_files(count: int) -> Iterator[tuple[InceptionFeatures, list[Path]]]:
    """Inception with random weights, and PNG files that compress about as photographs do."""
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    with TemporaryDirectory() as name:
        folder = Path(name)
        torch.save(EmptyInception().state_dict(), folder / "inception.pth")
        (folder / "images").mkdir()
        for number in range(count):
            ramp = rng.random(3) * np.linspace(0, 1, SIDE)[None, :, None] * np.linspace(0.3, 1, SIDE)[:, None, None]
            image = 200 * ramp + rng.normal(20, 8, (SIDE, SIDE, 3))
            Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(folder / "images" / f"{number:05d}.png")
        yield InceptionFeatures(folder / "inception.pth", TensorFlowResize()), image_paths(folder / "images")


def fid_features(settings: Settings) -> Result:
    """Images a second of the whole way, files to moments, over those of the network alone."""
    count = settings.size(256 if settings.device == "cpu" else 4096, 4)
    batch = settings.size(BATCH, 2)
    with network_and_files(count) as (features, paths):
        features.to(settings.device)
        ready = torch.stack([features.prepare(Image.open(path)) for path in paths]).to(settings.device).split(batch)
        loading = Loading(batch, device=settings.device)

        def bare() -> list[Tensor]:
            with torch.no_grad():
                return [features(pixels) for pixels in ready]

        def pipeline() -> StreamingMoments:
            moments = StreamingMoments(features.width, settings.device)
            for found in feature_batches(ImageFiles(paths, features.preparation), features, loading, "bench"):
                moments.update(found)
            return moments

        candidates: dict[str, Callable[[], object]] = {"bare": bare, "pipeline": pipeline}
        times = interleave(candidates, min(settings.repeats, 4), warmup=1, wait=settings.wait)
        moments = pipeline()
        error = relative(moments.sum / moments.count, torch.cat(bare()).double().mean(0))
    ours, peer = times["pipeline"], times["bare"]
    return Result(
        name="", value=peer.best / ours.best, unit="", value_median=peer.median / ours.median,
        peer="the network alone", correct=error, tolerance=1e-4,
        note=f"{count} images of {SIDE} pixels, {loading.processes} workers, their start included",
        extra={"images_a_second": count / ours.best, "bare_images_a_second": count / peer.best},
    ).timed(ours, peer)  # fmt: skip


CASES: dict[str, Case] = {"fid_features": fid_features}
