"""The list of all checks of the conformance kit, which the modules of checks add to. Knows none of them."""

from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["CHECKS", "Check", "NotApplicable", "check", "require"]


class NotApplicable(Exception):
    """There is nothing to check here, and why."""


@dataclass(frozen=True)
class Check:
    """One check. `of_case` is False for those that concern the plugin, and not one of its cases."""

    level: str
    name: str
    run: Callable[..., None]
    of_case: bool


CHECKS: list[Check] = []


def check(level: str, *, of_case: bool = True) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Put a function on the list; its docstring says what it proves, which reports of failures repeat."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        CHECKS.append(Check(level, function.__name__.removeprefix("_"), function, of_case))
        return function

    return register


def require(holds: bool, what: str) -> None:
    """Raise AssertionError, that says what is wrong, unless something holds."""
    if not holds:
        raise AssertionError(what)
