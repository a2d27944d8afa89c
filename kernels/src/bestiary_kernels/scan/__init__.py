"""Selective scan: the recurrence of a state space whose steps depend on the input.

Shapes: T tokens, S sequences, C channels, N numbers of state for each channel.
"""

import torch
from torch import Tensor

from bestiary_kernels import library
from bestiary_kernels.scan import reference
from bestiary_kernels.states import check

__all__ = ["selective_scan"]


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
) -> Tensor:
    """Return y [T, C] of h = exp(dt a) h + dt x b, y = c . h + d x, token after token (Mamba, arXiv 2312.00752).

    dt is what comes out of the softplus, a is negative. `states` is float32 [slots, C, N]: h of each sequence; slots,
    starts and `fresh` are as in `causal_conv`. Computed in float32, rounded once to x's dtype. Raises ValueError for
    shapes or dtypes that do not fit, IndexError for a slot outside `states`; nothing is written then.
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
    ):
        raise ValueError("selective_scan: the shapes of x, dt, a, b, c, d and states (float32) do not fit")
    function = _operator if library.is_traced(x_TC) else reference.selective_scan
    return function(x_TC, dt_TC, a_CN, b_TN, c_TN, d_C, states, read_slots, write_slots, query_starts, fresh)


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
) -> Tensor:
    return reference.selective_scan(x, dt, a, b, c, d, states, read_slots, write_slots, query_starts, fresh)


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
) -> Tensor:
    return x.new_empty(x.shape)
