"""What the table is made of: a measured figure, what it is a share of, and the goal that it is held against."""

from dataclasses import dataclass

__all__ = ["Row"]


@dataclass
class Row:
    """One line. `share` is of what `of` names; `goal` is the least share, or the least value where there is none."""

    name: str
    value: float | None
    unit: str
    share: float | None = None
    of: str = ""
    goal: float | None = None
    #: The goal is not to be exceeded.
    is_ceiling: bool = False
    trouble: str = ""

    @property
    def is_met(self) -> bool | None:
        """Whether the goal is; None without one, or without a figure."""
        found = self.value if self.share is None else self.share
        if self.goal is None or found is None:
            return None
        return found <= self.goal if self.is_ceiling else found >= self.goal

    def cells(self) -> list[str]:
        """As the table shows it."""
        if self.trouble:
            return [self.name, f"failed: {self.trouble}", "", "", ""]
        value = f"{self.value:,.4g} {self.unit}" if self.value is not None else ""
        share = f"{self.share:.1%} of {self.of}" if self.share is not None else ""
        sign = "<=" if self.is_ceiling else ">="
        limit = self.goal if self.goal is not None else 0.0
        number = f"{limit:.0%}" if self.share is not None else f"{limit:g}"
        goal = "" if self.goal is None else f"{sign} {number}"
        met = {True: "yes", False: "NO", None: ""}[self.is_met]
        return [self.name, value, share, goal, met]
