"""Decode steps of a few rows, recorded once and replayed with one call each. Knows no request.

With few rows what Python adds between the hundreds of operations of a step would be felt. A step of n rows, one token
each, always runs the same kernels on the same memory; only what lies in its input changes.
"""

from array import array
from collections.abc import Sequence
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from bestiary.batch import Batch, Pages
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

    #: The groups of layers of models that can be recorded: one, that keeps every token.
    KINDS: ClassVar[list[Kind]] = [Kind()]

    def __init__(
        self,
        model: Decoder,
        caches: Sequence[tuple[Tensor, ...]],
        block_size: int,
        longest: int,
        lanes: Lanes,
    ) -> None:
        self._lanes = lanes
        self._model, self._caches, self._block_size = model, caches, block_size
        self._most_blocks = -(-longest // block_size)
        self._steps: dict[int, _Step | None] = {}
        self._arena = Arena()

    def logits(self, rows: Sequence[_DecodeRow]) -> Tensor | None:
        """[R, vocabulary] for rows of one token each, valid until the next step; None where there is no recording.

        A model of which some part is not a kernel of ours cannot be recorded, and is only tried once.
        """
        n = len(rows)
        if n not in self._steps:
            step = _Step(n, self._most_blocks, self._block_size, self._caches)
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
    def takes(num_rows: int) -> bool:
        """Steps of this size are worth a recording."""
        return num_rows <= MOST_ROWS


class _Step:
    """The input of a step of `n` rows, in memory that stays where it is."""

    def __init__(self, n: int, most_blocks: int, block_size: int, caches: Sequence[tuple[Tensor, ...]]) -> None:
        self.tape: Tape | None = None
        self._block_size, self._most_blocks = block_size, most_blocks
        self._tokens, self._positions, self._slots = (array("q", [0] * n) for _ in range(3))
        self._adapters = array("i", [-1] * n)
        self.adapters = torch.frombuffer(self._adapters, dtype=torch.int32)
        self._lengths, self._tables = array("i", [0] * n), array("i", [0] * n * most_blocks)
        self.batch = Batch(
            token_ids=torch.frombuffer(self._tokens, dtype=torch.int64),
            positions=torch.frombuffer(self._positions, dtype=torch.int64),
            query_starts=torch.arange(n + 1, dtype=torch.int32),
            context_lens=torch.frombuffer(self._lengths, dtype=torch.int32),
            pages={
                0: Pages(
                    torch.frombuffer(self._tables, dtype=torch.int32).view(n, most_blocks),
                    torch.frombuffer(self._slots, dtype=torch.int64),
                )
            },
            states={},
            output_rows=None,
            caches=caches,
        )

    def write(self, rows: Sequence[_DecodeRow]) -> None:
        """Put the rows where the recorded kernels read them."""
        for i, row in enumerate(rows):
            start, blocks = row.start, row.blocks[0]
            self._tokens[i], self._positions[i], self._lengths[i] = row.tokens[0], start, start + 1
            self._adapters[i] = row.adapter
            self._slots[i] = blocks[start // self._block_size] * self._block_size + start % self._block_size
            first = i * self._most_blocks
            self._tables[first : first + len(blocks)] = array("i", blocks)
