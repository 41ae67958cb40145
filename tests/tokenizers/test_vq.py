"""Vector quantization: the search, the codebook's life, ids there and back, and bad input."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from forking import together
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from unimodal_tokenizers import Grid, GridTokenizer, ImageTokens
from unimodal_tokenizers.quantizers import MovingAverageQuantizer, VectorQuantizer, codebook_perplexity, codebook_usage
from unimodal_tokenizers.quantizers.base import squared_distance, straight_through
from unimodal_tokenizers.quantizers.search import nearest_code, nearest_code_of_any_length


def some(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def sphere(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return F.normalize(some(seed, *shape, dtype=dtype), dim=-1)


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest tensor any operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.bytes = max(self.bytes, result.nbytes)
        return result


@pytest.fixture
def tokenizer() -> GridTokenizer:
    torch.manual_seed(0)
    return GridTokenizer(VectorQuantizer(32, 4), channels=[8, 16], blocks=1)


# The search


@settings(max_examples=30, deadline=None)
@given(tokens=st.integers(0, 40), entries=st.integers(2, 20), rows=st.integers(0, 7), seed=st.integers(0, 999))
def test_the_chunked_search_finds_what_the_plain_one_finds(tokens: int, entries: int, rows: int, seed: int) -> None:
    z, codes = sphere(seed, tokens, 3, dtype=torch.float64), sphere(seed + 1, entries, 3, dtype=torch.float64)
    plain = torch.cdist(z, codes).argmin(-1)
    assert torch.equal(nearest_code(z, codes, max_bytes=rows * entries * 8), plain)


@pytest.mark.parametrize("search", [nearest_code, nearest_code_of_any_length])
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_of_equal_codes_the_first_is_found(search: Callable[..., Tensor], rows: int) -> None:
    codes = torch.eye(3).repeat(2, 1)  # every code twice
    z = torch.eye(3)[[2, 0, 1, 1, 0, 2, 2, 0]]
    assert search(z, codes, rows * len(codes) * 4).tolist() == [2, 0, 1, 1, 0, 2, 2, 0]


def test_the_search_never_holds_more_than_it_may() -> None:
    z, codes = sphere(0, 3000, 4), sphere(1, 500, 4)
    with LargestTensor() as largest:
        nearest_code(z, codes, max_bytes=200_000)
    assert max(z.nbytes, codes.nbytes) < largest.bytes <= 200_000
    with LargestTensor() as largest:
        nearest_code(sphere(0, 20_000, 4), sphere(1, 4096, 4))  # 328 MB at once
    assert largest.bytes <= 64 * 2**20


# Formulas


def test_straight_through_has_the_value_of_the_code_and_the_gradient_of_the_vector() -> None:
    z, e, g = some(0, 5, 3).requires_grad_(), some(1, 5, 3).requires_grad_(), some(2, 5, 3)
    out = straight_through(z, e)
    torch.testing.assert_close(out, e)
    (out * g).sum().backward()
    assert torch.equal(z.grad, g)
    assert e.grad is None


def test_squared_distance_on_the_sphere_is_two_minus_two_cosines() -> None:
    a, b = sphere(0, 6, 4), sphere(1, 6, 4)
    torch.testing.assert_close(squared_distance(a, b), (2 - 2 * F.cosine_similarity(a, b)).mean())


def test_usage_and_perplexity_of_known_counts() -> None:
    assert codebook_usage(torch.tensor([3, 0, 1, 0])) == 0.5
    assert codebook_perplexity(torch.tensor([5, 5, 5, 5])) == pytest.approx(4)
    assert codebook_perplexity(torch.tensor([7, 0, 0, 0])) == pytest.approx(1)
    assert codebook_perplexity(torch.zeros(4, dtype=torch.int64)) == 0
    both = torch.tensor([[5, 5, 5, 5], [7, 0, 0, 0]])  # two codebooks
    assert codebook_usage(both) == pytest.approx(5 / 8)
    assert codebook_perplexity(both) == pytest.approx(2.5)


# The quantizer


def test_ids_to_vectors_to_ids() -> None:
    quantizer = VectorQuantizer(64, 4)
    ids = torch.randperm(64)
    vectors = quantizer.ids_to_vectors(ids)
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(64))
    assert torch.equal(quantizer.vectors_to_ids(vectors), ids)
    assert torch.equal(quantizer.vectors_to_ids(7.5 * vectors), ids)  # only the direction counts


def test_the_first_batch_initialises_the_codebook() -> None:
    quantizer = VectorQuantizer(16, 4)
    z = some(0, 16, 4)
    result = quantizer(z)
    assert codebook_usage(result.counts) == 1  # every entry is one of the 16 vectors
    assert result.terms["commitment"] < 1e-6
    torch.testing.assert_close(result.quantized, F.normalize(z, dim=-1))


def test_dead_entries_are_revived_by_vectors_of_the_batch_and_only_they() -> None:
    quantizer = VectorQuantizer(4, 3, revive_after=2)
    quantizer(some(0, 8, 3))  # the codebook: four of these vectors
    with torch.no_grad():  # three entries near one pole, one at the other
        quantizer.codebook.weight.copy_(torch.tensor([[1, 0, 0], [1, 0.1, 0], [1, 0, 0.1], [-1.0, 0, 0]]))
    before = quantizer.codes.clone()
    batch = before[:3].detach()
    for _ in range(2):  # entry 3 is not chosen twice
        assert quantizer(batch).counts.tolist() == [1, 1, 1, 0]
    assert quantizer.idle.tolist() == [0, 0, 0, 2]
    torch.testing.assert_close(quantizer.codes, before)  # not yet
    fresh = torch.cat([batch, torch.tensor([[0.0, 1, 0]])])
    quantizer(fresh)
    torch.testing.assert_close(quantizer.codes[:3], before[:3])
    assert ((quantizer.codes[3] - F.normalize(fresh, dim=-1)).norm(dim=-1) < 1e-6).any()


def test_fewer_vectors_than_dead_entries_give_no_double_entries() -> None:
    quantizer = VectorQuantizer(16, 4)
    for seed in range(4):  # five vectors a batch
        quantizer(some(seed, 5, 4))
    distances = torch.cdist(quantizer.codes, quantizer.codes) + torch.eye(16)
    assert distances.min() > 1e-3


def test_revival_continues_after_a_stop_as_if_never_stopped() -> None:
    def run(quantizer: VectorQuantizer, seeds: Iterator[int]) -> None:
        for seed in seeds:
            quantizer(sphere(seed, 10, 3))  # fewer vectors than entries: some entry is dead at every step

    whole, first, second = (VectorQuantizer(32, 3, revive_after=2) for _ in range(3))
    first.load_state_dict(whole.state_dict())
    run(whole, iter(range(6)))
    run(first, iter(range(3)))
    torch.manual_seed(123)  # the global state is no part of it
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    run(second, iter(range(3, 6)))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    assert not torch.equal(whole.codebook.weight, first.codebook.weight)


def test_every_step_draws_other_vectors() -> None:
    quantizer, z, drawn = VectorQuantizer(2, 3), sphere(0, 100, 3), []
    for _ in range(3):
        quantizer.idle.fill_(quantizer.revive_after)
        quantizer(z)
        drawn.append(quantizer.codes.clone())
    assert not torch.allclose(drawn[0], drawn[1])
    assert not torch.allclose(drawn[1], drawn[2])


def quantize_on_one_of_two(rank: int, folder: str) -> None:
    """A process that quantizes batches of its own, of its own sizes, and writes its state down."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(0)
    quantizer = VectorQuantizer(32, 3, revive_after=2)
    for step in range(4):
        quantizer(sphere(2 * step + rank, 10 + 5 * rank, 3))
    torch.save(quantizer.state_dict(), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_keep_one_codebook(tmp_path: Path) -> None:
    together(quantize_on_one_of_two, (2, (str(tmp_path),)))
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    assert (first["idle"] == 0).sum() > 15  # more than either process chose alone


def test_evaluation_and_encoding_change_nothing(tokenizer: GridTokenizer) -> None:
    images = some(0, 2, 3, 8, 8)
    before = copy.deepcopy(tokenizer.state_dict())
    tokenizer.encode(images)  # in training mode
    tokenizer.eval()(images)
    for name, value in tokenizer.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_half_precision_vectors_are_searched_in_single_precision() -> None:
    quantizer = VectorQuantizer(8, 4).eval()
    with torch.autocast("cpu", torch.bfloat16):
        result = quantizer(some(0, 20, 4).bfloat16())
    assert result.quantized.dtype == torch.float32
    assert torch.equal(result.ids, quantizer.vectors_to_ids(some(0, 20, 4).bfloat16().float()))


# The tokenizer


def test_every_parameter_gets_a_gradient(tokenizer: GridTokenizer) -> None:
    result = tokenizer(some(0, 4, 3, 8, 8))  # 64 tokens, 32 entries
    assert result.images.shape == (4, 3, 8, 8)
    (result.images.square().mean() + result.terms["commitment"]).backward()
    missing = [n for n, p in tokenizer.named_parameters() if p.grad is None and n != "quantizer.codebook.weight"]
    assert not missing
    assert tokenizer.quantizer.codebook.weight.grad is None  # the reconstruction goes past the codebook
    tokenizer(some(1, 4, 3, 8, 8)).terms["codebook"].backward()
    assert tokenizer.quantizer.codebook.weight.grad.abs().sum() > 0


def test_training_and_encoding_agree(tokenizer: GridTokenizer) -> None:
    tokenizer.eval()
    images = some(0, 3, 3, 8, 12)
    result, tokens = tokenizer(images), tokenizer.encode(images)
    assert tokens.grids == (Grid(4, 6),) * 3
    assert torch.equal(torch.bincount(tokens.values, minlength=32), result.counts)
    torch.testing.assert_close(tokenizer.decode(tokens), result.images, rtol=1e-4, atol=1e-5)


def test_a_batch_gives_what_its_images_give_alone(tokenizer: GridTokenizer) -> None:
    tokenizer.double().eval()
    images = [some(i, 3, *size, dtype=torch.float64) for i, size in enumerate([(8, 8), (4, 8), (8, 8)])]
    tokens = tokenizer.encode_each(images)
    alone = ImageTokens.cat([tokenizer.encode(image[None]) for image in images])
    assert torch.equal(tokens.values, alone.values)
    for image, one in zip(tokenizer.decode_each(tokens), alone.split(), strict=True):
        torch.testing.assert_close(image, tokenizer.decode(one)[0])


def test_a_codebook_that_learns_without_gradients_moves_after_a_step() -> None:
    tokenizer = GridTokenizer(MovingAverageQuantizer(16, 4), channels=[8, 16], blocks=1).train()
    codes = tokenizer.quantizer.codes
    before = codes.clone()
    tokenizer(some(0, 2, 3, 8, 8))
    assert torch.equal(codes, before)
    tokenizer.after_step()
    assert not torch.equal(codes, before)


@settings(max_examples=10, deadline=None)
@given(ids=st.lists(st.integers(0, 31), min_size=1, max_size=20))
def test_ids_survive_lookup(ids: list[int]) -> None:
    torch.manual_seed(0)
    quantizer = VectorQuantizer(32, 4)
    assert quantizer.vectors_to_ids(quantizer.ids_to_vectors(torch.tensor(ids))).tolist() == ids


def test_the_stride_follows_the_channels() -> None:
    tokenizer = GridTokenizer(VectorQuantizer(8, 4), channels=(8, 8, 8), blocks=1)
    assert tokenizer.layout.stride == 4
    assert tokenizer.layout.codebooks == (8,)
    assert tokenizer.encode(torch.zeros(1, 3, 8, 16)).grids == (Grid(2, 4),)
    assert not any("attentions" in n for n, _ in tokenizer.named_parameters())
    attentive = GridTokenizer(VectorQuantizer(8, 4), channels=(8,), blocks=1, attention=True)
    assert any("attentions" in n for n, _ in attentive.named_parameters())
    assert isinstance(attentive.quantizer.codebook, nn.Embedding)  # so that weight decay leaves it alone


# Bad input


def test_ids_that_are_none_are_refused(tokenizer: GridTokenizer) -> None:
    grid = (Grid(2, 2),)
    for bad, said in [
        (torch.tensor([0, 1, 2, 32]), "from 0 to 31, got 0 to 32"),
        (torch.tensor([0, 1, 2, -1]), "from 0 to 31, got -1 to 2"),
        (torch.tensor([0.0, 1, 2, 3]), "expected integer ids .* got torch.float32"),
        (torch.tensor([True] * 4), "expected integer ids .* got torch.bool"),
    ]:
        with pytest.raises(ValueError, match=f"tokens: .*{said}"):
            tokenizer.lookup(bad)
        with pytest.raises(ValueError, match=f"tokens: .*{said}"):
            tokenizer.decode(ImageTokens(bad, grid))


def test_shapes_that_do_not_fit_are_refused(tokenizer: GridTokenizer) -> None:
    for call in (tokenizer, tokenizer.encode_batch):
        with pytest.raises(ValueError, match="stride 2, got 7x8"):
            call(torch.zeros(1, 3, 7, 8))
    with pytest.raises(ValueError, match=r"tokens: expected ids \(B, 4\), got shape \(1, 3\)"):
        tokenizer.decode_batch(torch.zeros(1, 3, dtype=torch.int64), Grid(2, 2))
    with pytest.raises(ValueError, match=r"tokens: expected ids \(T,\), got shape \(3, 2\)"):
        tokenizer.lookup(torch.zeros(3, 2, dtype=torch.int64))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"channels": []}, "channels: expected multiples of groups = 8, at least one"),
        ({"channels": [8, 12]}, r"channels: expected multiples of groups = 8, at least one, got \[8, 12\]"),
        ({"blocks": 0}, "blocks: expected at least 1, got 0"),
    ],
)
def test_networks_that_cannot_be_are_refused(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        GridTokenizer(VectorQuantizer(8, 4), **{"channels": [8], "blocks": 1, **changed})


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"entries": 1}, "entries: expected between 2 and 16777216, got 1"),
        ({"dim": 1}, "dim: expected at least 2"),
        ({"revive_after": 0}, "revive_after: expected at least 1 batch, got 0"),
    ],
)
def test_codebooks_that_cannot_be_are_refused(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        VectorQuantizer(**{"entries": 8, "dim": 4, **changed})
