"""Decode steps run ahead of the engine: while it looks at a step's tokens, the GPU computes the next step already.

Whoever waits for a token's value before going on leaves the GPU idle. Of most sequences the next step is known without
it: one position further, in the same blocks, after a token that the GPU itself has. What was foreseen and is not asked
for comes to nothing: it wrote where its sequence alone writes, before whoever may get those blocks next.
"""

from collections.abc import Sequence

import torch
from msgspec.structs import replace
from torch import Tensor

from bestiary.cache import CacheGroup
from bestiary.replay import Replays
from bestiary.sampling.sampler import Choice, choose
from bestiary.step import Compute, StepResult, StepRow

__all__ = ["Ahead"]


class _Flight:
    """A step that was launched; its tokens are on the device, and on their way to the host."""

    def __init__(self, rows: Sequence[StepRow], tokens_R: Tensor) -> None:
        self.rows, self._device, self._tokens_R = rows, tokens_R.device, [tokens_R]
        self._places = {id(row.blocks): place for place, row in enumerate(rows)}
        self._on_host = tokens_R.to("cpu", non_blocking=True, copy=True)
        self._arrived = torch.cuda.Event() if tokens_R.is_cuda else None  # type: ignore[no-untyped-call]
        if self._arrived is not None:
            self._arrived.record()

    def place(self, asked: StepRow) -> int | None:
        """Where a row that is asked for stands in it. Blocks that are the same list were never given back."""
        place = self._places.get(id(asked.blocks))
        if place is None:
            return None
        known = self.rows[place]
        is_same = (known.start, known.tokens, known.adapter) == (asked.start, asked.tokens, asked.adapter)
        return place if is_same and asked.decodes else None

    def take(self) -> Tensor:
        """The tokens on the device. Whoever begins with them may write over them: a second time they are the host's."""
        return self._tokens_R.pop() if self._tokens_R else torch.tensor(self.land()).to(self._device)

    def land(self) -> list[int]:
        """Wait for the tokens; -1 where the logits were not numbers."""
        if self._arrived is not None:
            self._arrived.synchronize()
        tokens: list[int] = self._on_host.tolist()
        return tokens


class Ahead:
    """Runs decode steps, and with each of them the next one, as far as room for it is there."""

    def __init__(self, replays: Replays, groups: Sequence[CacheGroup], block_size: int, longest: int) -> None:
        self._replays, self._size, self._longest = replays, block_size, longest
        self._is_state = [group.fixed is not None for group in groups]
        self._is_constant = [group.is_constant for group in groups]
        self._flight: _Flight | None = None

    @torch.inference_mode()
    def execute(self, rows: Sequence[StepRow], now: Compute) -> list[StepResult]:
        """The results of `rows`; `now` computes those that were not foreseen.

        What is on its way is kept until it is here, so that after an interruption it can be asked for again.
        """
        flight = self._flight
        places = [None if flight is None else flight.place(row) for row in rows]
        if flight is None or all(place is None for place in places):
            flight = self._flight = self._launch(rows, rows)
            if flight is None:
                return now(rows)
            places = list(range(len(rows)))
        elif None in places:
            late = iter(now([row for row, place in zip(rows, places, strict=True) if place is None]))
            tokens, self._flight = flight.land(), None
            return [next(late) if place is None else StepResult(Choice.of(tokens[place])) for place in places]
        order = [place for place in places if place is not None]
        following = self._follow(flight, rows, order)
        tokens = flight.land()
        if following is not None:
            for row in following.rows:
                row.tokens = [tokens[row.tokens[0]]]
        self._flight = following
        return [StepResult(Choice.of(tokens[place])) for place in order]

    def _launch(
        self, rows: Sequence[StepRow], placed: Sequence[StepRow], tokens_R: Tensor | None = None
    ) -> _Flight | None:
        """A step of `rows`, whose blocks stand in `placed`; None if it is not recorded, or wants more than tokens."""
        samplings = [row.sampling for row in rows if row.sampling is not None and row.sampling.is_plain]
        if len(samplings) < len(rows):
            return None
        found = self._replays.run(placed, tokens_R)
        return None if found is None else _Flight(rows, choose(found.logits_RV, samplings, found.best_R))

    def _follow(self, flight: _Flight, rows: Sequence[StepRow], places: Sequence[int]) -> _Flight | None:
        """The step after this one, of all sequences that go on as far as is known; in `tokens` stand places for now."""
        going = [(place, row) for place, row in zip(places, rows, strict=True) if self._goes_on(row)]
        if not going or not all(self._has_room(row) for _, row in going):
            return None
        following = [self._next(row, place) for place, row in going]
        placed = [self._swapped(row) for row in following] if any(self._is_state) else following
        tokens_R, order = flight.take(), [place for place, _ in going]
        if order != list(range(tokens_R.shape[0])):
            tokens_R = tokens_R[torch.tensor(order).to(tokens_R.device, non_blocking=True)]
        return self._launch(following, placed, tokens_R)

    def _goes_on(self, row: StepRow) -> bool:
        """Its answer does not end with this step, unless by the token itself."""
        return row.sampling is not None and row.sampling.left > 1 and row.start + 2 < self._longest

    def _has_room(self, row: StepRow) -> bool:
        """Blocks for the token after this one are there."""
        needed = (row.start + 1) // self._size + 1
        return all(
            is_constant or len(blocks) >= needed
            for is_constant, blocks in zip(self._is_constant, row.blocks, strict=True)
        )

    def _next(self, row: StepRow, place: int) -> StepRow:
        assert row.sampling is not None
        return replace(row, tokens=[place], start=row.start + 1, sampling=replace(row.sampling, on_their_way=1))

    def _swapped(self, row: StepRow) -> StepRow:
        """With states as they are once this step is taken in: what it writes, the next one reads."""
        blocks = [list(b)[::-1] if is_state else b for is_state, b in zip(self._is_state, row.blocks, strict=True)]
        return replace(row, blocks=blocks)
