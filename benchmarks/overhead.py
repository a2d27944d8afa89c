"""What does the engine itself take of a step: scheduling, rows, output, with a model that answers at once?"""

import gc
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from rig.report import measured_alone, parser_alone

from bestiary.cache import CacheGroup
from bestiary.config import EngineConfig
from bestiary.engine import Engine
from bestiary.executor import Immediate
from bestiary.sampling.params import SamplingParams
from bestiary.sampling.sampler import Choice
from bestiary.step import StepResult, StepRow

#: Running requests, and the most microseconds a step may take.
GOALS = {1: 60, 32: 250, 256: 1500}
HEADS = ["running", "µs a step, median (fastest to slowest tenth)", "goal", "met", "collections by the GC"]


class Null(Immediate):
    """A model that always says the same, at once."""

    vocabulary, width, block_size, max_model_len, most_crossed, pools = 1000, 1, 16, 4096, 0, None

    def __init__(self, sequences: int) -> None:
        self.groups = (CacheGroup(sequences * 256),)

    def execute(self, rows: Sequence[StepRow]) -> list[StepResult]:
        """As many answers as rows."""
        return [StepResult(Choice(7)) for _ in rows]

    def close(self) -> None:
        """Nothing is held."""


@dataclass
class Found:
    """Microseconds of each step, and how often memory was looked through for what nobody needs."""

    steps: list[float]
    collections: int


def measure(running: int, steps: int) -> Found:
    """A steady stretch: every request decodes, none begins or ends."""
    config = EngineConfig(model="null", max_num_seqs=running, max_num_batched_tokens=8192)
    engine = Engine(config, Null(running))
    params = SamplingParams(temperature=0, max_tokens=4000, ignore_eos=True, detokenize=False)
    for number in range(running):
        engine.add_request(str(number), [1 + number % 900] * 32, params, final_only=True)
    for _ in range(50):
        engine.step()
    before = sum(one["collections"] for one in gc.get_stats())
    taken = []
    for _ in range(steps):
        begin = time.perf_counter()
        engine.step()
        taken.append((time.perf_counter() - begin) * 1e6)
    return Found(taken, sum(one["collections"] for one in gc.get_stats()) - before)


def main() -> None:
    """Three sizes, each in turns of a thousand steps."""
    options = parser_alone(__doc__, rounds=3)
    options.add_argument("--steps", type=int, default=1000)
    given = options.parse_args()
    with measured_alone(given, "The engine's own part of a step", HEADS) as report:
        for running, goal in GOALS.items():
            found = [measure(running, given.steps) for _ in range(given.rounds)]
            steps = sorted(step for one in found for step in one.steps)
            middle = statistics.median(statistics.median(one.steps) for one in found)
            spread = f"{middle:.0f} ({steps[len(steps) // 10]:.0f} to {steps[-len(steps) // 10]:.0f})"
            met = "yes" if middle <= goal else "NO"
            report.rows.append([str(running), spread, f"<= {goal}", met, str(found[-1].collections)])
            report.raw[str(running)] = [one.steps for one in found]
        report.notes = [
            f"A null model answers at once; {given.rounds} rounds of {given.steps} steps in each of which all decode.",
        ]


if __name__ == "__main__":
    main()
