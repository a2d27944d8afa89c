"""Matrices: the product, and the table of embeddings. The only place where weights meet a matrix routine."""

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bestiary_kernels as kernels
from bestiary.blocks.leaf import Leaf
from bestiary.parallel import Mesh
from bestiary_kernels import PackedLinear

__all__ = ["Embedding", "Linear", "Role"]

#: How ranks would share a matrix: by output (column), by input (row), or not at all (whole).
Role = Literal["column", "row", "whole"]


class Linear(Leaf):
    """y = x Wᵀ + b, with one or more named parts of W stored below each other.

    `role` and `unit` (the rows that must stay together, as a head's) say how the matrix may be cut; blocks set them.
    """

    weight: nn.Parameter
    bias: nn.Parameter

    def __init__(
        self, inputs: int, outputs: int | Mapping[str, int], role: Role, *, unit: int = 1, bias: bool = False
    ) -> None:
        super().__init__()
        self.inputs, self.role, self.unit, self.has_bias = inputs, role, unit, bias
        self.parts = {"out": outputs} if isinstance(outputs, int) else dict(outputs)
        self.packed: PackedLinear | None = None
        #: Adds up what the shards made, where each has some of the inputs.
        self.add: Callable[[Tensor], Tensor] | None = None
        self.adds_bias = True

    def keep_addends(self, columns: range, mesh: Mesh) -> None:
        """This shard has these inputs alone: the shards' products are added up, and one of them adds the bias."""
        self.keep_columns(columns)
        self.add, self.adds_bias = mesh.link.all_reduce, mesh.shard == 0

    def fill(self, part: str | None, suffix: str, tensor: Tensor, index: int | None) -> None:
        """Copy in what this shard keeps."""
        if suffix == "bias" and not self.adds_bias:
            tensor = torch.zeros_like(tensor)
        super().fill(part, suffix, tensor, index)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """A weight [outputs, inputs] and perhaps a bias [outputs]."""
        rows = sum(self.parts.values())
        return {"weight": (rows, self.inputs), **({"bias": (rows,)} if self.has_bias else {})}

    def pack(self, *, keep_rows: bool = False) -> None:
        """On a CPU, re-lay the weight for the matrix routine and free the original; `keep_rows`: rows are read too."""
        if self.weight.device.type == "cpu":
            bias = self.bias.data if self.has_bias else None
            self.packed = PackedLinear(self.weight.data, bias, keep_rows=keep_rows)
            del self.weight
        self.forward = self._steps()  # type: ignore[method-assign,assignment]

    def _steps(self) -> Callable[[Tensor], Tensor]:
        """The product, and what is done with it, each only where it is needed."""
        product: Callable[[Tensor], Tensor] = self._product if self.packed is None else self.packed
        if (add := self.add) is None:
            return product
        return lambda x_TD: add(product(x_TD))

    def _product(self, x_TD: Tensor) -> Tensor:
        return F.linear(x_TD, self.weight, self.bias if self.has_bias else None)

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, inputs] to [T, outputs]."""
        return self._steps()(x_TD)


class Embedding(Leaf):
    """A row for each token id, or for each position; row `offset` is that of number 0."""

    weight: nn.Parameter

    def __init__(self, vocabulary: int, width: int, *, offset: int = 0) -> None:
        super().__init__()
        self.vocabulary, self.width, self.offset = vocabulary, width, offset
        self.parts = {"out": vocabulary}
        self.add: Callable[[Tensor], Tensor] | None = None

    def keep_tokens(self, mesh: Mesh) -> None:
        """This shard has some of the rows; the others bring theirs."""
        self.keep_rows(out=mesh.share(self.vocabulary))
        self.add = mesh.link.all_reduce

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """A weight [vocabulary, width]."""
        return {"weight": (self.vocabulary, self.width)}

    def share(self, packed: PackedLinear) -> None:
        """Read rows out of a tied head's packed matrix, so that the table stands in memory once."""
        del self.weight
        self._rows = packed.embedding  # type: ignore[method-assign]
        if self.add is None:
            self.forward = packed.embedding  # type: ignore[method-assign]

    def forward(self, ids_T: Tensor) -> Tensor:
        """[T] int64 to [T, width]."""
        if self.add is None or self.own_rows is None:
            return self._rows(ids_T + self.offset if self.offset else ids_T)
        own = self.own_rows["out"]
        is_elsewhere = (ids_T < own.start) | (ids_T >= own.stop)
        found_TD = self._rows((ids_T - own.start).masked_fill(is_elsewhere, 0))
        return self.add(found_TD.masked_fill(is_elsewhere[:, None], 0))

    def _rows(self, ids_T: Tensor) -> Tensor:
        return kernels.embedding(self.weight, ids_T)
