"""Activations, plain and gated. Shapes: T tokens, I inner width."""

import torch
from torch import Tensor

from bestiary_kernels import gpu, library
from bestiary_kernels.activation import reference

__all__ = ["KINDS", "PLAIN_KINDS", "activation", "gated_activation"]

#: By their numbers in cpu.cpp.
PLAIN_KINDS = {kind: number for number, kind in enumerate(reference.ACTIVATIONS)}
#: Those that gate.
KINDS = {kind: PLAIN_KINDS[kind] for kind in ("silu", "gelu", "gelu_tanh", "relu")}


def activation(x: Tensor, kind: str) -> Tensor:
    """Return act(x), of any shape.

    `kind` is silu, gelu (the exact one), gelu_tanh, relu, relu2 (its square) or quick_gelu, x sigmoid(1.702 x).
    Computed in float32, rounded once. Raises ValueError for an unknown kind.
    """
    if kind not in reference.ACTIVATIONS:
        raise ValueError(f"activation: kind {kind!r} is unknown; choose one of {', '.join(reference.ACTIVATIONS)}")
    if (on_gpu := gpu.kernels("activation", x)) is not None:
        found: Tensor = on_gpu.activation(x, kind)
        return found
    kernels, is_bf16, rows = library.native(x), library.IS_BF16.get(x.dtype), _rows(x)
    if kernels is None or is_bf16 is None or rows is None:
        return (_plain_operator if library.is_traced(x) else reference.activation)(x, kind)
    y = x.new_empty(x.shape)
    kernels.activation(is_bf16, PLAIN_KINDS[kind], x.data_ptr(), y.data_ptr(), *rows)
    return y


def _rows(x: Tensor) -> tuple[int, int, int] | None:
    """Rows, their width and stride: one row of what is dense; None where rows are not."""
    if x.is_contiguous():
        return 1, x.numel(), 0
    return (x.shape[0], x.shape[1], x.stride(0)) if x.dim() == 2 and x.stride(1) == 1 else None


def gated_activation(gate_up_T2I: Tensor, kind: str = "silu") -> Tensor:
    """Return act(gate) * up of shape [T, I]; gate is the first half of each row, up the second.

    `kind` is silu, gelu (the exact one), gelu_tanh or relu. Computed in float32, rounded once. Raises ValueError for
    an unknown kind or an odd width.
    """
    number = KINDS.get(kind)
    if number is None:
        raise ValueError(f"gated_activation: kind {kind!r} is unknown; choose one of {', '.join(KINDS)}")
    shape = gate_up_T2I.shape
    if shape[-1] % 2:
        raise ValueError(f"gated_activation: width {shape[-1]} has no two halves")
    if (on_gpu := gpu.kernels("activation", gate_up_T2I)) is not None:
        found: Tensor = on_gpu.gated_activation(gate_up_T2I, kind)
        return found
    kernels = library.native(gate_up_T2I)
    is_bf16 = library.IS_BF16.get(gate_up_T2I.dtype)
    if kernels is None or is_bf16 is None or len(shape) != 2 or gate_up_T2I.stride(1) != 1:
        function = _operator if library.is_traced(gate_up_T2I) else reference.gated_activation
        return function(gate_up_T2I, kind)
    rows, width = shape[0], shape[1] // 2
    y = gate_up_T2I.new_empty(rows, width)
    kernels.gated_activation(is_bf16, number, gate_up_T2I.data_ptr(), y.data_ptr(), rows, width, gate_up_T2I.stride(0))
    return y


@torch.library.custom_op("bestiary::gated_activation", mutates_args=())
def _operator(gate_up: Tensor, kind: str = "silu") -> Tensor:
    return reference.gated_activation(gate_up, kind)


@_operator.register_fake
def _shapes(gate_up: Tensor, kind: str = "silu") -> Tensor:
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


@torch.library.custom_op("bestiary::activation", mutates_args=())
def _plain_operator(x: Tensor, kind: str) -> Tensor:
    return reference.activation(x, kind)


@_plain_operator.register_fake
def _plain_shape(x: Tensor, kind: str) -> Tensor:
    return torch.empty_like(x)
