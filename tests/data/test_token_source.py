"""Token files as a source: mixed with pixels, read shard by shard, and what is broken in them skipped and named."""

import json
import logging
import os
import pickle
import re
import shutil
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from data_formats import img2dataset, picture
from safetensors.numpy import load_file, save

from unimodal.cli import main
from unimodal.data import MixtureData, TarSource, TokenData, TokenSource
from unimodal.data.broken import BrokenItems
from unimodal.data.mixture import Entry
from unimodal.data.source import BrokenDocument, Stored, whole
from unimodal.data.token_files import HELD, Plan, ShardWriter, SourceRecord, shard_name
from unimodal.documents import Document, Part, write_jsonl
from unimodal.export import ExportInfo, save_export
from unimodal.files import write_atomically
from unimodal.image_sizes import NativeSizes
from unimodal.model import UnifiedModel
from unimodal.packing import SequencedDocument, pack, to_tensor
from unimodal.sequence_rules import SequenceRules
from unimodal.stored import StoredImage, tokenizer_fingerprint
from unimodal.tokenize import tokenize
from unimodal.training.scores import captioned_images
from unimodal_tokenizers import PatchTokenizer
from unimodal_tokenizers.base import Grid, ImageTokens, TokenLayout

ROOT = Path(__file__).parents[2]
RNG = np.random.default_rng(0)
LAYOUT = TokenLayout("discrete", dim=4, stride=2, codebooks=(16,))
KINDS = ("drawn", "described")


def write_files(root: Path, shards: int, each: int, kinds: tuple[str, ...] = KINDS) -> Path:
    """Token files whose documents say who they are, "KIND NUMBER", with one image of 4 x 4 pixels or two."""
    held = {"train": [SourceRecord(kind, 1.0, shards * each) for kind in kinds], "val": []}
    made = {"fingerprint": "f" * 64, "class": "X", "recipe": "x"}
    write_atomically(root / "plan.json", json.dumps(Plan(made, LAYOUT, [[4, 4]], {}, 0, each, held).to_json()).encode())
    for k in range(shards):
        writer = ShardWriter(LAYOUT)
        for kind in kinds:
            writer.begin_source()
            for number in range(k * each, (k + 1) * each):
                first, count = len(writer.values), 1 + number % 2
                parts = (Part(f"{kind} {number}", learn=False), *[Part(picture(0, 4, 4))] * count)
                writer.add_document(Document(parts, kind), range(first, first + count))
                for i in range(count):
                    writer.add_image(ImageTokens(torch.full((4,), (number + i) % 16), (Grid(2, 2),)), (4, 4))
        writer.write(root / shard_name("train", k))
    counts = {shard_name("train", k): [each] * len(kinds) for k in range(shards)}
    write_atomically(root / "index.json", json.dumps({"counts": counts}).encode())
    write_atomically(root / "corpus.jsonl", b'"text"\n')
    write_jsonl(root / "prompts.jsonl", [Document((Part(f"{kind} {i}"),), kind) for kind in kinds for i in range(2)])
    return root


def texts(source: TokenSource) -> list[str]:
    return [source.document(i, RNG).text for i in range(len(source))]


# ---- packs of both


def as_tokens(model: UnifiedModel, document: Document, chosen: Callable[[int], bool]) -> Document:
    """The document with some of its images encoded beforehand, as `unimodal tokenize` does."""
    parts: list[Part] = []
    for number, part in enumerate(document.parts):
        if part.is_image and chosen(number):
            pixels = model.sequencer.fit(part.image)
            tokens = model.tokenizer.encode(to_tensor([pixels]))
            parts.append(StoredImage(tokens, (pixels.shape[0], pixels.shape[1]), part.learn, part.role))
        else:
            parts.append(part)
    return Document(tuple(parts), document.kind)


def losses_and_gradients(
    model: UnifiedModel, documents: list[Document]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    held: list[SequencedDocument] = [model.sequencer.document(d, (0, i)) for i, d in enumerate(documents)]
    model.zero_grad()
    losses = model(pack(held, model.backbone.config.experts, model.generator.reads))
    sum(term.sum for term in losses.values()).backward()  # type: ignore[union-attr]
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {name: term.sum.detach() for name, term in losses.items()}, gradients


def test_a_pack_of_tokens_and_pixels_is_one_of_pixels(model: UnifiedModel, mixed: list[Document]) -> None:
    """Loss for loss and gradient for gradient, whichever images of a pack, or of a document, are tokens."""
    which: dict[str, Callable[[int, int], bool]] = {
        "some documents": lambda d, part: d % 2 == 0,
        "some images of a document": lambda d, part: part % 4 == 0,
        "all": lambda d, part: True,
    }
    if model.sequence.context != "clean":
        with pytest.raises(ValueError, match=r"sequence\.context: expected clean with images stored as tokens"):
            losses_and_gradients(model, [as_tokens(model, d, lambda part: True) for d in mixed])
        return
    losses, gradients = losses_and_gradients(model, mixed)
    assert gradients
    for name, chosen in which.items():
        documents = [as_tokens(model, d, lambda p, i=i, c=chosen: c(i, p)) for i, d in enumerate(mixed)]
        stored = [isinstance(part, StoredImage) for document in documents for part in document.parts if part.is_image]
        assert any(stored)
        assert all(stored) == (name == "all")
        found = losses_and_gradients(model, documents)
        torch.testing.assert_close(found[0], losses, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        torch.testing.assert_close(found[1], gradients, rtol=2e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_stored_images_travel_between_processes_as_bytes() -> None:
    """A tensor would be an open file in each process for as long as its document waits."""
    values = {"ids": torch.arange(4), "vectors": torch.randn(4, 3)}
    images = [StoredImage(ImageTokens(value, (Grid(2, 2),)), (8, 8), True, "r") for value in values.values()] * 20
    before = len(os.listdir("/proc/self/fd"))
    found = pickle.loads(ForkingPickler.dumps(images))
    assert len(os.listdir("/proc/self/fd")) == before
    assert found == images
    assert [image.tokens.values.dtype for image in found[:2]] == [torch.int64, torch.float32]


# ---- one source


def test_a_folder_is_one_source_of_all_its_documents_or_of_one_kind(tmp_path: Path) -> None:
    root = write_files(tmp_path, shards=3, each=4)
    everything, one = TokenSource(root), TokenSource(root, kind="described")
    assert sorted(texts(everything)) == sorted(f"{kind} {i}" for kind in KINDS for i in range(12))
    assert texts(one) == [f"described {i}" for i in range(12)]
    assert (everything.kind, one.kind, len(TokenSource(root, "val"))) == ("document", "described", 0)
    two = everything.document(1, RNG)
    assert [int(part.tokens.values[0]) for part in two.parts if isinstance(part, StoredImage)] == [1, 2]
    assert [document.text for document in everything.prompts()] == ["drawn 0", "described 0", "drawn 1", "described 1"]
    assert [document.text for document in one.prompts()] == ["described 0", "described 1"]
    assert texts(pickle.loads(pickle.dumps(everything))) == texts(everything)
    for arguments, said in (
        ((root, "train", "x"), "kind: expected one of drawn, described, got 'x'"),
        ((root.parent / "no",), "root: expected a folder that `unimodal tokenize` wrote"),
    ):
        with pytest.raises(ValueError, match=said):
            TokenSource(*arguments)
    with pytest.raises(IndexError, match="index: expected 0 to 23, got 24"):
        everything.document(24, RNG)


def test_shards_are_read_near_each_other_and_few_are_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards, each = 40, 3
    source = TokenSource(write_files(tmp_path, shards, each))
    order = source.order(0, np.random.default_rng(1))
    assert sorted(order) == list(range(len(source)))
    assert not np.array_equal(order, source.order(0, np.random.default_rng(2)))
    at = order // (each * len(KINDS))
    live = [len({k for k in range(shards) if (at[:i] == k).any() and (at[i:] == k).any()}) for i in range(len(at))]
    assert max(live) <= 8
    for index in order:
        source.document(int(index), RNG)
        assert len(source._shards) <= HELD
    small = TokenSource(write_files(tmp_path / "small", 8, 3))
    assert np.array_equal(small.order(0, np.random.default_rng(1)), np.random.default_rng(1).permutation(len(small)))


def test_no_file_stays_open(tmp_path: Path) -> None:
    source = TokenSource(write_files(tmp_path, 5, 3))
    before = {link.resolve() for link in Path("/proc/self/fd").iterdir()}
    held = texts(source)
    assert len(held) == 30
    opened = {link.resolve() for link in Path("/proc/self/fd").iterdir()} - before
    assert not any(path.suffix == ".safetensors" for path in opened)
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


# ---- what is broken


def rewrite(path: Path, **changed: Callable[[np.ndarray], np.ndarray]) -> None:
    """Some arrays of a shard, changed."""
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        metadata = file.metadata()
    arrays = {name: changed.get(name, np.array)(array.copy()) for name, array in load_file(path).items()}
    path.write_bytes(save(arrays, metadata))


def one_value(value: int, at: int = 0) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        array.reshape(-1)[at] = value
        return array

    return change


DAMAGES: dict[str, Callable[[Path], object]] = {
    "vanished": lambda path: path.unlink(),
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-10]),
    "empty": lambda path: path.write_bytes(b""),
    "another file": lambda path: path.write_bytes(b"\xff" * 4000),
    "a header of terabytes": lambda path: path.write_bytes((2**44).to_bytes(8, "little") + b"{" * 4000),
    "a header that is no JSON": lambda path: path.write_bytes(path.read_bytes()[:8] + b"\x00" * 4000),
    "of other documents": lambda path: shutil.copy(path.parent / "one" / path.name, path),
    "an unknown id": lambda path: rewrite(path, tokens=one_value(16)),
    "bytes in a document": lambda path: rewrite(path, documents=one_value(0xFF, at=3)),
    "where an image begins": lambda path: rewrite(path, token_starts=one_value(10_000, at=1)),
    "where a document begins": lambda path: rewrite(path, document_starts=one_value(-1)),
    "a grid": lambda path: rewrite(path, grids=one_value(7)),
    "a size": lambda path: rewrite(path, sizes=one_value(8)),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("opened", [False, True])
def test_what_is_damaged_is_skipped_and_the_rest_is_read(damage: str, opened: bool, tmp_path: Path) -> None:
    """Also when it happens while the source is being read."""
    root = write_files(tmp_path, shards=3, each=4)
    write_files(tmp_path / "one", shards=3, each=2)
    source, path = TokenSource(root), root / shard_name("train", 1)
    whole_texts = texts(source) if opened else None
    if opened and damage not in ("vanished", "cut off", "empty"):
        source._shards.clear()
    DAMAGES[damage](path)
    read, broken = [], []
    for index in range(len(source)):
        try:
            read.append(source.document(index, RNG).text)
        except BrokenDocument as error:
            broken.append((index, error))
    assert broken
    assert all(8 <= index < 16 for index, _ in broken)
    assert all(str(path) in error.name for _, error in broken)
    assert all("\n" not in str(error) for _, error in broken)
    assert len(read) + len(broken) == 24
    if whole_texts is not None:
        assert read == [text for i, text in enumerate(whole_texts) if i not in dict(broken)]
    if damage in ("an unknown id", "bytes in a document", "a grid", "a size"):
        assert len(broken) == 1  # of the others nothing is lost


def test_above_the_share_the_run_stops(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = TokenSource(write_files(tmp_path, shards=10, each=4))
    (tmp_path / shard_name("train", 3)).unlink()

    def read(broken: BrokenItems) -> None:
        for index in range(len(source)):
            try:
                source.document(index, RNG)
            except BrokenDocument as error:
                broken.add("tokens", index, error)

    kept = BrokenItems(0.1, {"tokens": len(source)})
    with caplog.at_level(logging.WARNING):
        read(kept)
    assert kept.skipped == {"tokens": 8}
    assert caplog.text.count("skipped") == 1
    assert "train-00003.safetensors" in caplog.text
    with pytest.raises(ValueError, match=r"data: tokens: .* more than data\.broken_share 0\.09; .*train-00003"):
        read(BrokenItems(0.09, {"tokens": len(source)}))


# ---- beside other sources


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs in tars, and the token files of other pairs, made by the tokenizer of digits_mot_flow."""
    folder = tmp_path_factory.mktemp("mixture")
    torch.manual_seed(0)
    setting = {"class_path": "unimodal_tokenizers.PatchTokenizer", "init_args": {"patch": 4, "colours": 1}}
    save_export(folder / "patch", PatchTokenizer(4, 1), setting, ExportInfo("tokenizer", "raw", "patch", "unknown"))
    for name, shards in (("pairs", 3), ("made", 6)):
        img2dataset(folder / name, shards=shards)
    data = {"class_path": "unimodal.data.TarSource", "init_args": {"paths": str(folder / "made")}}
    sources = {"one": {"source": data}, "other": {"source": data}}
    config = {"class_path": "unimodal.data.MixtureData", "init_args": {"batch_tokens": 1, "sources": sources}}
    (folder / "data.yaml").write_text(yaml.safe_dump({"data": config}))
    tokenize(folder / "patch", folder / "data.yaml", folder / "tokens", [(8, 8)], per_shard=8, device="cpu")
    return folder


def config(folder: Path) -> dict[str, Any]:
    sources = {
        "tokens": {
            "source": {"class_path": "unimodal.data.TokenSource", "init_args": {"root": str(folder / "tokens")}}
        },
        "pairs": {"source": {"class_path": "unimodal.data.TarSource", "init_args": {"paths": str(folder / "pairs")}}},
    }
    settings = {"batch_tokens": 192, "sources": sources, "validation_documents": 4, "prompts": 1, "broken_share": 0.5}
    return {"data": {"class_path": "unimodal.data.MixtureData", "init_args": settings}}


def fit(root: Path, settings: dict[str, Any], *options: str) -> int:
    (root / "data.yaml").write_text(yaml.safe_dump(settings))
    tiny = {"width": 32, "depth": 1, "heads": 2, "kv_heads": 2, "mlp_width": 32}
    small = [x for name, value in tiny.items() for x in (f"--model.model.backbone.{name}", str(value))]
    quick = ["--trainer.accelerator", "cpu", "--trainer.precision", "32-true", "--trainer.enable_progress_bar", "false"]
    recipe = ["-c", str(ROOT / "lightning_configs" / "models" / "digits_mot_flow.yaml"), "-c", str(root / "data.yaml")]
    return main(["fit", *recipe, *small, *quick, "--trainer.default_root_dir", str(root / "run"), *options])


def test_tokens_and_pixels_train_together_though_a_shard_is_gone(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("tokens", "pairs"):
        shutil.copytree(folder / name, tmp_path / name)
    (tmp_path / "tokens" / "train-00000.safetensors").unlink()
    settings = config(tmp_path)
    steps = ["--trainer.max_steps", "4", "--trainer.val_check_interval", "4"]
    with caplog.at_level(logging.WARNING):
        assert fit(tmp_path, settings, *steps) == 0
    assert caplog.text.count("data: tokens: skipped") == 1
    assert "train-00000.safetensors" in caplog.text
    assert list((tmp_path / "run" / "samples").glob("step_000004.*"))  # prompts of tokens have their pixels


def test_what_does_not_fit_the_model_is_one_line_before_training(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(tmp_path, config(folder), "--model.model.tokenizer.patch", "2", "--trainer.max_steps", "1") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search("data: tokens: root: .* holds tokens of another tokenizer than model.tokenizer", line), line
    assert not (tmp_path / "run").exists()


def test_a_mixture_says_which_part_is_tokens(tmp_path: Path) -> None:
    source = TokenSource(write_files(tmp_path, 3, 4))
    data = MixtureData(192, {"mine": Entry(source)})
    (training,), (held,) = data.training_sources(), data.validation_sources()
    assert not isinstance(training.source, Stored)
    assert whole(training.source) is whole(held) is source
    assert [document.kind for document in data.prompts()] == ["mine"] * 4
    assert [document.kind for document in TokenData(tmp_path, 192).prompts()] == []  # nothing was held out


def test_a_check_of_data_asks_for_what_the_tokens_were_made_of(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from unimodal.data.check import examine

    with pytest.raises(ValueError, match="mine: expected documents with pixels, got token files"):
        examine("mine", TokenSource(folder / "tokens"), None, None, 0)


def test_metrics_of_images_compare_with_pixels_that_can_be_read(folder: Path, tmp_path: Path) -> None:
    tokens, pairs = TokenSource(folder / "tokens"), TarSource(str(img2dataset(tmp_path / "pairs")))
    (tmp_path / "pairs" / "00001.tar").unlink()
    held = {"tokens": Entry(tokens), "pairs": Entry(pairs)}
    found = captioned_images(MixtureData(192, {"tokens": Entry(tokens)}, held))
    assert [document.text for _, document in found] == [f"shade {i}" for i in range(4)]
    with pytest.raises(
        ValueError, match=r"model\.image_metrics: expected held-out documents of a text and pixels, got none"
    ):
        captioned_images(MixtureData(192, {"tokens": Entry(tokens)}))


def test_rules_are_asked_as_a_whole(folder: Path) -> None:
    """A size that no image has yet is refused before training, not when the first one comes."""
    source, fingerprint = TokenSource(folder / "tokens"), tokenizer_fingerprint(PatchTokenizer(4, 1))
    source.check(fingerprint, SequenceRules([(4, 8), (8, 8)], 64))
    for rules, said in (
        (SequenceRules([(4, 8)], 64), r"sequence\.image_sizes: expected \[8, 8\], which images are stored of"),
        (SequenceRules([(8, 8)], 64, native=NativeSizes(4, 4)), r"sequence\.native: expected none"),
        (SequenceRules([(8, 8)], 64, context="both"), r"sequence\.context: expected clean"),
    ):
        with pytest.raises(ValueError, match=said):
            source.check(fingerprint, rules)
