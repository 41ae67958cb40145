"""What the commands that use a trained model do: read arguments, call the rooms, write files."""

import argparse
import json
import shutil
import sys
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import yaml
from PIL import Image
from tqdm import tqdm

from unimodal import processes
from unimodal.decoding import decode, stream
from unimodal.decoding_settings import DecodingSettings, Inpaint
from unimodal.documents import GENERATED, Document, Part, read_markdown, write_html, write_markdown
from unimodal.export import ExportInfo, instantiate, load_run, open_model, save_export
from unimodal.files import read_yaml
from unimodal.images import load_image
from unimodal.model import UnifiedModel
from unimodal.sampling import overridden
from unimodal.text import SPECIAL_TOKENS, TextTokenizer


def generate_image(args: argparse.Namespace) -> int:
    """`unimodal generate image`: PNGs, and images.jsonl that says how each was made."""
    prompts = [args.prompt] if args.prompts is None else _lines(args.prompts)
    for number, prompt in enumerate(prompts, start=1):
        if not prompt.strip():
            raise ValueError(f"prompt: expected text, got an empty one{f' in line {number}' if args.prompts else ''}")
    for name, value in (("-n", args.n), ("--batch", args.batch)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    model = _model(args)
    image = overridden(model.generator.sampling, vars(args))
    if image.image_guidance != model.generator.sampling.image_guidance:
        raise ValueError(
            f"image_guidance: expected none, as these prompts have no images (those of `generate document` may), "
            f"got {image.image_guidance}"
        )
    image = image.override(image_guidance=1.0)  # what is done, and recorded
    settings = DecodingSettings(
        "image", max_tokens=0, max_images=1, image=image, size=_size(args.size), negative=args.negative
    )
    given = _inpaint(args.inpaint, args.redraw)
    asked = {"size": args.size, "inpaint": args.inpaint, "redraw": args.redraw, "negative": args.negative or None}
    asked = {name: str(value) for name, value in asked.items() if value is not None}
    jobs = [(prompt, args.seed + i) for prompt in prompts for i in range(args.n)]
    here = processes.current()

    def draw(batch: Sequence[tuple[str, int]]) -> list[Image.Image]:
        documents = [Document((Part(prompt, learn=False),)) for prompt, _ in batch]
        drawn = decode(model, documents, settings, [seed for _, seed in batch], [given] * len(batch))
        return [document.parts[-1].image for document in drawn]

    drawn = here.in_order(jobs, args.batch, draw)
    if not here.main:
        deque(drawn, maxlen=0)  # draws this process' share
        return 0
    with _folder(args.out) as out, (out / "images.jsonl").open("w") as log:
        bar = tqdm(drawn, total=len(jobs), unit="image", leave=False, disable=None)
        for number, ((prompt, seed), drawing) in enumerate(bar):
            name = f"{number:05d}.png"
            drawing.save(out / name)
            record = {"image": name, "prompt": prompt, "seed": seed, "weights": args.weights, **asked}
            record |= asdict(image)
            log.write(json.dumps(record, ensure_ascii=False) + "\n")
    print(f"{len(jobs)} images in {args.out} ({args.weights} weights)")
    return 0


def generate_document(args: argparse.Namespace) -> int:
    """`unimodal generate document`: document.md with its images, and document.html."""
    if not processes.current().alone():  # one document is written from its beginning to its end
        return 0
    prompt = _read_prompt(args.prompt)
    model = _model(args)
    settings = DecodingSettings(
        args.start, max_tokens=args.max_tokens, max_images=args.max_images,
        temperature=args.text_temperature, top_k=args.text_top_k, top_p=args.text_top_p,
        image=overridden(model.generator.sampling, vars(args)), size=_size(args.size), stop=tuple(args.stop),
        negative=args.negative,
    )  # fmt: skip
    parts: list[Part] = []
    for piece in stream(model, [prompt], settings, [args.seed]):
        print(piece.text or "[image]", end="", flush=True)
        if piece.image is not None:
            parts.append(Part(piece.image, role=GENERATED))
        elif parts and parts[-1].is_text:
            parts[-1] = Part(parts[-1].text + piece.text, role=GENERATED)
        else:
            parts.append(Part(piece.text, role=GENERATED))
    document = Document((*prompt.parts, *parts), prompt.kind)
    with _folder(args.out) as out:
        write_markdown(document, out / "document.md")
        write_html([document], out / "document.html", "Generated document")
        record = {"seed": args.seed, "weights": args.weights, **asdict(settings)}
        (out / "settings.json").write_text(json.dumps(record, indent=2) + "\n")
    print(f"\n{args.out / 'document.html'} ({args.weights} weights)")
    return 0


def describe(args: argparse.Namespace) -> int:
    """`unimodal describe`: text about an image, on standard output."""
    image = load_image(args.image)
    model = _model(args)
    settings = DecodingSettings(max_tokens=args.max_tokens, max_images=0)
    (document,) = decode(model, [Document((Part(image, learn=False),))], settings, [args.seed])
    print("".join(part.text for part in document.parts if part.is_text))
    print(f"({args.weights} weights)", file=sys.stderr)
    return 0


def evaluate_digits(args: argparse.Namespace) -> int:
    """`unimodal evaluate digits`: scores.json, samples.png, index.html and a table on the terminal."""
    from unimodal.evaluation.digits import evaluate_digits as evaluate
    from unimodal.evaluation.run import describe_run, merged_metrics

    if args.size is not None:
        raise ValueError("--size: the judge reads the recipe's own size, expected none")
    model = _model(args)
    description, seconds = describe_run(args.folder, model)
    main = processes.current().main
    evaluate(
        model, args.out, seed=args.seed, batch=args.batch, weights=args.weights,
        sampling=overridden(model.generator.sampling, vars(args)),
        train_seconds=seconds, description=description,
        metrics=merged_metrics(args.folder, args.out / "metrics.csv") if main else None,
    )  # fmt: skip
    return 0


def tokenize(args: argparse.Namespace) -> int:
    """`unimodal tokenize`: shards of tokens with an index, or what is missing of them."""
    from unimodal.tokenize import tokenize as write

    sizes = [size for text in args.size if (size := _size(text)) is not None]
    index = write(
        args.tokenizer, args.data, args.out, sizes, weights=args.weights, seed=args.seed, per_shard=args.per_shard,
        batch=args.batch, workers=args.workers, device=args.device, most_broken=args.most_broken,
    )  # fmt: skip
    for what in index["broken"][:20]:
        print(f"left out: {what}", file=sys.stderr)
    if len(index["broken"]) > 20:
        print(f"and {len(index['broken']) - 20} more, in {args.out / 'index.json'}", file=sys.stderr)
    print(
        f"{index['documents']} documents, {index['images']} images, {index['tokens']} tokens in {args.out}; "
        f"{len(index['broken'])} documents left out"
    )
    return 0


def import_hf(args: argparse.Namespace) -> int:
    """`unimodal import hf`: the backbone of a recipe that begins as a folder's text model, on standard output."""
    from unimodal.importers.huggingface import check_text
    from unimodal.importers.huggingface_config import KEYS, read_config

    config = read_config(args.folder, positions=args.positions, added_tokens=SPECIAL_TOKENS)
    check_text(config, args.folder)
    entries = TextTokenizer.load(args.folder / "tokenizer.json").entries
    if entries > config.vocabulary:
        raise ValueError(f"tokenizer.json: expected at most vocab_size {config.vocabulary} entries, got {entries}")
    record = {name: value for name, value in asdict(config).items() if name in KEYS and value is not None}
    if config.rope_scaling is not None:
        unset = {field.name: field.default for field in fields(config.rope_scaling)}
        stretch = asdict(config.rope_scaling)
        record["rope_scaling"] = {name: value for name, value in stretch.items() if value != unset[name]}
    lines = yaml.safe_dump(record, sort_keys=False).splitlines()
    lines += [
        f"added_tokens: {SPECIAL_TOKENS} # rows of the special tokens, so that those of the vocabulary can stay as they are",
        f"positions: {config.positions} # sequential, block, mrope or rope2d: text is read alike",
        "experts: {attention: true, mlp: true, norms: true} # each begins as this text model",
    ]
    print("\n".join(["backbone:", *(f"  {line}" for line in lines)]))
    return 0


def import_mask2former(args: argparse.Namespace) -> int:
    """`unimodal import mask2former`: GenEval's detector as config.json and model.safetensors."""
    from unimodal.importers.mmdet import convert_checkpoint

    convert_checkpoint(args.checkpoint, args.out)
    print(f"detector in {args.out}: unimodal evaluate geneval --detector {args.out} ...")
    return 0


def import_tokenizer(args: argparse.Namespace) -> int:
    """`unimodal import tokenizer`: an export of a tokenizer of published weights, or of one that has none."""
    from unimodal.training.run import git_commit

    if args.out.exists():
        raise ValueError(f"--out: expected a new folder, got {args.out}, which exists")
    config: Any = {"class_path": "unimodal_tokenizers.from_pretrained", "init_args": {"source": args.source}}
    if args.source.endswith((".yaml", ".yml")):
        config = read_yaml(Path(args.source), "source")
        if not isinstance(config, dict) or set(config) - {"class_path", "init_args"} or "class_path" not in config:
            raise ValueError(f"source: expected class_path and init_args of a tokenizer in {args.source}, got others")
    module = instantiate(config, "tokenizer", f"source: {args.source}")
    save_export(args.out, module, config, ExportInfo("tokenizer", "raw", Path(args.source).stem, git_commit()))
    print(f"{type(module).__name__} in {args.out}: unimodal tokenize --tokenizer {args.out} ...")
    return 0


def export_hf(args: argparse.Namespace) -> int:
    """`unimodal export hf`: one expert of a trained model as a folder that transformers loads."""
    from unimodal.importers.huggingface import save_text

    model = load_run(args.folder, args.weights)
    save_text(
        model.backbone, args.out, args.expert, added=args.added, context_length=model.sequence.context_length,
        tokenizer=model.text,
    )  # fmt: skip
    print(f"expert {args.expert} in {args.out} ({args.weights} weights)")
    return 0


def consolidate_run(args: argparse.Namespace) -> int:
    """`unimodal consolidate`: the export of a run, from a checkpoint."""
    from unimodal.consolidate import consolidate

    folder = consolidate(args.folder, args.checkpoint, args.weights)
    print(f"{folder} ({args.weights} weights)")
    return 0


def check_data(args: argparse.Namespace) -> int:
    """`unimodal data check`: a report on standard output, index.html and broken.txt."""
    from unimodal.data.check import examine, open_path, read_recipe, report
    from unimodal.data.check_page import write_page

    for name in ("sample", "documents"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name}: expected at least 1, got {value}")
    recipe = read_recipe(args.config) if args.config else None
    sources = {path: open_path(path) for path in args.paths} or (recipe.sources if recipe else {})
    if not sources:
        raise ValueError("PATH: expected files or folders, or a recipe that names data.init_args.sources, got none")
    model = None if recipe is None else recipe.model
    if model is not None and not model.has_text:
        corpus = (text for source in sources.values() for text in source.corpus())
        model.text = TextTokenizer.train(corpus, model.backbone.config.vocabulary)
    limit = None if model is None else model.sequence.context_length
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="backslashreplace") as broken:
        found = [
            examine(name, source, model, args.sample, args.documents, broken=broken) for name, source in sources.items()
        ]
        for one in found:
            print(report(one, limit))
        broken.seek(0)
        with _folder(args.out) as out, (out / "broken.txt").open("w", encoding="utf-8") as file:
            write_page(out / "index.html", found, model)
            shutil.copyfileobj(broken, file)
    print(f"{args.out / 'index.html'}")
    return 0


def _model(args: argparse.Namespace) -> UnifiedModel:
    return open_model(args.folder, args.weights, processes.current().device(args.device), args.compile)


def _inpaint(image: Path | None, redraw: Path | None) -> Inpaint | None:
    if (image is None) != (redraw is None):
        raise ValueError(f"--{'redraw' if redraw is None else 'inpaint'}: expected one beside the other, got none")
    return None if image is None or redraw is None else Inpaint(load_image(image), load_image(redraw))


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    width, _, height = text.partition("x")
    if not (width.isdigit() and height.isdigit()):
        raise ValueError(f"--size: expected WIDTHxHEIGHT such as 32x24, got {text}")
    return int(height), int(width)


def _read_prompt(text: str) -> Document:
    """A Markdown file when it names one, text otherwise."""
    if text.endswith(".md"):
        path = Path(text)
        document = read_markdown(_text("--prompt", path), path.parent)
    else:
        document = read_markdown(text, Path())
    if not any(part.is_image or part.text.strip() for part in document.parts):
        raise ValueError("--prompt: expected text or images, got an empty one")
    return document


def _lines(path: Path) -> list[str]:
    lines = _text("--prompts", path).splitlines()
    if not lines:
        raise ValueError(f"--prompts: {path} holds no prompt")
    return lines


def _text(option: str, path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"{option}: {path} does not exist")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{option}: {path} is no text in UTF-8") from error


@contextmanager
def _folder(out: Path) -> Iterator[Path]:
    """A folder that is filled beside `out` and moved into it when all is written: nothing half-written."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out: expected a folder, got {out}, which is a file")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".writing-") as temporary:
        yield Path(temporary)
        out.mkdir(exist_ok=True)
        for path in sorted(Path(temporary).iterdir()):
            target = out / path.name
            if target.is_dir():
                shutil.rmtree(target)
            path.replace(target)
