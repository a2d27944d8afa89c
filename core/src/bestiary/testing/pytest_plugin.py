"""`pytest --bestiary-plugin NAME`: the conformance kit of an installed architecture, without a line of code.

Loaded into every pytest run where core is installed: it imports nothing until the option is given.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from bestiary.testing.conformance import Planned

__all__ = ["pytest_addoption", "pytest_collection_modifyitems"]


def pytest_addoption(parser: pytest.Parser) -> None:
    """The option."""
    parser.addoption(
        "--bestiary-plugin",
        action="append",
        default=[],
        metavar="NAME",
        help="run the conformance kit of this installed architecture; may be repeated",
    )


def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    """The kit's checks, beside whatever tests there are."""
    for name in config.getoption("--bestiary-plugin"):
        from bestiary.testing.conformance import plan

        items.extend(_Item.from_parent(session, name=f"{name} {planned.id}", planned=planned) for planned in plan(name))


class _Item(pytest.Item):
    def __init__(self, *, planned: Planned, **rest: object) -> None:
        super().__init__(**rest)  # type: ignore[arg-type]
        self._planned = planned

    def runtest(self) -> None:
        result = self._planned.run()
        if result.status == "failed":
            pytest.fail(result.reason, pytrace=False)
        if result.status != "passed":
            pytest.skip(f"{result.status}: {result.reason}")

    def reportinfo(self) -> tuple[str, int, str]:
        return "bestiary", 0, self.name
