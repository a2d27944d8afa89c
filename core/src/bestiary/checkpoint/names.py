"""Names: one table from a checkpoint's tensor names to places in the model's tree. Knows neither files nor modules.

The same table serves weights, adapters and quantised formats, because a row names a module and its tensors follow.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bestiary.checkpoint.operations import Cut, Fused, Operation, Stacked, View
from bestiary.errors import PluginBroken, TensorMismatch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Names", "Target"]

#: A row as a plugin writes it: source, destination, operations.
Row = tuple[str, str | None, *tuple[Operation, ...]]

_SOURCE = re.compile(r"(\*|[^.*]+)(\.(\*|[^.*]+))*")
_DESTINATION = re.compile(r"(?P<path>(\*|\w+)(\.(\*|\w+))*)(\[(?P<part>\w+)\])?(:(?P<suffix>\w+))?")


@dataclass(frozen=True)
class Target:
    """Where one tensor of a checkpoint goes, and what happens to it on the way."""

    #: The module's path in the tree; None: the checkpoint carries it, the model does not want it.
    path: str | None
    #: The part of a fused matrix; None where the module has one part only, or `cut` says which.
    part: str | None
    #: Which of the module's tensors: weight, bias, a scale.
    suffix: str
    #: The number in a stack of experts.
    index: int | None
    view: View | None
    cut: Cut | None
    #: The tensor holds the whole stack of experts.
    stacked: bool = False

    def indices(self, module: Fused) -> Iterable[int | None]:
        """The numbers in a stack that the tensor brings; None for a module that is no stack."""
        return range(module.stack) if self.stacked else (self.index,)

    def parts(self, module: Fused) -> tuple[str, ...]:
        """The parts of the module at `path` that the tensor brings.

        Raises PluginBroken where the module has no such part, or has several and the row does not say which.
        """
        if self.cut is None and self.part is None and len(module.parts) > 1:
            raise PluginBroken(
                f"a row of NAMES leads to {self.path} without a [part], Split or Interleaved; "
                f"it has the parts {', '.join(module.parts)}"
            )
        parts = self.cut.parts if self.cut else tuple(module.parts) if self.part is None else (self.part,)
        if unknown := [part for part in parts if part not in module.parts]:
            raise PluginBroken(
                f"a row of NAMES leads to the part {unknown[0]!r} of {self.path}; it has {', '.join(module.parts)}"
            )
        return parts

    def pieces(self, tensor: Tensor, module: Fused) -> Iterator[tuple[str, Tensor, int | None]]:
        """Yield (part, its rows, number in a stack) of a tensor as the checkpoint stores it.

        Raises TensorMismatch where it has others.
        """
        if self.stacked and (not tensor.ndim or tensor.shape[0] != module.stack):
            raise TensorMismatch(
                f"its shape is {tuple(tensor.shape)}, and the model stacks {module.stack} experts here"
            )
        for index in self.indices(module):
            matrix = tensor[index] if self.stacked else tensor
            for part, piece in self.rows(self.view.apply(matrix) if self.view else matrix, module):
                yield part, piece, index

    def rows(self, tensor: Tensor, module: Fused) -> Iterator[tuple[str, Tensor]]:
        """Yield (part, its rows) of a tensor whose rows are the module's output features, as an adapter's B is."""
        if self.cut is None:
            return ((part, tensor) for part in self.parts(module))
        return self.cut.pieces(tensor, module)


class Names:
    """Rows of (checkpoint name, place in the tree, operations), from which a tensor's place is looked up.

    A source names a module, whose weight, bias and scales follow, or one whole tensor. `*` stands for a number between
    dots. A destination is a path, perhaps with the `[part]` of a fused matrix, perhaps (for a whole tensor that is not
    the weight) with `:suffix`; None drops the tensor. The numbers fill the destination's stars from the left, and one
    that is left over is the index in a stack of experts. Where rows overlap, the one with fewer stars holds; of two
    with one source, the later.

        Names(
            ("model.embed_tokens",                "embed"),
            ("model.layers.*.attn.q_proj",        "layers.*.mixer.qkv[q]"),
            ("model.layers.*.attn.c_attn",        "layers.*.mixer.qkv", Transpose(), Split("q", "k", "v")),
            ("model.layers.*.attn.in_proj_bias",  "layers.*.mixer.qkv:bias", Split("q", "k", "v")),
            ("model.layers.*.experts.*.w1",       "layers.*.ffn.experts.gate_up[gate]"),
            ("model.layers.*.rotary.inv_freq",    None),
        )

    Raises PluginBroken for a row that cannot mean anything.
    """

    def __init__(self, *rows: Row) -> None:
        self._written = {row[0]: row for row in rows}
        self._rows = [_parse(*row) for row in self._written.values()]
        self._index = _index(self._rows)

    def __add__(self, other: Names) -> Names:
        """Both tables; where both have a row for one source, `other`'s."""
        return Names(*self._written.values(), *other._written.values())

    def optional(self, prefix: str) -> Names:
        """This table, that also finds names without `prefix`, as files saved from a bare model have them.

        Raises PluginBroken where no source begins with it.
        """
        rows = self._written.values()
        bare: list[Row] = [(row[0].removeprefix(prefix), *row[1:]) for row in rows if row[0].startswith(prefix)]
        if not bare:
            raise PluginBroken(f"optional({prefix!r}): no row of this table of names begins with it")
        return Names(*bare, *rows)

    def under(self, source: str, path: str) -> Names:
        """This table for a part of a larger model: each source behind the prefix `source`, each place behind `path`.

        Both are empty or end in a dot; their stars come before those of the rows. Raises PluginBroken for others.
        """
        for prefix in (source, path):
            if prefix and not prefix.endswith("."):
                raise PluginBroken(f"under({source!r}, {path!r}): a prefix is empty or ends in a dot")
        return Names(
            *((source + row[0], None if row[1] is None else path + row[1], *row[2:]) for row in self._written.values())
        )

    def behind(self, prefix: str, other: str) -> Names:
        """This table with `other` in the place of the prefix of each source that has it; the others as they are."""
        moved = (
            (other + row[0][len(prefix) :] if row[0].startswith(prefix) else row[0]) for row in self._written.values()
        )
        return Names(*((source, *row[1:]) for source, row in zip(moved, self._written.values(), strict=True)))

    def find(self, name: str) -> Target | None:
        """The place of a tensor of the checkpoint, or None where no row speaks of it."""
        if "*" in name:  # a tensor's name is no pattern
            return None
        steps = name.split(".")
        for row in self._index.get(_form(steps), ()):
            if (numbers := row.match(steps)) is not None:
                return row.target(numbers, row.suffix or "weight")
        for row in self._index.get(_form(steps[:-1]), ()):
            if row.suffix is None and (numbers := row.match(steps[:-1])) is not None:
                return row.target(numbers, steps[-1])
        return None

    def sources(self, path: str, part: str, suffix: str, index: int | None = None) -> list[str]:
        """The names that a checkpoint could have for a place of the tree: the reverse of `find`, for error messages.

        Of a row that names a module or a whole tensor, the name of the module's tensor.
        """
        found = (row.source_of(path, part, suffix, index) for row in self._rows)
        return [name for name in found if name is not None]


@dataclass(frozen=True)
class _Row:
    source: str
    path: str | None
    part: str | None
    suffix: str | None
    view: View | None
    cut: Cut | None
    stacked: bool = False

    @property
    def stacks(self) -> bool:
        return self.path is not None and self.source.count("*") > self.path.count("*")

    def match(self, steps: list[str]) -> list[str] | None:
        """The numbers that the stars stand for, given a name of the same form."""
        pairs = list(zip(self.source.split("."), steps, strict=True))
        if all(step in ("*", found) for step, found in pairs):
            return [found for step, found in pairs if step == "*"]
        return None

    def target(self, numbers: list[str], suffix: str) -> Target:
        if self.path is None:
            return Target(None, None, suffix, None, None, None)
        index = int(numbers[-1]) if self.stacks else None
        path = _fill_stars(self.path, numbers)
        return Target(path, self.part, suffix, index, self.view, self.cut, self.stacked)

    def source_of(self, path: str, part: str, suffix: str, index: int | None) -> str | None:
        """The name of the tensor that this row would put into a place, or None where it leads elsewhere."""
        if (
            self.path is None
            or (self.stacks or self.stacked) != (index is not None)
            or self.suffix not in (None, suffix)
        ):
            return None
        parts = self.cut.parts if self.cut else (self.part,)
        numbers = re.fullmatch(re.escape(self.path).replace(r"\*", "([0-9]+)"), path)
        if numbers is None or (part not in parts and parts != (None,)):
            return None
        source = _fill_stars(self.source, [*numbers.groups(), str(index)])
        names_tensor = self.suffix is not None or source.rpartition(".")[2] in ("weight", "bias")
        return source if names_tensor else f"{source}.{suffix}"


def _index(rows: list[_Row]) -> dict[str, list[_Row]]:
    """Rows by the form of their source, each list in the order in which they are tried."""
    index: dict[str, list[_Row]] = {}
    for row in reversed(rows):
        index.setdefault(_form(row.source.split(".")), []).append(row)
    for candidates in index.values():
        candidates.sort(key=lambda row: row.source.count("*"))
    return index


def _parse(source: str, destination: str | None, *operations: Operation) -> _Row:
    row = f"row {source!r} of a table of names"
    parsed = _DESTINATION.fullmatch(destination or "")
    if not _SOURCE.fullmatch(source) or (parsed is None and (destination is not None or operations)):
        raise PluginBroken(f"{row}: write a place as `path[part]:suffix`, and a star for a whole number between dots")
    if parsed is None:
        return _Row(source, None, None, None, None, None)
    views = [operation for operation in operations if isinstance(operation, View)]
    cuts = [operation for operation in operations if isinstance(operation, Cut)]
    stacked = [operation for operation in operations if isinstance(operation, Stacked)]
    known = len(views) + len(cuts) + len(stacked)
    if max(len(views), len(stacked), len(cuts) + (parsed["part"] is not None)) > 1 or known < len(operations):
        raise PluginBroken(
            f"{row}: it may have one Transpose() or Squeeze(), one Stacked(), "
            "and one of [part], Split(...) and Interleaved(...)"
        )
    surplus = source.count("*") - parsed["path"].count("*")
    if surplus not in (0, 1):
        raise PluginBroken(f"{row} must have as many stars as {destination!r}, or one more: the index in a stack")
    view, cut = next(iter(views), None), next(iter(cuts), None)
    return _Row(source, parsed["path"], parsed["part"], parsed["suffix"], view, cut, bool(stacked))


def _fill_stars(pattern: str, numbers: list[str]) -> str:
    """The pattern with its stars replaced from the left."""
    steps, left = pattern.split("."), iter(numbers)
    return ".".join(next(left) if step == "*" else step for step in steps)


def _form(steps: list[str]) -> str:
    """A name or source with each number a star: what names and the row that finds them have in common."""
    # Nine digits are more than any count, and few enough for int().
    return ".".join("*" if step.isdecimal() and step.isascii() and len(step) < 10 else step for step in steps)
