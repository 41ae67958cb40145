"""What we are compared with: other libraries as they are shipped, and patterns of other code written again."""

import functools
import importlib
import tempfile
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from experiments.benchmarks.models import made_on
from unimodal.backbone import Backbone, BackboneConfig
from unimodal.backbone.positions import rotate
from unimodal.importers.huggingface import load_text


def find(module: str) -> ModuleType | None:
    """A library, if it is installed."""
    try:
        return importlib.import_module(module)
    except ImportError:
        return None


# --- transfusion-pytorch


def transfusion(config: BackboneConfig, image_tokens: int, latent: int) -> Any:
    """transfusion-pytorch of the same shape, or None where it is not installed."""
    if find("transfusion_pytorch") is None:
        return None
    inner: Any = importlib.import_module("transfusion_pytorch.transfusion")
    inner.logger.disable("transfusion_pytorch")
    inner.tqdm = functools.partial(tqdm, disable=True)  # its progress bar costs time
    torch.manual_seed(0)
    return inner.Transfusion(
        num_text_tokens=config.vocabulary, dim_latent=latent, modality_default_shape=(image_tokens,),
        transformer={
            "dim": config.width, "depth": config.depth, "dim_head": config.head_size, "heads": config.heads,
        },
    )  # fmt: skip


def transfusion_batch(config: BackboneConfig, count: int, text: int, image_tokens: int, latent: int) -> list[Any]:
    """Samples of `text` random ids and an image each."""
    rng = torch.Generator().manual_seed(0)
    return [
        [torch.randint(0, config.vocabulary, (text,), generator=rng), torch.randn(image_tokens, latent, generator=rng)]
        for _ in range(count)
    ]


# --- transformers


def llama(config: BackboneConfig, context: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """transformers' Llama of the same shape (one expert of ours)."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()

    shape = LlamaConfig(
        hidden_size=config.width, num_hidden_layers=config.depth, num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads, head_dim=config.head_size, intermediate_size=config.mlp_width,
        vocab_size=config.vocabulary, max_position_embeddings=context, rms_norm_eps=config.norm_eps,
        tie_word_embeddings=False, attn_implementation="sdpa", bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    with made_on(device, dtype):
        return LlamaForCausalLM(shape).eval()


def give_weights(source: Any, backbone: Backbone) -> None:
    """Give a backbone the weights of transformers' Llama, by way of a folder."""
    with tempfile.TemporaryDirectory() as folder:
        source.save_pretrained(folder)
        load_text(backbone, folder)


# --- patterns


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Fused attention with an S x S boolean mask; (S, H, E) in and out."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)[0].transpose(0, 1)


def full_logits_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy over all logits at once, in fp32."""
    return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")


class NaiveCache:
    """A cache as BAGEL's: every call makes keys and values of the full length and scatters the past into them.

    Keeps the signature of `unimodal.attention.PackedAttention`, for one document that grows token by token. `keep` says
    whether a call's keys stay.
    """

    def __init__(self, layers: int, keep: bool = True) -> None:
        self.past: dict[int, tuple[Tensor, Tensor]] = {}
        self.layers, self.keep, self.number = layers, keep, 0

    def layer(self, number: int) -> "NaiveCache":
        """This cache, whose next call is layer `number`."""
        self.number = number
        return self

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of new tokens, (T, H, E), which see all of the past and each other."""
        new = len(k)
        past = self.past.get(self.number)
        before = 0 if past is None else len(past[0])
        lengths = torch.tensor([before + new], dtype=torch.int32, device=q.device)
        old_at = torch.arange(before, device=q.device)
        new_at = torch.arange(before, before + new, device=q.device)
        merged = []
        for fresh, held in zip((k, v), past or (None, None)):
            whole = fresh.new_zeros(int(lengths.sum().item()), *fresh.shape[1:])  # its host sync, too
            whole[new_at] = fresh
            if held is not None:
                whole[old_at] = held
            merged.append(whole)
        if self.keep:
            self.past[self.number] = (merged[0], merged[1])
        queries, keys, values = (x.transpose(0, 1)[None] for x in (q, *merged))
        causal = past is None and new > 1
        grouped = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(queries, keys, values, is_causal=causal, enable_gqa=grouped)
        return out[0].transpose(0, 1)


class ScatterLayer(nn.Module):
    """A decoder layer routed as BAGEL's: every projection writes two index sets into a fresh tensor.

    Reads the weights of one of our layers; `places` are the tokens of each expert, in sequence order.
    """

    def __init__(self, layer: nn.Module, places: list[Tensor]) -> None:
        super().__init__()
        self.layer, self.places = layer, places

    def route(self, part: str, x: Tensor, width: int) -> Tensor:
        """One module of each expert over its own tokens."""
        parts = [getattr(self.layer, part)[e](x[at]) for e, at in enumerate(self.places)]
        out = x.new_zeros((len(x), width), dtype=parts[0].dtype)
        for at, values in zip(self.places, parts, strict=True):
            out[at] = values
        return out

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], attention: Any) -> Tensor:
        """(S, C) in sequence order."""
        layer: Any = self.layer
        width = x.shape[1]
        sizes = [heads * layer.head_dim for heads in layer.heads]
        qkv = self.route("qkv", self.route("attention_norm", x, width), sum(sizes))
        q, k, v = (part.unflatten(1, (-1, layer.head_dim)) for part in qkv.split(sizes, dim=1))
        q, k = rotate(q, *rotary), rotate(k, *rotary)
        x = x + self.route("o", attention(q, k, v).flatten(1), width)
        return x + self.route("mlp", self.route("mlp_norm", x, width), width)
