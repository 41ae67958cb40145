"""A decoder whose every weight may be held once an expert: Llama, Qwen2, Qwen2.5, Qwen3 by configuration.

Letters: S tokens, n of them one expert's, C width, H query heads, K key/value heads, E channels of a head, F width of the
MLP, A position axes, N images, V rows of the vocabulary.

Tokens come in expert order: expert 0's first, then expert 1's; `splits` says how many each. The residual stream is kept as
one slice an expert, so every projection is a plain matrix product on contiguous rows; slices meet in attention only, which
alone needs to know the order of the sequence.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from unimodal.attention import CacheView, PackedAttention
from unimodal.backbone.adapters import LoraLinear
from unimodal.backbone.config import BackboneConfig, Experts, Part
from unimodal.backbone.moe import RoutedMLP
from unimodal.backbone.positions import SCHEMES, Rotary, rotate
from unimodal_generators.base import ImageRows


class Routed(nn.Module):
    """One module an expert, or one for all (which some may read through an adapter); `routed[i]` is expert i's."""

    def __init__(
        self, build: Callable[[], nn.Module], experts: Experts, part: Part,
        adapt: Callable[[nn.Module], nn.Module] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        names, held = experts.names, getattr(experts, part)
        self.experts = nn.ModuleDict({name: build() for name in (names if held else ["shared"])})
        self.by_index = [self.experts[name if held else "shared"] for name in names]
        if adapt is not None and experts.lora is not None and part in experts.lora.parts:
            adapted = {name: adapt(self.experts["shared"]) for name in experts.lora.experts}
            self.adapters = nn.ModuleDict(adapted)
            self.by_index = [adapted.get(name, module) for name, module in zip(names, self.by_index, strict=True)]

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
    """down(silu(gate(x)) * up(x)) (arXiv 2002.05202, eq. 6); gate and up are one matrix, gate first."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Float[Tensor, "n C"]) -> Float[Tensor, "n C"]:
        """Tokens to tokens."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)  # (n, F) each
        return self.down(F.silu(gate) * up)


class Modulation(nn.Module):
    """Shift, scale and gate of both branches from an image's condition (adaLN, DiT, arXiv 2212.09748).

    Zero at the start, where shift is 0 and scale and gate are 1: an imported model begins as it was.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.project = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.project.weight)
        nn.init.zeros_(self.project.bias)

    def forward(self, condition: Float[Tensor, "N C"], rows: Int[Tensor, " n"]) -> tuple[Tensor, ...]:
        """Six (n, C), of the image of each token; `rows` counts images from 1, and 0 leaves a token as it is."""
        table = self.project(F.silu(condition))  # (N, 6C): per image, never per token
        table = torch.cat([table.new_zeros(1, table.shape[1]), table])
        return table.index_select(0, rows).chunk(6, dim=1)


# Conditions of images, and by expert the image of each token, counted from 1 (0: none); None for an expert without images.
Rows = tuple[Float[Tensor, "N C"], list[Int[Tensor, " _"] | None]]


Step = Callable[..., tuple[list[Tensor], Tensor | None]]
"""What `DecoderLayer.step` is, with the layer as its first argument."""


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); grouped-query attention, each weight by expert."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        c, e, eps, experts = config.width, config.head_size, config.norm_eps, config.experts
        self.heads = [config.heads, config.kv_heads, config.kv_heads]
        self.head_dim = e
        sizes = [heads * e for heads in self.heads]

        def adapted(*sections: int) -> Callable[[nn.Module], nn.Module]:
            return lambda base: LoraLinear(base, experts.lora, sections)

        def mlp() -> nn.Module:
            return SwiGLU(c, config.mlp_width) if config.moe is None else RoutedMLP(c, config.moe)

        qk_norm: Callable[[], nn.Module] = (lambda: QKNorm(self.heads, e, eps)) if config.qk_norm else nn.Identity
        self.attention_norm = Routed(lambda: RMSNorm(c, eps), experts, "norms")
        self.qkv = Routed(lambda: nn.Linear(c, sum(sizes), bias=config.qkv_bias), experts, "attention", adapted(*sizes))
        self.qk_norm = Routed(qk_norm, experts, "attention")
        self.o = Routed(lambda: nn.Linear(sizes[0], c, bias=False), experts, "attention", adapted(c))
        self.mlp_norm = Routed(lambda: RMSNorm(c, eps), experts, "norms")
        self.mlp = Routed(mlp, experts, "mlp", AdaptedSwiGLU.over(experts, config.mlp_width))
        self.modulation = Modulation(c) if config.adaln else None

    def forward(self, *args: Any, through: Step | None = None) -> tuple[list[Tensor], Tensor | None]:
        """`step`, or what was compiled from it: hooks of a module (FSDP2's) lie around what is compiled."""
        return (DecoderLayer.step if through is None else through)(self, *args)

    def step(
        self, xs: list[Tensor], rotary: list[tuple[Tensor, Tensor]], attention: Any, experts: tuple[int, ...],
        rows: Rows | None = None, tokens: Sequence[int] | None = None,
    ) -> tuple[list[Tensor], Tensor | None]:  # fmt: skip
        """The residual stream, one slice (n, C) an expert of `experts`, and the loss of learned routers.

        `attention` is this layer's. `tokens`: how many rows of each slice are tokens, which routers alone ask for.
        """
        m: list[tuple[Any, ...]] = [(None,) * 6] * len(xs)
        if self.modulation is not None and rows is not None:
            m = [(None,) * 6 if r is None else self.modulation(rows[0], r) for r in rows[1]]
        projected = [self.project(x, r, e, *mod[:2]) for x, r, e, mod in zip(xs, rotary, experts, m)]
        q, k, v = (torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*projected))  # (S, H | K | K, E)
        o = attention(q, k, v).split([len(x) for x in xs])  # (n, H, E) an expert
        real = [None] * len(xs) if tokens is None else tokens
        done = [self.finish(x, part, e, n, *mod[2:]) for x, part, e, n, mod in zip(xs, o, experts, real, m)]
        losses = [loss for _, loss in done if loss is not None]
        return [x for x, _ in done], sum(losses[1:], losses[0]) if losses else None

    def project(
        self, x: Float[Tensor, "n C"], rotary: tuple[Tensor, Tensor], expert: int,
        shift: Tensor | None, scale: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Queries (n, H, E), keys (n, K, E) and values (n, K, E) of one expert's tokens."""
        qkv = self.qkv[expert](modulate(self.attention_norm[expert](x), shift, scale))
        qkv = qkv.unflatten(-1, (-1, self.head_dim))  # (n, H+2K, E)
        h, k, _ = self.heads
        qk = rotate(self.qk_norm[expert](qkv[:, : h + k]), *rotary)  # (n, H+K, E): both at once, they are small
        return qk[:, :h], qk[:, h:], qkv[:, h + k :]

    def finish(
        self, x: Float[Tensor, "n C"], o: Float[Tensor, "n H E"], expert: int, tokens: int | None,
        gate: Tensor | None, shift: Tensor | None, scale: Tensor | None, mlp_gate: Tensor | None,
    ) -> tuple[Float[Tensor, "n C"], Tensor | None]:  # fmt: skip
        """Both residual branches, given what attention found, and the loss of a learned router."""
        x = x + gated(self.o[expert](o.flatten(1)), gate)  # (n, H*E) -> (n, C)
        h, loss = modulate(self.mlp_norm[expert](x), shift, scale), None
        if tokens is None:
            h = self.mlp[expert](h)
        else:  # what fills a slice up is not routed
            h, loss = self.mlp[expert](h[:tokens])
            h = F.pad(h, (0, 0, 0, len(x) - tokens))
        return x + gated(h, mlp_gate), loss


def modulate(x: Tensor, shift: Tensor | None, scale: Tensor | None) -> Tensor:
    """x (1 + scale) + shift."""
    return x if shift is None or scale is None else x * (1 + scale) + shift


def gated(x: Tensor, gate: Tensor | None) -> Tensor:
    """x (1 + gate)."""
    return x if gate is None else x * (1 + gate)


class AdaptedSwiGLU(nn.Module):
    """A shared SwiGLU read through an expert's adapters."""

    def __init__(self, base: SwiGLU, experts: Experts, hidden: int) -> None:
        super().__init__()
        self.gate_up = LoraLinear(base.gate_up, experts.lora, (hidden, hidden))
        self.down = LoraLinear(base.down, experts.lora, (base.down.out_features,))

    forward = SwiGLU.forward

    @classmethod
    def over(cls, experts: Experts, hidden: int) -> Callable[[nn.Module], nn.Module]:
        """What wraps one."""
        return lambda base: cls(base, experts, hidden)  # type: ignore[arg-type]


class Vocabulary(nn.Module):
    """An embedding (or head) row an id; the rows of added tokens, and those of image ids, are parameters of their own."""

    no_weight_decay = ("weight", "added", "images")

    def __init__(self, config: BackboneConfig, image_ids: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocabulary, config.width))
        self.added = nn.Parameter(torch.empty(config.added_tokens, config.width)) if config.added_tokens else None
        self.images = nn.Parameter(torch.empty(image_ids, config.width)) if image_ids else None
        self.scale = config.embedding_scale

    @property
    def tables(self) -> list[Float[Tensor, "_ C"]]:
        """All of them, in the order of ids."""
        return [table for table in (self.weight, self.added, self.images) if table is not None]

    def forward(self, ids: Int[Tensor, "*n"]) -> Float[Tensor, "*n C"]:
        """Embeddings of text, scaled."""
        known = len(self.weight)
        if self.added is None:
            x = F.embedding(ids, self.weight)
        else:
            old = F.embedding(ids.clamp(max=known - 1), self.weight)
            x = torch.where((ids < known)[..., None], old, F.embedding((ids - known).clamp(min=0), self.added))
        return x if self.scale == 1.0 else x * self.scale


_DEFERRED: ContextVar[bool] = ContextVar("deferred", default=False)


@contextmanager
def deferred() -> Iterator[None]:
    """Backbones that are built in here have no memory: they get it, and their values, when they are sharded."""
    token = _DEFERRED.set(True)
    try:
        yield
    finally:
        _DEFERRED.reset(token)


class Backbone(nn.Module):
    """Text embedding, decoder layers, last norm, text head.

    Args:
        config: its shape.
        image_ids: rows of the vocabulary behind those of text, which a generator reads and predicts (Chameleon).
    """

    def __init__(self, config: BackboneConfig, image_ids: int = 0) -> None:
        super().__init__()
        self.config = config
        # Drawn here, and nothing else by the layers: a deferred backbone leaves the generator where any other leaves it.
        self.seed = int(torch.randint(2**62, (), device="cpu"))
        self.rotary = Rotary(SCHEMES[config.positions], config.head_size, config.rope_theta, config.rope_scaling)
        with torch.random.fork_rng(devices=[]), torch.device("meta") if _DEFERRED.get() else nullcontext():
            self.embedding = Vocabulary(config, image_ids)
            self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.depth))
            self.norm = Routed(lambda: RMSNorm(config.width, config.norm_eps), config.experts, "norms")
            self.head = None if config.tied_head else Vocabulary(config, image_ids)
        self.checkpointing = False  # recompute each layer in backward
        self.products: torch.dtype | None = None  # what layers' weights come in where they are gathered in another type
        self._layer: Step = DecoderLayer.step
        self._stack: Callable[..., Tensor] | None = None
        self._router_losses: list[Tensor] = []
        if not self.deferred:
            self.reset_parameters(lambda parameter, values: parameter.copy_(values))

    @property
    def deferred(self) -> bool:
        """Whether its weights have no memory yet."""
        return self.embedding.weight.is_meta

    @torch.no_grad()
    def reset_parameters(self, write: Callable[[nn.Parameter, Tensor], object]) -> None:
        """Write the values that training begins with; one whole parameter at a time is in memory.

        Normal of std 0.02, those that write to the residual stream smaller by sqrt(2 depth) (GPT-2); gains 1, biases 0,
        modulation 0, adapters as they are always begun with (A Kaiming uniform, B zero). Drawn on the CPU by a generator of
        their own: the same values on any device, and however they are sharded.
        """
        rng = torch.Generator().manual_seed(self.seed)
        for path, owner in self.named_modules():
            for name, parameter in owner.named_parameters(recurse=False):
                write(parameter, self.initial(path, owner, name, parameter, rng))

    def initial(self, path: str, owner: nn.Module, name: str, parameter: nn.Parameter, rng: torch.Generator) -> Tensor:
        """Values of one parameter `name` of `owner`, which is the module `path`; see `reset_parameters`."""
        values = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
        if isinstance(owner, (RMSNorm, QKNorm)):
            return values.fill_(1)
        if name in ("bias", "lora_B") or "modulation" in path:
            return values.zero_()
        if isinstance(owner, LoraLinear):
            for a in values.split(owner.rank):
                nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=rng)
            return values
        writes = path.endswith(".down") or ".o." in f"{path}." or name in ("down", "shared_down")
        return values.normal_(std=0.02 / (2 * self.config.depth) ** 0.5 if writes else 0.02, generator=rng)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile training's forward and backward of one layer, once for all layers and layouts.

        Regional: seconds, not minutes. Lengths stay symbols, so a new layout compiles nothing; validation and decoding
        run as they are written.
        """
        if self.config.moe is not None:
            raise ValueError("compile: expected no backbone.moe (whose routing no compiled layer can hold), got one")
        self._layer = _symbolic(DecoderLayer.step)

    def compile_decoding(self) -> None:
        """Compile all layers for a session: one or two graphs an expert, whatever the lengths."""
        if self.config.moe is not None:
            raise ValueError("compile: expected no backbone.moe (whose routing no compiled layer can hold), got one")

        self._stack = _symbolic(self.stack)

    def forward(
        self,
        x: Float[Tensor, "S C"],
        positions: Int[Tensor, "S A"],
        splits: Sequence[int],
        attention: PackedAttention,
        rows: Rows | None = None,
        tokens: Sequence[int] | None = None,
        layers: Sequence[int] = (-1,),
    ) -> Float[Tensor, "S LC"]:
        """Embeddings in expert order to hidden states in expert order, of each of `layers` side by side.

        `layers`: counted as Python does; the last is read after the last norm, others as they leave their layer.
        `rows`: conditions of images (N, C), and for each expert the image of its tokens, counted from 1 (0: none).
        `tokens`: how many rows of each slice of `splits` are tokens, which come first; all of them where nothing is said.
        """
        # An expert without rows still runs in training, so that its gradient is zero rather than missing.
        used = tuple(e for e, count in enumerate(splits) if count or torch.is_grad_enabled())
        counts = [splits[e] for e in used]
        # Copies in training: views into x would be another kind of input than later layers get, and another graph.
        xs = [part.clone() if torch.is_grad_enabled() else part for part in x.split(counts)]
        rotary = [self.rotary(p) for p in positions.split(counts)]
        if rows is not None:
            rows = rows[0], [rows[1][e] for e in used]
        real = None if self.config.moe is None else [(splits if tokens is None else tokens)[e] for e in used]
        self._router_losses = []
        if not torch.is_grad_enabled():
            if self._stack is not None and isinstance(attention, CacheView):
                return self._stack(xs, rotary, attention.packed(), used, rows, real, tuple(layers))
            return self.stack(xs, rotary, attention, used, rows, real, layers)
        states = _States(layers, len(self.layers))
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, DecoderLayer)
            args = xs, rotary, attention.layer(i), used, rows, real
            if self.checkpointing:
                xs, loss = checkpoint(layer, *args, through=self._layer, use_reentrant=False)
            else:
                xs, loss = layer(*args, through=self._layer)
            self._router_losses += [] if loss is None else [loss]
            states.add(i, xs)
        return states.together(self.last_norm(xs, used))

    def stack(
        self, xs: list[Tensor], rotary: list[tuple[Tensor, Tensor]], attention: PackedAttention,
        experts: tuple[int, ...], rows: Rows | None, tokens: Sequence[int] | None, layers: Sequence[int] = (-1,),
    ) -> Float[Tensor, "S LC"]:  # fmt: skip
        """Every layer without gradients; see `forward` and `DecoderLayer.forward`."""
        states = _States(layers, len(self.layers))
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, DecoderLayer)
            xs, _ = layer(xs, rotary, attention.layer(i), experts, rows, tokens)
            states.add(i, xs)
        return states.together(self.last_norm(xs, experts))

    def last_norm(self, xs: list[Tensor], experts: tuple[int, ...]) -> Float[Tensor, "S C"]:
        """Slices after the last layer, normed and put together."""
        normed = [self.norm[e](x) for x, e in zip(xs, experts, strict=True)]
        return torch.cat(normed) if len(normed) > 1 else normed[0]

    def as_weights_are(self) -> AbstractContextManager[None]:
        """No autocast, unless layers' weights are gathered in a smaller type than what they are multiplied with."""
        return torch.autocast(self.embedding.weight.device.type, self.products, self.products is not None)

    def router_loss(self) -> Float[Tensor, ""] | None:
        """Weighted balance and z loss of the last forward, a sum over tokens and a mean over layers; given out once.

        None without learned routers, and where no gradient is asked for: it is trained on, never validated.
        """
        losses, self._router_losses = self._router_losses, []
        return torch.stack(losses).mean() if losses else None

    @property
    def tables(self) -> list[Float[Tensor, "_ C"]]:
        """Rows of the text head, in the order of ids."""
        return (self.embedding if self.head is None else self.head).tables

    def image_rows(self) -> ImageRows:
        """The vocabulary, for a generator that has rows in it."""
        assert self.embedding.images is not None
        return ImageRows(self.embedding.images, self.tables, self.config.embedding_scale)

    def logits(self, hidden: Float[Tensor, "n C"]) -> Float[Tensor, "n V"]:
        """Scores over the vocabulary, in fp32 or better."""
        scores = torch.cat([F.linear(hidden, table) for table in self.tables], dim=-1)
        return scores.to(torch.promote_types(scores.dtype, torch.float32))


class _States:
    """Hidden states of the layers that are asked for, kept while the stack is gone through."""

    def __init__(self, layers: Sequence[int], depth: int) -> None:
        self.wanted = [-1 if layer in (-1, depth - 1) else layer % depth for layer in layers]
        self.kept: dict[int, Tensor] = {}

    def add(self, number: int, xs: list[Tensor]) -> None:
        """The stream behind layer `number`."""
        if number in self.wanted:
            self.kept[number] = torch.cat(xs)

    def together(self, last: Float[Tensor, "S C"]) -> Float[Tensor, "S LC"]:
        """All of them side by side, `last` in the place of the last."""
        found = [last if layer == -1 else self.kept[layer] for layer in self.wanted]
        return torch.cat(found, dim=1) if len(found) > 1 else found[0]


def _symbolic(function: Callable[..., Any], **kwargs: Any) -> Callable[..., Any]:
    """A function compiled with symbolic lengths."""
    from torch.fx.experimental import _config

    # Two experts may have equally many tokens in the first pack: that must not become a rule for all others. There is no
    # setting of one function's own for it: whatever else this process compiles is compiled so too.
    _config.use_duck_shape = False
    return torch.compile(function, dynamic=True, fullgraph=True, **kwargs)
