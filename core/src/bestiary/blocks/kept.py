"""What a token mixer keeps between steps, as data. The cache makes room for it; the mixer finds it in the batch."""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

__all__ = ["Crossed", "Kept", "Kind", "Latent", "PagedKV", "Room", "State"]


class Kind(NamedTuple):
    """How much of a pool of blocks a sequence takes. Layers of one kind share a table."""

    #: How many tokens back a token sees, itself included; None: all.
    window: int | None = None
    #: Blocks that a sequence takes however long it is; None: as many as its tokens fill.
    fixed: int | None = None
    #: Most vectors of another input that a sequence looks at, where these are kept and not its own tokens.
    crossed: int | None = None


@dataclass(frozen=True)
class Room:
    """One tensor of a cache: its first dimension counts blocks."""

    shape: tuple[int, ...]
    #: Kept in float32 whatever the model's dtype, since it is added to over and over.
    exact: bool = False


class Kept(Protocol):
    """What a layer keeps."""

    @property
    def kind(self) -> Kind:
        """How much of it a sequence takes."""

    def rooms(self, blocks: int, block_size: int) -> tuple[Room, ...]:
        """The tensors of a pool of that many blocks."""


@dataclass(frozen=True)
class PagedKV:
    """Keys and values of every token, in blocks: [blocks, heads, block size, head size] each."""

    heads: int
    k_dim: int
    v_dim: int
    window: int | None = None

    @property
    def kind(self) -> Kind:
        """As many blocks as the tokens fill that can still be seen."""
        return Kind(window=self.window)

    def rooms(self, blocks: int, block_size: int) -> tuple[Room, ...]:
        """Keys, and values."""
        return tuple(Room((blocks, self.heads, block_size, dim)) for dim in (self.k_dim, self.v_dim))


@dataclass(frozen=True)
class Crossed:
    """Keys and values of what a sequence looks at beside its own tokens, written once: as those of `PagedKV`."""

    heads: int
    dim: int
    most: int

    @property
    def kind(self) -> Kind:
        """As many blocks as the vectors fill."""
        return Kind(crossed=self.most)

    def rooms(self, blocks: int, block_size: int) -> tuple[Room, ...]:
        """Keys, and values."""
        return (Room((blocks, self.heads, block_size, self.dim)),) * 2


@dataclass(frozen=True)
class Latent:
    """One row for every token, from which all heads' keys and values follow: [blocks, block size, width]."""

    width: int

    @property
    def kind(self) -> Kind:
        """As many blocks as the tokens fill."""
        return Kind()

    def rooms(self, blocks: int, block_size: int) -> tuple[Room, ...]:
        """The rows."""
        return (Room((blocks, block_size, self.width)),)


@dataclass(frozen=True)
class State:
    """A state of fixed size for each sequence: [slots, *shape] each. A step reads one slot and writes another."""

    shapes: tuple[tuple[int, ...], ...]
    #: Which of them are kept in float32 whatever the model's dtype.
    exact: tuple[bool, ...]

    @property
    def kind(self) -> Kind:
        """Two slots."""
        return Kind(fixed=2)

    def rooms(self, blocks: int, block_size: int) -> tuple[Room, ...]:
        """One tensor for each shape."""
        return tuple(Room((blocks, *shape), exact) for shape, exact in zip(self.shapes, self.exact, strict=True))
