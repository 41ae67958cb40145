"""Image tokenizers: the search for the nearest code, and what quantizing adds to encoding.

Letters: T vectors, K codes, D channels.
"""

from functools import partial

import torch
from torch import Tensor

from experiments.benchmarks.cases import Case, Settings
from experiments.benchmarks.results import Result, speedup
from experiments.benchmarks.timing import interleave
from unimodal_tokenizers import GridTokenizer
from unimodal_tokenizers.quantizers import VectorQuantizer
from unimodal_tokenizers.quantizers.search import nearest_code, nearest_code_of_any_length

LLAMAGEN = {"channels": [128, 128, 256, 256, 512], "blocks": 2, "groups": 32, "attention": True}  # VQ-16
ENTRIES, DIM = 16384, 8  # its codebook


def plain_search(z: Tensor, codes: Tensor) -> Tensor:
    """argmax_k <z, e_k> of one matrix of all."""
    return (z @ codes.T).argmax(-1)


def plain_search_of_any_length(z: Tensor, codes: Tensor) -> Tensor:
    """argmin_k |z - e_k|^2 of one matrix of all."""
    return torch.cdist(z, codes).argmin(-1)


@torch.no_grad()
def code_search(settings: Settings, *, any_length: bool) -> Result:
    """The search in parts against one matrix of all distances."""
    full = 65536 if settings.device == "cuda" else 4096
    vectors, entries = settings.size((full, ENTRIES), (64, 128))
    rng = torch.Generator().manual_seed(0)
    z, codes = (torch.randn(n, DIM, generator=rng).to(settings.device) for n in (vectors, entries))
    if any_length:
        ours, peer = partial(nearest_code_of_any_length, z, codes), partial(plain_search_of_any_length, z, codes)
    else:
        ours, peer = partial(nearest_code, z, codes), partial(plain_search, z, codes)
    different = float((ours() != peer()).double().mean())
    times = interleave({"ours": ours, "plain": peer}, settings.repeats, warmup=settings.warmup, wait=settings.wait)
    return speedup(
        times["ours"], times["plain"], peer="one matrix of all distances", correct=different,
        tolerance=1e-3 if any_length else 0.0,  # ties to rounding: the two compute a distance in different ways
        extra={"vectors": vectors, "entries": entries, "dim": DIM},
    )  # fmt: skip


@torch.no_grad()
def vq_encode_share(settings: Settings) -> Result:
    """Images a second of encoding to ids, as a share of those of the encoder alone."""
    full = (8, 256) if settings.device == "cuda" else (1, 128)
    batch, side = settings.size(full, (1, 16))
    torch.manual_seed(0)
    quantizer = VectorQuantizer(settings.size(ENTRIES, 128), DIM)
    shape = settings.size(LLAMAGEN, {"channels": [8, 8], "blocks": 1})
    tokenizer = GridTokenizer(quantizer, **shape).to(settings.device).eval()  # type: ignore[arg-type]
    images = torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0)).to(settings.device)
    ways = {"ours": partial(tokenizer.encode, images), "encoder": partial(tokenizer.encoder, images)}
    times = interleave(ways, settings.repeats, warmup=settings.warmup, wait=settings.wait)
    a, b = times["ours"], times["encoder"]
    return Result(
        name="", value=b.best / a.best, unit="", peer="the encoder alone", value_median=b.median / a.median,
        extra={"images": batch, "side": side, "images_per_second": batch / a.best},
    ).timed(a, b)  # fmt: skip


CASES: dict[str, Case] = {
    "code_search": partial(code_search, any_length=False),
    "code_search_any_length": partial(code_search, any_length=True),
    "vq_encode_share": vq_encode_share,
}
