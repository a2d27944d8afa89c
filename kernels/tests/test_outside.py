"""On a GPU nothing waits for ids, slots and positions: what lies outside is neither read nor written, nor raised."""

import itertools
from collections.abc import Iterator

import pytest
import torch

from bestiary_kernels import cache_write, causal_conv, embedding, gpu, lora, rotary, rotary_cache_write, selective_scan

from .grid.interpreter import interpreted

pytestmark = pytest.mark.skipif(not gpu.is_installed(), reason="Triton is not installed")
TABLE = torch.stack((torch.zeros(4, 3), torch.ones(4, 3)), 1)  # a quarter turn: a becomes -b, b becomes a


@pytest.fixture(autouse=True)
def _on_triton() -> Iterator[None]:
    with interpreted():
        yield


@pytest.mark.parametrize("outside", [-1, 3, 2**40, -(2**40)])
def test_an_id_outside_the_table_is_a_row_of_zeros(outside: int) -> None:
    table = torch.randn(5, 8)[1:4]  # rows before and behind it, which must not be seen
    y = embedding(table, torch.tensor([2, outside, 0]))
    assert torch.equal(y, torch.stack((table[2], torch.zeros(8), table[0])))


@pytest.mark.parametrize("outside", [-1, -7, 15, 2**40])
def test_a_latent_slot_outside_the_cache_is_not_written(outside: int) -> None:
    whole = torch.zeros(5, 5, 6)
    cache_write(torch.ones(2, 6), torch.tensor([outside, 4]), whole[1:4])
    assert torch.equal(whole[1, 4], torch.ones(6)) and whole.sum() == 6


@pytest.mark.parametrize("outside", [-1, 4, 2**40])
def test_a_position_outside_the_table_turns_to_zeros(outside: int) -> None:
    x = torch.randn(2, 3, 8)
    y = rotary(x, TABLE, torch.tensor([outside, 3]))
    assert not y[0].any()
    assert torch.equal(y[1], torch.cat((-x[1, :, 3:6], x[1, :, :3], x[1, :, 6:]), -1))


@pytest.mark.parametrize("outside", [-1, 4, 2**40])
def test_a_token_whose_position_is_outside_the_table_stays_as_it_is(outside: int) -> None:
    q, k, v = torch.randn(2, 4, 8), torch.randn(2, 2, 8), torch.randn(2, 2, 8)
    before, caches = (q.clone(), k.clone()), torch.zeros(2, 3, 2, 5, 8)
    rotary_cache_write(q, k, v, TABLE, torch.tensor([outside, 0]), torch.tensor([1, 2]), *caches)
    assert torch.equal(q[0], before[0][0]) and torch.equal(k[0], before[1][0])
    assert not torch.equal(q[1], before[0][1]) and not torch.equal(k[1], before[1][1])
    assert torch.equal(caches[0, 0, :, 2], k[1]) and torch.equal(caches[1, 0, :, 2], v[1])
    assert caches.count_nonzero() == 2 * 2 * 8


@pytest.mark.parametrize("outside", [-2, 15, 2**40])
def test_a_slot_outside_the_cache_is_not_written_and_its_token_is_turned(outside: int) -> None:
    q, k, v = torch.randn(1, 4, 8), torch.randn(1, 2, 8), torch.randn(1, 2, 8)
    before, caches = k.clone(), torch.zeros(2, 5, 2, 5, 8)
    rotary_cache_write(q, k, v, TABLE, torch.tensor([1]), torch.tensor([outside]), *caches[:, 1:4])
    assert torch.equal(k[..., :3], -before[..., 3:6]) and not caches.any()


@pytest.mark.parametrize("outside", [-1, 3, 2**40])
def test_a_state_outside_is_zeros_where_it_is_read_and_not_written(outside: int) -> None:
    x, columns, states = torch.randn(2, 8), torch.ones(5, 8, 3), torch.ones(5, 8, 4)  # the slots before and behind
    read, write, starts = torch.tensor([outside, 2]), torch.tensor([1, outside]), torch.tensor([0, 1, 2]).int()
    slots, b = (read, write, starts, torch.zeros(2, dtype=torch.bool)), torch.randn(2, 4)
    y = causal_conv(x, torch.ones(8, 4), None, columns[1:4], *slots, act=None)
    torch.testing.assert_close(y, torch.stack((x[0], x[1] + 3)))
    assert torch.equal(columns[2], torch.stack((torch.zeros(8), torch.zeros(8), x[0]), 1))
    y = selective_scan(x, torch.ones(2, 8), torch.zeros(8, 4), b, torch.ones(2, 4), torch.zeros(8), states[1:4], *slots)
    torch.testing.assert_close(y, torch.stack((x[0] * b[0].sum(), 4 + x[1] * b[1].sum())))
    torch.testing.assert_close(states[2], torch.outer(x[0], b[0]))
    assert all((kept[[0, 1, 3, 4]] == 1).all() for kept in (columns, states))


@pytest.mark.parametrize("starts", [[0, 5, 2], [-3, 1, 2], [0, 1, 9], [2, 1, 0], [7, 8, 9]])
def test_starts_that_do_not_rise_with_the_tokens_touch_nothing_outside(starts: list[int]) -> None:
    x, columns, states = torch.randn(4, 8), torch.ones(5, 8, 3), torch.ones(5, 8, 4)
    rest = torch.tensor(starts).int(), torch.zeros(2, dtype=torch.bool)
    slots, b = (torch.tensor([0, 1]), torch.tensor([2, 1]), *rest), torch.randn(4, 4)
    causal_conv(x[1:3], torch.ones(8, 4), None, columns[1:4], *slots)
    selective_scan(x[1:3], x[1:3], torch.zeros(8, 4), b[1:3], b[1:3], torch.zeros(8), states[1:4], *slots)
    assert all((kept[[0, 1, 4]] == 1).all() for kept in (columns, states))


@pytest.mark.parametrize("rows", [3, 130])
@pytest.mark.parametrize("starts", [[-7, 10, 1100], [2**31 - 1, 600, 1100], [5, 600, 1150]])
def test_parts_of_an_adapter_that_begin_or_end_outside_are_cut(rows: int, starts: list[int]) -> None:
    guarded = torch.zeros(rows + 2, 1100)
    down, up = torch.ones(1, 2, 1, 4), torch.ones(1, 1, 1100)
    given = torch.zeros(rows).int(), down, up, torch.ones(1, 2).int(), torch.tensor(starts).int()
    lora(guarded[1:-1], torch.ones(rows, 4), *given)
    expected = torch.zeros(1100)
    for begin, end in itertools.pairwise(min(max(start, 0), 1100) for start in starts):
        expected[begin:end] += 4
    assert torch.equal(guarded[1:-1], expected.expand(rows, -1))
    assert not guarded[0].any() and not guarded[-1].any()
