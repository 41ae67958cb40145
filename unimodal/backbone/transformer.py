"""A decoder whose every weight may be held once an expert.

Letters: S tokens, C width, H query heads, K key/value heads, E channels of a head, F width of the MLP, A position axes.

Tokens come in expert order: expert 0's first, then expert 1's; `splits` says how many each. So every projection is a plain
matrix product on a contiguous slice, and only attention needs to know the order of the sequence.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from unimodal.attention import PackedAttention
from unimodal.backbone.config import BackboneConfig
from unimodal.backbone.positions import Rotary


class Routed(nn.Module):
    """One module an expert (`routed`), or one for all."""

    def __init__(self, build: Callable[[], nn.Module], experts: Sequence[str], routed: bool) -> None:
        super().__init__()
        names = experts if routed and len(experts) > 1 else ["shared"]
        self.experts = nn.ModuleDict({name: build() for name in names})

    def forward(self, x: Float[Tensor, "S *c"], splits: Sequence[int]) -> Float[Tensor, "S *d"]:
        """Each expert's rows through its own module."""
        modules = list(self.experts.values())
        if len(modules) == 1:
            return modules[0](x)
        # An expert without rows still runs in training, so that its gradient is zero rather than missing.
        rows = zip(modules, x.split(list(splits)), strict=True)
        return torch.cat([module(part) for module, part in rows if len(part) or torch.is_grad_enabled()])


class RMSNorm(nn.Module):
    """x / rms(x) * weight, in fp32 or better (arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Float[Tensor, "*rest C"]) -> Float[Tensor, "*rest C"]:
        """Same shape and type as x."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        return F.rms_norm(x.to(dtype), x.shape[-1:], self.weight.to(dtype), self.eps).to(x.dtype)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (arXiv 2002.05202, eq. 6)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Float[Tensor, "S C"]) -> Float[Tensor, "S C"]:
        """Tokens to tokens."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Attention(nn.Module):
    """Grouped-query attention: projections by expert, one attention over all tokens."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        c, e = config.width, config.head_dim
        names, routed = config.experts.names, config.experts.attention
        self.heads = [config.heads, config.kv_heads, config.kv_heads]
        self.head_dim = e
        self.qkv = Routed(lambda: nn.Linear(c, sum(self.heads) * e, bias=False), names, routed)
        self.o = Routed(lambda: nn.Linear(config.heads * e, c, bias=False), names, routed)
        self.q_norm = Routed(lambda: RMSNorm(e, config.norm_eps), names, routed) if config.qk_norm else None
        self.k_norm = Routed(lambda: RMSNorm(e, config.norm_eps), names, routed) if config.qk_norm else None

    def forward(
        self, x: Float[Tensor, "S C"], layer: int, rotary: Rotary, splits: Sequence[int], attention: PackedAttention
    ) -> Float[Tensor, "S C"]:
        """Tokens to tokens."""
        q, k, v = self.qkv(x, splits).unflatten(-1, (-1, self.head_dim)).split(self.heads, 1)  # (S, H | K | K, E)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q, splits), self.k_norm(k, splits)
        o = attention(layer, rotary(q), rotary(k), v)  # (S, H, E)
        return self.o(o.flatten(1), splits)  # (S, H*E) -> (S, C)


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        experts = config.experts
        self.attention_norm = Routed(lambda: RMSNorm(config.width, config.norm_eps), experts.names, experts.norms)
        self.attention = Attention(config)
        self.mlp_norm = Routed(lambda: RMSNorm(config.width, config.norm_eps), experts.names, experts.norms)
        self.mlp = Routed(lambda: SwiGLU(config.width, config.mlp_width), experts.names, experts.mlp)

    def forward(
        self, x: Float[Tensor, "S C"], layer: int, rotary: Rotary, splits: Sequence[int], attention: PackedAttention
    ) -> Float[Tensor, "S C"]:
        """Tokens to tokens."""
        x = x + self.attention(self.attention_norm(x, splits), layer, rotary, splits, attention)
        return x + self.mlp(self.mlp_norm(x, splits), splits)


class Backbone(nn.Module):
    """Text embedding, decoder layers, last norm, text head."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.depth))
        self.norm = Routed(lambda: RMSNorm(config.width, config.norm_eps), config.experts.names, config.experts.norms)
        self.head = None if config.tied_head else nn.Linear(config.width, config.vocabulary, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal of std 0.02, those that write to the residual stream smaller by sqrt(2 depth) (GPT-2)."""
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                writes = ".o." in name or name.endswith("down.weight")
                std = 0.02 / (2 * self.config.depth) ** 0.5 if writes else 0.02
                nn.init.normal_(parameter, std=std)

    def forward(
        self,
        x: Float[Tensor, "S C"],
        positions: Int[Tensor, "S A"],
        splits: Sequence[int],
        attention: PackedAttention,
    ) -> Float[Tensor, "S C"]:
        """Embeddings in expert order to hidden states in expert order, after the last norm."""
        rotary = Rotary(positions, self.config.head_dim, self.config.rope_theta)
        for i, layer in enumerate(self.layers):
            x = layer(x, i, rotary, splits, attention)
        return self.norm(x, splits)

    def logits(self, hidden: Float[Tensor, "n C"]) -> Float[Tensor, "n V"]:
        """Scores over the vocabulary, in fp32 or better."""
        weight = self.embedding.weight if self.head is None else self.head.weight
        logits = F.linear(hidden, weight)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))
