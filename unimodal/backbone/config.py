"""What a backbone is made of."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from unimodal_generators.base import TokenKind

TAKEN = (
    "shared",
    "embedding",
    "head",
    "modulation",
    "generator",
    "vision",
    "connector",
)  # names of other parts of a model
PARTS = ("attention", "mlp", "norms")
Part = Literal["attention", "mlp", "norms"]


@dataclass(frozen=True)
class Lora:
    """A low-rank adapter an expert on weights that all experts share (arXiv 2106.09685), as peft lays it out.

    Args:
        rank: of the update B A.
        alpha: the update is scaled by alpha / rank.
        experts: who has one; the others read the shared weights as they are.
        parts: of the layer; only those that are not held by expert can have one.
    """

    rank: int
    alpha: float
    experts: tuple[str, ...] = ("image",)
    parts: tuple[Part, ...] = ("attention", "mlp")

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"experts.lora.rank: expected at least 1, got {self.rank}")
        for part in self.parts:
            if part not in ("attention", "mlp"):
                raise ValueError(f"experts.lora.parts: expected attention or mlp, which have matrices, got {part}")
        if not self.parts:
            raise ValueError("experts.lora.parts: expected attention, mlp or both, got none")
        if not self.experts:
            raise ValueError("experts.lora.experts: expected at least one, got none")


@dataclass(frozen=True)
class Moe:
    """A learned router over small MLPs in the place of each MLP (ARIA, arXiv 2410.05993).

    Args:
        experts: how many the router chooses from; where tokens go is decided on the host, so a GPU waits once a layer.
        top_k: how many read each token.
        width: hidden width of one.
        shared: how many more read every token.
        balance: weight of the load-balancing loss (Switch Transformer, arXiv 2101.03961, eq. 4).
        z: weight of the router's z loss (ST-MoE, arXiv 2202.08906, eq. 5).
    """

    experts: int
    top_k: int
    width: int
    shared: int = 0
    balance: float = 0.01
    z: float = 0.001

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.experts:
            raise ValueError(f"backbone.moe.top_k: expected 1 to experts {self.experts}, got {self.top_k}")
        for name, least in (("width", 1), ("shared", 0), ("balance", 0), ("z", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"backbone.moe.{name}: expected at least {least}, got {getattr(self, name)}")


@dataclass(frozen=True)
class Experts:
    """Which weights are held once an expert, and which expert reads each kind of token.

    All three parts: a full mixture of transformers (arXiv 2411.04996; BAGEL, LlamaFusion). `mlp` alone: FFN experts.
    `attention` and `mlp`: a visual expert (CogVLM, arXiv 2311.03079). None: a dense model, to which `lora` may add
    adapters by expert.
    """

    attention: bool = False  # q, k, v, o and the norms of q and k
    mlp: bool = False
    norms: bool = False  # before attention, before the MLP, and the last one
    text: str = "text"
    understanding: str = "text"
    clean: str = "image"
    learned: str = "image"
    lora: Lora | None = None

    def __post_init__(self) -> None:
        named = dict.fromkeys((self.text, self.understanding, self.clean, self.learned))
        for name in named:
            if name in TAKEN or not name.isidentifier() or hasattr(nn.ModuleDict, name):
                raise ValueError(f"experts: expected a word other than {', '.join(TAKEN)} for an expert, got {name!r}")
        for name in self.lora.experts if self.lora else ():
            if name not in named:
                raise ValueError(f"experts.lora.experts: expected some of {', '.join(named)}, got {name}")
        for part in self.lora.parts if self.lora else ():
            if getattr(self, part):
                raise ValueError(f"experts.lora.parts: expected parts that experts share, got {part}, held by expert")

    @property
    def names(self) -> tuple[str, ...]:
        """Experts in the order of the kinds they first appear in; one when nothing differs between them."""
        if not (self.attention or self.mlp or self.norms or self.lora):
            return ("shared",)
        return tuple(dict.fromkeys((self.text, self.understanding, self.clean, self.learned)))

    def index(self, kind: TokenKind) -> int:
        """Which expert reads tokens of `kind`."""
        name = (self.text, self.understanding, self.clean, self.learned)[kind]
        return self.names.index(name) if len(self.names) > 1 else 0


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the length they were trained at, under Hugging Face's names.

    `linear`: every frequency divided by `factor`. `llama3` (Llama 3.1): long wavelengths only, with a ramp between
    `high_freq_factor` and `low_freq_factor` wavelengths of `original_length`. `yarn` (arXiv 2309.00071): a ramp between
    the dimensions that turn `beta_fast` and `beta_slow` times in `original_length`, and attention scaled.
    """

    kind: Literal["linear", "llama3", "yarn"]
    factor: float
    original_length: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "llama3", "yarn"):
            raise ValueError(f"rope_scaling.kind: expected linear, llama3 or yarn, got {self.kind}")
        if self.factor < 1:
            raise ValueError(f"rope_scaling.factor: expected at least 1, got {self.factor}")
        if self.kind != "linear" and self.original_length is None:
            raise ValueError(f"rope_scaling.original_length: {self.kind} needs the length it was trained at, got none")


@dataclass(frozen=True)
class BackboneConfig:
    """Shape of the decoder. What is expensive to get wrong has no default.

    Args:
        width: channels of a token.
        depth: layers.
        heads: of queries.
        kv_heads: of keys and values; queries share them in groups.
        mlp_width: hidden width of the MLP.
        vocabulary: rows of the text embedding and head; a text tokenizer may use fewer.
        positions: scheme of position ids.
        experts: what is held by expert.
        attention: back end; `auto` takes flex on GPU and sdpa on CPU.
        head_dim: channels of a head, where it is not width / heads.
        qkv_bias: biases of q, k and v (Qwen2).
        qk_norm: RMSNorm of every query and key head (Qwen3).
        tied_head: the text head is the embedding.
        added_tokens: further rows of embedding and head after `vocabulary`, for the special tokens of an imported text
            model, whose own rows can then stay as they are.
        embedding_scale: text embeddings are multiplied by it (Gemma: sqrt(width)).
        adaln: whether the generator's time condition scales, shifts and gates image tokens in every layer.
        moe: a learned router in the place of each MLP.
        rope_theta: base of the rotary frequencies.
        rope_scaling: how they are stretched.
        norm_eps: of every RMSNorm.
    """

    width: int
    depth: int
    heads: int
    kv_heads: int
    mlp_width: int
    vocabulary: int
    positions: Literal["sequential", "block", "mrope", "rope2d"]
    experts: Experts = Experts()
    attention: Literal["auto", "flex", "xformers", "sdpa", "reference"] = "auto"
    head_dim: int | None = None
    qkv_bias: bool = False
    qk_norm: bool = True
    tied_head: bool = True
    added_tokens: int = 0
    embedding_scale: float = 1.0
    adaln: bool = False
    moe: Moe | None = None
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("width", "depth", "mlp_width", "vocabulary"):
            if getattr(self, name) < 1:
                raise ValueError(f"backbone.{name}: expected at least 1, got {getattr(self, name)}")
        if self.positions not in ("sequential", "block", "mrope", "rope2d"):
            raise ValueError(f"backbone.positions: expected sequential, block, mrope or rope2d, got {self.positions}")
        if self.positions == "block" and self.width % 4:
            raise ValueError(f"backbone.width: positions block need a multiple of 4, got {self.width}")
        if self.heads < 1 or (self.head_dim is None and self.width % self.heads) or self.head_size % 2:
            size = f"width {self.width}" if self.head_dim is None else f"head_dim {self.head_dim}"
            raise ValueError(f"backbone.heads: expected heads of even size, got {size}, heads {self.heads}")
        if self.kv_heads < 1 or self.heads % self.kv_heads:
            raise ValueError(f"backbone.kv_heads: expected a divisor of heads {self.heads}, got {self.kv_heads}")
        if self.added_tokens < 0:
            raise ValueError(f"backbone.added_tokens: expected at least 0, got {self.added_tokens}")
        if self.moe is not None and self.experts.lora is not None and "mlp" in self.experts.lora.parts:
            raise ValueError("experts.lora.parts: expected attention alone beside backbone.moe, got mlp")

    @property
    def head_size(self) -> int:
        """Channels of one head."""
        return self.width // self.heads if self.head_dim is None else self.head_dim

    @property
    def rows(self) -> int:
        """Ids that have an embedding."""
        return self.vocabulary + self.added_tokens

    def held(self, part: Part) -> Sequence[str]:
        """Names under which the weights of a part are held."""
        return self.experts.names if getattr(self.experts, part) else ("shared",)
