"""Paged attention. Shapes: T query tokens, S sequences, Hq and Hk heads, D head size, B block size."""

import torch
from torch import Tensor

from bestiary_kernels import gpu, library
from bestiary_kernels.attention import cpu, reference

__all__ = ["paged_attention"]


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    scale: float,
    *,
    window: int | None = None,
    softcap: float | None = None,
    slopes: Tensor | None = None,
    visible: Tensor | None = None,
    causal: bool = True,
    ranges: Tensor | None = None,
    sinks: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Return attention [T, Hq, D] of a ragged batch over the paged cache; prefill and decode in one call.

    q is [T, Hq, D], tokens may be strided; the caches are [blocks, Hk, B, D], each block dense, and Hk divides Hq.
    block_tables is int32 [S, max_blocks], query_starts int32 [S + 1] (cumulative, from 0 to T), context_lens int32 [S]:
    all tokens of the sequence, this step's included. Query i of a sequence stands at context_len - query_len + i and
    sees the keys 0 to there. Computed in float32, rounded once; with bfloat16 the weights may be rounded before they
    meet values. `out` receives the result if given (dense).

    `window`: of those keys it sees the last `window`, its own included; blocks wholly before all windows are never
    read, whatever id stands in their place. `visible`, int32 [S]: the first tokens of a sequence that see one another
    whole, also keys that stand after them or before their window (prefix LM). Not `causal`: every query sees all
    context_len keys, which need not be the queries' own (cross attention), or those from `ranges`[i, 0] to before
    `ranges`[i, 1], int32 [T, 2], if that is given; without any it gets zeros. `softcap` c turns
    scaled scores into c tanh(score / c) (Gemma 2, arXiv 2408.00118). `slopes` [Hq] then adds slope x key position,
    formed in the slopes' own dtype (ALiBi, arXiv 2108.12409). `sinks` [Hq]: a score of each head that takes its share
    of the weights and has no value (gpt-oss, arXiv 2508.10925).

    Raises ValueError for shapes, settings, starts or lengths that do not fit, IndexError for a block id outside the
    cache.
    """
    _, q_heads, width = q.shape
    _, kv_heads, _, cache_width = cache_shape = k_cache.shape
    (sequences,) = context_lens.shape
    if (
        v_cache.shape != cache_shape
        or cache_width != width
        or q_heads % kv_heads
        or query_starts.shape != (sequences + 1,)
        or block_tables.dim() != 2
        or block_tables.shape[0] != sequences
        or not (out is None or (out.shape == q.shape and out.dtype is q.dtype))
    ):
        raise ValueError("paged_attention: the shapes of q, caches, tables, starts, lengths and out do not fit")
    _check(q_heads, sequences, window, softcap, slopes, visible, causal, ranges, sinks, len(q))
    settings = (scale, window, softcap, slopes, visible, causal, ranges, sinks)
    tables = (block_tables, query_starts, context_lens)
    if (on_gpu := gpu.kernels("attention", q)) is not None:
        found: Tensor = on_gpu.paged_attention(q, k_cache, v_cache, *tables, *settings, out)
        return found
    if (kernels := library.native(q)) is not None:
        y = cpu.attention(kernels, q, k_cache, v_cache, width, tables, out, *settings)
        if y is not None:
            return y
    function = _operator if library.is_traced(q) else reference.paged_attention
    y = function(q, k_cache, v_cache, block_tables, query_starts, context_lens, *settings)
    return y if out is None else out.copy_(y)


def _check(
    q_heads: int,
    sequences: int,
    window: int | None,
    softcap: float | None,
    slopes: Tensor | None,
    visible: Tensor | None,
    causal: bool,
    ranges: Tensor | None,
    sinks: Tensor | None,
    tokens: int,
) -> None:
    """Raise ValueError for a setting that means nothing."""
    if not (window is None or window > 0) or not (softcap is None or softcap > 0):
        raise ValueError(f"paged_attention: window {window} and softcap {softcap} must be above 0, or None")
    if any(numbers is not None and numbers.shape != (q_heads,) for numbers in (slopes, sinks)) or not (
        visible is None or visible.shape == (sequences,)
    ):
        raise ValueError("paged_attention: slopes and sinks must be one number a query head, visible one a sequence")
    if ranges is not None and (causal or ranges.shape != (tokens, 2)):
        raise ValueError("paged_attention: ranges must be two numbers a query, and need causal=False")
    if not causal and (window is not None or visible is not None):
        raise ValueError("paged_attention: window and visible count from a query's own place; they need causal=True")


@torch.library.custom_op("bestiary::paged_attention", mutates_args=())
def _operator(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    slopes: Tensor | None = None,
    visible: Tensor | None = None,
    causal: bool = True,
    ranges: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    settings = (scale, window, softcap, slopes, visible, causal, ranges, sinks)
    return reference.paged_attention(q, k_cache, v_cache, block_tables, query_starts, context_lens, *settings)


@_operator.register_fake
def _shapes(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    slopes: Tensor | None = None,
    visible: Tensor | None = None,
    causal: bool = True,
    ranges: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    return q.new_empty(q.shape)
