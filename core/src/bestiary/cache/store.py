"""The tensors behind the blocks, and how many blocks the machine has room for. Knows layers by what they keep.

Memory is shared out so that each group has room for as many sequences of full length as the others.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from math import prod
from mmap import mmap

import torch
from torch import Tensor

from bestiary.blocks import Kept, Kind
from bestiary.blocks.kept import Room
from bestiary.cache.groups import CacheGroup, longest
from bestiary.config import EngineConfig
from bestiary.errors import SettingError
from bestiary_kernels.memory import free_memory, zeros

__all__ = ["allocate", "bytes_per_sequence", "bytes_per_token", "fit_length", "groups"]

#: The part of a CPU machine's free memory that the cache takes where nothing else is asked. Pages cost nothing until
#: they are written, so this is a limit and not what is used.
_CPU_SHARE = 0.25
#: Bytes of a line of memory: where a tensor's blocks begin.
_LINE = 64


def bytes_per_token(kept: Sequence[Kept], dtype: torch.dtype) -> int:
    """What one token takes in all layers that keep tokens."""
    return sum(_block_bytes(layer, 1, dtype) for layer in kept if layer.kind == Kind(layer.kind.window))


def bytes_per_sequence(kept: Sequence[Kept], dtype: torch.dtype) -> int:
    """What one sequence takes, however long it is, in all layers that keep a state or what it looks at."""
    return sum(_block_bytes(layer, 1, dtype) * (layer.kind.fixed or layer.kind.crossed or 0) for layer in kept)


def _block_bytes(layer: Kept, block_size: int, dtype: torch.dtype) -> int:
    return sum(prod(room.shape) * _dtype_of(room, dtype).itemsize for room in layer.rooms(1, block_size))


def groups(
    config: EngineConfig,
    kept: Sequence[Kept],
    kinds: Sequence[Kind],
    dtype: torch.dtype,
    length: int,
    device: torch.device,
) -> tuple[CacheGroup, ...]:
    """The groups with their blocks: what was asked for, else what fits, and never more than all seats could fill.

    `kinds` are the groups, `length` is the longest sequence. Raises SettingError where there is no room for a block.
    """
    seats, chunk, size = config.max_num_seqs, config.max_num_batched_tokens, config.block_size
    plain = [CacheGroup(0, *kind) for kind in kinds]
    held = [group.most_held(length, chunk, size) for group in plain]
    if config.num_gpu_blocks_override is not None:
        override = config.num_gpu_blocks_override
        return tuple(
            replace(group, num_blocks=seats * count if group.is_constant else override)
            for group, count in zip(plain, held, strict=True)
        )
    layers = [[layer for layer in kept if layer.kind == kind] for kind in kinds]
    block_bytes = [sum(_block_bytes(layer, size, dtype) for layer in some) for some in layers]
    memory = config.kv_cache_memory_bytes or _share_of_free(config, device)
    whole = sum(count * each for count, each in zip(held, block_bytes, strict=True))
    found = [min(memory * count // max(whole, 1), seats * count) for count in held]
    if any(blocks < (group.fixed or 1) for blocks, group in zip(found, plain, strict=True)):
        raise SettingError(
            f"the cache would have {memory} bytes, and one block takes {sum(block_bytes)}: "
            "raise kv_cache_memory_bytes, or free memory on the device"
        )
    return tuple(replace(group, num_blocks=blocks) for group, blocks in zip(plain, found, strict=True))


def fit_length(config: EngineConfig, context: int, found: Sequence[CacheGroup]) -> int:
    """The longest context that can be served: what was asked for, if it fits, else what model and cache allow."""
    wanted = context if config.max_model_len is None else config.max_model_len
    if wanted > context:
        raise SettingError(f"max_model_len={wanted}: the model was made for {context} tokens")
    room = longest(found, config.max_num_batched_tokens, config.block_size, wanted)
    if config.max_model_len is not None and room < wanted:
        raise SettingError(
            f"max_model_len={wanted}: the cache holds {room} tokens; lower it, or raise kv_cache_memory_bytes"
        )
    return room


def allocate(
    kept: Sequence[Kept],
    kinds: Sequence[Kind],
    found: Sequence[CacheGroup],
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> list[tuple[Tensor, ...]]:
    """The tensors of every layer, zeroed; on a CPU an unused cache costs nothing."""
    group_of = [kinds.index(layer.kind) for layer in kept]
    rooms = [layer.rooms(found[g].num_blocks, block_size) for g, layer in zip(group_of, kept, strict=True)]
    if device.type != "cpu":
        return [
            tuple(torch.zeros(room.shape, dtype=_dtype_of(room, dtype), device=device) for room in some)
            for some in rooms
        ]
    made: list[list[Tensor]] = [[] for _ in kept]
    for g in dict.fromkeys(group_of):
        own = [(place, room) for place, some in enumerate(rooms) if group_of[place] == g for room in some]
        lay_out = _beside if kinds[g].fixed is None else _dense
        for (place, _), tensor in zip(own, lay_out([room for _, room in own], dtype), strict=True):
            made[place].append(tensor)
    return [tuple(tensors) for tensors in made]


def _dtype_of(room: Room, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if room.exact else dtype


def _dense(rooms: Sequence[Room], dtype: torch.dtype) -> list[Tensor]:
    """Zeros, each room for itself, since kernels want the slots of states dense; few of them may ever be used."""
    dtypes = [_dtype_of(room, dtype) for room in rooms]
    return [
        torch.frombuffer(mmap(-1, prod(room.shape) * of.itemsize), dtype=of).view(room.shape)
        for room, of in zip(rooms, dtypes, strict=True)
    ]


def _beside(rooms: Sequence[Room], dtype: torch.dtype) -> list[Tensor]:
    """Zeros, of which one block of every room lies beside the others: what is touched first is close together.

    So large pages hold little that is not used, and a step looks up few of them.
    """
    blocks = rooms[0].shape[0]
    dtypes = [_dtype_of(room, dtype) for room in rooms]
    sizes = [prod(room.shape[1:]) * of.itemsize for room, of in zip(rooms, dtypes, strict=True)]
    *starts, stride = accumulate((-(-size // _LINE) * _LINE for size in sizes), initial=0)
    memory = torch.frombuffer(zeros(blocks * stride), dtype=torch.uint8).view(blocks, stride)
    return [
        memory[:, start : start + size].view(of).view(room.shape)
        for room, of, start, size in zip(rooms, dtypes, starts, sizes, strict=True)
    ]


def _share_of_free(config: EngineConfig, device: torch.device) -> int:
    """A GPU is ours to fill; a CPU machine has other tenants."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return max(0, int(free - (1 - config.gpu_memory_utilization) * total))
    return int(free_memory(device) * _CPU_SHARE)
