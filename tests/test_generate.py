"""One tiny run, and everything a user does with it: draw, write, describe, score, load elsewhere."""

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from unimodal import UnifiedModel
from unimodal.cli import main
from unimodal.data.digits import digit_images
from unimodal.decoding import decode
from unimodal.decoding_settings import DecodingSettings
from unimodal.documents import Document, Part, read_markdown
from unimodal.export import ExportInfo, load_export, load_run, save_export

ROOT = Path(__file__).parents[1]
FLOW = ROOT / "lightning_configs" / "models" / "digits_mot_flow.yaml"
TINY = """
model:
  init_args:
    model:
      generator: {init_args: {sampling: {steps: 3, solver: euler, guidance: 2.0, shift: 1.0}}}
      backbone: {width: 32, depth: 2, heads: 2, kv_heads: 2, mlp_width: 48, vocabulary: 300}
      sequence: {image_sizes: [[8, 8], [8, 16]], context_length: 192, drop_text: 0.1}
    warmup_steps: 2
    ema_decay: 0.9
data:
  init_args: {batch_tokens: 512, validation_documents: 4, prompts: 2}
trainer:
  max_steps: 6
  val_check_interval: 3
  log_every_n_steps: 1
  precision: 32-true
  accelerator: cpu
  enable_progress_bar: false
checkpoint: {every_n_train_steps: 3}
"""
PROMPT = "a handwritten six"


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generate")
    (folder / "tiny.yaml").write_text(TINY)
    options = ["-c", str(FLOW), "-c", str(folder / "tiny.yaml"), "--trainer.default_root_dir", str(folder / "run")]
    assert main(["fit", *options]) == 0
    return folder / "run"


Draw = Callable[..., tuple[dict[str, np.ndarray], list[dict[str, Any]]]]


@pytest.fixture
def draw(run: Path, tmp_path: Path) -> Draw:
    """`generate image` with options: pixels by file name, and the records of images.jsonl."""
    made = iter(range(100))

    def make(*options: object, prompt: tuple[str, ...] = ("--prompt", PROMPT)) -> Any:
        out = tmp_path / f"out{next(made)}"
        assert main(["generate", "image", "--run", str(run), "--out", str(out), *prompt, *map(str, options)]) == 0
        records = [json.loads(line) for line in (out / "images.jsonl").read_text().splitlines()]
        names = sorted(path.name for path in out.iterdir())
        assert names == sorted([*(r["image"] for r in records), "images.jsonl"])
        return {r["image"]: np.asarray(Image.open(out / r["image"])) for r in records}, records

    return make


# ---- the run folder


def test_the_run_folder_holds_what_is_promised(run: Path) -> None:
    assert {path.name for path in run.iterdir()} == {
        ".lock", "config.yaml", "logs", "tensorboard", "checkpoints", "samples", "export", "run.json",
    }  # fmt: skip
    assert {path.name for path in (run / "export").iterdir()} == {
        "export.json", "config.json", "model.safetensors", "tokenizer.json",
    }  # fmt: skip
    assert (run / "checkpoints" / "last.ckpt").is_file()
    assert list((run / "tensorboard").rglob("events.out.tfevents.*"))
    samples = {path.name for path in (run / "samples").iterdir()}
    assert samples == {f"step_{step:06d}.{suffix}" for step in (3, 6) for suffix in ("png", "html")}
    assert Image.open(run / "samples" / "step_000006.png").width > 48
    assert "data:image/png" in (run / "samples" / "step_000006.html").read_text()
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["model"]["init_args"]["model"]["init_args"]["backbone"]["width"] == 32  # the overlay
    assert config["model"]["init_args"]["lr"] == yaml.safe_load(FLOW.read_text())["model"]["init_args"]["lr"]
    assert config["seed_everything"] == 0
    record = json.loads((run / "run.json").read_text())
    assert record["steps"] == 6
    assert record["train_seconds"] > 0
    trained = sum(p.numel() for p in load_run(run).parameters() if p.requires_grad)
    assert record["parameters"] == trained
    info = json.loads((run / "export" / "export.json").read_text())
    assert set(info) == {"format_version", "kind", "weights", "recipe", "commit", "licence"}
    assert (info["kind"], info["weights"], info["recipe"], info["format_version"]) == (
        "model", "ema", "digits_mot_flow", 1,
    )  # fmt: skip


def test_losses_are_logged_by_kind(run: Path) -> None:
    (path,) = (run / "logs").glob("*/metrics.csv")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    expected = {
        "train/text", "train/image", "train/loss", "val/loss", "val/text_to_image/image", "val/image_to_text/text",
        "val/sum/text", "val/sum/image", "val/text/text",
    }  # fmt: skip
    assert expected <= set(rows[0])
    held_out = [row for row in rows if row["val/loss"]]
    assert len(held_out) == 2
    for row in held_out:
        assert all(float(row[name]) > 0 for name in expected if name.startswith("val/"))
    assert len({row["val/loss"] for row in held_out}) == 2
    assert sum(bool(row["train/loss"]) for row in rows) == 6
    assert any(name.startswith("lr-") for name in rows[0])


def test_the_resolved_config_trains_the_same_model(run: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    options = ["-c", str(run / "config.yaml"), "--trainer.default_root_dir", str(again)]
    assert main(["fit", *options]) == 0
    a, b = ((folder / "export" / "model.safetensors").read_bytes() for folder in (run, again))
    assert a == b
    for name in ("step_000003.png", "step_000006.png", "step_000006.html"):
        assert (run / "samples" / name).read_bytes() == (again / "samples" / name).read_bytes()


# ---- images


def test_images_and_their_records(draw: Draw) -> None:
    images, records = draw("-n", 3, "--seed", 5, "--guidance", 1.5)
    assert list(images) == ["00000.png", "00001.png", "00002.png"]
    assert all(pixels.shape == (8, 8, 3) for pixels in images.values())
    assert [record["seed"] for record in records] == [5, 6, 7]
    for record in records:
        assert {key: record[key] for key in ("prompt", "weights", "guidance", "steps", "solver", "shift")} == {
            "prompt": PROMPT, "weights": "ema", "guidance": 1.5, "steps": 3, "solver": "euler", "shift": 1.0,
        }  # fmt: skip
    assert len({pixels.tobytes() for pixels in images.values()}) == 3


def test_a_seed_decides_an_image_whatever_is_drawn_beside_it(draw: Draw) -> None:
    (four, _), (again, _) = draw("-n", 4), draw("-n", 4)
    by_one, _ = draw("-n", 4, "--batch", 1)
    by_three, _ = draw("-n", 4, "--batch", 3)
    alone, _ = draw("--seed", 2)
    for name, pixels in four.items():
        np.testing.assert_array_equal(pixels, again[name])
        for other in (by_one, by_three):  # equal up to the rounding of a matrix product of another size
            assert np.abs(pixels.astype(int) - other[name]).max() <= 1
    assert np.abs(four["00002.png"].astype(int) - alone["00000.png"]).max() <= 1


def test_many_prompts(draw: Draw, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text(f"{PROMPT}\na handwritten two\n数字 \U0001f600\n", encoding="utf-8")
    images, records = draw("-n", 2, prompt=("--prompts", str(tmp_path / "prompts.txt")))
    assert len(images) == 6
    assert [(r["prompt"], r["seed"]) for r in records] == [
        (prompt, seed) for prompt in (PROMPT, "a handwritten two", "数字 \U0001f600") for seed in (0, 1)
    ]
    alone, _ = draw()
    assert np.abs(alone["00000.png"].astype(int) - images["00000.png"]).max() <= 1
    (one, _), (other, _) = (  # six steps teach little: guidance makes it visible that the prompt is read
        draw("--guidance", 300, prompt=("--prompt", text)) for text in (PROMPT, "a handwritten two")
    )
    assert np.abs(one["00000.png"].astype(int) - other["00000.png"]).max() > 1


def test_each_setting_reaches_the_sampler(draw: Draw) -> None:
    plain, _ = draw()
    for options in (("--steps", 5), ("--solver", "heun"), ("--shift", 3), ("--guidance", 7), ("--seed", 1)):
        changed, (record,) = draw(*options)
        assert record[str(options[0]).removeprefix("--")] == options[1]
        assert (changed["00000.png"] != plain["00000.png"]).any(), options


def test_settings_without_an_option_reach_the_sampler_too(draw: Draw) -> None:
    (plain, _), (shorter, records) = draw("--guidance", 300), draw("--guidance", 300, "--set", "rescale=1")
    assert records[0]["rescale"] == 1.0
    assert any(not np.array_equal(plain[name], shorter[name]) for name in plain)
    (late, records) = draw("--guidance", 300, "--set", "interval=[0.9, 1]")
    assert records[0]["interval"] == [0.9, 1.0]
    (alone, _) = draw("--guidance", 1)
    assert all(np.array_equal(late[name], alone[name]) for name in late)  # no step lies in it


def test_words_to_be_led_away_from_reach_the_sampler(draw: Draw) -> None:
    plain, (record,) = draw("--guidance", 300)
    away, (led,) = draw("--guidance", 300, "--negative", "a handwritten two")
    assert "negative" not in record
    assert led["negative"] == "a handwritten two"
    assert any((plain[name] != away[name]).any() for name in plain)


def test_inpainting_keeps_what_is_given(draw: Draw, tmp_path: Path) -> None:
    pixels = (
        np.random.default_rng(0).integers(0, 256, (8, 8, 1), dtype=np.uint8).repeat(3, axis=2)
    )  # gray, as the recipe
    redraw = np.zeros((8, 8), dtype=np.uint8)
    redraw[:, 4:] = 255
    Image.fromarray(pixels).save(tmp_path / "image.png")
    Image.fromarray(redraw).save(tmp_path / "mask.png")
    images, _ = draw("-n", 2, "--inpaint", tmp_path / "image.png", "--redraw", tmp_path / "mask.png")
    for drawn in images.values():
        assert np.abs(drawn[:, :4].astype(int) - pixels[:, :4]).max() <= 1  # rounding
        assert np.abs(drawn[:, 4:].astype(int) - pixels[:, 4:]).max() > 30


def test_sizes_the_recipe_allows(draw: Draw) -> None:
    images, _ = draw("--size", "16x8")
    assert images["00000.png"].shape == (8, 16, 3)


def test_raw_and_averaged_weights_differ_and_are_recorded(draw: Draw, run: Path) -> None:
    (ema, (of_ema,)), (raw, (of_raw,)) = draw(), draw("--weights", "raw")
    assert (of_ema["weights"], of_raw["weights"]) == ("ema", "raw")
    assert (ema["00000.png"] != raw["00000.png"]).any()
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(state[f"model.{n}"], w) for n, w in load_run(run, "raw").state_dict().items())


def test_an_output_folder_is_added_to(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    command = ["generate", "image", "--run", str(run), "--prompt", PROMPT, "--out", str(out)]
    assert main(command) == 0
    (out / "mine.txt").write_text("keep")
    assert main([*command, "-n", "2"]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["00000.png", "00001.png", "images.jsonl", "mine.txt"]
    assert sorted(path.name for path in out.parent.iterdir()) == ["out"]


# ---- documents and descriptions


def test_a_document_goes_on_in_markdown_and_html(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scans = digit_images("test").images()
    for i in range(2):
        scans[i].save(tmp_path / f"{i}.png")
    (tmp_path / "prompt.md").write_text("![](0.png) plus ![](1.png) equals")
    out = tmp_path / "out"
    command = ["generate", "document", "--run", str(run), "--prompt", str(tmp_path / "prompt.md"), "--out", str(out)]
    # Six steps teach nothing about where images begin: have the model begin one at once.
    assert main([*command, "--start", "image", "--max-tokens", "5", "--max-images", "1", "--seed", "4"]) == 0
    printed = capsys.readouterr().out
    assert "[image]" in printed
    assert str(out / "document.html") in printed
    assert (out / "document.html").read_text().count("data:image/png") == 3
    document = read_markdown((out / "document.md").read_text(encoding="utf-8"), out)
    assert len(document.images) == 3
    np.testing.assert_array_equal(np.asarray(document.images[0]), np.asarray(scans[0]))
    record = json.loads((out / "settings.json").read_text())
    assert (record["seed"], record["weights"], record["max_tokens"]) == (4, "ema", 5)
    assert record["image"]["steps"] == 3
    assert record["negative"] == ""
    led = ["--start", "image", "--max-tokens", "0", "--max-images", "1", "--guidance", "300", "--negative", "two"]
    assert main([*command[:5], "one plus one", "--out", str(tmp_path / "led"), *led]) == 0
    assert json.loads((tmp_path / "led" / "settings.json").read_text())["negative"] == "two"
    written = []
    for name, options in (("text", []), ("one", ["--text-top-k", "1"]), ("few", ["--text-top-p", "1e-9"]), ("any", [])):
        words = [] if name == "text" else ["--text-temperature", "5", *options]
        texts = [*command[:5], "one plus one", "--out", str(tmp_path / name), "--max-tokens", "9", *words]
        assert main(texts) == 0
        written.append((tmp_path / name / "document.md").read_text(encoding="utf-8"))
    assert "one plus one" in written[0]
    assert written[0] == written[1] == written[2] != written[3]  # of one word there is no other


def test_describing_prints_what_the_model_writes(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scan = digit_images("test").image(0)
    scan.save(tmp_path / "scan.png")
    capsys.readouterr()
    assert main(["describe", "--run", str(run), str(tmp_path / "scan.png"), "--max-tokens", "6"]) == 0
    captured = capsys.readouterr()
    settings = DecodingSettings(max_tokens=6, max_images=0)
    (expected,) = decode(load_run(run), [Document((Part(scan, learn=False),))], settings, [0])
    assert captured.out == "".join(p.text for p in expected.parts if p.is_text) + "\n"
    assert captured.err == "(ema weights)\n"


# ---- exports


LOAD = """
import json, sys
import torch
torch.set_num_threads(1)
from unimodal import UnifiedModel
from unimodal.decoding import decode
from unimodal.decoding_settings import DecodingSettings
from unimodal.documents import Document, Part
model = UnifiedModel.from_pretrained(sys.argv[1])
assert not model.training
prompt = Document((Part(sys.argv[2], learn=False),))
(image,) = decode(model, [prompt], DecodingSettings("image", max_tokens=0, max_images=1), [3])
(text,) = decode(model, [prompt], DecodingSettings(max_tokens=6, max_images=0), [3])
print(json.dumps([list(image.parts[-1].image.tobytes()), text.text]))
never = [m for m in sys.modules if m.startswith(("unimodal.data", "unimodal.training", "lightning", "sklearn"))]
assert not never, never
"""


def test_an_export_loads_in_a_process_that_never_saw_the_data(run: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", LOAD, str(run), PROMPT]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    pixels, text = json.loads(done.stdout)
    model = UnifiedModel.from_pretrained(run / "export")
    prompt = Document((Part(PROMPT, learn=False),))
    (image,) = decode(model, [prompt], DecodingSettings("image", max_tokens=0, max_images=1), [3])
    (written,) = decode(model, [prompt], DecodingSettings(max_tokens=6, max_images=0), [3])
    assert list(image.parts[-1].image.tobytes()) == pixels
    assert written.text == text


def test_export_then_load_is_the_same_model(run: Path, tmp_path: Path) -> None:
    model = load_run(run, "raw")
    assert model.config is not None
    save_export(tmp_path / "export", model, model.config, ExportInfo("model", "raw", "tiny", "unknown"))
    loaded = load_export(tmp_path / "export", "model")
    assert isinstance(loaded, UnifiedModel)
    own = model.state_dict()
    assert own.keys() == loaded.state_dict().keys()
    assert all(torch.equal(own[n], w) for n, w in loaded.state_dict().items())
    text = "grün, 数字 and \U0001f600"
    assert loaded.text.encode(text) == model.text.encode(text)
    prompts = [Document((Part(text, learn=False),)), Document((Part(digit_images("test").image(1), learn=False),))]
    for settings in (DecodingSettings("image", max_images=1), DecodingSettings(max_tokens=8)):
        for a, b in zip(*(decode(m, prompts, settings, [1, 2]) for m in (model, loaded)), strict=True):
            assert a.text == b.text
            assert [i.tobytes() for i in a.images] == [i.tobytes() for i in b.images]


def test_an_export_replaces_an_older_one_whole(run: Path, tmp_path: Path) -> None:
    model = load_run(run)
    assert model.config is not None
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "stale.json").touch()
    save_export(tmp_path / "export", model, model.config, ExportInfo("model", "ema", "tiny", "unknown"))
    assert len(list((tmp_path / "export").iterdir())) == 4
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


# ---- scores


KEYS = {
    "judge_accuracy", "asked_digit", "image_to_text", "sums_text", "sums_drawn", "frechet", "frechet_real",
    "frechet_noise", "precision", "recall", "copies", "copies_real", "train_seconds", "parameters",
}  # fmt: skip


@pytest.mark.slow
def test_evaluate_digits_writes_scores_and_a_page(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["evaluate", "digits", "--run", str(run), "--out", str(out), "--steps", "1", "--guidance", "1"]) == 0
    scores = json.loads((out / "scores.json").read_text())
    assert set(scores) >= KEYS
    assert scores["judge_accuracy"] > 0.97
    assert 0 <= scores["asked_digit"] < 0.5  # six steps
    assert scores["frechet_real"] < scores["frechet"]
    assert scores["weights"] == "ema"
    assert scores["guidance"] == 1
    assert scores["parameters"] == json.loads((run / "run.json").read_text())["parameters"]
    assert scores["train_seconds"] == json.loads((run / "run.json").read_text())["train_seconds"]
    assert "asked_digit" in capsys.readouterr().out
    page = (out / "index.html").read_text()
    assert page.count("data:image/png") >= 2 + 10
    assert Image.open(out / "samples.png").width >= 80


def test_what_was_given_of_an_image_is_written_down(draw: Draw, tmp_path: Path) -> None:
    image, mask = tmp_path / "given.png", tmp_path / "mask.png"
    Image.new("RGB", (8, 8), "white").save(image)
    Image.new("L", (8, 8), 255).save(mask)
    _, (record,) = draw("--inpaint", image, "--redraw", mask)
    assert (record["inpaint"], record["redraw"]) == (str(image), str(mask))
    _, (plain,) = draw()
    assert not {"inpaint", "redraw", "size"} & set(plain)
