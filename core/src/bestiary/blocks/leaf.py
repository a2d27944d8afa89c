"""The two kinds of module: a block is made of others, a leaf owns tensors. Neither knows an architecture."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bestiary.checkpoint import Place
from bestiary.errors import TensorMismatch

__all__ = ["Block", "Leaf"]


class Block(nn.Module):
    """A module without hooks: calling it is calling `forward`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Skip torch's hook machinery: a decode step makes hundreds of these calls."""
        return self.forward(*args, **kwargs)

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

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors that this leaf owns, by the suffix they have in a checkpoint."""
        raise NotImplementedError(type(self).__name__)

    def expected(self) -> Iterator[Place]:
        """(part, suffix), and in a stack the number, of everything that a checkpoint must bring."""
        for suffix in self.shapes():
            for part in self.parts:
                yield part, suffix

    def allocate(self, dtype: torch.dtype, device: torch.device) -> None:
        """Make the tensors, unfilled."""
        for suffix, shape in self.shapes().items():
            setattr(self, suffix, nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False))

    def rows_of(self, part: str) -> slice:
        """Where a part stands in the fused tensor."""
        start = 0
        for name, rows in self.parts.items():
            if name == part:
                return slice(start, start + rows)
            start += rows
        raise TensorMismatch(f"there is no part {part!r}; the parts are: {', '.join(self.parts)}")

    def fill(self, part: str | None, suffix: str, tensor: Tensor, index: int | None) -> None:
        """Copy one part of one tensor in (None: the only one). Raises TensorMismatch where it does not fit."""
        if suffix not in self.shapes():
            raise TensorMismatch(f"the model has no {suffix!r} here, only: {', '.join(self.shapes())}")
        if index is not None:
            raise TensorMismatch("the model has no stack of experts here")
        target = getattr(self, suffix)
        target = target[self.rows_of(part if part is not None else next(iter(self.parts)))]
        if tuple(tensor.shape) != tuple(target.shape):
            raise TensorMismatch(f"shape {tuple(tensor.shape)}, and the model needs {tuple(target.shape)}")
        target.copy_(tensor)

    def settle(self) -> None:
        """Tensors become plain attributes too; a kernel takes a tensor, not a parameter."""
        super().settle()
        self.__dict__.update({name: tensor.data for name, tensor in self.named_parameters(recurse=False)})

    def pack(self) -> None:
        """Lay the tensors out for this device. Most have nothing to do."""
