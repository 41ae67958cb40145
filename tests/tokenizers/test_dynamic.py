"""Dynamic length: what is kept is told, what is not is merged, and an id of its own ends an image."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from unimodal_tokenizers import DynamicTokenizer, Grid
from unimodal_tokenizers.quantizers import ResidualQuantizer, VectorQuantizer
from unimodal_tokenizers.transformer import patches_to_images, places

SHAPE: dict[str, Any] = {"image": (4, 8), "patch": 2, "keep": 0.5, "width": 16, "depth": 1, "heads": 2}
END = 16


def made(**options: Any) -> DynamicTokenizer:
    """Chances that differ from patch to patch, and a codebook of outputs."""
    torch.manual_seed(0)
    tokenizer = DynamicTokenizer(VectorQuantizer(END, 4), **{**SHAPE, **options})
    for parameter in tokenizer.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, std=0.3)
    nn.init.normal_(tokenizer.selector[2].weight, std=8.0)
    tokenizer.train()(images(8))
    tokenizer.steps.zero_()
    return tokenizer.eval()


def images(count: int = 6) -> torch.Tensor:
    return torch.rand(count, 3, 4, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1


@torch.no_grad()
def test_ids_are_those_of_the_patches_kept_and_then_the_end() -> None:
    t = made()
    tokens = t.encode(images())
    assert tokens.grids == (Grid(1, 8),) * 6
    x, logits = t._read(images())
    counts = []
    for image, (values, chance) in enumerate(zip(tokens.values.view(6, 8).tolist(), logits, strict=True)):
        kept = [i for i in range(8) if chance[i] > 0] or [int(chance.argmax())]
        counts.append(len(kept))
        merged = t._merge(x[image : image + 1], torch.tensor([[i in kept for i in range(8)]]))[0]
        assert values == [*t.quantizer.vectors_to_ids(merged[kept]).tolist(), *[END] * (8 - len(kept))]
    assert len(set(counts)) > 1  # not all of one length
    for image, one in zip(images(), tokens.split(), strict=True):
        assert torch.equal(t.encode(image[None]).values, one.values)
    codes = t.lookup(tokens.values)
    ends = tokens.values == END
    assert torch.equal(t.quantizer.vectors_to_ids(codes[~ends]), tokens.values[~ends])
    assert not codes[ends].any()
    torch.testing.assert_close(t.decode(tokens), t(images()).images)


@torch.no_grad()
def test_merging_reads_everything_and_is_read_by_what_is_kept_alone() -> None:
    t = made()
    x = t._read(images(1))[0]
    kept = torch.tensor([[True, False, True, False, False, False, False, False]])
    merged, changed = t._merge(x, kept), x.clone()
    changed[0, 5, 0] += 1.0  # left behind
    moved = (t._merge(changed, kept) - merged).abs().amax(-1)[0] > 1e-6
    assert moved.tolist() == [True, False, True, False, False, True, False, False]


@torch.no_grad()
def test_what_follows_the_end_is_not_read() -> None:
    t = made()
    ids = torch.tensor([[3, 5, END, END, END, END, END, END], [3, 5, END, 7, 1, END, 0, 2]])
    first, second = t.decode_batch(ids, Grid(1, 8))
    torch.testing.assert_close(first, second)
    other = t.decode_batch(torch.tensor([[3, 5, 7, END, END, END, END, END]]), Grid(1, 8))[0]
    assert (first - other).abs().max() > 1e-4
    assert t.decode_batch(torch.full((1, 8), END), Grid(1, 8)).isfinite().all()  # an image of nothing


@torch.no_grad()
def test_an_image_is_drawn_from_its_codes_alone() -> None:
    t, ids = made(), torch.tensor([3, 5, END, END, END, END, END, END])
    codes = (t.codes_in(t.lookup(ids)) + t.ranks)[:2]
    near = codes[[0, 0, 0, 0, 1, 1, 1, 1]]  # each half of the patches begins with the code of its share
    row = torch.cat([codes, t.drawn + places(t.cells, t.drawn) + near])
    slow = patches_to_images(t.pixels_out(t.decoder(row[None])[:, 2:]), t.cells, 2)
    torch.testing.assert_close(t.decode_batch(ids[None], Grid(1, 8)), slow)


def test_choices_are_chances_drawn_from_a_counter() -> None:
    t = made().train()
    logits = torch.tensor([[-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 3.0]]).expand(500, -1)
    state = copy.deepcopy(t.state_dict())
    first, second = t._choose(logits), t._choose(logits)
    assert not torch.equal(first, second)
    both = torch.cat([first, second]).double().mean(0)
    torch.testing.assert_close(both, logits[0].double().sigmoid(), atol=0.06, rtol=0)
    t.load_state_dict({**state, "steps": torch.tensor(1)})
    assert torch.equal(t._choose(logits), second)
    t.eval()
    assert torch.equal(t._choose(logits), logits > 0)
    assert torch.equal(t._choose(-logits.abs() - 1).sum(1), torch.ones(500, dtype=torch.long))  # one at least


def test_the_share_that_is_kept_is_learned() -> None:
    for keep in (0.25, 0.75):
        t = made(keep=keep).train()
        optimizer = torch.optim.AdamW(t.parameters(), lr=5e-3)
        for _ in range(60):
            result = t(images())
            loss = (result.images - images()).square().mean()
            loss = loss + sum(t.weights[name] * term for name, term in result.terms.items())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert float(result.terms["sparsity"]) < 0.02
        assert result.counts is not None
        assert result.counts.shape == (END + 1,)
        assert int(result.counts.sum()) == 48
        assert abs(1 - int(result.counts[END]) / 48 - keep) < 0.2
        ids = t.eval().encode(images()).values.view(-1, 8)
        assert abs(float((ids != END).float().mean()) - keep) < 0.2
        assert not [name for name, p in t.named_parameters() if p.grad is None or not p.grad.any()]
        assert set(result.terms) == set(t.weights)


def test_what_is_paid_for_is_the_share_that_encoding_keeps() -> None:
    """Not the mean chance, which is as asked where half of the patches are kept for certain and where none quite is."""
    t = made(keep=0.25).train()
    logits = t._read(images())[1]
    kept, chance = (logits > 0).double().mean(), logits.sigmoid().double().mean()
    assert abs(kept - chance) > 0.01
    term = t(images()).terms["sparsity"]
    torch.testing.assert_close(term.double(), (0.25 - kept).square(), atol=1e-6, rtol=0)
    (gradient,) = torch.autograd.grad(term, t.selector[2].bias)
    slope = (logits.sigmoid() * (1 - logits.sigmoid())).double().mean()  # of the chance
    torch.testing.assert_close(gradient[0].double(), -2 * (0.25 - kept) * slope, atol=1e-6, rtol=0)


def test_the_reconstruction_says_what_to_keep() -> None:
    """A gradient to the choice, through what is kept alone."""
    t = made().train()
    t(images()).images.square().mean().backward()
    assert t.selector[2].weight.grad is not None
    assert t.selector[2].weight.grad.any()


@pytest.mark.parametrize(("options", "message"), [
    ({"image": (4, 7)}, r"image: expected multiples of patch = 2, got \[4, 7\]"),
    ({"keep": 0.0}, "keep: expected a share above 0 and up to 1, got 0"),
])  # fmt: skip
def test_bad_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DynamicTokenizer(VectorQuantizer(END, 4), **{**SHAPE, **options})


def test_bad_quantizers_images_and_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="quantizer: expected one codebook, got 2"):
        DynamicTokenizer(ResidualQuantizer(entries=16, codebooks=2, dim=4), **SHAPE)
    t = made()
    with pytest.raises(ValueError, match="image size: expected 4x8"):
        t.encode(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"tokens: expected up to 8 ids of an image, got shape \(1, 9\)"):
        t.decode_batch(torch.zeros(1, 9, dtype=torch.int64), Grid(1, 9))
    with pytest.raises(ValueError, match=r"tokens: expected ids from 0 to 15, got 0 to 17"):
        t.decode_batch(torch.tensor([[0, 17, 1, 1, 1, 1, 1, 1]]), Grid(1, 8))
