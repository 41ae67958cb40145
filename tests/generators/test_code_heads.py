"""Codes of a token, squares of tokens and row ends, written out position by position."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from generator_cases import GrayDigits

from unimodal_generators import Autoregressive, Depth
from unimodal_generators.base import Block, Grid, ImageRows, ImageTokens
from unimodal_generators.shuffle import windows
from unimodal_tokenizers.base import TokenLayout

ONE = TokenLayout("discrete", dim=1, stride=2, codebooks=(16,))
TWO = TokenLayout("discrete", dim=1, stride=2, codebooks=(5, 7))
THREE = TokenLayout("discrete", dim=1, stride=2, codebooks=(5, 7, 3))
GRIDS = (Grid(4, 4), Grid(2, 4))


def built(layout: TokenLayout = TWO, **settings: object) -> Autoregressive:
    torch.manual_seed(0)
    made = Autoregressive(layout, 32, **settings).double()  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return made


def tokens(layout: TokenLayout = TWO) -> ImageTokens:
    rng = torch.Generator().manual_seed(1)
    ids = torch.stack([torch.randint(k, (24,), generator=rng) for k in layout.codebooks], dim=1)
    return ImageTokens(ids[:, 0] if len(layout.codebooks) == 1 else ids, GRIDS)


def blocks(made: Autoregressive) -> list[Block]:
    return [made.plan(grid, np.random.default_rng(0))[0] for grid in GRIDS]


# ---- what is learned, written out position by position


def slow_states(made: Autoregressive, hidden: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
    """(number of a token in images end to end, the state that predicts it)."""
    states, s, at, first = [], made.side, 0, 0
    for grid in GRIDS:
        for row in range(grid.h // s):
            for column in range(grid.w // s):
                parts = hidden[at][None] if made.shuffle is None else made.shuffle.part(hidden[at])
                for j, state in enumerate(parts):
                    token = (row * s + j // s) * grid.w + column * s + j % s
                    states.append((first + token, state))
                at += 1
            at += made.row_end is not None
        first += grid.length
    assert at == len(hidden)
    return states


def slow_scores(made: Autoregressive, state: torch.Tensor, codes: list[int]) -> torch.Tensor:
    """Of the codebook that follows `codes`."""
    q = len(codes)
    if isinstance(made.head, torch.nn.Sequential):
        first = sum(made.codebooks[:q])
        return made.head(state)[first : first + made.codebooks[q]]
    head = made.head
    x = [head.project(state) + head.place[0]]
    for d in range(1, q + 1):
        x.append(head.place[d] + sum(head.embeddings[e].weight[codes[e]] for e in range(d)))
    v = torch.stack(x)
    for layer in head.layers:
        n = layer.attention_norm(v)
        q_, k_, v_ = (layer.qkv(n) @ torch.eye(3 * v.shape[1]).double()).chunk(3, dim=-1)
        size = v.shape[1] // layer.heads
        out = []
        for h in range(layer.heads):
            part = slice(h * size, (h + 1) * size)
            scores = (q_[:, part] @ k_[:, part].T) / size**0.5
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
            out.append(scores.softmax(-1) @ v_[:, part])
        v = v + layer.o(torch.cat(out, dim=1))
        v = v + layer.mlp(layer.mlp_norm(v))
    return head.heads[q](head.norm(v)[-1])


SETTINGS: dict[str, dict] = {
    "parallel": {}, "depth": {"depth": Depth(2, 12, 3)}, "rows": {"end_of_row": True}, "squares": {"shuffle": 2},
    "all": {"shuffle": 2, "end_of_row": True, "depth": Depth(1, 8, 2)},
}  # fmt: skip


@pytest.mark.parametrize("layout", [ONE, TWO, THREE], ids=["one", "two", "three"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_the_loss_and_its_gradients_are_those_of_a_loop(settings: dict, layout: TokenLayout) -> None:
    made, data = built(layout, **settings), tokens(layout)
    corrupted = made.corrupt(data, blocks(made))
    length = sum(block.length for block in blocks(made))
    hidden = torch.randn(length, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    term = made.loss(hidden, made.embed(corrupted), corrupted)["image"]
    term.sum.backward()
    found = [hidden.grad, *(p.grad for p in made.parameters())]
    made.zero_grad()
    hidden.grad = None
    ids = data.values.view(24, -1).tolist()
    total = torch.zeros(())
    for token, state in slow_states(made, hidden):
        for q, code in enumerate(ids[token]):
            loss = -slow_scores(made, state, ids[token][:q]).log_softmax(-1)[code]
            total = total + loss / len(ids[token])
    total.backward()
    torch.testing.assert_close(term.sum, total, atol=1e-10, rtol=1e-10)
    assert term.count == 24 == sum(block.n_targets for block in blocks(made))
    for one, other in zip(found, [hidden.grad, *(p.grad for p in made.parameters())], strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-7)


def test_what_is_read_written_out() -> None:
    """Rows of the codebooks added up, squares merged, a row's end behind each row."""
    made, data = built(shuffle=2, end_of_row=True), tokens()
    read = made.embed(made.context(data)).values
    table, shuffle = made.embedding.weight, made.shuffle
    assert isinstance(made.embedding, torch.nn.Embedding)
    assert shuffle is not None
    x = table[data.values[:, 0]] + table[5 + data.values[:, 1]]
    expected = []
    for first, grid in ((0, GRIDS[0]), (16, GRIDS[1])):
        image = x[first : first + grid.length].view(grid.h, grid.w, 32)
        for row in range(0, grid.h, 2):
            for column in range(0, grid.w, 2):
                square = image[row : row + 2, column : column + 2].reshape(4, 32)
                expected.append(shuffle.before(shuffle.compress(square).flatten()))
            expected.append(made.row_end)
    torch.testing.assert_close(read, torch.stack(expected))
    assert [b.grid for b in blocks(made)] == [Grid(2, 3), Grid(1, 3)]
    assert [b.n_targets for b in blocks(made)] == [16, 8]


def test_windows_by_hand() -> None:
    assert windows(Grid(2, 4), 2).tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
    assert windows(Grid(4, 2), 2).tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert torch.equal(windows(Grid(3, 5), 1), torch.arange(15))


# ---- what reduces to what


def test_one_codebook_without_options_is_a_table_and_a_small_network() -> None:
    made = built(ONE, shuffle=1)
    shapes = {name: list(value.shape) for name, value in made.state_dict().items()}
    assert shapes == {
        "embedding.weight": [16, 32], "head.0.weight": [32, 32], "head.0.bias": [32], "head.2.weight": [16, 32],
        "head.2.bias": [16],
    }  # fmt: skip
    data = tokens(ONE)
    assert torch.equal(made.embed(made.context(data)).values, made.embedding.weight[data.values])
    hidden = torch.randn(24, 32, dtype=torch.float64)
    corrupted = made.corrupt(data, blocks(made))
    term = made.loss(hidden, made.embed(corrupted), corrupted)["image"]
    torch.testing.assert_close(term.sum, F.cross_entropy(made.head(hidden), data.values, reduction="sum"))


def test_a_depth_transformer_of_one_codebook_is_a_head() -> None:
    made = built(ONE, depth=Depth(2, 12, 3))
    head, hidden = made.head, torch.randn(3, 4, 32, dtype=torch.float64)
    assert len(head.embeddings) == 0
    none = torch.zeros(3, 4, 0, dtype=torch.long)
    scores = head.logits(hidden, none)
    x = head.project(hidden) + head.place[0]
    for layer in head.layers:  # alone, a token attends to itself
        x = x + layer.o(layer.qkv(layer.attention_norm(x))[..., -12:])
        x = x + layer.mlp(layer.mlp_norm(x))
    torch.testing.assert_close(scores, head.heads[0](head.norm(x)))
    ids = torch.randint(16, (12, 1))
    expected = F.cross_entropy(scores.flatten(0, 1), ids[:, 0], reduction="sum")
    torch.testing.assert_close(head.loss(hidden.flatten(0, 1), ids), expected)


def test_codes_are_told_apart_by_depth_alone() -> None:
    """Heads at once know nothing of each other; a depth transformer's second code knows the first, and not the other way."""
    hidden, a, b = torch.randn(1, 32, dtype=torch.float64), torch.tensor([[0]]), torch.tensor([[3]])
    parallel, deep = built().head, built(depth=Depth(1, 8, 2)).head
    assert torch.equal(parallel.logits(hidden, a), parallel.logits(hidden, b))
    assert not torch.equal(deep.logits(hidden, a), deep.logits(hidden, b))
    one, two = (deep.states(hidden, torch.tensor([[c]]))[0] for c in (0, 3))
    assert torch.equal(one[0], two[0])
    assert deep.logits(hidden, a).shape == (1, 7)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_no_images_are_an_exact_zero(settings: dict) -> None:
    made, none = built(**settings), ImageTokens(torch.empty(0, 2, dtype=torch.long), ())
    read = made.corrupt(none, [])
    embeddings = made.embed(read)
    assert embeddings.values.shape == (0, 32)
    term = made.loss(torch.empty(0, 32, dtype=torch.float64), embeddings, read)["image"]
    assert (term.sum.detach().item(), term.count) == (0.0, 0)
    (term.sum + embeddings.values.sum()).backward()  # a rank without images fails at nothing


def test_noise_falls_on_codes_one_by_one() -> None:
    made, grid = built(token_noise=0.25), Grid(16, 16)
    ids = torch.zeros(256, 2, dtype=torch.long)
    (block,) = made.plan(grid, np.random.default_rng(0))
    read = made.corrupt(ImageTokens(ids, (grid,)), [block])
    assert torch.equal(read.targets, ids)
    changed = (read.inputs != ids).double()
    assert (changed.mean(0) > 0.14).all()
    assert (changed.mean(0) < 0.28).all()
    assert changed.prod(1).mean() < 0.1  # both at once as seldom as chance has it
    assert read.inputs[:, 0].max() <= 4 < read.inputs[:, 1].max() <= 6


def test_two_codebooks_share_too() -> None:
    rows = ImageRows(torch.randn(12, 32), [torch.randn(9, 32), torch.randn(12, 32)], 1.0)
    made = Autoregressive(TWO, 32, vocabulary="shared")
    made.bind(GrayDigits(), lambda: rows)
    data = tokens()
    read = made.corrupt(data, blocks(made))
    assert made.image_ids == 12
    expected = rows.embedding[data.values[:, 0]] + rows.embedding[5 + data.values[:, 1]]
    torch.testing.assert_close(made.embed(read).values, expected)
    hidden = torch.randn(24, 32)
    scores = hidden @ torch.cat(rows.head).T
    total = sum(F.cross_entropy(scores, data.values[:, q] + (9, 14)[q], reduction="sum") for q in range(2)) / 2
    torch.testing.assert_close(made.loss(hidden, made.embed(read), read)["image"].sum, total)
    torch.testing.assert_close(made.head.logits(hidden, torch.zeros(24, 1, dtype=torch.long)), scores[:, 14:])


# ---- refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shuffle": 0}, r"generator\.shuffle: expected at least 1 \(no shuffle\), got 0"),
        ({"shuffle": 3}, r"generator\.shuffle: 3 needs a backbone\.width that 9 divides, got 32"),
        ({"vocabulary": "shared", "inputs": "codes"}, r"generator\.vocabulary: shared rows need inputs: ids"),
        ({"vocabulary": "shared", "depth": Depth(1, 8, 1)}, r"generator\.vocabulary: shared rows need .* no depth"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Autoregressive(ONE, 32, **settings)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((0, 8, 2), r"generator\.depth\.layers: expected at least 1, got 0"),
        ((1, 8, 0), r"generator\.depth\.heads: expected at least 1, got 0"),
        ((1, 8, 3), r"generator\.depth\.width: expected a multiple of heads 3, got 8"),
    ],
)
def test_shapes_that_mean_nothing_are_refused(shape: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Depth(*shape)
