"""Low-rank adapters over weights that several experts share (LoRA, arXiv 2106.09685).

Letters: n tokens, I input and O output channels, r rank.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor, nn

from unimodal.backbone.config import Lora

# What peft calls the sections of our projections in a Llama or Qwen.
SECTIONS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "mlp.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down": ("mlp.down_proj",),
}


class LoraLinear(nn.Module):
    """W x + (alpha / r) B A x with a shared W that is not this module's; A as peft begins it, B zero.

    A fused projection has one pair (A, B) a section of its outputs (q, k, v; gate, up), as if they were apart.
    """

    def __init__(self, base: nn.Module, lora: Lora | None, sections: Sequence[int]) -> None:
        super().__init__()
        assert isinstance(base, nn.Linear)
        assert lora is not None
        self._base = [base]  # in a list: its weights are counted where they are held
        self.sections, self.rank, self.scale = list(sections), lora.rank, lora.alpha / lora.rank
        self.lora_A = nn.Parameter(torch.empty(len(self.sections) * lora.rank, base.in_features))
        self.lora_B = nn.Parameter(torch.zeros(sum(self.sections), lora.rank))
        for a in self.lora_A.data.split(lora.rank):
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))

    def forward(self, x: Float[Tensor, "n I"]) -> Float[Tensor, "n O"]:
        """Tokens to tokens."""
        inner = F.linear(x, self.lora_A).split(self.rank, dim=-1)  # (n, r) a section
        outer = [F.linear(a, b) for a, b in zip(inner, self.lora_B.split(self.sections), strict=True)]
        return self._base[0](x) + self.scale * torch.cat(outer, dim=-1)


def peft_state(backbone: nn.Module, expert: str) -> dict[str, Float[Tensor, "_ _"]]:
    """The adapters of an expert of `Backbone` under peft's names: one pair (A, B) a projection."""
    state: dict[str, Tensor] = {}
    for name, adapter in backbone.named_modules():
        if isinstance(adapter, LoraLinear):
            _, layer, part, _, owner, *inner = name.split(".")  # layers.0.mlp.adapters.image.gate_up
            if owner == expert:
                sections = SECTIONS[".".join([part, *inner])]
                a, b = adapter.lora_A.detach().split(adapter.rank), adapter.lora_B.detach().split(adapter.sections)
                for section, *pair in zip(sections, a, b, strict=True):
                    prefix = f"base_model.model.model.layers.{layer}.{section}"
                    state |= {f"{prefix}.lora_{x}.weight": w for x, w in zip("AB", pair, strict=True)}
    if not state:
        raise ValueError(f"expert: expected one that has an adapter (experts.lora), got {expert}")
    return state


def save_peft(backbone: nn.Module, expert: str, lora: Lora, folder: Path) -> None:
    """Write the adapters of an expert as a folder that peft loads onto the text model the backbone began as."""
    state = peft_state(backbone, expert)
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": None, "inference_mode": True,
        "r": lora.rank, "lora_alpha": lora.alpha, "lora_dropout": 0.0, "bias": "none",
        "target_modules": sorted({name.split(".")[-3] for name in state}),
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: w.cpu().clone() for name, w in state.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
