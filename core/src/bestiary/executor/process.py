"""Ranks as processes of one host, each at the other end of a socket pair. Knows no model.

A worker that dies closes its socket; one that is stopped, or does not get on, is found by its state and its silence.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from bestiary.executor import frames
from bestiary.executor.parallel import Inbox

__all__ = ["Processes", "Silence", "start"]

#: A worker that has not been heard of for so long hangs, in seconds: once it has spoken, and while it is imported.
_SILENCE, _BIRTH = 15.0, 180.0
#: And for so long before its state is asked for: workers say every fifth of a second that they live.
_QUIET = 0.4
#: Who was not asked for so long knows nothing of the time between: it, or this process, may have slept.
_GAP = 1.0


def start(ranks: int, inbox: Inbox) -> "_Alone":
    """Start as many workers, on this host alone."""
    return _Alone(ranks, inbox)


class Processes:
    """Some ranks of a model, each a process of this host."""

    def __init__(self, ranks: range, inbox: Inbox, interface: str | None) -> None:
        """`interface` is the network's that they meet the others on; without it, what their libraries choose."""
        self._inbox = inbox
        environment = _environment(len(ranks), interface)
        self._workers = {rank: _Worker(rank, environment, inbox) for rank in ranks}

    def send(self, rank: int, data: bytes) -> None:
        """Over the rank's socket."""
        self._workers[rank].send(data)

    def look(self) -> None:
        """Who is stopped, or silent."""
        for worker in self._workers.values():
            if trouble := worker.trouble():
                self._inbox.put((worker.rank, trouble))

    def stop(self) -> None:
        """Kill them: they hold nothing that must be saved."""
        for worker in self._workers.values():
            worker.kill()
        for worker in self._workers.values():
            worker.bury()


class _Alone(Processes):
    """All ranks. They meet at a file: no other user of this host can come there."""

    def __init__(self, ranks: int, inbox: Inbox) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="bestiary-ranks-", ignore_cleanup_errors=True)
        self.meeting = str(Path(self._folder.name) / "meeting")
        super().__init__(range(ranks), inbox, "lo")

    def stop(self) -> None:
        super().stop()
        self._folder.cleanup()


class Silence:
    """How long somebody has not been heard of, counted while somebody else asks for it."""

    def __init__(self) -> None:
        self._heard = self._asked = time.monotonic()
        self.ever_heard = False

    def heard(self) -> None:
        """Not silent."""
        self._heard, self.ever_heard = time.monotonic(), True

    def seconds(self) -> float:
        """So far."""
        now = time.monotonic()
        if now - self._asked > _GAP:
            self._heard = now
        self._asked = now
        return now - self._heard


class _Worker:
    def __init__(self, rank: int, environment: dict[str, str], inbox: Inbox) -> None:
        self.rank = rank
        self._inbox = inbox
        self._silence = Silence()
        self._connection, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "bestiary.executor.rank", str(theirs.fileno())]
            # In a session of its own: ctrl-C on the terminal is the driver's to handle.
            self._process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,
            )
        threading.Thread(target=self._read, daemon=True).start()

    def send(self, data: bytes) -> None:
        with contextlib.suppress(OSError):  # the reader says so
            frames.send(self._connection, data)

    def trouble(self) -> str | None:
        """What is wrong with it, as far as that shows from outside."""
        silence = self._silence.seconds()
        if silence > _QUIET and _state(self._process.pid) in ("T", "t"):
            return f"its process {self._process.pid} was stopped"
        if silence > (_SILENCE if self._silence.ever_heard else _BIRTH):
            return f"its process {self._process.pid} has not been heard of for {silence:.0f} s"
        return None

    def kill(self) -> None:
        self._process.kill()

    def bury(self) -> None:
        self._process.wait()
        self._connection.close()

    def _read(self) -> None:
        while (data := frames.receive(self._connection)) is not None:
            self._silence.heard()
            if data:
                self._inbox.put((self.rank, data))
        self._inbox.put((self.rank, f"its process {self._process.pid} ended{_cause(self._process)}"))


def _environment(ranks: int, interface: str | None) -> dict[str, str]:
    """As many ranks share the cores of this host; whoever has set one of these knows better."""
    threads = str(max(1, (os.cpu_count() or 1) // max(1, ranks)))
    network = {} if interface is None else {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface}
    return {"OMP_NUM_THREADS": threads, **network, **os.environ}


def _cause(process: "subprocess.Popen[bytes]") -> str:
    try:
        code = process.wait(timeout=0.5)
    except subprocess.TimeoutExpired:
        return ""
    return f" ({signal.Signals(-code).name})" if code < 0 else f" (exit status {code})"


def _state(pid: int) -> str:
    """The letter by which the kernel calls a process's state; empty where it cannot be known."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""
