"""The driver of several ranks: sends each step to all of them and waits for all. Knows no way of starting one."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Literal, Protocol, cast

from bestiary.architecture import Architecture
from bestiary.cache import CacheGroup
from bestiary.config import EngineConfig
from bestiary.errors import EngineError, WorkerDied
from bestiary.executor import wire
from bestiary.executor.worker import identity
from bestiary.runner import StepResult, StepRow

__all__ = ["Inbox", "ParallelExecutor", "Team"]

#: What ranks say, (rank, message); a text instead of bytes says why there will be no more of that rank.
Inbox = SimpleQueue[tuple[int, bytes | str]]

#: Seconds after which ranks that are silent while another one has failed will not answer any more.
_GRACE = 0.8
#: How often ranks are looked after while none of them says anything, in seconds.
_LOOK = 0.1


class Team(Protocol):
    """The ranks as somebody started them."""

    #: Where they find each other.
    meeting: str

    def send(self, rank: int, data: bytes) -> None:
        """To one of them. A rank that is gone is passed over: the inbox says so."""

    def look(self) -> None:
        """Put into the inbox which ranks died or hang, where that can be seen from outside."""

    def stop(self) -> None:
        """End all of them, now. A second call does nothing."""


class ParallelExecutor:
    """A model spread over the ranks that `start` starts."""

    def __init__(
        self,
        config: EngineConfig,
        architecture: Architecture,
        folder: Path,
        start: Callable[[int, Inbox], Team],
    ) -> None:
        self.depth, shards = config.pipeline_parallel_size, config.tensor_parallel_size
        self.block_size = config.block_size
        self._ranks = range(self.depth * shards)
        self._answering = (self.depth - 1) * shards
        self._inbox: Inbox = SimpleQueue()
        self._numbers: deque[int] = deque()
        self._dead: WorkerDied | None = None
        self._next = 1
        self._replies: dict[int, dict[int, wire.Reply]] = {}
        self._team = start(len(self._ranks), self._inbox)
        try:
            ready = self._load(config, architecture, folder)
        except BaseException:
            self._team.stop()
            raise
        self.vocabulary, self.width = ready.vocabulary, ready.width
        self.max_model_len, self.most_crossed = ready.max_model_len, ready.most_crossed
        self.pools = cast(Literal["last", "all"] | None, ready.pools)

    def _load(self, config: EngineConfig, architecture: Architecture, folder: Path) -> wire.Ready:
        settings = {name: _plain(value) for name, value in asdict(config).items()}
        for rank in self._ranks:
            load = wire.Load(settings, str(folder), identity(architecture, config.plugin), rank, self._team.meeting)
            self._team.send(rank, wire.pack(load))
        rooms: list[wire.Room] = self._all(0, while_loading=True)
        self.groups: Sequence[CacheGroup] = _smallest([room.groups for room in rooms])
        for rank in self._ranks:
            self._team.send(rank, wire.pack(wire.Agreed(list(self.groups))))
        ready: list[wire.Ready] = self._all(0, while_loading=True)
        return ready[self._answering]

    def submit(self, rows: Sequence[StepRow]) -> None:
        """Send a step on its way. Raises WorkerDied where a rank is gone."""
        if self._dead is not None:
            raise self._dead
        data = wire.pack(wire.Step.of(self._next, rows))
        for rank in self._ranks:
            self._team.send(rank, data)
        self._numbers.append(self._next)
        self._next += 1

    def collect(self) -> list[StepResult]:
        """Wait for the step that was submitted first."""
        if self._dead is not None:
            raise self._dead
        replies = self._all(self._numbers.popleft())
        done: wire.Done = replies[self._answering]
        return done.unpacked()

    def _all(self, number: int, *, while_loading: bool = False) -> list[Any]:
        """Every rank's reply to a step. Raises what they raise, and WorkerDied, and then all are gone."""
        found = self._replies.setdefault(number, {})
        silent = 0.0
        while len(found) < len(self._ranks):
            try:
                rank, data = self._inbox.get(timeout=_LOOK)
            except Empty:
                self._team.look()
                failed = any(isinstance(reply, wire.Failed) for reply in found.values())
                silent += _LOOK
                if failed and silent >= (_GRACE if not while_loading else 0.0):
                    break
                continue
            silent = 0.0
            if isinstance(data, str):
                self._end(f"rank {rank} of the model is gone: {data}", found)
            reply = wire.read(cast(bytes, data), "reply")
            of = getattr(reply, "number", 0)
            if of == number or of in self._numbers:  # nobody waits any more for a step that was interrupted
                self._replies.setdefault(of, {})[rank] = reply
        del self._replies[number]
        return self._checked(found, while_loading)

    def _checked(self, found: dict[int, wire.Reply], while_loading: bool) -> list[Any]:
        failures = {rank: reply for rank, reply in found.items() if isinstance(reply, wire.Failed)}
        if not failures:
            return [found[rank] for rank in self._ranks]
        # The first stage that failed says why; those after it only that it did.
        cause = next((f for _, f in sorted(failures.items()) if f.kind != "StageFailed"), None)
        error = (cause or next(iter(failures.values()))).error()
        if len(failures) < len(self._ranks) and not while_loading:
            self._end(f"rank {min(failures)} of the model failed alone ({error})", found)
        raise error

    def _end(self, why: str, found: dict[int, wire.Reply]) -> None:
        """Nothing can run any more: ranks wait for each other."""
        causes = [reply.text for reply in found.values() if isinstance(reply, wire.Failed)]
        self.close()
        self._dead = WorkerDied(f"{why}{'; ' + causes[0] if causes else ''}. Restart the engine to serve on.")
        raise self._dead

    def execute(self, rows: Sequence[StepRow]) -> list[StepResult]:
        """Run one step while no other one is on its way."""
        self.submit(rows)
        return self.collect()

    def close(self) -> None:
        """End all ranks."""
        self._team.stop()
        self._numbers.clear()
        self._replies.clear()


def _smallest(rooms: Sequence[Sequence[CacheGroup]]) -> list[CacheGroup]:
    """The blocks that every rank has room for."""
    if len({len(groups) for groups in rooms}) != 1:
        raise EngineError("the ranks of the model see different groups of layers")
    return [replace(groups[0], num_blocks=min(g.num_blocks for g in groups)) for groups in zip(*rooms, strict=True)]


def _plain(value: Any) -> Any:
    """A setting as msgpack carries it."""
    return dict(value) if hasattr(value, "items") else list(value) if isinstance(value, tuple | list) else value
