"""What installed distributions declare for Bestiary, read from their metadata; only `Entry.load` imports anything.

It knows entry points and distributions, and nothing of architectures or hooks.
"""

import csv
import functools
import importlib
import itertools
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from email.message import Message
from email.parser import HeaderParser
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

import importlib_metadata

from bestiary.errors import PluginBroken, PluginConflict, PluginIncompatible, PluginNotInstalled, SettingError

if TYPE_CHECKING:
    from importlib_metadata import IDistribution
    from packaging.requirements import Requirement

__all__ = ["Entry", "Unreadable", "choose", "declared", "excluded", "preferences", "refresh", "unreadable"]

#: The distribution whose own entry points are no plugins, so that no switch turns them off.
_CORE = "bestiary"


@dataclass(frozen=True)
class Entry:
    """One entry point, and the distribution that declares it. It is plain data: nothing is imported before `load`."""

    group: str
    name: str
    #: What the entry point refers to: `module` or `module:attribute`.
    value: str
    distribution: str
    version: str

    @property
    def owner(self) -> str:
        """The distribution and its version, as errors write them."""
        return f"{self.distribution} {self.version}"

    def load(self) -> object:
        """Import the module and return what the entry point refers to.

        Raises PluginIncompatible where an installed dependency has a version that the distribution does not accept, and
        PluginBroken where the import fails, the attribute is missing, or the module is not the distribution's own.
        """
        self._check_dependencies()
        name, _, attribute = (part.strip() for part in self.value.partition("[")[0].partition(":"))
        module = self._attempt(importlib.import_module, name)
        if _is_foreign(module, self.distribution):
            raise PluginBroken(
                f"{self.owner}: {self.name} = {self.value!r} was imported from {module.__file__}, which is not a file "
                f"of {self.distribution}. Remove what hides it on sys.path, or install {self.distribution} again."
            )
        return self._attempt(functools.reduce, getattr, filter(None, attribute.split(".")), module)

    def _check_dependencies(self) -> None:
        for requirement, version in _dependencies(self.distribution):
            if version and not requirement.specifier.contains(version, prereleases=True):
                wanted = f"{requirement.name}{requirement.specifier}"
                raise PluginIncompatible(
                    f"{self.owner} needs {wanted}, and {requirement.name} {version} is installed. "
                    f"Run: pip install --upgrade {self.distribution} '{wanted}'"
                )

    def _attempt(self, step: Callable[..., Any], *given: Any) -> Any:
        try:
            return step(*given)
        # SystemExit too: a plugin that exits on import must not take the program along.
        except (Exception, SystemExit) as error:
            absent = [str(requirement) for requirement, version in _dependencies(self.distribution) if version is None]
            remedy = f"It requires what is not installed: {', '.join(absent)}." if absent else self._mend()
            raise PluginBroken(
                f"{self.owner}: loading {self.name} = {self.value!r} failed with {type(error).__name__}: {error}. "
                f"{remedy}"
            ) from error

    def _mend(self) -> str:
        return f"Run: pip install --upgrade --force-reinstall {self.distribution}; or tell its author."


@dataclass(frozen=True)
class Unreadable:
    """A distribution whose metadata could not be read, so that what it offers is not known."""

    where: str
    reason: str


def declared(group: str) -> dict[str, list[Entry]]:
    """The entry points of a group by name, in the order of their names; imports none.

    The environment variable BESTIARY_LOAD_PLUGINS leaves only the distributions it lists, and none where it is empty;
    what Bestiary itself declares always stays. Metadata is read once per process and sys.path: see `refresh`.
    """
    is_on = _switch()
    found: dict[str, list[Entry]] = {}
    for entry in _read(tuple(sys.path))[0]:
        if entry.group == group and is_on(entry):
            found.setdefault(entry.name, []).append(entry)
    return found


def excluded(group: str, name: str) -> list[Entry]:
    """The entry points of this name that BESTIARY_LOAD_PLUGINS keeps out."""
    is_on = _switch()
    entries = _read(tuple(sys.path))[0]
    return [entry for entry in entries if (entry.group, entry.name) == (group, name) and not is_on(entry)]


def unreadable() -> tuple[Unreadable, ...]:
    """The distributions whose metadata could not be read; they never keep the others from being found."""
    return _read(tuple(sys.path))[1]


def refresh() -> None:
    """Forget what was read, after distributions were installed or removed while this process runs."""
    _read.cache_clear()
    _version.cache_clear()
    importlib.invalidate_caches()


def preferences(text: str) -> dict[str, str]:
    """The distribution preferred for each name, from `NAME=DIST,NAME2=DIST2`. Raises SettingError for other text."""
    chosen = {}
    for item in filter(None, map(str.strip, text.split(","))):
        name, _, distribution = map(str.strip, item.partition("="))
        if not name or not distribution or "=" in distribution:
            raise SettingError(f"{item!r} does not choose a plugin: write NAME=DISTRIBUTION, with commas between")
        chosen[name] = distribution
    return chosen


_E = TypeVar("_E", bound=Entry)


def choose(candidates: Sequence[_E], prefer: Mapping[str, str] | None = None) -> _E:
    """The one entry among those of one name: the only one, or the one that is preferred.

    `prefer` maps names to distributions; the environment variable BESTIARY_PLUGIN does so for names that are not in it.
    Raises PluginConflict where several claim the name and none is preferred, and PluginNotInstalled where the preferred
    distribution does not offer it.
    """
    name = candidates[0].name
    wanted = {**preferences(os.environ.get("BESTIARY_PLUGIN", "")), **(prefer or {})}.get(name)
    owners = ", ".join(entry.owner for entry in candidates)
    if wanted is not None:
        for entry in candidates:
            if _canonical(entry.distribution) == _canonical(wanted):
                return entry
        raise PluginNotInstalled(f"{wanted} was chosen for {name}, but it does not offer it here; {owners} does.")
    if len(candidates) > 1:
        raise PluginConflict(
            f"{name} is claimed by {owners}. Choose one: --plugin {name}={candidates[0].distribution}, "
            f"or BESTIARY_PLUGIN={name}={candidates[0].distribution}."
        )
    return candidates[0]


@functools.lru_cache(maxsize=4)
def _read(path: tuple[str, ...]) -> tuple[tuple[Entry, ...], tuple[Unreadable, ...]]:
    """What is declared on this sys.path (an argument only to be the cache's key), and what could not be read."""
    found: dict[str, list[Entry]] = {}
    faults: list[Unreadable] = []
    for distribution in importlib_metadata.distributions():
        try:
            # Parsing metadata is slow, and most distributions are none of ours: look for the word first.
            if _CORE not in (distribution.read_text("entry_points.txt") or ""):
                continue
            name, _ = _identity(distribution)
            # The same distribution may stand on sys.path twice; the first one counts, as it does for an import.
            if _canonical(name) not in found:
                found[_canonical(name)] = _entries(importlib_metadata.distribution(name))
        except Exception as error:  # Whatever is wrong with one distribution, the others are found.
            # `_path` is private, and the one thing that tells which folder is to be mended.
            faults.append(Unreadable(str(getattr(distribution, "_path", "?")), f"{type(error).__name__}: {error}"))
    entries = itertools.chain.from_iterable(found.values())
    return tuple(sorted(entries, key=lambda entry: (entry.name, entry.distribution))), tuple(faults)


def _entries(distribution: "IDistribution") -> list[Entry]:
    name, version = _identity(distribution)
    points = [p for p in distribution.entry_points if p.group == _CORE or p.group.startswith(f"{_CORE}.")]
    return [Entry(p.group, p.name, p.value, name, version) for p in points]


def _switch() -> Callable[[Entry], bool]:
    """Whether BESTIARY_LOAD_PLUGINS lets an entry be seen."""
    listed = os.environ.get("BESTIARY_LOAD_PLUGINS")
    if listed is None:
        return lambda entry: True
    allowed = {_CORE, *map(_canonical, listed.split(","))}
    return lambda entry: _canonical(entry.distribution) in allowed


def _canonical(name: str) -> str:
    """A distribution's name as the package index compares it."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def _headers(distribution: "IDistribution") -> Message:
    """The metadata's fields. Only they are parsed: the long text below them is most of the file."""
    text = distribution.read_text("METADATA") or distribution.read_text("PKG-INFO") or ""
    return HeaderParser().parsestr(text.partition("\n\n")[0])


def _identity(distribution: "IDistribution") -> tuple[str, str]:
    """Name and version. Raises ValueError where the metadata lacks one."""
    headers = _headers(distribution)
    name, version = headers["Name"], headers["Version"]
    if not name or not version:
        raise ValueError("its metadata lacks a name or a version")
    return str(name), str(version)


@functools.lru_cache(maxsize=256)
def _version(name: str, path: tuple[str, ...]) -> str | None:
    """The installed version of a distribution, None where it is not installed; every plugin asks for the same few."""
    try:
        return _identity(importlib_metadata.distribution(name))[1]
    except importlib_metadata.PackageNotFoundError:
        return None


def _dependencies(name: str) -> "Iterator[tuple[Requirement, str | None]]":
    """What a distribution requires here, without extras, each with the version installed; None: not installed.

    What is missing is left for the import to show: a package may come under another distribution's name.
    """
    from packaging.requirements import Requirement  # 50 ms, and no look-up needs it
    from packaging.version import Version

    for line in _headers(importlib_metadata.distribution(name)).get_all("Requires-Dist", []):
        try:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                version = _version(requirement.name, tuple(sys.path))
                yield requirement, None if version is None else str(Version(version))
        except ValueError as error:  # packaging's InvalidRequirement and InvalidVersion, and _identity's
            raise PluginBroken(
                f"{name}: its requirement {line!r} cannot be checked: {error}. "
                f"Run: pip install --upgrade --force-reinstall {name}; or tell its author."
            ) from error


def _is_foreign(module: ModuleType, name: str) -> bool:
    """Whether the distribution lists its files, is no editable install, and does not list this module's."""
    distribution = importlib_metadata.distribution(name)
    record = distribution.read_text("RECORD")
    file = getattr(module, "__file__", None)
    if not record or not file or re.search(r'"editable"\s*:\s*true', distribution.read_text("direct_url.json") or ""):
        return False
    rows = [row[0] for row in csv.reader(record.splitlines()) if row]
    # Resolved, since an installer may link files; only those of the same base name, since a record can be long.
    near = {Path(str(distribution.locate_file(row))).resolve() for row in rows if Path(row).name == Path(file).name}
    return Path(file).resolve() not in near
