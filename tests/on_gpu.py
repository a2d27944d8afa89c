"""Every architecture on a GPU, against references on the CPU: `python tests/on_gpu.py [--jobs 16] [--seconds 120]`.

The conformance kit's checks, but for splits over ranks. Needs no pytest and no package index.
"""

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from multiprocessing import get_context

#: Checks that start ranks of their own.
_SPLITS = ("pipeline", "tensor")

#: An architecture, a case, a device, and when to begin no more checks.
Job = tuple[str, str | None, str, float]
#: What came of a job: results by status, and what failed.
Told = tuple[str, Counter[str], list[str]]


def main() -> None:
    """One line for each architecture; the exit status is 1 where a check failed."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("names", nargs="*", default=[])
    options.add_argument("--device", default="cuda")
    options.add_argument("--jobs", type=int, default=8)
    options.add_argument("--seconds", type=float, default=1e9, help="begin no checks after so long")
    given = options.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    end = time.time() + given.seconds
    counts: dict[str, Counter[str]] = {}
    with get_context("spawn").Pool(given.jobs) as pool:
        for name, found, failed in pool.imap_unordered(run, list(_jobs(given.names, given.device, end))):
            counts.setdefault(name, Counter()).update(found)
            for reason in failed:
                print(reason, flush=True)
    for name, found in sorted(counts.items()):
        print(f"{name}: {', '.join(f'{count} {status}' for status, count in sorted(found.items()))}")
    sys.exit(any(found["failed"] for found in counts.values()))


def _jobs(names: list[str], device: str, end: float) -> Iterator[Job]:
    """The first case of each architecture before the second one of any."""
    from bestiary import registry
    from bestiary.testing.conformance import plan

    known = sorted({registry.find(name).load().name for name in names or sorted(registry.scan())})
    cases = [(n, name, case) for name in known for n, (case, _) in enumerate(groupby(plan(name), lambda p: p.case))]
    return ((name, case, device, end) for n, name, case in sorted(cases, key=lambda found: found[0]) if case)


def run(job: Job) -> Told:
    """The checks of one case."""
    from bestiary.testing.conformance import plan

    name, case, device, end = job
    counts, failed = Counter[str](), []
    for planned in plan(name, device):
        if planned.case != case or any(split in planned.check for split in _SPLITS):
            continue
        if time.time() > end:
            counts["not run"] += 1
            continue
        result = planned.run()
        counts[result.status] += 1
        if result.status == "failed":
            failed.append(f"{name}: {planned.id}: {result.reason}")
    return name, counts, failed


if __name__ == "__main__":
    main()
