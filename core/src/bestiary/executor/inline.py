"""The model in this very process."""

from collections.abc import Sequence

from bestiary.cache import CacheGroup
from bestiary.executor.protocol import Immediate
from bestiary.runner import Runner, StepResult, StepRow

__all__ = ["InlineExecutor"]


class InlineExecutor(Immediate):
    """One rank, called directly."""

    def __init__(self, runner: Runner) -> None:
        self.runner: Runner | None = runner
        self.vocabulary, self.width = runner.vocabulary, runner.width
        self.groups: Sequence[CacheGroup] = runner.groups
        self.block_size = runner.block_size
        self.max_model_len = runner.max_model_len
        self.pools, self.most_crossed = runner.pools, runner.most_crossed

    def execute(self, rows: Sequence[StepRow]) -> list[StepResult]:
        """Run one step here and now."""
        if self.runner is None:
            raise RuntimeError("the executor is closed")
        return self.runner.execute(rows)

    def close(self) -> None:
        """Let model and cache go."""
        self.runner = None
