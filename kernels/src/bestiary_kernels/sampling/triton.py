"""Choosing tokens in Triton. The best: a program for each stretch of a row, and one to look at what they found.

A draw: a program a row. Limits are found by halving: how many scores, of what weight, are above a floor?
A float32's bits, as integers with the order of the numbers, are halved 32 times; the row is read anew each time, out of
the second cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["draw", "greedy"]

#: Logits that one program looks at.
_STRETCH = 2048
#: What is found of a row with a NaN: more than any number with its place.
_NAN = tl.constexpr(2**63 - 1)


@triton.jit
def _score_of(key):
    """The number whose place in the order of all float32 a key is."""
    bits = tl.where(key >= 0, key, key ^ 0x7FFFFFFF).to(tl.int32)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _key_of(score):
    bits = score.to(tl.int32, bitcast=True)
    return tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF).to(tl.int64)


@triton.jit
def _best(logits, bests, vocabulary, stride, BLOCK: tl.constexpr):
    """The largest score of a stretch and its first place, both in one number, so that its order is theirs."""
    r, stretch = tl.program_id(0), tl.program_id(1)
    at = stretch * BLOCK + tl.arange(0, BLOCK)
    score = tl.load(logits + r.to(tl.int64) * stride + at, mask=at < vocabulary, other=float("-inf")).to(tl.float32)
    key = _key_of(tl.where(score == 0, 0.0, score)) * 4294967296 + (2147483647 - at)
    found = tl.max(tl.where(score == score, key, _NAN))
    tl.store(bests + r * tl.num_programs(1) + stretch, found)


@triton.jit
def _best_of(bests, tokens, stretches, BLOCK: tl.constexpr):
    r = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    found = tl.max(tl.load(bests + r * stretches + at, mask=at < stretches, other=-(2**63)))
    key = found >> 32
    is_finite = (key < 0x7F800000) & (key > -0x7F800001)  # the keys of both infinities
    tl.store(tokens + r, tl.where(is_finite, 2147483647 - (found & 0xFFFFFFFF), -1))


@triton.jit
def _above(row, temperature, best, floor, least, vocabulary, BLOCK: tl.constexpr):
    """How many scores are `floor` or more, and `least` or more, and their weight."""
    count = tl.zeros((), tl.int64)
    mass = tl.zeros((), tl.float64)
    for start in range(0, vocabulary, BLOCK):
        at = start + tl.arange(0, BLOCK)
        score = tl.load(row + at, mask=at < vocabulary, other=float("-inf")) / temperature
        counts = (score >= floor) & (score >= least) & (at < vocabulary)
        count += tl.sum(counts.to(tl.int64))
        mass += tl.sum(tl.where(counts, tl.exp(score - best), 0.0).to(tl.float64))
    return count, mass


@triton.jit
def _draw(logits, temperatures, top_ks, top_ps, min_ps, uniforms, tokens, vocabulary, stride, BLOCK: tl.constexpr):
    r = tl.program_id(0)
    row = logits + r.to(tl.int64) * stride
    temperature = tl.load(temperatures + r)
    best = tl.full((), float("-inf"), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        at = start + tl.arange(0, BLOCK)
        score = tl.load(row + at, mask=at < vocabulary, other=float("-inf")) / temperature
        best = tl.maximum(best, tl.max(score))
    min_p = tl.load(min_ps + r)
    least = tl.where(min_p > 0, best + tl.log(tl.where(min_p > 0, min_p, 1.0)), float("-inf"))
    floor = least
    top_k = tl.load(top_ks + r).to(tl.int64)
    top_p = tl.load(top_ps + r)
    lowest = tl.zeros((), tl.int64) - 0x7F800001  # the key of -inf
    highest = _key_of(best)
    count, total = _above(row, temperature, best, least, least, vocabulary, BLOCK)
    if (top_k > 0) & (top_k < count):
        # The largest floor that leaves k or more.
        low = lowest
        high = highest
        while low < high:
            middle = low + (high - low + 1) // 2
            found, _ = _above(row, temperature, best, _score_of(middle), least, vocabulary, BLOCK)
            low = tl.where(found >= top_k, middle, low)
            high = tl.where(found >= top_k, high, middle - 1)
        kth = _score_of(low)
        more, above = _above(row, temperature, best, _score_of(low + 1), least, vocabulary, BLOCK)
        total = above + (top_k - more) * tl.exp(kth - best).to(tl.float64)
        floor = tl.maximum(floor, kth)
    if top_p < 1:
        # The largest floor that leaves the part, or more.
        wanted = top_p.to(tl.float64) * total
        low = lowest
        high = highest
        while low < high:
            middle = low + (high - low + 1) // 2
            _, mass = _above(row, temperature, best, _score_of(middle), least, vocabulary, BLOCK)
            low = tl.where(mass >= wanted, middle, low)
            high = tl.where(mass >= wanted, high, middle - 1)
        floor = tl.maximum(floor, _score_of(low))
    _, total = _above(row, temperature, best, floor, floor, vocabulary, BLOCK)
    target = tl.load(uniforms + r) * total
    # The first token at which the sum exceeds the target: as many as have a sum that does not.
    before = tl.zeros((), tl.float64)
    token = tl.zeros((), tl.int64)
    last = tl.zeros((), tl.int64)
    for start in range(0, vocabulary, BLOCK):
        at = start + tl.arange(0, BLOCK)
        score = tl.load(row + at, mask=at < vocabulary, other=float("-inf")) / temperature
        weight = tl.where((score >= floor) & (at < vocabulary), tl.exp(score - best), 0.0).to(tl.float64)
        sums = before + tl.cumsum(weight, 0)
        token += tl.sum(((sums <= target) & (at < vocabulary)).to(tl.int64))
        last = tl.maximum(last, tl.max(tl.where(weight > 0, at, 0)).to(tl.int64))
        before += tl.sum(weight)
    tl.store(tokens + r, tl.minimum(token, last))


def greedy(logits: Tensor) -> Tensor:
    """As the reference."""
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    rows, vocabulary = logits.shape
    stretches = triton.cdiv(vocabulary, _STRETCH)
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    bests = torch.empty(rows, stretches, dtype=torch.int64, device=logits.device)
    if rows:
        _best[(rows, stretches)](logits, bests, vocabulary, logits.stride(0), BLOCK=_STRETCH, num_warps=4)
        _best_of[(rows,)](bests, tokens, stretches, BLOCK=triton.next_power_of_2(stretches), num_warps=1)
    return tokens


def draw(
    logits: Tensor, temperatures: Tensor, top_ks: Tensor, top_ps: Tensor, min_ps: Tensor, uniforms: Tensor
) -> Tensor:
    """As the reference."""
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    rows, vocabulary = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows:
        _draw[(rows,)](
            logits,
            temperatures.contiguous(),
            top_ks.contiguous(),
            top_ps.contiguous(),
            min_ps.contiguous(),
            uniforms.contiguous(),
            tokens,
            vocabulary,
            logits.stride(0),
            BLOCK=min(4096, triton.next_power_of_2(vocabulary)),
            num_warps=8,
        )
    return tokens
