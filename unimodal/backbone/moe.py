"""A learned router over small MLPs (mixture of experts as in ARIA, arXiv 2410.05993).

Letters: n tokens, C width, E experts to choose from, k of them read each token, F hidden width of one.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from unimodal.backbone.config import Moe


class RoutedMLP(nn.Module):
    """The k likeliest of E SwiGLUs, weighted by a softmax over them, plus `shared` ones that read every token.

    Nothing is dropped: copies of tokens are sorted by expert, and each expert that is used is one pair of matrix products.
    """

    def __init__(self, width: int, moe: Moe) -> None:
        super().__init__()
        self.moe = moe
        self.router = nn.Linear(width, moe.experts, bias=False)
        self.gate_up = nn.Parameter(torch.empty(moe.experts, 2 * moe.width, width))
        self.down = nn.Parameter(torch.empty(moe.experts, width, moe.width))
        if moe.shared:  # several are one wide one
            self.shared_gate_up = nn.Parameter(torch.empty(2 * moe.shared * moe.width, width))
            self.shared_down = nn.Parameter(torch.empty(width, moe.shared * moe.width))

    def forward(self, x: Float[Tensor, "n C"]) -> tuple[Float[Tensor, "n C"], Float[Tensor, ""] | None]:
        """Tokens to tokens, and in training the router's loss, summed over them."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):  # rounded logits would choose other experts
            logits = F.linear(x.to(dtype), self.router.weight.to(dtype))  # (n, E)
            top, chosen = logits.topk(self.moe.top_k)  # (n, k)
            counts = chosen.flatten().bincount(minlength=self.moe.experts)
            loss = self.loss(logits, counts) if torch.is_grad_enabled() else None
        y = self.experts(x, chosen, counts, top.softmax(-1))
        if self.moe.shared:
            y = y + swiglu(x, self.shared_gate_up, self.shared_down)
        return y, loss

    def experts(
        self, x: Float[Tensor, "n C"], chosen: Int[Tensor, "n k"], counts: Int[Tensor, " E"],
        weights: Float[Tensor, "n k"],
    ) -> Float[Tensor, "n C"]:  # fmt: skip
        """Every token through its experts; their weighted sum."""
        order = chosen.flatten().argsort(stable=True)  # copy i of token j is row j k + i
        xs = x.index_select(0, order // self.moe.top_k).split(counts.tolist())
        gate_up, down = self.gate_up.unbind(), self.down.unbind()
        # Without any token the first still runs, so that gradients are zero rather than missing.
        used = [e for e, rows in enumerate(xs) if len(rows)] or [0]
        ys = torch.cat([swiglu(xs[e], gate_up[e], down[e]) for e in used])  # (n*k, C)
        ys = ys.index_select(0, order.argsort()).view(*chosen.shape, x.shape[1])  # (n, k, C)
        return torch.einsum("nk,nkc->nc", weights.to(ys.dtype), ys)

    def loss(self, logits: Float[Tensor, "n E"], counts: Int[Tensor, " E"]) -> Float[Tensor, ""]:
        """n times the weighted balance loss E sum_e f_e P_e and z loss, the mean of logsumexp(logits)^2.

        f_e: the share of all n k choices that fell on expert e. P_e: its mean probability. Balanced, their sum is 1 / E;
        with every token at one expert, 1.
        """
        n, k = len(logits), self.moe.top_k
        chosen = counts.to(logits.dtype) / max(n * k, 1)  # f
        likely = logits.softmax(-1).sum(0)  # n P
        z = logits.logsumexp(-1).square().sum()
        return self.moe.balance * self.moe.experts * (chosen @ likely) + self.moe.z * z


def swiglu(x: Float[Tensor, "n C"], gate_up: Float[Tensor, "F2 C"], down: Float[Tensor, "C F"]) -> Float[Tensor, "n C"]:
    """down(silu(gate(x)) * up(x)); gate and up are one matrix, gate first."""
    gate, up = F.linear(x, gate_up).chunk(2, dim=-1)  # (n, F) each
    return F.linear(F.silu(gate) * up, down)
