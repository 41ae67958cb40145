"""The back ends by name, and the choice between them."""

import torch
from jaxtyping import Int
from torch import Tensor

from unimodal.attention import flex, sdpa, xformers
from unimodal.attention.packed import Backend, PackedAttention, ReferenceAttention
from unimodal.attention.visibility import SegmentTable

BACKENDS: dict[str, Backend] = {
    "reference": Backend(ReferenceAttention, lambda device: None, lambda device: "einsum with an S x S mask"),
    "sdpa": Backend(sdpa.SdpaAttention, lambda device: None, sdpa.kernel),
    "flex": Backend(flex.FlexAttention, flex.missing, flex.kernel),
    "xformers": Backend(xformers.XformersAttention, xformers.missing, xformers.kernel),
}


def choose_backend(name: str, device: torch.device) -> str:
    """The back end that a name means on a device; `auto` is flex on CUDA where it can run, and sdpa elsewhere.

    Raises:
        ValueError: no such name, or it cannot run there; the message says what to install.
    """
    if name == "auto":
        name = "flex" if device.type == "cuda" and BACKENDS["flex"].missing(device) is None else "sdpa"
    if name not in BACKENDS:
        raise ValueError(f"backbone.attention: expected auto or one of {', '.join(sorted(BACKENDS))}, got {name}")
    problem = BACKENDS[name].missing(device)
    if problem is not None:
        raise ValueError(f"backbone.attention: {name} cannot run here: {problem}")
    return name


def packed_attention(backend: str, table: SegmentTable, inverse: Int[Tensor, " S"], places: int) -> PackedAttention:
    """The attention of one pack under a back end's name, as `choose_backend` gave it."""
    return BACKENDS[backend].build(table, inverse, places)


def describe(name: str, device: torch.device) -> str:
    """One line on what will run, for the log."""
    chosen = choose_backend(name, device)
    return f"attention: {chosen} ({BACKENDS[chosen].kernel(device)}) on {device}"
