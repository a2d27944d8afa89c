"""Decode steps of answers that nobody reads before their end: some are computed in a row, and handed out one by one.

Between two steps Python takes a twentieth of a small model's time, most since the weights have driven its code out
of the caches; between those that run in a row it takes nothing. A request that comes meanwhile waits for their end.
"""

from collections.abc import Sequence

from bestiary.replay import Replays
from bestiary.sampling.sampler import Choice
from bestiary.step import Compute, StepResult, StepRow

__all__ = ["Bursts"]

#: Steps are computed in a row for as long as this.
_SECONDS = 0.2


class Bursts:
    """Runs decode steps, and with some of them those that follow, as far as the blocks reach that they have."""

    def __init__(self, replays: Replays, block_size: int, longest: int) -> None:
        self._replays, self._size, self._longest = replays, block_size, longest
        #: By a row's blocks, kept lest others get their id: its start and adapter, and the tokens from its own
        #: on, of which each is the next one's input. Nothing else of a request outlives it here.
        self._known: dict[int, tuple[object, int, int, Sequence[int]]] = {}

    def execute(self, rows: Sequence[StepRow], now: Compute) -> list[StepResult]:
        """The results of `rows`; `now` computes those that were not foreseen."""
        tokens = [self._foreseen(row) for row in rows]
        late = [row for row, token in zip(rows, tokens, strict=True) if token is None]
        most = min(map(self._room, rows)) if len(late) == len(rows) else 0
        if most > 1 and (found := self._replays.run_on(rows, most, _SECONDS)):
            columns = zip(rows, zip(*found, strict=True), strict=True)
            known = ((row.blocks, row.start, row.adapter, (*row.tokens, *column)) for row, column in columns)
            self._known = {id(one[0]): one for one in known}
            tokens, late = list(found[0]), []
        results = iter(now(late) if late else ())
        return [next(results) if token is None else StepResult(Choice.of(token)) for token in tokens]

    def _foreseen(self, row: StepRow) -> int | None:
        """What comes after the row's token. Blocks that are the same list were never given back."""
        _, start, adapter, tokens = self._known.get(id(row.blocks), (None, 0, -1, ()))
        step = row.start - start
        is_same = row.decodes and row.adapter == adapter and 0 <= step < len(tokens) - 1
        return tokens[step + 1] if is_same and row.tokens[0] == tokens[step] else None

    def _room(self, row: StepRow) -> int:
        """Steps until this row's block is full, its answer or its context at its longest; 0 where more is in doubt."""
        known = row.sampling
        if known is None or known.params.stop or not (row.decodes and known.unread and known.is_greedy):
            return 0
        return min(self._size - row.start % self._size, known.left, self._longest - row.start - 1)
