"""Model sources: addressed by name, loaded alone, checked against their specification."""

import inspect
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bestiary import hooks
from bestiary.errors import CheckpointNotFound, PluginBroken, PluginConflict, PluginIncompatible, PluginNotInstalled

Install = Callable[..., Path]

#: Answers with what it was asked, so that a test sees every argument arrive.
STABLE = """
from pathlib import Path
from bestiary.hooks import hookimpl

@hookimpl
def bestiary_fetch(reference: str, revision: str | None, cache: Path) -> Path | None:
    return None if reference == "unicorn" else cache / reference / str(revision)
"""


def stable(install: Install, text: str = STABLE, distribution: str = "acme-stable", **given: object) -> Path:
    module = distribution.replace("-", "_")
    return install(distribution, sources={"stable": module}, files={f"{module}.py": text}, **given)


def test_a_source_is_asked_with_the_callers_arguments(install: Install, tmp_path: Path) -> None:
    stable(install)
    assert hooks.source("stable").fetch("horse", "v2", tmp_path) == tmp_path / "horse" / "v2"
    assert hooks.source("stable").fetch("horse", None, tmp_path) == tmp_path / "horse" / "None"


def test_a_source_may_be_an_object_in_a_module_and_take_fewer_arguments(install: Install, tmp_path: Path) -> None:
    text = """
from bestiary.hooks import hookimpl
class Stable:
    @hookimpl
    def bestiary_fetch(self, reference, cache):
        return cache / reference
STABLE = Stable()
"""
    install("acme-stable", sources={"stable": "acme:STABLE"}, files={"acme.py": text})
    assert hooks.source("stable").fetch("horse", "v2", tmp_path) == tmp_path / "horse"


def test_only_the_source_in_use_is_imported(install: Install) -> None:
    stable(install)
    install("acme-barn", sources={"barn": "barn"}, files={"barn.py": "raise SystemExit"})
    assert hooks.source("stable").entry.distribution == "acme-stable"
    assert "barn" not in sys.modules


def test_the_names_of_sources_are_listed_without_importing(install: Install) -> None:
    stable(install, "raise SystemExit")
    install("acme-barn", sources={"barn": "barn"}, architectures={"Cow": "barn:COW"})
    assert hooks.sources() == ["barn", "stable"]


def test_a_model_that_the_source_does_not_have_is_told(install: Install, tmp_path: Path) -> None:
    stable(install)
    with pytest.raises(CheckpointNotFound, match=r"stable has no model 'unicorn'\."):
        hooks.source("stable").fetch("unicorn", None, tmp_path)
    with pytest.raises(CheckpointNotFound, match=r"stable has no model 'unicorn' at revision v2\."):
        hooks.source("stable").fetch("unicorn", "v2", tmp_path)


def test_a_sources_own_error_reaches_the_caller(install: Install, tmp_path: Path) -> None:
    stable(
        install,
        """
from bestiary.errors import CheckpointNotFound
from bestiary.hooks import hookimpl
@hookimpl
def bestiary_fetch(reference):
    raise CheckpointNotFound(f"{reference}: log in first")
""",
    )
    with pytest.raises(CheckpointNotFound, match=r"^horse: log in first$"):
        hooks.source("stable").fetch("horse", None, tmp_path)


def test_an_unknown_source_is_answered_with_those_there_are(install: Install) -> None:
    with pytest.raises(PluginNotInstalled, match=r"'stabel'; there are: none\."):
        hooks.source("stabel")
    stable(install)
    install("acme-barn", sources={"barn": "barn"})
    with pytest.raises(PluginNotInstalled, match=r"'stabel'; there are: barn, stable\."):
        hooks.source("stabel")


def test_a_source_that_fails_to_import_carries_its_cause(install: Install) -> None:
    stable(install, "1 / 0")
    with pytest.raises(PluginBroken, match=r"acme-stable 1\.0.*stable = 'acme_stable'.*ZeroDivisionError") as caught:
        hooks.source("stable")
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_source_whose_dependency_does_not_fit_is_refused(install: Install) -> None:
    install("hay", "1.0")
    stable(install, requires=["hay>=2"])
    with pytest.raises(PluginIncompatible, match=r"acme-stable 1\.0 needs hay>=2, and hay 1\.0 is installed"):
        hooks.source("stable")


def test_a_signature_that_does_not_fit_is_told_with_the_argument(install: Install) -> None:
    stable(install, STABLE.replace("revision", "branch"))
    with pytest.raises(
        PluginBroken, match=r"acme-stable 1\.0: the model source stable does not fit[\s\S]*branch"
    ) as caught:
        hooks.source("stable")
    assert caught.value.__cause__ is not None


def test_a_hook_that_nobody_calls_is_told(install: Install) -> None:
    stable(install, STABLE + "\n@hookimpl\ndef bestiary_gallop():\n    pass\n")
    with pytest.raises(PluginBroken, match=r"does not fit its specification[\s\S]*bestiary_gallop"):
        hooks.source("stable")


@pytest.mark.parametrize("text", ["", STABLE.replace("@hookimpl", "")])
def test_a_source_without_the_hook_is_told(install: Install, text: str) -> None:
    stable(install, text)
    with pytest.raises(
        PluginBroken, match=r"acme-stable 1\.0: .*stable \(acme_stable\) has no hookimpl bestiary_fetch"
    ):
        hooks.source("stable")


def test_two_distributions_with_one_source_name_are_settled_by_a_preference(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    stable(install)
    stable(install, distribution="other-stable")
    with pytest.raises(PluginConflict, match=r"stable is claimed by acme-stable 1\.0, other-stable 1\.0"):
        hooks.source("stable")
    assert hooks.source("stable", {"stable": "other-stable"}).entry.distribution == "other-stable"
    monkeypatch.setenv("BESTIARY_PLUGIN", "stable=acme-stable")
    assert hooks.source("stable").entry.distribution == "acme-stable"


def test_the_switch_turns_sources_of_plugins_off_and_bestiarys_own_never(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    stable(install)
    install("bestiary", sources={"hf": "nothing"})
    monkeypatch.setenv("BESTIARY_LOAD_PLUGINS", "")
    assert hooks.sources() == ["hf"]


def test_every_specification_says_what_an_implementation_must_do() -> None:
    assert "None means" in (inspect.getdoc(hooks.ModelSource.bestiary_fetch) or "")
