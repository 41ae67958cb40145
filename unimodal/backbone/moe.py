"""A learned router over small MLPs (mixture of experts as in ARIA, arXiv 2410.05993)."""

from torch import Tensor, nn

from unimodal.backbone.config import Moe


class RoutedMLP(nn.Module):
    """Placeholder until the router is written."""

    loss: Tensor | None = None

    def __init__(self, width: int, moe: Moe) -> None:
        super().__init__()
        raise NotImplementedError
