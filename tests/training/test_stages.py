"""Freezing: which weights a name means, and that nothing touches them afterwards."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import lightning
import pytest
import torch
import transformers

from unimodal.backbone import Experts, Lora, Moe
from unimodal.cli import main
from unimodal.documents import Document
from unimodal.export import load_export, load_run
from unimodal.model import UnifiedModel
from unimodal.packing import pack
from unimodal.text import TextTokenizer
from unimodal.training import UnifiedTraining
from unimodal.training.ema import EMA
from unimodal.training.optimizers import parameter_groups
from unimodal.training.stages import freeze, parts

ROOT = Path(__file__).parents[2]
FLOW = ROOT / "lightning_configs" / "models" / "digits_mot_flow.yaml"
LORA = Experts(lora=Lora(2, 4.0))
Make = Callable[..., UnifiedModel]


def frozen(model: UnifiedModel) -> set[str]:
    """Names without a gradient, those of the image tokenizer left out."""
    named = model.named_parameters()
    return {name for name, p in named if not p.requires_grad and not name.startswith("tokenizer.")}


def holding(model: UnifiedModel, *words: str) -> set[str]:
    """Names in which any of the words stands."""
    return {name for name, _ in model.named_parameters() if any(word in name for word in words)}


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["text"], [".experts.text."]),
        (["image"], [".experts.image."]),
        (["text", "image"], [".experts."]),
        (["image.mlp"], [".mlp.experts.image."]),
        (["text.attention"], [".qkv.experts.text.", ".qk_norm.experts.text.", ".o.experts.text."]),
        (["text.norms"], [".attention_norm.experts.text.", ".mlp_norm.experts.text.", "backbone.norm.experts.text."]),
        (["embedding"], ["backbone.embedding.weight"]),
        (["generator"], ["generator."]),
        (["image.mlp", "image.mlp", "embedding"], [".mlp.experts.image.", "backbone.embedding.weight"]),
    ],
    ids=str,
)
def test_a_name_means_its_weights_and_no_others(names: list[str], words: list[str], make: Make) -> None:
    model = make(backbone={"added_tokens": 4})
    freeze(model, names)
    assert frozen(model) == holding(model, *words)
    assert frozen(model)


def test_what_experts_share_is_shared(make: Make) -> None:
    model = make(experts=Experts(attention=True))
    freeze(model, ["shared"])
    assert frozen(model) == holding(model, ".experts.shared.")
    assert holding(model, ".experts.shared.") == holding(model, ".mlp.", "norm.experts.shared")
    model = make(experts=Experts(attention=True))
    freeze(model, ["shared.mlp", "image"])
    assert frozen(model) == holding(model, ".mlp.", ".experts.image.")


@pytest.mark.parametrize("expert", ["image", "text"])
def test_adapters_belong_to_their_expert(expert: str, make: Make) -> None:
    experts = Experts(lora=Lora(2, 4.0, experts=(expert,)))
    model = make(experts=experts)
    freeze(model, ["shared", "embedding"])
    assert frozen(model) == holding(model, ".experts.shared.", "embedding.weight")
    assert not any("lora" in name for name in frozen(model))
    model = make(experts=experts)
    freeze(model, [expert])
    assert frozen(model) == holding(model, "lora_") != set()
    model = make(experts=experts)
    freeze(model, [f"{expert}.mlp"])
    assert frozen(model) == {name for name in holding(model, "lora_") if ".mlp." in name}
    other = "text" if expert == "image" else "image"
    with pytest.raises(ValueError, match=f"freeze: expected some of {expert}, .*, got {other}$"):
        freeze(model, [other])  # it has no weights of its own


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {},
            "text, text.attention, text.mlp, text.norms, image, image.attention, image.mlp, image.norms, embedding, gen",
        ),
        ({"experts": Experts()}, "shared, shared.attention, shared.mlp, shared.norms, embedding, generator"),
        ({"backbone": {"tied_head": False}}, "embedding, head, generator"),
        ({"time": "adaln"}, "embedding, modulation, generator"),
        (
            {"experts": LORA},
            "image, image.attention, image.mlp, shared, shared.attention, shared.mlp, shared.norms, emb",
        ),
    ],
    ids=["full", "dense", "untied", "adaln", "lora"],
)
def test_unknown_names_are_refused_with_what_exists(settings: dict[str, Any], expected: str, make: Make) -> None:
    model = make(**settings)
    for name in ("vision", "image.qkv", "text.mlp.down", ""):
        with pytest.raises(ValueError, match=f"freeze: expected some of .*{expected}.*, got {name}$"):
            freeze(model, ["generator", name])
    assert not frozen(model)


@pytest.mark.parametrize("settings", [{}, {"experts": LORA}, {"time": "adaln"}, {"backbone": {"tied_head": False}}])
def test_all_weights_have_a_name(settings: dict[str, Any], make: Make) -> None:
    """And only the rows of added tokens have none: a stage can hold everything else."""
    model = make(backbone={"added_tokens": 4, **settings.pop("backbone", {})}, **settings)
    named = {id(p) for parameters in parts(model).values() for p in parameters}
    rest = {name for name, p in model.named_parameters() if id(p) not in named and not name.startswith("tokenizer.")}
    assert rest == holding(model, "added")
    freeze(model, list(parts(model)))
    assert {name for name, p in model.named_parameters() if p.requires_grad} == rest


def test_learned_routers_are_of_their_mlp(make: Make) -> None:
    model = make(experts=Experts(mlp=True), backbone={"moe": Moe(2, 1, 8)})
    freeze(model, ["text.mlp"])
    assert frozen(model) == holding(model, ".mlp.experts.text.")


def test_a_model_that_cannot_learn_is_refused(make: Make) -> None:
    model = make()
    with pytest.raises(ValueError, match="freeze: expected something to be left that learns, got text, image, emb"):
        freeze(model, ["text", "image", "embedding", "generator"])
    assert not frozen(model)
    freeze(model, [])
    assert not frozen(model)


def test_a_tied_head_has_no_name_of_its_own(make: Make) -> None:
    with pytest.raises(ValueError, match=r"freeze: .* got head"):
        freeze(make(), ["head"])
    model = make(backbone={"tied_head": False, "added_tokens": 4})
    freeze(model, ["head"])
    assert frozen(model) == {"backbone.head.weight"}


# --- what follows


def trained_on(
    model: UnifiedModel, documents: list[Document], names: list[str], steps: int = 3
) -> tuple[UnifiedTraining, EMA]:
    """A few steps of the module's own optimizer, and the average of them."""
    module, average = UnifiedTraining(model, lr=1e-2, weight_decay=0.3, warmup_steps=0, freeze=names), EMA(0.5)
    trainer = Mock(
        spec=lightning.Trainer,
        world_size=1,
        accumulate_grad_batches=1,
        log_every_n_steps=1000,
        max_steps=10,
        global_step=0,
    )
    module._trainer, trainer.global_step = trainer, 0
    optimizer = module.configure_optimizers()["optimizer"]
    average.on_fit_start(trainer, module)
    for step in range(steps):
        sequenced = [model.sequencer.document(d, (0, step, i)) for i, d in enumerate(documents)]
        packed = pack(sequenced, model.backbone.config.experts, model.generator.reads)
        optimizer.zero_grad()
        module.training_step(packed.announce(packed.counts), step + 1).backward()
        optimizer.step()
        trainer.global_step += 1
        average.on_train_batch_end(trainer, module)
    return module, average


@pytest.mark.parametrize("names", [["text", "embedding"], ["image.attention", "generator"], ["shared.mlp"]], ids=str)
def test_frozen_weights_stay_and_all_others_move(names: list[str], make: Make, mixed: list[Document]) -> None:
    experts = Experts(attention=True, norms=True) if "shared.mlp" in names else Experts(True, True, True)
    model = make(experts=experts, backbone={"added_tokens": 4})
    before = copy.deepcopy(model.state_dict())
    _, average = trained_on(model, mixed, names)
    held = frozen(model)
    assert held
    for name, parameter in model.named_parameters():
        if not name.startswith("tokenizer."):
            assert torch.equal(parameter, before[name]) is (name in held), name
            assert (parameter.grad is None) is (name in held), name
    groups = parameter_groups(model, 0.3)
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert sum(len(group["params"]) for group in groups) == len(learning)
    assert {f"model.{name}" for name in learning} == set(average.shadow)


def test_the_average_holds_what_learns_and_leaves_the_rest(make: Make, mixed: list[Document]) -> None:
    model = make()
    module, average = trained_on(model, mixed, ["text", "embedding"])
    raw = copy.deepcopy(model.state_dict())
    average.swap(module)
    swapped = model.state_dict()
    assert all(torch.equal(swapped[name], raw[name]) for name in frozen(model))
    assert not torch.equal(swapped["backbone.layers.0.mlp.experts.image.down.weight"],
                           raw["backbone.layers.0.mlp.experts.image.down.weight"])  # fmt: skip
    other = EMA(0.5)
    other.load_state_dict(average.state_dict())
    unfrozen = UnifiedTraining(make(), lr=1e-3)
    for use in (lambda: other.on_fit_start(module.trainer, unfrozen), lambda: other.swap(unfrozen)):
        with pytest.raises(ValueError, match="freeze: expected what the checkpoint was trained with, got"):
            use()


# --- from a text model's folder, through the console


TINY = """
model:
  init_args:
    model:
      backbone: {backbone}
    init_from: {folder}
    freeze: [text, embedding]
    warmup_steps: 1
    lr: 1.0e-2
    ema_decay: 0.6
data:
  init_args: {{batch_tokens: 512, validation_documents: 4, prompts: 1}}
trainer: {{max_steps: 3, val_check_interval: 100, precision: 32-true, accelerator: cpu, enable_progress_bar: false}}
"""
BACKBONE = {
    "width": 16, "depth": 2, "heads": 4, "kv_heads": 2, "head_dim": 8, "mlp_width": 24, "vocabulary": 300,
    "added_tokens": 4, "positions": "block", "experts": {"attention": True, "mlp": True, "norms": True},
}  # fmt: skip


@pytest.fixture
def qwen3(tmp_path: Path) -> Path:
    """A random Qwen3 folder with a tokenizer of fewer entries than the embedding has rows."""
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=300, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, tie_word_embeddings=True,
    )  # fmt: skip
    folder = tmp_path / "qwen3"
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    TextTokenizer.train(["a handwritten seven", "three plus seven"], 290).save(folder / "tokenizer.json")
    return folder


def fit(folder: Path, source: Path, *options: str, **backbone: Any) -> int:
    tiny = folder.parent / "tiny.yaml"
    tiny.write_text(TINY.format(backbone=json.dumps(BACKBONE | backbone), folder=source))
    return main(["fit", "-c", str(FLOW), "-c", str(tiny), "--trainer.default_root_dir", str(folder), *options])


def test_a_run_from_a_text_model_keeps_it(qwen3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert fit(run, qwen3) == 0
    model = load_export(run / "export", "model")
    assert isinstance(model, UnifiedModel)
    source = transformers.AutoModelForCausalLM.from_pretrained(qwen3).state_dict()
    backbone = model.backbone
    assert torch.equal(backbone.embedding.weight, source["model.embed_tokens.weight"])  # exports hold what is frozen
    layer = backbone.layers[1]
    for expert, same in (("text", True), ("image", False)):
        q, _, v = layer.qkv.experts[expert].weight.split([32, 16, 16])
        assert torch.equal(q, source["model.layers.1.self_attn.q_proj.weight"]) is same
        assert torch.equal(v, source["model.layers.1.self_attn.v_proj.weight"]) is same
        assert torch.equal(layer.mlp.experts[expert].down.weight, source["model.layers.1.mlp.down_proj.weight"]) is same
    assert model.text.special.bos == 300
    text = TextTokenizer.load(qwen3 / "tokenizer.json")
    assert model.text.entries == text.entries < 300
    assert model.text.encode("plus seven") == text.encode("plus seven")
    record = json.loads((run / "run.json").read_text())
    assert record["parameters"] == sum(
        p.numel() for name, p in model.named_parameters()
        if not name.startswith("tokenizer.") and ".experts.text." not in name and name != "backbone.embedding.weight"
    )  # fmt: skip
    raw = load_run(run, "raw")
    assert torch.equal(raw.backbone.embedding.weight, source["model.embed_tokens.weight"])
    assert raw.text.special == model.text.special
    capsys.readouterr()
    assert fit(run, qwen3, "--ckpt_path", "last", "--trainer.max_steps", "4", "--model.init_args.freeze", "[text]") == 2
    assert "freeze: expected what the checkpoint was trained with" in capsys.readouterr().err
    assert fit(run, qwen3, "--ckpt_path", "last", "--trainer.max_steps", "4") == 0


@pytest.mark.parametrize(
    ("options", "backbone", "message"),
    [
        (["--model.init_args.init_from", "nowhere"], {}, "init_from: expected a folder, got nowhere, which does not exist"),
        (["--model.init_args.init", "export"], {}, "init_from: expected none beside init export"),
        (["--model.init_args.freeze", "[text,picture]"], {}, "freeze: expected some of text, text.attention,"),
        ([], {"depth": 3, "norm_eps": 1e-5}, "depth: expected 2, got 3; backbone.norm_eps: expected 1e-06, got 1e-05"),
        ([], {"vocabulary": 304}, "backbone.vocabulary: expected 300, got 304"),
        ([], {"added_tokens": 2}, "backbone.added_tokens: expected 0, or at least 4 for the special tokens, got 2"),
    ],
)  # fmt: skip
def test_what_cannot_be_a_start_is_refused_in_one_line(
    options: list[str], backbone: dict[str, Any], message: str, qwen3: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert fit(tmp_path / "run", qwen3, *options, **backbone) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_folder_without_a_tokenizer_is_no_start(qwen3: Path, make: Make) -> None:
    (qwen3 / "tokenizer.json").unlink()
    model = make()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"text tokenizer: expected a file tokenizer\.json"):
        UnifiedTraining(model, lr=1e-3, init_from=qwen3)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
