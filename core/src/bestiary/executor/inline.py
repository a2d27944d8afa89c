"""The model in this very process."""

from collections.abc import Sequence
from pathlib import Path

from bestiary.ahead import Ahead
from bestiary.cache import CacheGroup
from bestiary.executor.protocol import Immediate
from bestiary.runner import Runner
from bestiary.step import StepResult, StepRow

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
        self.runs_ahead = isinstance(runner.ahead, Ahead)

    def execute(self, rows: Sequence[StepRow]) -> list[StepResult]:
        """Run one step here and now."""
        return self._open().execute(rows)

    def add_adapter(self, key: str, folder: Path) -> bytes:
        """Read an adapter into memory."""
        return self._open().add_adapter(key, folder)

    def place_adapter(self, key: str, slot: int) -> None:
        """Fill a slot."""
        self._open().place_adapter(key, slot)

    def remove_adapter(self, key: str) -> None:
        """Let an adapter go from memory."""
        self._open().remove_adapter(key)

    def _open(self) -> Runner:
        if self.runner is None:
            raise RuntimeError("the executor is closed")
        return self.runner

    def close(self) -> None:
        """Let model and cache go."""
        self.runner = None
