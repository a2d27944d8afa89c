"""The contract of an executor."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol

from bestiary.cache import CacheGroup
from bestiary.step import StepResult, StepRow

__all__ = ["Executor", "Immediate"]


class Executor(Protocol):
    """Runs steps of one model."""

    #: Token ids end below this.
    vocabulary: int
    #: Numbers of a vector that stands in a token's place.
    width: int
    #: The groups of layers that keep alike, each with its blocks; and tokens of a block.
    groups: Sequence[CacheGroup]
    block_size: int
    #: The longest context, in tokens; the cache has room for it.
    max_model_len: int
    #: Vectors that a sequence can look at beside its own tokens.
    most_crossed: int
    #: Of which tokens a model that pools gives vectors; None for one that generates.
    pools: Literal["last", "all"] | None
    #: How many steps can be on their way at once; they are run in the order in which they were submitted.
    depth: int
    #: It computes a decode step's successor where it finds room for that, so that this is made early.
    runs_ahead: bool

    def submit(self, rows: Sequence[StepRow]) -> None:
        """Send a step on its way."""

    def collect(self) -> list[StepResult]:
        """The results of the step that was submitted first, one for each of its rows, in order.

        Keys and values of the rows' tokens are in the cache afterwards; a state is read from the first block of its
        group and written to the second. So running the same rows again, alone or together, is safe: after a step
        that raised, the caller may try the rows one by one. After WorkerDied nothing runs any more.
        """

    def execute(self, rows: Sequence[StepRow]) -> list[StepResult]:
        """Both in one, while no other step is on its way."""

    def add_adapter(self, key: str, folder: Path) -> bytes:
        """Read an adapter into memory; the digest of its content. Raises AdapterError, and nothing has changed."""

    def place_adapter(self, key: str, slot: int) -> None:
        """Fill a slot with an adapter that is in memory, for the steps that are submitted from now on."""

    def remove_adapter(self, key: str) -> None:
        """Let an adapter go from memory; one that is not there is passed over."""

    def close(self) -> None:
        """Let model and cache go. A second call does nothing."""


class Immediate:
    """An executor that runs a step here and now, when it is collected."""

    depth = 1
    runs_ahead = False

    def submit(self, rows: Sequence[StepRow]) -> None:
        """Remember it, and none before: an interruption may have come before that was collected."""
        self._submitted = rows

    def collect(self) -> list[StepResult]:
        """Run it, and keep nothing of it: its rows may hold pictures."""
        rows, self._submitted = self._submitted, ()
        return self.execute(rows)

    def execute(self, rows: Sequence[StepRow]) -> list[StepResult]:
        """Run one step."""
        raise NotImplementedError
