"""Steps on their way: sent off as long as there is a place for them, and looked at in the same order.

Knows neither requests nor what a step finds.
"""

import warnings
from collections import deque
from collections.abc import Callable

from bestiary.errors import EngineError, WorkerDied
from bestiary.executor import Executor
from bestiary.loras import Adapters
from bestiary.scheduler import Scheduled, Scheduler
from bestiary.step import StepResult, StepRow

__all__ = ["Flights", "Landed"]

#: What came of one sequence's part of a step.
Landed = tuple[Scheduled, StepResult | Exception]
_Plan = list[Scheduled]
_Results = list[StepResult | Exception]


class Flights:
    """As many steps as the executor can have on their way; `row` makes what a step needs to know of a sequence.

    An interruption, as by ctrl-C, is no failure of a step's: what was under way then is taken again.
    """

    def __init__(
        self,
        executor: Callable[[], Executor],
        scheduler: Scheduler,
        adapters: Adapters,
        row: Callable[[Scheduled], StepRow],
    ) -> None:
        self._executor, self._scheduler, self._adapters, self._row = executor, scheduler, adapters, row
        #: With what went wrong when it was sent; and steps that are back before their turn.
        self._under_way: deque[tuple[_Plan, Exception | None]] = deque()
        self._back: deque[tuple[_Plan, _Results]] = deque()

    def clear(self) -> None:
        """Expect nothing back."""
        self._under_way.clear()
        self._back.clear()

    def depart(self) -> None:
        """Send steps off as long as there are any, and places for them; each gets its share of the sequences."""
        depth, scheduler = self._executor().depth, self._scheduler
        while len(self._under_way) + len(self._back) < depth:
            share = -(-min(len(scheduler), scheduler.max_num_seqs) // depth)
            plan = scheduler.schedule(None if depth == 1 else max(1, share))
            if not plan:
                break
            scheduler.depart(plan)
            try:
                self._adapters.seat()
                self._under_way.append((plan, self._submit(plan)))
            except BaseException:
                scheduler.land(plan)
                raise

    def _submit(self, plan: _Plan) -> Exception | None:
        try:
            self._executor().submit([self._row(entry) for entry in plan])
        except Exception as failure:
            return failure
        return None

    def land(self) -> list[Landed]:
        """What came of the oldest step, for the sequences that still wait for it; nothing where none is on its way.

        After WorkerDied all of it is that.
        """
        if not self._back and not self._under_way:
            return []
        plan, results = self._back.popleft() if self._back else self._collect()
        if isinstance(results[0], WorkerDied):
            return list(zip(plan, results, strict=True))
        current = self._scheduler.land(plan)
        return [(entry, result) for entry, result, ok in zip(plan, results, current, strict=True) if ok]

    def _collect(self) -> tuple[_Plan, _Results]:
        """Wait for the oldest step; where it failed, run each row alone, so that only the culprit's request ends."""
        first = self._next()
        if not _can_be_retried(*first):
            return first
        # A row runs alone when nothing else is on its way.
        steps = [first]
        try:
            steps.extend(self._next() for _ in range(len(self._under_way)))
            steps = [self._retried(*step) if _can_be_retried(*step) else step for step in steps]
        except BaseException:
            for plan, _ in steps:
                self._scheduler.land(plan)
            raise
        first, *others = steps
        self._back.extend(others)
        return first

    def _retried(self, plan: _Plan, results: _Results) -> tuple[_Plan, _Results]:
        why = f"a step of {len(plan)} requests failed, so that each is run alone: {results[0]!r}"
        warnings.warn(why, RuntimeWarning, stacklevel=2)
        return plan, [self._alone(entry) for entry in plan]

    def _next(self) -> tuple[_Plan, _Results]:
        plan, failed = self._under_way.popleft()
        if failed is not None:
            return plan, [failed] * len(plan)
        try:
            return plan, list(self._executor().collect())
        except Exception as failure:
            return plan, [failure] * len(plan)
        except BaseException:
            self._scheduler.land(plan)  # nothing of it has happened
            raise

    def _alone(self, entry: Scheduled) -> StepResult | Exception:
        if entry.sequence.flight is not entry:
            return EngineError("given up meanwhile")
        try:
            return self._executor().execute([self._row(entry)])[0]
        except Exception as failure:
            return failure


def _can_be_retried(plan: _Plan, results: _Results) -> bool:
    """A step of several rows failed as a whole, and the model is still there."""
    failure = results[0]
    return len(plan) > 1 and isinstance(failure, Exception) and not isinstance(failure, WorkerDied)
