"""`bestiary verify`: prove that a plugin does what it declares. The checks are the conformance kit's."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from bestiary.architecture import Architecture
from bestiary.cli.terminal import note

if TYPE_CHECKING:
    from bestiary.testing.report import Result

__all__ = ["command"]

Names = Annotated[str, Parameter(help="Architectures, as config.json names them; none: all installed.")]
Json = Annotated[Path | None, Parameter(name="--json", help="Write every result to this file.")]
TableFile = Annotated[Path | None, Parameter(name="--table", help="Write a table of the architectures to this file.")]
Level = Annotated[
    tuple[Literal["L0", "L1", "L2", "L3"], ...], Parameter(negative=(), help="Only checks of this level. Repeatable.")
]
Checkpoints = Annotated[
    tuple[str, ...],
    Parameter(negative=(), help="Level L4 alone, on this real checkpoint: a folder, a hub's name or demo. Repeatable."),
]
DeviceName = Annotated[str, Parameter(help="Where engines compute, as cpu or cuda; references do on the CPU.")]


def command(
    *names: Names,
    json: Json = None,
    table: TableFile = None,
    level: Level = (),
    checkpoint: Checkpoints = (),
    device: DeviceName = "cpu",
) -> int:
    """Run the conformance kit, and end with status 1 where a check failed. Needs bestiary[testing]."""
    from rich.console import Console

    from bestiary import registry
    from bestiary.testing import report
    from bestiary.testing.conformance import plan

    console = Console(highlight=False)
    results: list[Result] = []
    for model in checkpoint:
        from bestiary.testing.real import prove

        own = prove(model)
        for result in own:
            console.print(f"{result.architecture}: L4 {model}: {result.status}, {result.reason}", markup=False)
        results += own
    everything = tuple(sorted({found.name for found in map(_declaration, sorted(registry.scan()))}))
    for name in names if checkpoint else names or everything:
        own = [planned.run() for planned in plan(name, device) if not level or planned.level in level]
        for result in own:
            if result.status == "failed":
                console.print(f"{name}: {result.level} {result.check} {result.case or ''}: failed", style="red")
                console.print(f"  {result.reason}", markup=False)
        passed = sum(result.status == "passed" for result in own)
        console.print(f"{name}: {passed} passed, {_others(own)}, {sum(result.seconds for result in own):.1f} s")
        results += own
    if json is not None:
        report.write(results, json)
    if table is not None:
        table.write_text(report.table(results), encoding="utf-8")
    failed = sum(result.status == "failed" for result in results)
    if failed:
        note(f"{failed} of {len(results)} checks failed")
    return int(failed > 0)


def _declaration(name: str) -> Architecture:
    from bestiary import registry

    return registry.find(name).load()


def _others(results: list[Result]) -> str:
    counts = Counter(result.status for result in results)
    return ", ".join(f"{counts[kind]} {kind}" for kind in ("failed", "waived", "not applicable"))
