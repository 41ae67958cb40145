"""Experts, routing, grouped queries and the head of the decoder."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch

from unimodal.attention import TokenTable, packed_attention
from unimodal.backbone import Backbone, BackboneConfig, Experts
from unimodal.documents import Document, Part
from unimodal.model import UnifiedModel
from unimodal.packing import kind_order, pack
from unimodal_generators.base import TokenKind

CONFIG = BackboneConfig(
    width=32, depth=2, heads=4, kv_heads=2, mlp_width=40, vocabulary=50, positions="sequential",
)  # fmt: skip
PARTS = [
    Experts(attention=True), Experts(mlp=True), Experts(norms=True), Experts(attention=True, norms=True),
    Experts(attention=True, mlp=True, norms=True),
]  # fmt: skip


def named(experts: Experts) -> str:
    return "+".join(part for part in ("attention", "mlp", "norms") if getattr(experts, part)) or "dense"


def backbone(**changes: object) -> Backbone:
    """Random weights everywhere, norms included."""
    torch.manual_seed(0)
    made = Backbone(replace(CONFIG, **changes))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.15 * torch.randn_like(parameter)
    return made


def run(made: Backbone, x: torch.Tensor, splits: Sequence[int]) -> torch.Tensor:
    """Causal attention over one document whose tokens are in sequence order already."""
    n = len(x)
    false = torch.zeros(n, dtype=torch.bool)
    table = TokenTable(torch.zeros(n, dtype=torch.long), torch.zeros(n, dtype=torch.long), false, false, (n,))
    attention = packed_attention("reference", table, torch.arange(n), torch.arange(n))
    return made(x, torch.arange(n)[:, None], list(splits), attention)


def tokens(n: int = 9) -> torch.Tensor:
    return torch.randn(n, 32, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 3}, "backbone.heads: .* width 32, heads 3"),
        ({"heads": 32, "kv_heads": 1}, "backbone.heads: .* even size"),
        ({"heads": 0}, "backbone.heads"),
        ({"kv_heads": 3}, "backbone.kv_heads: expected a divisor of heads 4, got 3"),
        ({"kv_heads": 8}, "backbone.kv_heads"),
        ({"kv_heads": 0}, "backbone.kv_heads: expected a divisor of heads 4, got 0"),
    ],
)
def test_shapes_that_cannot_be_are_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **changes)


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
    packed = pack([model.sequencer.document(document, (0, 0, 0), train=False)], model.backbone.config.experts,
                  model.generator.reads)  # fmt: skip
    model.zero_grad(set_to_none=True)
    sum(term.sum for term in model(packed).values()).backward()  # type: ignore[union-attr]
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("experts", [Experts(), *PARTS], ids=named)
@pytest.mark.parametrize("generator", ["flow", "autoregressive"])
def test_every_parameter_gets_a_gradient(
    make: Callable[..., UnifiedModel], mixed: list[Document], generator: str, experts: Experts
) -> None:
    model = make(generator, experts=experts)
    found = gradients(model, mixed[2])
    assert [name for name, gradient in found.items() if gradient is None] == []
    idle = [name for name, gradient in found.items() if gradient is not None and not gradient.abs().sum() > 0]
    assert idle == []


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
