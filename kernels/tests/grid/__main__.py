"""Run the cases on a GPU: `python -m kernels.tests.grid [--device cuda] [--draws 40] [NAME ...]`."""

import argparse
import random
import sys
import time
import traceback
from contextlib import nullcontext

import torch

from . import CASES
from .draw import Seeded
from .interpreter import interpreted


def main() -> None:
    """Say of each case how many draws were near; the exit status is 1 where one was not."""
    options = argparse.ArgumentParser()
    options.add_argument("names", nargs="*", default=[])
    options.add_argument("--device", default="cuda")
    options.add_argument("--draws", type=int, default=40)
    given = options.parse_args()
    device = torch.device(given.device)
    failed = 0
    with nullcontext() if device.type == "cuda" else interpreted():
        for name in given.names or CASES:
            failed += not run(name, device, given.draws)
    print(f"{len(given.names or CASES) - failed} passed, {failed} failed")
    sys.exit(failed > 0)


def run(name: str, device: torch.device, draws: int) -> bool:
    """One case; the first draw that fails is told with its seed."""
    begin = time.perf_counter()
    for seed in range(draws):
        try:
            CASES[name](Seeded(random.Random(seed)), device)
        except Exception:
            print(f"{name}: seed {seed} on {device} failed")
            traceback.print_exc()
            return False
    print(f"{name}: {draws} draws, {time.perf_counter() - begin:.1f} s", flush=True)
    return True


if __name__ == "__main__":
    main()
