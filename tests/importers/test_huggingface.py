"""Imported weights = transformers' own model, at width 16; every expert begins as it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file
from text_models import FULL, LLAMA3, MODELS, YARN, edit, empty, hidden, ids, imported, logits, tensors, theirs, write

from unimodal.attention import SegmentTable, packed_attention
from unimodal.backbone import SCHEMES, Backbone, BackboneConfig, Experts, Lora
from unimodal.importers import load_text, read_config, save_text

# --- equal to the original


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("size", ["5GB", "4KB"])
def test_logits_are_those_of_transformers(name: str, size: str, tmp_path: Path) -> None:
    model = write(tmp_path / "hf", MODELS[name], size)
    assert (tmp_path / "hf" / "model.safetensors").is_file() is (size == "5GB")
    expected = theirs(model, ids())
    for meta in (False, True):
        made = imported(tmp_path / "hf", meta)
        assert not any(p.is_meta for p in made.parameters())
        torch.testing.assert_close(logits(made, ids()), expected, atol=1e-5, rtol=1e-5)


def test_positions_matter_in_that_comparison(qwen3: Path) -> None:
    """A wrong base of the rotary frequencies is seen at this width and length."""
    wrong = Backbone(read_config(qwen3, positions="sequential", rope_theta=1e4))
    wrong.load_state_dict(imported(qwen3).state_dict())
    assert (logits(wrong, ids()) - logits(imported(qwen3), ids())).abs().max() > 1e-2


@pytest.mark.parametrize("positions", ["sequential", "block", "mrope", "rope2d"])
def test_text_is_read_alike_under_every_position_scheme(positions: str, qwen3: Path) -> None:
    made = imported(qwen3, positions=positions)
    placed = torch.from_numpy(SCHEMES[positions].text(0, 40).ids)
    no = np.array([False])
    table = SegmentTable(document=np.zeros(1, int), length=np.array([40]), bidirectional=no, private=no)
    with torch.no_grad():
        attention = packed_attention("reference", table, torch.arange(40), 40)
        out = made(made.embedding(ids()), placed, [40], attention)
    torch.testing.assert_close(out, hidden(imported(qwen3), ids()), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    "old",
    [
        {"rope_theta": 1e6, "rope_scaling": None},
        {"rope_theta": 1e6},
        {"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 3.0}},
        {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}},
        {"rope_theta": 5e5, "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}},
        {},  # neither: the base is 10000
    ],
)
def test_rope_as_older_transformers_wrote_it(old: dict[str, Any], qwen3: Path) -> None:
    edit(qwen3, rope_parameters="none", **old)
    model = transformers.AutoModelForCausalLM.from_pretrained(qwen3).eval()
    torch.testing.assert_close(logits(imported(qwen3), ids()), theirs(model, ids()), atol=1e-5, rtol=1e-5)


def test_the_config_that_is_read(qwen3: Path) -> None:
    assert read_config(qwen3, positions="block", experts=FULL, added_tokens=4) == BackboneConfig(
        width=16, depth=2, heads=4, kv_heads=2, mlp_width=24, vocabulary=50, positions="block", experts=FULL,
        added_tokens=4, head_dim=8, qk_norm=True, tied_head=False, rope_theta=1e6,
    )  # fmt: skip
    edit(qwen3, num_key_value_heads=None, head_dim=4)
    config = read_config(qwen3, positions="sequential")
    assert (config.kv_heads, config.head_dim, config.head_size) == (4, None, 4)
    edit(qwen3, head_dim="none")
    assert read_config(qwen3, positions="sequential").head_size == 128


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type: expected llama, qwen2, qwen3, got gpt2"),
        ({"model_type": "qwen3_moe"}, "model_type: .* got qwen3_moe"),
        ({"model_type": "none"}, "model_type: .* got None"),
        ({"mlp_bias": True}, "mlp_bias: expected false"),
        ({"hidden_act": "gelu"}, "hidden_act: expected silu, got gelu"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types: .* got full_attention, sliding"),
        (
            {"layer_types": "none", "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
            "sliding_window: .* got 8",
        ),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_scaling: expected default, .* got dynamic"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "got longrope"),
        ({"rope_scaling": {**YARN, "truncate": False}}, "rope_scaling.truncate: expected true, got False"),
        ({"rope_scaling": {"type": "linear"}}, "factor: expected a number, got None"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "rope_scaling.factor: expected at least 1, got 0.5"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "one set for all layers"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}}, "got 0.5"),
        ({"partial_rotary_factor": 0.25}, "partial_rotary_factor: expected 1, got 0.25"),
        ({"hidden_size": "16"}, "hidden_size: expected a whole number, got 16"),
        ({"vocab_size": "none"}, "vocab_size: expected a whole number, got None"),
    ],
)
def test_what_the_backbone_does_not_compute_is_refused(changes: dict[str, Any], message: str, qwen3: Path) -> None:
    edit(qwen3, **changes)
    with pytest.raises(ValueError, match=message):
        read_config(qwen3, positions="sequential")


def test_windows_that_are_not_in_use_are_no_hindrance(qwen3: Path) -> None:
    before = read_config(qwen3, positions="sequential")
    edit(qwen3, layer_types="none", use_sliding_window=False, sliding_window=8, max_window_layers=0)
    assert read_config(qwen3, positions="sequential") == before
    edit(qwen3, use_sliding_window=True, max_window_layers=2)
    assert read_config(qwen3, positions="sequential") == before


def test_biases_of_llama_are_read_unless_o_has_one(tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    model = write(folder, {"model_type": "llama", "attention_bias": True})
    with pytest.raises(ValueError, match="attention_bias: expected biases of q, k and v only"):
        read_config(folder, positions="sequential")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("o_proj.bias"):
                parameter.zero_()
    rest = {name: t for name, t in tensors(folder).items() if not name.endswith("o_proj.bias")}
    save_file(rest, folder / "model.safetensors")
    made = imported(folder)
    assert made.config.qkv_bias
    torch.testing.assert_close(logits(made, ids()), theirs(model, ids()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_a_folder_without_a_readable_config_is_refused(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"import: .*config\.json (is missing|is no JSON|holds no object)"):
        read_config(tmp_path, positions="sequential")


# --- experts


@pytest.mark.parametrize(
    "experts",
    [FULL, Experts(attention=True), Experts(mlp=True), Experts(norms=True), Experts(mlp=True, understanding="look")],
)
@pytest.mark.parametrize("name", ["qwen3", "qwen2.5 tied"])
@pytest.mark.parametrize("meta", [False, True])
def test_every_expert_is_the_source(experts: Experts, name: str, meta: bool, tmp_path: Path) -> None:
    write(tmp_path / "hf", MODELS[name])
    dense, routed = imported(tmp_path / "hf"), imported(tmp_path / "hf", meta, experts=experts)
    source, held = dense.state_dict(), routed.state_dict()
    for key, value in held.items():
        path = key.split(".")
        if "experts" in path:
            path[path.index("experts") + 1] = "shared"
        assert torch.equal(value, source[".".join(path)]), key
    assert len(held) > len(source)
    for expert in range(len(experts.names)):
        assert torch.equal(logits(routed, ids(), expert), logits(dense, ids()))


def test_what_a_text_model_has_not_keeps_its_initial_values(qwen3: Path) -> None:
    changes = {"experts": Experts(lora=Lora(2, 4.0)), "adaln": True, "added_tokens": 4}
    before = empty(qwen3, **changes)
    kept = {n: v.clone() for n, v in before.state_dict().items() if "lora" in n or "modulation" in n or "added" in n}
    assert len(kept) == 2 * (2 * 4 + 2) + 2
    load_text(before, qwen3)
    assert all(torch.equal(before.state_dict()[name], value) for name, value in kept.items())
    from_meta = imported(qwen3, meta=True, **changes).state_dict()
    assert list(from_meta) == list(before.state_dict())
    for name, value in kept.items():
        spread = float(from_meta[name].std())
        zero = bool((value == 0).all())
        assert bool((from_meta[name] == 0).all()) is zero, name
        assert zero or 0.5 * float(value.std()) < spread < 2 * float(value.std()), name
    assert torch.equal(logits(before, ids())[:, :50], logits(imported(qwen3), ids()))
    assert torch.equal(logits(before, ids(), expert=1)[:, :50], logits(imported(qwen3), ids()))  # B is zero


def test_weights_take_the_backbone_s_type(qwen3: Path) -> None:
    made = empty(qwen3, meta=True).to(torch.bfloat16)
    load_text(made, qwen3)
    source = imported(qwen3).state_dict()
    assert all(torch.equal(value, source[name].bfloat16()) for name, value in made.state_dict().items())
    half = qwen3.parent / "half"
    save_text(made, half)
    assert {t.dtype for t in tensors(half).values()} == {torch.bfloat16}
    assert transformers.AutoConfig.from_pretrained(half).dtype == torch.bfloat16
    assert all(torch.equal(v.float(), imported(half).state_dict()[n]) for n, v in made.state_dict().items())


def test_frozen_parameters_stay_frozen_when_they_get_memory(qwen3: Path) -> None:
    made = empty(qwen3, meta=True, added_tokens=4)
    made.embedding.weight.requires_grad_(False)
    load_text(made, qwen3)
    assert not made.embedding.weight.requires_grad
    assert made.head is not None
    assert made.head.weight.requires_grad
    assert made.embedding.added is not None
    assert made.embedding.added.requires_grad
