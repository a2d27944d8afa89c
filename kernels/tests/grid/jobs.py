"""Draws of the cases from seeds, in one process or several: most of the time on a GPU goes into compiling."""

import os
import random
import time
import traceback
from collections.abc import Iterator
from contextlib import nullcontext
from multiprocessing import get_context
from typing import NamedTuple

import torch

from .cases import CASES
from .draw import Seeded
from .interpreter import interpreted

__all__ = ["Job", "Told", "run_all"]


class Job(NamedTuple):
    """Some draws of a case, on a device, to be begun before a time."""

    name: str
    seeds: range
    device: str
    end: float


class Told(NamedTuple):
    """How many draws were made, in which time, and what was wrong with those that failed."""

    name: str
    draws: int
    seconds: float
    troubles: list[str]


def run_all(jobs: list[Job], processes: int) -> Iterator[Told]:
    """What each job told, as they end."""
    if processes == 1:
        yield from map(_run, jobs)
        return
    with get_context("spawn").Pool(processes) as pool:
        yield from pool.imap_unordered(_run, jobs)


def _run(job: Job) -> Told:
    """Its draws; each that fails is told with its seed and its process: after a lost device all of that one fail."""
    begin, troubles, draws = time.perf_counter(), [], 0
    on_gpu = job.device.startswith("cuda")
    with nullcontext() if on_gpu else interpreted():
        for seed in job.seeds:
            if time.time() > job.end:
                break
            draws += 1
            try:
                CASES[job.name](Seeded(random.Random(seed)), torch.device(job.device))
                if on_gpu:
                    torch.cuda.synchronize()
            except Exception:
                told = traceback.format_exc()
                troubles.append(f"{job.name}: seed {seed} on {job.device} failed (process {os.getpid()})\n{told}")
    return Told(job.name, draws, time.perf_counter() - begin, troubles)
