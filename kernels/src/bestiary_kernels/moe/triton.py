"""Mixture of experts in Triton: choices sorted by expert on the device, two grouped products, a sum for each token.

Grids follow from shapes alone and nothing waits for the device. A choice of an expert that is none is in no tile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bestiary_kernels.activation.triton import activated
from bestiary_kernels.moe.router.triton import route

__all__ = ["experts_linear", "moe", "route"]

#: Tiles of one group of experts that share what they read in the second cache.
_TOGETHER = 8


@triton.jit(do_not_specialize=["choices"])
def _sort(experts, order, starts, choices, count, BLOCK: tl.constexpr):
    """A program an expert: its choices, in their order, behind those of the experts before it."""
    expert = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    before = tl.zeros((BLOCK,), tl.int32)
    for begin in range(0, choices, BLOCK):
        who = tl.load(experts + begin + at, mask=begin + at < choices, other=-1)
        before += ((who >= 0) & (who < expert)).to(tl.int32)
    place = tl.sum(before, 0)
    tl.store(starts + expert, place)
    for begin in range(0, choices, BLOCK):
        who = tl.load(experts + begin + at, mask=begin + at < choices, other=-1)
        mine = (who == expert).to(tl.int32)
        tl.store(order + place + tl.cumsum(mine, 0) - 1, begin + at, mask=mine != 0)
        place += tl.sum(mine, 0)
    if expert == count - 1:
        tl.store(starts + count, place)


@triton.jit
def _tile(starts, tiles, columns, count, COUNT: tl.constexpr, ROWS: tl.constexpr, TOGETHER: tl.constexpr):
    """This program's expert, the first of its places and where the expert's end, and its block of columns.

    A program too many gets places that end before they begin.
    """
    group = tl.program_id(0) // (TOGETHER * columns)
    within = tl.program_id(0) % (TOGETHER * columns)
    size = tl.minimum(tiles - group * TOGETHER, TOGETHER)
    tile = group * TOGETHER + within % size
    index = tl.arange(0, COUNT)
    firsts = tl.load(starts + index, mask=index < count, other=0)
    ends = tl.load(starts + index + 1, mask=index < count, other=0)
    of_experts = (ends - firsts + ROWS - 1) // ROWS
    expert = tl.sum((tl.cumsum(of_experts, 0) <= tile).to(tl.int32), 0)
    earlier = tl.sum(tl.where(index < expert, of_experts, 0), 0)
    first = tl.sum(tl.where(index == expert, firsts, 0), 0) + (tile - earlier) * ROWS
    end = tl.sum(tl.where(index == expert, ends, 0), 0)
    return expert.to(tl.int64), first, end, within // size


@triton.jit(do_not_specialize=["tiles"])
def _hide(
    x,
    gate_up,
    hidden,
    order,
    starts,
    tiles,
    x_stride,
    top_k,
    count,
    width,
    inner,
    KIND: tl.constexpr,
    COUNT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """Some inner numbers of some choices of one expert: hidden[place] = act(gate x) * (up x)."""
    expert, first, end, column = _tile(starts, tiles, tl.cdiv(inner, COLUMNS), count, COUNT, ROWS, TOGETHER)
    if first >= end:
        return
    row = first + tl.arange(0, ROWS)
    token = tl.load(order + row, mask=row < end, other=0) // top_k
    line = column * COLUMNS + tl.arange(0, COLUMNS)
    at_x = x + token.to(tl.int64)[:, None] * x_stride
    at_gate = gate_up + (expert * 2 * inner + line)[None, :] * width
    at_up = gate_up + (expert * 2 * inner + inner + line)[None, :] * width
    gates = tl.zeros((ROWS, COLUMNS), tl.float32)
    ups = tl.zeros((ROWS, COLUMNS), tl.float32)
    for begin in range(0, width, DEPTH):
        k = begin + tl.arange(0, DEPTH)
        v = tl.load(at_x + k[None, :], mask=(row < end)[:, None] & (k < width)[None, :], other=0.0)
        known = (line < inner)[None, :] & (k < width)[:, None]
        gate = tl.load(at_gate + k[:, None], mask=known, other=0.0)
        gates = tl.dot(v, gate, gates, input_precision="ieee")
        up = tl.load(at_up + k[:, None], mask=known, other=0.0)
        ups = tl.dot(v, up, ups, input_precision="ieee")
    rounded = hidden.dtype.element_ty
    made = activated(gates.to(rounded).to(tl.float32), KIND) * ups.to(rounded).to(tl.float32)
    to = hidden + row.to(tl.int64)[:, None] * inner + line[None, :]
    tl.store(to, made.to(rounded), mask=(row < end)[:, None] & (line < inner)[None, :])


@triton.jit(do_not_specialize=["tiles"])
def _say(
    x,
    weight,
    said,
    order,
    starts,
    tiles,
    x_stride,
    count,
    outputs,
    inputs,
    EACH: tl.constexpr,
    COUNT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """Some columns of what one expert says to some choices: said[choice] = weight x.

    EACH choices share a row of x; 0: its rows lie in the order of the experts.
    """
    expert, first, end, column = _tile(starts, tiles, tl.cdiv(outputs, COLUMNS), count, COUNT, ROWS, TOGETHER)
    if first >= end:
        return
    row = first + tl.arange(0, ROWS)
    line = column * COLUMNS + tl.arange(0, COLUMNS)
    from_row = row if EACH == 0 else tl.load(order + row, mask=row < end, other=0) // EACH
    at_x = x + from_row.to(tl.int64)[:, None] * x_stride
    at_weight = weight + (expert * outputs + line)[None, :] * inputs
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for begin in range(0, inputs, DEPTH):
        k = begin + tl.arange(0, DEPTH)
        v = tl.load(at_x + k[None, :], mask=(row < end)[:, None] & (k < inputs)[None, :], other=0.0)
        w = tl.load(at_weight + k[:, None], mask=(line < outputs)[None, :] & (k < inputs)[:, None], other=0.0)
        sums = tl.dot(v, w, sums, input_precision="ieee")
    choice = tl.load(order + row, mask=row < end, other=0).to(tl.int64)
    to = said + choice[:, None] * outputs + line[None, :]
    tl.store(to, sums.to(said.dtype.element_ty), mask=(row < end)[:, None] & (line < outputs)[None, :])


@triton.jit
def _add(said, weights, experts, y, top_k, count, width, BLOCK: tl.constexpr):
    """Some columns of a token: the sum of what its experts say, in their order."""
    pieces = tl.cdiv(width, BLOCK)
    token = (tl.program_id(0) // pieces).to(tl.int64)
    at = tl.program_id(0) % pieces * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), tl.float32)
    for place in range(top_k):
        choice = token * top_k + place
        expert = tl.load(experts + choice)
        known = at < tl.where((expert >= 0) & (expert < count), width, 0)
        weight = tl.load(weights + choice).to(tl.float32)
        sums += tl.where(known, weight * tl.load(said + choice * width + at, mask=known, other=0.0).to(tl.float32), 0.0)
    tl.store(y + token * width + at, sums.to(y.dtype.element_ty), mask=at < width)


def _sizes(choices: int, experts: int, itemsize: int) -> tuple[int, int, dict[str, int]]:
    """The columns of a program in both products, and what else it computes with.

    By the tokens that an expert gets on average: few read weights, many multiply.
    """
    average = choices // experts
    if average <= 32:
        sizes = {"ROWS": 16 if average <= 8 else 32, "DEPTH": 256 // itemsize, "num_warps": 4}
        return 32, 32, {**sizes, "num_stages": 4}
    sizes = {"ROWS": 64, "num_warps": 4} if average <= 96 else {"ROWS": 128, "num_warps": 8}
    return 64, 128 if itemsize == 2 else 64, {**sizes, "DEPTH": 128 // itemsize, "num_stages": 4}


def moe(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, experts: Tensor, act: str) -> Tensor:
    """As the reference, but an expert outside the weights says nothing."""
    tokens, width = x.shape
    count, _, inner = down.shape
    top_k = experts.shape[1]
    choices = tokens * top_k
    y = torch.empty((tokens, width), dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    if not choices * count * inner:
        return y.zero_()
    x = x if x.stride(1) == 1 else x.contiguous()
    gate_up, down, weights, experts = (t.contiguous() for t in (gate_up, down, weights, experts))
    hidden = torch.empty((choices, inner), dtype=x.dtype, device=x.device)
    said = torch.empty((choices, width), dtype=x.dtype, device=x.device)
    order, starts, tiles, hide_columns, say_columns, told = _sorted(experts, count, x.element_size())
    shape = (tiles, x.stride(0), top_k, count, width, inner)
    grid = (tiles * triton.cdiv(inner, hide_columns),)
    _hide[grid](x, gate_up, hidden, order, starts, *shape, KIND=act, COLUMNS=hide_columns, **told)
    grid, told = (tiles * triton.cdiv(width, say_columns),), {**told, "EACH": 0}
    _say[grid](hidden, down, said, order, starts, tiles, inner, count, width, inner, COLUMNS=say_columns, **told)
    block = min(1024, triton.next_power_of_2(width))
    _add[(tokens * triton.cdiv(width, block),)](said, weights, experts, y, top_k, count, width, BLOCK=block)
    return y


def _sorted(experts: Tensor, count: int, itemsize: int) -> tuple[Tensor, Tensor, int, int, int, dict[str, int]]:
    """The choices by expert and where each expert's begin; how many tiles they make, and what programs compute with."""
    choices = experts.numel()
    order = torch.empty(choices, dtype=torch.int32, device=experts.device)
    starts = torch.empty(count + 1, dtype=torch.int32, device=experts.device)
    _sort[(count,)](experts, order, starts, choices, count, BLOCK=128 if choices <= 128 else 1024)
    hide_columns, say_columns, sizes = _sizes(choices, count, itemsize)
    rows = sizes["ROWS"]
    # Every expert that somebody chose may have one tile that is not full.
    tiles = (choices + min(count, choices) * (rows - 1)) // rows
    told = {**sizes, "COUNT": triton.next_power_of_2(count), "TOGETHER": _TOGETHER}
    return order, starts, tiles, hide_columns, say_columns, told


def experts_linear(x: Tensor, weight: Tensor, experts: Tensor) -> Tensor:
    """As the reference; what an expert outside the weights says is undefined."""
    count, outputs, inputs = weight.shape
    y = torch.empty((*experts.shape, outputs), dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    each = experts.shape[1] if x.dim() == 2 else 1
    x = x if x.dim() == 2 and x.stride(1) == 1 else x.reshape(-1, inputs).contiguous()
    weight, experts = weight.contiguous(), experts.contiguous()
    order, starts, tiles, _, columns, told = _sorted(experts, count, x.element_size())
    grid, shape = (tiles * triton.cdiv(outputs, columns),), (tiles, x.stride(0), count, outputs, inputs)
    _say[grid](x, weight, y, order, starts, *shape, EACH=each, COLUMNS=columns, **told)
    return y
