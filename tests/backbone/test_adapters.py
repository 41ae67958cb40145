"""Low-rank adapters: their formula, what they leave alone, and how they are handed to peft."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from unimodal.attention import SegmentTable, packed_attention
from unimodal.backbone import Backbone, BackboneConfig, Experts, Lora
from unimodal.backbone.adapters import LoraLinear, peft_state, save_peft
from unimodal.documents import Document
from unimodal.model import UnifiedModel
from unimodal.packing import pack

LORA = Lora(rank=3, alpha=6.0)
CONFIG = BackboneConfig(
    width=32, depth=2, heads=4, kv_heads=2, mlp_width=40, vocabulary=50, positions="sequential", qkv_bias=True,
)  # fmt: skip


def backbone(experts: Experts, seed: int = 0) -> Backbone:
    """Random weights, but for B."""
    torch.manual_seed(seed)
    made = Backbone(replace(CONFIG, experts=experts)).double()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora" not in name:
                parameter += 0.15 * torch.randn_like(parameter)
    return made


def adapted(lora: Lora = LORA, trained: bool = True) -> tuple[Backbone, Backbone]:
    """A backbone with adapters, B as it begins or not, and a dense one with its shared weights."""
    made, dense = backbone(Experts(lora=lora)), backbone(Experts())
    dense.load_state_dict({name: v for name, v in made.state_dict().items() if "lora" not in name})
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if trained and "lora_B" in name:
                parameter.normal_()
    return made, dense


def run(made: Backbone, splits: tuple[int, ...], n: int = 9) -> Tensor:
    """Causal attention over one document, text before image."""
    no = np.array([False])
    table = SegmentTable(document=np.array([0]), length=np.array([n]), bidirectional=no, private=no)
    x = torch.randn(9, 32, generator=torch.Generator().manual_seed(5), dtype=torch.float64)[:n]
    return made(x, torch.arange(n)[:, None], splits, packed_attention("reference", table, torch.arange(n), n))


@torch.no_grad()
def test_b_is_zero_at_first_and_changes_nothing_to_the_last_bit() -> None:
    made, dense = adapted(trained=False)
    for splits in ((9, 0), (0, 9)):
        assert torch.equal(run(made, splits), run(dense, (9,)))
    out = run(made, (4, 5))
    for layer in made.layers:  # the shared weights as they are, whoever reads
        for routed in (layer.qkv, layer.o, layer.mlp):
            routed.by_index[1] = routed.by_index[0]
    assert torch.equal(run(made, (4, 5)), out)


@torch.no_grad()
@pytest.mark.parametrize("parts", [("attention", "mlp"), ("attention",), ("mlp",)], ids="+".join)
@pytest.mark.parametrize("experts", [("image",), ("text", "image")], ids="+".join)
def test_an_adapter_is_a_weight_of_its_own(parts: tuple, experts: tuple) -> None:
    """W + alpha / r B A, section by section, in a mixture that holds such weights by expert."""
    made, _ = adapted(Lora(3, 6.0, experts=experts, parts=parts))
    mixture = backbone(Experts(attention=True, mlp=True))
    for layer, whole in zip(made.layers, mixture.layers, strict=True):
        for i, name in enumerate(("text", "image")):
            whole.qkv[i].bias.copy_(layer.qkv.experts["shared"].bias)
            for held, own in [(layer.qkv, whole.qkv[i]), (layer.o, whole.o[i])]:
                own.weight.copy_(merged(held.experts["shared"], getattr(held, "adapters", {}), name))
            mlp = getattr(layer.mlp, "adapters", {})
            for part in ("gate_up", "down"):
                parts_of = {n: getattr(a, part) for n, a in mlp.items()}
                own = getattr(whole.mlp[i], part)
                own.weight.copy_(merged(getattr(layer.mlp.experts["shared"], part), parts_of, name))
            whole.qk_norm[i].load_state_dict(layer.qk_norm[i].state_dict())
        for norm in ("attention_norm", "mlp_norm"):
            getattr(whole, norm).load_state_dict(getattr(layer, norm).state_dict())
    mixture.norm.load_state_dict(made.norm.state_dict())
    torch.testing.assert_close(run(made, (4, 5)), run(mixture, (4, 5)), atol=1e-10, rtol=1e-10)


def merged(base: torch.nn.Linear, adapters: object, expert: str) -> Tensor:
    if expert not in adapters:
        return base.weight
    adapter = adapters[expert]
    pairs = zip(adapter.lora_A.split(3), adapter.lora_B.split(adapter.sections), strict=True)
    return base.weight + 6.0 / 3 * torch.cat([b @ a for a, b in pairs])


def test_a_begins_as_peft_begins_it() -> None:
    """Uniform up to 1 / sqrt(inputs), which is kaiming_uniform with a = sqrt(5); one A a section."""
    torch.manual_seed(0)
    made = LoraLinear(torch.nn.Linear(400, 60), Lora(8, 16.0), (20, 20, 20))
    assert made.lora_A.shape == (24, 400)
    assert float(made.lora_A.detach().abs().max()) == pytest.approx(400**-0.5, rel=0.01)
    assert float(made.lora_A.detach().std()) == pytest.approx(400**-0.5 / 3**0.5, rel=0.02)
    assert not made.lora_B.any()
    assert made.scale == 2.0


def test_shared_weights_are_counted_once() -> None:
    made, dense = adapted()
    names = [name for name, _ in made.named_parameters()]
    adapters = [name for name in names if "lora" in name]
    assert len({p.data_ptr() for p in made.parameters()}) == len(names) == len(list(dense.parameters())) + len(adapters)
    assert set(made.state_dict()) == set(names) == set(dense.state_dict()) | set(adapters)
    modules = ("qkv.adapters.image", "o.adapters.image", "mlp.adapters.image.gate_up", "mlp.adapters.image.down")
    expected = {f"layers.{i}.{m}.lora_{x}" for i in range(2) for m in modules for x in "AB"}
    assert set(adapters) == expected
    shapes = {name: tuple(p.shape) for name, p in made.named_parameters() if "layers.0" in name and "lora" in name}
    assert shapes["layers.0.qkv.adapters.image.lora_A"] == (9, 32)
    assert shapes["layers.0.qkv.adapters.image.lora_B"] == (32 + 16 + 16, 3)
    assert shapes["layers.0.mlp.adapters.image.gate_up.lora_A"] == (6, 32)
    assert shapes["layers.0.mlp.adapters.image.down.lora_A"] == (3, 40)


@torch.no_grad()
def test_a_copy_shares_nothing_with_the_original() -> None:
    made, _ = adapted()
    twin = copy.deepcopy(made)
    before = run(made, (4, 5))
    assert torch.equal(run(twin, (4, 5)), before)
    for parameter in twin.parameters():
        parameter.mul_(1.5)
    assert torch.equal(run(made, (4, 5)), before)
    scaled = backbone(Experts(lora=LORA), seed=1)
    scaled.load_state_dict(twin.state_dict())  # also through the adapters, the copy reads its own weights
    assert torch.equal(run(scaled, (4, 5)), run(twin, (4, 5)))


def test_text_is_left_alone_while_the_adapter_learns() -> None:
    made, _ = adapted(trained=False)
    for name, parameter in made.named_parameters():
        parameter.requires_grad_("lora" in name)
    with torch.no_grad():
        text, mixed = run(made, (9, 0)), run(made, (4, 5))
    optimizer = torch.optim.SGD([p for p in made.parameters() if p.requires_grad], 0.1)
    for _ in range(3):  # B moves first, then A
        optimizer.zero_grad()
        run(made, (4, 5)).square().sum().backward()
        optimizer.step()
    assert all(p.grad is None for name, p in made.named_parameters() if "lora" not in name)
    assert all(p.grad.any() for name, p in made.named_parameters() if "lora" in name)
    with torch.no_grad():
        assert torch.equal(run(made, (9, 0)), text)
        after = run(made, (4, 5))
    assert torch.equal(after[:4], mixed[:4])
    assert ((after[4:] - mixed[4:]).abs().amax(-1) > 1e-3).all()


def test_a_pack_of_text_gives_adapters_zero_and_not_none(
    make: Callable[..., UnifiedModel], mixed: list[Document]
) -> None:
    model = make("flow", experts=Experts(lora=LORA))
    documents = [model.sequencer.document(mixed[3], (0, 0, 0))]
    model(pack(documents, model.backbone.config.experts, "own"))["text"].sum.backward()
    adapters = [p for name, p in model.named_parameters() if "lora" in name]
    assert len(adapters) == 16
    assert all(p.grad is not None and not p.grad.any() for p in adapters)


@torch.no_grad()
def test_peft_s_names_hold_what_each_projection_gains() -> None:
    made, _ = adapted()
    state = peft_state(made, "image")
    attention = [f"self_attn.{x}_proj" for x in "qkvo"]
    projections = [*attention, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    prefix = "base_model.model.model.layers"
    assert set(state) == {f"{prefix}.{i}.{p}.lora_{x}.weight" for i in range(2) for p in projections for x in "AB"}
    for i, layer in enumerate(made.layers):
        held = [layer.qkv[1], layer.o[1], layer.mlp[1].gate_up, layer.mlp[1].down]
        for adapter, names in zip(held, (projections[:3], projections[3:4], projections[4:6], projections[6:])):
            identity = torch.eye(adapter.lora_A.shape[1], dtype=torch.float64)
            gained = (adapter(identity) - adapter._base[0](identity)).T.split(adapter.sections)
            for name, expected in zip(names, gained, strict=True):
                a, b = (state[f"{prefix}.{i}.{name}.lora_{x}.weight"] for x in "AB")
                assert a.shape[0] == b.shape[1] == 3
                torch.testing.assert_close(6.0 / 3 * b @ a, expected)


def test_an_adapter_folder_for_peft(tmp_path: Path) -> None:
    made, _ = adapted()
    save_peft(made, "image", LORA, tmp_path / "adapter")
    saved, state = load_file(tmp_path / "adapter" / "adapter_model.safetensors"), peft_state(made, "image")
    assert saved.keys() == state.keys()
    assert all(torch.equal(saved[name], state[name]) for name in state)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"], config["bias"]) == ("LORA", 3, 6.0, "none")
    projections = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"
    assert set(config["target_modules"]) == set(projections.split())
    save_peft(adapted(Lora(3, 6.0, parts=("attention",)))[0], "image", LORA, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert set(config["target_modules"]) == set(projections.split()[:4])


@pytest.mark.parametrize("name", ["text", "imag", "shared"])
def test_an_expert_without_an_adapter_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"expert: expected one that has an adapter \(experts.lora\), got {name}"):
        peft_state(adapted()[0], name)
