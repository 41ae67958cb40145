"""What is read of a text model's files at a time, what is refused of them, and that nothing is half imported."""

import gc
import json
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from text_models import FULL, MODELS, edit, empty, imported, same, state, tensors, write
from torch import Tensor

from unimodal.backbone import Backbone, BackboneConfig, Moe, RopeScaling
from unimodal.importers import huggingface, load_text, read_config, save_text

# --- memory


class Watched:
    """safe_open, but every tensor it hands out is watched, and so is what the model holds by then."""

    held: list[weakref.ref]
    most: int
    served: int
    seen: list[int]
    model: Backbone

    def __init__(self, path: Path, framework: str) -> None:
        self._file = safe_open(path, framework=framework)

    def __enter__(self) -> "Watched":
        self._file.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._file.__exit__(*error)

    def get_tensor(self, name: str) -> Tensor:
        kind = type(self)
        tensor = self._file.get_tensor(name)
        alive = [t for ref in kind.held if (t := ref()) is not None]
        kind.most = max(kind.most, sum(t.nbytes for t in [*alive, tensor]))
        kind.seen.append(sum(p.nbytes for p in kind.model.parameters() if not p.is_meta))
        kind.held.append(weakref.ref(tensor))
        kind.served += tensor.nbytes
        return tensor


@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.parametrize("folder", ["qwen3", "sharded"])
def test_streaming_holds_one_tensor_at_a_time(
    meta: bool, folder: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = request.getfixturevalue(folder)
    made = empty(path, meta, experts=FULL)
    Watched.held, Watched.most, Watched.served, Watched.seen, Watched.model = [], 0, 0, [], made
    monkeypatch.setattr(huggingface, "safe_open", Watched)
    gc.disable()  # what is let go must be gone at once
    try:
        load_text(made, path)
    finally:
        gc.enable()
    largest = max(t.nbytes for t in tensors(path).values())
    whole = sum(p.nbytes for p in made.parameters())
    assert Watched.served == sum(t.nbytes for t in tensors(path).values())
    assert Watched.most == largest < Watched.served / 5
    if meta:  # memory is taken as tensors come, two experts' fused parameters at most ahead of them
        assert Watched.seen[0] == 0
        assert Watched.seen == sorted(Watched.seen)
        assert len(set(Watched.seen)) > 10
        assert Watched.seen[-1] <= whole
    else:
        assert set(Watched.seen) == {whole}


def test_memory_is_not_replaced_where_there_is_some(qwen3: Path) -> None:
    made = empty(qwen3, experts=FULL)
    places = {name: p.data_ptr() for name, p in made.named_parameters()}
    load_text(made, qwen3)
    assert {name: p.data_ptr() for name, p in made.named_parameters()} == places


# --- refused, and nothing changed


def refused(folder: Path, message: str, config: BackboneConfig | None = None, meta: bool = False) -> str:
    """Import must fail and leave every weight."""
    with torch.device("meta" if meta else "cpu"):
        made = Backbone(config or read_config(folder, positions="sequential", experts=FULL))
    before = state(made)
    with pytest.raises(ValueError, match=message) as caught:
        load_text(made, folder)
    after = made.state_dict()
    if meta:
        assert all(p.is_meta for p in made.parameters())
    else:
        assert same(before, after)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("meta", [False, True])
def test_missing_left_over_and_misshapen_tensors_are_all_named(meta: bool, qwen3: Path) -> None:
    held = tensors(qwen3)
    del held["model.layers.1.self_attn.k_norm.weight"]
    held["model.layers.1.self_attn.q_proj.bias"] = torch.zeros(32)
    held["model.layers.0.mlp.up_proj.weight"] = torch.zeros(24, 17)
    held["model.norm.weight"] = torch.zeros(16, dtype=torch.int8)
    save_file(held, qwen3 / "model.safetensors")
    message = refused(qwen3, "does not fit this model", meta=meta)
    assert "model.layers.1.self_attn.k_norm.weight is missing" in message
    assert "model.layers.1.self_attn.q_proj.bias is unknown" in message
    assert "model.layers.0.mlp.up_proj.weight has shape [24, 17], expected [24, 16]" in message
    assert "model.norm.weight has type I8, expected floating point numbers" in message


def test_at_most_twenty_problems_are_named(qwen3: Path) -> None:
    save_file({"model.norm.weight": torch.zeros(16)}, qwen3 / "model.safetensors")
    message = refused(qwen3, "and 4 more")
    assert message.count("is missing") == 20


def test_rotary_buffers_are_no_weights(qwen3: Path) -> None:
    held = tensors(qwen3) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    expected = imported(qwen3).state_dict()
    save_file(held, qwen3 / "model.safetensors")
    assert same(imported(qwen3).state_dict(), expected)


def test_a_tied_head_may_be_stored_if_it_is_the_embedding(tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    write(folder, MODELS["qwen3 tied"])
    held, expected = tensors(folder), imported(folder).state_dict()
    assert "lm_head.weight" not in held
    held["lm_head.weight"] = held["model.embed_tokens.weight"].clone()
    save_file(held, folder / "model.safetensors")
    assert same(imported(folder).state_dict(), expected)
    held["lm_head.weight"][49, 15] += 1
    save_file(held, folder / "model.safetensors")
    refused(folder, "lm_head.weight differs from model.embed_tokens.weight, which backbone.tied_head makes one")
    held["lm_head.weight"] = torch.zeros(3, 16)
    save_file(held, folder / "model.safetensors")
    refused(folder, "lm_head.weight differs")


def test_an_untied_head_must_be_there(qwen3: Path) -> None:
    held = tensors(qwen3)
    del held["lm_head.weight"]
    save_file(held, qwen3 / "model.safetensors")
    refused(qwen3, "lm_head.weight is missing")


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "gone"])
@pytest.mark.parametrize("folder", ["qwen3", "sharded"])
def test_damaged_files_are_named(damage: str, folder: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(folder)
    config = read_config(path, positions="sequential")
    victim = sorted(path.glob("*.safetensors"))[-1]
    whole = victim.read_bytes()
    if damage == "gone":
        victim.unlink()
    else:
        victim.write_bytes({"cut": whole[:-8], "empty": b"", "text": b"not safetensors at all"}[damage])
    expected = "expected model.safetensors or" if damage == "gone" and folder == "qwen3" else victim.name
    refused(path, expected, config)


def test_an_index_that_does_not_tell_the_truth_is_refused(sharded: Path) -> None:
    path = sharded / "model.safetensors.index.json"
    whole = json.loads(path.read_text())["weight_map"]
    config, first = read_config(sharded, positions="sequential"), min(whole.values())
    for weight_map, message in [
        ({**whole, "model.norm.weight": "../elsewhere.safetensors"}, "expected files of the folder, got ../elsewhere"),
        ({**whole, "model.norm.weight": 3}, "expected files of the folder, got 3"),
        ({**whole, "model.norm.bias": first}, f"model.norm.bias is not in {first}"),
        ({name: file for name, file in whole.items() if file != first}, "model.embed_tokens.weight is missing"),
        ({}, "weight_map: expected the file of each tensor, got none"),
        (None, "weight_map: expected the file of each tensor, got none"),
    ]:
        path.write_text(json.dumps({"weight_map": weight_map}))
        refused(sharded, message, config)
    path.write_text("{")
    refused(sharded, "is no JSON", config)
    path.unlink()
    (sharded / "pytorch_model.bin").write_bytes(b"")
    refused(sharded, r"got neither \(pickled weights are not read\)", config)


def test_a_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    double = dict(load_file(second))
    name, value = next(iter(load_file(first).items()))
    save_file({**double, name: value}, second)
    refused(sharded, f"{name} is in {first.name} and in {second.name}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 32, "head_dim": 8}, "backbone.width: expected 16, got 32"),
        ({"depth": 3}, "backbone.depth: expected 2, got 3"),
        ({"heads": 2}, "backbone.heads: expected 4, got 2"),
        ({"kv_heads": 4}, "backbone.kv_heads: expected 2, got 4"),
        ({"mlp_width": 32}, "backbone.mlp_width: expected 24, got 32"),
        ({"vocabulary": 54}, "backbone.vocabulary: expected 50, got 54"),
        ({"head_dim": None}, "backbone.head_dim: expected 8, got 4"),
        ({"qkv_bias": True}, "backbone.qkv_bias: expected False, got True"),
        ({"qk_norm": False}, "backbone.qk_norm: expected True, got False"),
        ({"tied_head": True}, "backbone.tied_head: expected False, got True"),
        ({"rope_theta": 1e4}, "backbone.rope_theta: expected 1000000.0, got 10000.0"),
        ({"rope_scaling": RopeScaling("linear", 2.0)}, "backbone.rope_scaling: expected None, got RopeScaling"),
        ({"norm_eps": 1e-5}, "backbone.norm_eps: expected 1e-06, got 1e-05"),
        ({"embedding_scale": 4.0}, "backbone.embedding_scale: expected 1.0, got 4.0"),
    ],
)
def test_a_backbone_that_does_not_match_is_refused_by_key(changes: dict[str, Any], message: str, qwen3: Path) -> None:
    config = replace(read_config(qwen3, positions="sequential"), **changes)
    refused(qwen3, message, config)


def test_every_key_that_does_not_match_is_named(qwen3: Path) -> None:
    config = replace(read_config(qwen3, positions="sequential"), width=32, depth=3, norm_eps=1e-5)
    message = refused(qwen3, "does not fit", config)
    assert all(f"backbone.{key}" in message for key in ("width", "depth", "norm_eps"))


def test_learned_routers_are_refused(qwen3: Path) -> None:
    made = imported(qwen3)
    made.config = replace(made.config, moe=Moe(2, 1, 8))
    before = state(made)
    with pytest.raises(ValueError, match=r"backbone\.moe: expected none"):
        load_text(made, qwen3)
    assert same(before, state(made))
    with pytest.raises(ValueError, match=r"backbone\.moe: none of llama, qwen2, qwen3 has it"):
        save_text(made, qwen3.parent / "out")


def test_scalings_that_turn_alike_are_equal(qwen3: Path) -> None:
    edit(qwen3, rope_parameters={"rope_type": "linear", "rope_theta": 1e6, "factor": 2.0})
    imported(qwen3, rope_scaling=RopeScaling("linear", 2.0, original_length=64))
    with pytest.raises(ValueError, match=r"backbone\.rope_scaling"):
        imported(qwen3, rope_scaling=RopeScaling("linear", 3.0))
