"""What a model takes of devices, and how fast they could be at most, from shapes alone. Knows no device but by data.

Nothing is allocated: a tree is described anew for each rank, parted as a real one is, and its tensors are made without
memory behind them (torch's `meta`).
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, prod
from pathlib import Path
from typing import Any

import torch

from bestiary import model, registry
from bestiary.architecture import Architecture
from bestiary.blocks import Adaptable, Decoder, Embedding, Head, Kept, Leaf, MoE, Pooler
from bestiary.cache import CacheGroup, store
from bestiary.checkpoint import ConfigFile
from bestiary.config import EngineConfig
from bestiary.errors import SettingError
from bestiary.parallel import Mesh
from bestiary_kernels.memory import free_memory

__all__ = ["Ceiling", "Device", "Plan", "Rank", "Shapes", "device", "devices", "rank_of", "weight_bytes"]

#: Splits that are tried: matrices are shared within one host, which seldom has more devices, and so many in all.
_HOST, _MOST = 8, 64


@dataclass(frozen=True)
class Device:
    """What a rank runs on. Bandwidth in bytes, arithmetic in operations of bfloat16 a second; None: not known."""

    name: str
    memory_bytes: int
    bandwidth: float | None
    bf16_flops: float | None
    source: str
    #: All ranks share it: a second one brings nothing.
    is_shared: bool = False

    def among(self, ranks: int) -> "Device":
        """What is left for each of so many ranks."""
        if not self.is_shared:
            return self
        bandwidth = None if self.bandwidth is None else self.bandwidth / ranks
        return replace(self, memory_bytes=self.memory_bytes // ranks, bandwidth=bandwidth)


def devices() -> dict[str, Device]:
    """The devices that core knows figures of, by name."""
    table: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("devices.json").read_text(encoding="utf-8"))
    return {name: Device(name, **figures) for name, figures in table.items()}


def device(name: str) -> Device:
    """A known device, or `cpu`: this machine. Raises SettingError, which lists the known ones."""
    if name == "cpu":
        free = free_memory(torch.device("cpu"))
        return Device("cpu", free, None, None, "free memory of this machine", is_shared=True)
    if (found := devices().get(name)) is None:
        known = ", ".join((*devices(), "cpu"))
        raise SettingError(
            f"device={name!r}: no figures are known for it; choose one of {known}, "
            "or describe it with --memory 80GiB --bandwidth 3.35TB/s"
        )
    return found


def weight_bytes(tree: Decoder, dtype: torch.dtype) -> int:
    """What a described tree's tensors will take, a tied head's once. The tree is of no other use afterwards."""
    return sum(leaf.nbytes(dtype) for _, leaf in model.leaves(tree))


@dataclass(frozen=True)
class Rank:
    """What one rank holds, and what it reads of that when every sequence grows by a token."""

    stage: int
    shard: int
    layers: range
    weight_bytes: int
    #: Read whole in every step.
    dense_bytes: int
    #: How many numbers these are.
    dense_numbers: int
    #: Read for each token: its rows of tables.
    row_bytes: int
    #: Bytes of all stacks of experts with (experts, chosen ones of them), and how many numbers these are.
    expert_bytes: Mapping[tuple[int, int], int]
    expert_numbers: Mapping[tuple[int, int], int]
    kept: tuple[Kept, ...]
    dtype: torch.dtype

    def weights_read(self, batch: float) -> float:
        """Bytes of weights that a step of so many sequences reads, where each token chooses experts at random."""
        stacks = sum(
            size * (1 - (1 - chosen / experts) ** batch) for (experts, chosen), size in self.expert_bytes.items()
        )
        return float(self.dense_bytes + self.row_bytes * batch + stacks)

    def flops(self, batch: float) -> float:
        """Operations of the products with weights; attention's own come on top."""
        chosen = sum(size * chosen / experts for (experts, chosen), size in self.expert_numbers.items())
        return 2 * batch * (self.dense_numbers + chosen)

    @property
    def token_bytes(self) -> int:
        """What one more token takes in the cache."""
        return store.bytes_per_token(self.kept, self.dtype)

    def cache_held(self, context: int, chunk: int, block_size: int) -> int:
        """Bytes of the blocks that a sequence of that length ever holds at once."""
        return sum(
            _room(layer, CacheGroup(0, *layer.kind).most_held(context, chunk, block_size), block_size, self.dtype)
            for layer in self.kept
        )

    def cache_read(self, context: int) -> int:
        """Bytes that a token after so many others reads; of a state, what is read and what is written."""
        return sum(_seen(layer, context, self.dtype) for layer in self.kept)


def _room(layer: Kept, blocks: int, block_size: int, dtype: torch.dtype) -> int:
    rooms = layer.rooms(blocks, block_size)
    return sum(prod(room.shape) * (torch.float32 if room.exact else dtype).itemsize for room in rooms)


def _seen(layer: Kept, context: int, dtype: torch.dtype) -> int:
    kind = layer.kind
    if kind.fixed is not None or kind.crossed is not None:
        return store.bytes_per_sequence([layer], dtype)
    return store.bytes_per_token([layer], dtype) * min(context, kind.window or context)


@dataclass(frozen=True)
class Ceiling:
    """Tokens a second that no engine can exceed with so many sequences of full length. Bytes are the slowest rank's."""

    batch: int
    weight_bytes: int
    cache_bytes: int
    tokens_per_second: float
    #: What arithmetic would allow; None where the device's speed is not known.
    arithmetic_tokens_per_second: float | None


@dataclass(frozen=True)
class Plan:
    """A model on the ranks of one split, for sequences of one length."""

    ranks: tuple[Rank, ...]
    stages: int
    #: What each rank has.
    device: Device
    usable_bytes: int
    context: int
    #: Cache bytes of one sequence, by rank.
    held: tuple[int, ...]

    @property
    def shards(self) -> int:
        """Ranks of a stage."""
        return len(self.ranks) // self.stages

    def room(self, rank: int) -> int:
        """Bytes beside the weights; below 0 where these alone do not fit."""
        return self.usable_bytes - self.ranks[rank].weight_bytes

    @property
    def largest_batch(self) -> int:
        """Sequences of full length that every rank has room for; 0: not one, or the weights do not fit."""
        return min(max(0, self.room(i)) // max(1, held) for i, held in enumerate(self.held))

    def fits(self, batch: int) -> bool:
        """Every rank has room for its weights and its cache of so many sequences."""
        return all(self.room(i) >= held * batch for i, held in enumerate(self.held))

    def ceiling(self, batch: int) -> Ceiling | None:
        """None where the bandwidth is not known.

        As many groups are on their way as there are stages, if there are as many sequences: a stage has one group at
        a time, and a group is in one stage at a time.
        """
        if self.device.bandwidth is None:
            return None
        groups = min(self.stages, batch)
        each = batch / groups
        read = [rank.weights_read(each) + rank.cache_read(self.context) * each for rank in self.ranks]
        slowest = self.ranks[max(range(len(read)), key=read.__getitem__)]
        speed = self.device.bf16_flops
        return Ceiling(
            batch,
            round(slowest.weights_read(each)),
            round(slowest.cache_read(self.context) * each),
            batch / self._cycle([one / self.device.bandwidth for one in read], groups),
            batch / self._cycle([rank.flops(each) / speed for rank in self.ranks], groups) if speed else None,
        )

    def _cycle(self, times: Sequence[float], groups: int) -> float:
        """Seconds until every group has moved on by a token, from what a group takes on each rank."""
        stages = [max(times[first : first + self.shards]) for first in range(0, len(times), self.shards)]
        return max(sum(stages), groups * max(stages))


class Shapes:
    """A model that is only described, to be split in any way."""

    def __init__(self, file: ConfigFile, config: EngineConfig) -> None:
        self.file, self.config = file, config
        self.architecture: Architecture = registry.resolve(file.architectures, prefer=config.plugin)
        self.tree = self._described()
        self.dtype = model.choose_dtype(config.dtype, file)

    @property
    def pools(self) -> bool:
        """The model answers with vectors, and so never decodes."""
        return isinstance(self.tree.head, Pooler)

    @property
    def weight_bytes(self) -> int:
        """What the whole model takes in memory, once."""
        return weight_bytes(self._described(), self.dtype)

    def _described(self) -> Decoder:
        tree = model.describe(self.architecture, self.file).tree
        model.quantise(tree, self.config.quantization)
        return tree

    def rank(self, mesh: Mesh, *, here: bool = False) -> Rank:
        """What a rank of a split has; `here`: on this machine's CPU. SettingError where heads cannot be shared."""
        return rank_of(self._described(), mesh, self.dtype, here=here)

    def plan(self, on: Device, shards: int, stages: int, context: int) -> Plan:
        """The split over `stages` of `shards` each. Raises SettingError or CapabilityMissing where it cannot be."""
        self._check(shards, stages, context)
        meshes = (Mesh.at(rank, stages, shards, Mesh().link) for rank in range(stages * shards))
        ranks = tuple(self.rank(mesh, here=on.is_shared) for mesh in meshes)
        return self._plan(on, ranks, stages * shards, stages, context)

    def _check(self, shards: int, stages: int, context: int) -> None:
        registry.require(self.architecture, tensor=shards > 1, pipeline=stages > 1)
        count = self.tree.layers.count
        if stages > count:
            raise SettingError(f"pipeline_parallel_size={stages}: the model has {count} layers; choose at most {count}")
        if context > self.tree.context:
            raise SettingError(f"context={context}: the model was made for {self.tree.context} tokens")

    def _plan(self, on: Device, ranks: tuple[Rank, ...], world: int, stages: int, context: int) -> Plan:
        on = on.among(world)
        share = 1.0 if on.is_shared else self.config.gpu_memory_utilization
        chunk, block_size = self.config.max_num_batched_tokens, self.config.block_size
        held = tuple(rank.cache_held(context, chunk, block_size) for rank in ranks)
        return Plan(ranks, stages, on, int(on.memory_bytes * share), context, held)

    def smallest_split(self, on: Device, context: int, batch: int = 1) -> tuple[int, int] | None:
        """(shards, stages) with the fewest devices that hold so many sequences, of those the one with most shards."""
        if on.is_shared:
            return (1, 1) if self._fits(on, 1, 1, context, batch) else None
        least = self.weight_bytes / (on.memory_bytes * self.config.gpu_memory_utilization)
        splits = (split for world in range(max(1, ceil(least)), _MOST + 1) for split in self._splits(world))
        return next((split for split in splits if self._fits(on, *split, context, batch)), None)

    def _splits(self, world: int) -> Iterator[tuple[int, int]]:
        for shards in range(min(world, _HOST), 0, -1):
            stages = world // shards
            can = (shards == 1 or self.architecture.tensor) and (stages == 1 or self.architecture.pipeline)
            if world % shards == 0 and can and stages <= self.tree.layers.count:
                yield shards, stages

    def _fits(self, on: Device, shards: int, stages: int, context: int, batch: int) -> bool:
        """Whether the first shard of each stage does, which has the largest share."""
        try:
            ranks = (self.rank(Mesh(stage, stages, 0, shards)) for stage in range(stages))
            return all(self._plan(on, (rank,), shards * stages, 1, context).fits(batch) for rank in ranks)
        except SettingError:
            return False  # the heads cannot be shared out like that


def rank_of(tree: Decoder, mesh: Mesh, dtype: torch.dtype, *, here: bool = False) -> Rank:
    """What a rank has of a described tree, which is of no other use afterwards.

    Memory is needed as the checkpoint has the weights, since they are laid out only once they are there. What a step
    reads of them is less on this machine's CPU (`here`), where they are squeezed.
    """
    model.part(tree, mesh)
    dense, numbers, rows = 0, 0, 0
    experts, expert_numbers = dict[tuple[int, int], int](), dict[tuple[int, int], int]()
    weights = sum(leaf.nbytes(dtype) for _, leaf in model.leaves(tree))
    for path, leaf in model.leaves(tree):
        if _is_read_once(path, leaf) or leaf.stack:
            continue
        if isinstance(leaf, Embedding) and not (path == "embed" and _is_tied_here(tree)):
            rows += leaf.width * dtype.itemsize
        else:
            dense += leaf.bytes_read(dtype) if here else leaf.nbytes(dtype)
            numbers += sum(map(prod, leaf.held().values()))
    for path, moe in tree.named_modules():
        if not isinstance(moe, MoE) or path.startswith("encoder."):
            continue
        stacks, key = (moe.gate_up, moe.down), (moe.gate_up.stack, moe.routing.top_k)
        size = moe.bytes_read(dtype) if here else sum(stack.nbytes(dtype) for stack in stacks)
        experts[key] = experts.get(key, 0) + size
        expert_numbers[key] = expert_numbers.get(key, 0) + sum(prod(stack.held()["weight"]) for stack in stacks)
    layers, kept = mesh.layers_of(tree.layers.count), tuple(model.keeps(tree))
    place = mesh.stage, mesh.shard, layers
    return Rank(*place, weights, dense, numbers, rows, experts, expert_numbers, kept, dtype)


def _is_read_once(path: str, leaf: Leaf) -> bool:
    """It serves what a prompt brings, and no token after it."""
    return path.startswith("encoder.") or (isinstance(leaf, Adaptable) and leaf.over == "vectors")


def _is_tied_here(tree: Decoder) -> bool:
    """The table is this rank's head too."""
    return tree.is_last and isinstance(tree.head, Head) and tree.head.tied
