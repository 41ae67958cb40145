"""Channels brought to mean 0 and deviation 1 over the images of all processes."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from unimodal_tokenizers.quantizers.base import mean_over_processes, precise


class Normalise(nn.BatchNorm1d):
    """Batch normalisation (arXiv 1502.03167) without a learned scale, in training over the batches of all processes.

    torch's own counts one process' vectors, and its variant over processes exists on GPUs only. A batch that is not
    finite does not enter the stored mean and variance: they could not forget it.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, dim: int, momentum: float = 0.02) -> None:
        """Args:

        dim: channels D.
        momentum: share of a batch in the stored mean and variance.
        """
        super().__init__(dim, affine=False)
        self.share = momentum

    def forward(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        """Vectors, of equally many images on every process, to (x - mean) / deviation, computed in single precision."""
        z = precise(x)
        if self.training:
            mean = mean_over_processes(z.mean(0))  # (D,)
            variance = mean_over_processes((z - mean).square().mean(0))
            self._count(mean.detach(), variance.detach())
        else:
            mean, variance = precise(self.running_mean), precise(self.running_var)
        return ((z - mean) * (variance + self.eps).rsqrt()).to(x)

    def _count(self, mean: Float[Tensor, " D"], variance: Float[Tensor, " D"]) -> None:
        finite = (mean + variance).isfinite().all()
        for stored, now in ((self.running_mean, mean), (self.running_var, variance)):
            stored.copy_(torch.where(finite, stored.lerp(now.to(stored), self.share), stored))
