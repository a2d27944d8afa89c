"""Activations in torch: the meaning of `activation` and `gated_activation`."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["ACTIVATIONS", "activation", "gated_activation"]

#: In the order of their numbers in cpu.cpp.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
    "relu2": lambda x: functional.relu(x).square(),  # So et al., arXiv 2109.08668
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),  # Hendrycks and Gimpel, arXiv 1606.08415
}


def activation(x: Tensor, kind: str) -> Tensor:
    """Return act(x); float32 inside, rounded once to the input's dtype."""
    return ACTIVATIONS[kind](x.float()).to(x.dtype)


def gated_activation(gate_up: Tensor, kind: str = "silu") -> Tensor:
    """Return act(gate) * up, where gate is the first half of the last dimension (Shazeer, arXiv 2002.05202).

    Float32 inside, rounded once to the input's dtype.
    """
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (ACTIVATIONS[kind](gate) * up).to(gate_up.dtype)
