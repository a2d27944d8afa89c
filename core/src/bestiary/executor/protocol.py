"""The contract of an executor."""

from collections.abc import Sequence
from typing import Literal, Protocol

from bestiary.cache import CacheGroup
from bestiary.runner import StepResult, StepRow

__all__ = ["Executor"]


class Executor(Protocol):
    """Runs steps of one model."""

    #: Token ids end below this.
    vocabulary: int
    #: The groups of layers that keep alike, each with its blocks; and tokens of a block.
    groups: Sequence[CacheGroup]
    block_size: int
    #: The longest context, in tokens; the cache has room for it.
    max_model_len: int
    #: Vectors that a sequence can look at beside its own tokens.
    most_crossed: int
    #: Of which tokens a model that pools gives vectors; None for one that generates.
    pools: Literal["last", "all"] | None

    def execute(self, rows: Sequence[StepRow]) -> list[StepResult]:
        """Run one step; a result for each row, in order.

        Keys and values of the rows' tokens are in the cache afterwards; a state is read from the first block of its
        group and written to the second. So running the same rows again, alone or together, is safe: after a step
        that raised, the caller may try the rows one by one.
        """

    def close(self) -> None:
        """Let model and cache go. A second call does nothing."""
