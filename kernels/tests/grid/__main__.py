"""Run the cases on a GPU: `python -m kernels.tests.grid [--device cuda] [--draws 40] [--jobs 12] [NAME ...]`."""

import argparse
import sys
import time
from collections import defaultdict

from . import CASES
from .jobs import Job, run_all

#: Seeds that a process takes at a time.
_CHUNK = 5


def main() -> None:
    """Say of each case how many draws were near; the exit status is 1 where one was not, or where none was made."""
    options = argparse.ArgumentParser()
    options.add_argument("names", nargs="*", default=[])
    options.add_argument("--device", default="cuda")
    options.add_argument("--draws", type=int, default=40)
    options.add_argument("--jobs", type=int, default=1, help="processes: most of the time goes into compiling")
    options.add_argument("--seconds", type=float, default=1e9, help="begin no draws after so long")
    given = options.parse_args()
    names, end = given.names or list(CASES), time.time() + given.seconds
    chunks = [range(first, min(first + _CHUNK, given.draws)) for first in range(0, given.draws, _CHUNK)]
    jobs = [Job(name, chunk, given.device, end) for chunk in chunks for name in names]
    draws, seconds, troubles = defaultdict[str, int](int), defaultdict[str, float](float), defaultdict[str, int](int)
    for told in run_all(jobs, given.jobs):
        draws[told.name] += told.draws
        seconds[told.name] += told.seconds
        troubles[told.name] += len(told.troubles)
        for trouble in told.troubles:
            print(trouble, flush=True)
    for name in names:
        wrong = f", {troubles[name]} FAILED" if troubles[name] else ""
        print(f"{name}: {draws[name]} of {given.draws} draws{wrong}, {seconds[name]:.1f} s")
    good = sum(draws[name] > 0 and not troubles[name] for name in names)
    print(f"{good} cases passed, {len(names) - good} failed")
    sys.exit(good < len(names))


if __name__ == "__main__":
    main()
