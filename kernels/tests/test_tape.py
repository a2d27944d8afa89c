"""A recorded step computes with what lies in its memory now, and only if every part of it is a kernel of ours."""

import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch

import bestiary_kernels as kernels
from bestiary_kernels import Arena, Onward, PackedLinear, Tape, library
from bestiary_kernels.linear import MOST_ROWS

needs_library = pytest.mark.skipif(library.active() is None, reason="no C++ library is in use")


@needs_library
def test_a_replay_computes_from_the_inputs_of_the_moment() -> None:
    torch.manual_seed(0)
    x, scale = torch.randn(3, 64), torch.randn(64)
    output, tape = Tape.record(lambda: kernels.add_rms_norm(x, None, scale, 1e-5)[0])
    assert tape is not None
    torch.testing.assert_close(output, kernels.add_rms_norm(x, None, scale, 1e-5)[0], atol=0, rtol=0)
    for seed in range(3):
        torch.manual_seed(seed)
        x.copy_(torch.randn(3, 64))
        torch.testing.assert_close(tape.replay(), kernels.add_rms_norm(x, None, scale, 1e-5)[0], atol=0, rtol=0)


@needs_library
def test_memory_between_recorded_kernels_is_kept() -> None:
    """Whatever else takes memory after the recording must not get the recording's."""
    torch.manual_seed(0)
    gate_up, scale = torch.randn(2, 256), torch.randn(128)

    def step() -> torch.Tensor:
        hidden = kernels.gated_activation(gate_up)
        for _ in range(5):
            hidden, _ = kernels.add_rms_norm(hidden, None, scale, 1e-5)
        return hidden

    output, tape = Tape.record(step)
    assert tape is not None
    expected = output.clone()
    taken = [torch.full((2, 128), float("nan")) for _ in range(100)]
    torch.testing.assert_close(tape.replay(), expected, atol=0, rtol=0)
    assert all(bool(other.isnan().all()) for other in taken)


@needs_library
def test_recordings_share_an_arena_and_each_computes_its_own() -> None:
    torch.manual_seed(0)
    arena, scale = Arena(), torch.randn(5000)
    inputs = [torch.randn(rows, 5000) for rows in (3, 400, 1)]
    tapes = []
    for x in inputs:
        _, tape = Tape.record(lambda x=x: kernels.add_rms_norm(x, None, scale, 1e-5)[0], arena)  # type: ignore[misc]
        assert tape is not None
        tapes.append(tape)
    for _ in range(2):
        for x, tape in zip(inputs, tapes, strict=True):
            torch.testing.assert_close(tape.replay(), kernels.add_rms_norm(x, None, scale, 1e-5)[0], atol=0, rtol=0)
    assert tapes[0].output.data_ptr() == tapes[2].output.data_ptr()


class Chain:
    """A recorded step that says of each row's token which one comes next, and its counters."""

    def __init__(self, following: list[int], starts: list[int]) -> None:
        """`following`: of each token the next one; -1: no number. Beyond the last token the step fails."""
        self.table = table = torch.zeros(len(following), len(following) + 1)
        for token, after in enumerate(following):
            table[token, after] = 1 if after >= 0 else float("nan")
        self.tokens = torch.tensor(starts)
        self.places, self.slots = torch.arange(len(starts), dtype=torch.int32), 10 * torch.arange(len(starts))
        best, tape = Tape.record(lambda: kernels.greedy(kernels.embedding(table, self.tokens)))
        assert tape is not None
        self.onward = Onward(tape, best, self.tokens, [self.places, self.slots])

    def run(self, most: int = 9, ends: Sequence[Sequence[int]] | None = None, seconds: float = 60) -> list[list[int]]:
        return self.onward.run(most, [()] * len(self.tokens) if ends is None else ends, seconds)


@needs_library
def test_a_step_begins_with_what_the_one_before_found() -> None:
    chain = Chain([1, 2, 3, 4, 0], [0, 3, 1])
    assert chain.run(4) == [[1, 4, 2], [2, 0, 3], [3, 1, 4], [4, 2, 0]]
    # The input is the last step's, each of whose counters went up three times.
    assert chain.tokens.tolist() == [3, 1, 4]
    assert chain.places.tolist() == [3, 4, 5]
    assert chain.slots.tolist() == [3, 13, 23]
    assert chain.run(1) == [[4, 2, 0]]


@needs_library
def test_nothing_comes_after_an_end_or_what_is_no_number() -> None:
    assert Chain([1, 2, 3, 4, 0], [0, 3]).run(ends=[(3, 9), (3,)]) == [[1, 4], [2, 0], [3, 1]]
    assert Chain([1, 2, 3, 4, 0], [0, 3]).run(3, ends=[(4,), (3,)]) == [[1, 4], [2, 0], [3, 1]]
    assert Chain([1, 2, -1], [0, 0]).run() == [[1, 1], [2, 2], [-1, -1]]


@needs_library
def test_time_that_is_up_ends_it_after_the_first_step() -> None:
    assert Chain([1, 0], [0]).run(seconds=0) == [[1]]
    assert len(Chain([1, 0], [0]).run(50)) == 50


@needs_library
def test_a_later_step_that_fails_is_not_there_and_a_first_one_raises() -> None:
    chain = Chain([1, 2], [0])
    assert chain.run() == [[1], [2]]
    with pytest.raises(IndexError, match="embedding"):
        chain.run()


@needs_library
def test_what_does_not_go_from_row_to_row_is_refused() -> None:
    logits = torch.zeros(2, 3)
    _, tape = Tape.record(lambda: kernels.greedy(logits))
    assert tape is not None
    with pytest.raises(ValueError, match="one number a row"):
        Onward(tape, torch.zeros(2, dtype=torch.int64), torch.zeros(3, dtype=torch.int64), [])


@needs_library
def test_a_computation_of_torchs_own_makes_no_tape() -> None:
    x, scale = torch.randn(3, 64), torch.randn(64)
    output, tape = Tape.record(lambda: kernels.add_rms_norm(x * 2, None, scale, 1e-5)[0])
    assert tape is None
    torch.testing.assert_close(output, kernels.add_rms_norm(x * 2, None, scale, 1e-5)[0], atol=0, rtol=0)


@needs_library
def test_a_matrix_of_onednns_makes_no_tape() -> None:
    packed = PackedLinear(torch.randn(64, 64))
    x = torch.randn(MOST_ROWS + 1, 64)
    assert Tape.record(lambda: packed(x))[1] is None


@needs_library
def test_nothing_recorded_is_no_tape() -> None:
    assert Tape.record(lambda: torch.empty(3))[1] is None


def test_the_reference_makes_no_tape() -> None:
    x, scale = torch.randn(3, 64), torch.randn(64)
    with kernels.using("reference"):
        output, tape = Tape.record(lambda: kernels.add_rms_norm(x, None, scale, 1e-5)[0])
    assert tape is None
    torch.testing.assert_close(output, torch.nn.functional.rms_norm(x, (64,), scale, 1e-5))


@needs_library
def test_a_replay_raises_what_its_kernels_would() -> None:
    ids, table = torch.tensor([1, 2]), torch.randn(5, 16)
    _, tape = Tape.record(lambda: kernels.embedding(table, ids))
    assert tape is not None
    ids[1] = 4
    torch.testing.assert_close(tape.replay(), table[[1, 4]], atol=0, rtol=0)
    ids[1] = 5
    with pytest.raises(IndexError, match="embedding: a row number"):
        tape.replay()
    ids[1] = 0
    torch.testing.assert_close(tape.replay(), table[[1, 0]], atol=0, rtol=0)


@pytest.mark.skipif("avx512_bf16" not in kernels.status().available, reason="this machine's matrices are oneDNN's")
def test_a_whole_layer_in_bfloat16_is_recorded() -> None:
    torch.manual_seed(0)
    heads, kv_heads, width, block = 4, 2, 32, 16
    qkv = PackedLinear(torch.randn((heads + 2 * kv_heads) * width, 128).bfloat16())
    out = PackedLinear(torch.randn(128, heads * width).bfloat16(), torch.randn(128).bfloat16())
    x, scale = torch.randn(1, 128).bfloat16(), torch.randn(128).bfloat16()
    caches = [torch.randn(4, kv_heads, block, width).bfloat16() for _ in range(2)]
    angles = torch.randn(64, 2, width // 2)
    position, slot, length = torch.tensor([20]), torch.tensor([20]), torch.tensor([21], dtype=torch.int32)
    table, starts = torch.tensor([[0, 1, 2, 3]], dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)

    def step() -> torch.Tensor:
        y, _ = kernels.add_rms_norm(x, None, scale, 1e-5)
        q, k, v = qkv(y).view(1, -1, width).split_with_sizes((heads, kv_heads, kv_heads), 1)
        kernels.rotary_cache_write(q, k, v, angles, position, slot, *caches)
        mixed = kernels.paged_attention(q, *caches, table, starts, length, width**-0.5)
        return kernels.add_rms_norm(out(mixed.view(1, -1)), None, scale, 1e-5)[0]

    _, tape = Tape.record(step)
    assert tape is not None
    for at in (21, 22, 40):
        position[0], slot[0], length[0] = at, at, at + 1
        x.copy_(torch.randn(1, 128))
        torch.testing.assert_close(tape.replay().clone(), step(), atol=0, rtol=0)


@needs_library
@pytest.mark.parametrize("threads", [1, 2, 7])
def test_threads_that_stay_together_lose_no_part_of_any_loop(threads: int) -> None:
    """Loops of very different length, one right after the other, with more threads than cores: some come too late."""
    torch.manual_seed(0)
    weight, table, x = torch.randn(600, 512), torch.randn(300, 512), torch.randn(2, 512)
    wide, ids = PackedLinear(weight), torch.randint(0, 300, (60,))
    down, up = torch.randn(2, 1, 16, 512), torch.randn(2, 16, 600)
    adapter = torch.tensor([1, 0]).int(), down, up, torch.full((2, 1), 16).int(), torch.tensor([0, 600]).int()

    def step() -> torch.Tensor:
        for _ in range(10):
            y = kernels.lora(wide(x), x, *adapter)
            rows = kernels.embedding(table, ids)
        return kernels.add_rms_norm(rows, None, y[0, :512], 1e-5)[0]

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        expected, tape = Tape.record(step)
        assert tape is not None
        expected = expected.clone()
        for _ in range(30):
            tape.output.fill_(float("nan"))
            torch.testing.assert_close(tape.replay(), expected, atol=0, rtol=0)
    finally:
        torch.set_num_threads(before)


@needs_library
def test_a_layer_of_an_older_design_is_recorded() -> None:
    """Layer norm, a plain activation, rotary into new memory and latent rows: what no other test records."""
    torch.manual_seed(0)
    x, scale, bias = torch.randn(2, 3, 24), torch.randn(3, 24), torch.randn(24)
    angles, cache = torch.randn(9, 2, 8), torch.zeros(4, 5, 72)
    positions, slots = torch.tensor([3, 0]), torch.tensor([7, 19])

    def step() -> torch.Tensor:
        y, _ = kernels.add_layer_norm(x, None, scale, bias, 1e-5)
        y = kernels.rotary(kernels.activation(y, "relu2"), angles, positions, True)
        kernels.cache_write(y.view(2, -1), slots, cache)
        return kernels.add_layer_norm(y, None, None, bias, 1e-5)[0]

    _, tape = Tape.record(step)
    assert tape is not None
    for seed in range(3):
        torch.manual_seed(seed)
        x.copy_(torch.randn(2, 3, 24))
        positions.copy_(torch.randint(0, 9, (2,)))
        slots.copy_(torch.randperm(20)[:2])
        replayed = tape.replay().clone()
        written = cache.view(20, 72)[slots].clone()
        torch.testing.assert_close(replayed, step(), atol=0, rtol=0)
        torch.testing.assert_close(written, cache.view(20, 72)[slots], atol=0, rtol=0)
    positions[1] = 9
    with pytest.raises(IndexError, match="rotary: a position"):
        tape.replay()
    positions[1], slots[0] = 8, 20
    with pytest.raises(IndexError, match="cache_write: a slot"):
        tape.replay()


def one_token_each(lengths: torch.Tensor, heads: int, kv_heads: int, width: int) -> tuple[torch.Tensor, ...]:
    """q, caches, tables, starts and lengths of a decode step whose lengths may grow to 80."""
    sequences = len(lengths)
    q = torch.randn(sequences, heads, width)
    caches = torch.randn(2, sequences * 5, kv_heads, 16, width)
    tables = torch.randperm(sequences * 5).int().view(sequences, 5)
    return (q, *caches, tables, torch.arange(sequences + 1, dtype=torch.int32), lengths)


@needs_library
@pytest.mark.parametrize("name", ["window and soft cap", "slopes", "prefix", "cross", "ranges"])
def test_attention_is_recorded_with_its_settings(name: str) -> None:
    """Settings that are tensors are read where they lie, whenever the recording is replayed."""
    torch.manual_seed(0)
    lengths = torch.tensor([20, 33, 1], dtype=torch.int32)
    ranges = torch.tensor([[0, 20], [3, 9], [0, 1]], dtype=torch.int32)
    visible, slopes = torch.tensor([0, 33, 1], dtype=torch.int32), 2.0 ** -torch.linspace(0.5, 8, 6)
    settings: dict[str, Any] = {
        "window and soft cap": {"window": 7, "softcap": 3.0},
        "slopes": {"slopes": slopes.bfloat16()},
        "prefix": {"visible": visible, "window": 5},
        "cross": {"causal": False},
        "ranges": {"causal": False, "ranges": ranges},
    }[name]
    arguments = one_token_each(lengths, 6, 2, 24)
    _, tape = Tape.record(lambda: kernels.paged_attention(*arguments, 0.2, **settings))
    assert tape is not None
    for step in range(1, 4):
        lengths += 11
        ranges[:, 1] += step
        visible[step % 3] += 20
        arguments[0].copy_(torch.randn(3, 6, 24))
        expected = kernels.paged_attention(*arguments, 0.2, **settings)
        with kernels.using("reference"):
            torch.testing.assert_close(kernels.paged_attention(*arguments, 0.2, **settings), expected)
        torch.testing.assert_close(tape.replay(), expected, atol=0, rtol=0)


@needs_library
def test_latent_attention_is_recorded_and_what_follows_finds_its_rows() -> None:
    torch.manual_seed(0)
    lengths = torch.tensor([20, 33], dtype=torch.int32)
    q, cache, _, *tables = one_token_each(lengths, 5, 1, 72)
    scale = torch.randn(64)

    def step() -> torch.Tensor:
        mixed = kernels.latent_attention(q, cache[:, 0], 64, *tables, 0.2)
        return kernels.add_rms_norm(mixed.view(10, 64), None, scale, 1e-5)[0]

    _, tape = Tape.record(step)
    assert tape is not None
    for _ in range(3):
        lengths += 13
        q.copy_(torch.randn(2, 5, 72))
        torch.testing.assert_close(tape.replay().clone(), step(), atol=0, rtol=0)


@needs_library
def test_a_replayed_window_refuses_a_block_that_it_reaches_and_no_other() -> None:
    lengths = torch.tensor([40], dtype=torch.int32)
    arguments = one_token_each(lengths, 2, 2, 8)
    _, tape = Tape.record(lambda: kernels.paged_attention(*arguments, 0.2, window=8))
    assert tape is not None
    arguments[3][0, :2] = -1  # keys 0 to 31
    assert tape.replay().isfinite().all()
    lengths[0] = 39
    with pytest.raises(IndexError, match="paged_attention: a block id"):
        tape.replay()


@needs_library
def test_a_step_of_a_state_space_is_recorded_and_takes_the_slots_of_the_moment() -> None:
    channels, numbers, dtype = 40, 16, torch.bfloat16
    xz, dt, bc = (torch.randn(2, width).to(dtype) for width in (2 * channels, channels, 2 * numbers))
    weight, bias, a, d = (
        torch.randn(channels, 4),
        torch.randn(channels),
        -torch.rand(channels, numbers),
        torch.ones(channels),
    )
    columns, states = torch.randn(6, channels, 3).to(dtype), torch.randn(6, channels, numbers)
    read, write, fresh = torch.tensor([0, 2]), torch.tensor([1, 3]), torch.tensor([False, False])
    starts = torch.arange(3, dtype=torch.int32)
    weight, bias = weight.to(dtype), bias.to(dtype)

    def step() -> torch.Tensor:
        (x, z), (b, c) = xz.split_with_sizes((channels, channels), -1), bc.split_with_sizes((numbers, numbers), -1)
        x = kernels.causal_conv(x, weight, bias, columns, read, write, starts, fresh)
        return kernels.selective_scan(x, dt, a, b, c, d, states, read, write, starts, fresh, z, softplus=True)

    _, tape = Tape.record(step)
    assert tape is not None
    for slots in (((1, 3), (0, 2), (False, True)), ((5, 0), (4, 2), (False, False)), ((-1, 4), (5, 3), (True, False))):
        for tensor, values in zip((read, write, fresh), slots, strict=True):
            tensor.copy_(torch.tensor(values))
        xz.copy_(torch.randn(xz.shape))
        kept = columns.clone(), states.clone()
        found = tape.replay().clone(), columns.clone(), states.clone()
        columns.copy_(kept[0]), states.copy_(kept[1])
        assert all(torch.equal(*pair) for pair in zip(found, (step(), columns, states), strict=True))
    read[0] = 6
    fresh[0] = False
    with pytest.raises(IndexError, match="causal_conv: a slot"):
        tape.replay()


@needs_library
def test_a_recording_does_not_wait_for_torchs_compiler_to_be_imported() -> None:
    """It would take a second of the first step."""
    code = """
import sys, torch, bestiary_kernels as kernels
x, scale = torch.randn(3, 64), torch.randn(64)
assert kernels.Tape.record(lambda: kernels.add_rms_norm(x, None, scale, 1e-5)[0])[1] is not None
assert kernels.Tape.record(lambda: kernels.add_rms_norm(x * 2, None, scale, 1e-5)[0])[1] is None
print(*{"torch._dynamo", "sympy"} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stdout.strip()
