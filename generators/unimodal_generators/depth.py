"""The codes of one image token one after another: a small transformer over depth, not over positions.

RQ-Transformer (arXiv 2203.01941), VILA-U (arXiv 2409.04429).

Letters: N tokens, Q codebooks, q of them given, V entries of one, C width of the backbone, W of this transformer, E channels
of a head.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from unimodal_generators.cross_entropy import linear_cross_entropy
from unimodal_tokenizers.base import precise


@dataclass(frozen=True)
class Depth:
    """Shape of a depth transformer."""

    layers: int
    width: int
    heads: int

    def __post_init__(self) -> None:
        for name in ("layers", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"generator.depth.{name}: expected at least 1, got {getattr(self, name)}")
        if self.width < 1 or self.width % self.heads:
            raise ValueError(f"generator.depth.width: expected a multiple of heads {self.heads}, got {self.width}")


class DepthTransformer(nn.Module):
    """p(k_1, ..., k_Q | h): each code is predicted from the backbone's hidden state and from the codes before it."""

    no_weight_decay = ("place",)

    def __init__(self, depth: Depth, width: int, codebooks: Sequence[int]) -> None:
        super().__init__()
        self.project = nn.Linear(width, depth.width)
        self.place = nn.Parameter(0.02 * torch.randn(len(codebooks), depth.width))
        self.embeddings = nn.ModuleList(_table(entries, depth.width) for entries in codebooks[:-1])
        self.layers = nn.ModuleList(_Layer(depth.width, depth.heads) for _ in range(depth.layers))
        self.norm = nn.RMSNorm(depth.width)
        self.heads = nn.ModuleList(nn.Linear(depth.width, entries) for entries in codebooks)

    def states(self, hidden: Float[Tensor, "N C"], codes: Int[Tensor, "N q"]) -> Float[Tensor, "N q1 W"]:
        """What predicts the first q + 1 codes: v_1 = h + p_1, v_d = p_d + e(k_1) + ... + e(k_(d-1)), through the layers."""
        x, read = [self.project(hidden)], torch.zeros_like(self.place[0])
        for code, embedding in zip(codes.unbind(1), self.embeddings, strict=False):  # the last code is never read
            read = read + embedding(code)
            x.append(read)
        v = torch.stack(x, dim=1) + self.place[: len(x)]  # (N, q+1, W)
        for layer in self.layers:
            v = layer(v)
        return self.norm(v)

    def logits(self, hidden: Float[Tensor, "*rest C"], codes: Int[Tensor, "*rest q"]) -> Float[Tensor, "*rest V"]:
        """Scores of the next codebook, given the codes of those before it; few codes, so nothing is cached."""
        q = codes.shape[-1]
        last = self.states(hidden.flatten(0, -2), codes.flatten(0, -2))[:, -1]  # (N, W)
        return precise(self.heads[q](last)).unflatten(0, hidden.shape[:-1])

    def loss(self, hidden: Float[Tensor, "N C"], ids: Int[Tensor, "N Q"]) -> Float[Tensor, ""]:
        """Cross-entropy, a mean over a token's codebooks and a sum over tokens."""
        states = self.states(hidden, ids[:, :-1]).unbind(1)
        terms = []
        for state, head, target in zip(states, self.heads, ids.unbind(1), strict=True):
            assert isinstance(head, nn.Linear)
            terms.append(linear_cross_entropy(state, [head.weight], target, head.bias))
        return torch.stack(terms).mean()


def _table(entries: int, width: int) -> nn.Embedding:
    table = nn.Embedding(entries, width)
    nn.init.normal_(table.weight, std=0.02)
    return table


class _Layer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), causal over depth."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv, self.o = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Float[Tensor, "N q W"]) -> Float[Tensor, "N q W"]:
        qkv = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1))  # (N, q, 3, heads, E)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (N, heads, q, E) each
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(o.transpose(1, 2).flatten(2))
        return x + self.mlp(self.mlp_norm(x))
