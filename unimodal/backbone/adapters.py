"""Low-rank adapters over weights that several experts share (LoRA, arXiv 2106.09685).

Letters: n tokens, I input and O output channels, r rank.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from unimodal.backbone.config import Lora


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
