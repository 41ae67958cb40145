"""The console script: finds the command, and imports nothing else before it is known."""

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from unimodal.processes import joined_processes, launched

LIGHTNING = {
    "fit": "train a recipe: a model or a tokenizer",
    "validate": "held-out losses and samples of a checkpoint",
    "test": "held-out losses of a checkpoint",
    "predict": "held-out prompts continued by a checkpoint",
}
LIGHTNING_HELP = """usage: unimodal {command} -c FILE.yaml [-c FILE.yaml ...] [--KEY VALUE ...]

{what}

  -c FILE.yaml                    recipe; later files and options override earlier ones
  --trainer.KEY VALUE             Lightning Trainer: max_steps, precision, accelerator, devices, accumulate_grad_batches,
                                  gradient_clip_val, val_check_interval, default_root_dir (the run folder) ...
  --model.KEY VALUE               lr, muon_lr, warmup_steps, schedule, weight_decay, betas, ema_decay, init, init_from,
                                  freeze, tokenizer_weights, vision_weights, compile, checkpoint_layers, and below
                                  --model.model.: tokenizer, generator, backbone, sequence, vision
  --data.KEY VALUE                batch_tokens, mixture (digits), weights and root (folder) ...
  --checkpoint.KEY VALUE          every_n_train_steps, keep_last, monitor, mode
  --watch.wandb PROJECT           log to Weights & Biases too
  --nonfinite.max_skipped N       steps in a row with a loss or gradient that is not finite before the run ends (10)
  --seed_everything N             one seed for everything
  --init EXPORT                   start from the weights of an export
  --ckpt_path PATH|last           continue exactly from a checkpoint
  --plan                          (fit) print size, memory and time of the run, estimated, and exit
  --print_config                  print the resolved config and exit
  --help-all                      every key with its type (slow: imports everything)
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 2 and one line when an argument is wrong."""
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        # Training has launchers of its own: Lightning's.
        with joined_processes() if args[:1] in (["generate"], ["evaluate"]) and launched() else nullcontext():
            return _dispatch(args)
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as error:
        if os.environ.get("UNIMODAL_TRACEBACK"):
            raise
        print(f"unimodal: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _dispatch(args: list[str]) -> int:
    command = args[0] if args else "--help"
    if command in LIGHTNING:
        rest = args[1:]
        if not rest or "-h" in rest or "--help" in rest:
            print(LIGHTNING_HELP.format(command=command, what=LIGHTNING[command]))
            return 0
        from unimodal.training.lightning_cli import run

        return run([command, *("--help" if arg == "--help-all" else arg for arg in rest)])
    if command == "evaluate" and args[1:2] != ["digits"]:
        if not args[1:] or args[1] in ("-h", "--help"):
            from unimodal.evaluation.registry import help_text

            print(help_text())
            return 0
        from unimodal.evaluation.command import main as evaluate

        return evaluate(args[1:])
    parsed = _parser().parse_args(args or ["--help"])
    from unimodal import commands

    return getattr(commands, parsed.run)(parsed)


class _OneLine(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        raise ValueError(f"{self.prog.removeprefix('unimodal').strip()}: {message}".removeprefix(": "))


def _parser() -> argparse.ArgumentParser:
    parser = _OneLine("unimodal", description="Understand and generate text and images in one transformer.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, what in LIGHTNING.items():
        commands.add_parser(name, help=what, add_help=False)
    generate = commands.add_parser("generate", help="images or interleaved documents")
    kinds = generate.add_subparsers(metavar="image|document", required=True)
    image = kinds.add_parser("image", help="images from prompts")
    _add_model(image)
    source = image.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", metavar="TEXT", help="what to draw")
    source.add_argument("--prompts", metavar="FILE", type=Path, help="a text file, one prompt a line")
    image.add_argument("-n", type=int, default=1, help="images a prompt (1)")
    image.add_argument("--out", type=Path, required=True, help="folder for PNGs and images.jsonl")
    image.add_argument("--batch", type=int, default=64, help="images drawn at once (64); changes no image")
    image.add_argument("--inpaint", metavar="IMAGE", type=Path, help="an image that is given in part ...")
    image.add_argument("--redraw", metavar="MASK", type=Path, help="... and where it is drawn: what is not black")
    image.add_argument("--negative", metavar="TEXT", default="", help="words to be led away from, by guidance")
    _add_image_sampling(image)
    image.set_defaults(run="generate_image")
    document = kinds.add_parser("document", help="a document of text and images, continued")
    _add_model(document)
    document.add_argument("--prompt", required=True, metavar="FILE.md|TEXT", help="Markdown with image links, or text")
    document.add_argument("--out", type=Path, required=True, help="folder for document.md, its images, document.html")
    document.add_argument("--start", choices=("text", "image"), default="text", help="what comes first (text)")
    document.add_argument("--stop", metavar="TEXT", action="append", default=[], help="end before it; repeatable")
    document.add_argument("--max-tokens", type=int, default=128, help="most text tokens (128)")
    document.add_argument("--max-images", type=int, default=4, help="most images (4)")
    document.add_argument("--text-temperature", type=float, default=0.0, help="0: the likeliest word (0)")
    document.add_argument("--text-top-k", type=int, default=0, help="words among the likeliest so many; 0: all (0)")
    document.add_argument("--text-top-p", type=float, default=1.0, help="... that have that share of the odds (1)")
    document.add_argument(
        "--negative", metavar="TEXT", default="", help="words to be led away from, by guidance of images"
    )
    _add_image_sampling(document)
    document.set_defaults(run="generate_document")
    describe = commands.add_parser("describe", help="text about an image")
    _add_model(describe)
    describe.add_argument("image", type=Path, help="an image file")
    describe.add_argument("--max-tokens", type=int, default=64, help="most text tokens (64)")
    describe.set_defaults(run="describe")
    evaluate = commands.add_parser("evaluate", help="scores")
    names = evaluate.add_subparsers(metavar="digits", required=True)
    digits = names.add_parser("digits", help="drawn, read and added up digits, judged by a classifier")
    _add_model(digits)
    digits.add_argument("--out", type=Path, required=True, help="folder for scores.json, samples.png, index.html")
    digits.add_argument("--batch", type=int, default=100, help="documents at once (100); changes no score")
    _add_image_sampling(digits)
    digits.set_defaults(run="evaluate_digits")
    _add_tokenize(commands)
    _add_importers(commands)
    consolidate = commands.add_parser("consolidate", help="the export of a run that was sharded, or stopped")
    consolidate.add_argument("folder", metavar="RUN", type=Path, help="run folder; its export/ is written")
    consolidate.add_argument("--checkpoint", type=Path, help="another than RUN/checkpoints/last.ckpt")
    consolidate.add_argument("--weights", choices=("ema", "raw"), default="ema", help="averaged, or of the step (ema)")
    consolidate.set_defaults(run="consolidate_run")
    data = commands.add_parser("data", help="look at training data before training on it")
    check = data.add_subparsers(metavar="check", required=True).add_parser(
        "check", help="counts, sizes, lengths, tokens, what is broken, and documents as the model sees them"
    )
    check.add_argument("paths", metavar="PATH", nargs="*", help="folders, .tar, .parquet, .jsonl or .json files")
    check.add_argument(
        "--config", metavar="RECIPE", type=Path, action="append", default=[],
        help="tokens under this recipe; repeatable; without PATH, the sources it names",
    )  # fmt: skip
    check.add_argument("--sample", metavar="N", type=int, help="documents read of each source (all)")
    check.add_argument("--documents", metavar="N", type=int, default=3, help="documents drawn of each source (3)")
    check.add_argument("--out", type=Path, default=Path("out/data-check"), help="folder for index.html, broken.txt")
    check.set_defaults(run="check_data")
    return parser


def _add_tokenize(commands: "argparse._SubParsersAction[_OneLine]") -> None:
    tokenize = commands.add_parser("tokenize", help="token files that training reads instead of images")
    tokenize.add_argument("--tokenizer", type=Path, required=True, help="run folder, or an export, of the tokenizer")
    tokenize.add_argument("--data", type=Path, required=True, metavar="DIR|YAML", help="a folder, or a data block")
    tokenize.add_argument("--out", type=Path, required=True, help="folder of token files; given again, it is completed")
    tokenize.add_argument(
        "--size", metavar="WxH", action="append", required=True, help="of the images, as in sequence.image_sizes; repeatable"
    )  # fmt: skip
    tokenize.add_argument(
        "--weights", choices=("ema", "raw"), default="ema", help="averaged, or of the last step (ema)"
    )
    tokenize.add_argument("--seed", type=_seed, default=0, help="of what sources draw (0)")
    tokenize.add_argument("--per-shard", type=int, default=4096, help="documents of each source in a shard (4096)")
    tokenize.add_argument("--batch", type=int, default=64, help="images encoded at once (64)")
    tokenize.add_argument("--workers", type=int, default=1, help="processes (1)")
    tokenize.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ... (auto)")
    tokenize.add_argument(
        "--most-broken",
        type=float,
        default=0.01,
        help="share of documents that may be unreadable; they are named (0.01)",
    )
    tokenize.set_defaults(run="tokenize")


def _add_importers(commands: "argparse._SubParsersAction[_OneLine]") -> None:
    importer = commands.add_parser("import", help="text models and tokenizers of others; GenEval's detector")
    sources = importer.add_subparsers(metavar="hf|tokenizer|mask2former", required=True)
    tokenizer = sources.add_parser("tokenizer", help="a tokenizer that is not trained here, as an export")
    tokenizer.add_argument(
        "source", metavar="DIR|hub:NAME|YAML", help="published weights, or class_path and init_args of any tokenizer"
    )
    tokenizer.add_argument("--out", type=Path, required=True, help="new folder that --tokenizer reads")
    tokenizer.set_defaults(run="import_tokenizer")
    detector = sources.add_parser("mask2former", help="GenEval's detector, from mmdetection's checkpoint")
    detector.add_argument("checkpoint", type=Path, help="mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco_...pth")
    detector.add_argument("--out", type=Path, required=True, help="new folder that --detector reads")
    detector.set_defaults(run="import_mask2former")
    hf = sources.add_parser("hf", help="the backbone block of a recipe for a Llama, Qwen2 or Qwen3 folder")
    hf.add_argument("folder", type=Path, help="config.json, model.safetensors (or shards), tokenizer.json")
    hf.add_argument(
        "--positions", choices=("sequential", "block", "mrope", "rope2d"), default="sequential",
        help="of images; text is read alike under each (sequential)",
    )  # fmt: skip
    hf.set_defaults(run="import_hf")
    exporter = commands.add_parser("export", help="a trained expert as a text model of others")
    hf = exporter.add_subparsers(metavar="hf", required=True).add_parser("hf", help="a folder that transformers loads")
    hf.add_argument("--run", dest="folder", type=Path, required=True, help="run folder, or an export")
    hf.add_argument("--out", type=Path, required=True, help="new folder")
    hf.add_argument("--expert", default="text", help="whose weights (text)")
    hf.add_argument("--weights", choices=("ema", "raw"), default="ema", help="averaged, or of the last step (ema)")
    hf.add_argument("--added", action="store_true", help="keep the rows of backbone.added_tokens")
    hf.set_defaults(run="export_hf")


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", dest="folder", type=Path, required=True, help="run folder, or an export")
    parser.add_argument("--weights", choices=("ema", "raw"), default="ema", help="averaged, or of the last step (ema)")
    parser.add_argument("--seed", type=_seed, default=0, help="(0)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ... (auto)")
    parser.add_argument("--compile", action="store_true", help="compile the network first: pays for many documents")


def _add_image_sampling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", metavar="WxH", help="of drawn images, where the recipe allows it")
    group = parser.add_argument_group(
        "image sampling", "the recipe's own where not given; each as its generator has it"
    )
    group.add_argument("--guidance", type=float, help="1: conditional")
    group.add_argument("--image-guidance", type=float, help="the same of the prompt's images")
    group.add_argument("--steps", type=int, help="network evaluations")
    group.add_argument("--solver", help="euler, heun, ddim, or a scheduler of diffusers by class name")
    group.add_argument("--shift", type=float, help="above 1: more steps near the noise")
    group.add_argument("--temperature", type=float, help="of image tokens")
    group.add_argument("--top-k", type=int, help="of image tokens")
    group.add_argument("--top-p", type=float, help="of image tokens")
    group.add_argument("--set", metavar="NAME=VALUE", action="append", default=[], help="any other; repeatable")


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 to 2^63 - 1, got {text}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
