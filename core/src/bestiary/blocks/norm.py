"""Normalisation over the hidden width, fused with the addition before it."""

from torch import Tensor, nn

import bestiary_kernels as kernels
from bestiary.blocks.leaf import Leaf

__all__ = ["RMSNorm"]


class RMSNorm(Leaf):
    """x / rms(x) x weight (Zhang and Sennrich 2019, arXiv 1910.07467)."""

    weight: nn.Parameter

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.width, self.eps = width, eps
        self.parts = {"out": width}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """A weight [width]."""
        return {"weight": (self.width,)}

    def forward(self, x_TD: Tensor, residual_TD: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(norm(h), h) with h = x + residual. The residual's memory may be used up for h."""
        return kernels.add_rms_norm(x_TD, residual_TD, self.weight, self.eps)
