"""Hook specifications (pluggy) for what is not an architecture, and how the one that is in use gets loaded.

A distribution offers an implementation under a name of its own, as an entry point of the group `bestiary`. It is
addressed by that name, and none but the one in use is imported. What can be extended today is where models come from;
quantisation methods, attention backends, executors and metrics sinks get their specification together with the code
that calls it, so that none stands here without a caller.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pluggy

from bestiary import installed
from bestiary.errors import CheckpointNotFound, PluginBroken, PluginNotInstalled

__all__ = ["GROUP", "ModelSource", "Source", "hookimpl", "hookspec", "source", "sources"]

#: The entry-point group; a name in it is what stands before the colon of a model reference.
GROUP = "bestiary"

hookspec = pluggy.HookspecMarker("bestiary")
hookimpl = pluggy.HookimplMarker("bestiary")


class ModelSource:
    """What a model source implements, as functions of a module that are marked with `hookimpl`."""

    @hookspec(firstresult=True)
    def bestiary_fetch(self, reference: str, revision: str | None, cache: Path) -> Path | None:
        """Bring a model to this machine and return its folder, in which config.json stands.

        `reference` is the model's name at this source, without the source's own name. `revision` is a branch, tag or
        commit; None is the source's default. Files go under `cache`, or where the source's own client keeps them; what
        is there already is not fetched again. None means that there is no such model here; raise CheckpointNotFound
        instead where more can be said, such as a missing token, and say what the user can do.
        """


@dataclass(frozen=True)
class Source:
    """One model source, loaded."""

    entry: installed.Entry
    hooks: pluggy.HookRelay

    def fetch(self, reference: str, revision: str | None, cache: Path) -> Path:
        """The folder of a model, as `ModelSource.bestiary_fetch` says. Raises CheckpointNotFound where it has none."""
        folder: Path | None = self.hooks.bestiary_fetch(reference=reference, revision=revision, cache=cache)
        if folder is None:
            at = f" at revision {revision}" if revision else ""
            raise CheckpointNotFound(f"{self.entry.name} has no model {reference!r}{at}. Check its spelling there.")
        return folder


def sources() -> list[str]:
    """The names of the installed model sources. Imports none of them."""
    return list(installed.declared(GROUP))


def source(name: str, prefer: Mapping[str, str] | None = None) -> Source:
    """Load the model source of this name, and no other.

    Raises PluginNotInstalled for a name that nobody offers, PluginConflict where several do and `prefer` or
    BESTIARY_PLUGIN does not choose, and PluginBroken where it fails to import or does not fit `ModelSource`.
    """
    candidates = installed.declared(GROUP).get(name)
    if not candidates:
        raise PluginNotInstalled(
            f"No installed distribution offers the model source {name!r}; there are: {', '.join(sources()) or 'none'}. "
            f"Install the distribution that offers it, or give a folder."
        )
    entry = installed.choose(candidates, prefer)
    manager = pluggy.PluginManager("bestiary")
    manager.add_hookspecs(ModelSource)
    implementation = entry.load()
    try:
        manager.register(implementation, name)
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        raise PluginBroken(f"{entry.owner}: the model source {name} does not fit its specification: {error}") from error
    if not manager.hook.bestiary_fetch.get_hookimpls():
        raise PluginBroken(f"{entry.owner}: the model source {name} ({entry.value}) has no hookimpl bestiary_fetch.")
    return Source(entry, manager.hook)
