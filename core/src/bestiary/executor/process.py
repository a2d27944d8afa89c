"""Ranks as processes of this host, each at the other end of a socket pair. Knows no model.

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

__all__ = ["start"]

#: A worker that has not been heard of for so long hangs, in seconds: once it has spoken, and while it is imported.
_SILENCE, _BIRTH = 15.0, 180.0
#: And for so long before its state is asked for: workers say every fifth of a second that they live.
_QUIET = 0.4
#: Who was not asked for so long knows nothing of the time between: it, or this process, may have slept.
_GAP = 1.0


def start(ranks: int, inbox: Inbox) -> "_Processes":
    """Start as many workers."""
    return _Processes(ranks, inbox)


class _Processes:
    """A team of processes."""

    def __init__(self, ranks: int, inbox: Inbox) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="bestiary-ranks-", ignore_cleanup_errors=True)
        self.meeting = str(Path(self._folder.name) / "meeting")
        self._inbox = inbox
        self._stopping = False
        self._workers = [_Worker(rank, ranks, inbox) for rank in range(ranks)]

    def send(self, rank: int, data: bytes) -> None:
        """Over the rank's socket."""
        self._workers[rank].send(data)

    def look(self) -> None:
        """Who is stopped, or silent."""
        for worker in self._workers:
            if trouble := worker.trouble():
                self._inbox.put((worker.rank, trouble))

    def stop(self) -> None:
        """Kill them: they hold nothing that must be saved."""
        for worker in self._workers:
            worker.kill()
        for worker in self._workers:
            worker.bury()
        self._folder.cleanup()


class _Silence:
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
    def __init__(self, rank: int, ranks: int, inbox: Inbox) -> None:
        self.rank = rank
        self._inbox = inbox
        self._silence = _Silence()
        self._connection, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "bestiary.executor.rank", str(theirs.fileno())]
            # In a session of its own: ctrl-C on the terminal is the driver's to handle.
            self._process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=_environment(ranks),
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


def _environment(ranks: int) -> dict[str, str]:
    """Ranks share the cores, and meet on this host alone."""
    threads = str(max(1, (os.cpu_count() or 1) // ranks))
    return {"OMP_NUM_THREADS": threads, "GLOO_SOCKET_IFNAME": "lo", **os.environ}


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
