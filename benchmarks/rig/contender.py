"""A contender's process: started once, stopped while another has its turn, asked over its standard input."""

import json
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_BENCHMARKS = Path(__file__).resolve().parent.parent
TIMEOUT_S = 900
"""For loading, and for each answer."""
GRACE_S = 20
"""For tidying up at the end."""


@dataclass(frozen=True)
class Entry:
    """Who takes part: the row's name, the program of `contenders/`, its interpreter, its arguments and environment."""

    name: str
    program: str
    python: str
    arguments: dict[str, Any]
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """What came back for one request."""

    seconds: float
    first_token_s: float | None
    token_ids: list[list[int]]


class Contender:
    """One running entry. Between turns its whole process group is stopped: it cannot take a core from another."""

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.started_at = time.perf_counter()
        self._log = tempfile.NamedTemporaryFile("w+", prefix=f"{entry.program}-", suffix=".log")  # noqa: SIM115
        arguments = [text for name, value in entry.arguments.items() for text in (f"--{name}", str(value))]
        self._process = subprocess.Popen(
            [entry.python, "-m", f"contenders.{entry.program}", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            cwd=_BENCHMARKS,
            env=os.environ | entry.environment,
            start_new_session=True,
        )
        try:
            self.ready = self._read()
        except BaseException:
            self.close()
            raise

    def ask(self, prompts: list[list[int]], max_tokens: int) -> Answer:
        """Send a request and wait for the answer."""
        assert self._process.stdin
        self._process.stdin.write(json.dumps({"prompts": prompts, "max_tokens": max_tokens}) + "\n")
        self._process.stdin.flush()
        return Answer(**self._read())

    @contextmanager
    def turn(self) -> Iterator["Contender"]:
        """Run only inside this."""
        os.killpg(self._process.pid, signal.SIGCONT)
        try:
            yield self
        finally:
            self.pause()

    def pause(self) -> None:
        """Stop until the next turn."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGSTOP)

    def memory(self) -> dict[str, int]:
        """VmHWM, VmRSS and RssAnon in bytes, summed over its processes."""
        totals = {"VmHWM": 0, "VmRSS": 0, "RssAnon": 0}
        for status in Path("/proc").glob("[0-9]*/status"):
            with suppress(OSError, ProcessLookupError):
                if os.getsid(int(status.parent.name)) != self._process.pid:
                    continue
                for line in status.read_text().splitlines():
                    name, _, value = line.partition(":")
                    if name in totals:
                        totals[name] += int(value.split()[0]) * 1024
        return totals

    def close(self) -> None:
        """End it and everything that it started; the end of its input lets it tidy up first."""
        assert self._process.stdin
        assert self._process.stdout
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGCONT)
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(GRACE_S)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process.stdout.close()
        self._log.close()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout
        watchdog = threading.Timer(TIMEOUT_S, os.killpg, (self._process.pid, signal.SIGKILL))
        watchdog.start()
        line = self._process.stdout.readline()
        watchdog.cancel()
        if not line:
            self._log.seek(0)
            tail = "".join(self._log.readlines()[-30:])
            raise SystemExit(f"{self.entry.name} ended or gave no answer in {TIMEOUT_S} s. It said last:\n{tail}")
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextmanager
def running(entries: list[Entry]) -> Iterator[list[Contender]]:
    """Load them one after the other; each is stopped when it is ready. All are ended at the end."""
    started: list[Contender] = []
    try:
        for entry in entries:
            print(f"loading {entry.name} ...", flush=True)
            started.append(Contender(entry))
            started[-1].pause()
        yield started
    finally:
        for contender in started:
            contender.close()
