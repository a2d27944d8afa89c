"""Decode steps of a few rows, recorded once and replayed with one call each. Knows no request.

With few rows what Python adds between the hundreds of operations of a step would be felt. A step of n rows, one token
each, always runs the same kernels on the same memory; only what lies in its input changes. On a CPU a tape records the
kernels, on a GPU a graph.
"""

import ctypes
from array import array
from collections.abc import Callable, Sequence
from functools import partial
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from bestiary.batch import Batch, Pages
from bestiary.blocks import Decoder, Kind, Lanes
from bestiary_kernels import Arena, Graph, Tape
from bestiary_kernels.linear import MOST_ROWS

__all__ = ["Record", "Recording", "Replays"]

#: Rows of the steps that are captured on a GPU. Others get rows that come to nothing, up to the next of these sizes.
_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)


class _DecodeRow(Protocol):
    """One token of one sequence: what a recorded step needs to know of it."""

    @property
    def tokens(self) -> Sequence[int]:
        """The token, alone."""

    @property
    def start(self) -> int:
        """Its position."""

    @property
    def adapter(self) -> int:
        """The slot of its adapter."""

    @property
    def blocks(self) -> Sequence[Sequence[int]]:
        """The sequence's cache, by group of layers."""


class Recording(Protocol):
    """A step that can run again over what its input holds by then."""

    def replay(self) -> Tensor:
        """What the step's function would return."""


#: Runs a function; its result, and a recording where that can be had.
Record = Callable[[Callable[[], Tensor]], tuple[Tensor, Recording | None]]


class Replays:
    """A recording for each number of rows, made when it is first needed."""

    #: The groups of layers of models that can be recorded: one, that keeps every token.
    KINDS: ClassVar[list[Kind]] = [Kind()]

    def __init__(
        self,
        model: Decoder,
        caches: Sequence[tuple[Tensor, ...]],
        block_size: int,
        longest: int,
        lanes: Lanes,
        device: torch.device,
    ) -> None:
        self._lanes = lanes
        self._model, self._caches, self._block_size, self._device = model, caches, block_size, device
        self._most_blocks = -(-longest // block_size)
        self._steps: dict[int, tuple[_Step, Recording | None]] = {}
        on_cpu = device.type == "cpu"
        #: Sizes that are recorded; None: each as it comes, up to the most that a packed product takes.
        self.sizes = None if on_cpu else _SIZES
        self._record: Record = partial(Tape.record, arena=Arena()) if on_cpu else _graphs()

    def takes(self, num_rows: int) -> bool:
        """Steps of this size are worth a recording."""
        return num_rows <= (MOST_ROWS if self.sizes is None else self.sizes[-1])

    def logits(self, rows: Sequence[_DecodeRow]) -> Tensor | None:
        """[R, vocabulary] for rows of one token each, valid until the next step; None where there is no recording.

        A model of which some part is not a kernel of ours cannot be recorded, and is only tried once.
        """
        count = len(rows)
        size = count if self.sizes is None else next(size for size in self.sizes if size >= count)
        if size in self._steps:
            step, recording = self._steps[size]
            if recording is None:
                return None
            step.write(rows)
            return recording.replay()[:count]
        step = _Step(size, self._most_blocks, self._block_size, self._caches, self._device)
        step.write(rows)
        self._lanes.set({"tokens": step.adapters, "outputs": step.adapters})
        found, recording = self._record(lambda: self._model.logits(self._model(step.batch)))
        self._steps[size] = step, recording
        return found[:count]

    def forget(self) -> None:
        """The model has changed: record anew."""
        self._steps.clear()


def _graphs() -> Record:
    """Captures share the memory between their kernels."""
    return partial(Graph.capture, pool=torch.cuda.graph_pool_handle())


class _Step:
    """The input of a step of `n` rows, in memory that stays where it is; on a GPU with a copy of it on the host."""

    def __init__(
        self, n: int, most_blocks: int, block_size: int, caches: Sequence[tuple[Tensor, ...]], device: torch.device
    ) -> None:
        self._block_size, self._most_blocks, self._size = block_size, most_blocks, n
        words = 3 * n + (2 * n + n * most_blocks + 1) // 2
        self._host = torch.zeros(words, dtype=torch.int64, pin_memory=device.type != "cpu")
        self._there = self._host if device.type == "cpu" else self._host.to(device)
        memory = memoryview((ctypes.c_char * (8 * words)).from_address(self._host.data_ptr())).cast("B")
        self._tokens, self._positions, self._slots = (memory[8 * n * i : 8 * n * (i + 1)].cast("q") for i in range(3))
        small = memory[24 * n :].cast("i")
        self._lengths, self._adapters, self._tables = small[:n], small[n : 2 * n], small[2 * n :]
        tokens, positions, slots = (self._there[n * i : n * (i + 1)] for i in range(3))
        rest = self._there[3 * n :].view(torch.int32)
        self.adapters = rest[n : 2 * n]
        self.batch = Batch(
            token_ids=tokens,
            positions=positions,
            query_starts=torch.arange(n + 1, dtype=torch.int32, device=device),
            context_lens=rest[:n],
            pages={0: Pages(rest[2 * n : 2 * n + n * most_blocks].view(n, most_blocks), slots)},
            states={},
            output_rows=None,
            caches=caches,
        )

    def write(self, rows: Sequence[_DecodeRow]) -> None:
        """Put the rows where the recorded kernels read them. What is left of the step's rows writes to no slot."""
        for i, row in enumerate(rows):
            start, blocks = row.start, row.blocks[0]
            self._tokens[i], self._positions[i], self._lengths[i] = row.tokens[0], start, start + 1
            self._adapters[i] = row.adapter
            self._slots[i] = blocks[start // self._block_size] * self._block_size + start % self._block_size
            first = i * self._most_blocks
            self._tables[first : first + len(blocks)] = array("i", blocks)
        for i in range(len(rows), self._size):
            self._tokens[i] = self._positions[i] = 0
            self._lengths[i], self._adapters[i], self._slots[i] = 1, -1, -1
        if self._there is not self._host:
            self._there.copy_(self._host, non_blocking=True)
