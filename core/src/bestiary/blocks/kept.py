"""What a token mixer keeps between steps, as data. The cache makes room for it; the mixer finds it in the batch."""

from dataclasses import dataclass
from typing import Protocol

__all__ = ["Kept", "Latent", "PagedKV", "Room", "State"]


@dataclass(frozen=True)
class Room:
    """One tensor of a cache: its first dimension counts blocks."""

    shape: tuple[int, ...]
    #: Kept in float32 whatever the model's dtype, since it is added to over and over.
    exact: bool = False


class Kept(Protocol):
    """What a layer keeps."""

    @property
    def window(self) -> int | None:
        """How many tokens back a token sees, itself included; None: all."""

    @property
    def fixed(self) -> int | None:
        """Blocks that a sequence takes however long it is; None: as many as its tokens fill."""

    def rooms(self, blocks: int, block_size: int) -> tuple[Room, ...]:
        """The tensors of a pool of that many blocks."""


@dataclass(frozen=True)
class PagedKV:
    """Keys and values of every token, in blocks: [blocks, heads, block size, head size] each."""

    heads: int
    k_dim: int
    v_dim: int
    window: int | None = None
    fixed: None = None

    def rooms(self, blocks: int, block_size: int) -> tuple[Room, ...]:
        """Keys, and values."""
        return tuple(Room((blocks, self.heads, block_size, dim)) for dim in (self.k_dim, self.v_dim))


@dataclass(frozen=True)
class Latent:
    """One row for every token, from which all heads' keys and values follow: [blocks, block size, width]."""

    width: int
    window: int | None = None
    fixed: None = None

    def rooms(self, blocks: int, block_size: int) -> tuple[Room, ...]:
        """The rows."""
        return (Room((blocks, block_size, self.width)),)


@dataclass(frozen=True)
class State:
    """A state of fixed size for each sequence: [slots, *shape] each. A step reads one slot and writes another."""

    shapes: tuple[tuple[int, ...], ...]
    #: Which of them are kept in float32 whatever the model's dtype.
    exact: tuple[bool, ...]
    window: int | None = None
    fixed: int = 2

    def rooms(self, blocks: int, block_size: int) -> tuple[Room, ...]:
        """One tensor for each shape."""
        return tuple(Room((blocks, *shape), exact) for shape, exact in zip(self.shapes, self.exact, strict=True))
