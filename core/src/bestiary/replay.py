"""Decode steps of a few rows, recorded once and replayed with one call each. Knows no request.

With few rows what Python adds between the hundreds of operations of a step would be felt. A step of n rows, one token
each, always runs the same kernels on the same memory; only what lies in its input changes. On a CPU a tape records the
kernels, on a GPU a graph.
"""

import ctypes
from array import array
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from bestiary.batch import Batch, Pages, Slots
from bestiary.blocks import Decoder, Kind, Lanes
from bestiary.step import StepRow
from bestiary_kernels import Arena, Graph, Tape
from bestiary_kernels.linear import MOST_ROWS

__all__ = ["Record", "Recording", "Replays"]

#: Rows of the steps that are captured on a GPU. Others get rows that come to nothing, up to the next of these sizes.
_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)


class Recording(Protocol):
    """A step that can run again over what its input holds by then."""

    def replay(self) -> Tensor:
        """What the step's function would return."""


#: Runs a function; its result, and a recording where that can be had.
Record = Callable[[Callable[[], Tensor]], tuple[Tensor, Recording | None]]


class Replays:
    """A recording for each number of rows, made when it is first needed."""

    def __init__(
        self,
        model: Decoder,
        caches: Sequence[tuple[Tensor, ...]],
        kinds: Sequence[Kind],
        block_size: int,
        longest: int,
        lanes: Lanes,
        device: torch.device,
    ) -> None:
        self._lanes, self._model, self._caches, self._device = lanes, model, caches, device
        self._layout = _Layout(tuple(kinds), block_size, -(-longest // block_size))
        #: By rows, and whether any of them has an adapter: without one, what stands beside the matrices is left out.
        self._steps: dict[tuple[int, bool], tuple[_Step, Recording | None]] = {}
        #: Sizes that are recorded; None: each as it comes, up to the most that a packed product takes.
        self.sizes = None if device.type == "cpu" else _SIZES
        self._record = self._recorder()

    @staticmethod
    def suits(kinds: Sequence[Kind]) -> bool:
        """Steps can be recorded of models with these groups of layers: such as look at nothing but their own tokens."""
        return all(kind.crossed is None for kind in kinds)

    def _takes(self, rows: Sequence[StepRow]) -> bool:
        """Steps of this size are worth a recording, and each row is one token's."""
        most = MOST_ROWS if self.sizes is None else self.sizes[-1]
        return len(rows) <= most and all(row.decodes for row in rows)

    def logits(self, rows: Sequence[StepRow], tokens: Tensor | None = None) -> Tensor | None:
        """[R, vocabulary] for rows of one token each, valid until the next step; None where there is no recording.

        `tokens` [R] stand for the rows' own where only the device knows those. A model of which some part is not a
        kernel of ours cannot be recorded, and is only tried once.
        """
        if not self._takes(rows):
            return None
        count = len(rows)
        size = count if self.sizes is None else next(size for size in self.sizes if size >= count)
        key = size, any(row.adapter >= 0 for row in rows)
        if key in self._steps:
            step, recording = self._steps[key]
            if recording is None:
                return None
            step.write(rows, tokens)
            return recording.replay()[:count]
        step = _Step(size, self._layout, self._caches, self._device)
        step.write(rows, tokens)
        self._lanes.set({"tokens": step.adapters, "outputs": step.adapters} if key[1] else {})
        found, recording = self._record(lambda: self._model.logits(self._model(step.batch)))
        self._steps[key] = step, recording
        return found[:count]

    def forget(self) -> None:
        """The model has changed: record anew, in new memory, since a pool whose last graph is gone takes no other."""
        self._steps.clear()
        self._record = self._recorder()

    def _recorder(self) -> Record:
        """Recordings share the memory between their kernels."""
        if self._device.type == "cpu":
            return partial(Tape.record, arena=Arena())
        return partial(Graph.capture, pool=torch.cuda.graph_pool_handle())


class _Layout(NamedTuple):
    """How sequences are kept: the groups of layers, tokens of a block, and blocks of the longest sequence."""

    kinds: tuple[Kind, ...]
    block_size: int
    most_blocks: int


class _Memory:
    """Numbers that the host writes and kernels read: on a CPU in one place, on a GPU in a copy that `send` brings."""

    def __init__(self, words: int, device: torch.device) -> None:
        self._host = torch.zeros(words, dtype=torch.int64, pin_memory=device.type != "cpu")
        self._there = self._host if device.type == "cpu" else self._host.to(device)
        self._memory = memoryview((ctypes.c_char * (8 * words)).from_address(self._host.data_ptr())).cast("B")
        self._used = 0
        self._sent = None if device.type == "cpu" else torch.cuda.Event()  # type: ignore[no-untyped-call]

    def take(self, count: int, dtype: torch.dtype) -> tuple[memoryview, Tensor]:
        """So many numbers, as the host writes them, and as kernels read them."""
        begin, end = self._used, self._used + count * dtype.itemsize
        self._used = -(-end // 8) * 8
        code: Any = {torch.int64: "q", torch.int32: "i", torch.bool: "?"}[dtype]
        return self._memory[begin:end].cast(code), self._there.view(torch.uint8)[begin:end].view(dtype)

    def wait(self) -> None:
        """Until what was sent last has left: before that it must not be written over."""
        if self._sent is not None:
            self._sent.synchronize()

    def send(self) -> None:
        """Let kernels that are launched from now on see what was written."""
        if self._sent is not None:
            self._there.copy_(self._host, non_blocking=True)
            self._sent.record()


class _PagedRows:
    """Where the tokens of `n` rows are kept by one group of layers."""

    def __init__(self, n: int, layout: _Layout, memory: _Memory) -> None:
        self._size, self._most_blocks = layout.block_size, layout.most_blocks
        self._slots, slots = memory.take(n, torch.int64)
        self._tables, tables = memory.take(n * self._most_blocks, torch.int32)
        self.pages = Pages(tables.view(n, self._most_blocks), slots)

    def write(self, i: int, start: int, blocks: Sequence[int]) -> None:
        """Row i has these blocks, and its token comes at `start`."""
        size, first = self._size, i * self._most_blocks
        self._slots[i] = blocks[start // size] * size + start % size
        self._tables[first : first + len(blocks)] = array("i", blocks)

    def skip(self, i: int) -> None:
        """Row i is nobody's, and is not kept."""
        self._slots[i] = -1


class _StateRows:
    """Where the states of `n` rows are kept by one group of layers."""

    def __init__(self, n: int, memory: _Memory) -> None:
        self._read, read = memory.take(n, torch.int64)
        self._write, write = memory.take(n, torch.int64)
        self._fresh, fresh = memory.take(n, torch.bool)
        self.slots = Slots(read, write, fresh)

    def write(self, i: int, start: int, blocks: Sequence[int]) -> None:
        """Row i reads the first of these slots and writes the second; at the start of its sequence there is nothing."""
        self._read[i], self._write[i] = blocks
        self._fresh[i] = start == 0

    def skip(self, i: int) -> None:
        """Row i is nobody's, and is not kept."""
        self._read[i] = self._write[i] = -1
        self._fresh[i] = True


class _Step:
    """The input of a step of `n` rows, in memory that stays where it is."""

    def __init__(self, n: int, layout: _Layout, caches: Sequence[tuple[Tensor, ...]], device: torch.device) -> None:
        words_of_a_group = 3 * n + n * layout.most_blocks // 2 + 1
        memory = self._memory = _Memory(4 * n + len(layout.kinds) * words_of_a_group, device)
        self._size = n
        self._tokens, tokens = memory.take(n, torch.int64)
        self._positions, positions = memory.take(n, torch.int64)
        self._lengths, lengths = memory.take(n, torch.int32)
        self._adapters, self.adapters = memory.take(n, torch.int32)
        numbered = list(enumerate(layout.kinds))
        paged = {g: _PagedRows(n, layout, memory) for g, kind in numbered if kind.fixed is None}
        states = {g: _StateRows(n, memory) for g, kind in numbered if kind.fixed is not None}
        self._groups: list[tuple[int, _PagedRows | _StateRows]] = [*paged.items(), *states.items()]
        self.batch = Batch(
            token_ids=tokens,
            positions=positions,
            query_starts=torch.arange(n + 1, dtype=torch.int32, device=device),
            context_lens=lengths,
            pages={g: rows.pages for g, rows in paged.items()},
            states={g: rows.slots for g, rows in states.items()},
            output_rows=None,
            caches=caches,
        )

    def write(self, rows: Sequence[StepRow], tokens: Tensor | None) -> None:
        """Put the rows where the recorded kernels read them. What is left of the step's rows comes to nothing."""
        self._memory.wait()
        for i, row in enumerate(rows):
            start = row.start
            self._tokens[i], self._positions[i], self._lengths[i] = row.tokens[0], start, start + 1
            self._adapters[i] = row.adapter
            for g, group in self._groups:
                group.write(i, start, row.blocks[g])
        for i in range(len(rows), self._size):
            self._tokens[i] = self._positions[i] = 0
            self._lengths[i], self._adapters[i] = 1, -1
            for _, group in self._groups:
                group.skip(i)
        self._memory.send()
        if tokens is not None:
            self.batch.token_ids[: len(rows)].copy_(tokens)
