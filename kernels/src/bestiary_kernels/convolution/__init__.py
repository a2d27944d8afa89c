"""Causal convolution of each channel by itself, which remembers a sequence's last inputs between steps.

Shapes: T tokens, S sequences, C channels, K taps.
"""

from struct import Struct

import torch
from torch import Tensor

from bestiary_kernels import gpu, library
from bestiary_kernels.activation import PLAIN_KINDS
from bestiary_kernels.convolution import reference
from bestiary_kernels.states import are_known, check, fail

__all__ = ["causal_conv"]

_CALL = Struct("7q")  # ConvCall in cpu.cpp


def causal_conv(
    x_TC: Tensor,
    weight_CK: Tensor,
    bias_C: Tensor | None,
    states: Tensor,
    read_slots: Tensor,
    write_slots: Tensor,
    query_starts: Tensor,
    fresh: Tensor,
    act: str | None = "silu",
) -> Tensor:
    """Return act(sum over k of weight[:, k] * input K - 1 - k tokens before, + bias), [T, C], of a ragged batch.

    `states` is [slots, C, K-1], in any floating dtype: the last inputs of a sequence, the latest last. A sequence
    begins with those in its slot of `read_slots` (int64 [S]), or with zeros where `fresh` (bool [S]), and leaves its
    own in its slot of `write_slots`; the two should differ, so that a step can be done again, and no sequence writes
    what another reads or writes. query_starts is int32 [S + 1], `act` a kind of `activation`, or None. Computed in
    float32, rounded once. Raises ValueError for shapes that do not fit or an unknown act, IndexError for a slot outside
    `states`; nothing is written then. On a GPU nobody looks at slots and starts: what lies outside is not touched.
    """
    channels, taps = weight_CK.shape
    check("causal_conv", read_slots, write_slots, query_starts, fresh)
    if x_TC.shape[1:] != (channels,) or states.shape[1:] != (channels, taps - 1):
        raise ValueError(f"causal_conv: x {tuple(x_TC.shape)} and states {tuple(states.shape)} do not fit the weight")
    if bias_C is not None and bias_C.shape != (channels,):
        raise ValueError(f"causal_conv: bias {tuple(bias_C.shape)} is not one number for each of {channels} channels")
    if act is not None and act not in PLAIN_KINDS:
        raise ValueError(f"causal_conv: act {act!r} is unknown; choose None or one of {', '.join(PLAIN_KINDS)}")
    given = (x_TC, weight_CK, bias_C, states, read_slots, write_slots, query_starts, fresh)
    if (on_gpu := gpu.kernels("convolution", x_TC)) is not None:
        found: Tensor = on_gpu.causal_conv(*given, act)
        return found
    kernels, number = library.native(x_TC), -1 if act is None else PLAIN_KINDS[act]
    if (
        kernels is None
        or not _are_known(x_TC, weight_CK, bias_C, states)
        or not are_known(states, read_slots, write_slots, query_starts, fresh)
    ):
        return (_operator if library.is_traced(x_TC) else reference.causal_conv)(*given, act)
    y = x_TC.new_empty(x_TC.shape)
    failed = kernels.causal_conv(
        library.IS_BF16[x_TC.dtype],
        library.IS_BF16[states.dtype],
        *(None if tensor is None else tensor.data_ptr() for tensor in given),
        y.data_ptr(),
        _CALL.pack(x_TC.shape[0], fresh.shape[0], channels, taps, states.shape[0], number, x_TC.stride(0)),
    )
    if failed:
        fail("causal_conv", failed, x_TC.shape[0])
    return y


def _are_known(x: Tensor, weight: Tensor, bias: Tensor | None, states: Tensor) -> bool:
    """Whether the C++ function knows the dtypes and layouts: rows of x may be strided, all else is dense."""
    dtype = x.dtype
    return (
        dtype in library.IS_BF16
        and states.dtype in library.IS_BF16
        and x.stride(1) == 1
        and weight.dtype is dtype
        and weight.is_contiguous()
        and (bias is None or (bias.dtype is dtype and bias.is_contiguous()))
    )


@torch.library.custom_op("bestiary::causal_conv", mutates_args=("states",))
def _operator(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    states: Tensor,
    read_slots: Tensor,
    write_slots: Tensor,
    query_starts: Tensor,
    fresh: Tensor,
    act: str | None,
) -> Tensor:
    return reference.causal_conv(x, weight, bias, states, read_slots, write_slots, query_starts, fresh, act)


@_operator.register_fake
def _shape(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    states: Tensor,
    read_slots: Tensor,
    write_slots: Tensor,
    query_starts: Tensor,
    fresh: Tensor,
    act: str | None,
) -> Tensor:
    return x.new_empty(x.shape)
