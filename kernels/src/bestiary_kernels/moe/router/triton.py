"""Routers in Triton: a program a token, whose experts are a matrix of groups."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bestiary_kernels.moe.reference import TINY

__all__ = ["route"]

_LOWEST = tl.constexpr(-3.4028234663852886e38)
_TINY = tl.constexpr(TINY)


@triton.jit
def _comparable(x):
    """NaN is the best, and nothing is as low as what was taken or closed."""
    return tl.maximum(tl.where(x == x, x, float("inf")), _LOWEST)


@triton.jit
def _first_best(keys, index):
    """The index of the largest key, of equal ones the first."""
    return tl.min(tl.where(keys == tl.max(keys), index, 2147483647))


@triton.jit
def _scores(x, WAY: tl.constexpr):
    """What logits are worth; those of sparsemixer, and of a softmax that comes last, are so already."""
    y = x
    if WAY == "sigmoid":
        y = 1 / (1 + tl.exp(-x))
    if WAY == "softmax":
        parts = tl.exp(x - tl.maximum(tl.max(x), _LOWEST))
        y = parts / tl.sum(parts)
    return y


@triton.jit
def _group_values(keys, index, BY_TWO: tl.constexpr):
    """How good each group is: its best key, or the sum of its best two."""
    best = tl.max(keys, 1)
    if BY_TWO:
        first = tl.min(tl.where(keys == best[:, None], index, 2147483647), 1)
        best += tl.max(tl.where(index == first[:, None], float("-inf"), keys), 1)
    return _comparable(best)


@triton.jit
def _route(
    logits,
    bias,
    weights,
    experts,
    row_stride,
    top_k,
    groups,
    size,
    top_groups,
    scale,
    threshold,
    WAY: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BY_TWO: tl.constexpr,
    ARE_GROUPED: tl.constexpr,
    RENORMALISE: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    TOP_K: tl.constexpr,
):
    """The weights and experts of one token: weights[row, choice] and experts[row, choice].

    `WAY` is a scoring, or "logits" where the softmax comes last. `threshold` is sparsemixer's: how far from the best an
    expert counts. Members beyond a group's size have the numbers of the next group's: only `known` tells them apart.
    """
    row = tl.program_id(0).to(tl.int64)
    group, member = tl.arange(0, GROUPS), tl.arange(0, SIZE)
    index = group[:, None] * size + member[None, :]
    known = (group < groups)[:, None] & (member < size)[None, :]
    x = tl.load(logits + row * row_stride + index, mask=known, other=float("-inf")).to(tl.float32)
    scores = _scores(x, WAY)
    keys = scores
    if HAS_BIAS:
        keys += tl.load(bias + index, mask=known, other=0.0).to(tl.float32)
    keys = tl.where(known, _comparable(keys), float("-inf"))
    if ARE_GROUPED:
        values = tl.where(group < groups, _group_values(keys, index, BY_TWO), float("-inf"))
        for _ in range(top_groups):
            values = tl.where(group == _first_best(values, group), float("-inf"), values)
        keys = tl.where((values == float("-inf"))[:, None], keys, float("-inf"))
    choice = tl.arange(0, TOP_K)
    found = tl.full((TOP_K,), float("-inf"), tl.float32)
    who = tl.zeros((TOP_K,), tl.int32)
    for i in range(top_k):
        expert = _first_best(keys, index)
        weight = tl.sum(tl.where(index == expert, tl.where(known, scores, 0.0), 0.0))
        if WAY == "sparsemixer":
            left = known & (keys > float("-inf")) & (scores != float("-inf"))
            sizes = tl.where(left, tl.maximum(tl.abs(scores), weight), 1.0)
            sizes = tl.where(sizes == 0.0, 1.0, sizes)
            # Correctly rounded: an expert may lie exactly at the threshold.
            off = tl.div_rn(tl.where(left, weight - scores, 0.0), sizes)
            near = left & ((off > threshold) == 0)  # NaN is near, as in the reference
            weight = 1 / tl.sum(tl.where(near, tl.exp(tl.where(near, scores - weight, 0.0)), 0.0))
        found = tl.where(choice == i, weight, found)
        who = tl.where(choice == i, expert, who)
        keys = tl.where(index == expert, float("-inf"), keys)
    if WAY == "logits":
        found = _scores(found, "softmax")
    found = tl.where(choice < top_k, found, 0.0)
    if RENORMALISE:
        found = found / (tl.sum(found, 0) + _TINY)
    tl.store(weights + row * top_k + choice, found * scale, mask=choice < top_k)
    tl.store(experts + row * top_k + choice, who.to(tl.int64), mask=choice < top_k)


def route(
    logits: Tensor,
    top_k: int,
    renormalise: bool,
    scale: float,
    groups: int,
    top_groups: int,
    softmax_last: bool,
    scoring: str = "softmax",
    bias: Tensor | None = None,
    group_by: str = "best",
    jitter: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """As the reference."""
    rows, experts = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    weights = torch.empty((rows, top_k), dtype=torch.float32, device=logits.device)
    chosen = torch.empty((rows, top_k), dtype=torch.int64, device=logits.device)
    if top_groups == groups:
        groups = top_groups = 1
    if rows:
        _route[(rows,)](
            logits,
            None if bias is None else bias.contiguous(),
            weights,
            chosen,
            logits.stride(0),
            top_k,
            groups,
            experts // groups,
            top_groups,
            scale,
            2 * jitter,
            WAY="logits" if softmax_last else scoring,
            HAS_BIAS=bias is not None,
            BY_TWO=group_by == "best_two",
            ARE_GROUPED=groups > 1,
            RENORMALISE=renormalise,
            GROUPS=triton.next_power_of_2(groups),
            SIZE=triton.next_power_of_2(experts // groups),
            TOP_K=triton.next_power_of_2(top_k),
            num_warps=1 if experts <= 128 else 4,
        )
    return weights, chosen
