"""What only attention's Triton kernels have: a list of work that is cut, sizes from the host alone, no exceptions."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bestiary_kernels import gpu, latent_attention, paged_attention
from bestiary_kernels.attention import reference

from .cases import Batch, paged_batch
from .grid.interpreter import interpreted

pytestmark = pytest.mark.skipif(not gpu.is_installed(), reason="Triton is not installed")
FOLD = {"kv_heads": 1, "group": 3, "width": 16, "block_size": 5}


@pytest.fixture(autouse=True)
def _on_triton() -> Iterator[None]:
    with interpreted():
        yield


def run(batch: Batch, sinks: Tensor | None = None) -> Tensor:
    out = torch.full(batch.q.shape, float("nan"), dtype=batch.q.dtype)
    return paged_attention(*batch.arguments(), sinks=sinks, out=out)


def assert_near(y: Tensor, batch: Batch, tolerance: float = 1e-5, sinks: Tensor | None = None) -> None:
    wide = replace(batch, q=batch.q.float(), k_cache=batch.k_cache.float(), v_cache=batch.v_cache.float())
    expected = reference.paged_attention(*wide.arguments(), sinks=sinks)
    torch.testing.assert_close(y.float(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("processors", [1, 5, 40])
@pytest.mark.parametrize(
    "lengths",
    [
        [(1, 700)],
        [(1, 3), (1, 650), (0, 0), (1, 64), (1, 130)],
        [(0, 40), (2, 300)],  # as many tokens as sequences, and not one each
        [(1, 400), (9, 90), (1, 33), (0, 0)],
        [(30, 200)],
    ],
)
def test_a_list_has_room_for_every_cut(
    lengths: list[tuple[int, int]], processors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bestiary_kernels.attention import triton

    monkeypatch.setattr(triton, "_processors", lambda device: processors)
    batch = paged_batch(lengths, **FOLD)
    assert_near(run(batch), batch)


@pytest.mark.parametrize("lengths", [[(1, 700), (1, 3)], [(30, 200), (1, 3)]])  # cut, and whole
def test_a_sink_takes_its_share_of_a_row_once(lengths: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    from bestiary_kernels.attention import triton

    monkeypatch.setattr(triton, "_processors", lambda device: 5)
    batch = paged_batch(lengths, **(FOLD | {"kv_heads": 2}))
    sinks = torch.tensor([1.0, 2.0, 3.0, -1.0, 4.0, 5.0])
    assert_near(run(batch, sinks), batch, sinks=sinks)


def test_more_sequences_than_are_counted_at_a_time() -> None:
    lengths = [(0, 7)] * 300
    lengths[3], lengths[255], lengths[256], lengths[299] = (1, 200), (1, 9), (1, 90), (1, 70)
    batch = paged_batch(lengths, **FOLD)
    assert_near(run(batch), batch)


@pytest.mark.parametrize("lengths", [[(1, 200), (1, 5)], [(19, 70), (1, 30)]])
def test_halves_are_multiplied_as_they_are(lengths: list[tuple[int, int]]) -> None:
    batch = paged_batch(lengths, dtype=torch.float16)
    y = run(batch)
    assert y.dtype is torch.float16
    assert_near(y, batch, 2e-3)


def test_queries_in_full_over_a_cache_of_less() -> None:
    batch = paged_batch([(1, 200), (1, 5)], dtype=torch.bfloat16)
    batch.q = batch.q.float()
    assert_near(run(batch), batch, 1e-5)


def test_a_batch_without_tokens_or_sequences_is_nothing() -> None:
    assert run(paged_batch([(0, 12), (0, 0)], **FOLD)).shape == (0, 3, 16)
    assert run(paged_batch([], **FOLD)).shape == (0, 3, 16)


@pytest.mark.parametrize("mark", [-1, 2**31 - 1])
def test_a_block_outside_the_cache_is_not_read_and_harms_no_other_sequence(mark: int) -> None:
    batch = paged_batch([(1, 40), (2, 20)], **FOLD)
    whole = run(batch)
    batch.block_tables[1, 2] = mark
    y = run(batch)
    assert y.isfinite().all() and torch.equal(y[0], whole[0]) and not torch.equal(y[1:], whole[1:])


@pytest.mark.parametrize(
    ("starts", "contexts"),
    [([0, 1, 900], [40, 20]), ([0, 1, -5], [40, 20]), ([0, 1, 3], [40, 2**31 - 1]), ([0, 1, 3], [40, -3])],
)
def test_starts_and_lengths_that_do_not_fit_harm_no_other_sequence(starts: list[int], contexts: list[int]) -> None:
    batch = paged_batch([(1, 40), (2, 20)], **FOLD)
    whole = run(batch)
    batch.query_starts = torch.tensor(starts, dtype=torch.int32)
    batch.context_lens = torch.tensor(contexts, dtype=torch.int32)
    torch.testing.assert_close(run(batch)[0], whole[0])


def test_the_host_looks_at_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = paged_batch([(1, 200), (1, 5)], kv_heads=1, group=3, width=40, block_size=5)
    tables = (batch.block_tables, batch.query_starts, batch.context_lens, batch.scale)
    visible, slopes = torch.tensor([0, 3]), torch.ones(3)

    def look(*arguments: object) -> None:
        raise AssertionError("a GPU would have to be waited for")

    for name in ("item", "tolist", "__bool__", "__int__", "__index__", "nonzero"):
        monkeypatch.setattr(Tensor, name, look)
    paged_attention(*batch.arguments(), window=9, slopes=slopes, visible=visible)
    latent_attention(batch.q, batch.k_cache[:, 0], 28, *tables)
