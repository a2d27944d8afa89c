"""A matrix for each head, in torch: the meaning of `heads_linear`."""

import torch
from torch import Tensor

__all__ = ["heads_linear"]


def heads_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return [T, H, N]: x [T, H, K] times weight [H, K, N], head by head."""
    return torch.bmm(x.transpose(0, 1), weight).transpose(0, 1)
