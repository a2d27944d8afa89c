"""Ranks as threads of this process: what the kit proves splits with, since threads start at once.

Commands and replies are the very bytes that processes exchange; only the way they and the tensors go is shorter.
"""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import SimpleQueue

import torch
from torch import Tensor

from bestiary.architecture import Architecture
from bestiary.config import EngineConfig
from bestiary.executor import wire
from bestiary.executor.parallel import Inbox, ParallelExecutor
from bestiary.executor.worker import serve

__all__ = ["executor"]


def executor(config: EngineConfig, architecture: Architecture, folder: Path) -> ParallelExecutor:
    """The ranks that the settings ask for, as threads, with the model loaded."""
    shards = config.tensor_parallel_size
    return ParallelExecutor(config, architecture, folder, lambda ranks, inbox: _Threads(ranks, shards, inbox))


class _Threads:
    """A team of threads. What they hold goes when the last of them ends."""

    meeting = ""

    def __init__(self, ranks: int, shards: int, inbox: Inbox) -> None:
        tables = [_Table(shards) for _ in range(ranks // shards)]
        lines = [SimpleQueue[Tensor]() for _ in range(ranks + shards)]
        self._tables = tables
        self._channels = [_Channel(rank, inbox) for rank in range(ranks)]
        for rank, channel in enumerate(self._channels):
            link = _Link(tables[rank // shards], rank % shards, lines[rank], lines[rank + shards])
            threading.Thread(target=_run, args=(channel, link), daemon=True).start()

    def send(self, rank: int, data: bytes) -> None:
        """Into the rank's queue."""
        self._channels[rank].commands.put(data)

    def look(self) -> None:
        """Threads do not die alone."""

    def stop(self) -> None:
        """Let them end."""
        for channel in self._channels:
            channel.commands.put(None)
        for table in self._tables:
            table.barrier.abort()


class _Channel:
    def __init__(self, rank: int, inbox: Inbox) -> None:
        self.commands: SimpleQueue[bytes | None] = SimpleQueue()
        self._rank, self._inbox = rank, inbox

    def send(self, data: bytes) -> None:
        self._inbox.put((self._rank, data))

    def receive(self) -> bytes | None:
        return self.commands.get()


def _run(channel: _Channel, link: "_Link") -> None:
    torch.set_num_threads(1)  # of this thread alone: several teams of OpenMP threads would stall each other

    def join(command: wire.Load) -> _Link:
        return link

    serve(channel, join)


class _Table:
    """Where the shards of one stage lay down what they have and see what the others have."""

    def __init__(self, shards: int) -> None:
        self.barrier = threading.Barrier(shards)
        self._parts: list[Tensor | None] = [None] * shards

    def share(self, shard: int, x: Tensor, make: Callable[[list[Tensor]], Tensor | list[Tensor]]) -> object:
        """What `make` makes of all parts."""
        self._parts[shard] = x
        self.barrier.wait()
        made = make([part for part in self._parts if part is not None])
        self.barrier.wait()
        return made


class _Link:
    def __init__(self, table: _Table, shard: int, before: SimpleQueue[Tensor], after: SimpleQueue[Tensor]) -> None:
        self._table, self._shard, self._before, self._after = table, shard, before, after

    def all_reduce(self, x: Tensor) -> Tensor:
        total = self._table.share(self._shard, x, lambda parts: torch.stack(parts).sum(0))
        assert isinstance(total, Tensor)
        return total

    def gather(self, x: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        parts = self._table.share(self._shard, x, lambda parts: [part.clone() for part in parts])
        assert isinstance(parts, list)
        if [tuple(part.shape) for part in parts] != list(shapes):
            raise ValueError(f"parts of {[tuple(part.shape) for part in parts]} where {list(shapes)} were expected")
        return parts if self._shard == 0 else []

    def send(self, x: Tensor) -> None:
        self._after.put(x.clone())

    def receive(self, into: Tensor) -> None:
        sent = self._before.get()
        if sent.shape != into.shape or sent.dtype is not into.dtype:
            raise ValueError(f"{sent.dtype} {tuple(sent.shape)} where {into.dtype} {tuple(into.shape)} was expected")
        into.copy_(sent)
