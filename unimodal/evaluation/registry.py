"""Benchmarks by name. Only the one that is asked for is imported."""

from __future__ import annotations

from pydoc import locate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from unimodal.evaluation.benchmark import Benchmark

BENCHMARKS = {
    "geneval": ("unimodal.evaluation.geneval.GenEval", "objects, counts, colours, positions in images, by a detector"),
    "geneval-other-detector": (
        "unimodal.evaluation.geneval.GenEvalOtherDetector",
        "the same with another detector: no GenEval score",
    ),
    "geneval-shapes": ("unimodal.evaluation.shapes.GenEvalShapes", "the same six tasks over rendered shapes, exactly"),
    "shapes-questions": ("unimodal.evaluation.shapes.ShapesQuestions", "questions about rendered shapes"),
    "shapes-captions": ("unimodal.evaluation.shapes.ShapesCaptions", "captions of rendered shapes, read exactly"),
    "shapes-edits": ("unimodal.evaluation.shapes.ShapesEdits", "rendered shapes, changed as told"),
    "shapes-steps": (
        "unimodal.evaluation.interleaved.ShapesSteps",
        "shapes added step by step, text and image in turn",
    ),
    "digits-sums": ("unimodal.evaluation.interleaved.DigitSums", "handwritten digits added, in text and drawn"),
    "images": ("unimodal.evaluation.image_sets.ImageSets", "FID, KID, precision, recall ... of a folder of images"),
    "reconstruction": (
        "unimodal.evaluation.reconstruction.ImageReconstruction",
        "PSNR, SSIM, LPIPS, rFID, codebook usage of a tokenizer",
    ),
    "interleaved": ("unimodal.evaluation.interleaved.Interleaved", "documents of text and images, as asked in a file"),
    "interleavedbench-aspects": (
        "unimodal.evaluation.judged.InterleavedBench",
        "InterleavedBench, judged by a model in words of our own",
    ),
    "opening-aspects": ("unimodal.evaluation.judged.OpenING", "OpenING, likewise"),
    "isg-aspects": ("unimodal.evaluation.isg.ISG", "ISG-Bench, likewise"),
    "vqav2": ("unimodal.evaluation.understanding.VQAv2", "VQAv2 validation"),
    "gqa": ("unimodal.evaluation.understanding.GQA", "GQA"),
    "pope": ("unimodal.evaluation.understanding.POPE", "POPE: objects that are not there"),
    "mme": ("unimodal.evaluation.understanding.MME", "MME"),
    "seed-bench": ("unimodal.evaluation.understanding.SEEDBench", "SEED-Bench, images"),
    "mmbench": ("unimodal.evaluation.understanding.MMBench", "MMBench, every rotation of the options"),
    "captions": ("unimodal.evaluation.understanding.Captions", "CIDEr, BLEU and ROUGE-L of captions"),
    "retrieval": (
        "unimodal.evaluation.retrieval.Retrieval",
        "captions for images and images for captions, by likelihood",
    ),
}
"""Name -> class and what it scores."""

_HELP = """usage: unimodal evaluate NAME --run DIR --out DIR [options]       generate, then score
       unimodal evaluate NAME --images DIR --out DIR [options]    score what any other model made
       unimodal evaluate reconstruction --tokenizer DIR --images DIR --out DIR [options]
       unimodal evaluate digits ...                               the page of the digits recipes
       unimodal evaluate statistics --images DIR --out FILE.npz   reference statistics of a folder of images
       unimodal evaluate compare DIR DIR [--out DIR] [--force]    paired test of two results
       unimodal evaluate published geneval [DIR ...]              scores in print and their sources, below one's own

{names}

unimodal evaluate NAME --help lists a benchmark's options.
"""


def help_text() -> str:
    """What `unimodal evaluate --help` prints."""
    width = max(map(len, BENCHMARKS))
    return _HELP.format(names="\n".join(f"  {name:{width}}  {what}" for name, (_, what) in BENCHMARKS.items()))


def benchmark_class(name: str) -> type[Benchmark]:
    """The class behind a name."""
    if name not in BENCHMARKS:
        names = ", ".join(("digits", "statistics", "compare", "published", *BENCHMARKS))
        raise ValueError(f"evaluate: expected one of {names}, got {name}")
    from unimodal.evaluation.benchmark import Benchmark  # here: --help lists the names and imports nothing heavy

    found = locate(BENCHMARKS[name][0])
    assert isinstance(found, type)
    assert issubclass(found, Benchmark)
    return found
