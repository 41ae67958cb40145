"""Token files: what is written is read and trained on as the images would be; nothing is lost, doubled or mixed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from published_cases import autoencoder_kl
from safetensors.torch import load_file

from unimodal.cli import main
from unimodal.data.folder import FolderSource
from unimodal.data.token_files import Shard, TokenFiles
from unimodal.documents import Part
from unimodal.export import ExportInfo, build, check_makes, load_tokenizer, save_export
from unimodal.images import fit_image
from unimodal.packing import to_tensor
from unimodal.stored import StoredImage, tokenizer_fingerprint
from unimodal.training import UnifiedTraining
from unimodal_tokenizers import CodecTokenizer, GridTokenizer, MultiscaleVQ, PatchTokenizer, SequenceTokenizer
from unimodal_tokenizers.base import Grid, ImageTokenizer, ImageTokens, TokenLayout
from unimodal_tokenizers.quantizers import FSQ

ROOT = Path(__file__).parents[2]
QUANTIZER = {"class_path": "unimodal_tokenizers.quantizers.VectorQuantizer", "init_args": {"entries": 16, "dim": 4}}
TOKENIZERS: dict[str, dict[str, Any]] = {
    "vq": {
        "class_path": "unimodal_tokenizers.GridTokenizer",
        "init_args": {"quantizer": QUANTIZER, "channels": [8, 8], "blocks": 1},
    },
    "multiscale": {
        "class_path": "unimodal_tokenizers.MultiscaleVQ",
        "init_args": {"codebook": 16, "dim": 4, "channels": [8, 8], "blocks": 1, "scales": [1, 2, 4]},
    },
    "patch": {"class_path": "unimodal_tokenizers.PatchTokenizer", "init_args": {"patch": 2, "colours": 3}},
}
RECIPES = {"vq": "digits_vq_ar", "patch": "digits_mot_flow"}
BACKBONE = "{width: 32, depth: 1, heads: 2, kv_heads: 1, mlp_width: 48, vocabulary: 300}"


def export(folder: Path, name: str, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    tokenizer = build(TOKENIZERS[name], "tokenizer")
    for parameter in tokenizer.parameters():  # a fresh codebook may be a single point
        torch.nn.init.normal_(parameter, std=0.3)
    save_export(folder, tokenizer, TOKENIZERS[name], ExportInfo("tokenizer", "raw", f"{name}{seed}", "unknown"))
    return folder


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("exports")
    return {name: export(root / name, name) for name in TOKENIZERS}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Captioned pictures of two shapes."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(11):
        array = rng.integers(0, 256, (9, 9 + 8 * (i % 2), 3), dtype=np.uint8)
        Image.fromarray(array).save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(f"picture {i}")
    return folder


def tokenize(tokenizer: Path, data: Path, out: Path, *options: object) -> int:
    given = [
        "--tokenizer",
        tokenizer,
        "--data",
        data,
        "--out",
        out,
        "--size",
        "8x8",
        "--size",
        "16x8",
        "--per-shard",
        4,
    ]
    return main([str(a) for a in ["tokenize", *given, "--batch", 3, "--device", "cpu", *options]])


def everything(root: Path) -> dict[str, Any]:
    """All that token files say, shard by shard."""
    found: dict[str, Any] = {path.name: load_file(path) for path in sorted(root.glob("*.safetensors"))}
    for name in ("plan.json", "index.json", "corpus.jsonl", "prompts.jsonl"):
        found[name] = (root / name).read_text()
    return found


def same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        if isinstance(value, str):
            assert value == b[name], name
        else:
            assert all(torch.equal(tensor, b[name][key]) for key, tensor in value.items()), name


@pytest.mark.parametrize("name", TOKENIZERS)
def test_every_document_is_read_as_its_images_are_encoded(
    name: str, exports: dict[str, Path], pictures: Path, tmp_path: Path
) -> None:
    assert tokenize(exports[name], pictures, tmp_path / "out") == 0
    files, tokenizer = TokenFiles(tmp_path / "out"), load_tokenizer(exports[name])
    for split in ("train", "val"):
        for source in files.sources(split):
            original = FolderSource(pictures, split, source.kind)  # type: ignore[arg-type]
            assert len(source) == len(original)
            for index in reversed(range(len(source))):
                rng = np.random.default_rng(0)
                read, expected = source.document(index, rng), original.document(index, rng)
                assert read.kind == expected.kind
                for part, other in zip(read.parts, expected.parts, strict=True):
                    assert (part.learn, part.is_text) == (other.learn, other.is_text)
                    if isinstance(part, StoredImage):
                        pixels = fit_image(other.image, [(8, 8), (8, 16)])
                        tokens = tokenizer.encode(to_tensor([pixels]))
                        assert part.tokens.grids == tokens.grids
                        assert part.size == pixels.shape[:2]
                        torch.testing.assert_close(part.tokens.values, tokens.values, rtol=1e-5, atol=1e-6)
                        with pytest.raises(ValueError, match="stored as tokens"):
                            part.image  # noqa: B018
                    else:
                        assert part.text == other.text
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert (index["documents"], index["images"]) == (22, 11)  # drawn and described, encoded once
    assert list(files.corpus()) == 2 * list(FolderSource(pictures, "train").corpus())


@pytest.mark.parametrize("name", RECIPES)
def test_training_from_tokens_is_training_from_images(
    name: str, exports: dict[str, Path], pictures: Path, tmp_path: Path
) -> None:
    """Loss for loss, in training and in validation, with a stop on the way."""
    assert tokenize(exports[name], pictures, tmp_path / "tokens") == 0
    weights = f"tokenizer_weights: {exports[name]}" if name == "vq" else ""
    sampler = "drop_text: 0.2"
    (tmp_path / "tiny.yaml").write_text(f"""
model:
  init_args:
    model:
      init_args:
        tokenizer: {json.dumps(TOKENIZERS[name])}
        backbone: {BACKBONE}
        sequence: {{image_sizes: [[8, 8], [8, 16]], context_length: 192, {sampler}}}
    warmup_steps: 1
    {weights}
trainer: {{max_steps: 6, val_check_interval: 6, precision: 32-true, accelerator: cpu, enable_progress_bar: false}}
""")
    seen: dict[str, list[float]] = {}
    logged: dict[str, dict[str, float]] = {}
    original = UnifiedTraining.training_step

    def run(key: str, folder: Path, data: dict[str, Any], *options: str) -> None:
        (tmp_path / f"{key}.yaml").write_text(yaml.safe_dump({"data": data}))

        def step(self: Any, batch: Any, batch_idx: int) -> Any:
            loss = original(self, batch, batch_idx)
            seen.setdefault(key, []).append(float(loss))
            assert (batch.stored is None) == (not key.startswith("tokens"))
            return loss

        end = UnifiedTraining.on_validation_epoch_end

        def validated(self: Any) -> None:
            end(self)
            found = {k: float(v) for k, v in self.trainer.callback_metrics.items() if k.startswith("val/")}
            logged.setdefault(key, {}).update(found)

        recipe = ROOT / "lightning_configs" / "models" / f"{RECIPES[name]}.yaml"
        files = ["-c", str(recipe), "-c", str(tmp_path / "tiny.yaml"), "-c", str(tmp_path / f"{key}.yaml")]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(UnifiedTraining, "training_step", step)
            patch.setattr(UnifiedTraining, "on_validation_epoch_end", validated)
            assert main(["fit", *files, "--trainer.default_root_dir", str(folder), *options]) == 0

    shared = {"batch_tokens": 192, "validation_documents": 3, "prompts": 1}
    images = {"class_path": "unimodal.data.FolderData", "init_args": {"root": str(pictures), **shared}}
    tokens = {"class_path": "unimodal.data.TokenData", "init_args": {"root": str(tmp_path / "tokens"), **shared}}
    run("images", tmp_path / "images", images)
    run("tokens", tmp_path / "run", tokens)
    assert len(seen["images"]) == 6
    torch.testing.assert_close(torch.tensor(seen["tokens"]), torch.tensor(seen["images"]), rtol=1e-6, atol=1e-6)
    assert len([key for key in logged["images"] if "/" in key]) >= 3
    assert logged["tokens"] == pytest.approx(logged["images"], rel=1e-5)


@pytest.mark.slow
def test_one_process_and_two_write_the_same(exports: dict[str, Path], pictures: Path, tmp_path: Path) -> None:
    assert tokenize(exports["vq"], pictures, tmp_path / "one") == 0
    assert tokenize(exports["vq"], pictures, tmp_path / "two", "--workers", 2) == 0
    same(everything(tmp_path / "one"), everything(tmp_path / "two"))


def test_what_was_killed_goes_on_with_nothing_lost_or_doubled(
    exports: dict[str, Path], pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert tokenize(exports["vq"], pictures, whole) == 0
    shutil.copytree(whole, out)
    # As kill -9 leaves it: some shards, a file half written under another name, no index.
    for name in ("index.json", "corpus.jsonl", "prompts.jsonl", "train-00001.safetensors"):
        (out / name).unlink()
    (out / ".train-00001.safetensors.123.tmp").write_bytes(b"half")
    kept = (out / "train-00000.safetensors").stat().st_mtime_ns
    with pytest.raises(ValueError, match="is not finished; run the same"):
        TokenFiles(out)
    assert tokenize(exports["vq"], pictures, out) == 0
    same(everything(whole), everything(out))
    assert (out / "train-00000.safetensors").stat().st_mtime_ns == kept
    assert not list(out.glob(".*"))


KILLED = """
import sys, time
import torch
torch.set_num_threads(1)
from unimodal import tokenize
write = tokenize.Writer.write
def slowly(self, split, k):
    write(self, split, k)
    time.sleep(0.5)
tokenize.Writer.write = slowly
from unimodal.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_process_that_is_killed_is_gone_on_with(exports: dict[str, Path], pictures: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    given = ["--size", "8x8", "--size", "16x8", "--per-shard", 1, "--device", "cpu"]
    assert tokenize(exports["vq"], pictures, whole, "--per-shard", 1, "--batch", 64) == 0
    command = ["tokenize", "--tokenizer", exports["vq"], "--data", pictures, "--out", out, *given]
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, *map(str, command)], env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    deadline = time.monotonic() + 120
    while len(list(out.glob("*.safetensors"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -9
    done = {path.name: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    assert 3 <= len(done) < len(list(whole.glob("*.safetensors")))
    assert tokenize(exports["vq"], pictures, out, "--per-shard", 1, "--batch", 64) == 0
    same(everything(whole), everything(out))
    assert {name: (out / name).stat().st_mtime_ns for name in done} == done


# ---- what is refused


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., None]:
    def check(*arguments: Any, names: str) -> None:
        capsys.readouterr()
        assert tokenize(*arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert names in line, line

    return check


def test_two_tokenizers_and_two_data_are_not_mixed(
    exports: dict[str, Path], pictures: Path, tmp_path: Path, refused: Callable[..., None]
) -> None:
    out, other = tmp_path / "out", export(tmp_path / "other", "vq", seed=1)
    assert tokenize(exports["vq"], pictures, out) == 0
    before = everything(out)
    refused(other, pictures, out, names="holds tokens of another tokenizer (vq0")
    refused(exports["vq"], pictures, out, "--size", "8x16", names="holds tokens made with image_sizes")
    refused(exports["vq"], pictures, out, "--seed", 1, names="holds tokens made with seed 0, got 1")
    same(everything(out), before)
    changed = (
        shutil.copytree(pictures, tmp_path / "changed") / "00.png"
    )  # one of other bytes: as many documents as before
    Image.new("RGB", (8, 8), "red").save(changed)
    refused(exports["vq"], changed.parent, out, names="holds tokens made with")
    assert tokenize(exports["vq"], changed.parent, tmp_path / "here") == 0
    (changed.parent / "00.png").rename(changed.parent / "zz.png")
    (changed.parent / "00.txt").rename(changed.parent / "zz.txt")
    refused(exports["vq"], changed.parent, tmp_path / "here", names="holds tokens made with sources")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("mine")
    refused(exports["vq"], pictures, tmp_path / "full", names="holds other files")


@pytest.mark.parametrize("kind", ["patch", "codec", "kl"])
def test_what_is_not_trained_here_is_imported_tokenized_and_measured(
    kind: str, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Published weights, and tokenizers that have none, are exports like any other."""
    source = tmp_path / "tokenizer.yaml"
    if kind == "kl":
        source = tmp_path / "published"
        autoencoder_kl(source)
    else:
        names = {
            "patch": ("PatchTokenizer", {"patch": 4}),
            "codec": ("CodecTokenizer", {"image": [8, 8], "length": 400}),
        }
        name, options = names[kind]
        source.write_text(yaml.safe_dump({"class_path": f"unimodal_tokenizers.{name}", "init_args": options}))
    assert main(["import", "tokenizer", str(source), "--out", str(tmp_path / "export")]) == 0
    if kind == "kl":
        shutil.rmtree(source)  # an export stands alone
    sizes = ["--size", "8x8", "--batch", "3", "--device", "cpu"]
    given = ["--tokenizer", str(tmp_path / "export"), "--data", str(pictures), "--out", str(tmp_path / "tokens")]
    assert main(["tokenize", *given, *sizes]) == 0
    assert json.loads((tmp_path / "tokens" / "index.json").read_text())["images"] == 22 // 2
    measured = ["--tokenizer", str(tmp_path / "export"), "--images", str(pictures), "--out", str(tmp_path / "scores")]
    assert main(["evaluate", "reconstruction", *measured, "--size", "8x8", "--device", "cpu", "--workers", "0"]) == 0
    psnr = json.loads((tmp_path / "scores" / "summary.json").read_text())["measures"]["psnr"]["value"]
    assert psnr > 60 if kind == "patch" else psnr > 0
    capsys.readouterr()
    assert main(["import", "tokenizer", str(source), "--out", str(tmp_path / "export")]) == 2
    assert "--out: expected a new folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1", "is no YAML"), ("trainer: {}", "expected class_path and init_args of a tokenizer"),
        ("class_path: unimodal_tokenizers.PatchTokenizer", "patch"), ("class_path: os.path.join", "os.path.join"),
    ],
)  # fmt: skip
def test_what_is_no_tokenizer_is_not_imported(
    text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t.yaml").write_text(text)
    assert main(["import", "tokenizer", str(tmp_path / "t.yaml"), "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert not (tmp_path / "out").exists()


def test_a_model_refuses_tokens_that_its_tokenizer_did_not_make(
    exports: dict[str, Path], pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = export(tmp_path / "other", "vq", seed=1)
    assert tokenize(other, pictures, tmp_path / "tokens") == 0
    data = {
        "class_path": "unimodal.data.TokenData",
        "init_args": {"root": str(tmp_path / "tokens"), "batch_tokens": 192},
    }
    config: dict[str, Any] = {
        "model": {"init_args": {"model": {"init_args": {"tokenizer": TOKENIZERS["vq"]}}}},
        "data": data,
    }
    config["model"]["init_args"]["tokenizer_weights"] = str(exports["vq"])
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
    recipe = ROOT / "lightning_configs" / "models" / "digits_vq_ar.yaml"
    capsys.readouterr()
    run = ["--trainer.default_root_dir", str(tmp_path / "run"), "--trainer.accelerator", "cpu"]
    assert main(["fit", "-c", str(recipe), "-c", str(tmp_path / "tiny.yaml"), *run]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "holds tokens of another tokenizer than model.tokenizer (recipe vq1" in line


def test_wrong_arguments_are_one_line(
    exports: dict[str, Path], pictures: Path, tmp_path: Path, refused: Callable[..., None]
) -> None:
    vq, out = exports["vq"], tmp_path / "out"
    refused(tmp_path / "none", pictures, out, names="tokenizer: expected a folder")
    refused(vq, tmp_path / "none", out, names="--data: expected a folder or a YAML file")
    (tmp_path / "empty.yaml").write_text("trainer: {}")
    refused(vq, tmp_path / "empty.yaml", out, names="--data: expected a data block")
    (tmp_path / "wrong.yaml").write_text("data: {class_path: unimodal.data.FolderData, init_args: {rot: x}}")
    refused(vq, tmp_path / "wrong.yaml", out, names="--data:")
    refused(vq, pictures, out, "--size", "9x8", names="multiples of the stride 2")
    refused(vq, pictures, out, "--workers", 0, names="--workers: expected at least 1, got 0")
    refused(vq, pictures, out, "--most-broken", 1, names="--most-broken")
    assert not out.exists()


def test_broken_images_are_left_out_counted_and_named(
    exports: dict[str, Path],
    pictures: Path,
    tmp_path: Path,
    refused: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, out = tmp_path / "pictures", tmp_path / "out"
    shutil.copytree(pictures, folder)
    (folder / "03.png").write_bytes((folder / "03.png").read_bytes()[:100])
    refused(exports["vq"], folder, out, names="03.png: expected a whole image")
    whole = shutil.copytree(
        pictures, tmp_path / "mended"
    )  # shards without 03 are there: it must not be lost in silence
    refused(exports["vq"], whole, out, names="holds tokens made with")
    assert tokenize(exports["vq"], folder, out, "--most-broken", 0.2) == 0
    said = capsys.readouterr()
    assert "2 documents left out" in said.out  # drawn and described
    assert said.err.count("03.png") == 2
    index = json.loads((out / "index.json").read_text())
    assert (index["documents"], index["images"], len(index["broken"])) == (20, 10, 2)
    files = TokenFiles(out)
    texts = [
        source.document(i, np.random.default_rng(0)).text
        for split in ("train", "val") for source in files.sources(split) for i in range(len(source))
    ]  # fmt: skip
    assert sorted(texts) == sorted(2 * [f"picture {i}" for i in range(11) if i != 3])


def test_an_image_that_needs_too_many_tokens_is_left_out(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out, codec = tmp_path / "pictures", tmp_path / "out", tmp_path / "codec"
    shutil.copytree(pictures, folder)  # noise
    for i in range(10):
        Image.new("RGB", (8, 8), (20 * i, 0, 0)).save(folder / f"{i:02d}.png")
    (tmp_path / "codec.yaml").write_text(
        "class_path: unimodal_tokenizers.CodecTokenizer\ninit_args: {image: [8, 8], length: 24, quality: 95}\n"
    )
    assert main(["import", "tokenizer", str(tmp_path / "codec.yaml"), "--out", str(codec)]) == 0
    command = f"tokenize --tokenizer {codec} --data {folder} --out {out} --size 8x8 --most-broken 0.1"
    assert main(command.split()) == 0
    said = capsys.readouterr().err
    assert said.count("expected as many ids as a JPEG of quality 95 has bytes, here ") == 2  # drawn and described
    index = json.loads((out / "index.json").read_text())
    assert (index["documents"], index["images"], len(index["broken"])) == (20, 10, 2)


# ---- the parts


def test_a_fingerprint_is_of_the_weights_and_the_class(exports: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(exports["vq"])
    before = tokenizer_fingerprint(tokenizer)
    assert before == tokenizer_fingerprint(load_tokenizer(exports["vq"]))
    with torch.no_grad():
        next(tokenizer.parameters()).flatten()[0] += 1e-3
    assert tokenizer_fingerprint(tokenizer) != before
    assert tokenizer_fingerprint(PatchTokenizer(2)) != tokenizer_fingerprint(PatchTokenizer(4))


def test_settings_that_no_weight_shows_make_another_tokenizer(tmp_path: Path) -> None:
    """The same names and shapes of weights; other tokens."""
    shape: Any = {"image": (8, 8), "patch": 4, "tokens": 4, "width": 16, "depth": 1}

    def row(levels: list[int], **settings: Any) -> SequenceTokenizer:
        torch.manual_seed(0)
        return SequenceTokenizer(FSQ(levels), **shape, **{"heads": 2, **settings})

    def grid(groups: int) -> GridTokenizer:
        torch.manual_seed(0)
        return GridTokenizer(FSQ([3, 3]), channels=[8], blocks=1, groups=groups)

    pairs: list[tuple[Callable[[], ImageTokenizer], Callable[[], ImageTokenizer], str]] = [
        (lambda: row([8, 6, 5]), lambda: row([5, 6, 8]), "quantizer"),
        (lambda: row([3, 3]), lambda: row([3, 3], causal=True), "tokenizer"),
        (lambda: row([3, 3]), lambda: row([3, 3], heads=4), "encoder"),
        (lambda: grid(2), lambda: grid(4), "encoder"),
        (lambda: CodecTokenizer((8, 8), 200, 25), lambda: CodecTokenizer((8, 8), 200, 90), "tokenizer"),
    ]
    for make, other, where in pairs:
        one, two = make(), other()
        assert tokenizer_fingerprint(one) == tokenizer_fingerprint(make()) != tokenizer_fingerprint(two)
        check_makes(one, make(), "model.tokenizer_weights", tmp_path)
        with pytest.raises(ValueError, match=rf"model\.tokenizer_weights: expected (a )?{where}.* to be .*, .* has "):
            check_makes(one, two, "model.tokenizer_weights", tmp_path)
    scales = [MultiscaleVQ(16, 4, [8], 1, scales=s) for s in ([1, 2, 3, 4], [1, 2, 4, 8])]
    with pytest.raises(ValueError, match=r"expected layout to be TokenLayout\(.*scales=\(1, 2, 3, 4\)"):
        check_makes(scales[0], scales[1], "model.tokenizer_weights", tmp_path)


def test_large_codebooks_and_several_are_kept(tmp_path: Path) -> None:
    from unimodal.data.token_files import ShardWriter
    from unimodal.documents import Document

    for books in ((2**18,), (8, 8), (2**16,)):
        layout = TokenLayout("discrete", dim=4, stride=2, codebooks=books)
        shard = ShardWriter(layout)
        ids = torch.arange(4)[:, None].expand(4, len(books)) + books[0] - 4
        tokens = ImageTokens(ids.contiguous() if len(books) > 1 else ids[:, 0], (Grid(2, 2),))
        shard.begin_source()
        shard.add_document(Document((Part("ü", learn=False), Part(Image.new("RGB", (4, 4)), role="r"))), [0])
        shard.add_image(tokens, (4, 4))
        shard.write(tmp_path / "shard.safetensors")
        read = Shard(tmp_path / "shard.safetensors", layout).document(0, 0)
        assert read.parts == (Part("ü", learn=False), StoredImage(tokens, (4, 4), True, "r"))
