"""Gated activations in torch: the meaning of `gated_activation`."""

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional

__all__ = ["ACTIVATIONS", "gated_activation"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
}


def gated_activation(gate_up: Tensor, kind: str = "silu") -> Tensor:
    """Return act(gate) * up, where gate is the first half of the last dimension (Shazeer, arXiv 2002.05202).

    Float32 inside, rounded once to the input's dtype.
    """
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (ACTIVATIONS[kind](gate) * up).to(gate_up.dtype)
