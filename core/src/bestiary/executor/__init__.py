"""Where the model runs. An executor takes the rows of a step and returns what was chosen; it knows no request."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from bestiary.architecture import Architecture
from bestiary.config import EngineConfig
from bestiary.errors import SettingError
from bestiary.executor.inline import InlineExecutor
from bestiary.executor.protocol import Executor, Immediate

if TYPE_CHECKING:
    from bestiary.executor.parallel import Inbox, Team

__all__ = ["Executor", "Immediate", "InlineExecutor", "start"]


def start(config: EngineConfig, architecture: Architecture, folder: Path) -> Executor:
    """The executor that the settings ask for, with the model loaded."""
    if config.executor == "auto" and config.tensor_parallel_size * config.pipeline_parallel_size == 1:
        from bestiary.runner import Runner

        return InlineExecutor(Runner(config, architecture, folder))
    from bestiary.executor.parallel import ParallelExecutor

    return ParallelExecutor(config, architecture, folder, _ranks(config))


def _ranks(config: EngineConfig) -> "Callable[[int, Inbox], Team]":
    """What starts ranks."""
    if config.node_rank:
        raise SettingError(
            f"node_rank={config.node_rank}: the driver is node 0. On other hosts `bestiary run` with --node-rank "
            f"{config.node_rank} serves it"
        )
    if config.executor == "ray":
        from bestiary.executor import ray

        return partial(ray.start, config)
    if config.nnodes > 1:
        from bestiary.executor import nodes

        return partial(nodes.start, config)
    from bestiary.executor import process

    return process.start
