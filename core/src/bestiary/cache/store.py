"""The tensors behind the blocks, and how many blocks the machine has room for. Knows layers by what they keep."""

from collections.abc import Sequence
from math import prod
from mmap import mmap
from pathlib import Path

import torch
from torch import Tensor

from bestiary.blocks import PagedKV
from bestiary.config import EngineConfig
from bestiary.errors import SettingError

__all__ = ["allocate", "bytes_per_token", "fit_length", "free_memory", "num_blocks"]

#: The part of a CPU machine's free memory that the cache takes where nothing else is asked. Pages cost nothing until
#: they are written, so this is a limit and not what is used.
_CPU_SHARE = 0.25


def bytes_per_token(kept: Sequence[PagedKV], dtype: torch.dtype) -> int:
    """What one token takes in all layers."""
    return sum(layer.bytes_per_token(dtype.itemsize) for layer in kept)


def num_blocks(config: EngineConfig, token_bytes: int, longest: int, device: torch.device) -> int:
    """Blocks of the cache: what was asked for, else what fits, and never more than all seats could fill."""
    if config.num_gpu_blocks_override is not None:
        return config.num_gpu_blocks_override
    size = config.kv_cache_memory_bytes or _share_of_free(config, device)
    block_bytes = max(token_bytes, 1) * config.block_size
    useful = config.max_num_seqs * -(-longest // config.block_size)
    blocks = min(size // block_bytes, useful)
    if blocks < 1:
        raise SettingError(
            f"the cache would have {size} bytes, and one block takes {block_bytes}: "
            "raise kv_cache_memory_bytes, or free memory on the device"
        )
    return blocks


def fit_length(config: EngineConfig, context: int, blocks: int) -> int:
    """The longest context that can be served: what was asked for, if it fits, else what model and cache allow."""
    room = blocks * config.block_size
    if config.max_model_len is None:
        return min(context, room)
    if config.max_model_len > context:
        raise SettingError(f"max_model_len={config.max_model_len}: the model was made for {context} tokens")
    if config.max_model_len > room:
        raise SettingError(
            f"max_model_len={config.max_model_len}: the cache holds {room} tokens; "
            "lower it, or raise kv_cache_memory_bytes"
        )
    return config.max_model_len


def allocate(
    kept: Sequence[PagedKV], blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of every layer, [blocks, heads, block size, head size] each, zeroed."""

    def room(layer: PagedKV, dim: int) -> Tensor:
        return _zeros((blocks, layer.heads, block_size, dim), dtype, device)

    return [(room(layer, layer.k_dim), room(layer, layer.v_dim)) for layer in kept]


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
