"""Streams a checkpoint into a model and accounts for every tensor. Knows neither what modules are nor how they work.

What goes where is settled from the names alone, before a byte of the weights is read: a checkpoint that does not
belong to the model is refused at once, with everything that is missing or left over in one error. Values are taken as
they are: NaN and infinities in the weights are the checkpoint's own, and nothing here looks for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import product
from typing import TYPE_CHECKING, Protocol

from bestiary.checkpoint.operations import Fused
from bestiary.errors import TensorMismatch

if TYPE_CHECKING:
    from torch import Tensor

    from bestiary.checkpoint.names import Names, Target
    from bestiary.checkpoint.safetensors import Checkpoint

__all__ = ["Leaf", "Place", "fill"]

#: What one piece of a tensor fills within a leaf: (part, suffix), and in a stack of experts also the expert's number.
Place = tuple[str, str] | tuple[str, str, int]

#: Lines that an error lists of one kind.
_LISTED = 10


class Leaf(Fused, Protocol):
    """A module that owns tensors, as the checkpoint sees it."""

    def expected(self) -> Iterable[Place]:
        """Everything that a checkpoint must bring. What else the leaf takes or ignores is its own business."""

    def fill(self, part: str | None, suffix: str, tensor: Tensor, index: int | None) -> None:
        """Copy one part of one tensor, all its rows, in; the leaf casts, and keeps this rank's share.

        `index` is the number in a stack of experts. Raises TensorMismatch, saying what was found and what is needed.
        """


def fill(tree: Mapping[str, Leaf], names: Names, checkpoint: Checkpoint, elsewhere: Callable[[str], bool]) -> None:
    """Fill every leaf of `tree` (by path) from the checkpoint, in the order of its files.

    A tensor whose place is not in the tree is skipped where `elsewhere(path)` says that another rank has it. Raises
    TensorMismatch for tensors that have no place, share one, or do not fit it, and for leaves that are left unfilled;
    PluginBroken for rows of `names` that no module can follow. A leaf is only written to once the names add up.
    """
    plan = _Plan(tree, names, checkpoint, elsewhere)
    if faults := plan.faults():
        raise TensorMismatch(
            f"{checkpoint.folder} does not fit the model that its config.json describes.\n" + "\n".join(faults)
        )
    for name, target in plan.targets.items():
        _pour(checkpoint, name, target, tree[str(target.path)])
        checkpoint.release(name)


def _pour(checkpoint: Checkpoint, name: str, target: Target, leaf: Leaf) -> None:
    try:
        for part, piece, index in target.pieces(checkpoint.tensor(name), leaf):
            leaf.fill(part, target.suffix, piece, index)
    except TensorMismatch as error:
        tensor = f"{checkpoint.file(name)}: {name!r}, {checkpoint.dtype(name)} {list(checkpoint.shape(name))}"
        raise TensorMismatch(
            f"{tensor}, does not fit {target.path}: {error}; is config.json this checkpoint's?"
        ) from error


class _Plan:
    """Where each tensor goes, by its name alone, and what does not add up."""

    def __init__(
        self, tree: Mapping[str, Leaf], names: Names, checkpoint: Checkpoint, elsewhere: Callable[[str], bool]
    ) -> None:
        self._tree, self._names = tree, names
        self.targets: dict[str, Target] = {}
        self._filled: dict[tuple[str, Place], str] = {}
        self._unnamed: list[str] = []
        self._homeless: list[str] = []
        self._doubled: list[str] = []
        for name in checkpoint:
            self._settle(name, elsewhere)

    def _settle(self, name: str, elsewhere: Callable[[str], bool]) -> None:
        target = self._names.find(name)
        if target is None:
            self._unnamed.append(repr(name))
        elif target.path is None:
            return
        elif target.path in self._tree:
            self.targets[name] = target
            leaf = self._tree[target.path]
            for part, index in product(target.parts(leaf), target.indices(leaf)):
                self._mark(target.path, _place(part, target.suffix, index), name)
        elif not elsewhere(target.path):
            self._homeless.append(f"{name!r} (for {target.path})")

    def _mark(self, path: str, place: Place, name: str) -> None:
        first = self._filled.setdefault((path, place), name)
        if first != name:
            self._doubled.append(f"{first!r} and {name!r} (for {_spell(path, place)})")

    def faults(self) -> list[str]:
        """A paragraph for each kind of fault; none where every tensor has one place, and every place its tensor."""
        kinds = {
            "no row of the plugin's NAMES speaks of": self._unnamed,
            "the checkpoint has, and the model has no place for": self._homeless,
            "the checkpoint has twice": self._doubled,
            "the model needs, and the checkpoint lacks": self._missing(),
        }
        return [_paragraph(kind, lines) for kind, lines in kinds.items() if lines]

    def _missing(self) -> list[str]:
        return [
            self._wanted(path, place)
            for path, leaf in self._tree.items()
            for place in leaf.expected()
            if (path, place) not in self._filled
        ]

    def _wanted(self, path: str, place: Place) -> str:
        sources = " or ".join(map(repr, self._names.sources(path, *place)))
        return f"{sources or 'what no row of NAMES leads to'} (for {_spell(path, place)})"


def _paragraph(kind: str, lines: list[str]) -> str:
    more = [f"... and {len(lines) - _LISTED} more"] if len(lines) > _LISTED else []
    tensors = "1 tensor" if len(lines) == 1 else f"{len(lines)} tensors"
    return f"{tensors} that {kind}:\n" + "\n".join(f"  {line}" for line in lines[:_LISTED] + more)


def _place(part: str, suffix: str, index: int | None) -> Place:
    return (part, suffix) if index is None else (part, suffix, index)


def _spell(path: str, place: Place) -> str:
    """A place as a row of NAMES would spell it."""
    part, suffix, *index = place
    return f"{path}[{part}]:{suffix}" + "".join(f" of expert {number}" for number in index)
