"""Tensors between processes over torch.distributed: gloo between CPUs, NCCL between GPUs. Knows no model."""

import socket
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Meeting", "TorchLink", "join"]

#: After so long ranks do not wait for each other any more; the driver has noticed by then.
_PATIENCE = timedelta(minutes=30)
#: Bytes up to which gloo's ring, 4 n (n - 1) messages for n ranks, is slower than sending it all to all.
_SMALL = 1 << 16


class TorchLink:
    """One rank's ends: a group with the other shards of its stage, and lines to the stages beside it."""

    def __init__(self, rank: int, stages: int, shards: int, device: torch.device) -> None:
        # Every rank makes every group, in one order.
        groups = [dist.new_group([stage * shards + shard for shard in range(shards)]) for stage in range(stages)]
        self._rank, self._shards, self._device = rank, shards, device
        self._group = groups[rank // shards]
        self._first = rank - rank % shards

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum: in place, or, where a ring's many small messages would take longer, of everybody's own."""
        x = x.contiguous()
        if x.is_cuda or x.nbytes > _SMALL:
            dist.all_reduce(x, group=self._group)
            return x
        parts = [torch.empty_like(x) for _ in range(self._shards)]
        dist.all_gather(parts, x, group=self._group)
        return torch.stack(parts).sum(0)  # in the order of the shards, so that each finds the same

    def gather(self, x: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """Line by line, since the parts are of different sizes."""
        if self._rank != self._first:
            dist.send(x.contiguous(), self._first)
            return []
        parts = [x]
        for shard in range(1, self._shards):
            parts.append(torch.empty(shapes[shard], dtype=x.dtype, device=x.device))
            dist.recv(parts[-1], self._first + shard)
        return parts

    def send(self, x: Tensor) -> None:
        """Wait until it is taken."""
        dist.send(x.to(self._device), self._rank + self._shards)

    def receive(self, into: Tensor) -> None:
        """Wait until it is there."""
        dist.recv(into, self._rank - self._shards)


class Meeting:
    """Where ranks of several hosts find each other: at an address of this one, and at no other."""

    def __init__(self, address: str) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        listener = socket.create_server((address, 0), family=family)
        port = listener.getsockname()[1]
        self.address = f"tcp://{address}:{port}"
        # The store takes the socket over.
        self._store: Any = dist.TCPStore(  # type: ignore[attr-defined]
            address, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
        )

    def close(self) -> None:
        """Nobody can come any more."""
        self._store = None


def join(meeting: str, rank: int, stages: int, shards: int, device: torch.device) -> TorchLink:
    """Meet the other ranks: at a file of this host, or at a Meeting's `tcp://host:port`."""
    world = stages * shards
    if meeting.startswith("tcp://"):
        host, _, port = meeting.removeprefix("tcp://").rpartition(":")
        store: Any = dist.TCPStore(  # type: ignore[attr-defined]
            host, int(port), is_master=False, wait_for_workers=False, timeout=_PATIENCE
        )
    else:
        store = dist.FileStore(str(Path(meeting)), world)  # type: ignore[attr-defined]
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=_PATIENCE)
    return TorchLink(rank, stages, shards, device)
