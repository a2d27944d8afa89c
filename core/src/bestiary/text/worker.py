"""Keeps the process that renders chat templates: starts it, asks it, ends it when it hangs. Knows no template.

The process (`bestiary.text.sandbox`) is started when it is first wanted, serves one request after another over two
pipes, and ends with this one: at exit, or by the end of its input when this one was killed.
"""

import importlib.util
import json
import os
import select
import signal
import struct
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any

from bestiary.errors import CheckpointMalformed, EngineError, RequestError

__all__ = ["Worker"]

_PROGRAM = Path(__file__).with_name("sandbox.py")
_START_SECONDS = 60.0
_MAX_REQUEST_BYTES = 32 * 2**20
_MAX_REPLY_BYTES = 64 * 2**20
#: A library path may be what makes the interpreter start at all; the rest of the environment is nobody's business.
_ENVIRONMENT = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "TZ")


class Worker:
    """The rendering process, shared by threads.

    `limit_s` is the processor time that one render may take, compiling included; ten times that on the clock.
    """

    def __init__(self, limit_s: float = 1.0) -> None:
        self.limit_s = limit_s
        self._lock = threading.Lock()
        self._child: _Child | None = None

    def warm(self) -> None:
        """Starts the process, and does not wait until it is ready."""
        with self._lock:
            self._started()

    def render(self, request: dict[str, Any]) -> str:
        """Returns the text of one request (see `bestiary.text.sandbox.answer`).

        Raises RequestError for a request that cannot be rendered, or not in time; CheckpointMalformed for a template
        that is wrong in itself; EngineError where the process does not start.
        """
        try:
            frame = json.dumps({**request, "limit_s": self.limit_s}).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise RequestError(f"messages, tools and template variables must be plain JSON data: {error}") from error
        if len(frame) > _MAX_REQUEST_BYTES:
            raise RequestError(f"a conversation of {len(frame):,} bytes: at most {_MAX_REQUEST_BYTES:,} are rendered")
        with self._lock:
            child = self._started()
            child.await_ready()
            try:
                reply = child.exchange(frame, time.monotonic() + 10 * self.limit_s)
            except TimeoutError:
                raise RequestError(
                    f"the chat template did not finish within {self.limit_s} s: send a shorter conversation, "
                    "or use another template"
                ) from None
            except (OSError, EOFError, ValueError) as error:
                raise RequestError(
                    f"the process that renders chat templates ended over this conversation ({error}): "
                    "its template asks for too much"
                ) from error
        if "text" in reply:
            return str(reply["text"])
        kind = CheckpointMalformed if reply["fault"] == "template" else RequestError
        raise kind(f"the chat template failed: {reply['reason']}")

    def _started(self) -> "_Child":
        if self._child is None or not self._child.is_alive():
            self._child = _Child()
        return self._child


class _Child:
    """One process and the pipes to it."""

    def __init__(self) -> None:
        folders = {str(Path(_origin(name)).parents[1]) for name in ("jinja2", "markupsafe")}
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_PROGRAM), *sorted(folders)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
                env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
                start_new_session=True,  # ctrl-C is for this process
            )
        except OSError as error:
            raise EngineError(f"the process that renders chat templates cannot be started: {error}") from error
        assert self._process.stdin is not None and self._process.stdout is not None
        self._requests, self._replies = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._requests, False)
        self._owner = os.getpid()
        self._ready = False
        self.end = weakref.finalize(self, _end, self._process, self._owner)

    def is_alive(self) -> bool:
        """Can it be asked, and by this process: a fork inherits the pipes, and would mix two conversations on them."""
        return self.end.alive and self._owner == os.getpid() and self._process.poll() is None

    def await_ready(self) -> None:
        """Waits for the greeting: what comes after it is rendering, and has the render's limit."""
        if self._ready:
            return
        try:
            self._receive(time.monotonic() + _START_SECONDS)
        except (OSError, EOFError) as error:
            self.end()
            raise EngineError(
                f"the process that renders chat templates did not start ({error}): "
                f"see whether `{sys.executable} -I -S {_PROGRAM}` runs, with jinja2 on its path"
            ) from error
        self._ready = True

    def exchange(self, frame: bytes, deadline: float) -> dict[str, Any]:
        """Sends a request and returns the reply. Ended by any error: TimeoutError, EOFError, OSError, ValueError."""
        try:
            rest = memoryview(struct.pack(">I", len(frame)) + frame)
            while rest:
                _await(self._requests, select.POLLOUT, deadline)
                rest = rest[os.write(self._requests, rest) :]
            reply: dict[str, Any] = json.loads(self._receive(deadline))
        except BaseException:  # an interrupt as well: half an exchange cannot be gone on with
            self.end()
            raise
        return reply

    def _receive(self, deadline: float) -> bytes:
        (length,) = struct.unpack(">I", self._read(4, deadline))
        if length > _MAX_REPLY_BYTES:
            raise EOFError(f"a reply of {length} bytes")
        return self._read(length, deadline)

    def _read(self, length: int, deadline: float) -> bytes:
        read = bytearray()
        while len(read) < length:
            _await(self._replies, select.POLLIN, deadline)
            if not (piece := os.read(self._replies, length - len(read))):
                code = self._process.wait()
                raise TimeoutError if code == -signal.SIGPROF else EOFError(f"it left with code {code}")
            read += piece
        return bytes(read)


def _await(descriptor: int, event: int, deadline: float) -> None:
    poll = select.poll()
    poll.register(descriptor, event)
    if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
        raise TimeoutError


def _origin(name: str) -> str:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise EngineError(f"chat templates need {name}, which is not installed: pip install {name}")
    return spec.origin


def _end(process: "subprocess.Popen[bytes]", owner: int) -> None:
    if os.getpid() == owner:
        process.kill()
    else:
        process.returncode = 0  # after a fork it is the parent's, to end and to wait for
    with process:  # closes the pipes and waits
        pass
