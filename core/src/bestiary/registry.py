"""Which plugin serves an architecture: looked up by name in the metadata of what is installed, then loaded.

It knows nothing of models or checkpoints; the names come from config.json's `architectures`.
"""

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bestiary import installed
from bestiary.architecture import API, Architecture, Task
from bestiary.errors import (
    CapabilityMissing,
    PluginBroken,
    PluginIncompatible,
    PluginNotInstalled,
    UnknownArchitecture,
)

__all__ = ["GROUP", "Installed", "find", "known", "require", "resolve", "scan"]

#: The entry-point group in which plugins declare architectures.
GROUP = "bestiary.architectures"
#: The oldest contract whose plugins still run; the newest is `API`.
_OLDEST_API = 1


@dataclass(frozen=True)
class Installed(installed.Entry):
    """One architecture string, and the installed distribution that declares it."""

    def load(self) -> Architecture:
        """Import the declaration (not the model) and check it.

        Raises PluginIncompatible where it was written for another contract or a dependency does not fit, and
        PluginBroken where it fails to import or does not declare this architecture.
        """
        found = super().load()
        if not isinstance(found, Architecture):
            raise PluginBroken(
                f"{self.owner}: {self.value!r} is a {type(found).__name__}, not an Architecture. {self._mend()}"
            )
        if not _OLDEST_API <= found.api <= API:
            behind = "bestiary" if found.api > API else self.distribution
            raise PluginIncompatible(
                f"{self.owner} was written for version {found.api} of the plugin contract; this Bestiary has "
                f"version {API}. Run: pip install --upgrade {behind}"
            )
        if self.name not in (found.name, *found.aliases):
            names = ", ".join((found.name, *found.aliases))
            raise PluginBroken(f"{self.owner}: {self.value!r} declares {names}, and not {self.name}. {self._mend()}")
        return found


def scan() -> dict[str, list[Installed]]:
    """Everything installed, by architecture string; more than one entry under a name is a conflict. Imports nothing."""
    return {
        name: [Installed(**vars(entry)) for entry in entries] for name, entries in installed.declared(GROUP).items()
    }


def find(name: str, prefer: Mapping[str, str] | None = None) -> Installed:
    """The plugin that serves an architecture string. Imports nothing.

    `prefer` says which distribution serves a name that several claim; BESTIARY_PLUGIN does so where it is silent.
    Raises UnknownArchitecture, PluginNotInstalled or PluginConflict.
    """
    if candidates := installed.declared(GROUP).get(name):
        return Installed(**vars(installed.choose(candidates, prefer)))
    if kept_out := installed.excluded(GROUP, name):
        owners = ", ".join(entry.owner for entry in kept_out)
        raise PluginNotInstalled(
            f"{name} is served by {owners}, which BESTIARY_LOAD_PLUGINS keeps out. Add it there, or unset the variable."
        )
    if distribution := known().get(name):
        raise PluginNotInstalled(
            f"{name} is served by {distribution}, which is not installed. Run: pip install {distribution}{_unread()}"
        )
    raise UnknownArchitecture(
        f"No plugin is known for the architecture {name!r}.{_similar(name)} `bestiary list` shows what is installed; "
        f"an architecture that nobody serves yet can be added by a plugin of your own.{_unread()}"
    )


def resolve(names: Sequence[str], prefer: Mapping[str, str] | None = None) -> Architecture:
    """The declaration for a checkpoint: of config.json's `architectures`, the first that is installed.

    Raises what `find` and `Installed.load` raise; where none is installed, the error tells about every name.
    """
    missing: list[UnknownArchitecture | PluginNotInstalled] = []
    for name in names:
        try:
            plugin = find(name, prefer)
        except (UnknownArchitecture, PluginNotInstalled) as error:
            missing.append(error)
        else:
            return plugin.load()
    if not missing:
        raise UnknownArchitecture("config.json names no architecture: its key 'architectures' is missing or empty.")
    is_known = any(isinstance(error, PluginNotInstalled) for error in missing)
    kind = PluginNotInstalled if is_known else UnknownArchitecture
    raise kind("\n".join(map(str, missing)))


def require(
    architecture: Architecture,
    *,
    task: Task | None = None,
    modality: str | None = None,
    lora: bool = False,
    pipeline: bool = False,
    tensor: bool = False,
) -> None:
    """Check that an architecture declares what is asked of it. Raises CapabilityMissing, which names all it lacks."""
    has = architecture
    lacking = {
        f"the task {task}": task is not None and task not in has.tasks,
        f"{modality} input": modality is not None and modality not in has.modalities,
        "LoRA adapters": lora and not has.lora,
        "pipeline parallelism": pipeline and not has.pipeline,
        "tensor parallelism": tensor and not has.tensor,
    }
    if any(lacking.values()):
        raise CapabilityMissing(
            f"{has.name} does not support {', '.join(what for what, is_lacking in lacking.items() if is_lacking)}. "
            f"It supports {', '.join(_supported(has))}. Leave out what it lacks, or choose another model."
        )


def known() -> dict[str, str]:
    """The distribution for each architecture that Bestiary's own zoo plans, from the index that core ships."""
    text = Path(__file__).with_name("known.json").read_text(encoding="utf-8")
    index: dict[str, str] = json.loads(text)
    return index


def _supported(architecture: Architecture) -> list[str]:
    flags = {"LoRA": architecture.lora, "pipeline": architecture.pipeline, "tensor": architecture.tensor}
    return [
        "tasks " + " ".join(sorted(architecture.tasks)),
        "inputs " + " ".join(("text", *architecture.modalities)),
        *(name for name, is_supported in flags.items() if is_supported),
    ]


def _similar(name: str) -> str:
    """A suggestion for a name that may be misspelt."""
    names = difflib.get_close_matches(name, {*known(), *installed.declared(GROUP)}, n=3, cutoff=0.9)
    return f" Did you mean {' or '.join(names)}?" if names else ""


def _unread() -> str:
    """A note on distributions that could not be read, since one of them may be the one that is missed."""
    faults = installed.unreadable()
    return "".join(f" (The metadata at {fault.where} could not be read: {fault.reason}.)" for fault in faults)
