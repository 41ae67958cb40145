"""A decoder whose every weight may be held once an expert.

Letters: S tokens, n of them one expert's, C width, H query heads, K key/value heads, E channels of a head, F width of the
MLP, A position axes.

Tokens come in expert order: expert 0's first, then expert 1's; `splits` says how many each. The residual stream is kept as
one slice an expert, so every projection is a plain matrix product on contiguous rows; slices meet in attention only, which
alone needs to know the order of the sequence.
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
    """One module an expert (`routed`), or one for all; `routed[i]` is expert i's."""

    def __init__(self, build: Callable[[], nn.Module], experts: Sequence[str], routed: bool) -> None:
        super().__init__()
        self.experts = nn.ModuleDict({name: build() for name in (experts if routed else ["shared"])})
        modules = list(self.experts.values())
        self.by_index = [modules[i if routed else 0] for i in range(len(experts))]

    def __getitem__(self, expert: int) -> nn.Module:
        return self.by_index[expert]


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


class QKNorm(nn.Module):
    """RMSNorm of every query head with one weight and every key head with another (arXiv 2302.05442)."""

    def __init__(self, heads: Sequence[int], head_dim: int, eps: float) -> None:
        super().__init__()
        self.heads, self.eps = heads[:2], eps
        self.q = nn.Parameter(torch.ones(head_dim))
        self.k = nn.Parameter(torch.ones(head_dim))

    def forward(self, qk: Float[Tensor, "n HK E"]) -> Float[Tensor, "n HK E"]:
        """Same shape and type as qk, whose query heads come first."""
        dtype = torch.promote_types(qk.dtype, torch.float32)
        weight = torch.cat([w.to(dtype).expand(n, -1) for w, n in zip((self.q, self.k), self.heads, strict=True)])
        return (F.rms_norm(qk.to(dtype), qk.shape[-1:], eps=self.eps) * weight).to(qk.dtype)


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


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); grouped-query attention, each weight by expert."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        c, e, eps = config.width, config.head_dim, config.norm_eps
        experts, names = config.experts, config.experts.names
        self.heads = [config.heads, config.kv_heads, config.kv_heads]
        self.head_dim = e
        self.attention_norm = Routed(lambda: RMSNorm(c, eps), names, experts.norms)
        self.qkv = Routed(lambda: nn.Linear(c, sum(self.heads) * e, bias=False), names, experts.attention)
        qk_norm: Callable[[], nn.Module] = (lambda: QKNorm(self.heads, e, eps)) if config.qk_norm else nn.Identity
        self.qk_norm = Routed(qk_norm, names, experts.attention)
        self.o = Routed(lambda: nn.Linear(config.heads * e, c, bias=False), names, experts.attention)
        self.mlp_norm = Routed(lambda: RMSNorm(c, eps), names, experts.norms)
        self.mlp = Routed(lambda: SwiGLU(c, config.mlp_width), names, experts.mlp)

    def project(self, x: Float[Tensor, "n C"], rotary: Rotary, expert: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (n, H, E), keys (n, K, E) and values (n, K, E) of one expert's tokens."""
        qkv = self.qkv[expert](self.attention_norm[expert](x))
        qkv = qkv.unflatten(-1, (-1, self.head_dim))  # (n, H+2K, E)
        h, k, _ = self.heads
        qk = rotary(self.qk_norm[expert](qkv[:, : h + k]))  # (n, H+K, E): both at once, they are small
        return qk[:, :h], qk[:, h:], qkv[:, h + k :]

    def finish(self, x: Float[Tensor, "n C"], o: Float[Tensor, "n H E"], expert: int) -> Float[Tensor, "n C"]:
        """Both residual branches, given what attention found."""
        x = x + self.o[expert](o.flatten(1))  # (n, H*E) -> (n, C)
        return x + self.mlp[expert](self.mlp_norm[expert](x))


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
        # An expert without rows still runs in training, so that its gradient is zero rather than missing.
        used = [e for e, count in enumerate(splits) if count or torch.is_grad_enabled()]
        counts = [splits[e] for e in used]
        xs = list(x.split(counts))
        rotaries = [Rotary(p, self.config.head_dim, self.config.rope_theta) for p in positions.split(counts)]
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, DecoderLayer)
            projected = [layer.project(x, r, e) for x, r, e in zip(xs, rotaries, used, strict=True)]
            q, k, v = (torch.cat(parts) for parts in zip(*projected, strict=True))  # (S, H | K | K, E)
            o = attention(i, q, k, v).split(counts)  # (n, H, E) an expert
            xs = [layer.finish(x, part, e) for x, part, e in zip(xs, o, used, strict=True)]
        return torch.cat([self.norm[e](x) for x, e in zip(xs, used, strict=True)])

    def logits(self, hidden: Float[Tensor, "n C"]) -> Float[Tensor, "n V"]:
        """Scores over the vocabulary, in fp32 or better."""
        weight = self.embedding.weight if self.head is None else self.head.weight
        logits = F.linear(hidden, weight)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))
