"""How near the memory's limit is paged decode attention on a CPU, and does its time grow with the context alone?"""

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from rig import machine
from rig.report import Report, measured_alone, parser_alone, ratios, shares, spread
from torch import Tensor
from torch.nn import functional

from bestiary_kernels import paged_attention
from bestiary_kernels.memory import lasting
from bestiary_kernels.tape import Tape

COLUMNS = [
    "heads",
    "batch",
    "context",
    "µs, median (range)",
    "GB/s",
    "of the floor",
    "per token, to 1,024",
    "called from Python, of the floor",
    "torch / that",
]
#: Query heads, heads of keys, width.
HEADS = {"SmolLM2-135M": (9, 3, 64), "Llama-3.1-8B": (32, 8, 128)}
BATCH, PAGE = 8, 16
CONTEXTS = (256, 512, 1024, 2048, 4096, 8192, 16384)
GOAL = 0.55


def main() -> None:
    """Keys and values of bfloat16, in blocks in random order, larger than the caches; in turns with torch's own.

    They lie as the engine has them: of a block those of all layers, which take turns, side by side.
    """
    given = parser_alone(__doc__, rounds=9).parse_args()
    torch.set_num_threads(machine.cores())
    with (
        measured_alone(given, f"Paged decode attention, batch {BATCH}, bf16", COLUMNS) as report,
        machine.Memory(sys.executable, torch.get_num_threads()) as memory,
    ):
        for name, heads in HEADS.items():
            _measure(name, heads, given.rounds, memory, report)
        report.notes = [
            f"{torch.get_num_threads()} threads; all layers in one recorded step, as the engine decodes, then each "
            "called from Python, as torch's function is.",
            "Floor: keys and values once, at the bandwidth that a probe reads with right before and after each round.",
            f"Goal at contexts of 1,024 and more: {GOAL:.0%} of it, and no more than linear in the context.",
            "torch: scaled_dot_product_attention over keys and values of one length that lie side by side, which no "
            "cache of pages does for it.",
        ]


def _measure(name: str, shape: tuple[int, int, int], rounds: int, memory: machine.Memory, report: Report) -> None:
    heads, kv_heads, width = shape
    base = 0.0
    for context in CONTEXTS:
        pages = BATCH * -(-context // PAGE)
        # As many tables as make the caches forget one before it comes again.
        both = torch.randn(pages, 1, 2, kv_heads, PAGE, width).bfloat16()
        copies = max(1, int(300e6 // both.nbytes))
        caches = lasting((pages, copies, *both.shape[2:]), torch.bfloat16).copy_(both)
        tables = torch.randperm(pages).to(torch.int32).view(BATCH, -1)
        starts, lens = torch.arange(BATCH + 1, dtype=torch.int32), torch.full((BATCH,), context, dtype=torch.int32)
        q = torch.randn(BATCH, heads, width).bfloat16()
        flat = [torch.randn(BATCH, kv_heads, context, width).bfloat16() for _ in range(2)]
        layers = [layer.unbind(1) for layer in caches.unbind(1)]
        calls = [partial(paged_attention, q, *layer, tables, starts, lens, width**-0.5) for layer in layers]
        torchs = partial(functional.scaled_dot_product_attention, q[:, :, None], *flat, enable_gqa=True)
        found, speeds = _in_turns(calls, torchs, rounds, memory)
        seconds = statistics.median(found["recorded"])
        size = 2 * BATCH * context * kv_heads * width * 2
        if context == 1024:
            base = seconds / context
        floors = [size / gb_s / 1e9 for gb_s in speeds]
        report.rows.append(
            [
                name,
                str(BATCH),
                f"{context:,}",
                spread([s * 1e6 for s in found["recorded"]], 0),
                f"{size / seconds / 1e9:.1f}",
                shares(ratios(floors, found["recorded"])),
                f"{seconds / context / base:.2f}" if base else "",
                shares(ratios(floors, found["called"])),
                f"{statistics.median(ratios(found['torch'], found['called'])):.1f}",
            ]
        )
        report.raw[f"{name} {context}"] = {**found, "memory, GB/s": speeds}
        print(report.rows[-1], flush=True)


def _in_turns(
    calls: list[partial[Tensor]], torchs: Callable[[], object], rounds: int, memory: machine.Memory
) -> tuple[dict[str, list[float]], list[float]]:
    """Seconds of one layer in each round, by who computed it, and what memory read with in that round, GB/s."""
    _, tape = Tape.record(lambda: [call() for call in calls])
    if tape is None:
        sys.exit("The kernels for this CPU are missing: without them there is nothing to measure.")
    found: dict[str, list[float]] = {"recorded": [], "called": [], "torch": []}
    speeds: list[float] = []
    for turn in range(rounds + 1):
        with memory.beside(speeds):
            times = {
                "recorded": _seconds(tape.replay) / len(calls),
                "called": statistics.mean(map(_seconds, calls)),
                "torch": _seconds(torchs),
            }
        for who, taken in times.items() if turn else ():
            found[who].append(taken)
    return found, speeds[1:]


def _seconds(function: Callable[[], object]) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
