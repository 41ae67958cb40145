"""Steps that are not finite: skipped bit for bit, by all ranks alike, counted, and kept for a look where they do not end."""

import copy
import csv
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from forking import script
from lightning import Callback, Trainer
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from unimodal.cli import main
from unimodal.export import read_checkpoint
from unimodal.training import TokenizerTraining, UnifiedTraining
from unimodal.training.adversary import Adversary, PatchDiscriminator
from unimodal.training.ema import EMA
from unimodal.training.nonfinite import NonFinite, _finite
from unimodal.training.optimizers import MuonAdamW
from unimodal_tokenizers.grid import GridTokenizer
from unimodal_tokenizers.kl import KLTokenizer
from unimodal_tokenizers.quantizers import MovingAverageQuantizer, VectorQuantizer
from unimodal_tokenizers.quantizers.base import drawn

RECIPE = Path(__file__).parents[2] / "lightning_configs" / "models" / "digits_mot_flow.yaml"
TINY = """
model:
  init_args:
    model:
      backbone: {width: 16, depth: 1, heads: 1, kv_heads: 1, mlp_width: 16, vocabulary: 300}
    warmup_steps: 0
    ema_decay: 0.7
data:
  init_args: {batch_tokens: 192, validation_documents: 1, prompts: 1}
trainer:
  {max_steps: 4, val_check_interval: 100, precision: 32-true, accelerator: cpu, enable_progress_bar: false,
   log_every_n_steps: 1, accumulate_grad_batches: 2}
checkpoint: {every_n_train_steps: 1}
"""


def fit(folder: Path, *options: str) -> int:
    tiny = folder.parent / "tiny.yaml"
    tiny.write_text(TINY)
    return main(["fit", "-c", str(RECIPE), "-c", str(tiny), "--trainer.default_root_dir", str(folder), *options])


def checkpoint(folder: Path, name: str = "last") -> dict[str, Any]:
    return read_checkpoint(folder / "checkpoints" / f"{name}.ckpt")


def same(a: Any, b: Any) -> bool:
    """Bit for bit."""
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


Spoil = Callable[..., None]


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Spoil:
    """Let the loss of micro-batches be `value`, on one rank."""
    original = UnifiedTraining.training_step

    def at(*batches: int, value: float = float("nan"), rank: int = 0) -> None:
        def step(self: UnifiedTraining, batch: Any, batch_idx: int) -> Tensor:
            loss = original(self, batch, batch_idx)
            return loss * value if batch_idx in batches and self.global_rank == rank else loss

        monkeypatch.setattr(UnifiedTraining, "training_step", step)

    return at


# ---- what a skipped step leaves as it was


@pytest.mark.parametrize("options", [[], ["--model.init_args.muon_lr", "0.01"]], ids=["adamw", "muon"])
def test_a_skipped_step_changes_nothing_but_the_data(
    options: list[str], tmp_path: Path, spoil: Spoil, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    spoil(3)  # the second micro-batch of the second step
    kept = ["--checkpoint.keep_last", "9", "--trainer.max_steps", "3", "--trainer.gradient_clip_val", "1.0"]
    assert fit(folder, *kept, *options) == 0
    first, second, third = (checkpoint(folder, f"step_{n:06d}") for n in (1, 2, 3))
    for part in ("state_dict", "optimizer_states"):
        if part == "optimizer_states":  # the learning rate moved on
            for states in (first[part], second[part], third[part]):
                states[0].pop("param_groups")
        assert same(first[part], second[part])
        assert not same(second[part], third[part])
    averages = [one["callbacks"]["EMA"]["shadow"] for one in (first, second, third)]
    assert same(*averages[:2])
    assert not same(*averages[1:])
    assert first["DigitsData"]["lanes"] != second["DigitsData"]["lanes"] != third["DigitsData"]["lanes"]
    assert first["lr_schedulers"][0]["last_epoch"] + 1 == second["lr_schedulers"][0]["last_epoch"]
    counts = [one["callbacks"]["NonFinite"] for one in (first, second, third)]
    assert counts == [
        {"skipped": 0, "in_a_row": 0}, {"skipped": 1, "in_a_row": 1}, {"skipped": 1, "in_a_row": 0}
    ]  # fmt: skip
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("WARNING: nonfinite: step 2 is skipped, something in it is not finite (rank 0: losses ")
    assert ", nan, gradient of " in line
    assert line.endswith("); 1 so far, 1 in a row")
    rows = list(csv.DictReader((folder / "logs" / "version_0" / "metrics.csv").open()))
    assert [row["train/skipped_steps"] for row in rows if row["train/skipped_steps"]][-1] == "1.0"


@pytest.mark.parametrize("muon", [False, True])
def test_optimizers_pass_over_what_has_no_gradient(muon: bool) -> None:
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4))]
    groups: list[dict[str, Any]] = [{"params": weights[muon:], "weight_decay": 0.5}]
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, lr=0.1)
    if muon:
        optimizer = MuonAdamW(weights[:1], groups, lr=0.1, muon_lr=0.1, betas=(0.9, 0.9), weight_decay=0.5)
    for p in weights:
        p.grad = torch.randn_like(p)
    optimizer.step()
    before = copy.deepcopy((weights, optimizer.state_dict()))
    optimizer.zero_grad(set_to_none=True)
    optimizer.step()
    assert same(before, (weights, optimizer.state_dict()))
    for p in weights:
        p.grad = torch.zeros_like(p)  # which would not do
    optimizer.step()
    assert not same(before[0], weights)


# ---- what counts as not finite


class Whole:
    """A gradient as a sharded tensor has it."""

    def __init__(self, own: Tensor) -> None:
        self.own = own

    def to_local(self) -> Tensor:
        return self.own


def test_every_loss_and_every_gradient_is_looked_at() -> None:
    def judged(losses: list[float], *gradients: Any) -> bool:
        parameters = [nn.Parameter(torch.zeros(3, dtype=torch.bfloat16 if i else torch.float32)) for i in range(4)]
        optimizer = torch.optim.SGD(parameters, lr=1.0)
        held = [type("P", (), {"grad": g})() for g in gradients]
        optimizer.param_groups = [{"params": [p]} for p in held]
        return _finite([torch.tensor(loss) for loss in losses], optimizer)

    fine = torch.tensor([1.0, -2.0, 1e18])
    assert judged([1.0, 2.0])
    assert judged([1.0], fine, None, fine.bfloat16().mul(0.1), torch.zeros(0))
    for bad in (float("nan"), float("inf"), -float("inf"), 3e38):  # the last one's square is infinite
        spoilt = torch.tensor([1.0, bad, 2.0])
        assert not judged([1.0, bad]) or bad == 3e38
        assert not judged([1.0], fine, spoilt)
        assert not judged([1.0], fine, spoilt.bfloat16(), fine)
        assert not judged([1.0], Whole(fine), Whole(spoilt))
    assert judged([1.0], Whole(fine), Whole(torch.zeros(0)))


class Observe(Callback):
    """A gradient is spoilt where the loss is fine, in the second step; states before every step and at the end."""

    def __init__(self) -> None:
        self.states: list[Any] = []

    def on_train_start(self, trainer: Trainer, pl_module: lightning.LightningModule) -> None:
        def spoil(gradient: Tensor) -> Tensor:
            return gradient / 0 if trainer.global_step == 1 else gradient

        next(p for p in pl_module.adversary.parameters() if p.dim() > 1).register_hook(spoil)  # type: ignore[union-attr]

    def on_train_batch_start(self, trainer: Trainer, pl_module: lightning.LightningModule, *_: Any) -> None:
        average = next(c for c in trainer.callbacks if isinstance(c, EMA))  # type: ignore[attr-defined]
        weights = dict(pl_module.named_parameters())
        self.states.append(copy.deepcopy((weights, average.shadow, trainer.optimizers[0].state_dict()["state"])))

    on_train_end = on_train_batch_start


class Images(torch.utils.data.Dataset[Tensor]):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Tensor:
        return torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(index)) * 2 - 1


def test_a_tokenizer_and_its_adversary_are_skipped_together(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = GridTokenizer(VectorQuantizer(16, dim=4), channels=[8, 8], blocks=1)
    adversary = Adversary(PatchDiscriminator(width=8, layers=1), weight=0.1)
    module = TokenizerTraining(tokenizer, lr=1e-2, l1_weight=1.0, l2_weight=1.0, adversary=adversary, ema_decay=0.5)
    watch, guard = Observe(), NonFinite()
    trainer = Trainer(
        max_steps=3, accelerator="cpu", devices=1, default_root_dir=tmp_path, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0, callbacks=[guard, watch],
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(Images(), batch_size=4))
    assert (guard.skipped, guard.in_a_row) == (1, 0)
    _, before, behind, end = watch.states
    assert same(before, behind)
    assert not any(same(a, b) for a, b in zip(behind, end, strict=True))


def test_no_codebook_keeps_what_is_not_finite() -> None:
    nan = float("nan")
    z = torch.tensor([[1.0, 2.0], [nan, 0.0], [float("inf"), 1.0]])
    assert sorted(drawn(z, 3, torch.Generator()).flatten().tolist()) == [0.0, 0.0, 0.0, 1.0, 1.0, 2.0]
    moving, clean = (MovingAverageQuantizer(4, 2, revive_after=100) for _ in range(2))
    for quantizer, vectors in ((moving, z), (clean, z[:1])):
        quantizer.idle.zero_()
        quantizer(vectors)
        quantizer.after_step()
    assert torch.equal(moving.codes, clean.codes)
    assert torch.equal(moving.mass, clean.mass)
    revived = MovingAverageQuantizer(4, 2, revive_after=1)
    revived(z)
    revived.after_step()
    assert revived.codes.isfinite().all()
    kl = KLTokenizer.__new__(KLTokenizer)
    nn.Module.__init__(kl)
    kl.measures, kl.shift, kl.scale = True, torch.ones(2, 1, 1), torch.full((2, 1, 1), 3.0)
    kl.steps = torch.zeros((), dtype=torch.int64)
    kl._count(torch.full((1, 2, 2, 2), nan))
    assert (kl.shift.unique().tolist(), kl.scale.unique().tolist()) == ([1.0], [3.0])
    kl._count(torch.randn(1, 2, 2, 2))
    assert kl.shift.isfinite().all()
    assert kl.shift.unique().tolist() != [1.0]


# ---- a run of them


def test_a_run_of_them_ends_the_training_with_its_packs_and_goes_on_behind_them(
    tmp_path: Path, spoil: Spoil, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    spoil(2, 4, value=float("inf"))
    options = ["--nonfinite.max_skipped", "2"]
    assert fit(folder, *options) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[-1] == (
        "unimodal: nonfinite.max_skipped: expected fewer than 2 steps in a row whose loss or gradient is not finite, got as "
        f"many up to step 3; the packs of the last are in {folder / 'nonfinite'}, --ckpt_path last goes on behind them"
    )
    assert len(said) == 3
    assert os.listdir(folder / "nonfinite") == ["step_000003_rank_0"]
    kept = folder / "nonfinite" / "step_000003_rank_0"
    first, second = json.loads((kept / "packs.json").read_text())
    assert first["loss"] == "inf"
    assert float(second["loss"]) > 0
    assert all(d["text"] for d in first["documents"] if d["source"] != "image")
    assert {"number", "epoch", "source", "document", "text"} == set(first["documents"][0])
    pictures = sorted(kept.glob("pack_0_image_*.png"))
    tensors = load_file(kept / "pack_0.safetensors")
    assert len(pictures) == first["images"] == sum(len(v) for n, v in tensors.items() if n.startswith("images."))
    pixels = torch.tensor(list(Image.open(pictures[0]).convert("RGB").tobytes()), dtype=torch.uint8)
    shown = ((tensors["images.0"][0] / 2 + 0.5) * 255).round().to(torch.uint8).permute(1, 2, 0).flatten()
    assert torch.equal(pixels, shown)
    assert {"text_ids", "inverse", "positions"} <= set(tensors)
    # What follows is trained on: the counter begins anew, the documents are behind.
    last = checkpoint(folder)
    assert last["global_step"] == 3
    assert last["callbacks"]["NonFinite"] == {"skipped": 2, "in_a_row": 0}
    assert fit(folder, *options, "--ckpt_path", "last") == 0
    assert checkpoint(folder)["callbacks"]["NonFinite"] == {"skipped": 2, "in_a_row": 0}
    numbers = [n for pack in (first, second) for n in (d["number"] for d in pack["documents"])]
    assert not set(numbers) & {n for lane in last["DigitsData"]["lanes"] for n in lane[1:]}
    with pytest.raises(ValueError, match=r"nonfinite\.max_skipped: expected 1 or more, got 0"):
        NonFinite(0)


# ---- two ranks


RANKS = """
import json, sys
import torch
torch.set_num_threads(1)
import unimodal.training.lightning_cli
from forking import ended, fork_ranks
from unimodal.cli import main
from unimodal.training import UnifiedTraining

original = UnifiedTraining.training_step
def step(self, batch, batch_idx):  # of rank 1, in steps 2 and 3; gradients stay finite, so that rank 0 sees nothing
    loss = original(self, batch, batch_idx)
    return loss + float("nan") if batch_idx in (2, 4) and self.global_rank == 1 else loss
UnifiedTraining.training_step = step

for arguments in json.loads(sys.argv[1]):
    print(ended(fork_ranks(lambda: main(arguments), 2)), flush=True)
    print("END", file=sys.stderr, flush=True)
"""


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str]]:
    """Runs of two ranks: the folder of each strategy's, and what both said."""
    root = tmp_path_factory.mktemp("ranks")
    (root / "tiny.yaml").write_text(TINY)
    commands = [
        ["fit", "-c", str(RECIPE), "-c", str(root / "tiny.yaml"), "--trainer.default_root_dir", str(root / strategy),
         "--trainer.devices", "2", "--trainer.strategy", strategy, "--checkpoint.keep_last", "9",
         "--nonfinite.max_skipped", "2"]
        for strategy in ("ddp", "sharded")
    ]  # fmt: skip
    done = script(RANKS, json.dumps(commands))
    assert [line for line in done.stdout.splitlines() if line.startswith("[")] == ["[2, 2]"] * 2, done.stderr
    said = done.stderr.split("END")
    return {strategy: (root / strategy, text) for strategy, text in zip(("ddp", "sharded"), said, strict=False)}


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "sharded"])
def test_a_bad_loss_on_one_rank_is_skipped_by_both(strategy: str, pairs: dict[str, tuple[Path, str]]) -> None:
    folder, said = pairs[strategy]
    assert said.count("got as many up to step 3") == 2
    assert said.count("(rank 1: losses nan") == 2
    first, third = checkpoint(folder, "step_000001"), checkpoint(folder, "step_000003")
    assert same(first["state_dict"], third["state_dict"])
    assert first["optimizer_states"][0]["state"] != {}
    assert same(first["optimizer_states"][0]["state"], third["optimizer_states"][0]["state"])
    assert third["callbacks"]["NonFinite"]["skipped"] == 2
    assert sorted(os.listdir(folder / "nonfinite")) == ["step_000003_rank_0", "step_000003_rank_1"]
    fine, bad = (
        json.loads((folder / "nonfinite" / f"step_000003_rank_{r}" / "packs.json").read_text()) for r in (0, 1)
    )
    assert [pack["loss"] == "nan" for pack in (*fine, *bad)] == [False, False, True, False]
