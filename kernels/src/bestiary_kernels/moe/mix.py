"""How the C++ mixtures are called, in whatever form their matrices are."""

from collections.abc import Callable
from struct import Struct

from torch import Tensor

from bestiary_kernels import library
from bestiary_kernels.activation import KINDS

__all__ = ["mixed"]

_CALL = Struct("6q")  # MoeCall in cpu.cpp


def mixed(
    mix: Callable[..., int],
    act: str,
    x_TD: Tensor,
    gate_up: int | bytes,
    down: int | bytes,
    weights_Tk: Tensor,
    experts_Tk: Tensor,
    experts: int,
    inner: int,
) -> Tensor:
    """Return [T, D] of so many experts, whose matrices lie where `gate_up` and `down` say. Raises as `moe` does."""
    (tokens, width), top_k = x_TD.shape, experts_Tk.shape[1]
    y = x_TD.new_empty((tokens, width))
    failed = mix(
        KINDS[act],
        x_TD.data_ptr(),
        gate_up,
        down,
        weights_Tk.data_ptr(),
        experts_Tk.data_ptr(),
        y.data_ptr(),
        _CALL.pack(tokens, experts, width, inner, top_k, x_TD.stride(0)),
    )
    if failed:
        library.fail("moe", failed)
    return y
