"""What a row of names may do to a tensor on its way into the model. Knows rows and their owners, no architecture.

"Rows" are the output features, dimension 0 of a weight, a bias or a scale alike. An operation that cuts them therefore
also serves an adapter's matrix of the same output features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Protocol

from bestiary.errors import PluginBroken, TensorMismatch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Cut", "Fused", "Interleaved", "Operation", "Split", "Squeeze", "Stacked", "Transpose", "View"]


class Fused(Protocol):
    """The module that a tensor is cut for."""

    @property
    def parts(self) -> Mapping[str, int]:
        """The rows of each part in the whole model, in order; a module that is not fused has one part of any name."""

    @property
    def unit(self) -> int:
        """The rows that belong together: those of a head in attention, elsewhere 1."""

    @property
    def stack(self) -> int:
        """How many matrices of this kind the module holds, one for each expert; 0 where it is one and no stack."""


class View(ABC):
    """The file stores the tensor in another shape."""

    @abstractmethod
    def apply(self, tensor: Tensor) -> Tensor:
        """The tensor as the model has it, as a view."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class Squeeze(View):
    """The file stores a first dimension of one that means nothing."""

    def apply(self, tensor: Tensor) -> Tensor:
        """[1, ...] to [...]; any other tensor as it is."""
        return tensor[0] if tensor.ndim > 1 and tensor.shape[0] == 1 else tensor


class Transpose(View):
    """The file stores the matrix as [in, out], as a one-tap convolution has it. Vectors stay as they are."""

    def apply(self, tensor: Tensor) -> Tensor:
        """[in, out] to [out, in], as a view; [out] as it is."""
        return tensor.mT if tensor.ndim > 1 else tensor


class Stacked:
    """The file stores the matrices of all experts in one tensor, whose first dimension counts them."""

    def __repr__(self) -> str:
        return "Stacked()"


class Cut(ABC):
    """The file stores several parts of a matrix in one tensor, and this is how they lie in it."""

    def __init__(self, *parts: str) -> None:
        if len(parts) < 2 or len(set(parts)) < len(parts):
            raise PluginBroken(f"{type(self).__name__}{parts} in a table of names: give two or more different parts")
        self.parts = parts

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, self.parts))})"

    def pieces(self, tensor: Tensor, module: Fused) -> Iterator[tuple[str, Tensor]]:
        """Yield each part with its rows, in the order of the file.

        Raises TensorMismatch where the tensor does not have the rows of all parts together.
        """
        sizes = [module.parts[part] for part in self.parts]
        rows = tensor.shape[0] if tensor.ndim else 0
        if rows != sum(sizes):
            expected = " + ".join(f"{part} {size}" for part, size in zip(self.parts, sizes, strict=True))
            raise TensorMismatch(f"it has {rows} rows, and the model needs {sum(sizes)} ({expected})")
        return zip(self.parts, self._cut(tensor, sizes, module.unit), strict=True)

    @abstractmethod
    def _cut(self, tensor: Tensor, sizes: list[int], unit: int) -> Iterator[Tensor]:
        """Yield the rows of each part, `sizes[i]` of them for part i."""


class Split(Cut):
    """The parts lie one below the other: `Split("q", "k", "v")` for all of q, then all of k, then all of v."""

    def _cut(self, tensor: Tensor, sizes: list[int], unit: int) -> Iterator[Tensor]:
        return iter(tensor.split_with_sizes(sizes))


class Interleaved(Cut):
    """The parts take turns: a group of rows of each, then the next group of each.

    There are as many groups as the smallest part has units. For attention, whose unit is a head's rows, that is a group
    for each head of keys: [heads, q k v, head size] where every query head has its own, and otherwise
    [kv heads, queries of the group | k | v, head size]. With a unit of one row, single rows alternate.
    """

    def _cut(self, tensor: Tensor, sizes: list[int], unit: int) -> Iterator[Tensor]:
        groups = min(sizes) // unit
        if groups == 0 or any(size % groups for size in sizes):
            raise TensorMismatch(f"parts of {sizes} rows cannot take turns in {groups} groups of {unit} rows or more")
        tail = tensor.shape[1:]
        grouped = tensor.reshape(groups, -1, *tail).split_with_sizes([size // groups for size in sizes], dim=1)
        return (piece.reshape(-1, *tail) for piece in grouped)


Operation = View | Stacked | Cut
