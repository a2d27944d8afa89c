"""lora: the reference against PEFT's formula, every C++ variant against it in float64, tapes, what is refused."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from bestiary_kernels import Arena, Tape, add_rms_norm, gpu, library, lora
from bestiary_kernels.lora import _operator

from .cases import assert_rounds_to
from .grid.interpreter import interpreted

DTYPES = [torch.float32, torch.bfloat16]
BACKENDS = library.status().available
needs_library = pytest.mark.skipif(library.active() is None, reason="no C++ library is in use")

Arguments = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def a_batch(
    slots: list[int],
    *,
    ranks: list[list[int]],
    widths: list[int],
    inputs: int = 40,
    most_rank: int = 8,
    dtype: torch.dtype = torch.float32,
) -> Arguments:
    """The arguments of lora; ranks beyond an adapter's own are NaN: reading one would show."""
    rows, columns = len(slots), sum(widths)
    down = (torch.randn(len(ranks), len(widths), most_rank, inputs) * inputs**-0.5).to(dtype)
    up = torch.randn(len(ranks), most_rank, columns).to(dtype)
    starts = torch.tensor([0, *torch.tensor(widths).cumsum(0).tolist()], dtype=torch.int32)
    for slot, of_parts in enumerate(ranks):
        for part, rank in enumerate(of_parts):
            down[slot, part, rank:] = float("nan")
            up[slot, rank:, starts[part] : starts[part + 1]] = float("nan")
    y, x = torch.randn(rows, columns).to(dtype), torch.randn(rows, inputs).to(dtype)
    return y, x, torch.tensor(slots, dtype=torch.int32), down, up, torch.tensor(ranks, dtype=torch.int32), starts


def expected(y: Tensor, x: Tensor, slots: Tensor, down: Tensor, up: Tensor, ranks: Tensor, starts: Tensor) -> Tensor:
    """Row by row in float64, rounded once."""
    wide = y.double()
    for row, slot in enumerate(slots.tolist()):
        for part in range(ranks.shape[1] if slot >= 0 else 0):
            rank, columns = int(ranks[slot, part]), slice(int(starts[part]), int(starts[part + 1]))
            inner = down[slot, part, :rank].double() @ x[row].double()
            wide[row, columns] += inner @ up[slot, :rank, columns].double()
    return wide.to(y.dtype)


def assert_every_backend_agrees(batch: Arguments) -> None:
    y, others = batch[0], batch[1:]
    correct = expected(*batch)
    for backend in BACKENDS:
        with library.using(backend):
            changed = y.clone()
            assert lora(changed, *others) is changed
            assert_rounds_to(changed, correct, floor=1e-4 if y.dtype is torch.float32 else 1e-2)
            without = (others[1] < 0).nonzero()[:, 0]
            assert torch.equal(changed[without], y[without])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("slots", [[], [0], [-1, 2, -1], [2, 1, 0, 2, 1, 0], [1] * 25, [0] * 7 + [-1] * 3 + [2] * 13])
@pytest.mark.parametrize(
    ("inputs", "widths", "most_rank"), [(576, [576, 192, 192], 16), (33, [1, 70, 15], 5), (1, [1, 1, 1], 1)]
)
def test_every_backend_agrees_with_float64(
    slots: list[int], inputs: int, widths: list[int], most_rank: int, dtype: torch.dtype
) -> None:
    ranks = [[most_rank] * 3, [most_rank, 0, most_rank // 2], [1, most_rank, 0]]
    batch = a_batch(slots, ranks=ranks, widths=widths, inputs=inputs, most_rank=most_rank, dtype=dtype)
    assert_every_backend_agrees(batch)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    slots=st.lists(st.integers(-1, 3), max_size=20),
    ranks=st.lists(st.integers(0, 11), min_size=16, max_size=16),
    widths=st.lists(st.integers(0, 90), min_size=1, max_size=4),
    inputs=st.integers(1, 90),
    dtype=st.sampled_from(DTYPES),
)
def test_any_batch_agrees_with_float64(
    slots: list[int], ranks: list[int], widths: list[int], inputs: int, dtype: torch.dtype
) -> None:
    of_slots = [ranks[4 * slot :][: len(widths)] for slot in range(4)]
    batch = a_batch(slots, ranks=of_slots, widths=widths, inputs=inputs, most_rank=11, dtype=dtype)
    assert_every_backend_agrees(batch)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_work_that_threads_share_loses_nothing(threads: int, dtype: torch.dtype) -> None:
    slots = [row // 40 % 3 - 1 for row in range(300)] + list(range(2)) * 8
    batch = a_batch(slots, ranks=[[20, 7], [0, 16]], widths=[1000, 530], inputs=300, most_rank=20, dtype=dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_every_backend_agrees(batch)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_without_slots_nothing_is_touched(backend: str, dtype: torch.dtype) -> None:
    y, x, slots, *others = a_batch([-1] * 9, ranks=[[3]], widths=[50], dtype=dtype)
    y[3] = float("nan")
    before = y.clone().view(torch.int16)
    with library.using(backend):
        assert torch.equal(lora(y, x, slots, *others).view(torch.int16), before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_part_without_an_adapter_keeps_its_bits(backend: str) -> None:
    batch = a_batch([0, 1, 0], ranks=[[4, 0, 4], [0, 0, 0]], widths=[30, 33, 30])
    batch[0][:, 30:63] = -0.0
    before = batch[0].clone()
    with library.using(backend):
        after = lora(*batch)
    assert torch.equal(after[:, 30:63].signbit(), before[:, 30:63].signbit())
    assert torch.equal(after[1], before[1]) and not torch.equal(after[0], before[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_reaches_its_row_and_no_other(variant: str, dtype: torch.dtype) -> None:
    batch = a_batch([0] * 5, ranks=[[4]], widths=[70], dtype=dtype)
    batch[1][2, 7] = float("nan")
    y = lora(*batch)
    assert y[2].isnan().all() and int(y.isnan().sum()) == 70


def test_rows_may_be_strided(variant: str) -> None:
    _, _, *others = a_batch([1, 0, 0, -1, 0], ranks=[[4, 8], [2, 0]], widths=[60, 10])
    y, x = torch.randn(5, 100), torch.randn(5, 64)
    before, inside = y.clone(), (y[:, 20:90], x[:, 3:43])
    correct = expected(*inside, *others)
    assert_rounds_to(lora(*inside, *others), correct, floor=1e-4)
    assert torch.equal(y[:, :20], before[:, :20]) and torch.equal(y[:, 90:], before[:, 90:])


def test_other_layouts_and_dtypes_are_the_references(variant: str) -> None:
    batch = a_batch([1, 0, -1], ranks=[[4, 8], [2, 0]], widths=[30, 12])
    correct = expected(*batch)
    y, x, slots, down, up, ranks, starts = batch
    turned = [tensor.transpose(-1, -2).contiguous().transpose(-1, -2) for tensor in (y, x, down, up)]
    every_other = torch.stack([slots, slots], 1)[:, 0]
    for layout in (
        (turned[0], x, slots, down, up, ranks, starts),
        (y.clone(), turned[1], slots, down, up, ranks, starts),
        (y.clone(), x, every_other, turned[2], turned[3], ranks, starts),
        (y.clone(), x, slots.long(), down, up, ranks.long(), starts.long()),
    ):
        assert_rounds_to(lora(*layout), correct, floor=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_slots_ranks_and_starts_outside_are_refused_and_nothing_is_written(backend: str) -> None:
    y, x, slots, down, up, ranks, starts = a_batch([0, 1, -1], ranks=[[4, 8], [2, 0]], widths=[30, 12])
    before = y.clone()
    with library.using(backend):
        for outside in (-2, 2, 2**31 - 1, -(2**31)):
            wrong = torch.tensor([0, outside, -1], dtype=torch.int32)
            with pytest.raises(IndexError, match="a slot lies outside the adapters"):
                lora(y, x, wrong, down, up, ranks, starts)
        for rank in (9, -1):
            wrong = torch.tensor([[4, 8], [rank, 0]], dtype=torch.int32)
            with pytest.raises(IndexError, match="a rank is outside"):
                lora(y, x, slots, down, up, wrong, starts)
        for cut in ([0, 30, 43], [1, 30, 42], [0, 43, 42], [0, -1, 42]):
            with pytest.raises(ValueError, match="starts do not cut"):
                lora(y, x, slots, down, up, ranks, torch.tensor(cut, dtype=torch.int32))
        assert torch.equal(y, before)
        unused = torch.tensor([[4, 8], [9, 0]], dtype=torch.int32)
        lora(y, x, torch.tensor([0, -1, 0], dtype=torch.int32), down, up, unused, starts)
    assert torch.equal(y[1], before[1])


@pytest.mark.skipif(not gpu.is_installed(), reason="Triton is not installed")
@pytest.mark.parametrize("times", [1, 50])
def test_on_a_gpu_slots_and_ranks_outside_leave_rows_and_parts_as_they_are(times: int) -> None:
    slots = [0, 2, 1, -7, 2**31 - 1] * times
    y, x, slots_T, down, up, _, starts = a_batch(slots, ranks=[[4, 8], [2, 0]], widths=[30, 12])
    wrong = torch.tensor([[4, 9], [-1, 2]], dtype=torch.int32)
    down.nan_to_num_(), up.nan_to_num_()
    before = y.clone()
    with interpreted():
        lora(y, x, slots_T, down, up, wrong, starts)
    known = torch.tensor([slot if slot in (0, 1) else -1 for slot in slots], dtype=torch.int32)
    correct = expected(before, x, known, down, up, torch.tensor([[4, 0], [0, 2]], dtype=torch.int32), starts)
    assert_rounds_to(y, correct, floor=1e-4)
    assert torch.equal(y[known < 0], before[known < 0])


def test_shapes_and_dtypes_that_do_not_fit_are_refused() -> None:
    batch = a_batch([0, 1, -1], ranks=[[4, 8], [2, 0]], widths=[30, 12])
    for place in range(7):
        if place != 3:  # the one that the others are compared with
            short = [tensor[:-1] if place == number else tensor for number, tensor in enumerate(batch)]
            with pytest.raises(ValueError, match="lora: the shapes"):
                lora(*short)
    for place in (0, 1, 3, 4):
        other = [tensor.bfloat16() if place == number else tensor for number, tensor in enumerate(batch)]
        with pytest.raises(ValueError, match="bfloat16"):
            lora(*other)


@needs_library
def test_a_replay_follows_the_slots_and_adapters_of_the_moment() -> None:
    y, x, slots, down, up, ranks, starts = a_batch([-1] * 4, ranks=[[4, 8], [2, 0]], widths=[30, 12])
    scale, arena = torch.ones(42), Arena()

    def step() -> Tensor:
        normed, _ = add_rms_norm(y, None, scale, 1e-5)
        lora(normed, x, slots, down, up, ranks, starts)
        return add_rms_norm(normed, None, scale, 1e-5)[0]

    _, tape = Tape.record(step, arena)
    assert tape is not None
    without = tape.replay().clone()
    for number, in_use in enumerate(([0, 1, -1, 0], [1, 1, 1, 1], [0, 0, 0, 0], [-1, -1, -1, 1], [-1, -1, -1, -1])):
        slots.copy_(torch.tensor(in_use, dtype=torch.int32))
        down.copy_(torch.randn(down.shape)), up.copy_(torch.randn(up.shape))
        ranks.copy_(torch.tensor([[number + 1, 8 - number], [0, number]], dtype=torch.int32))
        for _ in range(2):  # what the first one added is not added to
            torch.testing.assert_close(tape.replay().clone(), step(), atol=0, rtol=0)
        assert torch.equal(tape.replay()[slots < 0], without[slots < 0])
    slots[2] = 2
    with pytest.raises(IndexError, match="lora: a slot lies outside"):
        tape.replay()
    slots[2] = -1
    torch.testing.assert_close(tape.replay(), without, atol=0, rtol=0)


def test_the_operator_passes_torchs_checks() -> None:
    batch = a_batch([0, 1, -1], ranks=[[4, 8], [2, 0]], widths=[30, 12])
    torch.library.opcheck(_operator, batch)
    meta = [tensor.to("meta") for tensor in batch]
    assert lora(*meta) is meta[0]


def test_compiled_code_goes_through_the_operator() -> None:
    batch = a_batch([0, 1, -1], ranks=[[4, 8], [2, 0]], widths=[30, 12])
    correct = expected(*batch)
    compiled = torch.compile(lora, backend="eager", fullgraph=True)
    assert_rounds_to(compiled(*batch), correct, floor=1e-4)
