"""The two kinds of module: a block is made of others, a leaf owns tensors. Neither knows an architecture."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bestiary.checkpoint import Place
from bestiary.errors import TensorMismatch
from bestiary.parallel import Mesh

__all__ = ["Block", "Leaf", "Learned"]


class Block(nn.Module):
    """A module without hooks: calling it is calling `forward`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Skip torch's hook machinery: a decode step makes hundreds of these calls."""
        return self.forward(*args, **kwargs)

    def cut(self, mesh: Mesh) -> None:
        """Keep what this shard has of the leaves that are directly in here; most blocks have nothing to share out.

        What goes in and what comes out stays whole on every shard. Called before `allocate`.
        """

    def settle(self) -> None:
        """Called once everything is in place: children become plain attributes, which are found ten times quicker."""
        self.__dict__.update(self._modules)


class Leaf(Block):
    """A module with tensors of its own. It holds only their shapes until `allocate`, and is filled part by part."""

    #: Output rows of each named part, in the order in which they are stored.
    parts: Mapping[str, int]
    #: Rows that must stay together, as a head's.
    unit: int = 1
    #: How many matrices it stacks, one for each expert; 0: it is no stack.
    stack: int = 0
    #: The rows of each part that this shard keeps, and the columns of the weight; None: all of them.
    own_rows: Mapping[str, range] | None = None
    own_columns: range | None = None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors of the whole model that stand here, by the suffix they have in a checkpoint."""
        raise NotImplementedError(type(self).__name__)

    def keep_rows(self, **rows: range) -> None:
        """This shard has these output rows of each part alone."""
        self.own_rows = rows

    def keep_columns(self, columns: range) -> None:
        """This shard has these input columns of the weight alone."""
        self.own_columns = columns

    def held(self) -> dict[str, tuple[int, ...]]:
        """The shapes of what this shard has of the tensors."""
        return {suffix: self._held(suffix, shape) for suffix, shape in self.shapes().items()}

    def _held(self, suffix: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        if self.own_rows is not None:
            at = 1 if self.stack else 0
            shape = (*shape[:at], sum(map(len, self.own_rows.values())), *shape[at + 1 :])
        if self.own_columns is not None and suffix == "weight":
            shape = (*shape[:-1], len(self.own_columns))
        return shape

    def own(self, part: str, suffix: str, tensor: Tensor) -> Tensor:
        """What this shard keeps of a part's rows as the checkpoint has them, as a view."""
        if self.own_rows is not None:
            rows = self.own_rows[part]
            tensor = tensor[rows.start : rows.stop]
        if self.own_columns is not None and suffix == "weight":
            tensor = tensor[..., self.own_columns.start : self.own_columns.stop]
        return tensor

    def expected(self) -> Iterator[Place]:
        """(part, suffix), and in a stack the number, of everything that a checkpoint must bring."""
        for suffix in self.shapes():
            for part in self.parts:
                yield part, suffix

    def allocate(self, dtype: torch.dtype, device: torch.device) -> None:
        """Make the tensors, unfilled."""
        for suffix, shape in self.held().items():
            setattr(self, suffix, nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False))

    def nbytes(self, dtype: torch.dtype) -> int:
        """What this shard has of it will take in memory. The leaf is of no other use afterwards."""
        self.allocate(dtype, torch.device("meta"))
        return sum(tensor.nbytes for tensor in self.parameters(recurse=False))

    def bytes_read(self, dtype: torch.dtype) -> int:
        """What a step that needs all of it reads on this machine's CPU. The leaf is of no other use afterwards."""
        return self.nbytes(dtype)

    def rows_of(self, part: str) -> slice:
        """Where a part stands in what this shard has of the fused tensor."""
        start = 0
        for name in self.parts:
            rows = self.parts[name] if self.own_rows is None else len(self.own_rows[name])
            if name == part:
                return slice(start, start + rows)
            start += rows
        raise TensorMismatch(f"there is no part {part!r}; the parts are: {', '.join(self.parts)}")

    def fill(self, part: str | None, suffix: str, tensor: Tensor, index: int | None) -> None:
        """Copy one part of one tensor in (None: the only one). Raises TensorMismatch where it does not fit."""
        if suffix not in self.shapes():
            raise TensorMismatch(f"the model has no {suffix!r} here, only: {', '.join(self.shapes())}")
        if (index is not None) != bool(self.stack) or (index or 0) >= max(self.stack, 1):
            here = f"weights of {self.stack} experts" if self.stack else "no stack of experts"
            raise TensorMismatch(f"the model has {here} here")
        part = part if part is not None else next(iter(self.parts))
        target, shape = getattr(self, suffix), self.shapes()[suffix]
        if index is not None:
            target, shape = target[index], shape[1:]
        wanted = (self.parts[part], *shape[1:])
        if tuple(tensor.shape) != wanted:
            raise TensorMismatch(f"shape {tuple(tensor.shape)}, and the model needs {wanted}")
        target[self.rows_of(part)].copy_(self.own(part, suffix, tensor))

    def settle(self) -> None:
        """Tensors become plain attributes too; a kernel takes a tensor, not a parameter."""
        super().settle()
        self.__dict__.update({name: tensor.data for name, tensor in self.named_parameters(recurse=False)})

    def pack(self) -> None:
        """Lay the tensors out for this device. Most have nothing to do."""


class Learned(Leaf):
    """A tensor that is used as it stands: a class token, a table of positions, a gate."""

    weight: nn.Parameter

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.shape = shape
        self.parts = {"out": shape[0]}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """A weight of that shape."""
        return {"weight": self.shape}
