"""The result: a table on the screen, and the raw figures with everything about the run in results/NAME.json and .md."""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rig import machine
from rig.contender import Contender
from rig.model import Model

RESULTS = Path(__file__).resolve().parent.parent / "results"


class Report:
    """What one script found out. Made by `measured`, which fills in what was true before and after."""

    def __init__(self, title: str, columns: list[str]) -> None:
        self.title = title
        self.columns = columns
        self.rows: list[list[str]] = []
        self.notes: list[str] = []
        self.raw: dict[str, Any] = {}
        self.facts: dict[str, Any] = {}
        self.probe = machine.Probe(0.0, 0.0)

    def versions(self, contenders: list[Contender]) -> None:
        """Note each contender's versions."""
        self.facts.setdefault("versions", {}).update({c.entry.name: c.ready["versions"] for c in contenders})

    def table(self) -> str:
        """The rows as a markdown table."""
        lines = [self.columns, *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.columns))]
        text = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in lines]
        text.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
        return "\n".join(text)

    def markdown(self) -> str:
        """The table with what is needed to judge it."""
        facts, before, after = self.facts, self.facts["probe_before"], self.facts["probe_after"]
        about = facts["machine"]
        versions = "; ".join(
            f"{name}: {', '.join(f'{package} {number}' for package, number in found.items())}"
            for name, found in facts.get("versions", {}).items()
        )
        return "\n".join(
            [
                f"# {self.title}",
                "",
                self.table(),
                "",
                *(f"* {note}" for note in self.notes),
                f"* {facts['date']}, {facts['model']}, {facts['threads']} threads, {facts['pairs']} rounds.",
                f"* {about['cpu']}, {about['cores']} cores, {about['memory_gib']} GiB, {' '.join(about['flags'])}.",
                f"* Memory reads {before['read_gb_s']:.1f} GB/s before, {after['read_gb_s']:.1f} after; "
                f"load per core {facts['load_before']:.2f} before, {facts['load_after']:.2f} after"
                f"{'; **suspect**: ' + facts['suspect'] if facts['suspect'] else ''}.",
                f"* {versions}.",
                "",
            ]
        )


@contextmanager
def measured(options: argparse.Namespace, model: Model, title: str, columns: list[str]) -> Iterator[Report]:
    """Refuse a busy machine, probe before and after, then print and write what the block reported."""
    machine.require_quiet(options.noisy)
    report = Report(title, columns)
    load_before = machine.load()
    before = report.probe = machine.probe(options.python, options.threads)
    report.facts |= {
        "date": time.strftime("%Y-%m-%d %H:%M %Z"),
        "model": f"{model.folder.name} ({model.stored_bytes / 1e6:.0f} MB)",
        "machine": machine.describe(),
        "threads": options.threads,
        "pairs": options.pairs,
        "load_before": load_before,
        "probe_before": asdict(before),
    }
    yield report
    report.facts["load_after"] = machine.load()
    after = machine.probe(options.python, options.threads)
    report.facts["probe_after"] = asdict(after)
    doubts = ["the machine was busy at the start"] if load_before > machine.BUSY_PER_CORE else []
    doubts += ["the probes differ by more than a tenth"] if machine.drifted(before, after) else []
    doubts += ["fewer than five rounds"] if options.pairs < 5 else []
    report.facts["suspect"] = ", ".join(doubts)
    own = "" if "SmolLM2" in model.folder.name else f"-{model.folder.name}"
    _write(options.name or f"{Path(sys.argv[0]).stem}{own}", report, report.markdown())


def _write(name: str, report: Report, text: str) -> None:
    print(f"\n{text}")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text(text)
    rows = [dict(zip(report.columns, row, strict=True)) for row in report.rows]
    result = {"title": report.title, **report.facts, "notes": report.notes, "rows": rows, "raw": report.raw}
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")


def parser_alone(description: str | None, rounds: int) -> argparse.ArgumentParser:
    """The options of every script that measures in its own process."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--rounds", type=int, default=rounds)
    made.add_argument("--noisy", action="store_true", help="measure even though the machine is busy")
    made.add_argument("--name", help="name of the result's files (default: the script's)")
    return made


@contextmanager
def measured_alone(options: argparse.Namespace, title: str, columns: list[str]) -> Iterator[Report]:
    """As `measured`, for what a script measures in its own process: no model, and no contender but those in it."""
    machine.require_quiet(options.noisy)
    report = Report(title, columns)
    yield report
    about = machine.describe()
    report.notes.append(
        f"{time.strftime('%Y-%m-%d')}, {about['cpu']}, {about['cores']} cores, load per core {machine.load():.2f}."
    )
    text = "\n".join([f"# {report.title}", "", report.table(), "", *(f"* {note}" for note in report.notes), ""])
    _write(options.name or Path(sys.argv[0]).stem, report, text)


def spread(values: list[float], digits: int = 1) -> str:
    """The median and the range."""
    if not values:
        return "-"
    return f"{statistics.median(values):,.{digits}f} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def shares(values: list[float]) -> str:
    """The median and the range, in percent."""
    return f"{statistics.median(values):.0%} ({min(values):.0%} to {max(values):.0%})"


def ratios(ours: list[float], theirs: list[float]) -> list[float]:
    """Round by round, so that what slows a whole round slows both."""
    return [a / b for a, b in zip(ours, theirs, strict=True)]
