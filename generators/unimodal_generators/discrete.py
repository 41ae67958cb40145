"""What all generators of discrete ids share: a vector an id, a head over the codebook, and its cross-entropy.

Letters: T ids of all images, M of them with a target, D channels of a code vector, V entries of the codebook, C width.
"""

from typing import ClassVar, Literal

from jaxtyping import Float, Int
from torch import Tensor, nn

from unimodal_generators.base import ImageGenerator
from unimodal_generators.cross_entropy import linear_cross_entropy
from unimodal_tokenizers.base import TokenLayout, precise


class Discrete(ImageGenerator):
    """Ids of one codebook, with an input and a head of their own beside the text's (Janus, arXiv 2410.13848).

    Args:
        layout: of the image tokenizer.
        width: of the backbone.
        inputs: what is read of an id: a learned row ("ids"), or its code vector through an MLP ("codes", as Janus does).
    """

    accepts: ClassVar = ("discrete", "sequence")

    def __init__(self, layout: TokenLayout, width: int, inputs: Literal["ids", "codes"]) -> None:
        super().__init__()
        self.check(layout)
        if len(layout.codebooks) != 1:
            raise ValueError(f"tokenizer: {type(self).__name__} learns one codebook, got {len(layout.codebooks)}")
        self.layout = layout
        (self.entries,) = layout.codebooks
        self.embedding = nn.Embedding(self.entries, width) if inputs == "ids" else code_mlp(layout.dim, width)
        self.head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, self.entries))
        if isinstance(self.embedding, nn.Embedding):
            nn.init.normal_(self.embedding.weight, std=0.02)

    def vectors(self, ids: Int[Tensor, " T"]) -> Float[Tensor, "T C"]:
        """What the backbone reads of each id."""
        if isinstance(self.embedding, nn.Embedding):
            return self.embedding(ids)
        return self.embedding(self.lookup(ids).to(next(self.parameters()).dtype))

    def logits(self, hidden: Float[Tensor, "*rest C"]) -> Float[Tensor, "*rest V"]:
        """Scores over the codebook, in fp32 or better."""
        return precise(self.head(hidden))

    def cross_entropy(
        self, hidden: Float[Tensor, "M C"], targets: Int[Tensor, " M"], weights: Float[Tensor, " M"] | None = None
    ) -> Float[Tensor, ""]:
        """Sum of -log p(target), each times its weight."""
        *inner, last = self.head
        assert isinstance(last, nn.Linear)
        for module in inner:
            hidden = module(hidden)
        return linear_cross_entropy(hidden, [last.weight], targets, last.bias, weights)


def code_mlp(dim: int, width: int) -> nn.Sequential:
    """Codes of length 1 to vectors of entries about 1, which added position embeddings do not drown."""
    first, second = nn.Linear(dim, width), nn.Linear(width, width)
    nn.init.normal_(first.weight, std=1.0)
    nn.init.normal_(second.weight, std=2.0 * width**-0.5)
    return nn.Sequential(first, nn.GELU(), second)
