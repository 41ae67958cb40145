"""What a backbone is made of."""

from dataclasses import dataclass
from typing import Literal

from unimodal_generators.base import TokenKind


@dataclass(frozen=True)
class Experts:
    """Which weights are held once an expert, and which expert reads each kind of token.

    All three parts: a full mixture of transformers (arXiv 2411.04996; BAGEL, LlamaFusion). `mlp` alone: FFN experts.
    None: a dense model.
    """

    attention: bool = False  # q, k, v, o and the norms of q and k
    mlp: bool = False
    norms: bool = False  # before attention, before the MLP, and the last one
    text: str = "text"
    understanding: str = "text"
    clean: str = "image"
    learned: str = "image"

    @property
    def names(self) -> tuple[str, ...]:
        """Experts in the order of the kinds they first appear in; one when nothing is held by expert."""
        if not (self.attention or self.mlp or self.norms):
            return ("shared",)
        return tuple(dict.fromkeys((self.text, self.understanding, self.clean, self.learned)))

    def index(self, kind: TokenKind) -> int:
        """Which expert reads tokens of `kind`."""
        name = (self.text, self.understanding, self.clean, self.learned)[kind]
        return self.names.index(name) if len(self.names) > 1 else 0


@dataclass(frozen=True)
class BackboneConfig:
    """Shape of the decoder. What is expensive to get wrong has no default."""

    width: int
    depth: int
    heads: int
    kv_heads: int
    mlp_width: int
    vocabulary: int  # rows of the text embedding and head; a text tokenizer may use fewer
    positions: Literal["sequential", "block"]
    experts: Experts = Experts()
    attention: Literal["sdpa", "reference"] = "sdpa"
    qk_norm: bool = True
    tied_head: bool = True
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("width", "depth", "mlp_width", "vocabulary"):
            if getattr(self, name) < 1:
                raise ValueError(f"backbone.{name}: expected at least 1, got {getattr(self, name)}")
        if self.positions == "block" and self.width % 4:
            raise ValueError(f"backbone.width: positions block need a multiple of 4, got {self.width}")
        if self.heads < 1 or self.width % self.heads or (self.width // self.heads) % 2:
            raise ValueError(f"backbone.heads: expected heads of even size, got width {self.width}, heads {self.heads}")
        if self.kv_heads < 1 or self.heads % self.kv_heads:
            raise ValueError(f"backbone.kv_heads: expected a divisor of heads {self.heads}, got {self.kv_heads}")

    @property
    def head_dim(self) -> int:
        """Channels of one head."""
        return self.width // self.heads
