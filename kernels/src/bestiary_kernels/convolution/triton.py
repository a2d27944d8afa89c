"""Causal convolution in Triton: a program for some tokens of one sequence and some channels.

The program with a sequence's first tokens is the only one that reads what was kept, and then writes what is to be kept:
a slot may thus be written that is read.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bestiary_kernels.activation.triton import activated

__all__ = ["causal_conv"]

_FEW, _MANY = 4, 32
_CHANNELS = 64


@triton.jit
def _place(query_starts, sequences, TOKENS: tl.constexpr):
    """The sequence that this program works for, and which of its blocks of tokens: each has one more than it fills."""
    program = tl.program_id(0)
    low, high = program * 0, sequences
    while high - low > 1:
        middle = (low + high) // 2
        is_before = tl.load(query_starts + middle) // TOKENS + middle <= program
        low = tl.where(is_before, middle, low)
        high = tl.where(is_before, high, middle)
    return low, program - (tl.load(query_starts + low) // TOKENS + low)


@triton.jit
def _inputs(x, before, source, is_wanted, begin, new, kept, channel, channels, x_stride, place_stride):
    """[places, channels] the inputs at `source`: of this step, or kept where they are before its begin."""
    is_channel = (channel < channels)[None, :]
    is_new, is_kept = is_wanted & (source >= begin), is_wanted & (source < new) & (source >= begin - kept)
    at = source.to(tl.int64)[:, None] * x_stride + channel[None, :]
    found = tl.load(x + at, mask=is_new[:, None] & is_channel, other=0.0).to(tl.float32)
    old = before[None, :] + (source - begin + kept)[:, None] * place_stride
    return found + tl.load(old, mask=is_kept[:, None] & is_channel, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["tokens", "sequences", "slots"])
def _causal_conv(
    x,
    weight,
    bias,
    states,
    read_slots,
    write_slots,
    query_starts,
    fresh,
    y,
    tokens,
    sequences,
    slots,
    channels,
    x_stride,
    weight_stride,
    tap_stride,
    slot_stride,
    kept_stride,
    place_stride,
    TAPS: tl.constexpr,
    PLACES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACT: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    sequence, block = _place(query_starts, sequences, TOKENS)
    begin = tl.maximum(tl.load(query_starts + sequence), 0)
    end = tl.minimum(tl.load(query_starts + sequence + 1), tokens)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    is_channel = channel < channels
    token = begin + block * TOKENS + tl.arange(0, TOKENS)
    kept = TAPS - 1

    read = tl.load(read_slots + sequence)
    has_kept = (tl.load(fresh + sequence) == 0) & (read >= 0) & (read < slots)
    before = states + read * slot_stride + channel.to(tl.int64) * kept_stride
    # What was kept stands before the first token, and of what a sequence without it would find there nothing is read.
    new = tl.where(has_kept, begin, begin - kept)

    total = tl.zeros((TOKENS, CHANNELS), tl.float32)
    if HAS_BIAS:
        total += tl.load(bias + channel, mask=is_channel, other=0.0).to(tl.float32)[None, :]
    for tap in tl.static_range(TAPS):
        at_tap = channel.to(tl.int64) * weight_stride + tap * tap_stride
        factor = tl.load(weight + at_tap, mask=is_channel, other=0.0).to(tl.float32)
        total += factor[None, :] * _inputs(
            x, before, token - kept + tap, token < end, begin, new, kept, channel, channels, x_stride, place_stride
        )
    at = token.to(tl.int64)[:, None] * channels + channel[None, :]
    is_own = ((token >= begin) & (token < end))[:, None] & is_channel[None, :]
    if ACT is not None:
        total = activated(total, ACT)
    tl.store(y + at, total.to(y.dtype.element_ty), mask=is_own)

    if (block == 0) & (TAPS > 1):
        place = tl.arange(0, PLACES)
        last = _inputs(
            x, before, end - kept + place, place < kept, begin, new, kept, channel, channels, x_stride, place_stride
        )
        tl.debug_barrier()  # every thread has read what was kept: it may be the same memory
        write = tl.load(write_slots + sequence)
        may_write = channel < tl.where((write >= 0) & (write < slots), channels, 0)
        after = states + write * slot_stride + channel.to(tl.int64) * kept_stride
        places = after[None, :] + place[:, None] * place_stride
        tl.store(places, last.to(states.dtype.element_ty), mask=(place < kept)[:, None] & may_write[None, :])


def causal_conv(
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
    """As the reference, but for slots and starts that do not fit: what lies outside is neither read nor written."""
    (tokens, channels), (sequences,), taps = x.shape, fresh.shape, weight.shape[1]
    rows = x if x.stride(1) == 1 else x.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if sequences and channels:
        # Only first tokens may see what was kept, so that a program has no fewer than that are kept.
        block = max(_FEW if tokens <= 2 * sequences else _MANY, triton.next_power_of_2(taps))
        _causal_conv[(tokens // block + sequences, triton.cdiv(channels, _CHANNELS))](
            rows,
            weight,
            None if bias is None else bias.contiguous(),
            states,
            read_slots.contiguous(),
            write_slots.contiguous(),
            query_starts.contiguous(),
            fresh.contiguous().view(torch.uint8),
            y,
            tokens,
            sequences,
            states.shape[0],
            channels,
            rows.stride(0),
            weight.stride(0),
            weight.stride(1),
            *states.stride(),
            TAPS=taps,
            PLACES=triton.next_power_of_2(max(taps - 1, 1)),
            HAS_BIAS=bias is not None,
            ACT=act,
            TOKENS=block,
            CHANNELS=_CHANNELS,
        )
    return y
