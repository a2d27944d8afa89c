"""Selective scan: the recurrence of a state space whose steps depend on the input.

Shapes: T tokens, S sequences, C channels, N numbers of state for each channel.
"""

from struct import Struct

import torch
from torch import Tensor

from bestiary_kernels import gpu, library
from bestiary_kernels.scan import reference
from bestiary_kernels.states import are_known, check, fail

__all__ = ["selective_scan"]

_CALL = Struct("11q")  # ScanCall in cpu.cpp


def selective_scan(
    x_TC: Tensor,
    dt_TC: Tensor,
    a_CN: Tensor,
    b_TN: Tensor,
    c_TN: Tensor,
    d_C: Tensor,
    states: Tensor,
    read_slots: Tensor,
    write_slots: Tensor,
    query_starts: Tensor,
    fresh: Tensor,
    gate_TC: Tensor | None = None,
    softplus: bool = False,
) -> Tensor:
    """Return y [T, C] of h = exp(dt a) h + dt x b, y = c . h + d x, token after token (Mamba, arXiv 2312.00752).

    dt is the length of each step, or with `softplus` what that function makes it of; a is negative. With a gate
    y becomes y silu(gate). `states` is float32 [slots, C, N]: h of each sequence; slots, starts and `fresh` are as in
    `causal_conv`. Computed in float32, rounded once to x's dtype. Raises ValueError for shapes or dtypes that do not
    fit, IndexError for a slot outside `states`; nothing is written then.
    """
    check("selective_scan", read_slots, write_slots, query_starts, fresh)
    (tokens, channels), (_, numbers) = x_TC.shape, a_CN.shape
    if (
        dt_TC.shape != x_TC.shape
        or a_CN.shape[0] != channels
        or not b_TN.shape == c_TN.shape == (tokens, numbers)
        or d_C.shape != (channels,)
        or states.shape[1:] != a_CN.shape
        or states.dtype is not torch.float32
        or not (gate_TC is None or gate_TC.shape == x_TC.shape)
    ):
        raise ValueError("selective_scan: the shapes of x, dt, a, b, c, d, gate and states (float32) do not fit")
    given = (x_TC, dt_TC, a_CN, b_TN, c_TN, d_C, states, read_slots, write_slots, query_starts, fresh)
    if (on_gpu := gpu.kernels("scan", x_TC)) is not None:
        found: Tensor = on_gpu.selective_scan(*given, gate_TC, softplus)
        return found
    kernels = library.native(x_TC)
    rows = (x_TC, dt_TC, b_TN, c_TN) if gate_TC is None else (x_TC, dt_TC, b_TN, c_TN, gate_TC)
    if (
        kernels is None
        or not _are_known(a_CN, d_C, rows)
        or not are_known(states, read_slots, write_slots, query_starts, fresh)
    ):
        return (_operator if library.is_traced(x_TC) else reference.selective_scan)(*given, gate_TC, softplus)
    y = x_TC.new_empty(x_TC.shape)
    sizes = (tokens, fresh.shape[0], channels, numbers, states.shape[0], softplus)
    strides = [row.stride(0) for row in rows]
    failed = kernels.selective_scan(
        library.IS_BF16[x_TC.dtype],
        *(tensor.data_ptr() for tensor in given[:6]),
        None if gate_TC is None else gate_TC.data_ptr(),
        *(tensor.data_ptr() for tensor in given[6:]),
        y.data_ptr(),
        _CALL.pack(*sizes, *strides, *[0] * (5 - len(strides))),
    )
    if failed:
        fail("selective_scan", failed, tokens)
    return y


def _are_known(a: Tensor, d: Tensor, rows: tuple[Tensor, ...]) -> bool:
    """Whether the C++ function knows the layouts: rows may be strided, all else is dense."""
    dtype = rows[0].dtype
    return (
        dtype in library.IS_BF16
        and torch.float32 is a.dtype is d.dtype
        and a.is_contiguous()
        and d.is_contiguous()
        and all(row.dtype is dtype and row.stride(1) == 1 for row in rows)
    )


@torch.library.custom_op("bestiary::selective_scan", mutates_args=("states",))
def _operator(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    states: Tensor,
    read_slots: Tensor,
    write_slots: Tensor,
    query_starts: Tensor,
    fresh: Tensor,
    gate: Tensor | None,
    softplus: bool,
) -> Tensor:
    return reference.selective_scan(
        x, dt, a, b, c, d, states, read_slots, write_slots, query_starts, fresh, gate, softplus
    )


@_operator.register_fake
def _shape(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    states: Tensor,
    read_slots: Tensor,
    write_slots: Tensor,
    query_starts: Tensor,
    fresh: Tensor,
    gate: Tensor | None,
    softplus: bool,
) -> Tensor:
    return x.new_empty(x.shape)
