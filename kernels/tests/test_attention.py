"""paged_attention: the reference against torch's attention, every C++ variant against the reference."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional

from bestiary_kernels import library, paged_attention
from bestiary_kernels.attention import reference

from .cases import Batch, assert_rounds_to, assert_weighs, paged_batch

DTYPES = [torch.float32, torch.bfloat16]
BACKENDS = library.status().available
MIXES = {
    "one token": [(1, 1)],
    "decode": [(1, 5), (1, 64), (1, 17), (1, 130)],
    "prefill": [(17, 17), (130, 130)],
    "chunk": [(3, 70)],
    "mixed": [(1, 33), (40, 40), (0, 12), (7, 129), (1, 1)],
}


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Most keys are cut into spans only where threads share them."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def assert_every_variant_agrees(batch: Batch, **settings: Any) -> None:
    expected = reference.paged_attention(*batch.arguments(), **settings)
    sizes = reference.paged_attention(*replace(batch, v_cache=batch.v_cache.abs()).arguments(), **settings)
    for backend in BACKENDS[1:]:
        with library.using(backend):
            assert_weighs(paged_attention(*batch.arguments(), **settings), expected, sizes, floor=3e-5)


def test_reference_is_torchs_attention() -> None:
    batch = paged_batch([(9, 9)], group=3, width=32)
    page = int(batch.block_tables[0, 0])
    k, v = (cache[page, :, :9].repeat_interleave(3, 0) for cache in (batch.k_cache, batch.v_cache))
    expected = functional.scaled_dot_product_attention(batch.q.transpose(0, 1), k, v, is_causal=True)
    torch.testing.assert_close(reference.paged_attention(*batch.arguments()), expected.transpose(0, 1))


def test_reference_in_chunks_is_the_whole() -> None:
    batch = paged_batch([(20, 20)], block_size=5)
    whole = reference.paged_attention(*batch.arguments())
    batch.q, batch.query_starts = batch.q[13:], torch.tensor([0, 7], dtype=torch.int32)
    torch.testing.assert_close(reference.paged_attention(*batch.arguments()), whole[13:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize(
    ("group", "width", "block_size"), [(1, 32, 16), (3, 64, 16), (8, 128, 16), (3, 80, 5), (8, 64, 5), (1, 20, 5)]
)
def test_every_variant_agrees_with_the_reference(
    group: int, width: int, block_size: int, mix: str, dtype: torch.dtype
) -> None:
    batch = paged_batch(MIXES[mix], group=group, width=width, block_size=block_size, dtype=dtype)
    assert_every_variant_agrees(batch)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [[(1, 1500)], [(5, 1400), (1, 40)], [(300, 900)], [(1, 5000)] * 4])
def test_spans_of_a_long_context_join_to_the_whole(lengths: list[tuple[int, int]], dtype: torch.dtype) -> None:
    assert_every_variant_agrees(paged_batch(lengths, dtype=dtype))


def span_settings(name: str) -> dict[str, Any]:
    """Such that some rows of a tile see keys of some spans only, or of none."""
    many: dict[str, dict[str, Any]] = {
        "window": {"window": 600, "softcap": 5.0},
        "slopes": {"slopes": 2.0 ** -torch.arange(3, 9).float()},
        "sinks": {"sinks": 6 + torch.randn(6)},
        "prefix": {"window": 9, "visible": torch.tensor([890], dtype=torch.int32)},
        "cross": {"causal": False},
        "ranges": {"causal": False, "ranges": torch.tensor([[0, 3], [1390, 1400], [700, 700], [5, 1400], [9, 4]])},
    }[name]
    return {key: value.int() if key == "ranges" else value for key, value in many.items()}


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["window", "slopes", "sinks", "prefix", "cross", "ranges"])
def test_spans_join_under_every_setting(name: str, dtype: torch.dtype) -> None:
    lengths = [(300, 900)] if name == "prefix" else [(5, 1400)]
    assert_every_variant_agrees(paged_batch(lengths, dtype=dtype), **span_settings(name))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 90)), min_size=1, max_size=5),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 5),
    width=st.integers(1, 70),
    block_size=st.integers(1, 20),
)
def test_any_ragged_batch_agrees_with_the_reference(
    lengths: list[tuple[int, int]], kv_heads: int, group: int, width: int, block_size: int
) -> None:
    ragged = [(query, query + before) for query, before in lengths]
    batch = paged_batch(ragged, kv_heads=kv_heads, group=group, width=width, block_size=block_size)
    assert_every_variant_agrees(batch)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("block", [-1, 10**6])
def test_a_block_id_outside_the_cache_is_refused(backend: str, block: int) -> None:
    batch = paged_batch([(1, 40), (2, 20)])
    batch.block_tables[1, 1] = block
    with library.using(backend), pytest.raises(IndexError, match="paged_attention: a block id"):
        paged_attention(*batch.arguments())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("starts", "contexts"), [([0, 1, 2], [40, 20]), ([0, 4, 3], [40, 20]), ([0, 1, 3], [40, 1]), ([0, 1, 3], [400, 20])]
)
def test_starts_and_lengths_that_do_not_fit_are_refused(backend: str, starts: list[int], contexts: list[int]) -> None:
    batch = paged_batch([(1, 40), (2, 20)])
    batch.query_starts = torch.tensor(starts, dtype=torch.int32)
    batch.context_lens = torch.tensor(contexts, dtype=torch.int32)
    with library.using(backend), pytest.raises(ValueError, match="paged_attention"):
        paged_attention(*batch.arguments())


@pytest.mark.parametrize("cache", ["k_cache", "v_cache"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_in_one_sequence_reaches_its_rows_and_no_others(variant: str, cache: str, dtype: torch.dtype) -> None:
    batch = paged_batch([(1, 20), (1, 20)], dtype=dtype)
    getattr(batch, cache)[batch.block_tables[1, 0].item(), :, 3] = float("nan")
    out = paged_attention(*batch.arguments())
    assert out[0].isfinite().all() and out[1].isnan().all()


def test_out_receives_the_result(variant: str) -> None:
    batch = paged_batch([(3, 30)])
    out = torch.empty(batch.q.shape)
    assert paged_attention(*batch.arguments(), out=out) is out
    assert_rounds_to(out, reference.paged_attention(*batch.arguments()))


def test_large_scores_do_not_overflow(variant: str) -> None:
    batch = paged_batch([(4, 90)])
    batch.scale = 300.0
    assert_rounds_to(paged_attention(*batch.arguments()), reference.paged_attention(*batch.arguments()), floor=1e-3)


def test_shapes_that_do_not_fit_are_refused() -> None:
    batch = paged_batch([(3, 30)])
    with pytest.raises(ValueError, match="paged_attention"):
        paged_attention(batch.q[:, :5], *batch.arguments()[1:])
