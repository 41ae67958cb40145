"""Tokens that mean something: one head, and what it is compared with.

MUSE-VL (arXiv 2411.17762), DualToken (arXiv 2503.14324) and TA-Tok (arXiv 2506.18898) draw the features of a frozen encoder
from the quantized vectors; UniTok (arXiv 2502.20321) compares images with their texts, as CLIP does (arXiv 2103.00020).

Letters: B images, H height, W width (pixels); N tokens of an image, P patches of the frozen encoder; D channels of a
quantized vector, C width of the head, E channels of a feature or of a text; U different texts of a batch, L bytes of each.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from unimodal_tokenizers.base import Grid
from unimodal_tokenizers.frozen import FrozenEncoder
from unimodal_tokenizers.transformer import Transformer, places, spread

TEMPERATURE = 0.07  # of the contrast at first; it is learned (CLIP)
PADDING = 256  # behind the last of the bytes


class TextEncoder(nn.Module):
    """A small transformer that reads the bytes of texts, learned with the tokenizer that is compared with them (CLIP)."""

    no_weight_decay = ("places",)

    def __init__(self, width: int, depth: int, heads: int, length: int = 64) -> None:
        """Args:

        width: channels E.
        depth: its layers.
        heads: its attention heads.
        length: UTF-8 bytes of a text that it reads; the rest is cut off.
        """
        super().__init__()
        if length < 1:
            raise ValueError(f"text.length: expected at least 1 byte, got {length}")
        self.width, self.length = width, length
        self.bytes_in = nn.Embedding(PADDING + 1, width)
        self.places = nn.Parameter(0.02 * torch.randn(length, width))
        self.layers = Transformer(width, depth, heads)

    def forward(self, texts: Sequence[str]) -> Float[Tensor, "U E"]:
        """The mean of what is read at the bytes of each text; of an empty one, 0."""
        rows = [list(text.encode()[: self.length]) for text in texts]
        padded = torch.tensor([[*row, *[PADDING] * (self.length - len(row))] for row in rows])
        padded = padded.to(self.places.device)  # (U, L)
        read = padded != PADDING
        mask = read[:, None, None] | torch.eye(self.length, dtype=torch.bool, device=read.device)  # no row without any
        x = self.layers(self.bytes_in(padded) + self.places, mask)  # (U, L, E)
        return (x * read[..., None]).sum(1) / read.sum(1, keepdim=True).clamp(min=1)


class SemanticHead(nn.Module):
    """A small transformer that reads quantized vectors and says what the frozen encoder says, the image's text, or both.

    Terms of the loss: "semantic" with a teacher, "contrastive" with texts. Nothing of it is needed to encode or decode.
    """

    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        dim: int,
        first: int = 0,
        teacher: FrozenEncoder | None = None,
        text: TextEncoder | None = None,
    ) -> None:
        """Args:

        width: channels C of the head.
        depth: its layers.
        heads: its attention heads.
        dim: channels of a quantized vector it reads ...
        first: ... from this one on. Beside a quantizer of several codebooks, those of one of them (DualToken's high level).
        teacher: whose features are to be found in the vectors (distillation); None: nobody's.
        text: what reads the texts that come with the images (contrast); None: no texts come.
        """
        super().__init__()
        if teacher is None and text is None:
            raise ValueError("semantic: expected a teacher, a text encoder or both, got none")
        if depth < 1:  # else nothing of the vectors reaches what is asked for
            raise ValueError(f"semantic.depth: expected at least 1, got {depth}")
        if dim < 1 or first < 0:
            raise ValueError(f"semantic: expected dim from 1 and first from 0, got {dim} and {first}")
        self.first, self.dim = first, dim
        self.vectors_in = nn.Linear(dim, width)
        self.asked = nn.Parameter(
            0.02 * torch.randn(2, width)
        )  # what is read where a patch, the whole image is described
        self.head = Transformer(width, depth, heads)
        self.teacher = teacher
        self.features_out = None if teacher is None else nn.Linear(width, teacher.layout.dim)
        self.text = text
        self.text_out = None if text is None else nn.Linear(width, text.width)
        self.scale = None if text is None else nn.Parameter(torch.tensor(-math.log(TEMPERATURE)))
        self.weights = {
            **({} if teacher is None else {"semantic": 1.0}),
            **({} if text is None else {"contrastive": 1.0}),
        }

    no_weight_decay = ("asked",)

    def check(self, channels: int) -> None:
        """Refuse a tokenizer whose vectors, of so many channels, it cannot read."""
        if self.first + self.dim > channels:
            raise ValueError(
                f"semantic.dim: expected channels of the tokenizer's {channels}, got {self.dim} from {self.first} on"
            )

    def forward(
        self,
        vectors: Float[Tensor, "B N D"],
        grid: Grid,
        images: Float[Tensor, "B 3 H W"],
        texts: Sequence[str] | None = None,
    ) -> dict[str, Float[Tensor, ""]]:
        """Terms of the loss, unweighted.

        Args:
            vectors: quantized, through which gradients pass to the encoder.
            grid: where they lie; of a sequence, one row.
            images: whose vectors they are.
            texts: what is said of each image; it may be said of several.

        Raises:
            ValueError: texts are missing or not asked for.
        """
        expected, got = 0 if self.text is None else len(images), 0 if texts is None else len(texts)
        if got != expected:
            raise ValueError(f"texts: expected {expected or 'none'} with {len(images)} images, got {got or 'none'}")
        said = self.vectors_in(vectors[..., self.first : self.first + self.dim].to(self.vectors_in.weight.dtype))
        cells = Grid(1, 0) if self.teacher is None else self.teacher.grid(*images.shape[-2:])
        asked = self.asked[1].expand(len(said), 1, -1)  # (B, 1, C)
        if self.teacher is not None:
            asked = torch.cat([asked, self.asked[0] + places(cells, said) + spread(said, grid, cells)], dim=1)
        hidden = self.head(torch.cat([asked.to(said), said + places(grid, said)], dim=1))
        terms = {}
        if self.teacher is not None and self.features_out is not None:
            terms["semantic"] = cosine_distance(
                self.features_out(hidden[:, 1 : 1 + cells.length]), self.teacher(images)
            )
        if self.text is not None and self.text_out is not None and self.scale is not None and texts is not None:
            unique = list(dict.fromkeys(texts))
            which = torch.tensor([unique.index(text) for text in texts], device=images.device)
            terms["contrastive"] = contrastive_loss(
                self.text_out(hidden[:, 0]), self.text(unique), which, self.scale.exp()
            )
        return terms


def cosine_distance(x: Float[Tensor, "B P E"], y: Float[Tensor, "B P E"]) -> Float[Tensor, ""]:
    """mean of 1 - cos(x, y), from 0 to 2 (MUSE-VL; TA-Tok)."""
    return (1 - F.cosine_similarity(x.float(), y.float(), dim=-1)).mean()


def contrastive_loss(
    images: Float[Tensor, "B E"], texts: Float[Tensor, "U E"], which: Int64[Tensor, " B"], scale: Float[Tensor, ""]
) -> Float[Tensor, ""]:
    """The mean of both directions of InfoNCE (CLIP), of batches that may say one text twice.

    Image i has text `which[i]` of the U different ones. With s_iu = scale cos(x_i, t_u): an image is to find its text among
    the U, and a text each of its images among the B. Where all texts differ this is CLIP's loss.
    """
    with torch.autocast(images.device.type, enabled=False):
        s = scale.float() * F.normalize(images.float(), dim=-1) @ F.normalize(texts.float(), dim=-1).T  # (B, U)
        own = F.one_hot(which, len(texts)).to(s)
        return (F.cross_entropy(s, which) + F.cross_entropy(s.T, (own / own.sum(0)).T)) / 2
