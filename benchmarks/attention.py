"""How near the memory's limit is paged decode attention on a CPU, and does its time grow with the context alone?"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from rig import machine
from rig.report import RESULTS, Report, ratios, shares, spread
from torch.nn import functional

from bestiary_kernels import paged_attention
from bestiary_kernels.memory import lasting

COLUMNS = [
    "heads",
    "batch",
    "context",
    "µs, median (range)",
    "GB/s",
    "of the floor",
    "per token, to 1,024",
    "torch / this",
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
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=9)
    options.add_argument("--noisy", action="store_true", help="measure even though the machine is busy")
    given = options.parse_args()
    machine.require_quiet(given.noisy)
    torch.set_num_threads(machine.cores())
    report = Report(f"Paged decode attention, batch {BATCH}, bf16", COLUMNS)
    with machine.Memory(sys.executable, torch.get_num_threads()) as memory:
        for name, heads in HEADS.items():
            _measure(name, heads, given.rounds, memory, report)
    about = machine.describe()
    report.notes = [
        "Floor: keys and values once, at the bandwidth that a probe reads with right before and after each round.",
        f"Goal at contexts of 1,024 and more: {GOAL:.0%} of it, and no more than linear in the context.",
        "torch: scaled_dot_product_attention over keys and values of one length that lie side by side, which no cache "
        "of pages does for it.",
        f"{time.strftime('%Y-%m-%d')}, {about['cpu']}, {about['cores']} cores, {torch.get_num_threads()} threads, "
        f"load per core {machine.load():.2f}.",
    ]
    text = "\n".join([f"# {report.title}", "", report.table(), "", *(f"* {note}" for note in report.notes), ""])
    print(text)
    (RESULTS / "attention.md").write_text(text)
    (RESULTS / "attention.json").write_text(json.dumps(report.raw, indent=1) + "\n")


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
        found: dict[str, list[float]] = {"ours": [], "torch": []}
        layers = [layer.unbind(1) for layer in caches.unbind(1)]
        ours = [partial(paged_attention, q, *layer, tables, starts, lens, width**-0.5) for layer in layers]
        torchs = partial(functional.scaled_dot_product_attention, q[:, :, None], *flat, enable_gqa=True)
        speeds: list[float] = []
        for turn in range(rounds + 1):
            with memory.beside(speeds):
                times = {"ours": statistics.mean(map(_seconds, ours)), "torch": _seconds(torchs)}
            for who, taken in times.items() if turn else ():
                found[who].append(taken)
        seconds = statistics.median(found["ours"])
        size = 2 * BATCH * context * kv_heads * width * 2
        if context == 1024:
            base = seconds / context
        linear = f"{seconds / context / base:.2f}" if base else ""
        times_of = ratios(found["torch"], found["ours"])
        row = [
            name,
            str(BATCH),
            f"{context:,}",
            spread([s * 1e6 for s in found["ours"]], 0),
            f"{size / seconds / 1e9:.1f}",
        ]
        of_floor = [size / s / gb_s / 1e9 for s, gb_s in zip(found["ours"], speeds[1:], strict=True)]
        report.rows.append([*row, shares(of_floor), linear, f"{statistics.median(times_of):.1f}"])
        report.raw[f"{name} {context}"] = {**found, "memory, GB/s": speeds[1:]}
        print(report.rows[-1], flush=True)


def _seconds(function: Callable[[], object]) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
