"""A host beside the driver's: starts ranks as processes when the driver asks, and passes messages on. Knows no model.

It belongs to the driver's process: it outlives an engine that is closed or restarted, and ends when the driver does,
and its ranks with it.
"""

import contextlib
import socket
import threading
import time
from queue import Empty, SimpleQueue

import msgspec

from bestiary.errors import EngineError
from bestiary.executor import frames
from bestiary.executor.interfaces import interface_of
from bestiary.executor.parallel import Inbox
from bestiary.executor.process import Processes

__all__ = ["FromNode", "Gone", "Hello", "Refused", "Said", "Send", "Start", "Stop", "ToNode", "pack", "serve"]

#: How long a node looks for a driver that is not there yet, and how often, in seconds.
_PATIENCE, _PAUSE = 600.0, 0.5
#: How often ranks are looked after, in seconds.
_LOOK = 0.1


class Hello(msgspec.Struct, tag=True):
    """A node introduces itself."""

    number: int
    nodes: int
    version: str
    key: str


class Refused(msgspec.Struct, tag=True):
    """It is not taken."""

    why: str


class Start(msgspec.Struct, tag=True):
    """Start these ranks; `team` tells them from those of before."""

    team: int
    first: int
    end: int


class Stop(msgspec.Struct, tag=True):
    """End a team's."""

    team: int


class Send(msgspec.Struct, tag=True):
    """A message for a rank."""

    team: int
    rank: int
    data: bytes


class Said(msgspec.Struct, tag=True):
    """A message of a rank."""

    team: int
    rank: int
    data: bytes


class Gone(msgspec.Struct, tag=True):
    """There will be no more of a rank."""

    team: int
    rank: int
    why: str


ToNode = Refused | Start | Stop | Send
FromNode = Hello | Said | Gone

pack = msgspec.msgpack.Encoder().encode
_DECODER = msgspec.msgpack.Decoder(ToNode)


def serve(address: str, port: int, hello: Hello) -> None:
    """Serve the driver at that place until it goes. Raises EngineError where there is none, or it takes no node."""
    shares: dict[int, _Share] = {}
    with _connect(address, port) as connection:
        interface = interface_of(connection.getsockname()[0])
        channel = frames.WorkerChannel(connection)
        channel.send(pack(hello))
        try:
            while (data := channel.receive()) is not None:
                match _read(data):
                    case Refused(why):
                        raise EngineError(f"the driver at {address}:{port} does not take this node: {why}")
                    case Start() as start:
                        shares[start.team] = _Share(start, channel, interface)
                    case Stop(team) if team in shares:
                        shares.pop(team).stop()
                    case Send(team, rank, data) if team in shares:
                        shares[team].outbox.put((rank, data))
        finally:
            for share in shares.values():
                share.stop()


def _read(data: bytes) -> ToNode:
    try:
        message: ToNode = _DECODER.decode(data)
    except (msgspec.DecodeError, ValueError) as error:
        raise EngineError(f"who answers there is no driver of Bestiary's: {error}") from None
    return message


def _connect(address: str, port: int) -> socket.socket:
    end = time.monotonic() + _PATIENCE
    while True:
        try:
            connection = socket.create_connection((address, port), timeout=10)
        except OSError as error:
            if time.monotonic() > end or isinstance(error, socket.gaierror):
                raise EngineError(
                    f"no driver answers at {address}:{port} ({error}); it is started with --node-rank 0, "
                    "and the same --nnodes, --master-addr and --master-port"
                ) from None
            time.sleep(_PAUSE)
        else:
            connection.settimeout(None)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return connection


class _Share:
    """The ranks of one team that are here."""

    def __init__(self, start: Start, channel: frames.WorkerChannel, interface: str | None) -> None:
        self._team, self._channel = start.team, channel
        self._inbox: Inbox = SimpleQueue()
        #: Messages for ranks. A rank that takes none must not keep this node from hearing that it is to stop.
        self.outbox: SimpleQueue[tuple[int, bytes] | None] = SimpleQueue()
        self._over = threading.Event()
        self._processes = Processes(range(start.first, start.end), self._inbox, interface)
        for task in (self._pass_on, self._hand_out):
            threading.Thread(target=task, daemon=True).start()

    def stop(self) -> None:
        self._over.set()
        self.outbox.put(None)
        self._processes.stop()

    def _pass_on(self) -> None:
        with contextlib.suppress(OSError):  # the channel says so
            while not self._over.is_set():
                try:
                    rank, said = self._inbox.get(timeout=_LOOK)
                except Empty:
                    self._processes.look()
                    continue
                team = self._team
                self._channel.send(pack(Gone(team, rank, said) if isinstance(said, str) else Said(team, rank, said)))

    def _hand_out(self) -> None:
        while (message := self.outbox.get()) is not None:
            self._processes.send(*message)
