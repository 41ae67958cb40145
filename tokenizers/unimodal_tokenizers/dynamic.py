"""As many ids as an image needs: patches that say enough are kept, and the others are merged into them.

LaVIT (arXiv 2309.04669), whose decoder draws features; here it draws pixels.

Letters: B images, H height, W width (pixels); h, w the grid of patches, N = h w of them, and ids of an image at most; S
patches of all images that are kept; T ids of all images end to end; K entries of the codebook; C width, D channels of a
code.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from unimodal_tokenizers.base import Grid, Reconstruction
from unimodal_tokenizers.quantizers import Quantizer
from unimodal_tokenizers.quantizers.base import step_generator
from unimodal_tokenizers.semantic import SemanticHead
from unimodal_tokenizers.sequence import RowTokenizer
from unimodal_tokenizers.transformer import Transformer, images_to_patches, patches_to_images, places


class DynamicTokenizer(RowTokenizer):
    """The ids of the patches that are kept, row by row, then the id K up to N of them: it ends the image and is no code.

    Which are kept is decided patch by patch, in training by a drawn sample; the draws depend on a counter among the buffers
    and on the process only. Terms of the loss: those of the quantizer, over the patches that are kept, and "sparsity".
    """

    end: int

    def __init__(
        self,
        quantizer: Quantizer,
        image: tuple[int, int],
        patch: int,
        keep: float,
        width: int,
        depth: int,
        heads: int,
        semantic: SemanticHead | None = None,
        seed: int = 0,
    ) -> None:
        """Args:

        quantizer: of one codebook.
        image: (height, width) in pixels of every image.
        patch: side of a patch in pixels.
        keep: share of the patches that encoding is to keep, over many images (rho).
        width: channels of the transformers.
        depth: layers of each: encoder, merger, decoder.
        heads: attention heads.
        semantic: what the codes are to mean.
        seed: of the draws.
        """
        if not 0 < keep <= 1:
            raise ValueError(f"keep: expected a share above 0 and up to 1, got {keep}")
        if len(quantizer.codebooks) != 1:
            raise ValueError(f"quantizer: expected one codebook, got {len(quantizer.codebooks)}")
        end = quantizer.codebooks[0]
        super().__init__(image, patch, quantizer.dim, (end + 1,), seed=seed)
        self.end, self.keep = end, keep
        self.patches_in = nn.Linear(3 * patch * patch, width)
        self.encoder = Transformer(width, depth, heads)
        self.selector = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, 1))
        self.merger = Transformer(width, depth, heads)
        self._build_drawer(quantizer, width, depth, heads, semantic, {"sparsity": 1.0})

    def forward(self, images: Float[Tensor, "B 3 H W"], texts: Sequence[str] | None = None) -> Reconstruction:
        """Images `(B, 3, H, W)` in [-1, 1] through their ids and back, with the terms of the loss.

        Args:
            images: of the one size.
            texts: what is said of each, for a `semantic` that asks for it.

        Raises:
            ValueError: images of another size; texts that are missing or not asked for.
        """
        self.layout.grid(*images.shape[-2:])
        x, logits = self._read(images)
        kept = self._choose(logits)  # (B, N)
        quantized = self.quantizer(self._merge(x, kept)[kept])  # (S, D)
        # The value of what is kept, and a gradient to the choice that kept it: hard ahead, soft behind.
        chance = logits.sigmoid()[kept][:, None]  # (S, 1)
        vectors, valid = self._in_front(quantized.quantized * (1 + chance - chance.detach()), kept)
        chances = logits.sigmoid()  # (B, N)
        share = (logits > 0).to(chances) + chances - chances.detach()  # what `encode_batch` keeps, behind it the chance
        terms = {**quantized.terms, "sparsity": (self.keep - share.mean()).square()}
        if self.semantic is not None:
            terms |= self.semantic(vectors, Grid(1, self.layout.length), images, texts)
        counts = torch.cat([quantized.counts, (~kept).sum()[None]])
        return Reconstruction(self._draw(vectors, valid), terms, counts)

    def encode_batch(
        self, images: Float[Tensor, "B 3 H W"], rng: torch.Generator | None = None
    ) -> Int64[Tensor, "B N"]:
        """Images `(B, 3, H, W)` in [-1, 1] to ids; `rng` is not used. Leaves the quantizer's statistics alone.

        Raises:
            ValueError: images of another size.
        """
        self.layout.grid(*images.shape[-2:])
        with torch.no_grad():
            x, logits = self._read(images)
            kept = _at_least_one(logits > 0, logits)
            codes = self.quantizer.vectors_to_ids(self._merge(x, kept)[kept])  # (S,)
            ids = torch.full(kept.shape, self.end, dtype=torch.int64, device=images.device)
            ids[_first(kept)] = codes  # both row by row
            return ids

    def decode_batch(
        self, tokens: Shaped[Tensor, "B N *channels"], grid: Grid, rngs: Sequence[torch.Generator] | None = None
    ) -> Float[Tensor, "B 3 H W"]:
        """Ids to images, about in [-1, 1] (not clamped); what follows the first id K is not read; `rngs` are not used.

        Raises:
            ValueError: ids that are no integers or lie outside the codebook, or more than N of them an image.
        """
        n = self.layout.length
        if grid != Grid(1, tokens.shape[1]) or tokens.dim() != 2 or not 1 <= tokens.shape[1] <= n:
            raise ValueError(f"tokens: expected up to {n} ids of an image, got shape {tuple(tokens.shape)} of {grid}")
        tokens = F.pad(tokens, (0, n - tokens.shape[1]), value=self.end)  # (B, N)
        valid = (tokens == self.end).cumsum(1) == 0  # (B, N)
        return self._draw(self.lookup(tokens.flatten()).unflatten(0, (-1, n)), valid)

    def lookup(self, tokens: Shaped[Tensor, "T *channels"]) -> Float[Tensor, "T D"]:
        """Ids `(T,)` to their codes; that of the end is 0.

        Raises:
            ValueError: ids that are no integers or lie outside the codebook.
        """
        ends = tokens == self.end
        codes = self.quantizer.ids_to_vectors(tokens.masked_fill(ends, 0))
        return codes.masked_fill(ends[:, None], 0.0)

    def _read(self, images: Float[Tensor, "B 3 H W"]) -> tuple[Float[Tensor, "B N C"], Float[Tensor, "B N"]]:
        """What each patch says, and the logit of keeping it."""
        patches = self.patches_in(images_to_patches(images, self.layout.stride))  # (B, N, C)
        x = self.encoder(patches + places(self.cells, patches))
        return x, self.selector(x)[..., 0].float()

    def _choose(self, logits: Float[Tensor, "B N"]) -> Bool[Tensor, "B N"]:
        """Which patches are kept: in training a sample of their chances (LaVIT: Gumbel-softmax of two classes)."""
        if not self.training:
            return _at_least_one(logits > 0, logits)
        chance = torch.rand(logits.shape, generator=step_generator(self.seed, int(self.steps))).to(logits)
        self.steps.add_(1)
        noise = chance.logit(eps=1e-6)  # logistic: of two Gumbels the difference
        return _at_least_one(logits.detach() + noise > 0, logits)

    def _merge(self, x: Float[Tensor, "B N C"], kept: Bool[Tensor, "B N"]) -> Float[Tensor, "B N D"]:
        """Kept patches read all of them; what is not kept reads itself alone, and is left behind."""
        own = torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
        mask = kept[:, :, None] | own  # (B, N, N)
        return self.codes_out(self.merger(x + places(self.cells, x), mask[:, None]))

    def _in_front(
        self, codes: Float[Tensor, "S D"], kept: Bool[Tensor, "B N"]
    ) -> tuple[Float[Tensor, "B N D"], Bool[Tensor, "B N"]]:
        """Codes of each image at its front, in order, zeros behind them; and where codes are."""
        valid = _first(kept)
        vectors = codes.new_zeros(*kept.shape, codes.shape[-1])
        return vectors.index_put(valid.nonzero(as_tuple=True), codes), valid

    def _draw(self, vectors: Float[Tensor, "B N D"], valid: Bool[Tensor, "B N"]) -> Float[Tensor, "B 3 H W"]:
        """The image; nobody sees what stands behind the codes."""
        n = vectors.shape[1]
        codes = self.codes_in(vectors.to(self.codes_in.weight.dtype)) + self.ranks  # (B, N, C)
        codes = codes * valid[..., None]
        share = torch.arange(n, device=valid.device) * valid.sum(1, keepdim=True) // n  # (B, N): of the codes there are
        near = codes.gather(1, share[..., None].expand_as(codes))
        drawn = self.drawn + places(self.cells, self.drawn) + near  # (B, N, C)
        seen = F.pad(valid, (0, n), value=True)[:, None, None].expand(-1, -1, 2 * n, -1)  # (B, 1, 2 N, 2 N)
        x = self.decoder(torch.cat([codes, drawn], dim=1), seen)[:, n:]
        return patches_to_images(self.pixels_out(x), self.cells, self.layout.stride)


def _at_least_one(kept: Bool[Tensor, "B N"], logits: Float[Tensor, "B N"]) -> Bool[Tensor, "B N"]:
    """An image of nothing could not be told from others: the likeliest patch stays."""
    return kept.scatter(1, logits.argmax(1, keepdim=True), True)


def _first(kept: Bool[Tensor, "B N"]) -> Bool[Tensor, "B N"]:
    """As many trues as a row has, at its front."""
    return torch.arange(kept.shape[1], device=kept.device) < kept.sum(1, keepdim=True)
