"""Benchmarks by name. Only the one that is asked for is imported."""

from pydoc import locate

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
}
"""Name -> class and what it scores."""


def benchmark_class(name: str) -> type[Benchmark]:
    """The class behind a name."""
    if name not in BENCHMARKS:
        raise ValueError(f"evaluate: expected one of {', '.join(BENCHMARKS)}, got {name}")
    found = locate(BENCHMARKS[name][0])
    assert isinstance(found, type)
    assert issubclass(found, Benchmark)
    return found
