"""Matrices: the product, and the table of embeddings. The only place where weights meet a matrix routine."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import prod
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bestiary_kernels as kernels
from bestiary.blocks.leaf import Leaf
from bestiary.blocks.lowrank import Adaptable, Lanes, Update
from bestiary.checkpoint import Place
from bestiary.parallel import Mesh
from bestiary_kernels import PackedLinear, QuantisedLinear

__all__ = ["Embedding", "Format", "Linear", "Role"]

#: How ranks would share a matrix: by output (column), by input (row), or not at all (whole).
Role = Literal["column", "row", "whole"]
#: How a matrix may be stored instead of in the model's dtype: small whole numbers with scales.
Format = Literal["int8", "int4"]
_BITS: Mapping[Format, int] = {"int8": 8, "int4": 4}


class Linear(Adaptable):
    """y = x Wᵀ + b, with one or more named parts of W stored below each other.

    `role` and `unit` (the rows that must stay together, as a head's) say how the matrix may be cut; blocks set them.
    `exact`: its few outputs decide what is computed at all, and it is never stored in another format.
    """

    weight: nn.Parameter
    bias: nn.Parameter

    def __init__(
        self,
        inputs: int,
        outputs: int | Mapping[str, int],
        role: Role,
        *,
        unit: int = 1,
        bias: bool = False,
        exact: bool = False,
    ) -> None:
        super().__init__()
        self.inputs, self.role, self.unit, self.has_bias, self.exact = inputs, role, unit, bias, exact
        self.parts = {"out": outputs} if isinstance(outputs, int) else dict(outputs)
        self.packed: PackedLinear | QuantisedLinear | None = None
        #: None: the model's dtype.
        self.format: Format | None = None
        self._awaited: set[Place] = set()
        self._make: Callable[[], None] | None = None
        #: Adds up what the shards made, where each has some of the inputs.
        self.add: Callable[[Tensor], Tensor] | None = None
        self.adds_bias = True

    def keep_addends(self, columns: range, mesh: Mesh) -> None:
        """This shard has these inputs alone: the shards' products are added up, and one of them adds the bias."""
        self.keep_columns(columns)
        self.add, self.adds_bias = mesh.link.all_reduce, mesh.shard == 0

    def allocate(self, dtype: torch.dtype, device: torch.device) -> None:
        """Make the tensors, unfilled; in another format only when the first of them comes, and not for long."""
        if self.format is None:
            super().allocate(dtype, device)
            return
        self._awaited, self._make = set(self.expected()), partial(super().allocate, dtype, device)

    def nbytes(self, dtype: torch.dtype) -> int:
        """What this shard has of it will take in memory."""
        if self.format is None:
            return super().nbytes(dtype)
        rows, columns = self.held()["weight"]
        return QuantisedLinear.size(rows, columns, _BITS[self.format]) + self._bias_bytes(dtype)

    def bytes_read(self, dtype: torch.dtype) -> int:
        """As it is packed."""
        weight = self.held().get("weight")
        if self.format is not None or weight is None:
            return self.nbytes(dtype)
        outputs, inputs = weight
        return PackedLinear.bytes_read(outputs, inputs, dtype) + self._bias_bytes(dtype)

    def _bias_bytes(self, dtype: torch.dtype) -> int:
        return prod(self.held().get("bias", (0,))) * dtype.itemsize

    def fill(self, part: str | None, suffix: str, tensor: Tensor, index: int | None) -> None:
        """Copy in what this shard keeps. What is complete takes its format at once: few are large at any time."""
        if suffix == "bias" and not self.adds_bias:
            tensor = torch.zeros_like(tensor)
        if self._make is not None:
            self._make()
            self._make = None
        super().fill(part, suffix, tensor, index)
        if self._awaited:
            self._awaited.discard((part or next(iter(self.parts)), suffix))
            if not self._awaited:
                self.pack()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """A weight [outputs, inputs] and perhaps a bias [outputs]."""
        rows = sum(self.parts.values())
        return {"weight": (rows, self.inputs), **({"bias": (rows,)} if self.has_bias else {})}

    def pack(self, *, keep_rows: bool = False) -> None:
        """Give the weight its format; on a CPU, re-lay it for the matrix routine; free the original.

        `keep_rows`: rows are read too.
        """
        if self.packed is None and (self.format is not None or self.weight.device.type == "cpu"):
            bias = self.bias.data if self.has_bias else None
            if self.format is None:
                self.packed = PackedLinear(self.weight.data, bias, keep_rows=keep_rows)
            else:
                self.packed = QuantisedLinear(self.weight.data, bias, bits=_BITS[self.format])
            del self.weight
        self.forward = self._steps()  # type: ignore[method-assign,assignment]

    def _steps(self) -> Callable[[Tensor], Tensor]:
        """The product, and what is done with it, each only where it is needed."""
        product: Callable[[Tensor], Tensor] = self._product if self.packed is None else self.packed
        if self.low is not None:
            product = self._adapted(product)
        if (add := self.add) is None:
            return product
        return lambda x_TD: add(product(x_TD))

    def _adapted(self, product: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        low = self.low

        def adapted(x_TD: Tensor) -> Tensor:
            y_TN, slots_T = product(x_TD), self.slots_of(x_TD)
            return y_TN if slots_T is None or low is None else low.add(y_TN, x_TD, slots_T)

        return adapted

    def adapt(self, lanes: Lanes, slots: int, rank: int, dtype: torch.dtype, device: torch.device) -> None:
        """Make room for adapters; the product has one more step."""
        super().adapt(lanes, slots, rank, dtype, device)
        self.forward = self._steps()  # type: ignore[method-assign,assignment]

    def activated(self, x_TD: Tensor, kind: str, *, gated: bool = False) -> Tensor:
        """act(y) of the product y, or with `gated` of its first half, times the second; in one pass if it can be."""
        is_alone = self.add is None and (self.low is None or self.slots_of(x_TD) is None)
        if isinstance(self.packed, PackedLinear) and is_alone:
            return self.packed.activated(x_TD, kind, gated=gated)
        return (kernels.gated_activation if gated else kernels.activation)(self(x_TD), kind)

    def _product(self, x_TD: Tensor) -> Tensor:
        return F.linear(x_TD, self.weight, self.bias if self.has_bias else None)

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, inputs] to [T, outputs]."""
        return self._steps()(x_TD)

    def __call__(self, x_TD: Tensor) -> Tensor:
        """Calling is calling `forward`, as for any block."""
        return self.forward(x_TD)


class _LowRankTable:
    """What adapters add to rows of a table: for token t column t of A, times B.

    As for any other matrix, but that A x is looked up: what is multiplied with A's column is the identity.
    """

    def __init__(self, table: "Embedding", slots: int, rank: int, dtype: torch.dtype, device: torch.device) -> None:
        self._own = (table.own_rows or {}).get("out", range(table.vocabulary))
        self.down = torch.zeros(slots, len(self._own), rank, dtype=dtype, device=device)
        self.up = torch.zeros(slots, rank, table.width, dtype=dtype, device=device)
        self._same = torch.eye(rank, dtype=dtype, device=device).expand(slots, 1, rank, rank).contiguous()
        self._ranks = torch.full((slots, 1), rank, dtype=torch.int32, device=device)
        self._starts = torch.tensor([0, table.width], dtype=torch.int32, device=device)

    def write(self, slot: int, updates: Sequence[Update]) -> None:
        """Put an adapter into a slot, in the place of whatever was there."""
        self.down[slot].zero_()
        self.up[slot].zero_()
        for update in updates:
            rank = update.down.shape[0]
            self.down[slot, :, :rank] = update.down[:, self._own.start : self._own.stop].T
            self.up[slot, :rank] = update.up.T

    def add(self, y_TD: Tensor, rows_T: Tensor, slots_T: Tensor) -> Tensor:
        """y and what the adapters add to these rows of the table; y's memory is used."""
        columns_TR = self.down[slots_T.clamp(min=0).long(), rows_T]
        return kernels.lora(y_TD, columns_TR, slots_T, self._same, self.up, self._ranks, self._starts)


class Embedding(Leaf):
    """A row for each token id, or for each position; row `offset` is that of number 0."""

    weight: nn.Parameter

    def __init__(self, vocabulary: int, width: int, *, offset: int = 0) -> None:
        super().__init__()
        self.vocabulary, self.width, self.offset = vocabulary, width, offset
        self.parts = {"out": vocabulary}
        self.add: Callable[[Tensor], Tensor] | None = None
        self.lanes: Lanes | None = None
        self.low: _LowRankTable | None = None

    def adapt(self, lanes: Lanes, slots: int, rank: int, dtype: torch.dtype, device: torch.device) -> None:
        """Make room for adapters of up to that rank."""
        self.lanes, self.low = lanes, _LowRankTable(self, slots, rank, dtype, device)
        self.__dict__.pop("forward", None)  # the short cut to a shared table

    def keep_tokens(self, mesh: Mesh) -> None:
        """This shard has some of the rows; the others bring theirs."""
        self.keep_rows(out=mesh.share(self.vocabulary))
        self.add = mesh.link.all_reduce

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """A weight [vocabulary, width]."""
        return {"weight": (self.vocabulary, self.width)}

    def bytes_read(self, dtype: torch.dtype) -> int:
        """As a tied head's matrix; a table that is only looked up in is read by the row."""
        rows, columns = self.held()["weight"]
        return PackedLinear.bytes_read(rows, columns, dtype)

    def share(self, packed: PackedLinear) -> None:
        """Read rows out of a tied head's packed matrix, so that the table stands in memory once."""
        del self.weight
        self._rows = packed.embedding  # type: ignore[method-assign,assignment]
        if self.add is None:
            self.forward = packed.embedding  # type: ignore[method-assign]

    def forward(self, ids_T: Tensor) -> Tensor:
        """[T] int64 to [T, width]."""
        if self.add is None or self.own_rows is None:
            return self._adapted(ids_T)
        own = self.own_rows["out"]
        is_elsewhere = (ids_T < own.start) | (ids_T >= own.stop)
        found_TD = self._adapted((ids_T - own.start).masked_fill(is_elsewhere, 0))
        return self.add(found_TD.masked_fill(is_elsewhere[:, None], 0))

    def _adapted(self, rows_T: Tensor) -> Tensor:
        y_TD = self._rows(rows_T)
        slots_T = None if self.lanes is None else self.lanes.of("tokens", rows_T)
        return y_TD if slots_T is None or self.low is None else self.low.add(y_TD, rows_T + self.offset, slots_T)

    def _rows(self, rows_T: Tensor) -> Tensor:
        return kernels.embedding(self.weight[self.offset :], rows_T)
