"""Where the model runs. An executor takes the rows of a step and returns what was chosen; it knows no request."""

from bestiary.executor.inline import InlineExecutor
from bestiary.executor.protocol import Executor

__all__ = ["Executor", "InlineExecutor"]
