"""Where this process stands among those that share one model, and how it speaks with them. Knows no model.

Ranks form a grid: `stages` of a pipeline, each of which has its layers on `shards` that share every matrix. Rank
r stands at stage r // shards and shard r % shards.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from bestiary.errors import EngineError, SettingError

__all__ = ["Alone", "Link", "Mesh", "StageFailed", "scaled"]


class StageFailed(EngineError):
    """An earlier stage of the pipeline could not do its part of a step, and says why itself."""


class Link(Protocol):
    """How ranks exchange tensors. Every rank of a group calls the same methods in the same order."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over the shards of this stage; `x` may be overwritten with it."""

    def gather(self, x: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """Every shard's tensor, of these shapes, on the stage's first shard; on the others nothing."""

    def send(self, x: Tensor) -> None:
        """To the same shard of the next stage. Contiguous."""

    def receive(self, into: Tensor) -> None:
        """From the same shard of the stage before."""


class Alone:
    """The link of a rank that has no company: nothing to exchange."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """The only addend."""
        return x

    def gather(self, x: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """The only part."""
        return [x]

    def send(self, x: Tensor) -> None:
        """There is no next stage."""
        raise EngineError("a rank alone has nobody to send to")

    def receive(self, into: Tensor) -> None:
        """There is no stage before."""
        raise EngineError("a rank alone has nobody to hear from")


@dataclass(frozen=True)
class Mesh:
    """The place of this rank. One process alone is the first and the last stage at once, and has the only shard."""

    stage: int = 0
    stages: int = 1
    shard: int = 0
    shards: int = 1
    link: Link = field(default_factory=Alone, compare=False)

    @classmethod
    def at(cls, rank: int, stages: int, shards: int, link: Link) -> "Mesh":
        """The place of a rank by its number."""
        return cls(rank // shards, stages, rank % shards, shards, link)

    @property
    def is_alone(self) -> bool:
        """Nobody else has a part of the model."""
        return self.stages == self.shards == 1

    @property
    def is_first(self) -> bool:
        """This rank embeds the tokens."""
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        """This rank makes the logits."""
        return self.stage == self.stages - 1

    @property
    def answers(self) -> bool:
        """This rank chooses the tokens."""
        return self.is_last and self.shard == 0

    def layers_of(self, count: int) -> range:
        """Which of `count` layers this stage keeps."""
        return _even(count, self.stage, self.stages)

    def share(self, count: int) -> range:
        """Which of `count` things, that need no company, this shard keeps."""
        return _even(count, self.shard, self.shards)

    def shares(self, count: int) -> list[range]:
        """What each shard keeps of them."""
        return [_even(count, shard, self.shards) for shard in range(self.shards)]

    def heads(self, heads: int, kv_heads: int) -> tuple[range, range]:
        """This shard's query heads, and the heads of keys and values that they share.

        Where there are fewer of the latter than shards, several shards keep the same one. Raises SettingError where
        they cannot be shared out evenly.
        """
        divides = heads % self.shards == 0 and (kv_heads % self.shards == 0 or self.shards % kv_heads == 0)
        if not divides:
            possible = [n for n in range(1, heads + 1) if heads % n == 0 and (kv_heads % n == 0 or n % kv_heads == 0)]
            raise SettingError(
                f"tensor_parallel_size={self.shards}: a layer has {heads} heads over {kv_heads} of keys and values, "
                f"which {self.shards} cannot share evenly; choose one of {', '.join(map(str, possible))}"
            )
        own = self.share(heads)
        if kv_heads >= self.shards:
            return own, self.share(kv_heads)
        head = self.shard * kv_heads // self.shards
        return own, range(head, head + 1)

    def send(self, *tensors: Tensor) -> None:
        """Pass what this stage made on to the next."""
        self._flag(True)
        for tensor in tensors:
            self.link.send(tensor.contiguous())

    def send_failure(self) -> None:
        """Tell the next stage that there is nothing to wait for."""
        if not self.is_last:
            self._flag(False)

    def receive(self, *tensors: Tensor) -> None:
        """Fill tensors with what the stage before sends. Raises StageFailed where it has nothing."""
        flag = torch.empty(1, dtype=torch.int32, device=tensors[0].device)
        self.link.receive(flag)
        if not bool(flag):
            raise StageFailed(f"stage {self.stage - 1} of the pipeline failed")
        for tensor in tensors:
            self.link.receive(tensor)

    def _flag(self, good: bool) -> None:
        self.link.send(torch.tensor([int(good)], dtype=torch.int32))


def scaled(units: range, size: int) -> range:
    """The rows of contiguous units, as heads, of so many rows each."""
    return range(units.start * size, units.stop * size)


def _even(count: int, place: int, places: int) -> range:
    """Contiguous shares; the first take what does not divide."""
    base, extra = divmod(count, places)
    first = place * base + min(place, extra)
    return range(first, first + base + (place < extra))
