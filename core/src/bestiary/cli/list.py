"""`bestiary list`: what is installed. Reads metadata and imports declarations, never a model or torch."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from bestiary import installed, registry
from bestiary.cli.options import AsJson
from bestiary.cli.terminal import columns, note, one_line, print_json
from bestiary.errors import PluginError

__all__ = ["command"]

_TITLES = ("architecture", "distribution", "version", "modalities", "tasks", "LoRA", "PP", "TP")
_CAPABILITIES = ("lora", "pipeline", "tensor")


@dataclass(frozen=True)
class _Row:
    """One architecture as one distribution serves it; of a broken plugin nothing more is known than its name."""

    architecture: str
    distribution: str
    version: str
    modalities: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    #: What the plugin says it can do.
    declares: Mapping[str, bool] | None = None
    problem: str | None = None

    def cells(self) -> tuple[str, ...]:
        """The table's cells, safe to print."""
        return (
            *map(one_line, (self.architecture, self.distribution, self.version)),
            one_line(" ".join(self.modalities)) if self.problem is None else "broken",
            one_line(" ".join(self.tasks)),
            *map(self._mark, _CAPABILITIES),
        )

    def _mark(self, capability: str) -> str:
        return "" if self.declares is None else "yes" if self.declares[capability] else "-"


def command(*, json: AsJson = False) -> None:
    """Print every installed architecture; what cannot be used stands below, with the reason."""
    found = registry.scan()
    rows = [_row(plugin) for plugins in found.values() for plugin in plugins]
    if json:
        print_json([asdict(row) for row in rows])
    elif rows:
        _print_table([row.cells() for row in rows])
    else:
        print("No plugin is installed. Each serves a family of models: pip install bestiary-<family>")
    for problem in [row.problem for row in rows if row.problem] + _conflicts(found) + _unread():
        note(f"\n{problem}")


def _row(plugin: registry.Installed) -> _Row:
    where = (plugin.name, plugin.distribution, plugin.version)
    try:
        declared = plugin.load()
    except PluginError as error:
        return _Row(*where, problem=str(error))
    declares = {capability: bool(getattr(declared, capability)) for capability in _CAPABILITIES}
    return _Row(
        *where,
        modalities=("text", *sorted(declared.modalities)),
        tasks=tuple(sorted(declared.tasks)),
        declares=declares,
    )


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    if sys.stdout.isatty():
        _print_to_terminal(rows)
    else:
        print(columns([_TITLES, *rows]))


def _print_to_terminal(rows: Sequence[Sequence[str]]) -> None:
    """A table that folds names and modalities where the terminal is narrow, and all cells in a narrower one."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console, table = Console(), Table(box=None, padding=(0, 2, 0, 0))
    for number, title in enumerate(_TITLES):
        table.add_column(title, overflow="fold", no_wrap=number not in (0, 1, 3) and console.width >= 60)
    for row in rows:
        table.add_row(*map(Text, row))  # not as they are: rich would read markup in them
    console.print(table)


def _conflicts(found: Mapping[str, Sequence[registry.Installed]]) -> list[str]:
    problems = []
    for architecture, plugins in found.items():
        if len(plugins) > 1:
            try:
                registry.find(architecture)
            except PluginError as error:
                problems.append(str(error))
    return problems


def _unread() -> list[str]:
    return [
        f"The metadata at {fault.where} could not be read: {fault.reason}. Install that distribution again."
        for fault in installed.unreadable()
    ]
