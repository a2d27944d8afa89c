"""What is left of each engine's decode rate when another program wants a core too?"""

import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rig.contender import Contender, running
from rig.entries import Sizes, entries, parser
from rig.model import Model
from rig.report import measured, spread

COLUMNS = ["batch", "engine", "alone, tokens/s", "beside a busy program", "left", "of what the cores left would do"]
SPIN = "while True: pass"


@contextmanager
def neighbour() -> Iterator[None]:
    """A program that never rests, and takes what the kernel gives it."""
    process = subprocess.Popen([sys.executable, "-c", SPIN])
    try:
        time.sleep(0.2)
        yield
    finally:
        process.kill()
        process.wait()


def main() -> None:
    """In pairs: alone, and at once again with company."""
    options_parser = parser(__doc__, "bestiary,vllm,transformers")
    options_parser.add_argument("--batches", default="1,8")
    options_parser.add_argument("--new", type=int, default=96)
    options = options_parser.parse_args()
    model = Model.read(options.model)
    batches = [int(size) for size in options.batches.split(",")]
    sizes = Sizes(64 + options.new + 8, max(batches), max(batches) * 64)
    # Of n cores the program takes half of one, since both want it.
    fair = (options.threads - 0.5) / options.threads
    with (
        measured(options, model, "Decode beside a busy program, bf16", COLUMNS) as report,
        running(entries(options, model, sizes)) as contenders,
    ):
        report.versions(contenders)
        report.notes.append(
            f"The program spins on one core; with {options.threads} threads on as many cores {fair:.0%} of the work "
            "can be done beside it. Threads that wait for each other at every operation keep 50 %."
        )
        for batch in batches:
            found: dict[str, list[tuple[float, float]]] = {one.entry.name: [] for one in contenders}
            for i in range(options.pairs + 1):
                for contender in contenders:
                    prompts = model.prompts(batch, 64)
                    with contender.turn():
                        alone = _rate(contender, prompts, options.new)
                        with neighbour():
                            beside = _rate(contender, prompts, options.new)
                    print(f"batch {batch}, round {i}: {contender.entry.name} {alone:.1f}, {beside:.1f}", flush=True)
                    if i:
                        found[contender.entry.name].append((alone, beside))
            for name, pairs in found.items():
                left = [beside / alone for alone, beside in pairs]
                rates = [spread([pair[place] for pair in pairs]) for place in (0, 1)]
                share = f"{statistics.median(left) / fair:.0%}"
                report.rows.append([str(batch), name, *rates, spread(left, 2), share])
            report.raw[f"batch {batch}"] = found


def _rate(contender: Contender, prompts: list[list[int]], new: int) -> float:
    one, full = contender.ask(prompts, 1), contender.ask(prompts, new)
    return len(prompts) * (new - 1) / (full.seconds - one.seconds)


if __name__ == "__main__":
    main()
