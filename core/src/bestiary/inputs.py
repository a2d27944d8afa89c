"""What a prompt brings beside its tokens: items, which an encoder turns into vectors, and where those go.

Knows no model, no engine, and nothing of how an item was decoded.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import TYPE_CHECKING, Self

from bestiary.errors import ConfigUnsupported, RequestError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["NOTHING", "Inputs", "Item", "Look", "Piece", "Span", "place", "share_out"]


@dataclass(frozen=True, slots=True, eq=False)
class Item:
    """One image, video, recording or text for an encoder."""

    modality: str
    #: What the model's encoder takes; or, under "embeddings", ready vectors [num_vectors, width].
    tensors: Mapping[str, "Tensor"]
    num_vectors: int
    #: Of everything that the vectors depend on: two items with one digest are the same.
    digest: bytes

    @classmethod
    def of(cls, modality: str, tensors: Mapping[str, "Tensor"], num_vectors: int) -> Self:
        """With the digest of the tensors: their names, dtypes, shapes and bytes."""
        import torch

        hasher = sha256(modality.encode())
        for name in sorted(tensors):
            tensor = tensors[name].detach().cpu().contiguous()
            hasher.update(f"\0{name}\0{tensor.dtype}{tuple(tensor.shape)}\0".encode())
            hasher.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        return cls(modality, tensors, num_vectors, hasher.digest())


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """What a prompt's tokens are where an item stands, and which of them take its vectors."""

    item: Item
    token_ids: Sequence[int]
    takes: tuple[bool, ...]

    @classmethod
    def filled(cls, item: Item, token: int) -> Self:
        """The same token once for each of the item's vectors."""
        return cls(item, (token,) * item.num_vectors, (True,) * item.num_vectors)


@dataclass(frozen=True, slots=True, eq=False)
class Span:
    """Where an item stands in the prompt. `takes` says for each of its tokens whether a vector replaces it."""

    item: Item
    start: int
    takes: tuple[bool, ...]

    @property
    def end(self) -> int:
        """The place of the first token after it."""
        return self.start + len(self.takes)

    def between(self, start: int, end: int) -> tuple[list[int], range]:
        """Of the tokens `start` to `end` of the prompt, the places that take a vector, and which vectors these are."""
        first, last = max(start, self.start) - self.start, min(end, self.end) - self.start
        if last <= first:
            return [], range(0)
        places = [self.start + i for i in range(first, last) if self.takes[i]]
        before = sum(self.takes[:first])
        return places, range(before, before + len(places))


@dataclass(frozen=True, slots=True)
class Look:
    """From the token `start` of a prompt on, a token looks at the vectors `first` to before `end` of those crossed."""

    start: int
    first: int
    end: int
    #: Whether a layer goes on with what it made of looking; some models look, and then think nothing of it.
    heeds: bool = True


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """Everything that a prompt brings beside its tokens."""

    #: Items that stand among the tokens, in order.
    spans: Sequence[Span] = ()
    #: Items that layers look at, beside the tokens.
    crossed: Sequence[Item] = ()
    #: Which of their vectors each token looks at, by where that begins to hold, from token 0 on; none: all at all.
    looks: Sequence[Look] = ()
    #: Tokens at the prompt's start that see each other both ways; they are computed in one step.
    prefix: int = 0
    #: [axes, prompt tokens] int64 positions for a rotation by several axes; None: one axis, that counts tokens.
    axes: "Tensor | None" = field(default=None)
    #: What is added to a token's place, beyond the prompt, to give its position on every axis.
    shift: int = 0

    def ends_before(self, place: int) -> bool:
        """Tokens from `place` on are embedded and placed as if there were nothing but tokens.

        If there is more to look at, they all look at `num_seen` vectors, and go on with what they made of it.
        """
        last = self.looks[-1] if self.looks else Look(0, 0, 0)
        num_axes = 0 if self.axes is None else self.axes.shape[1]
        ends = (self.prefix, num_axes, last.start, *(span.end for span in self.spans))
        return place >= max(ends) and last.first == 0 and last.heeds

    @property
    def num_seen(self) -> int:
        """How many vectors, from the first on, a token beyond the prompt looks at."""
        return self.looks[-1].end if self.looks else self.num_crossed

    @property
    def num_crossed(self) -> int:
        """Vectors that layers look at beside the tokens."""
        return sum(item.num_vectors for item in self.crossed)

    @property
    def items(self) -> list[Item]:
        """All of them."""
        return [*(span.item for span in self.spans), *self.crossed]


NOTHING = Inputs()


def place(token_ids: Sequence[int], pieces: Mapping[tuple[str, int], Sequence[Piece]]) -> tuple[list[int], list[Span]]:
    """A prompt whose placeholders, in order, are replaced by pieces, which are given by (modality, placeholder).

    Raises RequestError where there are more placeholders than items, or fewer.
    """
    waiting = {token: list(reversed(found)) for (_, token), found in pieces.items()}
    if len(waiting) < len(pieces):
        raise ConfigUnsupported(f"one placeholder stands for several modalities: {', '.join(map(str, pieces))}")
    for modality, token in pieces:
        placeholders, items = sum(1 for found in token_ids if found == token), len(waiting[token])
        if placeholders != items:
            raise RequestError(
                f"it has {placeholders} placeholders (token {token}) for {items} of {modality}: "
                "write one where each of them stands"
            )
    placed: list[int] = []
    spans: list[Span] = []
    for token in token_ids:
        if token not in waiting:
            placed.append(token)
            continue
        piece = waiting[token].pop()
        spans.append(Span(piece.item, len(placed), piece.takes))
        placed.extend(piece.token_ids)
    return placed, spans


def share_out(vectors: "Tensor", counts: Sequence[int]) -> "list[Tensor]":
    """Each item's own vectors, where those of all items lie one after the other.

    Raises RequestError where there are more or fewer than the items have.
    """
    if sum(counts) != len(vectors) or min(counts, default=1) < 1:
        raise RequestError(f"there are {len(vectors)} ready embeddings for items of {list(counts)}: give as many")
    return list(vectors.split_with_sizes(list(counts)))
