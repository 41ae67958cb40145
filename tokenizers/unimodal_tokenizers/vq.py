"""Vector quantization: an image as a grid of ids of one codebook.

Letters: B images, H height, W width (pixels); h, w the token grid; N tokens of one image, T of all images end to end, P
encoder outputs of all of them (B h w); K entries of a codebook, Q codebooks, D channels of a code. z an encoder output and e
a code; sg[.] stops the gradient.

`VQTokenizer` has z and e on the unit sphere of R^D: its codebook is the one of ViT-VQGAN (arXiv 2110.04627, section 3.2)
and LlamaGen (arXiv 2406.06525, section 3.1): few channels, everything l2-normalised, learned by gradient. The moving average
of VQ-VAE did no better on the digits, and gradients accumulate and average over processes by themselves.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Float, Int64, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from unimodal_tokenizers.base import Grid, ImageTokenizer, TokenLayout

SEARCH_BYTES = 64 * 2**20  # the largest tokens x entries matrix the search may hold


@dataclass(frozen=True)
class Quantized:
    """What a quantizer says of P encoder outputs."""

    quantized: Float[Tensor, "P D"]  # what the chosen codes say; gradients pass straight through to the encoder
    ids: Int64[Tensor, "T *Q"]
    codebook_loss: Float[Tensor, ""]  # moves the codes to the encoder outputs
    commitment: Float[Tensor, ""]  # moves the encoder outputs to the codes
    counts: Int64[Tensor, "*Q K"]  # tokens of this batch that chose each entry


@dataclass(frozen=True)
class Reconstruction:
    """A training pass of a tokenizer: images through its tokens and back, and what a codebook says of it."""

    images: Float[Tensor, "B 3 H W"]
    quantized: Quantized | None = None


def nearest_code(
    z: Float[Tensor, "T D"], codes: Float[Tensor, "K D"], max_bytes: int = SEARCH_BYTES
) -> Int64[Tensor, " T"]:
    """ids = argmin_k |z - e_k|^2 = argmax_k <z, e_k>, for vectors of equal length (ViT-VQGAN, section 3.2).

    Searches as many tokens at a time as keep the similarity matrix within `max_bytes` (one token at the least).
    """
    rows = max(1, max_bytes // (len(codes) * z.element_size()))
    return torch.cat([(part @ codes.T).argmax(-1) for part in z.split(rows)])  # (T,)


def nearest_code_of_any_length(
    z: Float[Tensor, "T D"], codes: Float[Tensor, "K D"], max_bytes: int = SEARCH_BYTES
) -> Int64[Tensor, " T"]:
    """ids = argmin_k |z - e_k|^2 = argmax_k <(z, 1), (e_k, -|e_k|^2 / 2)>: the same search, one channel more."""
    offset = -codes.square().sum(-1, keepdim=True) / 2  # (K, 1)
    return nearest_code(torch.cat([z, torch.ones_like(z[:, :1])], 1), torch.cat([codes, offset], 1), max_bytes)


def squared_distance(a: Float[Tensor, "T D"], b: Float[Tensor, "T D"]) -> Float[Tensor, ""]:
    """|a - b|^2, summed over channels and averaged over the rest; on the unit sphere it is 2 - 2 cos, from 0 to 4."""
    return (a - b).square().sum(-1).mean()


def straight_through(z: Float[Tensor, "T D"], e: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
    """z + sg[e - z]: the value of e, the gradient of z (VQ-VAE, arXiv 1711.00937, section 3.2)."""
    return z + (e - z).detach()


def codebook_usage(counts: Int64[Tensor, "*Q K"]) -> Float[Tensor, ""]:
    """Share of the entries that at least one token chose, from 0 to 1."""
    return (counts > 0).float().mean()


def codebook_perplexity(counts: Int64[Tensor, "*Q K"]) -> Float[Tensor, ""]:
    """exp(-sum_k p_k log p_k): entries that carry as much when used equally often: 1 to K, 0 without tokens.

    The mean over several codebooks.
    """
    total = counts.sum(-1, keepdim=True)
    p = counts.float() / total.clamp(min=1)
    return torch.where(total[..., 0] > 0, torch.exp(-torch.xlogy(p, p).sum(-1)), 0.0).mean()


class VectorQuantizer(nn.Module):
    """Encoder outputs to the nearest of K codes on the unit sphere of R^D.

    An entry that no token chose for `revive_after` training batches is dead and is replaced by an encoder output of the
    next batch; all entries start dead, so the first batch initialises the codebook. The choice of outputs depends on a
    counter among the buffers only: training that was stopped and resumed makes the same choices. Over several processes
    entries are dead when no process chose them, and replacements come from rank 0.
    """

    steps: Int64[Tensor, ""]
    idle: Int64[Tensor, " K"]

    def __init__(self, entries: int, dim: int, revive_after: int = 50, seed: int = 0) -> None:
        """Args:

        entries: size K of the codebook.
        dim: channels D of a code; few (4 to 16) keep the whole codebook in use.
        revive_after: training batches without a token after which an entry is replaced.
        seed: of the choice of outputs; quantizers of the same tokens need different ones.
        """
        super().__init__()
        most = SEARCH_BYTES // torch.float32.itemsize  # else the similarities of one token are too many
        if not 2 <= entries <= most:
            raise ValueError(f"entries: expected between 2 and {most}, got {entries}")
        if dim < 2:
            raise ValueError(
                f"dim: expected at least 2 channels (the unit sphere of one channel is two points), got {dim}"
            )
        if revive_after < 1:
            raise ValueError(f"revive_after: expected at least 1 batch, got {revive_after}")
        self.entries, self.dim, self.revive_after, self.seed = entries, dim, revive_after, seed
        self.codebook = nn.Embedding(entries, dim)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))  # training batches seen
        self.register_buffer("idle", torch.full((entries,), revive_after))  # training batches since last chosen

    @property
    def codes(self) -> Float[Tensor, "K D"]:
        """The codebook where encoder outputs are compared with it, in single precision at least."""
        return self.project(self.codebook.weight)

    def project(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        """x / |x|, in single precision at least: half precision confuses neighbouring codes."""
        return F.normalize(_precise(x), dim=-1)

    def nearest(self, z: Float[Tensor, "T D"], codes: Float[Tensor, "K D"]) -> Int64[Tensor, " T"]:
        """The search."""
        return nearest_code(z, codes)

    def vectors_to_ids(self, vectors: Float[Tensor, "T D"]) -> Int64[Tensor, " T"]:
        """Encoder outputs of any length to the ids of their codes; changes nothing in the quantizer."""
        with torch.no_grad(), torch.autocast(vectors.device.type, enabled=False):
            z = self.project(vectors)
            return self.nearest(z, self.codes.to(z.dtype))

    def ids_to_vectors(self, ids: Shaped[Tensor, "*T"]) -> Float[Tensor, "*T D"]:
        """Ids to their codes; `vectors_to_ids` gives the ids back.

        Raises:
            ValueError: ids that are no integers, or lie outside the codebook.
        """
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise ValueError(f"tokens: expected integer ids of a codebook of {self.entries}, got {ids.dtype}")
        # Elsewhere than on the host, looking would wait for the device at every token; its kernel checks by itself.
        if ids.device.type == "cpu" and ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= self.entries):
            raise ValueError(
                f"tokens: expected ids from 0 to {self.entries - 1}, got {int(ids.min())} to {int(ids.max())}"
            )
        return F.embedding(ids.long(), self.codes)  # (..., D)

    def forward(self, vectors: Float[Tensor, "T D"]) -> Quantized:
        """Quantize encoder outputs of any length for training: codes, ids and the terms of the loss.

        In training mode this also counts who was chosen and revives dead entries; in evaluation mode nothing changes.
        The loss of VQ-VAE (arXiv 1711.00937, eq. 3) is: reconstruction + codebook_loss + beta * commitment.
        """
        with torch.autocast(vectors.device.type, enabled=False):
            z = self.project(vectors)
            ids, counts = self.assign(z.detach())
            e = F.embedding(ids, self.codes.to(z.dtype))  # (T, D)
            return Quantized(
                quantized=straight_through(z, e),
                ids=ids,
                codebook_loss=squared_distance(z.detach(), e),
                commitment=squared_distance(z, e.detach()),
                counts=counts,
            )

    @torch.no_grad()
    def assign(self, z: Float[Tensor, "T D"]) -> tuple[Int64[Tensor, " T"], Int64[Tensor, " K"]]:
        """Ids of projected outputs and how many chose each entry; in training mode this counts as a batch."""
        if self.training:
            self._revive(z)
        ids = self.nearest(z, self.codes.to(z.dtype))
        counts = torch.bincount(ids, minlength=self.entries)
        if self.training:
            self._count(counts)
        return ids, counts

    @torch.no_grad()
    def _revive(self, z: Float[Tensor, "T D"]) -> None:
        """Put encoder outputs in the place of dead entries: each output once, so as many as there are at the most."""
        dead = (self.idle >= self.revive_after).nonzero().squeeze(-1)  # (K_dead,)
        if not len(dead):
            return
        rng = torch.Generator().manual_seed(1_000_003 * self.seed + int(self.steps))
        drawn = torch.randperm(len(z), generator=rng)[: len(dead)].to(z.device)
        # Before the codebook enters this step's graph, so that an output that was drawn chooses its own copy at once.
        self.codebook.weight[dead[: len(drawn)]] = z[drawn].to(self.codebook.weight.dtype)
        if _processes() > 1:
            torch.distributed.broadcast(self.codebook.weight, src=0)

    @torch.no_grad()
    def _count(self, counts: Int64[Tensor, " K"]) -> None:
        """One more training batch for every entry that no token of any process chose."""
        counts = counts.clone()
        if _processes() > 1:
            torch.distributed.all_reduce(counts)
        self.idle.copy_(torch.where(counts > 0, 0, self.idle + 1))
        self.steps.add_(1)


class EuclideanQuantizer(VectorQuantizer):
    """Codes of any length: residuals shrink from one to the next, and their length says something."""

    def project(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        """x itself, in single precision at least."""
        return _precise(x)

    def nearest(self, z: Float[Tensor, "T D"], codes: Float[Tensor, "K D"]) -> Int64[Tensor, " T"]:
        """The search."""
        return nearest_code_of_any_length(z, codes)


def _precise(x: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _processes() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


class CodebookTokenizer(ImageTokenizer):
    """Quantization between the convolutional encoder and decoder of latent diffusion; what `TokenizerTraining` trains.

    The networks are those of diffusers' AutoencoderKL, without the distribution; LlamaGen (arXiv 2406.06525, section
    3.1) uses the same kind. Subclasses say how encoder outputs become ids and back.
    """

    def __init__(
        self,
        codebooks: Sequence[int],
        dim: int,
        channels: Sequence[int],
        blocks: int,
        groups: int,
        attention: bool,
        scales: Sequence[int] = (),
    ) -> None:
        super().__init__()
        if not channels or any(c < 1 or c % groups for c in channels):
            raise ValueError(f"channels: expected multiples of groups = {groups}, at least one, got {list(channels)}")
        if blocks < 1:
            raise ValueError(f"blocks: expected at least 1, got {blocks}")
        # Here, not above: diffusers takes seconds to import, and whoever trains on pixels never needs it.
        from diffusers.models.autoencoders.vae import Decoder, Encoder

        n = len(channels)
        kind: Literal["multiscale", "discrete"] = "multiscale" if scales else "discrete"
        self.layout = TokenLayout(kind, dim, stride=2 ** (n - 1), codebooks=tuple(codebooks), scales=tuple(scales))
        shared = {
            "block_out_channels": tuple(channels),
            "layers_per_block": blocks,
            "norm_num_groups": groups,
            "mid_block_add_attention": attention,
        }
        self.encoder = Encoder(3, dim, down_block_types=("DownEncoderBlock2D",) * n, double_z=False, **shared)
        self.decoder = Decoder(dim, 3, up_block_types=("UpDecoderBlock2D",) * n, **shared)

    @abstractmethod
    def quantize(self, vectors: Float[Tensor, "P D"], grid: Grid) -> Quantized:
        """Encoder outputs through the codebook, with the terms of the loss; counts and revives in training mode."""

    @abstractmethod
    def vectors_to_ids(self, vectors: Float[Tensor, "P D"], grid: Grid) -> Int64[Tensor, "B N *Q"]:
        """Encoder outputs to ids; changes nothing."""

    @abstractmethod
    def ids_to_vectors(self, ids: Shaped[Tensor, "B N *Q"], grid: Grid) -> Float[Tensor, "P D"]:
        """Ids to what the decoder reads."""

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Reconstruction:
        """Images `(B, 3, H, W)` in [-1, 1] through the codebook and back, with the quantizer's terms of the loss.

        Raises:
            ValueError: the stride does not divide the image's height and width.
        """
        grid = self.layout.grid(*images.shape[-2:])
        quantized = self.quantize(self._images_to_vectors(images), grid)
        return Reconstruction(self._vectors_to_images(quantized.quantized, grid), quantized)

    def encode_batch(
        self, images: Float[Tensor, "B 3 H W"], rng: torch.Generator | None = None
    ) -> Int64[Tensor, "B N *Q"]:
        """Images `(B, 3, H, W)` in [-1, 1] to ids `(B, N)`, or `(B, N, Q)` of several codebooks; `rng` is not used.

        Leaves the codebook's statistics alone.

        Raises:
            ValueError: the stride does not divide the image's height and width.
        """
        grid = self.layout.grid(*images.shape[-2:])
        with torch.no_grad():
            return self.vectors_to_ids(self._images_to_vectors(images), grid)

    def decode_batch(
        self, tokens: Shaped[Tensor, "B N *channels"], grid: Grid, rng: torch.Generator | None = None
    ) -> Float[Tensor, "B 3 H W"]:
        """Ids `(B, N)` or `(B, N, Q)` to images `(B, 3, H, W)`, about in [-1, 1] (not clamped); `rng` is not used.

        Raises:
            ValueError: ids that are no integers or lie outside the codebook, or not as many of them as the grid has.
        """
        books = list(self.layout.codebooks[1:] and [len(self.layout.codebooks)])
        if tokens.dim() < 2 or list(tokens.shape[1:]) != [grid.length, *books]:
            expected = ", ".join(["B", *map(str, [grid.length, *books])])
            raise ValueError(f"tokens: expected ids ({expected}), got shape {tuple(tokens.shape)}")
        return self._vectors_to_images(self.ids_to_vectors(tokens, grid), grid)  # (B, 3, H, W)

    def _images_to_vectors(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "P D"]:
        return rearrange(self.encoder(images), "B D h w -> (B h w) D")  # (P, D)

    def _vectors_to_images(self, vectors: Float[Tensor, "P D"], grid: Grid) -> Float[Tensor, "B 3 H W"]:
        return self.decoder(rearrange(vectors, "(B h w) D -> B D h w", h=grid.h, w=grid.w))  # (B, 3, H, W)


class VQTokenizer(CodebookTokenizer):
    """An image as h x w ids of one codebook on the unit sphere."""

    def __init__(
        self,
        codebook: int,
        dim: int,
        channels: Sequence[int],
        blocks: int,
        groups: int = 8,
        attention: bool = False,
        revive_after: int = 50,
    ) -> None:
        """Args:

        codebook: entries K.
        dim: channels D of a code.
        channels: width of the networks at each resolution, fine to coarse; each further one halves the resolution, so
            that the stride is 2 ** (len(channels) - 1) pixels.
        blocks: residual blocks of the encoder at each resolution (the decoder has one more).
        groups: groups of the group norms; must divide every width.
        attention: whether the middle of both networks attends over the whole image.
        revive_after: training batches without a token after which an entry of the codebook is replaced.
        """
        super().__init__((codebook,), dim, channels, blocks, groups, attention)
        self.quantizer = VectorQuantizer(codebook, dim, revive_after)

    def quantize(self, vectors: Float[Tensor, "P D"], grid: Grid) -> Quantized:
        """Each output to its nearest code."""
        return self.quantizer(vectors)

    def vectors_to_ids(self, vectors: Float[Tensor, "P D"], grid: Grid) -> Int64[Tensor, "B N"]:
        """Each output to the id of its nearest code."""
        return self.quantizer.vectors_to_ids(vectors).unflatten(0, (-1, grid.length))  # (B, N)

    def ids_to_vectors(self, ids: Shaped[Tensor, "B N"], grid: Grid) -> Float[Tensor, "P D"]:
        """Ids to their codes."""
        return self.lookup(ids.flatten())

    def lookup(self, tokens: Shaped[Tensor, "T *channels"]) -> Float[Tensor, "T D"]:
        """Ids `(T,)` to their codes `(T, D)`, of length 1.

        Raises:
            ValueError: ids that are no integers or lie outside the codebook.
        """
        if tokens.dim() != 1:
            raise ValueError(f"tokens: expected ids (T,), got shape {tuple(tokens.shape)}")
        return self.quantizer.ids_to_vectors(tokens)
