"""Matrices: the product, and the table of embeddings. The only place where weights meet a matrix routine."""

from collections.abc import Mapping
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

import bestiary_kernels as kernels
from bestiary.blocks.leaf import Leaf
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
            self.forward = self.packed  # type: ignore[method-assign,assignment]

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, inputs] to [T, outputs]."""
        return F.linear(x_TD, self.weight, self.bias if self.has_bias else None)


class Embedding(Leaf):
    """A row for each token id, or for each position; row `offset` is that of number 0."""

    weight: nn.Parameter

    def __init__(self, vocabulary: int, width: int, *, offset: int = 0) -> None:
        super().__init__()
        self.vocabulary, self.width, self.offset = vocabulary, width, offset
        self.parts = {"out": vocabulary}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """A weight [vocabulary, width]."""
        return {"weight": (self.vocabulary, self.width)}

    def share(self, packed: PackedLinear) -> None:
        """Read rows out of a tied head's packed matrix, so that the table stands in memory once."""
        del self.weight
        self.forward = packed.embedding  # type: ignore[method-assign]

    def forward(self, ids_T: Tensor) -> Tensor:
        """[T] int64 to [T, width]."""
        return kernels.embedding(self.weight, ids_T + self.offset if self.offset else ids_T)
