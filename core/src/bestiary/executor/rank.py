"""The program of a worker process: `python -m bestiary.executor.rank SOCKET`, started by the driver and by nobody else.

SOCKET is the number of an inherited socket.
"""

import gc
import os
import socket
import sys

import torch

from bestiary.executor import link, wire
from bestiary.executor.frames import WorkerChannel
from bestiary.executor.worker import serve
from bestiary.model import choose_device

__all__ = ["main"]


def main(connection: socket.socket) -> None:
    """Serve until the driver is gone."""
    # What is imported stays: to look through it all for what nobody needs would hold a step up for a tenth of a second.
    gc.collect()
    gc.freeze()
    serve(WorkerChannel(connection, _end), _join)


def _end() -> None:
    os._exit(0)  # the main thread may wait for another rank that is gone too


def _join(command: wire.Load) -> link.TorchLink:
    stages, shards = (int(command.config[f"{kind}_parallel_size"]) for kind in ("pipeline", "tensor"))
    device = choose_device(str(command.config["device"]))
    if device.type == "cuda":
        device = torch.device("cuda", command.rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    return link.join(command.meeting, command.rank, stages, shards, device)


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])))
