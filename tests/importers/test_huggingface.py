"""Imported weights = transformers' own model, at width 16; what was exported loads there; nothing is half imported."""

import gc
import json
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from unimodal.attention import SegmentTable, packed_attention
from unimodal.backbone import SCHEMES, Backbone, BackboneConfig, Experts, Lora, Moe, RopeScaling
from unimodal.importers import huggingface, load_text, read_config, save_text
from unimodal.text import TextTokenizer

FULL = Experts(attention=True, mlp=True, norms=True)
SHAPE = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.5, "high_freq_factor": 6.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "rms_norm_eps": 1e-5},
    "llama without groups, tied": {"model_type": "llama", "num_key_value_heads": 4, "tie_word_embeddings": True},
    "llama3": {"model_type": "llama", "attention_bias": False, "rope_parameters": LLAMA3},
    "llama linear": {
        "model_type": "llama", "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5},
    },
    "llama with one key head, wide heads": {"model_type": "llama", "num_key_value_heads": 1, "head_dim": 8},
    "qwen2": {"model_type": "qwen2", "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "qwen2.5 tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2.5 yarn": {"model_type": "qwen2", "rope_parameters": YARN},
    "qwen3": {"model_type": "qwen3", "head_dim": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "qwen3 tied": {"model_type": "qwen3", "head_dim": 8, "tie_word_embeddings": True},
    "qwen3, heads that do not divide": {
        "model_type": "qwen3", "head_dim": 6, "num_attention_heads": 3, "num_key_value_heads": 1,
    },
    "qwen3 yarn": {
        "model_type": "qwen3", "head_dim": 16, "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 1024,
            "beta_fast": 8.0, "beta_slow": 2.0, "attention_factor": 1.3,
        },
    },
    "qwen3 yarn by mscale": {
        "model_type": "qwen3", "head_dim": 4, "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7},
    },
}  # fmt: skip


def original(settings: dict[str, Any]) -> transformers.PreTrainedModel:
    """Random weights everywhere, norms and biases included."""
    torch.manual_seed(0)
    kind = settings["model_type"]
    config = transformers.AutoConfig.for_model(kind, **{**SHAPE, **{k: v for k, v in settings.items() if v != kind}})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def write(folder: Path, settings: dict[str, Any], size: str = "5GB") -> transformers.PreTrainedModel:
    model = original(settings)
    model.save_pretrained(folder, max_shard_size=size)
    return model


@pytest.fixture
def qwen3(tmp_path: Path) -> Path:
    """A small Qwen3 folder of one file."""
    write(tmp_path / "qwen3", MODELS["qwen3"])
    return tmp_path / "qwen3"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """The same of many files."""
    write(tmp_path / "sharded", MODELS["qwen3"], "4KB")
    return tmp_path / "sharded"


def ids(n: int = 40) -> Tensor:
    return torch.randint(50, (n,), generator=torch.Generator().manual_seed(3))


def empty(folder: Path, meta: bool = False, **changes: Any) -> Backbone:
    """A backbone that fits, with other weights or none."""
    torch.manual_seed(1)
    with torch.device("meta" if meta else "cpu"):
        return Backbone(read_config(folder, **{"positions": "sequential", **changes}))


def imported(folder: Path, meta: bool = False, **changes: Any) -> Backbone:
    made = empty(folder, meta, **changes)
    load_text(made, folder)
    return made


@torch.no_grad()
def hidden(made: Backbone, tokens: Tensor, backend: str = "reference", expert: int = 0) -> Tensor:
    """One causal document of text, read by one expert."""
    n, no = len(tokens), np.array([False])
    table = SegmentTable(document=np.zeros(1, int), length=np.array([n]), bidirectional=no, private=no)
    splits = [n if e == expert else 0 for e in range(len(made.config.experts.names))]
    attention = packed_attention(backend, table, torch.arange(n), n)
    return made(made.embedding(tokens), torch.arange(n)[:, None], splits, attention)


@torch.no_grad()
def logits(made: Backbone, tokens: Tensor, expert: int = 0) -> Tensor:
    return made.logits(hidden(made, tokens, expert=expert))


@torch.no_grad()
def theirs(model: transformers.PreTrainedModel, tokens: Tensor) -> Tensor:
    return model(input_ids=tokens[None]).logits[0]


def state(made: Backbone) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in made.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


def edit(folder: Path, **changes: Any) -> None:
    """Other values in config.json; None as a string removes a key."""
    record = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in record.items() if v != "none"}))


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


# --- and back


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shard_bytes", [10**9, 4000])
def test_an_export_loads_in_transformers_and_is_the_source(name: str, shard_bytes: int, tmp_path: Path) -> None:
    model = write(tmp_path / "hf", MODELS[name])
    made = imported(tmp_path / "hf", experts=FULL, added_tokens=4)
    save_text(made, tmp_path / "out", shard_bytes=shard_bytes, context_length=128)
    source, written = tensors(tmp_path / "hf"), tensors(tmp_path / "out")
    assert source.keys() == written.keys()
    assert all(torch.equal(source[key], written[key]) for key in source)
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file() is (shard_bytes == 4000)
    assert not (tmp_path / "out" / "model.safetensors").exists() or shard_bytes == 10**9
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert type(loaded) is type(model)
    assert loaded.dtype == torch.float32
    assert torch.equal(theirs(loaded.eval(), ids()), theirs(transformers_again(tmp_path / "hf"), ids()))
    back = imported(tmp_path / "out", experts=FULL)
    assert replace(back.config, rope_scaling=None) == replace(made.config, added_tokens=0, rope_scaling=None)
    kept = {key: value for key, value in made.state_dict().items() if not key.endswith("added")}
    assert same(back.state_dict(), kept)


def transformers_again(folder: Path) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def test_older_transformers_would_find_the_same_rope(tmp_path: Path) -> None:
    write(tmp_path / "hf", MODELS["llama3"])
    save_text(imported(tmp_path / "hf"), tmp_path / "out")
    edit(tmp_path / "out", rope_parameters="none")
    loaded = transformers_again(tmp_path / "out")
    assert torch.equal(theirs(loaded, ids()), theirs(transformers_again(tmp_path / "hf"), ids()))
    assert loaded.config.max_position_embeddings == 256  # factor times the original length


def test_each_expert_is_exported_by_name(qwen3: Path) -> None:
    made = imported(qwen3, experts=FULL)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if ".experts.image." in name:
                parameter += 0.1 * torch.randn_like(parameter)
    for index, expert in enumerate(("text", "image")):
        out = qwen3.parent / expert
        save_text(made, out, expert)
        expected = logits(made, ids(), index)
        torch.testing.assert_close(theirs(transformers_again(out), ids()), expected, atol=1e-5, rtol=1e-5)
    assert not torch.equal(logits(made, ids(), 0), logits(made, ids(), 1))
    with pytest.raises(ValueError, match="expert: expected one of text, image, got audio"):
        save_text(made, qwen3.parent / "audio", "audio")
    save_text(imported(qwen3), qwen3.parent / "dense")  # its one set of weights is everybody's
    assert not (qwen3.parent / "audio").exists()


@pytest.mark.parametrize("name", ["qwen3", "qwen2"])
def test_adapters_are_merged_into_what_they_adapt(name: str, tmp_path: Path) -> None:
    write(tmp_path / "hf", MODELS[name])
    made = imported(tmp_path / "hf", experts=Experts(lora=Lora(2, 4.0)))
    with torch.no_grad():
        for key, parameter in made.named_parameters():
            if "lora" in key:
                parameter += 0.3 * torch.randn_like(parameter)
    save_text(made, tmp_path / "text")
    save_text(made, tmp_path / "image", "image")
    assert same(tensors(tmp_path / "text"), tensors(tmp_path / "hf"))
    expected = logits(made, ids(), 1)
    assert (expected - logits(made, ids(), 0)).abs().max() > 0.1
    torch.testing.assert_close(theirs(transformers_again(tmp_path / "image"), ids()), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["qwen3", "qwen3 tied"])
def test_added_rows_are_dropped_or_appended(name: str, tmp_path: Path) -> None:
    write(tmp_path / "hf", MODELS[name])
    made = imported(tmp_path / "hf", added_tokens=5, experts=FULL)
    save_text(made, tmp_path / "dropped")
    save_text(made, tmp_path / "appended", added=True)
    assert transformers_again(tmp_path / "dropped").config.vocab_size == 50
    loaded = transformers_again(tmp_path / "appended")
    assert loaded.config.vocab_size == 55
    tokens = torch.cat([ids(20), torch.arange(50, 55)])
    torch.testing.assert_close(theirs(loaded, tokens), logits(made, tokens), atol=1e-5, rtol=1e-5)
    index = tmp_path / "sharded"
    save_text(made, index, added=True, shard_bytes=4000)
    record = json.loads((index / "model.safetensors.index.json").read_text())
    assert record["metadata"]["total_size"] == sum(t.nbytes for t in tensors(index).values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qk_norm": True, "qkv_bias": True}, "backbone.qkv_bias: expected false with qk_norm"),
        ({"embedding_scale": 4.0}, "backbone.embedding_scale: none of"),
        (
            {"qk_norm": False, "heads": 3, "kv_heads": 3, "head_dim": 6},
            "backbone.heads: Llama's divide width 16, got 3",
        ),
    ],
)
def test_what_no_architecture_computes_is_not_exported(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    shape = {"width": 16, "depth": 1, "heads": 2, "kv_heads": 1, "mlp_width": 8, "vocabulary": 9}
    made = Backbone(BackboneConfig(**{**shape, "positions": "sequential", **changes}))
    with pytest.raises(ValueError, match=message):
        save_text(made, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_export_appears_complete_or_not_at_all(qwen3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, out = imported(qwen3), qwen3.parent / "out" / "deep"
    monkeypatch.setattr(huggingface, "write_json", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_text(made, out)
    monkeypatch.undo()
    assert list(out.parent.iterdir()) == []
    out.mkdir()
    save_text(made, out)  # an empty folder is as good as none
    assert sorted(p.name for p in out.parent.iterdir()) == ["deep"]
    with pytest.raises(ValueError, match="export: expected a new or empty folder"):
        save_text(made, out)
    (out.parent / "file").write_text("")
    with pytest.raises(ValueError, match="export: expected a new or empty folder"):
        save_text(made, out.parent / "file")


def test_the_tokenizer_goes_along(qwen3: Path) -> None:
    made, text = imported(qwen3, added_tokens=4), TextTokenizer.train(["grün ist grün"], 270)
    save_text(made, qwen3.parent / "out", tokenizer=text.placed(300))
    loaded = transformers.AutoTokenizer.from_pretrained(qwen3.parent / "out")
    assert loaded.encode("grün, 数字 <|im_end|>") == text.encode("grün, 数字 <|im_end|>")
    assert TextTokenizer.load(qwen3.parent / "out" / "tokenizer.json").special == text.special
    assert transformers.AutoConfig.from_pretrained(qwen3.parent / "out").eos_token_id is None  # its row was dropped
