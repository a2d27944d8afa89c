"""Low-rank adapters beside a matrix (Hu et al. 2021, arXiv 2106.09685): y += B A x, by slots, each row with its own.

A slot holds one adapter's matrices for every leaf that it touches. Knows neither files nor who is served.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

import bestiary_kernels as kernels
from bestiary.blocks.leaf import Leaf

__all__ = ["Adaptable", "Lanes", "LowRank", "Over", "Update"]

#: What the rows are that go through a leaf: a step's tokens, those whose output is wanted, or vectors that sequences
#: begin to look at.
Over = Literal["tokens", "outputs", "vectors"]


class Lanes:
    """Which slot each row of the step under way uses, -1 for none. One for a model; its runner sets it."""

    def __init__(self) -> None:
        self._slots: Mapping[Over, Tensor] = {}
        self._item: int | None = None

    def set(self, slots: Mapping[Over, Tensor]) -> None:
        """[T], [R] and [N] int32 of the step's tokens, outputs and vectors; nothing at all where no row uses any."""
        self._slots = slots

    @contextmanager
    def encoding(self, slot: int) -> Iterator[None]:
        """Meanwhile all rows are those of an item of a request with this slot."""
        self._item = slot
        try:
            yield
        finally:
            self._item = None

    def of(self, over: Over, like: Tensor) -> Tensor | None:
        """[rows] int32 for the rows of a tensor, or None where no row uses a slot."""
        if self._item is None:
            return self._slots.get(over)
        return None if self._item < 0 else torch.full(like.shape[:1], self._item, dtype=torch.int32, device=like.device)


@dataclass(frozen=True)
class Update:
    """What an adapter adds to one part of a matrix of the whole model. The adapter's scale is in `up` already."""

    part: str
    #: [rank, inputs]
    down: Tensor
    #: [outputs of the part, rank]
    up: Tensor
    #: The number in a stack of experts.
    index: int | None = None


class LowRank:
    """The matrices of all slots for one leaf, as this shard has them. An expert of a stack has slots of its own."""

    def __init__(self, leaf: "Adaptable", slots: int, rank: int, dtype: torch.dtype, device: torch.device) -> None:
        self._leaf, self.stack = leaf, max(leaf.stack, 1)
        self._numbers = {part: number for number, part in enumerate(leaf.parts)}
        count, columns = slots * self.stack, leaf.own_inputs()
        starts = [leaf.rows_of(part).start for part in leaf.parts]
        rows = leaf.rows_of(list(leaf.parts)[-1]).stop
        #: [slots, parts, rank, inputs], [slots, rank, outputs] and how much of the rank counts, [slots, parts].
        self.down = torch.zeros(count, len(starts), rank, columns, dtype=dtype, device=device)
        self.up = torch.zeros(count, rank, rows, dtype=dtype, device=device)
        self.ranks = torch.zeros(count, len(starts), dtype=torch.int32, device=device)
        self.starts = torch.tensor([*starts, rows], dtype=torch.int32, device=device)

    def write(self, slot: int, updates: Sequence[Update]) -> None:
        """Put an adapter into a slot, in the place of whatever was there."""
        first = slot * self.stack
        for table in (self.down, self.up, self.ranks):
            table[first : first + self.stack].zero_()
        for update in updates:
            at, part, rank = first + (update.index or 0), self._numbers[update.part], update.down.shape[0]
            columns, rows = self._leaf.own_columns, (self._leaf.own_rows or {}).get(update.part)
            self.down[at, part, :rank] = (
                update.down if columns is None else update.down[:, columns.start : columns.stop]
            )
            up = update.up if rows is None else update.up[rows.start : rows.stop]
            self.up[at, :rank, self._leaf.rows_of(update.part)] = up.T
            self.ranks[at, part] = rank

    def add(self, y_TN: Tensor, x_TK: Tensor, slots_T: Tensor) -> Tensor:
        """y + B A x, each row with the matrices of its slot; y's memory is used."""
        return kernels.lora(y_TN, x_TK, slots_T, self.down, self.up, self.ranks, self.starts)

    def of(self, part: str) -> tuple[Tensor, Tensor]:
        """[slots, rank, inputs] and [slots, rank, outputs of the part]: zeros where a slot has nothing to add."""
        return self.down[:, self._numbers[part]], self.up[:, :, self._leaf.rows_of(part)]


class Adaptable(Leaf):
    """A leaf beside which adapters may stand. Nothing is there, and nothing costs, until one touches it."""

    over: Over = "tokens"
    #: It is a plain matrix, which a product of two narrow ones can be added to.
    takes_adapters = True
    inputs: int
    lanes: Lanes | None = None
    low: LowRank | None = None

    def own_inputs(self) -> int:
        """The columns that this shard has."""
        return self.inputs if self.own_columns is None else len(self.own_columns)

    def adapt(self, lanes: Lanes, slots: int, rank: int, dtype: torch.dtype, device: torch.device) -> None:
        """Make room for adapters of up to that rank. Called once, when the leaf is in place."""
        self.lanes, self.low = lanes, LowRank(self, slots, rank, dtype, device)

    def slots_of(self, x_TK: Tensor) -> Tensor | None:
        """The slot of each row; None where there is nothing to add."""
        return None if self.lanes is None else self.lanes.of(self.over, x_TK)
