"""What every contender speaks: a ready line, then one JSON line out for each JSON line in. It knows no engine.

<- {"ready": true, "load_s": ..., "imported": {"VmHWM": ..., ...}, "versions": {...}}
-> {"prompts": [[ids], ...], "max_tokens": n}
<- {"seconds": ..., "first_token_s": null or ..., "token_ids": [[ids], ...]}
"""

import argparse
import ctypes
import gc
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

Prompts = list[list[int]]
Generate = Callable[[Prompts, int], "Generated"]


@dataclass
class Generated:
    """New token ids of each prompt, and the moment (time.perf_counter) of the first one where the engine shows it."""

    token_ids: list[list[int]]
    first_token_at: float | None = None


@dataclass
class Options:
    """How to load the engine; `imported` is called by the contender when its imports are done."""

    model: str
    max_len: int
    max_seqs: int
    max_batched_tokens: int
    threads: int
    cache_bytes: int
    variant: str
    memory_imported: dict[str, int]

    def imported(self) -> None:
        """Note what memory the imports alone took."""
        self.memory_imported.update(memory())


def memory() -> dict[str, int]:
    """This process's memory in bytes, as the kernel counts it."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {words[0][:-1]: int(words[1]) * 1024 for words in lines if words[0] in ("VmHWM:", "VmRSS:", "RssAnon:")}


def serve(load: Callable[[Options], Generate], *packages: str) -> None:
    """Load the engine, then answer until standard input ends."""
    # Engines print to standard output as they please: it becomes standard error, the answers get a file of their own.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    _end_with_parent()
    options = _options()
    start = time.perf_counter()
    generate = load(options)
    ready = {
        "ready": True,
        "load_s": time.perf_counter() - start,
        "imported": options.memory_imported,
        "versions": {"python": sys.version.split()[0]} | {name: _version(name) for name in packages},
    }
    print(json.dumps(ready), file=answers)
    for line in sys.stdin:
        request = json.loads(line)
        gc.collect()
        start = time.perf_counter()
        done = generate(request["prompts"], request["max_tokens"])
        seconds = time.perf_counter() - start
        first = None if done.first_token_at is None else done.first_token_at - start
        print(json.dumps({"seconds": seconds, "first_token_s": first, "token_ids": done.token_ids}), file=answers)


def _end_with_parent() -> None:
    """Have the kernel kill this process when the script dies, or it would stay stopped for ever."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _options() -> Options:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--variant", default="")
    for name in ("max-len", "max-seqs", "max-batched-tokens", "threads", "cache-bytes"):
        parser.add_argument(f"--{name}", type=int, default=0)
    return Options(**vars(parser.parse_args()), memory_imported={})


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
