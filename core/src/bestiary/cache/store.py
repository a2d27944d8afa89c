"""The tensors behind the blocks, and how many blocks the machine has room for. Knows layers by what they keep.

Memory is shared out so that each group has room for as many sequences of full length as the others.
"""

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from mmap import mmap
from pathlib import Path

import torch
from torch import Tensor

from bestiary.blocks import Kept, Kind
from bestiary.cache.groups import CacheGroup, longest
from bestiary.config import EngineConfig
from bestiary.errors import SettingError

__all__ = ["allocate", "bytes_per_sequence", "bytes_per_token", "fit_length", "free_memory", "groups"]

#: The part of a CPU machine's free memory that the cache takes where nothing else is asked. Pages cost nothing until
#: they are written, so this is a limit and not what is used.
_CPU_SHARE = 0.25


def bytes_per_token(kept: Sequence[Kept], dtype: torch.dtype) -> int:
    """What one token takes in all layers that keep tokens."""
    return sum(_block_bytes(layer, 1, dtype) for layer in kept if layer.kind == Kind(layer.kind.window))


def bytes_per_sequence(kept: Sequence[Kept], dtype: torch.dtype) -> int:
    """What one sequence takes, however long it is, in all layers that keep a state or what it looks at."""
    return sum(_block_bytes(layer, 1, dtype) * (layer.kind.fixed or layer.kind.crossed or 0) for layer in kept)


def _block_bytes(layer: Kept, block_size: int, dtype: torch.dtype) -> int:
    itemsize = {False: dtype.itemsize, True: torch.float32.itemsize}
    return sum(prod(room.shape) * itemsize[room.exact] for room in layer.rooms(1, block_size))


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
    """The tensors of every layer, zeroed."""

    def tensors(layer: Kept) -> tuple[Tensor, ...]:
        blocks = found[kinds.index(layer.kind)].num_blocks
        rooms = layer.rooms(blocks, block_size)
        return tuple(_zeros(room.shape, torch.float32 if room.exact else dtype, device) for room in rooms)

    return [tensors(layer) for layer in kept]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on a CPU a page comes from the system when it is first written, so an unused cache costs nothing."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.frombuffer(mmap(-1, prod(shape) * dtype.itemsize), dtype=dtype).view(shape)


def free_memory(device: torch.device) -> int:
    """Bytes that can still be had on the device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    meminfo = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return int(meminfo["MemAvailable"].split()[0]) * 1024


def _share_of_free(config: EngineConfig, device: torch.device) -> int:
    """A GPU is ours to fill; a CPU machine has other tenants."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return max(0, int(free - (1 - config.gpu_memory_utilization) * total))
    return int(free_memory(device) * _CPU_SHARE)
