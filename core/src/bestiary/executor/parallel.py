"""The driver of several ranks: sends each step to all of them and waits for all. Knows no way of starting one."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, Literal, NoReturn, Protocol, cast

from bestiary.architecture import Architecture
from bestiary.cache import CacheGroup
from bestiary.config import EngineConfig
from bestiary.errors import AdapterError, EngineError, WorkerDied
from bestiary.executor import wire
from bestiary.executor.worker import identity
from bestiary.step import StepResult, StepRow

__all__ = ["Inbox", "ParallelExecutor", "Team"]

#: What ranks say, (rank, message); a text instead of bytes says why there will be no more of that rank.
Inbox = SimpleQueue[tuple[int, bytes | str]]
#: Messages on their way, one for each rank; None is the last.
_Outbox = SimpleQueue[list[bytes] | None]

#: How ranks carry a command out: a step together, so that one that failed leaves the others waiting for ever; or each
#: alone, as they read an adapter; or while they load, where the first failure ends it all.
_How = Literal["together", "alone", "loading"]
#: Seconds after which ranks that are silent while another one has failed will not answer any more.
_PATIENCE: dict[_How, float] = {"together": 0.8, "alone": float("inf"), "loading": 0.0}
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

    runs_ahead = False

    def __init__(
        self,
        config: EngineConfig,
        architecture: Architecture,
        folder: Path,
        start: Callable[[int, Inbox], Team],
    ) -> None:
        self.depth, shards = config.pipeline_parallel_size, config.tensor_parallel_size
        self.block_size = config.block_size
        self._ranks, self._shards = range(self.depth * shards), shards
        self._answering = (self.depth - 1) * shards
        self._timeout = config.execute_model_timeout_seconds
        self._inbox: Inbox = SimpleQueue()
        self._numbers: deque[int] = deque()
        self._dead: WorkerDied | None = None
        self._next = 0
        self._replies: dict[int, dict[int, wire.Reply]] = {}
        self._team = start(len(self._ranks), self._inbox)
        # A thread of its own sends: ctrl-C cannot come between two ranks, and a rank that takes nothing stops nobody.
        self._outbox = _Outbox()
        Thread(target=_post, args=(self._outbox, self._team), daemon=True).start()
        try:
            ready = self._load(config, architecture, folder)
        except BaseException:
            self.close()
            raise
        self.vocabulary, self.width = ready.vocabulary, ready.width
        self.max_model_len, self.most_crossed = ready.max_model_len, ready.most_crossed
        self.pools = cast(Literal["last", "all"] | None, ready.pools)

    def _load(self, config: EngineConfig, architecture: Architecture, folder: Path) -> wire.Ready:
        settings = {name: _plain(value) for name, value in asdict(config).items()}
        own = identity(architecture, config.plugin)
        loads = [wire.Load(settings, str(folder), own, rank, self._team.meeting) for rank in self._ranks]
        self._outbox.put([wire.pack(load) for load in loads])
        rooms: list[wire.Room] = self._all(0, wire.Room, how="loading")
        self.groups: Sequence[CacheGroup] = _smallest([room.groups for room in rooms])
        self._tell(wire.Agreed(list(self.groups)))
        ready: list[wire.Ready] = self._all(0, wire.Ready, how="loading")
        return ready[self._answering]

    def _tell(self, command: wire.Command) -> None:
        """The same to every rank."""
        self._outbox.put([wire.pack(command)] * len(self._ranks))

    def submit(self, rows: Sequence[StepRow]) -> None:
        """Send a step on its way. Raises WorkerDied where a rank is gone."""
        if self._dead is not None:
            raise self._dead
        number = self._number()
        self._tell(wire.Step.of(number, rows))
        self._numbers.append(number)

    def _number(self) -> int:
        """Never the same: nobody waits for the answers to a command that was interrupted."""
        self._next += 1
        return self._next

    def collect(self) -> list[StepResult]:
        """Wait for the step that was submitted first."""
        if self._dead is not None:
            raise self._dead
        replies: list[wire.Done] = self._all(self._numbers.popleft(), wire.Done)
        try:
            return replies[self._answering].unpacked()
        except Exception as error:
            raise EngineError(f"what rank {self._answering} of the model found cannot be read ({error})") from None

    def _all(self, number: int, kind: type, *, how: _How = "together") -> list[Any]:
        """Every rank's reply to a command. Raises what they raise, and WorkerDied, and then all are gone."""
        found = self._replies.setdefault(number, {})
        silent = 0.0
        try:
            while len(found) < len(self._ranks):
                try:
                    rank, data = self._inbox.get(timeout=_LOOK)
                except Empty:
                    self._team.look()
                    silent += _LOOK
                    if _has_failed(found) and silent >= _PATIENCE[how]:
                        break
                    self._check_steps(silent)
                    if how == "together" and silent >= self._timeout:
                        late = next(rank for rank in self._ranks if rank not in found)
                        self._end(f"rank {late} of the model hangs: no answer to a step for {silent:.1f} s", found)
                    continue
                silent = 0.0
                if isinstance(data, str):
                    if how == "loading" and _has_failed(found):  # it ends when it has said why it cannot load
                        break
                    self._end(f"rank {rank} of the model is gone: {data}", found)
                self._sort_in(rank, data, number, kind)
        finally:
            self._replies.pop(number, None)
        return self._checked(found, how)

    def _sort_in(self, rank: int, data: bytes, number: int, kind: type) -> None:
        """A reply to where it is waited for; what comes twice, or for a step that was interrupted, to nowhere."""
        try:
            reply: wire.Reply = wire.read(data, "reply")
        except EngineError as error:
            self._end(f"rank {rank} of the model is gone: {error}", {})
        of = getattr(reply, "number", 0)
        wanted = kind if of == number else wire.Done if of in self._numbers else None
        if wanted is not None and isinstance(reply, (wire.Failed, wanted)):
            self._replies.setdefault(of, {}).setdefault(rank, reply)

    def _check_steps(self, silent: float) -> None:
        """Raise WorkerDied where a step that is on its way failed on some ranks, and others wait for them in it."""
        for number in self._numbers:
            found = self._replies.get(number, {})
            if _has_failed(found) and len(found) < len(self._ranks) and silent >= _PATIENCE["together"]:
                self._checked(found, "together")

    def _checked(self, found: dict[int, wire.Reply], how: _How) -> list[Any]:
        failures = {rank: reply for rank, reply in found.items() if isinstance(reply, wire.Failed)}
        if not failures:
            return [found[rank] for rank in self._ranks]
        # The first stage that failed says why; those after it only that it did.
        cause = next((f for _, f in sorted(failures.items()) if f.kind != "StageFailed"), None)
        error = (cause or next(iter(failures.values()))).error()
        if how == "together" and not self._are_together(found, failures):
            self._end(f"rank {min(failures)} of the model failed alone ({error})", found)
        raise error

    def _are_together(self, found: dict[int, wire.Reply], failures: dict[int, wire.Failed]) -> bool:
        """No rank waits for another one, and none has taken one step's tensors for another's.

        A rank answers when it has exchanged what there is to exchange. With another step behind this one, though, it
        may have got that from a shard that failed and went on: then only shards that fail alike have not parted.
        """
        if len(found) < len(self._ranks):
            return False
        if self.depth == 1 or self._shards == 1:
            return True
        stages = [self._ranks[first : first + self._shards] for first in self._ranks[:: self._shards]]
        return all(len({rank in failures for rank in stage}) == 1 for stage in stages)

    def _end(self, why: str, found: dict[int, wire.Reply]) -> NoReturn:
        """Nothing can run any more: ranks wait for each other."""
        causes = [reply.text for reply in found.values() if isinstance(reply, wire.Failed)]
        self.close()
        self._dead = WorkerDied(f"{why}{'; ' + causes[0] if causes else ''}. Restart the engine to serve on.")
        raise self._dead

    def execute(self, rows: Sequence[StepRow]) -> list[StepResult]:
        """Run one step while no other one is on its way."""
        self.submit(rows)
        return self.collect()

    def add_adapter(self, key: str, folder: Path) -> bytes:
        """Read an adapter into every rank's memory."""
        try:
            added: list[wire.Added] = self._ask(lambda number: wire.AddAdapter(number, key, str(folder)), wire.Added)
            if len({one.digest for one in added}) != 1:
                raise AdapterError(f"the ranks of the model read different adapters from {folder}")
        except AdapterError:
            self.remove_adapter(key)
            raise
        return added[0].digest

    def place_adapter(self, key: str, slot: int) -> None:
        """Fill a slot on every rank."""
        self._ask(lambda number: wire.PlaceAdapter(number, key, slot))

    def remove_adapter(self, key: str) -> None:
        """Let an adapter go from every rank's memory."""
        self._ask(lambda number: wire.RemoveAdapter(number, key))

    def _ask(self, command: Callable[[int], wire.Command], kind: type = wire.Done) -> list[Any]:
        """Every rank's reply to a command that each can fail alone, as no rank waits for another in it."""
        if self._dead is not None:
            raise self._dead
        number = self._number()
        self._tell(command(number))
        return self._all(number, kind, how="alone")

    def close(self) -> None:
        """End all ranks."""
        self._outbox.put(None)
        self._team.stop()
        self._numbers.clear()
        self._replies.clear()


def _post(outbox: _Outbox, team: Team) -> None:
    """Send a message to each rank, again and again, until there are no more."""
    while (messages := outbox.get()) is not None:
        for rank, message in enumerate(messages):
            team.send(rank, message)


def _has_failed(found: dict[int, wire.Reply]) -> bool:
    return any(isinstance(reply, wire.Failed) for reply in found.values())


def _smallest(rooms: Sequence[Sequence[CacheGroup]]) -> list[CacheGroup]:
    """The blocks that every rank has room for."""
    if len({len(groups) for groups in rooms}) != 1:
        raise EngineError("the ranks of the model see different groups of layers")
    return [replace(groups[0], num_blocks=min(g.num_blocks for g in groups)) for groups in zip(*rooms, strict=True)]


def _plain(value: Any) -> Any:
    """A setting as msgpack carries it."""
    return dict(value) if hasattr(value, "items") else list(value) if isinstance(value, tuple | list) else value
