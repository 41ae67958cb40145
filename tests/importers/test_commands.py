"""`unimodal import hf` prints what a recipe needs, `unimodal export hf` gives back what was imported."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file

from unimodal.backbone import BackboneConfig, Experts, RopeScaling
from unimodal.cli import main
from unimodal.export import load_run
from unimodal.importers import read_config
from unimodal.text import TextTokenizer

ROOT = Path(__file__).parents[2]
FLOW = ROOT / "lightning_configs" / "models" / "digits_mot_flow.yaml"
FULL = Experts(attention=True, mlp=True, norms=True)
SHAPE = {
    "vocab_size": 300, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 8.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 64}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": LLAMA3, "rms_norm_eps": 1e-5},
    "qwen2": {"tie_word_embeddings": True, "rope_parameters": YARN},
    "qwen3": {"head_dim": 8, "tie_word_embeddings": True},
}


def write(folder: Path, kind: str) -> Path:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **SHAPE, **MODELS[kind])
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    TextTokenizer.train(["a handwritten seven", "three plus seven equals ten"], 290).save(folder / "tokenizer.json")
    return folder


def config_of(block: dict[str, Any]) -> BackboneConfig:
    """As the recipe's parser would build it."""
    block = dict(block)
    scaling = block.pop("rope_scaling", None)
    block["experts"] = Experts(**block["experts"])
    return BackboneConfig(**block, rope_scaling=RopeScaling(**scaling) if scaling else None)


def refused(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    capsys.readouterr()
    assert main([str(a) for a in args]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1, captured.err
    return captured.err


@pytest.mark.parametrize("kind", MODELS)
def test_the_block_that_is_printed_is_the_config(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / kind, kind)
    capsys.readouterr()
    for positions in ("sequential", "mrope"):
        options = [] if positions == "sequential" else ["--positions", positions]
        assert main(["import", "hf", str(folder), *options]) == 0
        record = yaml.safe_load(capsys.readouterr().out)
        assert list(record) == ["backbone"]
        expected = read_config(folder, positions=positions, experts=FULL, added_tokens=4)
        assert config_of(record["backbone"]) == expected


@pytest.mark.parametrize("kind", MODELS)
def test_printed_pasted_trained_and_exported(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole way round: what was frozen comes back bit for bit, and transformers reads what was not."""
    folder, run = write(tmp_path / kind, kind), tmp_path / "run"
    capsys.readouterr()
    assert main(["import", "hf", str(folder), "--positions", "block"]) == 0
    recipe = {
        "model": {"init_args": {
            "model": yaml.safe_load(capsys.readouterr().out), "init_from": str(folder), "warmup_steps": 1, "lr": 1e-2,
            "freeze": ["text", "embedding", *([] if MODELS[kind].get("tie_word_embeddings") else ["head"])],
        }},
        "data": {"init_args": {"batch_tokens": 512, "validation_documents": 4, "prompts": 1}},
        "trainer": {
            "max_steps": 3, "val_check_interval": 100, "precision": "32-true", "accelerator": "cpu",
            "enable_progress_bar": False, "default_root_dir": str(run),
        },
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["fit", "-c", str(FLOW), "-c", str(tmp_path / "recipe.yaml")]) == 0
    source = load_file(folder / "model.safetensors")
    for weights in ("ema", "raw"):
        out = tmp_path / weights
        assert main(["export", "hf", "--run", str(run), "--out", str(out), "--weights", weights]) == 0
        written = load_file(out / "model.safetensors")
        assert written.keys() == source.keys()
        assert all(torch.equal(written[name], source[name]) for name in source)
        assert json.loads((out / "config.json").read_text())["model_type"] == kind
        tokenizer = transformers.AutoTokenizer.from_pretrained(out)
        assert tokenizer.encode("plus seven") == TextTokenizer.load(folder / "tokenizer.json").encode("plus seven")
    out = tmp_path / "image"
    assert main(["export", "hf", "--run", str(run), "--out", str(out), "--expert", "image", "--added"]) == 0
    model = load_run(run)
    image = load_file(out / "model.safetensors")
    assert image["model.embed_tokens.weight"].shape == (304, 16)
    assert torch.equal(image["model.norm.weight"], model.backbone.norm.experts["image"].weight)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert (loaded.config.bos_token_id, loaded.config.eos_token_id) == (300, 301)
    assert "expert image in" in capsys.readouterr().out


def test_the_printed_length_is_the_recipe_s(tmp_path: Path) -> None:
    """Where no stretch says how long documents were, the recipe does."""
    from unimodal.backbone import Backbone
    from unimodal.importers import load_text, save_text

    folder = write(tmp_path / "qwen3", "qwen3")
    made = Backbone(read_config(folder, positions="sequential"))
    load_text(made, folder)
    save_text(made, tmp_path / "out", context_length=77)
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out").max_position_embeddings == 77


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "qwen3", "qwen3")
    assert "config.json is missing" in refused(capsys, "import", "hf", tmp_path / "nowhere")
    assert "--positions" in refused(capsys, "import", "hf", folder, "--positions", "circular")
    assert "holds no export" in refused(capsys, "export", "hf", "--run", folder, "--out", tmp_path / "out")
    assert "does not exist" in refused(capsys, "export", "hf", "--run", tmp_path / "no", "--out", tmp_path / "out")
    assert "--out" in refused(capsys, "export", "hf", "--run", folder)
    assert not (tmp_path / "out").exists()
    weights = load_file(folder / "model.safetensors")
    save_file({n: t for n, t in weights.items() if n != "model.norm.weight"}, folder / "model.safetensors")
    assert "model.norm.weight is missing" in refused(capsys, "import", "hf", folder)
    save_file(weights, folder / "model.safetensors")
    TextTokenizer.train([" ".join(chr(i) * 3 for i in range(97, 123))], 330).save(folder / "tokenizer.json")
    assert "tokenizer.json: expected at most vocab_size 300 entries" in refused(capsys, "import", "hf", folder)
    (folder / "tokenizer.json").unlink()
    assert "expected a file tokenizer.json" in refused(capsys, "import", "hf", folder)
    record = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(record | {"model_type": "gemma"}))
    assert "model_type: expected llama, qwen2, qwen3, got gemma" in refused(capsys, "import", "hf", folder)


@pytest.mark.parametrize("command", [["import"], ["import", "hf"], ["export"], ["export", "hf"]], ids=" ".join)
def test_help_is_cheap(command: list[str]) -> None:
    script = (
        "import sys; from unimodal.cli import main\n"
        f"try:\n    main({[*command, '--help']!r})\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "assert not {'torch', 'transformers', 'lightning', 'safetensors'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert f"usage: unimodal {' '.join(command)}" in done.stdout
