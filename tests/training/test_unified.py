"""Training of unified models: normalisation, who is trained and how, averages, starts from exports."""

import copy
import csv
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor

from unimodal.backbone.transformer import Backbone, DecoderLayer
from unimodal.cli import main
from unimodal.decoding import decode
from unimodal.decoding_settings import DecodingSettings
from unimodal.documents import Document, Part, read_jsonl
from unimodal.environment import can_compile
from unimodal.export import load_run
from unimodal.model import UnifiedModel
from unimodal.packing import PackedSequence, pack
from unimodal.training import UnifiedTraining
from unimodal.training.ema import EMA

ROOT = Path(__file__).parents[2]
FLOW = ROOT / "lightning_configs" / "models" / "digits_mot_flow.yaml"
VQ = ROOT / "lightning_configs" / "models" / "digits_vq_ar.yaml"
PARALLEL = ROOT / "lightning_configs" / "models" / "digits_emu35_parallel.yaml"
MASKED = ROOT / "lightning_configs" / "models" / "digits_showo_masked.yaml"
TINY = """
model:
  init_args:
    model:
      backbone: {width: 32, depth: 2, heads: 2, kv_heads: 2, mlp_width: 48, vocabulary: 300}
    warmup_steps: 2
    ema_decay: 0.6
data:
  init_args: {batch_tokens: 512, validation_documents: 4, prompts: 1}
trainer: {max_steps: 4, val_check_interval: 100, precision: 32-true, accelerator: cpu, enable_progress_bar: false}
"""
Make = Callable[..., UnifiedModel]


def fit(recipe: Path, folder: Path, *options: str) -> int:
    tiny = folder.parent / "tiny.yaml"
    tiny.write_text(TINY)
    return main(["fit", "-c", str(recipe), "-c", str(tiny), "--trainer.default_root_dir", str(folder), *options])


def checkpoint(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def packed(model: UnifiedModel, documents: Sequence[Document]) -> PackedSequence:
    sequenced = [model.sequencer.document(d, (0, 0, i), train=False) for i, d in enumerate(documents)]
    return pack(sequenced, model.backbone.config.experts, model.generator.reads)


def training(model: UnifiedModel, accumulate: int = 1, **settings: Any) -> UnifiedTraining:
    """The module as a trainer on one device would drive it."""
    module = UnifiedTraining(model, lr=1e-3, **settings)
    module._trainer = SimpleNamespace(  # type: ignore[assignment]
        world_size=1, accumulate_grad_batches=accumulate, log_every_n_steps=1000, max_steps=10, global_step=0
    )
    return module


def gradients(model: UnifiedModel, packs: list[PackedSequence], **settings: Any) -> dict[str, Tensor]:
    """Of one optimizer step over all packs, as Lightning accumulates: each loss divided by their number."""
    module = training(copy.deepcopy(model).double(), len(packs), **settings)
    counts = {name: sum(p.counts[name] for p in packs) for name in ("text", "image")}
    for i, p in enumerate(packs):
        (module.training_step(p.announce(counts), i + 1) / len(packs)).backward()
    return {n: p.grad for n, p in module.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("split", [(0,), (1,), (3,), (0, 1), (0, 2, 3)], ids=str)
def test_two_micro_batches_are_one_step_over_both(model: UnifiedModel, mixed: list[Document], split: tuple) -> None:
    """Also when one of them has no learned image, no text target, or is text only."""
    first = [d for i, d in enumerate(mixed) if i in split]
    second = [d for i, d in enumerate(mixed) if i not in split]
    weights = {"text_weight": 0.7, "image_weight": 1.9}
    # Draws are a function of a document's key, which must not change with its pack.
    keys = {id(d): i for i, d in enumerate(mixed)}

    def one(documents: list[Document]) -> PackedSequence:
        sequenced = [model.sequencer.document(d, (0, 0, keys[id(d)]), train=False) for d in documents]
        return pack(sequenced, model.backbone.config.experts, model.generator.reads)

    together = gradients(model, [one([*first, *second])], **weights)
    apart = gradients(model, [one(first), one(second)], **weights)
    assert together.keys() == apart.keys()
    for name, expected in together.items():
        torch.testing.assert_close(apart[name], expected, rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")
    # A mean over each micro-batch's own targets would be something else.
    halves = [gradients(model, [one(part)], **weights) for part in (first, second)]
    naive = {n: sum(h[n] for h in halves if n in h) / 2 for n in together}
    assert max(float((naive[n] - together[n]).abs().max()) for n in together) > 1e-4


def test_the_loss_is_a_weighted_sum_of_two_means(model: UnifiedModel, mixed: list[Document]) -> None:
    p = packed(model, mixed)
    p = p.announce(p.counts)
    with torch.no_grad():
        terms = model(p)
        loss = training(model, text_weight=0.5, image_weight=3.0).training_step(p, 1)
    expected = 0.5 * terms["text"].sum / terms["text"].count + 3.0 * terms["image"].sum / terms["image"].count
    assert terms["text"].count > 0
    assert terms["image"].count > 0
    torch.testing.assert_close(loss, expected)


def test_every_trained_parameter_gets_a_gradient_and_the_tokenizer_none(make: Make, mixed: list[Document]) -> None:
    for generator in ("flow", "autoregressive"):
        model = make(generator)
        p = packed(model, mixed)
        training(model).training_step(p.announce(p.counts), 1).backward()
        trained = {n: q for n, q in model.named_parameters() if q.requires_grad}
        assert not [n for n in trained if n.startswith("tokenizer.")]
        dead = [n for n, q in trained.items() if q.grad is None or not q.grad.abs().sum() > 0]
        assert dead == []


@pytest.mark.parametrize("kind", [0, 1, 3])
def test_a_pack_of_one_kind_still_reaches_every_parameter(
    kind: int, model: UnifiedModel, mixed: list[Document]
) -> None:
    """With a zero where there is nothing to learn from: what data-parallel training needs."""
    model = copy.deepcopy(model)
    p = packed(model, [mixed[kind]])
    training(model).training_step(p.announce({"text": 100, "image": 100}), 1).backward()
    missing = [n for n, q in model.named_parameters() if q.requires_grad and q.grad is None]
    assert missing == []


SPARED = (
    "embedding.images", "head.place", "embeddings.0.weight", "scale.weight", "queries", "cls_token", "pos_embed",
)  # fmt: skip
"""Tables of several axes that are looked up or added, whatever they are called."""


def test_norms_biases_and_embeddings_are_not_decayed(model: UnifiedModel) -> None:
    configured = training(model, weight_decay=0.3).configure_optimizers()
    names = {id(p): n for n, p in model.named_parameters()}
    sizes = {n: p.ndim for n, p in model.named_parameters()}
    groups = {g["weight_decay"]: {names[id(p)] for p in g["params"]} for g in configured["optimizer"].param_groups}
    assert set(groups) == {0.0, 0.3}
    assert groups[0.0] | groups[0.3] == {n for n, p in model.named_parameters() if p.requires_grad}
    assert not groups[0.0] & groups[0.3]
    for name in groups[0.0] | groups[0.3]:
        spared = re.search(r"norm|bias|embedding\.weight", name) or sizes[name] < 2 or name.endswith(SPARED)
        assert (name in groups[0.0]) == bool(spared), name
    assert any("embedding" in n for n in groups[0.0])
    assert any("mlp" in n for n in groups[0.3])


# ---- whole runs


class Recorder(lightning.Callback):
    """What a slow, obvious implementation of the average is computed from."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []
        self.validated: list[dict[str, Tensor]] = []
        self.after: list[dict[str, Tensor]] = []

    def snapshot(self, module: lightning.LightningModule) -> dict[str, Tensor]:
        return {n: p.detach().clone() for n, p in module.named_parameters()}

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.weights.append(self.snapshot(pl_module))

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: STEP_OUTPUT, batch: Any,
        batch_idx: int,
    ) -> None:  # fmt: skip
        if trainer.global_step == len(self.weights):
            self.weights.append(self.snapshot(pl_module))

    def on_validation_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        if batch_idx == 0:
            self.validated.append(self.snapshot(pl_module))

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if len(self.validated) > len(self.after):
            self.after.append(self.snapshot(pl_module))


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    original = UnifiedTraining.configure_callbacks
    monkeypatch.setattr(UnifiedTraining, "configure_callbacks", lambda self: [*original(self), recorder])
    return recorder


@pytest.mark.parametrize(("decay", "accumulate"), [(0.6, 1), (0.3, 2), (0.0, 1)])
def test_the_average_follows_its_formula(decay: float, accumulate: int, recorder: Recorder, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    options = ["--model.init_args.ema_decay", str(decay), "--trainer.accumulate_grad_batches", str(accumulate)]
    assert fit(FLOW, folder, *options, "--trainer.val_check_interval", str(2 * accumulate)) == 0
    assert len(recorder.weights) == 5
    averages = [recorder.weights[0]]
    for step, weights in enumerate(recorder.weights[1:], start=1):
        d = min(decay, (1 + step) / (10 + step))
        averages.append({n: d * averages[-1][n] + (1 - d) * w for n, w in weights.items()})
    shadow = checkpoint(folder)["callbacks"]["EMA"]["shadow"]
    assert set(shadow) == set(averages[-1])
    for name, average in shadow.items():
        torch.testing.assert_close(average, averages[-1][name], rtol=1e-5, atol=1e-6)
    # Validation after steps 2 and 4 saw the average; training went on with the weights.
    assert len(recorder.validated) == 2
    for step, seen in zip((2, 4), recorder.validated, strict=True):
        for name, average in averages[step].items():
            torch.testing.assert_close(seen[name], average, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(recorder.after[0][n], w) for n, w in recorder.weights[2].items())
    moved = max(float((averages[4][n] - recorder.weights[4][n]).abs().max()) for n in averages[4])
    assert (moved > 1e-4) == (decay > 0)
    raw, ema = (load_run(folder, weights).state_dict() for weights in ("raw", "ema"))
    for name in raw:
        torch.testing.assert_close(raw[name], recorder.weights[4][f"model.{name}"], rtol=0, atol=0)
        torch.testing.assert_close(ema[name], averages[4][f"model.{name}"], rtol=1e-5, atol=1e-6)


def test_an_average_needs_a_share() -> None:
    for decay in (-0.1, 1.0):
        with pytest.raises(ValueError, match=f"ema_decay: .* got {decay}"):
            EMA(decay)


def validation_losses(folder: Path) -> dict[str, float]:
    """What the last validation of a fit logged."""
    with (folder / "logs" / "version_0" / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["val/loss"]]
    return {name: float(value) for name, value in rows[-1].items() if name.startswith("val/")}


@pytest.mark.slow
def test_validate_test_and_predict_see_the_averaged_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    assert fit(FLOW, folder, "--trainer.val_check_interval", "4") == 0
    expected = validation_losses(folder)
    assert {"val/loss", "val/sum/image", "val/sum/text", "val/image_to_text/text"} <= set(expected)
    options = ["-c", str(FLOW), "-c", str(tmp_path / "tiny.yaml"), "--trainer.default_root_dir", str(folder)]
    samples = sorted((folder / "samples").iterdir())
    for command, stage in (("validate", "val"), ("test", "test")):
        capsys.readouterr()
        assert main([command, *options]) == 0
        found = re.findall(rf"({stage}/\S+)\s+│\s+([\d.]+)", capsys.readouterr().out)
        assert len(found) == len(expected)
        for name, value in found:
            assert float(value) == pytest.approx(expected[name.replace("test/", "val/")], rel=1e-5)
    assert main(["predict", *options]) == 0
    written = read_jsonl(folder / "predictions" / "documents.jsonl")
    averaged = load_run(folder, "ema")
    captions = [d for d in written if d.kind == "text_to_image"]
    assert captions
    drawing = DecodingSettings("image", max_tokens=0, max_images=1)
    prompt = Document((Part(captions[0].parts[0].text, learn=False),), "text_to_image")
    (again,) = decode(averaged, [prompt], drawing, [0])
    assert again.parts[-1].image.tobytes() == captions[0].parts[-1].image.tobytes()
    # Looking at a checkpoint adds nothing to the run's own curves and samples.
    assert sorted((folder / "samples").iterdir()) == samples
    assert [p.name for p in (folder / "logs").iterdir()] == ["version_0"]


def test_the_text_tokenizer_travels_with_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    assert fit(FLOW, folder, "--trainer.max_steps", "2") == 0
    saved = checkpoint(folder)["text_tokenizer"]
    assert saved == (folder / "export" / "tokenizer.json").read_text(encoding="utf-8")
    # A corpus that changed meanwhile changes no id.
    monkeypatch.setattr("unimodal.data.module.DocumentData.corpus", lambda self: ["zzz qqq"] * 50)
    assert fit(FLOW, folder, "--trainer.max_steps", "3", "--ckpt_path", "last") == 0
    assert checkpoint(folder)["text_tokenizer"] == saved
    assert (folder / "export" / "tokenizer.json").read_text(encoding="utf-8") == saved


def test_starting_from_an_export(tmp_path: Path, recorder: Recorder, capsys: pytest.CaptureFixture[str]) -> None:
    first = tmp_path / "first"
    assert fit(FLOW, first, "--trainer.max_steps", "2") == 0
    exported = load_run(first).state_dict()
    recorder.weights.clear()
    assert fit(FLOW, tmp_path / "second", "--init", str(first / "export"), "--seed_everything", "3") == 0
    assert all(torch.equal(recorder.weights[0][f"model.{n}"], w) for n, w in exported.items())
    assert checkpoint(tmp_path / "second")["global_step"] == 4
    capsys.readouterr()
    depth = ["--model.init_args.model.backbone.depth", "3"]
    assert fit(FLOW, tmp_path / "third", "--init", str(first / "export"), *depth) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    for part in ("attention_norm", "qkv", "qk_norm", "o", "mlp_norm", "mlp"):
        assert f"backbone.layers.2.{part}.experts" in said, part
    assert said.count("is missing") + int((re.findall(r"and (\d+) more", said) or ["0"])[0]) == 16
    assert fit(FLOW, tmp_path / "third", f"--init={tmp_path / 'nowhere'}") == 2
    assert "nowhere" in capsys.readouterr().err


def test_a_model_of_next_ids_is_where_a_parallel_one_starts(
    tmp_path: Path, recorder: Recorder, capsys: pytest.CaptureFixture[str]
) -> None:
    """Emu3.5's adaptation, by its recipe: one vector is new, and nothing else may be missing."""
    first = tmp_path / "first"
    assert fit(VQ, first, "--trainer.max_steps", "2", "--model.init_args.tokenizer_weights", "null") == 0
    exported = load_run(first).state_dict()
    recorder.weights.clear()
    assert fit(PARALLEL, tmp_path / "second") == 2  # it names what it starts from
    assert "out/digits_vq_ar/export/export.json is missing" in capsys.readouterr().err
    assert fit(PARALLEL, tmp_path / "second", "--init", str(first / "export")) == 0
    began = {n.removeprefix("model."): w for n, w in recorder.weights[0].items()}
    assert {n for n in began if n not in exported} == {"generator.hidden"}
    assert all(torch.equal(w, exported[n]) for n, w in began.items() if n in exported)
    adapted = load_run(tmp_path / "second").state_dict()
    assert adapted.keys() - exported.keys() == {"generator.hidden"}
    capsys.readouterr()
    scratch = ["--model.init_args.tokenizer_weights", "null"]
    assert fit(MASKED, tmp_path / "third", "--init", str(first / "export"), *scratch) == 2  # which reads elsewhere
    assert "init: " in (said := capsys.readouterr().err)
    assert "generator.hidden is missing" in said


def test_tokens_that_the_generator_cannot_learn_are_refused_naming_both(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = "--model.init_args.model.tokenizer"
    other = [key, "unimodal_tokenizers.PatchTokenizer", f"{key}.init_args.patch", "2"]
    assert fit(VQ, tmp_path / "run", *other) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert "tokenizer: Autoregressive takes discrete or sequence tokens, got continuous" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("recipe", "key", "value", "message"),
    [
        (
            FLOW,
            "sequence.drop_text",
            "0",
            "guidance: this recipe never dropped text in training (sequence.drop_text), got 1.5",
        ),
        (MASKED, "generator.init_args.sampling.steps", "17", "steps: expected at most one an id (16), got 17"),
    ],
    ids=["guidance", "steps"],
)
def test_sampling_that_no_training_makes_possible_is_refused_before_it(
    recipe: Path, key: str, value: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(recipe, tmp_path / "run", f"--model.init_args.model.{key}", value) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert message in said
    assert not (tmp_path / "run").exists()


def test_tokenizer_weights_are_loaded_frozen_and_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = tmp_path / "vq.yaml"
    tokenizer.write_text(
        "model: {init_args: {tokenizer: {init_args: {quantizer: {init_args: {entries: 16, dim: 4}},"
        " channels: [8, 8]}}, warmup_steps: 1}}\n"
        "data: {init_args: {batch_size: 8}}\n"
        "trainer: {max_steps: 2, val_check_interval: 100, precision: 32-true, accelerator: cpu,"
        " enable_progress_bar: false}\n"
    )
    recipe = ROOT / "lightning_configs" / "tokenizers" / "digits_vq.yaml"
    run = tmp_path / "vq"
    assert main(["fit", "-c", str(recipe), "-c", str(tokenizer), "--trainer.default_root_dir", str(run)]) == 0
    weights = ["--model.init_args.tokenizer_weights", str(run / "export")]
    keys = "quantizer.init_args.entries", "quantizer.init_args.dim", "channels"
    shape = [f"--model.init_args.model.tokenizer.init_args.{key}" for key in keys]
    small = [shape[0], "16", shape[1], "4", shape[2], "[8, 8]"]
    assert fit(VQ, tmp_path / "model", *weights, *small) == 0
    trained = checkpoint(run)["state_dict"]
    inside = checkpoint(tmp_path / "model")["state_dict"]
    compared = 0
    for name, value in inside.items():
        if name.startswith("model.tokenizer."):
            assert torch.equal(value, trained[name.removeprefix("model.")]), name
            compared += 1
    assert compared > 10
    begin = ["--init", str(tmp_path / "model" / "export")]
    assert fit(VQ, tmp_path / "second", *begin, *weights, *small) == 0
    again = ["--trainer.default_root_dir", str(tmp_path / "other"), "--seed_everything", "1"]
    assert main(["fit", "-c", str(recipe), "-c", str(tokenizer), *again]) == 0
    capsys.readouterr()
    weights_of_other = ["--model.init_args.tokenizer_weights", str(tmp_path / "other" / "export")]
    assert fit(VQ, tmp_path / "third", *begin, *weights_of_other, *small) == 2
    assert "tokenizer_weights: expected those of init " in capsys.readouterr().err
    assert fit(VQ, tmp_path / "wrong", *weights, shape[0], "32", *small[2:]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert "expected quantizer.codebook to be Embedding(32, 4)" in said
    assert said.strip().endswith("has Embedding(16, 4)")
    other = "--model.init_args.model.tokenizer.init_args.quantizer=unimodal_tokenizers.quantizers.EuclideanQuantizer"
    assert fit(VQ, tmp_path / "wrong", *weights, other, *small) == 2  # whose weights have the same names and shapes
    said = f"quantizer to be EuclideanQuantizer(), {run / 'export'} has VectorQuantizer()"
    assert capsys.readouterr().err.strip().endswith(f"tokenizer_weights: expected {said}")
    nowhere = ["--model.init_args.tokenizer_weights", str(tmp_path / "nowhere")]
    assert fit(VQ, tmp_path / "missing", *nowhere) == 2
    assert f"tokenizer_weights: {tmp_path / 'nowhere' / 'model.safetensors'} is missing" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_accumulation(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    # Sixteen micro-batches are four steps on one process, eight a rank on two.
    shared = ["--trainer.gradient_clip_val", "0.1", "--data.validation_documents", "5"]
    each = ["--trainer.accumulate_grad_batches", "4", "--trainer.val_check_interval", "16"]
    assert fit(FLOW, one, *shared, *each) == 0
    command = [
        sys.executable, "-m", "unimodal.cli", "fit", "-c", str(FLOW), "-c", str(tmp_path / "tiny.yaml"),
        "--trainer.default_root_dir", str(two), "--trainer.accumulate_grad_batches", "2",
        "--trainer.val_check_interval", "8", "--trainer.devices", "2", "--trainer.strategy", "ddp", *shared,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    a, b = checkpoint(one), checkpoint(two)
    assert a["DigitsData"] == b["DigitsData"]
    assert validation_losses(two) == pytest.approx(validation_losses(one), rel=1e-4)
    for name, value in a["state_dict"].items():
        torch.testing.assert_close(
            b["state_dict"][name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert (two / "export" / "model.safetensors").is_file()


# ---- compiled and recomputed layers


def test_recomputed_layers_give_the_same_gradients(
    model: UnifiedModel, mixed: list[Document], monkeypatch: pytest.MonkeyPatch
) -> None:
    projected: list[torch.nn.Module] = []
    project = DecoderLayer.project
    monkeypatch.setattr(DecoderLayer, "project", lambda *args: (projected.append(args[0]), project(*args))[1])
    kept = gradients(model, [packed(model, mixed)])
    once = len(projected)  # a layer and an expert
    again = gradients(model, [packed(model, mixed)], checkpoint_layers=True)
    assert len(projected) == 3 * once  # as often again, and once more in backward
    assert kept.keys() == again.keys()
    torch.testing.assert_close(again, kept, rtol=0, atol=0)


def test_layers_are_compiled_where_a_fit_begins_and_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[Backbone] = []
    monkeypatch.setattr(Backbone, "compile", lambda self: compiled.append(self))
    option, run = "--model.init_args.compile", tmp_path / "run"
    assert fit(FLOW, run, "--trainer.max_steps", "1") == 0
    assert compiled == []
    assert fit(FLOW, run, "--trainer.max_steps", "2", "--ckpt_path", "last", option, "true") == 0
    assert len(compiled) == 1
    assert main(["validate", "-c", str(run / "config.yaml")]) == 0
    assert len(compiled) == 1


def test_compiling_is_refused_where_it_cannot_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("unimodal.training.unified.can_compile", lambda: (False, "no C++ compiler"))
    assert fit(FLOW, tmp_path / "run", "--model.init_args.compile", "true") == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert "model.compile: expected false where torch.compile cannot work (no C++ compiler), got true" in said
    assert not (tmp_path / "run").exists()


COMPILED = """
import torch
from conftest import build, documents
from unimodal.packing import pack
from unimodal.training import UnifiedTraining

torch.manual_seed(0)
for generator in ("flow", "autoregressive"):
    for checkpoint in (False, True):
        found = []
        for compiled in (False, True):
            model = build(generator)
            module = UnifiedTraining(model, lr=1e-3, compile=compiled, checkpoint_layers=checkpoint)
            module.setup("fit")
            laid = [model.sequencer.document(d, (0, 0, i), train=False) for i, d in enumerate(documents())]
            losses = {}
            for part in (laid, laid[:2]):  # two layouts, one graph
                p = pack(part, model.backbone.config.experts, model.generator.reads)
                terms = model(p)
                sum(term.sum / max(term.count, 1) for term in terms.values()).backward()
                losses |= {f"{name} {len(p)}": term.sum.detach() for name, term in terms.items()}
            found.append((losses, {n: q.grad for n, q in model.named_parameters() if q.grad is not None}))
        torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-3, atol=1e-5)
        assert len(found[0][1]) > 30
stats = torch._dynamo.utils.counters
assert stats["stats"]["unique_graphs"] >= 1, stats
assert not stats["graph_break"], stats
print("equal")
"""


@pytest.mark.slow
@pytest.mark.skipif(not can_compile()[0], reason=can_compile()[1])
def test_compiled_layers_give_the_same_losses_and_gradients() -> None:
    """In a process of its own: what checks shapes in the tests cannot be compiled."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests")}
    done = subprocess.run(
        [sys.executable, "-c", COMPILED], capture_output=True, text=True, check=False, timeout=500, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "equal"
