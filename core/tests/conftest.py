"""A folder on sys.path into which tests put distributions as an installer would leave them."""

import importlib
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

# Imported while the real sys.path is there: `install` takes it away.
import packaging.requirements
import packaging.version  # noqa: F401
import pytest

from bestiary import installed

Install = Callable[..., Path]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Install a made-up distribution; nothing but those and the standard library is on sys.path meanwhile."""
    site = tmp_path / "site"
    before = set(sys.modules)
    standard = [sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), *_extension_folders()]
    monkeypatch.setattr(sys, "path", [str(site), *standard])
    for variable in ("BESTIARY_LOAD_PLUGINS", "BESTIARY_PLUGIN"):
        monkeypatch.delenv(variable, raising=False)

    def install(
        name: str,
        version: str = "1.0",
        *,
        architectures: Mapping[str, str] | None = None,
        sources: Mapping[str, str] | None = None,
        files: Mapping[str, str] | None = None,
        requires: Sequence[str] = (),
        metadata: Mapping[str, str] | None = None,
        into: Path = site,
    ) -> Path:
        """Write modules (`files`), and the dist-info, whose files `metadata` may replace; returns the dist-info."""
        files = files or {}
        info = into / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        points = {"bestiary.architectures": architectures or {}, "bestiary": sources or {}}
        written = {
            "METADATA": "\n".join(
                ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
                + [f"Requires-Dist: {line}" for line in requires]
                + ["", "A long description.\n" * 50]
            ),
            "entry_points.txt": "".join(
                f"[{group}]\n" + "".join(f"{key} = {value}\n" for key, value in entries.items())
                for group, entries in points.items()
                if entries
            ),
            "INSTALLER": "pip\n",
            "RECORD": "".join(f"{file},,\n" for file in (*files, f"{info.name}/METADATA", f"{info.name}/RECORD")),
            **(metadata or {}),
        }
        for place, text in {**files, **{f"{info.name}/{key}": text for key, text in written.items()}}.items():
            (into / place).parent.mkdir(parents=True, exist_ok=True)
            (into / place).write_text(text, encoding="utf-8")
        installed.refresh()
        return info

    installed.refresh()
    yield install
    for module in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[module], "__file__", None)):
            del sys.modules[module]
    monkeypatch.undo()
    installed.refresh()
    importlib.invalidate_caches()


def _extension_folders() -> list[str]:
    return [folder for folder in sys.path if folder.endswith("lib-dynload")]
