"""Decode steps of a few rows, recorded once and replayed with one call each. Knows no request.

With few rows what Python adds between the hundreds of operations of a step would be felt. A step of n rows, one token
each, always runs the same kernels on the same memory; only what lies in its input changes.
"""

from array import array
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from bestiary.batch import Batch, Pages, Slots
from bestiary.blocks import Decoder, Kind, Lanes
from bestiary_kernels import Arena, Tape
from bestiary_kernels.linear import MOST_ROWS

__all__ = ["Replays"]


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
    ) -> None:
        self._lanes = lanes
        self._model, self._caches, self._kinds, self._block_size = model, caches, kinds, block_size
        self._most_blocks = -(-longest // block_size)
        self._steps: dict[int, _Step | None] = {}
        self._arena = Arena()

    def logits(self, rows: Sequence[_DecodeRow]) -> Tensor | None:
        """[R, vocabulary] for rows of one token each, valid until the next step; None where there is no recording.

        A model of which some part is not a kernel of ours cannot be recorded, and is only tried once.
        """
        n = len(rows)
        if n not in self._steps:
            step = _Step(n, self._kinds, self._most_blocks, self._block_size, self._caches)
            step.write(rows)
            self._lanes.set({"tokens": step.adapters, "outputs": step.adapters})
            found, step.tape = Tape.record(lambda: self._model.logits(self._model(step.batch)), self._arena)
            self._steps[n] = None if step.tape is None else step
            return found
        recorded = self._steps[n]
        if recorded is None or recorded.tape is None:
            return None
        recorded.write(rows)
        return recorded.tape.replay()

    def forget(self) -> None:
        """The model has changed: record anew."""
        self._steps.clear()

    @staticmethod
    def suits(kinds: Sequence[Kind]) -> bool:
        """Steps can be recorded of models with these groups of layers: such as look at nothing but their own tokens."""
        return all(kind.crossed is None for kind in kinds)

    @staticmethod
    def takes(num_rows: int) -> bool:
        """Steps of this size are worth a recording."""
        return num_rows <= MOST_ROWS


class _PagedRows:
    """Where the tokens of `n` rows are kept by one group of layers, in memory that stays where it is."""

    def __init__(self, n: int, most_blocks: int, block_size: int) -> None:
        self._most_blocks, self._block_size = most_blocks, block_size
        self._tables, self._slots = array("i", [0] * n * most_blocks), array("q", [0] * n)
        self.pages = Pages(
            torch.frombuffer(self._tables, dtype=torch.int32).view(n, most_blocks),
            torch.frombuffer(self._slots, dtype=torch.int64),
        )

    def write(self, i: int, start: int, blocks: Sequence[int]) -> None:
        """Row i has these blocks, and its token comes at `start`."""
        size, first = self._block_size, i * self._most_blocks
        self._slots[i] = blocks[start // size] * size + start % size
        self._tables[first : first + len(blocks)] = array("i", blocks)


class _StateRows:
    """Where the states of `n` rows are kept by one group of layers, in memory that stays where it is."""

    def __init__(self, n: int) -> None:
        self._read, self._write = array("q", [0] * n), array("q", [0] * n)
        self._fresh = bytearray(n)
        read, write = (torch.frombuffer(slots, dtype=torch.int64) for slots in (self._read, self._write))
        self.slots = Slots(read, write, torch.frombuffer(self._fresh, dtype=torch.bool))

    def write(self, i: int, start: int, blocks: Sequence[int]) -> None:
        """Row i reads the first of these slots and writes the second; at the start of its sequence there is nothing."""
        self._read[i], self._write[i] = blocks
        self._fresh[i] = start == 0


class _Step:
    """The input of a step of `n` rows, in memory that stays where it is."""

    def __init__(
        self,
        n: int,
        kinds: Sequence[Kind],
        most_blocks: int,
        block_size: int,
        caches: Sequence[tuple[Tensor, ...]],
    ) -> None:
        self.tape: Tape | None = None
        self._tokens, self._positions = (array("q", [0] * n) for _ in range(2))
        self._adapters, self._lengths = array("i", [-1] * n), array("i", [0] * n)
        self.adapters = torch.frombuffer(self._adapters, dtype=torch.int32)
        paged = {g: _PagedRows(n, most_blocks, block_size) for g, kind in enumerate(kinds) if kind.fixed is None}
        states = {g: _StateRows(n) for g, kind in enumerate(kinds) if kind.fixed is not None}
        self._groups: list[tuple[int, _PagedRows | _StateRows]] = [*paged.items(), *states.items()]
        self.batch = Batch(
            token_ids=torch.frombuffer(self._tokens, dtype=torch.int64),
            positions=torch.frombuffer(self._positions, dtype=torch.int64),
            query_starts=torch.arange(n + 1, dtype=torch.int32),
            context_lens=torch.frombuffer(self._lengths, dtype=torch.int32),
            pages={g: rows.pages for g, rows in paged.items()},
            states={g: rows.slots for g, rows in states.items()},
            output_rows=None,
            caches=caches,
        )

    def write(self, rows: Sequence[_DecodeRow]) -> None:
        """Put the rows where the recorded kernels read them."""
        for i, row in enumerate(rows):
            start = row.start
            self._tokens[i], self._positions[i], self._lengths[i] = row.tokens[0], start, start + 1
            self._adapters[i] = row.adapter
            for g, group in self._groups:
                group.write(i, start, row.blocks[g])
