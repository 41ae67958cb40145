"""The forms in which images are context: clean tokens, understanding features, both; laid out, learned, decoded, kept."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from unimodal.backbone import BackboneConfig
from unimodal.decoding import Session, decode, read_prompts
from unimodal.decoding_settings import DecodingSettings
from unimodal.documents import Document, Part
from unimodal.export import ExportInfo, build, load_export, save_export
from unimodal.model import UnifiedModel
from unimodal.packing import PackedSequence, pack
from unimodal.sequence_rules import SequenceRules
from unimodal.training.flops import useful_flops
from unimodal.training.optimizers import parameter_groups
from unimodal.training.stages import freeze, parts
from unimodal.vision import VisionEncoder
from unimodal_generators import Flow
from unimodal_generators.base import Grid, TokenKind
from unimodal_tokenizers import PatchTokenizer

Make = Callable[..., UnifiedModel]
T, U, C, L = TokenKind
NAMES = ["both", "reader", "janus", "next-both"]


def picture(seed: int, height: int = 8, width: int = 8) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


GIVEN = Document((Part(picture(0), learn=False), Part("a three")))
DRAWN = Document((Part("a three", learn=False), Part(picture(1))))
WIDE = Document((Part(picture(2, 4, 8), learn=False), Part("a three")))


def packed(model: UnifiedModel, *documents: Document, train: bool = False, key: int = 0) -> PackedSequence:
    laid = [model.sequencer.document(d, (key, i), train=train) for i, d in enumerate(documents)]
    return pack(laid, model.backbone.config.experts, model.generator.reads)


def kinds(model: UnifiedModel, document: Document) -> list[TokenKind]:
    return [s.kind for s in model.sequencer.document(document, (0, 0), train=False).segments]


# ---- laid out


@pytest.mark.parametrize(
    ("name", "given", "drawn"),
    [
        ("flow", [C], [L, C]), ("both", [C, U], [L, C, U]), ("reader", [U], [L, U]),
        ("autoregressive", [C], [L]), ("janus", [U], [L]), ("next-both", [C, U], [L, U]),
    ],
)  # fmt: skip
def test_which_forms_an_image_takes(name: str, given: list[TokenKind], drawn: list[TokenKind], make: Make) -> None:
    model = make(name)
    assert kinds(model, GIVEN) == [T, *given, T]
    assert kinds(model, DRAWN) == [T, *drawn, T]
    model = make(name, learn_end=False)
    assert kinds(model, DRAWN) == [T, L]  # nothing follows that would read it
    assert kinds(model, Document((*DRAWN.parts, Part(" more")))) == [T, *drawn, T]


@pytest.mark.parametrize("positions", ["sequential", "block", "mrope"])
def test_features_are_numbered_behind_clean_tokens(positions: str, make: Make) -> None:
    """A private copy takes up no place; what everybody sees does."""
    for name, grids in (("both", [0, 0, 1]), ("reader", [0, 0]), ("next-both", [0, 1])):
        model = make(name, backbone={"positions": positions})
        (text, *images, after) = model.sequencer.document(DRAWN, (0, 0), train=False).segments
        scheme, start = model.scheme, int(text.positions[-1, 0]) + 1
        for segment, behind in zip(images, grids, strict=True):
            at = scheme.image(start, model.tokenizer.layout.grid(8, 8)).following if behind else start
            np.testing.assert_array_equal(segment.positions, scheme.image(at, segment.block.grid).ids)
        assert int(after.positions[0, 0]) == scheme.image(at, segment.block.grid).following


def test_features_are_a_block_that_all_see(make: Make) -> None:
    model = make("both")
    p = packed(model, GIVEN)
    (at,) = np.flatnonzero(np.array([s.kind for s in model.sequencer.document(GIVEN, (0, 0)).segments]) == U)
    assert p.table.bidirectional[at]
    assert not p.table.private[at]
    (block,) = p.understood_blocks
    assert (block.grid, block.kind) == (Grid(2, 2), U)


def test_only_images_whose_tokens_are_asked_for_are_tokenized(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """And only those whose features are asked for are looked at."""
    model = make("janus")
    p = packed(model, GIVEN, DRAWN, WIDE)
    assert [tuple(group.shape) for group in p.images] == [(1, 3, 8, 8), (1, 3, 8, 8), (1, 3, 4, 8)]
    assert (p.tokenized, p.learned_images, p.context_images, p.understood_images) == (1, (0,), (), (1, 2))
    seen: list[torch.Tensor] = []
    encode = model.tokenizer.encode
    monkeypatch.setattr(model.tokenizer, "encode", lambda images: seen.append(images) or encode(images))
    with torch.no_grad():
        model(p)
    (images,) = seen
    assert torch.equal(images, p.images[0])
    assert torch.equal(p.understood[1], p.images[2][0])
    assert packed(make("both"), GIVEN, DRAWN).tokenized == 1


def test_given_images_are_dropped_in_all_their_forms(make: Make) -> None:
    for name in NAMES:
        model = make(name, drop_images=0.99, drop_text=0.0)
        laid = [model.sequencer.document(GIVEN, (0, i)) for i in range(5)]
        assert all([s.kind for s in d.segments] == [T] for d in laid)
        assert all(not d.images for d in laid)
        assert L in [s.kind for s in model.sequencer.document(DRAWN, (0, 0)).segments]


def test_causal_features_need_features() -> None:
    with pytest.raises(ValueError, match=r"sequence\.causal_features: expected a context with features, got clean"):
        SequenceRules([(8, 8)], 64, causal_features=True)


# ---- learned


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_what_looks(name: str, make: Make) -> None:
    model = make(name)
    torch.stack([term.sum for term in model(packed(model, GIVEN)).values()]).sum().backward()
    for part in ("vision", "connector"):
        gradients = [p.grad for p in parts(model)[part] if p.requires_grad]
        assert all(g is not None for g in gradients)
        assert any(g.abs().max() > 0 for g in gradients if g is not None)


def test_positions_of_the_encoder_are_not_decayed(make: Make) -> None:
    """timm says which parameters it would not decay in a method; ours stand in an attribute of the same name."""
    model = make("reader")
    decayed, rest = (group["params"] for group in parameter_groups(model, 0.1))
    network = model.vision.network
    assert any(p is network.blocks[0].mlp.fc1.weight for p in decayed)
    for parameter in (network.pos_embed, network.cls_token, network.norm.weight):
        assert any(p is parameter for p in rest)


def test_a_pack_without_images_to_look_at_gives_zeros(make: Make) -> None:
    model = make("janus")
    losses = model(packed(model, DRAWN))
    torch.stack([term.sum for term in losses.values()]).sum().backward()
    for parameter in (*parts(model)["vision"], *parts(model)["connector"]):
        assert parameter.grad is not None
        assert not parameter.grad.any()


def test_what_is_frozen_has_no_gradient(make: Make) -> None:
    model = make("both")
    freeze(model, ["vision"])
    torch.stack([term.sum for term in model(packed(model, GIVEN, DRAWN)).values()]).sum().backward()
    named = dict(model.named_parameters())
    assert all(p.grad is None for name, p in named.items() if name.startswith("vision."))
    assert all(p.grad is not None for name, p in named.items() if name.startswith("connector."))
    with pytest.raises(ValueError, match=r"freeze: expected some of .*, got vision"):
        freeze(make("flow"), ["vision"])


def test_the_text_of_an_answer_depends_on_the_features(make: Make) -> None:
    model, p = make("reader"), packed(make("reader"), GIVEN)
    with torch.no_grad():
        before = float(model(p)["text"].sum)
        model.connector[-1].bias += 1.0
        assert abs(float(model(p)["text"].sum) - before) > 1e-3


def test_its_work_is_counted(make: Make) -> None:
    model = make("both")
    found = useful_flops(model, packed(model, GIVEN, DRAWN))
    assert found.vision > 0
    assert found.total == sum(found)
    assert useful_flops(model, packed(model, Document((Part("a three"),)))).vision == 0
    twice = useful_flops(model, packed(model, GIVEN, DRAWN, GIVEN, DRAWN))
    assert twice.vision == 2 * found.vision
    freeze(model, ["vision"])
    assert 0 < useful_flops(model, packed(model, GIVEN, DRAWN)).vision < found.vision
    assert useful_flops(make("flow"), packed(make("flow"), GIVEN)).vision == 0


# ---- decoded


@pytest.mark.parametrize("name", NAMES)
def test_a_drawn_image_is_read_on_as_it_would_be_in_a_prompt(
    name: str, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With pixels that survive drawing, what was drawn and what is given leave the same state behind."""
    model = make(name).double()
    prompt = Document((Part("a three", learn=False),))
    settings = DecodingSettings("image", max_tokens=1, max_images=1)
    states, append = [], Session.append_text

    def watched(self: Session, runs: Any) -> None:
        append(self, runs)
        states.append(self.last[0, 0].clone())

    monkeypatch.setattr(Session, "append_text", watched)
    (out,) = decode(model, [prompt], settings, [3])
    drawn = states[2]  # behind the prompt, boi and eoi
    (image,) = out.images
    given = Document((*prompt.parts, Part(image, learn=False)))
    read = read_prompts(model, [given]).last[0, 0]
    if name == "janus":  # tokens stay when they are drawn, features enter when they are given
        assert (read - drawn).abs().max() > 1e-3
    elif name in ("reader", "next-both"):  # features of the picture, ids that the tokenizer gives back
        torch.testing.assert_close(read, drawn, atol=1e-9, rtol=0)
    else:  # patches are not rounded to 8 bits, nor clipped
        assert (read - drawn).abs().max() > 0


def test_a_branch_without_images_has_no_form_of_them(make: Make) -> None:
    model = make("both", drop_images=0.1)
    prompts = [Document((Part("a three", learn=False), Part(picture(i), learn=False))) for i in range(2)]
    image = model.generator.sampling.override(guidance=1.0, image_guidance=0.0, steps=2)
    settings = DecodingSettings("image", max_tokens=0, max_images=1, image=image)
    a, b = (decode(model, [p], settings, [1])[0].images[-1] for p in prompts)
    assert a.tobytes() == b.tobytes()
    c, d = (decode(model, [p], DecodingSettings("image", 0, 1), [1])[0].images[-1] for p in prompts)
    assert c.tobytes() != d.tobytes()


@pytest.mark.parametrize(("name", "image"), [("both", 20), ("reader", 16), ("janus", 16), ("next-both", 20)])
def test_room_for_a_drawn_image(name: str, image: int, make: Make) -> None:
    """16 learned tokens, and 4 features where they enter; those drawn privately are gone when features come."""
    prompt = Document((Part("three", learn=False),))
    tokens = 1 + len(make(name).text.encode("three"))
    settings = DecodingSettings("image", max_tokens=0, max_images=1)
    for context in (tokens + image + 1, tokens + image + 2):
        model = make(name, context_length=context)
        if context == tokens + image + 2:
            assert len(decode(model, [prompt], settings, [0])[0].images) == 1
        else:
            with pytest.raises(ValueError, match=rf"prompt 0: {tokens} tokens and an image of {image} are more than"):
                decode(model, [prompt], settings, [0])


@pytest.mark.parametrize(("name", "image"), [("both", 20), ("reader", 4), ("janus", 4), ("next-both", 20)])
def test_a_given_image_is_counted_in_its_forms(name: str, image: int, make: Make) -> None:
    model = make(name, context_length=48)
    assert read_prompts(model, [Document((Part(picture(0), learn=False),))]).length(0) == 3 + image
    with pytest.raises(ValueError, match=rf"prompt 0: it has {3 + image} tokens and needs room for 46"):
        read_prompts(model, [Document((Part(picture(0), learn=False),))], room=46)


def test_prompts_of_several_sizes_share_a_batch(make: Make) -> None:
    model = make("both").double()
    settings = DecodingSettings(max_tokens=4, max_images=1, temperature=1.0)
    prompts = [Document(d.parts[:1]) for d in (GIVEN, WIDE)]
    together = decode(model, prompts, settings, [1, 2])
    alone = [decode(model, [p], settings, [s])[0] for p, s in zip(prompts, (1, 2))]
    assert [d.text for d in together] == [d.text for d in alone]


# ---- built, refused, kept


def test_features_without_an_encoder_are_refused_and_the_other_way_round() -> None:
    shape = BackboneConfig(32, 1, 2, 1, 48, 300, "sequential")
    settings = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}
    vision = VisionEncoder("vit_tiny_patch16_224", settings)
    for context in ("understanding", "both"):
        with pytest.raises(ValueError, match=rf"sequence\.context: {context} needs model\.vision, got none"):
            UnifiedModel(PatchTokenizer(2), Flow, shape, SequenceRules([(8, 8)], 64, context=context))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"model\.vision: expected sequence\.context understanding or both"):
        UnifiedModel(PatchTokenizer(2), Flow, shape, SequenceRules([(8, 8)], 64), vision)
    rules = SequenceRules([(8, 8), (4, 8)], 64, context="both")
    with pytest.raises(ValueError, match=r"vision\.size: .* 8x8 pixels alone .*, got 4x8"):
        UnifiedModel(PatchTokenizer(2), Flow, shape, rules, vision)


CONFIG = {
    "class_path": "unimodal.model.UnifiedModel",
    "init_args": {
        "tokenizer": {"class_path": "unimodal_tokenizers.PatchTokenizer", "init_args": {"patch": 2}},
        "generator": {"class_path": "unimodal_generators.Flow"},
        "backbone": {"width": 32, "depth": 1, "heads": 2, "kv_heads": 1, "mlp_width": 48, "vocabulary": 300,
                     "positions": "block"},
        "sequence": {"image_sizes": [[8, 8]], "context_length": 96, "context": "both"},
        "vision": {
            "class_path": "unimodal.vision.VisionEncoder",
            "init_args": {
                "name": "vit_tiny_patch16_224", "connector": "linear",
                "settings": {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2},
            },
        },
    },
}  # fmt: skip


def test_an_export_brings_the_encoder_along(make: Make, tmp_path: Path) -> None:
    model = build(CONFIG, "model")
    assert isinstance(model, UnifiedModel)
    model.text = make("flow").text
    model.vision.mean.fill_(0.25)  # as other weights than the architecture's own would have it
    save_export(tmp_path / "export", model.eval(), CONFIG, ExportInfo("model", "raw", "test", "none"))
    again = load_export(tmp_path / "export", "model")
    assert isinstance(again, UnifiedModel)
    with torch.no_grad():
        for name, term in model(packed(model, GIVEN, DRAWN)).items():
            assert torch.equal(term.sum, again(packed(again, GIVEN, DRAWN))[name].sum)
