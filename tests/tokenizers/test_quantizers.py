"""What every quantizer keeps, of whatever kind. A new one joins by a line of QUANTIZERS, and one of LARGE if it searches."""

import copy
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forking import together
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from unimodal_tokenizers import Grid, GridTokenizer, ImageTokens
from unimodal_tokenizers.quantizers import (
    BSQ,
    FSQ,
    IBQ,
    LFQ,
    EuclideanQuantizer,
    MovingAverageQuantizer,
    Quantizer,
    ResidualQuantizer,
    SimVQ,
    SubCodebooks,
    TextCodebook,
    VectorQuantizer,
    search,
)

Make = Callable[[], Quantizer]


def contributed() -> Quantizer:
    """The example of CONTRIBUTING.md."""
    text = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()
    names: dict[str, Any] = {}
    exec(textwrap.dedent(text.split("```python")[1].split("```")[0]), names)
    return names["Signs"](5)


QUANTIZERS: dict[str, Make] = {
    "bsq": lambda: BSQ(bits=6, temperature=1.0),
    "bsq-books": lambda: BSQ(bits=6, codebooks=3, temperature=1.0),
    "contributed": contributed,
    "euclidean": lambda: EuclideanQuantizer(16, 4, revive_after=2),
    "fsq": lambda: FSQ([5, 4, 3]),
    "ibq": lambda: IBQ(16, 4, temperature=1.0),
    "lfq": lambda: LFQ(bits=5, temperature=1.0),
    "lfq-books": lambda: LFQ(bits=6, codebooks=2, temperature=1.0),
    "moving-average": lambda: MovingAverageQuantizer(16, 4, revive_after=2),
    "residual": lambda: ResidualQuantizer(16, 3, 4, revive_after=2),
    "simvq": lambda: SimVQ(16, 4),
    "text": lambda: TextCodebook(16, 4, text_dim=6),
    "sub-codebooks": lambda: SubCodebooks(VectorQuantizer(16, 3, revive_after=2), 2),
    "vector": lambda: VectorQuantizer(16, 4, revive_after=2),
}
LARGE: dict[str, Make] = {  # 4,096 entries
    "euclidean": lambda: EuclideanQuantizer(4096, 4),
    "fsq": lambda: FSQ([8, 8, 8, 8]),
    "ibq": lambda: IBQ(4096, 4),
    "lfq": lambda: LFQ(bits=12),
    "moving-average": lambda: MovingAverageQuantizer(4096, 4),
    "simvq": lambda: SimVQ(4096, 4),
    "vector": lambda: VectorQuantizer(4096, 4),
}
EVERY = pytest.mark.parametrize("name", QUANTIZERS)


def some(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def made(name: str) -> Quantizer:
    torch.manual_seed(0)
    quantizer = QUANTIZERS[name]()
    if name == "residual":  # so different in size that what is left of a code is never nearer to another
        with torch.no_grad():
            for q, inner in enumerate(quantizer.quantizers):  # type: ignore[arg-type,var-annotated]
                inner.codebook.weight *= 0.01**q
    if isinstance(quantizer, IBQ):  # of one length, so that a code's largest inner product is with itself
        with torch.no_grad():
            quantizer.codebook.weight.div_(quantizer.codebook.weight.norm(dim=-1, keepdim=True))
    return quantizer


def encoder_outputs(quantizer: Quantizer, codes: Tensor) -> Tensor:
    """What an encoder says to be given these codes: themselves, unless the quantizer bends vectors before it rounds them."""
    if not isinstance(quantizer, FSQ):
        return codes
    offset, width = 0.5 * (1 - quantizer.levels % 2), (quantizer.levels - 1) * 1.001 / 2
    return torch.atanh((codes * (quantizer.levels // 2) + offset) / width) - torch.atanh(offset / width)


def drawn_ids(quantizer: Quantizer, count: int) -> Tensor:
    ids = torch.randint(quantizer.codebooks[0], (count, len(quantizer.codebooks)), generator=torch.Generator())
    return ids if len(quantizer.codebooks) > 1 else ids[:, 0]


def trained(quantizer: Quantizer, batches: list[Tensor]) -> None:
    """Steps of gradient descent, one a batch."""
    optimizer = torch.optim.SGD(quantizer.parameters(), 0.1) if list(quantizer.parameters()) else None
    for batch in batches:
        result = quantizer(batch)
        loss = result.quantized.square().mean() + sum(quantizer.weights[n] * t for n, t in result.terms.items())
        if optimizer is not None:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        quantizer.after_step()


def same(a: Quantizer, b: Quantizer, **tolerance: float) -> None:
    for key, value in a.state_dict().items():
        torch.testing.assert_close(value, b.state_dict()[key], msg=lambda m, k=key: f"{k}: {m}", **tolerance)


@EVERY
def test_ids_to_vectors_to_ids(name: str) -> None:
    quantizer = made(name)
    ids = drawn_ids(quantizer, 200)
    vectors = quantizer.ids_to_vectors(ids)
    assert vectors.shape == (200, quantizer.dim)
    assert torch.equal(quantizer.vectors_to_ids(encoder_outputs(quantizer, vectors)), ids)
    assert torch.equal(quantizer.ids_to_vectors(ids.int()), vectors)


@EVERY
def test_training_and_encoding_say_the_same(name: str) -> None:
    quantizer = made(name).eval()
    z = some(1, 50, quantizer.dim)
    result = quantizer(z)
    assert torch.equal(result.ids, quantizer.vectors_to_ids(z))
    torch.testing.assert_close(result.quantized, quantizer.ids_to_vectors(result.ids))
    columns = result.ids.view(50, -1).unbind(1)
    counts = [torch.bincount(column, minlength=quantizer.codebooks[0]) for column in columns]
    assert torch.equal(result.counts, torch.stack(counts) if len(counts) > 1 else counts[0])


@EVERY
def test_terms_have_the_names_of_the_weights_and_everything_gets_a_gradient(name: str) -> None:
    quantizer = made(name)
    z = some(1, 50, quantizer.dim).requires_grad_()
    result = quantizer(z)
    assert list(result.terms) == list(quantizer.weights)
    g = some(2, *result.quantized.shape)
    (through,) = torch.autograd.grad((result.quantized * g).sum(), z, retain_graph=True)
    assert through.abs().sum() > 0
    if result.terms:
        sum(quantizer.weights[n] * t for n, t in result.terms.items()).backward()  # type: ignore[union-attr]
    assert [n for n, p in quantizer.named_parameters() if p.grad is None] == []
    for term in result.terms.values():
        assert term.isfinite()


@EVERY
def test_evaluation_and_encoding_change_nothing(name: str) -> None:
    quantizer = made(name)
    before = copy.deepcopy(quantizer.state_dict())
    quantizer.vectors_to_ids(some(1, 50, quantizer.dim))  # in training mode
    quantizer.eval()(some(1, 50, quantizer.dim))
    quantizer.after_step()
    assert all(torch.equal(value, before[key]) for key, value in quantizer.state_dict().items())


@EVERY
def test_half_precision_is_quantized_in_single_precision(name: str) -> None:
    quantizer = made(name).eval()
    z = some(1, 50, quantizer.dim).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        result, ids = quantizer(z), quantizer.vectors_to_ids(z)
    assert result.quantized.dtype == torch.float32
    assert torch.equal(result.quantized, quantizer(z.float()).quantized)
    assert torch.equal(ids, quantizer.vectors_to_ids(z.float()))


@EVERY
def test_stop_and_resume_equals_never_stopped(name: str) -> None:
    batches = [some(i, 20, made(name).dim) for i in range(6)]
    whole, first, second = made(name), made(name), made(name)
    trained(whole, batches)
    trained(first, batches[:3])
    torch.manual_seed(7)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    trained(second, batches[3:])
    same(whole, second, rtol=0, atol=0)


@EVERY
def test_an_image_s_tokens_there_and_back(name: str) -> None:
    torch.manual_seed(0)
    tokenizer = GridTokenizer(made(name), channels=[8, 16], blocks=1).eval()
    books = tokenizer.layout.codebooks
    images = some(0, 2, 3, 8, 12)
    tokens, result = tokenizer.encode(images), tokenizer(images)
    assert tokens.grids == (Grid(4, 6),) * 2
    assert tokens.values.shape == ((48, len(books)) if len(books) > 1 else (48,))
    torch.testing.assert_close(tokenizer.decode(tokens), result.images, rtol=1e-4, atol=1e-5)
    assert result.counts.shape == ((len(books), books[0]) if len(books) > 1 else (books[0],))
    assert int(result.counts.sum()) == tokens.values.numel()
    sum((t for t in result.terms.values()), result.images.square().mean()).backward()
    learns = [n for n, p in tokenizer.named_parameters() if "quantizer" not in n and p.grad is None]
    assert learns == []


@pytest.mark.parametrize("name", LARGE)
def test_no_matrix_of_vectors_and_entries_exceeds_the_limit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    quantizer = LARGE[name]()
    z = some(0, 2000, quantizer.dim).requires_grad_()  # 33 MB at once
    monkeypatch.setattr(search, "HOST_BYTES", 2**20)
    with LargestTensor() as largest:
        result = quantizer(z)
        (result.quantized.square().mean() + sum(result.terms.values())).backward()
        quantizer.after_step()
        quantizer.vectors_to_ids(z)
    assert largest.bytes <= 2**20


def test_the_limit_is_64_mb() -> None:
    for device, limit in (("meta", 64 * 2**20), ("cpu", 16 * 2**20)):
        assert search.rows_at_once(2**14, torch.empty(1, device=device)) * 2**14 * 4 == limit
    assert search.rows_at_once(2**30, torch.empty(1)) == 1


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest tensor any operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for one in result if isinstance(result, tuple | list) else (result,):
            if isinstance(one, Tensor):
                self.bytes = max(self.bytes, one.untyped_storage().nbytes())
        return result


# Several processes


def batch(step: int, dim: int) -> Tensor:
    return some(step, 40, dim, dtype=torch.float64)


def train_on_some_of(rank: int, folder: str, ranks: int) -> None:
    """A process that trains each quantizer on its share of every batch, and writes them down."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet{ranks}", rank=rank, world_size=ranks
    )
    for name in QUANTIZERS:
        quantizer = made(name).double()
        for step in range(4):
            part = batch(step, quantizer.dim).chunk(ranks)[rank].requires_grad_()
            result = quantizer(part)
            loss = result.quantized.pow(3).mean() + sum(quantizer.weights[n] * t for n, t in result.terms.items())
            loss.backward()
            with torch.no_grad():
                for parameter in quantizer.parameters():
                    torch.distributed.all_reduce(parameter.grad)
                    parameter -= 0.1 * parameter.grad / ranks
                    parameter.grad = None
            quantizer.after_step()
        state = {"vectors": part.grad, **quantizer.state_dict()}
        torch.save(state, f"{folder}/{name}-{rank}-{ranks}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes and one make of the same batches."""
    folder = tmp_path_factory.mktemp("processes")
    together(train_on_some_of, *((ranks, (str(folder), ranks)) for ranks in (1, 2)))
    return folder


@EVERY
def test_two_processes_are_one_with_twice_the_batch(name: str, processes: Path) -> None:
    one, a, b = (torch.load(processes / f"{name}-{end}.pt", weights_only=True) for end in ("0-1", "0-2", "1-2"))
    shared = torch.cat([a.pop("vectors"), b.pop("vectors")]) / 2  # averaged, as gradients of parameters are
    torch.testing.assert_close(shared, one.pop("vectors"))
    for key, value in one.items():
        torch.testing.assert_close(a[key], value, msg=lambda m, k=key: f"{k}: {m}")
        assert torch.equal(a[key], b[key]), key


def average_in_parts(rank: int, folder: str, ranks: int, parts: int) -> None:
    """A codebook that moves once for so many passes of so many processes."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet{ranks}-{parts}", rank=rank, world_size=ranks
    )
    quantizer = MovingAverageQuantizer(16, 4, revive_after=2).double().train()
    for step in range(6):
        for part in batch(step, 4).chunk(ranks)[rank].chunk(parts):
            quantizer(part)
        quantizer.after_step()
    torch.save(quantizer.state_dict(), f"{folder}/{rank}-{ranks}-{parts}.pt")
    torch.distributed.destroy_process_group()


def test_accumulated_passes_of_two_processes_move_a_codebook_as_one_batch(tmp_path: Path) -> None:
    together(average_in_parts, *((ranks, (str(tmp_path), ranks, parts)) for ranks, parts in ((1, 1), (2, 2), (2, 5))))
    one = torch.load(tmp_path / "0-1-1.pt", weights_only=True)
    for name in ("0-2-2", "1-2-2", "0-2-5", "1-2-5"):
        for key, value in torch.load(tmp_path / f"{name}.pt", weights_only=True).items():
            torch.testing.assert_close(value, one[key], msg=lambda m, at=f"{name} {key}": f"{at}: {m}")


# Bad input


@EVERY
def test_ids_that_are_none_are_refused(name: str) -> None:
    quantizer = made(name)
    tokenizer = GridTokenizer(quantizer, channels=[8], blocks=1)
    entries, books = quantizer.codebooks[0], len(quantizer.codebooks)
    shape = (4, books) if books > 1 else (4,)
    for bad, said in (
        (torch.full(shape, entries), f"tokens: expected ids from 0 to {entries - 1}, got {entries} to {entries}"),
        (torch.full(shape, -1), f"tokens: expected ids from 0 to {entries - 1}, got -1 to -1"),
        (torch.zeros(shape), f"tokens: expected integer ids of a codebook of {entries}, got torch.float32"),
    ):
        for call in (
            quantizer.ids_to_vectors,
            tokenizer.lookup,
            lambda x: tokenizer.decode(ImageTokens(x, (Grid(2, 2),))),
        ):
            with pytest.raises(ValueError, match=re.escape(said)):
                call(bad)


@EVERY
def test_a_wrong_number_of_codebooks_is_refused(name: str) -> None:
    quantizer = made(name)
    tokenizer = GridTokenizer(quantizer, channels=[8], blocks=1)
    books = len(quantizer.codebooks)
    expected = f"(T, {books})" if books > 1 else "(T,)"
    wrong = torch.zeros(4, books + 1, dtype=torch.int64)
    for call in (quantizer.ids_to_vectors, tokenizer.lookup):
        with pytest.raises(
            ValueError, match=re.escape(f"tokens: expected ids {expected}, got shape {tuple(wrong.shape)}")
        ):
            call(wrong)
    with pytest.raises(ValueError, match=re.escape("got shape (1, 4")):
        tokenizer.decode(ImageTokens(wrong, (Grid(2, 2),)))


@EVERY
def test_an_image_that_the_stride_does_not_divide_is_refused(name: str) -> None:
    tokenizer = GridTokenizer(made(name), channels=[8, 8], blocks=1)
    for call in (tokenizer, tokenizer.encode):
        with pytest.raises(ValueError, match="image size: expected multiples of the stride 2, got 7x8 pixels"):
            call(torch.zeros(1, 3, 7, 8))


@pytest.mark.parametrize("levels", [[8, 5, 5], [1023, 3]])  # bf16 has 256 whole numbers
def test_a_tokenizer_cast_to_half_precision_reads_and_draws(levels: list[int]) -> None:
    torch.manual_seed(0)
    tokenizer = GridTokenizer(FSQ(levels), [8, 8], blocks=1).eval()
    grid, ids = tokenizer.layout.grid(8, 8), torch.randint(tokenizer.layout.codebooks[0], (2, 16))
    vectors, images = tokenizer.lookup(ids[0]), tokenizer.decode_batch(ids, grid)
    half = copy.deepcopy(tokenizer).bfloat16()
    torch.testing.assert_close(half.lookup(ids[0]).float(), vectors, atol=4e-3, rtol=0)
    assert torch.equal(half.quantizer.find(vectors), tokenizer.quantizer.find(vectors))
    drawn = half.decode_batch(ids, grid)
    assert drawn.dtype == torch.bfloat16
    torch.testing.assert_close(drawn.float(), images, atol=0.1, rtol=0)
    assert half.encode_batch(drawn).shape == ids.shape
