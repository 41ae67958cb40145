"""Weights that lie in parts on many ranks (FSDP2): filled, put together, taken apart. Nothing here acts on other weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


@torch.no_grad()
def write(parameter: Tensor, values: Tensor, first: int = 0) -> None:
    """Copy values into the rows of a parameter from `first` on; of a sharded one, into those that lie here."""
    if not isinstance(parameter, DTensor):
        (parameter[first : first + len(values)] if values.ndim else parameter).copy_(values)
        return
    sizes, offsets = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    start, end = max(first, offsets[0]), min(first + len(values), offsets[0] + sizes[0])
    if start < end:
        parameter.to_local()[start - offsets[0] : end - offsets[0]].copy_(values[start - first : end - first])


def reshard(module: nn.Module) -> None:
    """Have parameters be this rank's parts, as they are between steps: a forward without backward leaves some together."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def is_sharded(module: nn.Module) -> bool:
    """Whether its weights lie in parts on many ranks."""
    return any(isinstance(part, FSDPModule) for part in module.modules())


@contextmanager
def together(model: nn.Module) -> Iterator[None]:
    """What is not in a layer is whole in here; layers gather as they run. All ranks must do the same inside."""
    if not isinstance(model, FSDPModule):
        yield
        return
    model.unshard()
    try:
        yield
    finally:
        model.reshard()
