"""The conformance kit: runs every check of every case of an architecture, and reports. Knows no architecture.

Three ways in: `bestiary verify NAME`, `pytest --bestiary-plugin NAME`, or a test class derived from `Conformance`.
"""

import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, ClassVar

from bestiary import registry
from bestiary.architecture import Architecture
from bestiary.errors import BestiaryError
from bestiary.testing.cases import Case
from bestiary.testing.report import Result

__all__ = ["Conformance", "Planned", "plan"]


@dataclass(frozen=True)
class Planned:
    """One check of one case, ready to run."""

    architecture: str
    level: str
    check: str
    case: str | None
    #: Where the engine computes; references always do on the CPU.
    device: str = "cpu"

    @property
    def id(self) -> str:
        """How reports and test runs call it."""
        return f"{self.level} {self.check}" + (f" [{self.case}]" if self.case else "")

    def run(self) -> Result:
        """Run it; whatever it raises is its result."""
        start = time.perf_counter()
        status, reason, seed = _run(self)
        plugin = registry.find(self.architecture)
        return Result(
            core=metadata.version("bestiary"),
            plugin=f"{plugin.distribution} {plugin.version}",
            architecture=self.architecture,
            level=self.level,
            check=self.check,
            case=self.case,
            status=status,
            reason=reason,
            seed=seed,
            seconds=round(time.perf_counter() - start, 3),
        )


def plan(name: str, device: str = "cpu") -> list[Planned]:
    """Everything that follows from an architecture's declaration and its cases. Raises PluginError where none loads."""
    cases = _cases(registry.find(name).load())
    checks = _checks()
    whole = [Planned(name, check.level, check.name, None, device) for check in checks if not check.of_case]
    # Case by case, since what a case needs is made once and let go with the next.
    of_cases = [check for check in checks if check.of_case]
    return whole + [Planned(name, check.level, check.name, case, device) for case in cases for check in of_cases]


def _checks() -> list[Any]:
    """All there are, in the order of the modules that hold them."""
    for module in ("checks", "invariants", "media_checks", "lora_checks"):
        import_module(f"bestiary.testing.{module}")
    found: list[Any] = import_module("bestiary.testing.checklist").CHECKS
    return found


def _cases(architecture: Architecture) -> dict[str, Case]:
    """By name. None where the plugin brings no proof, which the declaration's own check reports."""
    if architecture.proof is None:
        return {}
    found: tuple[Case, ...] = import_module(architecture.proof).CASES
    return {case.name: case for case in found}


@cache
def _root() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="bestiary-verify-")


@cache
def _fixture(name: str, case: str, device: str) -> Any:
    from bestiary.testing.fixture import Fixture

    _fixture.cache_clear()  # one case at a time: engines hold memory
    cases = _cases(registry.find(name).load())
    return Fixture(name, cases[case], Path(_root().name) / name / str(list(cases).index(case)), device)


def _run(planned: Planned) -> tuple[str, str, int | None]:
    from bestiary.testing.checklist import NotApplicable

    architecture = registry.find(planned.architecture).load()
    check = next(check for check in _checks() if check.name == planned.check)
    subject: Any = architecture
    try:
        if planned.case is not None:
            subject = _fixture(planned.architecture, planned.case, planned.device)
            if waiver := subject.case.without.get(planned.check):
                return "waived", f"{waiver.reason} ({waiver.link})", None
        check.run(subject)
    except NotApplicable as reason:
        return "not applicable", str(reason), None
    except (AssertionError, BestiaryError) as failure:
        return "failed", f"{failure} (to prove: {check.run.__doc__})", None
    except Exception as failure:
        return "failed", f"{type(failure).__name__}: {failure} (to prove: {check.run.__doc__})", None
    return "passed", "", None if planned.case is None else subject.seed


class Conformance:
    """Derive a test class from it and name the architecture: each check becomes a test."""

    architecture: ClassVar[str]

    def pytest_generate_tests(self, metafunc: Any) -> None:
        """One test for each check of each case."""
        if "planned" in metafunc.fixturenames:
            metafunc.parametrize("planned", list(_parameters(self.architecture, metafunc.config)))

    def test_conforms(self, planned: Planned) -> None:
        """The check holds; what does not apply or is waived is skipped with its reason."""
        import pytest

        result = planned.run()
        if result.status == "failed":
            pytest.fail(result.reason, pytrace=False)
        if result.status != "passed":
            pytest.skip(f"{result.status}: {result.reason}")


def _parameters(name: str, config: Any) -> Iterator[Any]:
    """The checks as parameters of a test; those of one case stay together where tests are spread over processes."""
    import pytest

    group = partial(pytest.mark.xdist_group) if config.pluginmanager.hasplugin("xdist") else None
    for planned in plan(name):
        marks = [group(f"{name} {planned.case}")] if group and planned.case else []
        yield pytest.param(planned, id=planned.id, marks=marks)
