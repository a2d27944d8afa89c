"""One rank of a model that is spread over several: commands in, replies out. Knows no engine and no other rank.

How bytes reach it, and how ranks exchange tensors, is the business of whoever starts it.
"""

from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Protocol

from bestiary import hub, registry
from bestiary.architecture import Architecture
from bestiary.cache import CacheGroup
from bestiary.checkpoint import ConfigFile
from bestiary.config import EngineConfig
from bestiary.errors import EngineError, PluginIncompatible
from bestiary.executor import wire
from bestiary.parallel import Link, Mesh
from bestiary.runner import Runner

__all__ = ["Channel", "identity", "serve"]


class Channel(Protocol):
    """A worker's end of its connection with the driver."""

    def send(self, data: bytes) -> None:
        """One message."""

    def receive(self) -> bytes | None:
        """The next message; None when there will be no more."""


def identity(architecture: Architecture, prefer: Mapping[str, str]) -> dict[str, str]:
    """Which plugin serves an architecture here: what every process must have alike."""
    plugin = registry.find(architecture.name, prefer)
    return {
        "architecture": architecture.name,
        "distribution": plugin.distribution,
        "version": plugin.version,
        "entry point": plugin.value,
        "bestiary": metadata.version("bestiary"),
    }


def serve(channel: Channel, join: Callable[[wire.Load], Link]) -> None:
    """Answer commands until the driver is gone. `join` makes the link to the other ranks."""
    if (first := channel.receive()) is None:
        return
    try:
        runner = _load(channel, wire.read(first, "command"), join)
    except Exception as error:
        channel.send(wire.pack(wire.Failed.of(0, error)))
        return
    while (data := channel.receive()) is not None:
        channel.send(wire.pack(_answer(runner, wire.read(data, "command"))))


def _answer(runner: Runner, command: wire.Command) -> wire.Reply:
    if isinstance(command, wire.Load | wire.Agreed):
        raise EngineError(f"a worker that runs cannot take a {type(command).__name__} command")
    try:
        match command:
            case wire.Step():
                return wire.Done.of(command.number, runner.execute(command.unpacked()))
            case wire.AddAdapter():
                return wire.Added(command.number, runner.add_adapter(command.key, Path(command.folder)))
            case wire.PlaceAdapter():
                runner.place_adapter(command.key, command.slot)
            case wire.RemoveAdapter():
                runner.remove_adapter(command.key)
        return wire.Done(command.number, [])
    except Exception as error:
        return wire.Failed.of(command.number, error)


def _load(channel: Channel, command: wire.Load, join: Callable[[wire.Load], Link]) -> Runner:
    config = EngineConfig(**command.config)
    folder = Path(command.folder)
    if not folder.exists():  # another host's
        folder = hub.locate(config.model, config.revision)
    architecture = registry.resolve(ConfigFile.load(folder).architectures, prefer=config.plugin)
    _check(identity(architecture, config.plugin), command.plugin)
    stages, shards = config.pipeline_parallel_size, config.tensor_parallel_size
    mesh = Mesh.at(command.rank, stages, shards, join(command))

    def agree(found: tuple[CacheGroup, ...]) -> tuple[CacheGroup, ...]:
        channel.send(wire.pack(wire.Room(list(found))))
        if (answer := channel.receive()) is None:
            raise EngineError("the driver is gone")
        agreed: wire.Agreed = wire.read(answer, "command")
        return tuple(agreed.groups)

    runner = Runner(config, architecture, folder, mesh, agree)
    ready = wire.Ready(runner.vocabulary, runner.width, runner.max_model_len, runner.most_crossed, runner.pools)
    channel.send(wire.pack(ready))
    return runner


def _check(own: dict[str, str], wanted: dict[str, str]) -> None:
    """Raise PluginIncompatible where this process would run other code than the driver expects."""
    for what, value in wanted.items():
        if own.get(what) != value:
            raise PluginIncompatible(
                f"a worker has {what} {own.get(what)!r} where the driver has {value!r}: "
                "install the same distributions in every environment that runs a part of the model"
            )
