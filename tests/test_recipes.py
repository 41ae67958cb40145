"""Every recipe parses, builds and takes a step; every model recipe trains on a folder of your own pictures."""

import functools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from published_cases import RECIPES

from experiments.digits import words
from unimodal.cli import main
from unimodal.export import load_tokenizer
from unimodal.training.lightning_cli import recipe_name

CONFIGS = Path(__file__).parents[1] / "lightning_configs"


def set_in(path: Path) -> set[str]:
    return set(yaml.safe_load(path.read_text()))


MODELS = sorted((CONFIGS / "models").glob("*.yaml"))
TOKENIZERS = sorted(path for path in (CONFIGS / "tokenizers").glob("*.yaml") if "class_path" not in set_in(path))
SOURCES = sorted(path for path in (CONFIGS / "tokenizers").glob("*.yaml") if "class_path" in set_in(path))
"""Tokenizers that learn nothing: `import` makes them."""
DATA = sorted((CONFIGS / "data").glob("*.yaml"))
FOLDER = CONFIGS / "data" / "folder.yaml"
FLOW = CONFIGS / "models" / "digits_mot_flow.yaml"
ONE_OF_EACH = [
    CONFIGS / path
    for path in ("models/digits_mot_flow.yaml", "tokenizers/digits_vq.yaml", "tokenizers/digits_fsq.yaml")
]
"""A model, a tokenizer, and one that is laid over another: all of a kind are parsed alike."""
NOT_MEASURED = {
    "shapes_flux_latents",
    "shapes_llamagen_codes",
}
QUICK = ["--trainer.accelerator", "cpu", "--trainer.precision", "32-true", "--trainer.enable_progress_bar", "false"]


def name(path: Path) -> str:
    return path.stem


def files(recipe: Path) -> list[str]:
    """Of its command, the files of its last part: what the recipe is laid over, and itself."""
    command = recipe.read_text().splitlines()[2].split("&&")[-1]
    found = [CONFIGS.parent / path for path in re.findall(r"-c (lightning_configs/(?:models|tokenizers)/\S+)", command)]
    assert found[-1] == recipe
    return [word for path in found for word in ("-c", str(path))]


def laid_over(below: Any, above: Any) -> Any:
    """One of two nested dicts; a key of the second wins."""
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    return below | {key: laid_over(below.get(key), value) for key, value in above.items()}


def read(recipe: Path) -> Any:
    """What its command's files say together."""
    return functools.reduce(laid_over, (yaml.safe_load(Path(path).read_text()) for path in files(recipe)[1::2]))


def texts(recipe: Path) -> tuple[str, str]:
    """The first file of its command, and the last."""
    return Path(files(recipe)[1]).read_text(), recipe.read_text()


def context(recipe: Path) -> str:
    return str(read(recipe)["model"]["init_args"]["model"]["sequence"]["context_length"])


def model_options(recipe: Path, folder: Path) -> list[str]:
    """Small where size is not the point: the smallest batch, hardly any validation, an untrained tokenizer."""
    options = ["--trainer.default_root_dir", str(folder), "--data.init_args.batch_tokens", context(recipe), *QUICK]
    options += ["--data.init_args.validation_documents", "2", "--data.init_args.prompts", "1"]
    settings = read(recipe)["model"]["init_args"]
    if "tokenizer_weights" in settings:
        options += ["--model.init_args.tokenizer_weights", "null"]
    if "init" in settings:
        options += ["--model.init_args.init", "null"]
    if "benchmarks" in settings:
        options += ["--model.init_args.benchmarks", "[]"]
    if "source" in settings["model"]["tokenizer"]["init_args"]:
        source = weights(settings["model"]["tokenizer"]["init_args"]["source"], folder)
        options += ["--model.model.tokenizer.source", str(source)]
    return options


def weights(named: str, run: Path) -> Path:
    """A tiny random copy of the published weights that a recipe names, beside the run folder."""
    folder = run.parent / named
    if not folder.exists():
        RECIPES[folder.name](folder)
    return folder


def test_there_is_something_to_test() -> None:
    assert {"digits_mot_flow", "digits_var_nextscale", "digits_vq_ar", "shapes_mot_flow"} <= {
        name(path) for path in MODELS
    }
    digits = (
        "bsq",
        "ema",
        "fsq",
        "ibq",
        "kl",
        "lfq",
        "multiscale",
        "rvq",
        "simvq",
        "subcodebooks",
        "text",
        "vq",
        "vqvae",
    )
    assert {f"digits_{kind}" for kind in digits} <= {name(path) for path in TOKENIZERS}
    assert {"codec", "patch"} <= {name(path) for path in SOURCES}
    assert {"folder"} <= {name(path) for path in DATA}


@pytest.mark.parametrize("recipe", [*MODELS, *TOKENIZERS, *SOURCES, *DATA], ids=name)
def test_the_head_of_a_recipe_says_what_paper_command_and_measured(recipe: Path) -> None:
    head = [line.split(":")[0] for line in recipe.read_text().splitlines()[:4]]
    assert head == ["# What", "# Paper", "# Command", "# Measured"]
    command, measured = recipe.read_text().splitlines()[2:4]
    assert str(recipe.relative_to(CONFIGS.parent)) in command
    for key, kind in (("tokenizer_weights", "tokenizers"), ("init", "models")):
        if needed := re.search(rf" {key}: out/(\w+)/export", recipe.read_text()):
            assert command.index(f"{kind}/{needed[1]}.yaml") < command.index(f"models/{recipe.name}")
    if recipe in (*MODELS, *TOKENIZERS):
        found = re.search(r"\d (s|CPU minutes)\b.* \d+(\.\d+)? (%|dB)", measured)
        assert (found is None) == (recipe.stem in NOT_MEASURED), measured


@pytest.mark.parametrize("recipe", MODELS, ids=name)
def test_a_model_recipe_builds_and_takes_a_step(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert main(["fit", *files(recipe), *model_options(recipe, out), "--trainer.fast_dev_run", "true"]) == 0
    assert not out.exists()


@pytest.mark.parametrize("recipe", TOKENIZERS, ids=name)
def test_a_tokenizer_recipe_builds_and_takes_a_step(recipe: Path, tmp_path: Path) -> None:
    options = ["--trainer.default_root_dir", str(tmp_path / "run"), "--data.init_args.batch_size", "4", *QUICK]
    settings = yaml.safe_load(recipe.read_text())["model"]["init_args"]
    if "encoder_weights" in settings:
        options += ["--model.init_args.encoder_weights", "null"]
    if "text_embeddings" in settings:  # counted in a second, as its command has it
        assert words.main(["--out", str(tmp_path / "words")]) == 0
        options += ["--model.init_args.text_embeddings", str(tmp_path / "words")]
    assert main(["fit", *files(recipe), *options, "--trainer.fast_dev_run", "true"]) == 0


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("tokenizers/digits_vq tokenizers/digits_fsq", "digits_fsq"),
        ("tokenizers/digits_vq tokenizers/digits_fsq trainer/cpu data/folder_images", "digits_fsq"),
        ("trainer/cpu models/digits_vq_ar data/tokens", "digits_vq_ar"),
        ("trainer/cpu data/tokens", "cpu"),
        ("", "run"),
    ],
)
def test_a_run_is_called_by_its_last_recipe(given: str, expected: str) -> None:
    assert recipe_name([CONFIGS / f"{path}.yaml" for path in given.split()]) == expected


@pytest.mark.parametrize("recipe", [*MODELS, *TOKENIZERS], ids=name)
def test_every_recipe_names_its_run(recipe: Path) -> None:
    assert recipe_name([FLOW, recipe, CONFIGS / "trainer" / "gpu.yaml"]) == recipe.stem


def test_settings_laid_over_a_recipe_give_no_name(tmp_path: Path) -> None:
    nested, dotted = tmp_path / "nested.yaml", tmp_path / "dotted.yaml"
    nested.write_text("model: {init_args: {lr: 1.0e-3, tokenizer_weights: out, model: {backbone: {width: 8}}}}")
    dotted.write_text("model.init_args.model.generator.init_args.token_noise: 0.2")
    assert recipe_name([FLOW, nested]) == FLOW.stem
    assert recipe_name([FLOW, dotted, nested]) == FLOW.stem
    dotted.write_text("model.init_args.model.generator.class_path: unimodal_generators.Masked")
    assert recipe_name([FLOW, dotted, nested]) == "dotted"


def test_an_export_names_the_recipe_that_was_laid_over_another(tmp_path: Path) -> None:
    recipe = CONFIGS / "tokenizers" / "digits_fsq.yaml"
    assert files(recipe)[1::2] == [str(recipe.with_name("digits_vq.yaml")), str(recipe)]
    options = ["--trainer.default_root_dir", str(tmp_path), "--data.init_args.batch_size", "4", *QUICK]
    assert main(["fit", *files(recipe), *options, "--trainer.max_steps", "1"]) == 0
    assert json.loads((tmp_path / "export" / "export.json").read_text())["recipe"] == "digits_fsq"


@pytest.mark.parametrize("recipe", SOURCES, ids=name)
def test_a_tokenizer_that_learns_nothing_is_made_and_read(recipe: Path, tmp_path: Path) -> None:
    out, settings = tmp_path / "out", yaml.safe_load(recipe.read_text())
    assert main(["import", "tokenizer", str(recipe), "--out", str(out)]) == 0
    tokenizer = load_tokenizer(out)
    assert type(tokenizer).__name__ == settings["class_path"].rsplit(".")[-1]
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert tokenizer.decode(tokenizer.encode(images)).shape == images.shape


def test_a_dry_run_leaves_a_run_alone(tmp_path: Path) -> None:
    out = tmp_path / "run"
    fit = ["fit", "-c", str(FLOW), *model_options(FLOW, out)]
    assert main([*fit, "--trainer.max_steps", "1"]) == 0
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert main([*fit, "--trainer.fast_dev_run", "true"]) == 0
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


@pytest.mark.parametrize("recipe", ONE_OF_EACH, ids=name)
def test_the_config_a_recipe_resolves_to_is_printed(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["fit", *files(recipe), "--print_config"])
    assert end.value.code == 0
    printed, first, last = (yaml.safe_load(text) for text in (capsys.readouterr().out, *texts(recipe)))
    assert printed["model"]["init_args"]["lr"] == first["model"]["init_args"]["lr"]
    assert printed["trainer"]["max_steps"] == first["trainer"]["max_steps"]
    assert printed["trainer"]["default_root_dir"] == last["trainer"]["default_root_dir"]
    if "tokenizer" in last["model"]["init_args"]:
        own = last["model"]["init_args"]["tokenizer"]["init_args"]
        made = printed["model"]["init_args"]["tokenizer"]["init_args"]
        assert set(own.get("quantizer", {}).get("init_args", {})) <= set(made.get("quantizer", {}).get("init_args", {}))


@pytest.mark.parametrize(
    ("recipe", "where"),
    [
        *((FLOW, where) for where in ("data.init_args", "trainer", "checkpoint", "")),
        *((recipe, "model.init_args") for recipe in ONE_OF_EACH),
        *((recipe, "data.init_args") for recipe in DATA),
    ],
    ids=lambda value: name(value) if isinstance(value, Path) else value,
)
def test_a_misspelt_key_is_one_line(
    recipe: Path, where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A real key of the recipe, two of its letters swapped."""
    config = yaml.safe_load(recipe.read_text())
    level = config
    for key in where.split("."):
        level = level.get(key, {}) if key else level
    if not level:
        pytest.skip(f"{recipe.name} has no {where}")
    key = max(level, key=len)
    wrong = f"{key[1]}{key[0]}{key[2:]}"
    level[wrong] = level.pop(key)
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(config))
    first = ["-c", str(FLOW)] if recipe in DATA else files(recipe)[:-2]
    assert main(["fit", *first, "-c", str(path), "--trainer.default_root_dir", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert wrong in said
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def captioned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of several sizes with .txt beside them."""
    folder = tmp_path_factory.mktemp("captioned")
    rng = np.random.default_rng(0)
    for i in range(6):
        height, width = 8 + 5 * (i % 3), 8 + 9 * (i % 2)
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"noise number {i}, grün")
    return folder


@pytest.fixture(scope="module")
def listed(captioned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same pictures in a JSONL."""
    folder = tmp_path_factory.mktemp("listed")
    lines = []
    for path in sorted(captioned.glob("*.png")):
        (folder / path.name).write_bytes(path.read_bytes())
        lines.append(json.dumps({"image": path.name, "caption": path.with_suffix(".txt").read_text()}))
    (folder / "list.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_your_own_pictures_in_a_list(listed: Path, tmp_path: Path) -> None:
    options = [
        "--data.root",
        str(listed),
        *model_options(FLOW, tmp_path / "run"),
        "--trainer.fast_dev_run",
        "true",
    ]
    assert main(["fit", "-c", str(FLOW), "-c", str(FOLDER), *options]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("recipe", MODELS, ids=name)
def test_your_own_pictures_trained_exported_and_drawn(recipe: Path, captioned: Path, tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    options = [*model_options(recipe, run), "--trainer.max_steps", "2", "--trainer.val_check_interval", "2"]
    assert main(["fit", *files(recipe), "-c", str(FOLDER), "--data.root", str(captioned), *options]) == 0
    assert json.loads((run / "export" / "export.json").read_text())["recipe"] == recipe.stem
    assert list((run / "samples").glob("step_000002.*"))
    shutil.rmtree(tmp_path / "weights", ignore_errors=True)  # an export holds those of the tokenizer
    draw = ["generate", "image", "--run", str(run), "--prompt", "noise number 3", "-n", "2", "--out", str(out)]
    assert main(draw) == 0
    height, width = read(recipe)["model"]["init_args"]["model"]["sequence"]["image_sizes"][0]
    assert Image.open(out / "00001.png").size == (width, height)
    assert main(["describe", "--run", str(run), str(captioned / "0.png"), "--max-tokens", "2"]) == 0


def test_a_folder_without_captions_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "pictures").mkdir()
    for root, said in ((tmp_path / "pictures", "caption"), (tmp_path / "none", "missing")):
        options = ["--data.root", str(root), *model_options(FLOW, tmp_path / "run")]
        capsys.readouterr()
        assert main(["fit", "-c", str(FLOW), "-c", str(FOLDER), *options]) == 2
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1, error
        assert str(root) in error
        assert said in error
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_broken_picture_is_named_wherever_it_is_read(
    workers: str, captioned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "pictures"
    root.mkdir()
    for path in captioned.iterdir():
        (root / path.name).write_bytes(path.read_bytes()[:90])  # of the texts all, of the pictures a part
    options = ["--data.root", str(root), "--data.workers", workers, *model_options(FLOW, tmp_path / "run")]
    capsys.readouterr()
    assert main(["fit", "-c", str(FLOW), "-c", str(FOLDER), *options]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert "Traceback" not in error
    assert f"{root}/" in error
    assert "whole image" in error
    assert not (tmp_path / "run").exists()


def test_the_settings_that_the_architecture_page_lays_over_a_recipe_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (CONFIGS.parent / "docs" / "architecture.md").read_text()
    (block,) = re.findall(r"```yaml\n(model:\n  init_args:\n    model:\n      generator:.*?)```", page, re.DOTALL)
    (tmp_path / "mine.yaml").write_text(block)
    with pytest.raises(SystemExit) as end:
        main(["fit", "-c", str(FLOW), "-c", str(tmp_path / "mine.yaml"), "--print_config"])
    assert end.value.code == 0
    made = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["model"]["init_args"]
    asked = yaml.safe_load(block)["model"]["init_args"]["model"]
    settings = made["generator"]["init_args"]
    assert settings["time_shift"] == {"tokens": 256}
    assert settings["time_draw"] == "uniform"
    assert asked["generator"]["init_args"]["sampling"].items() <= settings["sampling"].items()
    assert made["sequence"]["write_size"]


def test_the_short_overrides_of_the_readme_reach_their_settings(capsys: pytest.CaptureFixture[str]) -> None:
    short = [
        "--trainer.max_steps", "2000", "--model.lr", "1e-3", "--model.model.tokenizer.patch", "8",
        "--model.model.tokenizer.colours", "3", "--model.model.sequence.image_sizes", "[[64, 64]]",
        "--model.model.sequence.context_length", "512", "--data.batch_tokens", "8192",
    ]  # fmt: skip
    with pytest.raises(SystemExit) as end:
        main(["fit", "-c", str(FLOW), *short, "--print_config"])
    assert end.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    settings = config["model"]["init_args"]
    assert config["trainer"]["max_steps"] == 2000
    assert settings["lr"] == 1e-3
    assert settings["model"]["init_args"]["tokenizer"]["init_args"] == {"patch": 8, "colours": 3}
    assert settings["model"]["init_args"]["sequence"]["image_sizes"] == [[64, 64]]
    assert settings["model"]["init_args"]["sequence"]["context_length"] == 512
    assert config["data"]["init_args"]["batch_tokens"] == 8192
