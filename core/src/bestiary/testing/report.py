"""What the kit found, as data: conformance.json, and the table of architectures that is made of it."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

__all__ = ["Result", "table", "write"]

LEVELS = ("L0", "L1", "L2", "L3")


@dataclass(frozen=True)
class Result:
    """One check of one case."""

    core: str
    plugin: str
    architecture: str
    level: str
    check: str
    case: str | None
    #: passed, failed, waived or not applicable
    status: str
    reason: str
    #: Of the random weights that were used.
    seed: int | None
    seconds: float


def write(results: Iterable[Result], path: Path) -> None:
    """All results as JSON, one object each."""
    path.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n", encoding="utf-8")


def table(results: Sequence[Result]) -> str:
    """A Markdown table with a row for each architecture."""
    names = sorted({(result.architecture, result.plugin) for result in results})
    lines = [
        "# Architectures",
        "",
        "Made by `make conformance`; not written by hand. Each cell: checks that passed of those that apply.",
        "",
        f"| architecture | plugin | {' | '.join(LEVELS)} | waived |",
        f"|---|---|{'---|' * len(LEVELS)}---|",
    ]
    for name, plugin in names:
        own = [result for result in results if result.architecture == name]
        cells = [_cell(own, level) for level in LEVELS]
        waived = ", ".join(sorted({result.check for result in own if result.status == "waived"})) or "-"
        lines.append(f"| {name} | {plugin} | {' | '.join(cells)} | {waived} |")
    return "\n".join(lines) + "\n"


def _cell(results: Iterable[Result], level: str) -> str:
    counts = Counter(result.status for result in results if result.level == level)
    applied = counts["passed"] + counts["failed"]
    return f"{counts['passed']} of {applied}" if applied else "-"
