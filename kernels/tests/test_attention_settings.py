"""What paged_attention sees and how it scores: window, prefix, cross attention, soft cap and ALiBi, against loops."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from bestiary_kernels import library, paged_attention
from bestiary_kernels.attention import _operator

from .cases import Batch, assert_weighs, paged_batch

DTYPES = [torch.float32, torch.bfloat16]
MIX = [(1, 33), (20, 20), (0, 12), (7, 41), (1, 1)]
FOLD = {"group": 3, "width": 16, "block_size": 5}

Sees = Callable[[int, int, int], bool]  # sequence, place of the query, place of the key
Scores = Callable[[Tensor, int, Tensor], Tensor]  # scaled scores, head, places of the keys


@pytest.fixture(autouse=True, params=library.status().available)
def _backend(request: pytest.FixtureRequest) -> Iterator[None]:
    with library.using(request.param):
        yield


def expected(batch: Batch, sees: Sees, scored: Scores = lambda scores, head, places: scores) -> Tensor:
    """Attention one query and one head at a time, in float64."""
    out = torch.empty(batch.q.shape, dtype=torch.float64)
    heads, kv_heads, block_size = batch.q.shape[1], batch.k_cache.shape[1], batch.k_cache.shape[2]
    for s, context in enumerate(batch.context_lens.tolist()):
        start, end = batch.query_starts[s : s + 2].tolist()
        for row in range(start, end):
            places = torch.tensor([j for j in range(context) if sees(s, context - end + row, j)])
            block, offset = batch.block_tables[s, places // block_size].long(), places % block_size
            for head in range(heads):
                k, v = (
                    cache[block, head // (heads // kv_heads), offset].double()
                    for cache in (batch.k_cache, batch.v_cache)
                )
                weights = scored(k @ batch.q[row, head].double() * batch.scale, head, places).softmax(0)
                out[row, head] = weights @ v
    return out.to(batch.q.dtype)


def assert_is(
    y: Tensor, batch: Batch, sees: Sees, scored: Scores = lambda scores, head, places: scores, floor: float = 1e-5
) -> None:
    """It is that attention, rounded."""
    sizes = expected(replace(batch, v_cache=batch.v_cache.abs()), sees, scored)
    assert_weighs(y, expected(batch, sees, scored), sizes, floor)


def causally(s: int, i: int, j: int) -> bool:
    return j <= i


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [1, 4, 5, 11, 100])
def test_a_window_hides_what_lies_before_it(window: int, dtype: torch.dtype) -> None:
    batch = paged_batch(MIX, **FOLD, dtype=dtype)
    y = paged_attention(*batch.arguments(), window=window)
    assert_is(y, batch, lambda s, i, j: 0 <= i - j < window)


@pytest.mark.parametrize("block", [-1, 10**6, 2])
def test_blocks_before_every_window_are_never_read(block: int) -> None:
    window, block_size = 7, FOLD["block_size"]
    batch = paged_batch(MIX, **FOLD)
    before = paged_attention(*batch.arguments(), window=window)
    freed = 0
    for s, (queries, context) in enumerate(MIX):
        gone = max(0, context - queries - window + 1) // block_size
        batch.k_cache[batch.block_tables[s, :gone].long()] = float("nan")
        batch.v_cache[batch.block_tables[s, :gone].long()] = float("nan")
        batch.block_tables[s, :gone] = block
        freed += gone
    assert freed == 5 + 1 + 5
    assert torch.equal(paged_attention(*batch.arguments(), window=window), before)


def test_the_first_block_that_a_window_reaches_must_be_there() -> None:
    batch = paged_batch([(1, 33)], **FOLD)
    batch.block_tables[0, 5] = -1  # holds the keys 25 to 29; the window begins with 29
    with pytest.raises(IndexError, match="a block id"):
        paged_attention(*batch.arguments(), window=4)
    assert paged_attention(*batch.arguments(), window=3).isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_soft_cap_bends_the_scores(dtype: torch.dtype) -> None:
    batch = paged_batch(MIX, **FOLD, dtype=dtype)
    batch.scale = 2.0
    y = paged_attention(*batch.arguments(), softcap=3.0)
    assert_is(y, batch, causally, lambda scores, head, places: 3.0 * (scores / 3.0).tanh())


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("window", [None, 9])
def test_slopes_add_their_product_with_the_keys_place_in_their_own_dtype(window: int | None, kind: torch.dtype) -> None:
    batch = paged_batch([(1, 300), (20, 20)], **FOLD)
    slopes = (2.0 ** -torch.linspace(0.5, 8, 6)).to(kind)
    y = paged_attention(*batch.arguments(), window=window, slopes=slopes)

    def biased(scores: Tensor, head: int, places: Tensor) -> Tensor:
        return scores + (slopes[head] * places.to(kind)).double()

    def sees(s: int, i: int, j: int) -> bool:
        return j <= i and (window is None or i - j < window)

    assert_is(y, batch, sees, biased, floor=1e-4)
    other_kind = torch.bfloat16 if kind is torch.float32 else torch.float32
    other = paged_attention(*batch.arguments(), window=window, slopes=slopes.to(other_kind))
    assert not torch.allclose(y, other, rtol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 6])
def test_a_prefix_sees_itself_whole(window: int | None, dtype: torch.dtype) -> None:
    batch = paged_batch(MIX, **FOLD, dtype=dtype)
    prefixes = [30, 13, 0, 36, 0]
    y = paged_attention(*batch.arguments(), window=window, visible=torch.tensor(prefixes, dtype=torch.int32))

    def sees(s: int, i: int, j: int) -> bool:
        within = i < prefixes[s] and j < prefixes[s]
        return within or (j <= i and (window is None or i - j < window))

    assert_is(y, batch, sees)


def test_a_prefix_as_long_as_the_sequence_is_attention_without_a_mask() -> None:
    batch = paged_batch([(9, 9)], group=1, block_size=16)
    k, v = (cache[batch.block_tables[0, 0].item(), :, :9] for cache in (batch.k_cache, batch.v_cache))
    y = paged_attention(*batch.arguments(), visible=torch.tensor([9], dtype=torch.int32))
    torch.testing.assert_close(
        y, functional.scaled_dot_product_attention(batch.q.transpose(0, 1), k, v).transpose(0, 1)
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_cross_attention_sees_all_keys_however_many_queries_ask(dtype: torch.dtype) -> None:
    batch = paged_batch([(1, 33), (7, 7), (0, 12), (3, 6)], **FOLD, dtype=dtype)
    batch.context_lens = torch.tensor([30, 2, 12, 6], dtype=torch.int32)
    y = paged_attention(*batch.arguments(), causal=False)
    assert_is(y, batch, lambda s, i, j: True)


def test_cross_attention_to_nothing_is_zero() -> None:
    batch = paged_batch([(2, 2), (1, 4)], **FOLD)
    batch.context_lens[0] = 0
    y = paged_attention(*batch.arguments(), causal=False)
    assert (y[:2] == 0).all() and (y[2] != 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_cross_attention_sees_the_range_that_each_query_has(dtype: torch.dtype) -> None:
    batch = paged_batch([(3, 33), (2, 7), (1, 12)], **FOLD, dtype=dtype)
    ranges = torch.tensor([[0, 33], [5, 6], [30, 33], [0, 7], [2, 5], [11, 12]], dtype=torch.int32)
    y = paged_attention(*batch.arguments(), causal=False, ranges=ranges)
    starts, contexts = batch.query_starts.tolist(), batch.context_lens.tolist()

    def sees(s: int, i: int, j: int) -> bool:
        first, end = ranges[starts[s + 1] - contexts[s] + i].tolist()
        return bool(first <= j < end)

    assert_is(y, batch, sees)


def test_a_query_whose_range_is_empty_gets_zeros() -> None:
    batch = paged_batch([(2, 9)], **FOLD)
    y = paged_attention(*batch.arguments(), causal=False, ranges=torch.tensor([[4, 4], [0, 9]], dtype=torch.int32))
    assert (y[0] == 0).all() and (y[1] != 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_that_a_layer_may_ask_for_at_once(dtype: torch.dtype) -> None:
    batch = paged_batch(MIX, **FOLD, dtype=dtype)
    slopes = 2.0 ** -torch.linspace(0.5, 8, 6)
    visible = torch.tensor([0, 13, 0, 36, 1], dtype=torch.int32)
    out = torch.empty(batch.q.shape, dtype=dtype)
    y = paged_attention(*batch.arguments(), window=6, softcap=2.0, slopes=slopes, visible=visible, out=out)

    def sees(s: int, i: int, j: int) -> bool:
        prefix = int(visible[s])
        return (i < prefix and j < prefix) or 0 <= i - j < 6

    def scored(scores: Tensor, head: int, places: Tensor) -> Tensor:
        return 2.0 * (scores / 2.0).tanh() + slopes[head].double() * places

    assert y is out
    assert_is(out, batch, sees, scored)


@pytest.mark.parametrize(
    "settings",
    [
        {"window": 0},
        {"softcap": 0.0},
        {"slopes": torch.ones(5)},
        {"visible": torch.zeros(3, dtype=torch.int32)},
        {"causal": False, "window": 4},
        {"causal": False, "visible": torch.zeros(2, dtype=torch.int32)},
        {"ranges": torch.zeros(4, 2, dtype=torch.int32)},
        {"causal": False, "ranges": torch.zeros(3, 2, dtype=torch.int32)},
    ],
)
def test_a_setting_that_means_nothing_is_refused(settings: dict[str, object]) -> None:
    batch = paged_batch([(1, 5), (3, 3)], **FOLD)
    with pytest.raises(ValueError, match="paged_attention"):
        paged_attention(*batch.arguments(), **settings)  # type: ignore[arg-type]


def test_the_operator_passes_torchs_checks() -> None:
    batch = paged_batch([(1, 5), (3, 3)], width=8)
    visible = torch.tensor([0, 2], dtype=torch.int32)
    torch.library.opcheck(_operator, (*batch.arguments(), 4, 2.0, torch.ones(6), visible, True))
    torch.library.opcheck(_operator, (*batch.arguments(), None, None, None, None, False))
    ranges = torch.tensor([[0, 5], [0, 1], [1, 3], [0, 3]], dtype=torch.int32)
    torch.library.opcheck(_operator, (*batch.arguments(), None, None, None, None, False, ranges))
