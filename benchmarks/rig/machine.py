"""The machine under the benchmark: what it is, how busy it is, and what its memory and its cores can do at best."""

import json
import os
import platform
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BUSY_PER_CORE = 0.3
"""Load average per core above which a measurement is refused."""
DRIFT = 0.10
"""Difference between the probes before and after from which a measurement is suspect."""

_PROBE = Path(__file__).parent / "probe.py"
_FLAGS = re.compile(r"avx2|avx512f|avx512_bf16|avx512_fp16|avx512_vnni|avx_vnni|amx_\w+|bf16|i8mm|sve2?")


@dataclass(frozen=True)
class Probe:
    """Best sequential read and matrix product that the cores asked for reach together."""

    read_gb_s: float
    product_gflop_s: float


def cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0))


def squeezes() -> bool:
    """Whether bestiary keeps 16 bits in 12 here."""
    flags = Path("/proc/cpuinfo").read_text().split()
    return os.environ.get("BESTIARY_SQUEEZE") != "0" and "avx2" in flags


def load() -> float:
    """The load average of the last minute, per core."""
    return os.getloadavg()[0] / cores()


def require_quiet(noisy: bool) -> None:
    """Stop unless the machine is quiet or the caller accepts noise."""
    if load() > BUSY_PER_CORE and not noisy:
        raise SystemExit(
            f"The machine is busy: load {load():.2f} per core, {BUSY_PER_CORE} allowed. "
            "Wait until it is quiet, or measure with --noisy, which the result will say."
        )


def probe(python: str, threads: int) -> Probe:
    """Measure with that interpreter's torch, in a process of its own."""
    done = subprocess.run([python, str(_PROBE), str(threads)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"The bandwidth probe failed; it needs torch in {python}.\n{done.stderr[-2000:]}")
    return Probe(**json.loads(done.stdout.splitlines()[-1]))


class Memory:
    """How fast memory reads at the moment: a process that waits to be asked. On a shared host it changes in seconds."""

    def __init__(self, python: str, threads: int) -> None:
        command = [python, str(_PROBE), str(threads), "ask"]
        # Its threads would spin for some 10 ms after each answer, on the cores of who is measured next.
        alone = {**os.environ, "OMP_WAIT_POLICY": "passive"}
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=alone)

    def __enter__(self) -> "Memory":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    @contextmanager
    def beside(self, found: list[float]) -> Iterator[None]:
        """Add the mean, in GB/s, of before and after a block of code."""
        before = self._gb_s()
        yield
        found.append((before + self._gb_s()) / 2)

    def _gb_s(self) -> float:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("The bandwidth probe ended; what it said stands above.")
        return float(line)


def drifted(before: Probe, after: Probe) -> bool:
    """Whether the memory's speed changed so much between the two that what lies between them is suspect."""
    return abs(before.read_gb_s - after.read_gb_s) > DRIFT * max(before.read_gb_s, after.read_gb_s)


def describe() -> dict[str, Any]:
    """Processor, cores, flags that matter, memory and kernel."""
    info = Path("/proc/cpuinfo").read_text()
    fields = dict(re.findall(r"^([^\t:]+)\t*: (.*)$", info, re.MULTILINE))
    kilobytes = re.search(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text())
    return {
        "cpu": f"{fields.get('model name', platform.processor())} (family {fields.get('cpu family', '?')})",
        "cores": cores(),
        "flags": sorted({flag for flag in fields.get("flags", "").split() if _FLAGS.fullmatch(flag)}),
        "memory_gib": round(int(kilobytes[1]) / 2**20, 1) if kilobytes else None,
        "kernel": platform.release(),
    }
