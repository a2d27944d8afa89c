"""Run all of it: prints one table, writes results/gpu.json and gpu.md beside it. `make gpu` comes here."""

import argparse
import json
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

import torch

from gpu import attention, peer, serving
from gpu.device import Device
from gpu.rows import Row

RESULTS = Path(__file__).resolve().parents[1] / "results"
HEADS = ["what", "measured", "share", "goal", "met"]


def main() -> None:
    """A part that fails is a row that says so; the others are measured all the same."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--device", default="cuda")
    options.add_argument("--tiny", action="store_true", help="try the script itself, on any device; writes nothing")
    given = options.parse_args()
    begin = time.perf_counter()
    device = Device(torch.device(given.device), given.tiny)
    device.measure()
    found: list[Row] = [
        Row("copy", device.bandwidth / 1e9, "GB/s"),
        Row("matmul, bf16", device.flops / 1e12, "TFLOP/s"),
    ]
    throughput: dict[int, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        shape = serving.Shape(device, Path(folder) / "8b")
        parts: dict[str, Callable[[], Iterable[Row]]] = {
            "attention": lambda: attention.rows(device),
            "serving": lambda: serving.rows(shape, throughput),
            "adapters": lambda: serving.lora_rows(shape),
            "transformers": lambda: peer.rows(shape, throughput),
        }
        for part, rows in parts.items():
            _take(found, part, rows)
            facts = _facts(device) | {"seconds": str(round(time.perf_counter() - begin))}
            if not given.tiny:  # what is there is kept if the next part never ends
                _write(found, facts)
    print(_table([HEADS, *(row.cells() for row in found)]))
    print(json.dumps(facts))
    sys.exit(any(row.trouble for row in found))


def _write(found: list[Row], facts: dict[str, str]) -> None:
    rows = [asdict(row) | {"met": row.is_met} for row in found]
    (RESULTS / "gpu.json").write_text(json.dumps(facts | {"rows": rows}, indent=1) + "\n")
    told = ", ".join(f"{name} {value}" for name, value in facts.items())
    table = _table([HEADS, *(row.cells() for row in found)])
    (RESULTS / "gpu.md").write_text(f"# On a GPU\n\n{table}\n\n* {told}.\n")


def _take(found: list[Row], part: str, rows: Callable[[], Iterable[Row]]) -> None:
    begin = time.perf_counter()
    try:
        for row in rows():
            found.append(row)
            print(" | ".join(row.cells()), flush=True)
    except Exception as error:
        traceback.print_exc()
        found.append(Row(part, None, "", trouble=f"{type(error).__name__}: {error}"[:200]))
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    print(f"{part}: {time.perf_counter() - begin:.0f} s", flush=True)


def _facts(device: Device) -> dict[str, str]:
    name = torch.cuda.get_device_name() if device.kind.type == "cuda" else platform.processor()
    known = {"device": name, "date": time.strftime("%Y-%m-%d"), "python": platform.python_version()}
    for package in ("torch", "triton", "transformers", "bestiary", "bestiary-kernels"):
        try:
            known[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            known[package] = "not installed"
    return known


def _table(rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    padded = ([cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows)
    lines = [f"| {' | '.join(row)} |" for row in padded]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


if __name__ == "__main__":
    main()
