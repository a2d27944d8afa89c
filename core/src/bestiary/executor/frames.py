"""Messages over a stream socket: eight bytes of length, then the message. An empty one says "still alive"."""

import socket
import struct
import threading
import time
from collections.abc import Callable
from queue import SimpleQueue

__all__ = ["WorkerChannel", "receive", "send"]

_LENGTH = struct.Struct("<Q")
#: What no message reaches: a length above it is noise.
_LONGEST = 1 << 34
#: How often a worker says that it lives, in seconds.
_BEAT = 0.2


def send(connection: socket.socket, data: bytes) -> None:
    """One message. Raises OSError where the other end is gone."""
    connection.sendall(_LENGTH.pack(len(data)) + data)


def receive(connection: socket.socket, longest: int = _LONGEST) -> bytes | None:
    """The next message; None at the end, and for what is cut short or cannot be a message."""
    head = _exactly(connection, _LENGTH.size)
    if head is None:
        return None
    (length,) = _LENGTH.unpack(head)
    return None if length > longest else _exactly(connection, length)


def _exactly(connection: socket.socket, size: int) -> bytes | None:
    data = bytearray(size)
    view, found = memoryview(data), 0
    while found < size:
        try:
            count = connection.recv_into(view[found:])
        except OSError:
            return None
        if count == 0:
            return None
        found += count
    return bytes(data)


class WorkerChannel:
    """The end of who serves a driver: it says that it lives all along."""

    def __init__(self, connection: socket.socket, lost: Callable[[], None] = lambda: None) -> None:
        """`lost` is called, in another thread, as soon as the driver has gone."""
        self._connection, self._lost = connection, lost
        self._writing = threading.Lock()
        self._commands: SimpleQueue[bytes | None] = SimpleQueue()
        for task in (self._read, self._beat):
            threading.Thread(target=task, daemon=True).start()

    def send(self, data: bytes) -> None:
        """One message to the driver."""
        with self._writing:
            send(self._connection, data)

    def receive(self) -> bytes | None:
        """The next command; None when there will be no more."""
        return self._commands.get()

    def _read(self) -> None:
        while (data := receive(self._connection)) is not None:
            self._commands.put(data)
        self._commands.put(None)
        self._lost()

    def _beat(self) -> None:
        while True:
            time.sleep(_BEAT)
            try:
                self.send(b"")
            except OSError:  # the reader says so
                return
