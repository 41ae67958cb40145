"""The adversarial term: formulas, who learns from what, when it starts, that it resumes and is dealt over processes."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader

from unimodal.metrics.perceptual import TimmDistance
from unimodal.training import Adversary, FeatureDiscriminator, PatchDiscriminator, TokenizerTraining
from unimodal.training.adversary import MOST, adaptive_weight, hinge_discriminator, hinge_generator
from unimodal_tokenizers import GridTokenizer
from unimodal_tokenizers.quantizers import VectorQuantizer

VIT: dict[str, Any] = {"img_size": 8, "patch_size": 2, "embed_dim": 16, "depth": 3, "num_heads": 2}


def images(count: int) -> list[Tensor]:
    rng = torch.Generator().manual_seed(3)
    return list(torch.rand(count, 3, 8, 8, generator=rng) * 2 - 1)


def adversary(**changed: Any) -> Adversary:
    settings = {"discriminator": PatchDiscriminator(width=8, layers=1), "weight": 0.3, "lr": 3e-3, **changed}
    return Adversary(**settings)


def training(seed: int = 0, against: dict[str, Any] | None = None, **changed: Any) -> TokenizerTraining:
    torch.manual_seed(seed)
    tokenizer = GridTokenizer(VectorQuantizer(16, dim=4, revive_after=3), channels=[8, 8], blocks=1)
    settings = {"lr": 1e-2, "l1_weight": 0.5, "l2_weight": 1.0, **changed}
    return TokenizerTraining(tokenizer, adversary=adversary(**(against or {})), **settings)


class Watch(L.Callback):
    """Gradients in front of every optimizer step, and what was logged behind every batch."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, Tensor | None]] = []
        self.stepped: list[set[str]] = []  # with what the optimizer made its step
        self.logged: list[dict[str, float]] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        named = pl_module.named_parameters()
        self.gradients.append({name: None if p.grad is None else p.grad.clone() for name, p in named})

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.stepped.append({name for name, p in args[0].named_parameters() if p.grad is not None})
        self.logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def fit(folder: Path, module: TokenizerTraining, steps: int, ckpt_path: Path | None = None, **changed: Any) -> Watch:
    watch = Watch()
    runner = L.Trainer(
        accelerator="cpu", default_root_dir=folder, max_steps=steps, num_sanity_val_steps=0, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, callbacks=[watch], **changed,
    )  # fmt: skip
    data = DataLoader(images(12), batch_size=2)  # type: ignore[arg-type]
    runner.fit(module, data, DataLoader(images(4), batch_size=4), ckpt_path=ckpt_path)  # type: ignore[arg-type]
    runner.save_checkpoint(folder / "end.ckpt")
    return watch


# ---- formulas


def test_the_formulas_on_numbers_worked_out_by_hand() -> None:
    real, made = torch.tensor([[2.0, 0.5, -1.0]]), torch.tensor([[-3.0, 0.0, 1.0]])
    assert float(hinge_discriminator(real, made)) == pytest.approx(((0 + 0.5 + 2) / 3 + (0 + 1 + 2) / 3) / 2)
    assert float(hinge_generator(made)) == pytest.approx(2 / 3)
    assert float(adaptive_weight(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0]))) == pytest.approx(2.5, rel=1e-5)
    assert float(adaptive_weight(torch.ones(2), torch.zeros(2))) == MOST


@pytest.mark.parametrize("adaptive", [True, False])
def test_each_learns_from_its_own_term_alone(adaptive: bool) -> None:
    """Against the two terms written out and differentiated one after the other."""
    module = training(against={"adaptive": adaptive}).eval()  # nothing is revived
    module.log = module.log_dict = lambda *_, **__: None  # type: ignore[method-assign,assignment]
    x, against = torch.stack(images(3)), module.adversary
    assert against is not None
    module.training_step(x, 0).backward()
    found = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()

    result = module.tokenizer(x)
    y, d, last = result.images, against.discriminator, module.tokenizer.last_layer
    error = 0.5 * (y - x).abs().mean() + (y - x).square().mean()
    generator = -d(y).mean()
    balance = 1.0
    if adaptive:
        norms = [torch.autograd.grad(term, last, retain_graph=True)[0].norm() for term in (error, generator)]
        balance = norms[0] / (norms[1] + 1e-6)
    own = result.terms["codebook"] + 0.25 * result.terms["commitment"]
    tokenizer = dict(module.tokenizer.named_parameters())
    slow = torch.autograd.grad(error + own + 0.3 * balance * generator, list(tokenizer.values()), allow_unused=True)
    expected = {f"tokenizer.{name}": g for name, g in zip(tokenizer, slow, strict=True) if g is not None}
    hinge = ((1 - d(x)).clamp(min=0).mean() + (1 + d(y.detach())).clamp(min=0).mean()) / 2
    learned = dict(d.named_parameters())
    slow = torch.autograd.grad(hinge, list(learned.values()))
    expected |= {f"adversary.discriminator.{name}": g for name, g in zip(learned, slow, strict=True)}
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_a_verdict_depends_on_its_image_alone() -> None:
    torch.manual_seed(0)
    d, x = PatchDiscriminator(width=8, layers=1).double(), torch.stack(images(4)).double()
    torch.testing.assert_close(d(x), torch.cat([d(one[None]) for one in x]))
    assert d(x).shape == (4, 4)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_patch_is_as_large_as_it_says(layers: int) -> None:
    torch.manual_seed(0)
    d = PatchDiscriminator(width=8, layers=layers)
    d.network = torch.nn.Sequential(*(part for part in d.network if isinstance(part, torch.nn.Conv2d)))  # norms see all
    x = torch.rand(1, 3, 128, 128, requires_grad=True)
    verdicts = d.network(x)[0, 0]
    (seen,) = torch.autograd.grad(verdicts[verdicts.shape[0] // 2, verdicts.shape[1] // 2], x)
    rows = seen.abs().sum((0, 1, 3)).nonzero()
    assert int(rows.max() - rows.min()) + 1 == {1: 16, 2: 34, 3: 70}[layers]


def test_frozen_features_are_judged_and_compared_but_no_part_of_the_weights(tmp_path: Path) -> None:
    import timm

    torch.manual_seed(0)
    network = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=0, **VIT)
    save_file(network.state_dict(), tmp_path / "vit.safetensors")
    given: dict[str, Any] = {"weights": tmp_path / "vit.safetensors", "options": VIT}
    d = FeatureDiscriminator("vit_tiny_patch16_224", layers=[0, 2], width=8, **given)
    assert d(torch.stack(images(2))).shape == (2, 32)  # two heads on 4 x 4 tokens
    distance = TimmDistance("vit_tiny_patch16_224", layers=[1], **given)
    module = training(against={"discriminator": d}, perceptual=distance, perceptual_weight=0.1)
    names = {*module.state_dict(), *(name for name, _ in module.named_parameters())}
    assert not [name for name in names if "frozen" in name]
    before = {name: value.clone() for name, value in network.state_dict().items()}
    watch = fit(tmp_path, module, 3)
    for name, value in d.frozen.network.network.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert watch.logged[-1]["train/perceptual"] > 0
    assert all(watch.gradients[-1][f"adversary.discriminator.heads.{i}.0.weight"].abs().sum() > 0 for i in (0, 1))  # type: ignore[union-attr]
    module.double()
    assert next(d.frozen.network.parameters()).dtype == torch.float64  # it moves with its owner


# ---- training


def test_before_its_start_an_adversary_changes_nothing(tmp_path: Path) -> None:
    late, without = training(against={"start_step": 3}), training()
    without.adversary = None
    first = fit(tmp_path / "late", late, 4)
    plain = fit(tmp_path / "without", without, 4)
    for step in range(3):
        assert first.logged[step]["train/loss"] == plain.logged[step]["train/loss"]
        assert "train/generator" not in first.logged[step]
    own = {name for name in first.gradients[0] if name.startswith("adversary.")}
    assert all(not first.stepped[step] & own for step in range(3))  # AdamW counts no step of zeros
    assert first.stepped[3] >= own
    assert {"train/generator", "train/discriminator", "train/adaptive_weight"} <= first.logged[3].keys()


def test_tokenizer_and_discriminator_are_clipped_by_themselves(tmp_path: Path) -> None:
    free, clipped = (fit(tmp_path / str(value), training(), 1, gradient_clip_val=value) for value in (None, 1e-3))
    for part in ("tokenizer.", "adversary."):
        norm = torch.stack(
            [g.norm() for n, g in free.gradients[0].items() if n.startswith(part) and g is not None]
        ).norm()
        assert norm > 1e-2
    checked = torch.load(tmp_path / "0.001" / "end.ckpt", weights_only=True)["optimizer_states"][0]
    groups = [checked["param_groups"][0]["params"], checked["param_groups"][-1]["params"]]
    for group in groups:  # (1 - beta_1) times the clipped gradient
        moments = torch.stack([checked["state"][i]["exp_avg"].norm() for i in group if i in checked["state"]]).norm()
        assert float(moments) <= 0.51e-3
    assert clipped.logged[0] == free.logged[0]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_stop_and_resume_equals_never_stopped(accumulate: int, tmp_path: Path) -> None:
    """With a discriminator that starts on the way, a moving average and accumulation; a step is the tokenizer's."""
    settings: dict[str, Any] = {
        "against": {"start_step": 2},
        "ema_decay": 0.7,
        "warmup_steps": 2,
        "schedule": "constant",
    }
    accumulated = {"accumulate_grad_batches": accumulate, "gradient_clip_val": 0.5}
    steps = 6 // accumulate  # an epoch
    whole = fit(tmp_path / "whole", training(**settings), 2 * steps, **accumulated)
    first = fit(tmp_path / "first", training(**settings), steps, **accumulated)
    torch.manual_seed(99)
    second = fit(
        tmp_path / "second", training(seed=5, **settings), 2 * steps, tmp_path / "first" / "end.ckpt", **accumulated
    )
    # Names that a metric had in an earlier step stay in what Lightning shows.
    assert [one["train/loss"] for one in first.logged + second.logged] == [one["train/loss"] for one in whole.logged]
    a, b = (torch.load(tmp_path / name / "end.ckpt", weights_only=True) for name in ("whole", "second"))
    assert a["global_step"] == b["global_step"] == 2 * steps
    for part in ("state_dict", "optimizer_states", "callbacks"):
        torch.testing.assert_close(a[part], b[part], rtol=0, atol=0)
    shadow = a["callbacks"]["EMA"]["shadow"]
    assert shadow
    assert all(name.startswith("tokenizer.") for name in shadow)  # a discriminator has none
    assert (tmp_path / "whole" / "samples" / f"reconstruction_step_{2 * steps}.png").is_file()


DEALT = """
import sys
from pathlib import Path
sys.path[:0] = [str(Path(sys.argv[1]).parent)]
import lightning as L
import torch
from safetensors.torch import save_file
from unimodal.data.images import ImageData, Pictures
from unimodal.data.stream import Weighted
from torchvision.transforms.functional import to_pil_image
from test_adversary import Watch, images, training
from unimodal_tokenizers.quantizers import MovingAverageQuantizer

class Data(ImageData):
    def training_sources(self):
        pixels = images(16)
        return [Weighted(Pictures(16, lambda i: to_pil_image((pixels[i] + 1) / 2), 0), 1.0)]

    def validation_sources(self):
        return []

ranks, out = int(sys.argv[2]), Path(sys.argv[3])
module = training(against={"start_step": 1})
codebook = MovingAverageQuantizer(16, 4, decay=0.5, revive_after=100)
codebook.idle.zero_()  # nothing is revived: outputs of several processes stand in another order, and others would be drawn
codebook.codes.mul_(0.1)  # as near as outputs are
module.tokenizer.quantizer = codebook
watch = Watch()
L.Trainer(
    accelerator="cpu", devices=ranks, strategy="ddp" if ranks > 1 else "auto", default_root_dir=out, max_steps=3,
    logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, num_sanity_val_steps=0,
    limit_val_batches=0, callbacks=[watch], use_distributed_sampler=False, gradient_clip_val=0.5,
).fit(module, Data((8, 8), batch_size=4 // ranks))
found = {f"{i}.{n}": g for i, step in enumerate(watch.gradients) for n, g in step.items() if g is not None}
found |= {f"codebook.{name}": getattr(codebook, name).clone() for name in ("codes", "mass")}
found |= {f"logged.{i}.{n}": torch.tensor(v) for i, step in enumerate(watch.logged) for n, v in step.items()}
save_file(found, out / f"{module.global_rank}.safetensors")
"""


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_batch(tmp_path: Path) -> None:
    """With a discriminator, and a codebook that moves by what all processes saw."""
    (tmp_path / "dealt.py").write_text(DEALT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for ranks in (1, 2):
        (tmp_path / str(ranks)).mkdir()
        command = [sys.executable, str(tmp_path / "dealt.py"), __file__, str(ranks), str(tmp_path / str(ranks))]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
    one, (a, b) = load_file(tmp_path / "1" / "0.safetensors"), (
        load_file(tmp_path / "2" / f"{rank}.safetensors") for rank in range(2)
    )  # fmt: skip
    assert one.keys() == a.keys() == b.keys()
    assert int((one["codebook.mass"] > 0).sum()) > 3
    for name, value in one.items():
        if not name.startswith("logged."):
            assert torch.equal(a[name], b[name]), name  # gradients are averaged over processes
            torch.testing.assert_close(a[name], value, rtol=2e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
        elif "codebook_" not in name:  # usage in a batch is of that batch; lambda is the same everywhere
            torch.testing.assert_close(
                (a[name] + b[name]) / 2, value, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"weight": 0.0}, r"adversary\.weight: expected a number above 0, got 0"),
        ({"start_step": -1}, r"adversary\.start_step: expected at least 0, got -1"),
        ({"lr": 0.0}, r"adversary\.lr: expected a number above 0, got 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        adversary(**changed)


def test_images_too_small_for_the_halvings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"discriminator\.layers: expected images of 24 pixels a side, got 8 x 8"):
        PatchDiscriminator(width=8)(torch.zeros(1, 3, 8, 8))
