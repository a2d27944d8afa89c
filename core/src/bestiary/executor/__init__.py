"""Where the model runs. An executor takes the rows of a step and returns what was chosen; it knows no request."""

from pathlib import Path

from bestiary.architecture import Architecture
from bestiary.config import EngineConfig
from bestiary.executor.inline import InlineExecutor
from bestiary.executor.protocol import Executor, Immediate

__all__ = ["Executor", "Immediate", "InlineExecutor", "start"]


def start(config: EngineConfig, architecture: Architecture, folder: Path) -> Executor:
    """The executor that the settings ask for, with the model loaded."""
    if config.tensor_parallel_size * config.pipeline_parallel_size == 1:
        from bestiary.runner import Runner

        return InlineExecutor(Runner(config, architecture, folder))
    from bestiary.executor.parallel import ParallelExecutor
    from bestiary.executor.process import start as start_processes

    return ParallelExecutor(config, architecture, folder, start_processes)
