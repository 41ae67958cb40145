"""Experts, routing, grouped queries, modulation, vocabulary and head of the decoder."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from unimodal.attention import SegmentTable, packed_attention
from unimodal.backbone import SCHEMES, Backbone, BackboneConfig, Experts, Lora, Moe
from unimodal.backbone.positions import Rotary, rotate
from unimodal.backbone.transformer import Rows
from unimodal.documents import Document, Part
from unimodal.model import UnifiedModel
from unimodal.packing import PackedSequence, kind_order, pack
from unimodal_generators.base import TokenKind

CONFIG = BackboneConfig(
    width=32, depth=2, heads=4, kv_heads=2, mlp_width=40, vocabulary=50, positions="sequential",
)  # fmt: skip
PARTS = [
    Experts(attention=True), Experts(mlp=True), Experts(norms=True), Experts(attention=True, norms=True),
    Experts(attention=True, mlp=True, norms=True),
]  # fmt: skip


ADAPTED = Experts(lora=Lora(2, 4.0))
ROUTED = Moe(experts=4, top_k=2, width=16, shared=1)


def named(experts: Experts) -> str:
    if experts.lora is not None:
        return "lora"
    return "+".join(part for part in ("attention", "mlp", "norms") if getattr(experts, part)) or "dense"


def backbone(**changes: object) -> Backbone:
    """Random weights everywhere, norms included."""
    torch.manual_seed(0)
    made = Backbone(replace(CONFIG, **changes))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.15 * torch.randn_like(parameter)
    return made


def run(made: Backbone, x: torch.Tensor, splits: Sequence[int], rows: Rows | None = None) -> torch.Tensor:
    """Causal attention over one document whose tokens are in sequence order already."""
    n, no = len(x), np.array([False])
    table = SegmentTable(document=np.array([0]), length=np.array([n]), bidirectional=no, private=no)
    attention = packed_attention("reference", table, torch.arange(n), n)
    positions = torch.arange(n)[:, None].expand(-1, SCHEMES[made.config.positions].axes)
    return made(x, positions, list(splits), attention, rows)


def by_hand(made: Backbone, x: torch.Tensor) -> torch.Tensor:
    """A dense decoder written out, matrix by matrix and head by head."""
    c, weights = made.config, made.state_dict()
    e, n = c.head_size, len(x)
    sizes = [c.heads * e, c.kv_heads * e, c.kv_heads * e]
    turn = Rotary(SCHEMES[c.positions], e, c.rope_theta)(torch.arange(n)[:, None])

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + c.norm_eps).sqrt() * weight

    for i in range(c.depth):
        w = {name.removeprefix(f"layers.{i}."): v for name, v in weights.items() if name.startswith(f"layers.{i}.")}
        h = norm(x, w["attention_norm.experts.shared.weight"])
        bias = w.get("qkv.experts.shared.bias", torch.zeros(sum(sizes)))
        q, k, v = (
            (h @ m.T + b).unflatten(1, (-1, e))
            for m, b in zip(w["qkv.experts.shared.weight"].split(sizes), bias.split(sizes), strict=True)
        )
        if c.qk_norm:
            q, k = norm(q, w["qk_norm.experts.shared.q"]), norm(k, w["qk_norm.experts.shared.k"])
        q, k = rotate(q, *turn), rotate(k, *turn)
        heads = []
        for head in range(c.heads):
            group = head // (c.heads // c.kv_heads)
            scores = (q[:, head] @ k[:, group].T / e**0.5).masked_fill(~torch.ones(n, n).tril().bool(), -torch.inf)
            heads.append(scores.softmax(-1) @ v[:, group])
        x = x + torch.cat(heads, dim=1) @ w["o.experts.shared.weight"].T
        h = norm(x, w["mlp_norm.experts.shared.weight"])
        gate, up = w["mlp.experts.shared.gate_up.weight"].chunk(2)
        x = x + (F.silu(h @ gate.T) * (h @ up.T)) @ w["mlp.experts.shared.down.weight"].T
    return norm(x, weights["norm.experts.shared.weight"])


def tokens(n: int = 9) -> torch.Tensor:
    return torch.randn(n, 32, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 3}, "backbone.heads: .* width 32, heads 3"),
        ({"heads": 32, "kv_heads": 1}, "backbone.heads: .* even size"),
        ({"heads": 0}, "backbone.heads"),
        ({"head_dim": 5}, "backbone.heads: expected heads of even size, got head_dim 5, heads 4"),
        ({"kv_heads": 3}, "backbone.kv_heads: expected a divisor of heads 4, got 3"),
        ({"kv_heads": 8}, "backbone.kv_heads"),
        ({"kv_heads": 0}, "backbone.kv_heads: expected a divisor of heads 4, got 0"),
        ({"width": 0}, "backbone.width: expected at least 1, got 0"),
        ({"depth": 0}, "backbone.depth: expected at least 1, got 0"),
        ({"mlp_width": -1}, "backbone.mlp_width: expected at least 1, got -1"),
        ({"vocabulary": 0}, "backbone.vocabulary: expected at least 1, got 0"),
        ({"added_tokens": -1}, "backbone.added_tokens: expected at least 0, got -1"),
        ({"width": 30, "heads": 3, "kv_heads": 3, "positions": "block"}, "backbone.width: positions block .* got 30"),
        ({"moe": ROUTED, "experts": ADAPTED}, "experts.lora.parts: expected attention alone beside backbone.moe, got mlp"),
    ],
)  # fmt: skip
def test_shapes_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **changes)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Lora(0, 1.0), "experts.lora.rank: expected at least 1, got 0"),
        (lambda: Lora(2, 1.0, parts=("norms",)), "experts.lora.parts: expected attention or mlp, .* got norms"),
        (lambda: Lora(2, 1.0, parts=()), "experts.lora.parts: .* got none"),
        (lambda: Lora(2, 1.0, experts=()), "experts.lora.experts: expected at least one, got none"),
        (lambda: Experts(lora=Lora(2, 1.0, experts=("draw",))), "experts.lora.experts: .* text, image, got draw"),
        (lambda: Experts(mlp=True, lora=Lora(2, 1.0)), "experts.lora.parts: .* got mlp, held by expert"),
        (lambda: Experts(attention=True, clean="shared"), "experts: expected a word other than shared, .* got 'shared'"),
        (lambda: Experts(attention=True, clean="generator"), "experts: .* got 'generator'"),
        (lambda: Experts(attention=True, clean="a.b"), "experts: .* got 'a.b'"),
        (lambda: Experts(attention=True, clean="keys"), "experts: .* got 'keys'"),
        (lambda: Moe(experts=4, top_k=5, width=8), "backbone.moe.top_k: expected 1 to experts 4, got 5"),
        (lambda: Moe(experts=4, top_k=0, width=8), "backbone.moe.top_k: .* got 0"),
        (lambda: Moe(experts=4, top_k=1, width=0), "backbone.moe.width: expected at least 1, got 0"),
        (lambda: Moe(experts=4, top_k=1, width=8, shared=-1), "backbone.moe.shared: expected at least 0, got -1"),
        (lambda: Moe(experts=4, top_k=1, width=8, z=-0.1), "backbone.moe.z: expected at least 0, got -0.1"),
    ],
)  # fmt: skip
def test_parts_that_cannot_be_are_refused(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_experts_and_who_reads_what() -> None:
    assert Experts().names == ("shared",)
    assert [Experts().index(kind) for kind in TokenKind] == [0, 0, 0, 0]
    full = Experts(mlp=True)
    assert full.names == ("text", "image")
    assert [full.index(kind) for kind in TokenKind] == [0, 0, 1, 1]
    three = Experts(mlp=True, understanding="look", clean="draw", learned="draw")
    assert three.names == ("text", "look", "draw")
    assert [three.index(kind) for kind in TokenKind] == [0, 1, 2, 2]
    crossed = Experts(attention=True, clean="text")  # context images are read by the text expert
    assert [crossed.index(kind) for kind in TokenKind] == [0, 0, 0, 1]
    assert kind_order(crossed) == [TokenKind.TEXT, TokenKind.UNDERSTANDING, TokenKind.CLEAN, TokenKind.LEARNED]
    reordered = Experts(attention=True, understanding="image", learned="text")
    assert kind_order(reordered) == [TokenKind.TEXT, TokenKind.LEARNED, TokenKind.UNDERSTANDING, TokenKind.CLEAN]
    assert Experts(attention=True, clean="text", learned="text").names == ("text",)


@pytest.mark.parametrize("experts", PARTS, ids=named)
def test_only_the_parts_asked_for_are_held_by_expert(experts: Experts) -> None:
    names = set(backbone(experts=experts).state_dict())
    held = {
        "attention": ("layers.0.qkv", "layers.0.qk_norm", "layers.0.o"),
        "mlp": ("layers.0.mlp",),
        "norms": ("layers.0.attention_norm", "layers.0.mlp_norm", "norm"),
    }
    for part, prefixes in held.items():
        expected = {"text", "image"} if getattr(experts, part) else {"shared"}
        for prefix in prefixes:
            found = {name.removeprefix(prefix).split(".")[2] for name in names if name.startswith(f"{prefix}.experts.")}
            assert found == expected, prefix


@pytest.mark.parametrize("experts", PARTS, ids=named)
def test_equal_experts_equal_the_dense_model(experts: Experts) -> None:
    dense, routed = backbone(), backbone(experts=experts)
    state = dense.state_dict()
    for name, value in routed.state_dict().items():
        value.copy_(
            state[name.replace(".experts.text.", ".experts.shared.").replace(".experts.image.", ".experts.shared.")]
        )
    x = tokens()
    torch.testing.assert_close(run(routed, x, (4, 5)), run(dense, x, (9,)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("experts", PARTS, ids=named)
def test_an_expert_changes_what_it_reads(experts: Experts) -> None:
    """Moving the image expert's weights moves image tokens, and leaves the text before them as it was."""
    routed, x = backbone(experts=experts), tokens()
    with torch.no_grad():
        before = run(routed, x, (4, 5))
        for name, parameter in routed.named_parameters():
            if ".experts.image." in name:
                parameter += 0.3 * torch.randn_like(parameter)
        after = run(routed, x, (4, 5))
    torch.testing.assert_close(after[:4], before[:4], atol=1e-6, rtol=1e-5)
    assert ((after[4:] - before[4:]).abs().amax(-1) > 1e-3).all()


def gradients(model: UnifiedModel, document: Document) -> dict[str, torch.Tensor | None]:
    model.zero_grad(set_to_none=True)
    sum(term.sum for term in model(packed(model, document)).values()).backward()  # type: ignore[union-attr]
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("experts", [Experts(), *PARTS, ADAPTED], ids=named)
@pytest.mark.parametrize("generator", ["flow", "autoregressive"])
def test_every_parameter_gets_a_gradient(
    make: Callable[..., UnifiedModel], mixed: list[Document], generator: str, experts: Experts
) -> None:
    model = make(generator, experts=experts)
    found = gradients(model, mixed[2])
    assert [name for name, gradient in found.items() if gradient is None] == []
    idle = [name for name, gradient in found.items() if gradient is not None and not gradient.abs().sum() > 0]
    assert idle == []


@pytest.mark.parametrize("settings", [
    {}, {"time": "token"}, {"time": "adaln"}, {"backbone": {"moe": ROUTED}},
    {"backbone": {"qkv_bias": True, "added_tokens": 6, "tied_head": False}},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("experts", [Experts(), Experts(True, True, True)], ids=named)
def test_a_pack_of_any_kind_reaches_every_parameter(
    make: Callable[..., UnifiedModel], mixed: list[Document], experts: Experts, settings: dict[str, Any]
) -> None:
    model = make("flow", experts=experts, **settings)
    for document in mixed:
        found = gradients(model, document)
        assert [name for name, gradient in found.items() if gradient is None] == []
        assert all(gradient.isfinite().all() for gradient in found.values() if gradient is not None)


def test_an_expert_without_tokens_gets_zero_and_not_none(make: Callable[..., UnifiedModel]) -> None:
    model = make("flow")
    found = gradients(model, Document((Part("three plus seven equals ten"),), "text"))
    images = [name for name in found if ".experts.image." in name or name.startswith("generator.")]
    assert len(images) > 10
    for name in images:
        gradient = found[name]
        assert gradient is not None, name
        assert gradient.abs().sum() == 0, name
    for name in set(found) - set(images):
        gradient = found[name]
        assert gradient is not None, name
        assert gradient.abs().sum() > 0, name


def test_an_expert_without_tokens_changes_nothing() -> None:
    made, x = backbone(experts=Experts(attention=True, mlp=True, norms=True)), tokens()
    with_gradients = run(made, x, (9, 0))
    with torch.no_grad():
        torch.testing.assert_close(run(made, x, (9, 0)), with_gradients, atol=1e-6, rtol=1e-5)
        assert not torch.allclose(run(made, x, (0, 9)), with_gradients, atol=1e-2)


@pytest.mark.parametrize("changes", [
    {}, {"qk_norm": False}, {"qkv_bias": True}, {"head_dim": 12}, {"head_dim": 6, "qkv_bias": True, "qk_norm": False},
    {"kv_heads": 1}, {"rope_theta": 100.0}, {"norm_eps": 0.1}, {"positions": "block"},
], ids=str)  # fmt: skip
def test_the_decoder_is_its_formula(changes: dict[str, Any]) -> None:
    made, x = backbone(**changes).double(), tokens().double()
    with torch.no_grad():
        torch.testing.assert_close(run(made, x, (9,)), by_hand(made, x), atol=1e-9, rtol=1e-9)


def test_a_head_may_be_wider_than_its_share() -> None:
    made = backbone(head_dim=12)
    assert made.config.head_size == 12
    assert made.layers[0].qkv[0].weight.shape == ((4 + 2 + 2) * 12, 32)
    assert made.layers[0].o[0].weight.shape == (32, 4 * 12)
    said, share = backbone(head_dim=8), backbone()
    with torch.no_grad():
        assert torch.equal(run(said, tokens(), (9,)), run(share, tokens(), (9,)))


def test_biases_are_of_queries_keys_and_values_only_and_begin_at_zero() -> None:
    torch.manual_seed(0)
    made, plain = Backbone(replace(CONFIG, qkv_bias=True)), Backbone(CONFIG)
    biases = {name: p for name, p in made.named_parameters() if name.endswith("bias")}
    assert set(biases) == {f"layers.{i}.qkv.experts.shared.bias" for i in range(2)}
    assert all(p.shape == (64,) and not p.any() for p in biases.values())
    plain.load_state_dict({name: v for name, v in made.state_dict().items() if name not in biases})
    with torch.no_grad():
        assert torch.equal(run(made, tokens(), (9,)), run(plain, tokens(), (9,)))


def test_grouped_queries_equal_repeated_heads() -> None:
    grouped, full = backbone(kv_heads=2), backbone(kv_heads=4)
    state = grouped.state_dict()
    for name, value in state.items():
        if ".qkv." in name:
            q, k, v = value.unflatten(0, (-1, 8)).split([4, 2, 2])
            repeated = torch.cat([q, k.repeat_interleave(2, 0), v.repeat_interleave(2, 0)])
            state[name] = repeated.flatten(0, 1)
    full.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(run(full, tokens(), (9,)), run(grouped, tokens(), (9,)), atol=1e-5, rtol=1e-4)


def test_queries_and_keys_are_normalised_only_when_asked() -> None:
    on, off = backbone(), backbone(qk_norm=False)
    assert any("qk_norm" in name for name in on.state_dict())
    assert not any("qk_norm" in name for name in off.state_dict())
    x = tokens()
    with torch.no_grad():
        for made, same in ((on, True), (off, False)):
            before = run(made, x, (9,))
            for layer in made.layers:
                layer.qkv[0].weight[: 6 * 8] *= 3.0  # queries and keys, not values
            assert torch.allclose(run(made, x, (9,)), before, atol=1e-4) == same


def test_a_tied_head_is_the_embedding() -> None:
    tied, untied = backbone(), backbone(tied_head=False)
    hidden = tokens(3)
    assert tied.head is None
    torch.testing.assert_close(tied.logits(hidden), hidden @ tied.embedding.weight.T)
    assert untied.head is not None
    torch.testing.assert_close(untied.logits(hidden), hidden @ untied.head.weight.T)
    assert not torch.equal(untied.head.weight, untied.embedding.weight)
    assert len(list(untied.parameters())) == len(list(tied.parameters())) + 1
    assert tied.bfloat16().logits(hidden.bfloat16()).dtype == torch.float32


def test_what_writes_to_the_residual_stream_begins_smaller() -> None:
    torch.manual_seed(0)
    made = Backbone(replace(CONFIG, width=128, mlp_width=256, depth=8))
    for name, parameter in made.named_parameters():
        if parameter.ndim == 2:
            expected = 0.005 if ".o." in name or name.endswith("down.weight") else 0.02
            assert float(parameter.detach().std()) == pytest.approx(expected, rel=0.1), name
        else:
            assert (parameter == 1).all(), name


def test_later_tokens_do_not_change_earlier_ones() -> None:
    made, x = backbone(), tokens()
    with torch.no_grad():
        torch.testing.assert_close(run(made, x[:6], (6,)), run(made, x, (9,))[:6], atol=1e-5, rtol=1e-4)


def vocabularies(**changes: Any) -> tuple[Backbone, torch.Tensor]:
    """A backbone with added tokens, and both of its embedding tables as one."""
    made = backbone(added_tokens=6, **changes)
    assert made.embedding.added is not None
    return made, torch.cat([made.embedding.weight, made.embedding.added])


def test_added_tokens_are_rows_after_the_vocabulary() -> None:
    made, table = vocabularies()
    assert made.config.rows == 56
    assert {n: tuple(v.shape) for n, v in made.state_dict().items() if n.startswith("embedding.")} == {
        "embedding.weight": (50, 32), "embedding.added": (6, 32),
    }  # fmt: skip
    ids = torch.tensor([[0, 49, 50], [55, 3, 52]])
    with torch.no_grad():
        assert torch.equal(made.embedding(ids), table[ids])
        torch.testing.assert_close(made.logits(tokens(3)), tokens(3) @ table.T)


def test_added_tokens_and_the_vocabulary_do_not_share_gradients() -> None:
    made, _ = vocabularies()
    assert made.embedding.added is not None
    made.embedding(torch.tensor([50, 55, 50])).sum().backward()
    assert made.embedding.weight.grad is not None
    assert not made.embedding.weight.grad.any()
    assert made.embedding.added.grad.sum(1).tolist() == [64, 0, 0, 0, 0, 32]
    made.zero_grad()
    made.embedding(torch.tensor([0, 49])).sum().backward()
    assert not made.embedding.added.grad.any()
    assert made.embedding.weight.grad.any(1).nonzero().flatten().tolist() == [0, 49]


def test_an_untied_head_has_added_rows_of_its_own() -> None:
    made, table = vocabularies(tied_head=False)
    assert made.head is not None
    assert made.head.added is not None
    rows = torch.cat([made.head.weight, made.head.added])
    assert not torch.equal(rows, table)
    with torch.no_grad():
        torch.testing.assert_close(made.logits(tokens(3)), tokens(3) @ rows.T)
    assert [len(t) for t in made.tables] == [50, 6]


def test_a_model_learns_and_reads_added_tokens(make: Callable[..., UnifiedModel], mixed: list[Document]) -> None:
    """The losses are those of one table of all rows."""
    split = make("flow", backbone={"added_tokens": 6})
    whole = make("flow", backbone={"vocabulary": 306})
    state = split.state_dict()
    added = state.pop("backbone.embedding.added")
    state["backbone.embedding.weight"] = torch.cat([state["backbone.embedding.weight"], added])
    whole.load_state_dict(state)
    whole._text = split._text  # the same ids
    assert (packed(split, mixed[2]).text_ids >= 300).sum() == 10  # boundaries of the document and of its images
    losses = [model(packed(model, mixed[2])) for model in (split, whole)]
    for name in ("text", "image"):
        torch.testing.assert_close(losses[0][name].sum, losses[1][name].sum)


@pytest.mark.parametrize("added", [0, 6])
def test_embeddings_are_scaled_and_the_head_is_not(added: int) -> None:
    plain, scaled = backbone(added_tokens=added), backbone(added_tokens=added, embedding_scale=32**0.5)
    ids = torch.tensor([0, 7, 49 + added])
    with torch.no_grad():
        torch.testing.assert_close(scaled.embedding(ids), plain.embedding(ids) * 32**0.5)
        assert torch.equal(scaled.logits(tokens(3)), plain.logits(tokens(3)))


def packed(model: UnifiedModel, *documents: Document) -> PackedSequence:
    sequenced = [model.sequencer.document(d, (0, 0, i), train=False) for i, d in enumerate(documents)]
    return pack(sequenced, model.backbone.config.experts, model.generator.reads)


@pytest.mark.parametrize("settings", [
    {}, {"experts": Experts()}, {"experts": ADAPTED}, {"time": "adaln"}, {"time": "token"},
    {"backbone": {"moe": ROUTED}}, {"experts": Experts(), "backbone": {"moe": ROUTED}},
], ids=str)  # fmt: skip
def test_recomputing_layers_changes_nothing(
    make: Callable[..., UnifiedModel], mixed: list[Document], settings: dict[str, Any]
) -> None:
    found = []
    for checkpointing in (False, True):
        model = make("flow", **settings)
        model.backbone.checkpointing = checkpointing
        losses = model(packed(model, *mixed))
        sum(term.sum for term in losses.values()).backward()
        found.append(({n: t.sum for n, t in losses.items()}, {n: p.grad for n, p in model.named_parameters()}))
    for plain, recomputed in zip(*found, strict=True):
        assert plain.keys() == recomputed.keys()
        for name, value in plain.items():
            torch.testing.assert_close(recomputed[name], value, atol=0, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_recomputing_layers_keeps_less() -> None:
    """Tensors saved for backward: a layer's inputs rather than all it computes."""
    made, x, sizes = backbone(depth=6), tokens(), []
    for made.checkpointing in (False, True):
        held: set[tuple[int, int]] = set()

        def keep(t: torch.Tensor, held: set[tuple[int, int]] = held) -> torch.Tensor:
            held.add((t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()))
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            out = run(made, x, (9,))
        parameters = {p.untyped_storage().data_ptr() for p in made.parameters()}
        sizes.append(sum(size for at, size in held if at not in parameters))
        del out
    assert sizes[1] < sizes[0] / 3


def conditioned(experts: Experts) -> tuple[Backbone, Backbone, Rows]:
    """A backbone with modulation, one without and with the same weights, and conditions of two images."""
    on, off = backbone(adaln=True, experts=experts), backbone(experts=experts)
    off.load_state_dict({name: v for name, v in on.state_dict().items() if "modulation" not in name})
    rows = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 0])
    condition = torch.randn(2, 32, generator=torch.Generator().manual_seed(8))
    return on, off, (condition, [rows] if len(experts.names) == 1 else [None, rows[3:]])


@pytest.mark.parametrize("experts", [Experts(), Experts(True, True, True)], ids=named)
def test_modulation_begins_as_nothing(experts: Experts) -> None:
    on, off, rows = conditioned(experts)
    fresh = Backbone(on.config)
    assert all(not p.any() for n, p in fresh.named_parameters() if "modulation" in n)
    with torch.no_grad():
        for name, parameter in on.named_parameters():
            if "modulation" in name:
                parameter.zero_()
        splits = (9,) if len(experts.names) == 1 else (3, 6)
        assert torch.equal(run(on, tokens(), splits, rows), run(off, tokens(), splits))


@pytest.mark.parametrize("experts", [Experts(), Experts(True, True, True)], ids=named)
def test_modulation_reads_each_image_s_condition_and_leaves_text_as_it_is(experts: Experts) -> None:
    on, off, rows = conditioned(experts)
    splits = (9,) if len(experts.names) == 1 else (3, 6)
    with torch.no_grad():
        out, plain = run(on, tokens(), splits, rows), run(off, tokens(), splits)
        assert torch.equal(out[:3], plain[:3])  # text before the images: exactly
        assert ((out[3:8] - plain[3:8]).abs().amax(-1) > 1e-2).all()
        other = rows[0].clone()
        other[1] += 1.0
        moved = run(on, tokens(), splits, (other, rows[1]))
        assert torch.equal(moved[:6], out[:6])  # the first image does not read the second's
        assert ((moved[6:8] - out[6:8]).abs().amax(-1) > 1e-3).all()


def test_modulation_is_computed_once_an_image() -> None:
    on, _, rows = conditioned(Experts())
    seen: list[int] = []
    for layer in on.layers:
        layer.modulation.project.register_forward_hook(lambda _, inputs, output: seen.append(len(output)))
    run(on, tokens(), (9,), rows)
    assert seen == [2, 2]


def test_one_modulated_layer_by_hand() -> None:
    """Shift, scale and gate before and behind both branches, of one token that sees itself alone."""
    made = backbone(adaln=True, depth=1)
    layer, x, condition = made.layers[0], tokens(1), torch.randn(1, 32)
    with torch.no_grad():
        shift, scale, gate, shift2, scale2, gate2 = layer.modulation.project(F.silu(condition)).chunk(6, dim=1)
        h = layer.attention_norm[0](x) * (1 + scale) + shift
        v = layer.qkv[0](h)[:, 48:].unflatten(1, (2, 8)).repeat_interleave(2, 1).flatten(1)
        y = x + layer.o[0](v) * (1 + gate)
        h = layer.mlp_norm[0](y) * (1 + scale2) + shift2
        y = y + layer.mlp[0](h) * (1 + gate2)
        expected = made.norm[0](y)
        out = run(made, x, (1,), (condition, [torch.ones(1, dtype=torch.long)]))
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_learned_routers_cannot_be_compiled() -> None:
    with pytest.raises(ValueError, match=r"compile: expected no backbone\.moe"):
        backbone(moe=ROUTED).compile()
