"""Selective scan in Triton: a program for one sequence and some channels, with their states in registers.

A token is asked for before the one ahead of it is computed, as nothing of it depends on the state.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["selective_scan"]

#: Numbers of state that a program holds: few, and in one warp, so that a token is a short line of instructions that
#: waits for no other warp. Programs enough for a GPU there are even with one sequence.
_HELD = 128


@triton.jit
def _softplus(x):
    """log(1 + e^x) = max(x, 0) + log(1 + u), u = e^-|x|; a rounded 1 + u says too little of a small u."""
    u = tl.exp(-tl.abs(x))
    near_one = 1 + u
    small = u * (1 - u * (0.5 - u * (1.0 / 3 - u * 0.25)))
    log = tl.where(u < 0.03, small, tl.log(near_one) - ((near_one - 1) - u) / near_one)
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) + log


@triton.jit
def _rows(
    x, dt, b, c, gate, token, x_stride, dt_stride, b_stride, c_stride, gate_stride, channel, number, end,
    channels, numbers, HAS_GATE: tl.constexpr,
):  # fmt: skip
    """What one token brings, as it is in memory; nothing of one from `end` on."""
    of_channels = channel < tl.where(token < end, channels, 0)
    of_numbers = number < tl.where(token < end, numbers, 0)
    row = token.to(tl.int64)
    x_C = tl.load(x + row * x_stride + channel, mask=of_channels, other=0.0)
    dt_C = tl.load(dt + row * dt_stride + channel, mask=of_channels, other=0.0)
    b_N = tl.load(b + row * b_stride + number, mask=of_numbers, other=0.0)
    c_N = tl.load(c + row * c_stride + number, mask=of_numbers, other=0.0)
    gate_C = x_C
    if HAS_GATE:
        gate_C = tl.load(gate + row * gate_stride + channel, mask=of_channels, other=0.0)
    return x_C, dt_C, b_N, c_N, gate_C


@triton.jit(do_not_specialize=["tokens", "slots"])
def _selective_scan(
    x,
    dt,
    a,
    b,
    c,
    d,
    gate,
    states,
    read_slots,
    write_slots,
    query_starts,
    fresh,
    y,
    tokens,
    slots,
    channels,
    numbers,
    x_stride,
    dt_stride,
    b_stride,
    c_stride,
    gate_stride,
    slot_stride,
    kept_stride,
    number_stride,
    HAS_GATE: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    CHANNELS: tl.constexpr,
    NUMBERS: tl.constexpr,
):
    sequence = tl.program_id(0)
    begin = tl.maximum(tl.load(query_starts + sequence), 0)
    end = tl.minimum(tl.load(query_starts + sequence + 1), tokens)
    channel, number = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS), tl.arange(0, NUMBERS)
    both = (channel < channels)[:, None] & (number < numbers)[None, :]
    read = tl.load(read_slots + sequence)
    # Here and below a limit of 0 means none: of a sequence that begins, or a slot that is none.
    kept = tl.where((tl.load(fresh + sequence) == 0) & (read >= 0) & (read < slots), numbers, 0)
    in_slot = channel.to(tl.int64)[:, None] * kept_stride + number[None, :] * number_stride
    h = tl.load(states + read * slot_stride + in_slot, mask=both & (number < kept)[None, :], other=0.0)
    tl.debug_barrier()  # every thread has read it: it may be the memory that is written
    # e^(dt a) = 2^(dt a / ln 2)
    rate = tl.load(a + channel[:, None] * numbers + number[None, :], mask=both, other=0.0) * 1.4426950408889634
    skip = tl.load(d + channel, mask=channel < channels, other=0.0)

    x_C, dt_C, b_N, c_N, gate_C = _rows(
        x, dt, b, c, gate, begin, x_stride, dt_stride, b_stride, c_stride, gate_stride, channel, number, end,
        channels, numbers, HAS_GATE,
    )  # fmt: skip
    token = begin
    while token < end:
        x_now, step, b_now, c_now = x_C.to(tl.float32), dt_C.to(tl.float32), b_N.to(tl.float32), c_N.to(tl.float32)
        gate_now = gate_C.to(tl.float32)
        x_C, dt_C, b_N, c_N, gate_C = _rows(
            x, dt, b, c, gate, token + 1, x_stride, dt_stride, b_stride, c_stride, gate_stride, channel, number,
            end, channels, numbers, HAS_GATE,
        )  # fmt: skip
        if SOFTPLUS:
            step = _softplus(step)
        h = tl.exp2(step[:, None] * rate) * h + (step * x_now)[:, None] * b_now[None, :]
        out = tl.sum(h * c_now[None, :], 1) + skip * x_now
        if HAS_GATE:
            out *= gate_now * tl.sigmoid(gate_now)
        at = y + token.to(tl.int64) * channels + channel
        tl.store(at, out.to(y.dtype.element_ty), mask=channel < channels)
        token += 1
    write = tl.load(write_slots + sequence)
    written = tl.where((write >= 0) & (write < slots), numbers, 0)
    tl.store(states + write * slot_stride + in_slot, h, mask=both & (number < written)[None, :])


def selective_scan(
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
    """As the reference, but for slots and starts that do not fit: what lies outside is neither read nor written."""
    (tokens, channels), (sequences,), numbers = x.shape, fresh.shape, a.shape[1]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if sequences and channels:
        rows = [row if row.stride(1) == 1 else row.contiguous() for row in (x, dt, b, c, x if gate is None else gate)]
        width = triton.next_power_of_2(max(numbers, 1))
        block = max(4, _HELD // width)
        _selective_scan[(sequences, triton.cdiv(channels, block))](
            rows[0],
            rows[1],
            a.float().contiguous(),
            rows[2],
            rows[3],
            d.float().contiguous(),
            rows[4],
            states,
            read_slots.contiguous(),
            write_slots.contiguous(),
            query_starts.contiguous(),
            fresh.contiguous().view(torch.uint8),
            y,
            tokens,
            states.shape[0],
            channels,
            numbers,
            *(row.stride(0) for row in rows),
            *states.stride(),
            HAS_GATE=gate is not None,
            SOFTPLUS=softplus,
            CHANNELS=block,
            NUMBERS=width,
            num_warps=1,
        )
    return y
