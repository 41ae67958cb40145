"""What is logged of a training's speed, work and waiting, against slow counting under a clock that the test moves."""

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import lightning as L
import pytest
import torch
from conftest import build, documents
from forking import together
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from unimodal.cli import main
from unimodal.data.module import DigitsData
from unimodal.model import UnifiedModel
from unimodal.packing import PackedSequence, pack
from unimodal.training import Adversary, PatchDiscriminator, TokenizerTraining, UnifiedTraining, watch
from unimodal.training.flops import product_peak, useful_flops
from unimodal.training.run import Progress
from unimodal.training.sharding import shard
from unimodal.training.watch import Reading, Watch, summary
from unimodal.training.work import PackWork
from unimodal_tokenizers import GridTokenizer
from unimodal_tokenizers.quantizers import VectorQuantizer

Make = Callable[..., UnifiedModel]


class Time:
    """A clock that goes where it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Rows(Logger):
    """Keeps what is logged under `watch/`, by step."""

    name, version = "rows", 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[int, dict[str, float]] = {}

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        found = {name.removeprefix("watch/"): value for name, value in metrics.items() if name.startswith("watch/")}
        assert step is not None
        if found:
            assert step not in self.rows
            self.rows[step] = found


class Seen(L.Callback):
    """Batches, and what happens at other times than training's."""

    def __init__(self, time: Time, save: Path | None = None, save_at: int = 0) -> None:
        self.time, self.save, self.save_at = time, save, save_at
        self.batches: list[Any] = []

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, i: int
    ) -> None:
        self.batches.append(batch)
        if self.save is not None and trainer.global_step == self.save_at:
            trainer.save_checkpoint(self.save)
            self.time.now += 1000

    def on_validation_batch_start(self, *args: Any) -> None:
        self.time.now += 500


class SlowSource:
    """A loader that takes three seconds a micro-batch."""

    def __init__(self, packs: Any, time: Time) -> None:
        self.packs, self.time, self.broken = packs, time, packs.broken

    def __iter__(self) -> Iterator[PackedSequence]:
        for one in self.packs:
            self.time.now += 3
            yield one


def fit(
    tmp_path: Path, time: Time, monkeypatch: pytest.MonkeyPatch, model: UnifiedModel, steps: int, every: int,
    save_at: int = 0, **changed: Any,
) -> tuple[dict[int, dict[str, float]], list[PackedSequence], UnifiedTraining]:  # fmt: skip
    """A training whose micro-batches take two seconds, and its rows."""
    monkeypatch.setattr(watch, "clock", time)
    monkeypatch.setattr(watch, "product_peak", lambda device, dtype: 1e6 if dtype == torch.float32 else 0.0)
    module, data = UnifiedTraining(model, lr=1e-3), DigitsData(400, validation_documents=2, prompts=1)
    step, loader = module.training_step, data.train_dataloader

    def slow(*args: Any) -> Tensor:
        time.now += 2
        return step(*args)

    monkeypatch.setattr(module, "training_step", slow)
    monkeypatch.setattr(data, "train_dataloader", lambda: SlowSource(loader(), time))
    rows, seen = Rows(), Seen(time, tmp_path / "saved.ckpt" if save_at else None, save_at)
    L.Trainer(
        accelerator="cpu", default_root_dir=tmp_path, max_steps=steps, log_every_n_steps=every, logger=rows,
        callbacks=[Watch(), seen], enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, use_distributed_sampler=False, max_epochs=-1,
        **{"limit_val_batches": 0, **changed},
    ).fit(module, data)  # fmt: skip
    return rows.rows, seen.batches, module


def expected(module: UnifiedTraining, packs: list[PackedSequence], seconds: float, waited: float) -> dict[str, float]:
    """Counted the slow way."""
    flops = sum(useful_flops(module.model, one).total for one in packs)
    images = sum(len(stack) for one in packs for stack in one.images)
    return {
        "tokens_per_s": sum(one.table.length.sum() for one in packs) / seconds, "images_per_s": images / seconds,
        "flops_per_s": flops / seconds, "peak_share": flops / seconds / 1e6, "data_wait": waited / seconds,
        "skipped": 0.0,
    }  # fmt: skip


@pytest.mark.parametrize("generator", ["flow", "both", "autoregressive"])
def test_numbers_are_those_of_slow_counting(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, generator: str
) -> None:
    rows, packs, module = fit(tmp_path, Time(), monkeypatch, make(generator), steps=5, every=2)
    assert list(rows) == [1, 3]  # of Lightning's steps, which count from 0; nothing between, nor at the end
    first, second = (dict(row) for row in rows.values())
    assert first.pop("memory_gb") > 0.05  # the process has more than torch alone needs
    assert second.pop("memory_gb") >= 0.05
    # Nobody waited for the first micro-batch: the clock begins with it.
    assert first == pytest.approx(expected(module, packs[:2], 2 * 2 + 3, 3), rel=1e-6)
    assert second == pytest.approx(expected(module, packs[2:4], 2 * 2 + 2 * 3, 2 * 3), rel=1e-6)


def test_accumulation_counts_every_micro_batch(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("flow")
    rows, packs, module = fit(tmp_path, Time(), monkeypatch, model, steps=2, every=2, accumulate_grad_batches=3)
    assert list(rows) == [1]
    assert len(packs) == 6
    del rows[1]["memory_gb"]
    assert rows[1] == pytest.approx(expected(module, packs, 6 * 2 + 5 * 3, 5 * 3), rel=1e-6)


def test_validation_and_checkpoints_are_no_time_of_training(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    validated = {"limit_val_batches": 1, "val_check_interval": 1, "check_val_every_n_epoch": None}
    rows, packs, module = fit(tmp_path, Time(), monkeypatch, make("flow"), steps=3, every=3, **validated)
    del rows[2]["memory_gb"]  # what is read behind a pause is no wait: nobody can tell the two apart
    assert rows[2] == pytest.approx(expected(module, packs, 3 * 2, 0), rel=1e-6)
    rows, packs, module = fit(tmp_path, Time(), monkeypatch, make("flow"), steps=4, every=4, save_at=2)
    del rows[3]["memory_gb"]
    assert rows[3] == pytest.approx(expected(module, packs, 4 * 2 + 2 * 3, 2 * 3), rel=1e-6)


def test_between_logging_steps_only_the_clock_is_read(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for name in ("gather", "memory", "summary"):
        own = getattr(watch, name)
        monkeypatch.setattr(watch, name, lambda *a, name=name, own=own: calls.append(name) or own(*a))
    fit(tmp_path, Time(), monkeypatch, make("flow"), steps=3, every=4)
    assert calls == []
    fit(tmp_path, Time(), monkeypatch, make("flow"), steps=4, every=2)
    assert [calls.count(name) for name in ("memory", "summary")] == [2, 2]
    assert calls.count("gather") == 3  # and once for what was measured of the first pack


def test_without_a_logger_nothing_is_measured(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "work_of", lambda module: pytest.fail("nobody reads it"))
    module, data = UnifiedTraining(make("flow"), lr=1e-3), DigitsData(400, validation_documents=1, prompts=1)
    L.Trainer(
        accelerator="cpu", default_root_dir=tmp_path, max_steps=2, log_every_n_steps=1, logger=False, callbacks=[Watch()],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
    ).fit(module, data)  # fmt: skip


# ---- tokenizers


def tokenizer_flops(module: TokenizerTraining, images: Tensor, adversary: bool) -> int:
    """Of a training step, counted by itself."""
    module = copy.deepcopy(module)
    with FlopCounterMode(display=False) as counter:
        result = module.tokenizer(images)
        y = result.images.float()
        error = ((images - y).abs().mean() + (images - y).square().mean()) + sum(result.terms.values())
        if adversary:
            against = module.adversary
            assert against is not None
            generator = against.of_generator(y)
            balance = against.balance((y - images).square().mean(), generator, module.tokenizer.last_layer)
            error = error + balance * generator + against.of_discriminator(images, y)
        error.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("start", [None, 2])
def test_a_tokenizer_is_counted_by_the_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: int | None
) -> None:
    torch.manual_seed(0)
    against = None
    if start is not None:
        against = Adversary(PatchDiscriminator(width=8, layers=1), weight=0.3, lr=1e-3, start_step=start)
    tokenizer = GridTokenizer(VectorQuantizer(16, dim=4), channels=[8, 8], blocks=1)
    module = TokenizerTraining(tokenizer, lr=1e-3, l1_weight=1.0, l2_weight=1.0, adversary=against, samples=0)
    time, rows = Time(), Rows()
    monkeypatch.setattr(watch, "clock", time)
    step = module.training_step

    def slow(*args: Any) -> Tensor:
        time.now += 2
        return step(*args)

    monkeypatch.setattr(module, "training_step", slow)
    images = torch.randn(10, 3, 8, 8).clamp(-1, 1)
    L.Trainer(
        accelerator="cpu", default_root_dir=tmp_path, max_steps=4, log_every_n_steps=2, logger=rows, callbacks=[Watch()],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, max_epochs=-1,
    ).fit(module, DataLoader(list(images), batch_size=4))  # fmt: skip
    plain = tokenizer_flops(module, images[:1], False)
    later = plain if start is None else tokenizer_flops(module, images[:1], True)
    assert later > plain or start is None
    # Batches of 4, 4, 2 and 4 images of two rows and columns of tokens.
    tokens = tokenizer.layout.grid(8, 8).length
    for row, count, flops in ((rows.rows[1], 8, plain), (rows.rows[3], 6, later)):
        assert row["images_per_s"] == count / 4
        assert row["tokens_per_s"] == count * tokens / 4
        assert row["flops_per_s"] == pytest.approx(count * flops / 4, rel=1e-3)
        assert "skipped" not in row


# ---- ranks


def test_ranks_add_up_and_the_slowest_one_sets_the_time() -> None:
    left_out = {"a": 1, "b": 2, "c": 0}  # every rank knows that of all
    first = Reading(10.0, 1.0, 2_000_000_000, 100.0, {"tokens": 40, "images": 2, "expert 0": 40}, left_out)
    second = Reading(8.0, 4.0, 3_000_000_000, 300.0, {"tokens": 20, "images": 0, "expert 0": 20}, left_out)
    assert summary([first, second], {"expert 0": 5.0}) == {
        "watch/tokens_per_s": 6.0, "watch/images_per_s": 0.2, "watch/flops_per_s": 30.0, "watch/peak_share": 0.075,
        "watch/memory_gb": 3.0, "watch/data_wait": 0.5, "watch/skipped": 3.0, "watch/skipped/a": 1.0,
        "watch/skipped/b": 2.0,
    }  # fmt: skip


def packs_of(model: UnifiedModel) -> list[PackedSequence]:
    """One with images, and one of text alone."""
    laid = [model.sequencer.document(d, (0, i), train=False) for i, d in enumerate(documents())]
    return [pack(some, model.backbone.config.experts, model.generator.reads) for some in (laid, laid[3:])]


def one_of_two(rank: int, folder: str, sharded: bool) -> None:
    """A process with a pack of its own, only the first of which has images, that writes down what it logs."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    module = UnifiedTraining(build("both"), lr=1e-3)
    mine = packs_of(module.model)[rank]
    if sharded:
        shard(module.model, init_device_mesh("cpu", (2,)), torch.device("cpu"))
        torch.stack(
            [term.sum for term in module.model(mine).values()]
        ).sum().backward()  # weights are parted again behind it
    time = Time()
    watch.clock = time
    callback, found = Watch(), {}
    callback.on, callback._peak, callback._work = True, 50.0, PackWork(module)
    module.log_dict = lambda values, **_: found.update(values)  # type: ignore[method-assign]
    trainer = Mock(spec=L.Trainer, global_step=1, log_every_n_steps=1, train_dataloader=None)
    trainer.precision_plugin.forward_context = nullcontext
    callback.on_train_batch_start(trainer, module, mine, 0)
    time.now += 2 + 2 * rank
    callback.on_train_batch_end(trainer, module, None, mine, 0)
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """What two processes log, without and with sharded weights."""
    folders = {sharded: tmp_path_factory.mktemp("pair") for sharded in (False, True)}
    together(one_of_two, *((2, (str(folder), sharded)) for sharded, folder in folders.items()))
    return folders


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True])
def test_two_processes_log_what_both_did(pairs: dict[bool, Path], sharded: bool) -> None:
    """Also what only one of them could measure, and where the weights are sharded."""
    first, second = (torch.load(pairs[sharded] / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert {k: v for k, v in first.items() if k != "watch/memory_gb"} == {
        k: v for k, v in second.items() if k != "watch/memory_gb"
    }
    model = build("both")
    flops = sum(useful_flops(model, one).total for one in packs_of(model))
    assert first["watch/tokens_per_s"] == sum(len(one) for one in packs_of(model)) / 4
    assert first["watch/flops_per_s"] == pytest.approx(flops / 4, rel=1e-6)
    assert first["watch/peak_share"] == pytest.approx(flops / 4 / 100, rel=1e-6)


def test_measuring_leaves_gradients_and_draws_alone(make: Make) -> None:
    module = UnifiedTraining(make("both"), lr=1e-3)
    work, (one, _) = PackWork(module), packs_of(module.model)
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    work.begin(one)
    state = torch.get_rng_state()
    rates = work.measure(work.missing(work.units(one)), nullcontext)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in module.parameters())  # type: ignore[arg-type]
    assert rates.keys() == {"learned", "clean", "understood", "pixels"}


def test_the_peak_is_a_rate() -> None:
    assert product_peak(torch.device("cpu"), torch.float32, seconds=0.0) > 0


def test_the_time_for_the_peak_begins_behind_the_first_product(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    mm = torch.mm

    def slow_at_first(a: Tensor, b: Tensor) -> Tensor:
        time.sleep(0.0 if sizes else 0.6)
        sizes.append(len(a))
        return mm(a, b)

    monkeypatch.setattr(torch, "mm", slow_at_first)
    product_peak(torch.device("cpu"), torch.float32, seconds=0.5)
    assert max(sizes) > 256


# ---- the bar, and the command


def test_the_bar_counts_optimizer_steps_and_goes_on_where_a_run_stands() -> None:
    bar = Progress(refresh_rate=2)
    trainer = Mock(spec=L.Trainer, max_steps=20, global_step=6, current_epoch=0)
    bar._trainer = trainer
    bar.get_metrics = lambda *_: {}  # type: ignore[method-assign]
    bar.on_train_start(trainer)
    bar.on_train_epoch_start(trainer)
    shown = bar.train_progress_bar
    assert (shown.total, shown.initial, shown.n) == (20, 6, 6)
    for step in (6, 6, 6, 7, 7, 8, 8):  # micro-batches, by the steps made behind them
        trainer.global_step = step
        bar.on_train_batch_end(trainer, UnifiedTraining(build(), lr=1e-3), None, None, 100)
    assert shown.n == 8
    shown.start_t -= 10  # two steps in ten seconds: twelve are left
    left = shown.format_meter(**{**shown.format_dict, "elapsed": 10.0})
    assert "8/20 [00:10<01:00" in left
    bar.on_train_end()


RECIPE = Path(__file__).parents[2] / "lightning_configs" / "models" / "digits_mot_flow.yaml"


def test_a_missing_wandb_is_one_line_with_the_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch.importlib.util, "find_spec", lambda name: None)
    assert (
        main(["fit", "-c", str(RECIPE), "--trainer.default_root_dir", str(tmp_path / "run"), "--watch.wandb", "p"]) == 2
    )
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "watch.wandb: expected the package wandb (pip install wandb) for project p, got none" in said
    assert not (tmp_path / "run").exists()


TINY = """
model:
  init_args:
    model:
      init_args: {backbone: {width: 16, depth: 1, heads: 1, kv_heads: 1, mlp_width: 16, vocabulary: 300}}
data: {init_args: {batch_tokens: 256, validation_documents: 1, prompts: 1}}
trainer:
  max_steps: 2
  log_every_n_steps: 1
  limit_val_batches: 0
  precision: 32-true
  accelerator: cpu
  enable_progress_bar: false
"""


def test_one_key_logs_to_weights_and_biases_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch.importlib.util, "find_spec", lambda name: object())
    made: list[tuple[dict[str, Any], Rows]] = []

    def logger(**settings: Any) -> Rows:
        made.append((settings, Rows()))
        return made[-1][1]

    monkeypatch.setattr(watch, "WandbLogger", logger)
    (tmp_path / "tiny.yaml").write_text(TINY)
    options = [
        "-c",
        str(RECIPE),
        "-c",
        str(tmp_path / "tiny.yaml"),
        "--trainer.default_root_dir",
        str(tmp_path / "run"),
    ]
    assert main(["fit", *options, "--watch.wandb", "p"]) == 0
    ((settings, rows),) = made
    assert settings == {"name": "digits_mot_flow", "project": "p", "save_dir": tmp_path / "run"}
    assert list(rows.rows) == [0, 1]
    assert list((tmp_path / "run").glob("logs/version_0/metrics.csv"))  # beside the usual ones
    assert list((tmp_path / "run").glob("tensorboard/*/events*"))
