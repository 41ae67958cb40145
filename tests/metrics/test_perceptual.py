"""Perceptual distances: against the formula written out, and what their weights' files may be."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from unimodal.metrics.perceptual import LPIPS, Frozen, TimmDistance, unit_distance

NETWORKS = {"alex": "alexnet", "squeeze": "squeezenet1_1"}


@pytest.fixture(scope="module", params=sorted(NETWORKS))
def network(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, nn.Module, Path]:
    """A network of torchvision with random weights, in a file as torchvision writes it."""
    torch.manual_seed(0)
    made = getattr(torchvision.models, NETWORKS[request.param])(weights=None, num_classes=10)
    path = tmp_path_factory.mktemp("weights") / f"{request.param}.pth"
    torch.save(made.state_dict(), path)
    return request.param, made.eval(), path


def test_lpips_is_its_formula_over_the_network_of_the_file(network: tuple[str, Any, Path]) -> None:
    name, reference, path = network
    distance = LPIPS(path, name)  # type: ignore[arg-type]
    rng = torch.Generator().manual_seed(1)
    x, y = (torch.rand(2, 3, 40, 48, generator=rng) * 2 - 1 for _ in range(2))
    shift, scale = (torch.tensor(v)[:, None, None] for v in ([-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]))
    layers = {"alex": [1, 4, 7, 9, 11], "squeeze": [1, 4, 7, 9, 10, 11, 12]}[name]
    total, f, g = torch.zeros(2), (x - shift) / scale, (y - shift) / scale
    with torch.no_grad():
        for i, layer in enumerate(reference.features[: layers[-1] + 1]):
            f, g = layer(f), layer(g)
            if i in layers:
                unit = [v / v.square().sum(1, keepdim=True).sqrt().clamp(min=1e-10) for v in (f, g)]
                head = distance.frozen.network.lins[layers.index(i)].model[-1].weight  # type: ignore[index,union-attr]
                total += ((unit[0] - unit[1]).square() * head[0]).sum(1).mean((1, 2))
        found = distance(x, y)
    torch.testing.assert_close(found, total, rtol=1e-4, atol=1e-6)
    assert distance.spec()["network"] == name
    assert len(distance.spec()["sha256"]) == 64


def test_lpips_has_a_gradient_and_no_weights_of_its_own(network: tuple[str, Any, Path]) -> None:
    name, _, path = network
    distance = LPIPS(path, name)  # type: ignore[arg-type]
    x = torch.zeros(1, 3, 32, 32)
    y = (x + 0.1).requires_grad_()
    distance(x, y).sum().backward()
    assert y.grad is not None
    assert y.grad.abs().sum() > 0
    assert list(distance.parameters()) == []
    assert distance.state_dict() == {}
    assert not distance.train().frozen.network.training
    assert float(distance(x, x).sum()) == 0


def test_another_network_s_file_is_refused(network: tuple[str, Any, Path]) -> None:
    name, _, path = network
    other = next(n for n in NETWORKS if n != name)
    with pytest.raises(ValueError, match=r"weights: .* does not fit"):
        LPIPS(path, other)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected images of at least"):
        LPIPS(path, name)(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8))  # type: ignore[arg-type]


def test_unit_distance_written_out() -> None:
    f, g = torch.tensor([[[[3.0]], [[4.0]]]]), torch.tensor([[[[0.0]], [[2.0]]]])
    assert float(unit_distance(f, g)) == pytest.approx((0.6 - 0) ** 2 + (0.8 - 1) ** 2)


def test_features_of_timm_are_those_of_the_layers_that_are_named(tmp_path: Path) -> None:
    import timm

    torch.manual_seed(0)
    network = timm.create_model("resnet18", pretrained=False, num_classes=7).eval()
    path = tmp_path / "resnet.safetensors"
    save_file(network.state_dict(), path)
    x, y = torch.rand(2, 1, 3, 32, 32).unbind(0)
    found = TimmDistance("resnet18", path, layers=[-1, 2])(x, y)
    mean, std = (torch.tensor(network.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    with torch.no_grad():
        f, g = (network.forward_intermediates(((v + 1) / 2 - mean) / std, intermediates_only=True) for v in (x, y))
    torch.testing.assert_close(found, unit_distance(f[2], g[2]) + unit_distance(f[4], g[4]))
    with pytest.raises(ValueError, match=r"layers: expected some of -5 to 4 of resnet18, got \[5\]"):
        TimmDistance("resnet18", path, layers=[5])
    with pytest.raises(ValueError, match="network: expected a name in timm"):
        TimmDistance("resnet", path)


def test_what_is_frozen_moves_and_stays_at_rest() -> None:
    inner = nn.Linear(2, 2)
    owner = nn.Sequential(Frozen(inner), nn.Linear(2, 1))
    owner.double().train()
    assert inner.weight.dtype == torch.float64
    assert not inner.weight.requires_grad
    assert not inner.training
    assert set(owner.state_dict()) == {"1.weight", "1.bias"}
