"""Sharded training: ranks that hold parts are one process that holds all; checkpoints of either are read by both."""

import json
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from forking import script
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from unimodal.backbone import Backbone, BackboneConfig, Experts, Lora, deferred
from unimodal.cli import main
from unimodal.shards import is_sharded, together, write
from unimodal.training import lightning_cli
from unimodal.training.checkpoints import damage
from unimodal.training.sharded_files import consolidated, save_sharded

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "lightning_configs" / "models" / "digits_mot_flow.yaml"
TRAINER = ROOT / "lightning_configs" / "trainer"
TINY = """
model:
  init_args:
    model:
      backbone: {width: 32, depth: 2, heads: 2, kv_heads: 2, mlp_width: 48, vocabulary: 300}
    warmup_steps: 2
    ema_decay: 0.6
data:
  init_args: {batch_tokens: 512, validation_documents: 4, prompts: 1}
trainer:
  {max_steps: 4, val_check_interval: 2, precision: 32-true, accelerator: cpu, enable_progress_bar: false, num_nodes: 1}
checkpoint: {every_n_train_steps: 2, keep_last: 4}
"""
DRIVER = """
import json, os, shutil, signal, sys
import torch
torch.set_num_threads(1)
import unimodal.training.lightning_cli
from forking import fork_ranks
from unimodal.cli import main

def run(arguments, ranks):
    left, codes = set(fork_ranks(lambda: main([*arguments, "--trainer.devices", str(ranks)]), ranks)), []
    while left:
        pid, status = os.wait()
        left.discard(pid)
        codes.append(os.waitstatus_to_exitcode(status))
        if codes[-1]:  # the others would wait for it
            for other in left:
                os.kill(other, signal.SIGKILL)
    return codes

codes = {}
for name, ranks, arguments, copied in json.loads(sys.argv[1]):
    folder = arguments[arguments.index("--trainer.default_root_dir") + 1]
    if copied:
        shutil.copytree(copied, folder, symlinks=True, ignore=shutil.ignore_patterns("export", "samples"))
    codes[name] = run(arguments, ranks)
print(json.dumps(codes))
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of short trainings: by one process, by two and four that hold parts, and going on with one another's."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "tiny.yaml").write_text(TINY)
    plan: list[tuple[str, int, list[str], str]] = []

    def add(
        name: str, ranks: int, trainer: str, *options: str, after: str = "", command: str = "fit", every: int = 2
    ) -> None:
        going_on = ["--ckpt_path", str(folder / name / "checkpoints" / "step_000002.ckpt")] if after else []
        files = [RECIPE, TRAINER / f"{trainer}.yaml", folder / "tiny.yaml"]
        arguments = [command, *(word for file in files for word in ("-c", str(file))), *going_on, *options]
        arguments += ["--trainer.default_root_dir", str(folder / name), "--trainer.val_check_interval", str(every)]
        plan.append((name, ranks, arguments, str(folder / after) if after else ""))

    add("one_2", 1, "cpu", "--trainer.accumulate_grad_batches", "2", every=4)
    add("one_4", 1, "cpu", "--trainer.accumulate_grad_batches", "4", every=8)
    add("fsdp", 2, "fsdp")
    add("hsdp", 4, "hsdp")
    add("fsdp_goes_on", 2, "fsdp", after="fsdp")
    add("one_goes_on", 1, "cpu", "--trainer.accumulate_grad_batches", "2", after="fsdp", every=4)
    add("fsdp_after_one", 2, "fsdp", after="one_2")
    add("validated", 2, "fsdp", after="fsdp", command="validate")
    muon = ["--model.init_args.muon_lr", "0.01", "--model.init_args.checkpoint_layers", "true",
            "--model.init_args.init", str(folder / "one_2" / "export")]  # fmt: skip
    add("muon_one", 1, "cpu", "--trainer.accumulate_grad_batches", "2", *muon, every=100)
    add("muon_fsdp", 2, "fsdp", *muon, every=100)
    adapters = "{rank: 2, alpha: 4.0, parts: [mlp], experts: [image]}"
    lora = ["--model.init_args.model.backbone.experts.mlp", "false",
            "--model.init_args.model.backbone.experts.lora", adapters]  # fmt: skip
    add("lora_one", 1, "cpu", "--trainer.accumulate_grad_batches", "4", *lora, every=8)
    add("lora_fsdp", 4, "fsdp", *lora)
    add("lora_goes_on", 4, "fsdp", *lora, after="lora_fsdp")
    mixed = ["--trainer.precision", "bf16-mixed", "--data.init_args.validation_documents", "20"]  # five packs
    add("mixed_one", 1, "cpu", "--trainer.accumulate_grad_batches", "2", *mixed, every=8)
    add("mixed_fsdp", 2, "fsdp", *mixed, every=4)
    done = script(DRIVER, json.dumps(plan))
    codes = json.loads(done.stdout.splitlines()[-1])
    assert codes == {name: [0] * ranks for name, ranks, *_ in plan}, done.stderr[-3000:]
    (folder / "said").write_text(done.stdout + done.stderr)
    return folder


def exported(folder: Path, weights: str = "ema") -> dict[str, Tensor]:
    if not (folder / "export").exists():
        assert main(["consolidate", str(folder), "--weights", weights]) == 0
    return load_file(folder / "export" / "model.safetensors")


def close(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 2e-6) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow
@pytest.mark.parametrize(("sharded", "whole"), [
    ("fsdp", "one_2"), ("hsdp", "one_4"), ("fsdp_goes_on", "one_2"), ("one_goes_on", "one_2"), ("fsdp_after_one", "one_2"),
    ("lora_fsdp", "lora_one"), ("lora_goes_on", "lora_one"),  # two rows for four ranks
])  # fmt: skip
def test_parts_on_many_ranks_are_one_process(runs: Path, sharded: str, whole: str) -> None:
    """The average after four steps; so weights, moments and data were the same, from the start or from a checkpoint."""
    start, end = exported(runs / whole), exported(runs / sharded)
    close(start, end)
    saved = [consolidated((runs / name / "checkpoints" / "last.ckpt").resolve()) for name in (sharded,)
             if (runs / name / "checkpoints" / "last.ckpt").is_dir()]  # fmt: skip
    full = torch.load((runs / whole / "checkpoints" / "last.ckpt"), weights_only=True)
    for checkpoint in saved:
        close(full["state_dict"], checkpoint["state_dict"])
        moments, expected = checkpoint["optimizer_states"][0]["state"], full["optimizer_states"][0]["state"]
        assert moments.keys() == expected.keys()
        for n in moments:
            close(expected[n], moments[n], 2e-5)


@pytest.mark.slow
def test_muon_and_recomputed_layers_and_a_start_from_an_export(runs: Path) -> None:
    """Muon's iteration is in bf16: equal up to that."""
    begun, one, two = (exported(runs / name) for name in ("one_2", "muon_one", "muon_fsdp"))
    apart = sum(float((one[n] - two[n]).square().sum()) for n in one)
    moved = sum(float((one[n] - begun[n]).square().sum()) for n in one)
    assert apart < 0.08**2 * moved


@pytest.mark.slow
def test_mixed_precision_and_packs_that_ranks_do_not_divide(runs: Path) -> None:
    """Layers' weights come in bf16, norms with them: equal up to that. Validation has an odd number of packs."""
    one, two = exported(runs / "mixed_one"), exported(runs / "mixed_fsdp")
    close(one, two, 2e-3)
    assert max(float((one[n] - exported(runs / "one_2")[n]).abs().max()) for n in one) > 1e-6
    found = [validated(runs / name) for name in ("mixed_one", "mixed_fsdp")]
    assert len(found[0]) == 1
    assert found[0] == pytest.approx(found[1], rel=2e-3)
    assert list((runs / "mixed_fsdp" / "samples").glob("*.png"))


def validated(run: Path) -> list[float]:
    """Losses of validation."""
    table = [line.split(",") for line in next((run / "logs").rglob("metrics.csv")).read_text().splitlines()]
    at = table[0].index("val/loss")
    return [float(row[at]) for row in table[1:] if row[at]]


@pytest.mark.slow
def test_samples_and_losses_of_validation_are_those_of_one_process(runs: Path) -> None:
    for name in ("step_000002.png", "step_000004.png"):
        assert (runs / "fsdp" / "samples" / name).read_bytes() == (runs / "one_2" / "samples" / name).read_bytes()
    (sheet,) = (runs / "validated" / "validation").glob("*.png")  # of the same checkpoint
    assert sheet.read_bytes() == (runs / "fsdp" / "samples" / "step_000002.png").read_bytes()
    losses = [validated(runs / run) for run in ("one_2", "fsdp")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert len(losses[0]) == 2


@pytest.mark.slow
def test_a_checkpoint_is_parts_and_the_rest_and_damage_is_seen(runs: Path, tmp_path: Path) -> None:
    folder = (runs / "fsdp" / "checkpoints" / "last.ckpt").resolve()
    assert sorted(p.name.split("-model")[0] for p in folder.iterdir()) == [
        "checksums.json", "rest.ckpt", "shard-00001", "shard-00002"
    ]  # fmt: skip
    sizes = [sum(t.numel() for t in load_file(p).values()) for p in sorted(folder.glob("*.safetensors"))]
    assert max(sizes) < 0.6 * sum(sizes)  # no rank wrote it all
    assert damage(folder) is None
    for name in [p.name for p in folder.iterdir()]:
        copy = tmp_path / name
        shutil.copytree(folder, copy)
        data = bytearray((copy / name).read_bytes())
        data[len(data) // 2] ^= 1
        (copy / name).write_bytes(data)
        assert damage(copy) is not None, name
    shutil.rmtree(tmp_path / "rest.ckpt" / "rest.ckpt", ignore_errors=True)
    assert not [p for p in (runs / "fsdp" / "checkpoints").iterdir() if p.name.startswith(".")]


@pytest.mark.slow
def test_what_a_sharded_run_leaves_instead_of_an_export(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"write the export with: unimodal consolidate {runs / 'hsdp'}" in (runs / "said").read_text()
    run = json.loads((runs / "hsdp" / "run.json").read_text())
    assert (run["steps"], run["recipe"]) == (4, "digits_mot_flow")
    exported(runs / "hsdp")
    info = json.loads((runs / "hsdp" / "export" / "export.json").read_text())
    assert (info["kind"], info["weights"], info["recipe"]) == ("model", "ema", "digits_mot_flow")
    assert (
        main(["generate", "image", "--run", str(runs / "hsdp"), "--prompt", "three", "--out", str(runs / "drawn")]) == 0
    )
    capsys.readouterr()
    assert main(["consolidate", str(runs / "validated" / "validation")]) == 2
    assert "run: expected a run folder of fit, got" in capsys.readouterr().err


@pytest.fixture
def group(tmp_path: Path) -> Iterator[DeviceMesh]:
    """One rank, which is a group of its own."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("part", ["parts", "rest"])
def test_a_full_disk_is_reported_and_leaves_what_was_there(
    part: str, group: DeviceMesh, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "checkpoints" / "step_000003.ckpt"

    def content(size: int) -> dict[str, object]:
        large, small = torch.randn(size), torch.randn(10)
        cut, whole = (large, small) if part == "parts" else (small, large)
        return {"state_dict": {"cut": distribute_tensor(cut, group, [Shard(0)]), "whole": whole}, "step": 3}

    assert save_sharded(content(100), folder)
    assert damage(folder) is None
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)  # a write beyond it fails as on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    try:
        assert not save_sharded(content(100_000), folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    warned = [line for line in capsys.readouterr().err.splitlines() if line.startswith("WARNING")]
    assert len(warned) == 1
    assert "File too large" in warned[0]
    assert warned[0].endswith("training goes on, earlier ones are kept")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert save_sharded(content(100), folder)


def test_a_folder_without_its_parts_is_damaged(group: DeviceMesh, tmp_path: Path) -> None:
    folder = tmp_path / "step_000003.ckpt"
    cut = distribute_tensor(torch.arange(12.0).view(4, 3), group, [Shard(0)])
    assert save_sharded({"state_dict": {"cut": cut}, "list": [1, (2, "three")]}, folder)
    assert consolidated(folder)["list"] == [1, (2, "three")]
    assert torch.equal(consolidated(folder)["state_dict"]["cut"], torch.arange(12.0).view(4, 3))
    assert consolidated(folder, lambda place: False)["state_dict"]["cut"].is_meta
    (folder / "checksums.json").write_text("{}")
    assert damage(folder) == "checksums.json names no parts"
    (folder / "checksums.json").unlink()
    assert "FileNotFoundError" in str(damage(folder))


# ---- memory


EXPERTS = Experts(attention=True, norms=True, lora=Lora(rank=2, alpha=4.0, parts=("mlp",), experts=("image",)))
CONFIG = BackboneConfig(
    width=16, depth=2, heads=2, kv_heads=1, mlp_width=24, vocabulary=20, added_tokens=10, qk_norm=True, qkv_bias=True,
    positions="sequential", adaln=True, experts=EXPERTS,
)  # fmt: skip


def test_a_deferred_backbone_has_no_memory_and_begins_with_the_same_values() -> None:
    torch.manual_seed(5)
    expected = Backbone(CONFIG, image_ids=6)
    after = torch.rand(())
    torch.manual_seed(5)
    with deferred():
        made = Backbone(CONFIG, image_ids=6)
    assert torch.rand(()) == after  # and leaves the generator where the other does
    assert made.deferred
    assert all(p.is_meta for p in made.parameters())
    assert not any(b.is_meta for b in made.buffers())
    made._apply(lambda t: torch.empty_like(t, device="cpu") if t.is_meta else t)
    made.reset_parameters(write)
    for name, parameter in expected.named_parameters():
        assert torch.equal(parameter, made.get_parameter(name)), name
    torch.manual_seed(6)
    assert not torch.equal(Backbone(CONFIG).embedding.weight, expected.embedding.weight)


def test_a_model_that_is_whole_is_left_alone() -> None:
    module = torch.nn.Linear(3, 2)
    with together(module):
        assert not is_sharded(module)
    write(module.weight, torch.arange(3.0)[None], 1)
    assert module.weight[1].tolist() == [0, 1, 2]
    write(module.bias, torch.tensor([1.0, 2.0]))
    assert module.bias.tolist() == [1, 2]


@pytest.mark.parametrize(("strategy", "message"), [
    ("{class_path: lightning.pytorch.strategies.ModelParallelStrategy}",
     "trainer.strategy: expected sharded to have the weights cut, got ModelParallelStrategy"),
    ("{class_path: unimodal.training.Sharded, init_args: {replicas: 0}}",
     "trainer.strategy.replicas: expected at least 1, got 0"),
    ("{class_path: unimodal.training.Sharded, init_args: {replicas: 2}}",
     "trainer.strategy.replicas: expected a divisor of the 1 ranks, got 2"),
])  # fmt: skip
def test_what_is_not_supported_is_said(
    strategy: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "strategy.yaml").write_text(f"trainer: {{accelerator: cpu, devices: 1, strategy: {strategy}}}")
    arguments = ["fit", "-c", str(RECIPE), "-c", str(tmp_path / "strategy.yaml")]
    assert main([*arguments, "--trainer.default_root_dir", str(tmp_path / "run")]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert message in line
    assert not (tmp_path / "run").exists()


def test_devices_are_the_processes_that_torchrun_started(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    arguments = [
        "fit",
        "-c",
        str(RECIPE),
        "--trainer.default_root_dir",
        str(tmp_path / "run"),
        "--trainer.strategy",
        "ddp",
    ]
    assert main([*arguments, "--trainer.accelerator", "cpu"]) == 2
    assert "trainer.devices: expected the 2 processes that were started here, got 1" in capsys.readouterr().err
    assert lightning_cli._devices("auto", "cpu") == 2
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    assert lightning_cli._devices("auto", "gpu") == "auto"
    assert lightning_cli._devices(2, "cpu") == 2


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["fit", "-c", str(RECIPE), "-c", str(TRAINER / "fsdp.yaml"), "--trainer.default_root_dir"]
    assert main([*arguments, str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == "unimodal: trainer.accelerator: expected cpu on a machine without a GPU, got gpu"
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_is_not_sharded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = ROOT / "lightning_configs" / "tokenizers" / "digits_vq.yaml"
    options = ["--trainer.accelerator", "cpu", "--trainer.strategy", "sharded"]
    assert main(["fit", "-c", str(recipe), "--trainer.default_root_dir", str(tmp_path / "run"), *options]) == 2
    assert "trainer.strategy: expected ddp for TokenizerTraining, got Sharded" in capsys.readouterr().err
