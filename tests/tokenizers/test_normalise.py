"""Normalised channels: torch's batch normalisation, over all processes, and never spoilt by one batch."""

import pytest
import torch
from forking import together
from torch import Tensor, nn

from unimodal_tokenizers.normalise import Normalise
from unimodal_tokenizers.quantizers.base import step_generator

D, SHARE = 3, 0.1


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Vectors far from 0, and what their normalised ones are multiplied by for a loss."""
    torch.manual_seed(step)
    return 5 + step + 2 * torch.randn(8, D), torch.randn(8, D)


def train_on_some_of(rank: int, folder: str, ranks: int) -> None:
    """Three batches, each cut into as many parts as there are processes; what came of this one's is kept."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet{ranks}", rank=rank, world_size=ranks
    )
    normalise, kept = Normalise(D, SHARE).train(), {}
    for step in range(3):
        x, weight = (part.chunk(ranks)[rank] for part in batch(step))
        y = normalise(x.requires_grad_())
        (y * weight).sum().backward()
        kept |= {f"y{step}": y.detach(), f"gradient{step}": x.grad}
    drawn = torch.randn(4, generator=step_generator(0, 1))
    torch.save(kept | normalise.state_dict() | {"drawn": drawn}, f"{folder}/{rank}-{ranks}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def one_and_two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    """What one process makes, and what each of two."""
    folder = tmp_path_factory.mktemp("processes")
    together(train_on_some_of, *((ranks, (str(folder), ranks)) for ranks in (1, 2)))
    return [torch.load(folder / f"{name}.pt", weights_only=True) for name in ("0-1", "0-2", "1-2")]


def test_two_processes_are_one_with_twice_the_batch(one_and_two: list[dict[str, Tensor]]) -> None:
    one, *two = one_and_two
    for name, value in one.items():
        if name.startswith(("y", "gradient")):
            torch.testing.assert_close(torch.cat([part[name] for part in two]), value)
        elif name.startswith("running"):
            for part in two:
                torch.testing.assert_close(part[name], value)


def test_noise_is_of_the_process_and_of_the_step(one_and_two: list[dict[str, Tensor]]) -> None:
    one, first, second = (made["drawn"] for made in one_and_two)
    assert torch.equal(one, first)
    assert not torch.equal(first, second)
    assert not torch.equal(first, torch.randn(4, generator=step_generator(0, 2)))


def test_one_process_is_torch_s_own(one_and_two: list[dict[str, Tensor]]) -> None:
    theirs = nn.BatchNorm1d(D, affine=False, momentum=SHARE).train()
    for step in range(3):
        x, weight = batch(step)
        y = theirs(x.requires_grad_())
        (y * weight).sum().backward()
        torch.testing.assert_close(one_and_two[0][f"y{step}"], y.detach())
        torch.testing.assert_close(one_and_two[0][f"gradient{step}"], x.grad)
    torch.testing.assert_close(one_and_two[0]["running_mean"], theirs.running_mean)
    ours = Normalise(D).eval()
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(x), theirs.eval()(x))
    assert ours(x.bfloat16()).dtype == torch.bfloat16


def test_a_batch_that_is_not_finite_is_forgotten() -> None:
    normalise = Normalise(D).train()
    normalise(batch(0)[0])
    before = {name: value.clone() for name, value in normalise.state_dict().items()}
    assert not normalise(batch(1)[0].index_fill(0, torch.tensor([2]), torch.inf)).isfinite().all()
    assert all(torch.equal(value, before[name]) for name, value in normalise.state_dict().items())
