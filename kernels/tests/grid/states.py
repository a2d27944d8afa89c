"""A ragged batch of sequences with a state each, in slots among others that nobody may touch."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .draw import Draw, close, lengths, normal, poisoned, within

__all__ = ["Sequences", "strided"]


def strided(draw: Draw, tokens: int, width: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[tokens, width], dense or some columns of a wider buffer, in which nothing else is a number."""
    before = draw.choice((0, 0, 5))
    whole = within(draw, tokens, before + width, more=(0, 3), dtype=dtype, device=device)
    whole[:, :before] = torch.nan
    return whole[:, before:]


def _slots(draw: Draw, count: int, rows: int, columns: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[count, rows, columns] that hold nothing, dense, or the other way round with room between all of them."""
    if draw.choice((True, True, False)):
        return poisoned(count, rows, columns, dtype=dtype, device=device)
    return poisoned(count, columns + 1, rows + 2, dtype=dtype, device=device).mT[:, :rows, :columns]


@dataclass
class Sequences:
    """What each has kept, where its tokens are, and the slots: all hold NaN but those that are to be read."""

    counts: list[int]
    fresh: list[bool]
    read: list[int]
    write: list[int]
    states: Tensor
    before: Tensor

    @classmethod
    def drawn(
        cls, draw: Draw, shape: tuple[int, int], dtype: torch.dtype, device: torch.device, longest: int = 11
    ) -> "Sequences":
        """Slots in any order; a sequence may write where it reads, and one that begins may have nothing to read."""
        counts = lengths(draw, 5, longest)
        fresh = [draw.choice((False, False, True)) for _ in counts]
        states = _slots(draw, 2 * len(counts) + 1, *shape, dtype=dtype, device=device)
        order = torch.randperm(len(states), generator=torch.Generator().manual_seed(draw.integer(0, 2**31))).tolist()
        write = order[: len(counts)]
        read = [draw.choice((own, other)) for own, other in zip(write, order[len(counts) :], strict=False)]
        for i, begins in enumerate(fresh):
            if begins:
                read[i] = draw.choice((read[i], -1, len(states)))
            else:
                states[read[i]] = normal(draw, *shape, dtype=dtype, device=device)
        return cls(counts, fresh, read, write, states, states.clone())

    @property
    def tokens(self) -> int:
        """All of them."""
        return sum(self.counts)

    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """States, slots to read, slots to write, starts, fresh."""
        device = self.states.device
        read, write = (torch.tensor(slots, dtype=torch.int64, device=device) for slots in (self.read, self.write))
        starts = torch.tensor([0, *self.counts]).cumsum(0).int().to(device)
        return self.states, read, write, starts, torch.tensor(self.fresh, device=device)

    def spans(self) -> list[slice]:
        """Each one's tokens."""
        ends = torch.tensor(self.counts).cumsum(0).tolist()
        return [slice(end - count, end) for end, count in zip(ends, self.counts, strict=True)]

    def start(self, i: int) -> Tensor:
        """What sequence i begins with, in float64, as it was before the step."""
        state = self.before[0 if self.fresh[i] else self.read[i]].double()
        return torch.zeros_like(state) if self.fresh[i] else state

    def check(self, wanted: list[Tensor], scales: list[Tensor] | None = None) -> None:
        """Each has written its state, which is `wanted` itself where no scale is given; and nothing else is touched."""
        others = [slot for slot in range(len(self.states)) if slot not in self.write]
        assert self.states[others].flatten().view(torch.uint8).equal(self.before[others].flatten().view(torch.uint8))
        for i, state in enumerate(wanted):
            found = self.states[self.write[i]]
            if scales is None:
                assert found.equal(state.to(found.dtype))
            else:
                close(found, state, scales[i])
