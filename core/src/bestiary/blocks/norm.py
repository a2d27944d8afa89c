"""Normalisation over the hidden width, fused with the addition before it."""

from torch import Tensor, nn

import bestiary_kernels as kernels
from bestiary.blocks.leaf import Leaf

__all__ = ["LayerNorm", "Norm", "RMSNorm"]


class Norm(Leaf):
    """(norm(h), h) with h = x + residual. The residual's memory may be used up for h."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.width, self.eps = width, eps
        self.parts = {"out": width}


class RMSNorm(Norm):
    """x / rms(x) x weight (Zhang and Sennrich 2019, arXiv 1910.07467).

    With an `offset` o the weight counts as o + weight, and the product is rounded once, as Gemma does.
    """

    weight: nn.Parameter

    def __init__(self, width: int, eps: float, *, offset: float = 0.0) -> None:
        super().__init__(width, eps)
        self.offset = offset

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """A weight [width]."""
        return {"weight": (self.width,)}

    def forward(self, x_TD: Tensor, residual_TD: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """[T, width] twice."""
        return kernels.add_rms_norm(x_TD, residual_TD, self.weight, self.eps, offset=self.offset)


class LayerNorm(Norm):
    """(x - mean(x)) / std(x) x weight + bias (Ba et al. 2016, arXiv 1607.06450)."""

    weight: nn.Parameter
    bias: nn.Parameter

    def __init__(self, width: int, eps: float, *, bias: bool = True) -> None:
        super().__init__(width, eps)
        self.has_bias = bias

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """A weight [width] and perhaps a bias [width]."""
        return {"weight": (self.width,), **({"bias": (self.width,)} if self.has_bias else {})}

    def forward(self, x_TD: Tensor, residual_TD: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """[T, width] twice."""
        bias = self.bias if self.has_bias else None
        return kernels.add_layer_norm(x_TD, residual_TD, self.weight, bias, self.eps)
