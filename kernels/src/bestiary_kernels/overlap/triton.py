"""Kernels of Triton that begin while the one before ends: CUDA's programmatic dependent launch.

Between two kernels a GPU stands still for about half a microsecond, and a kernel takes some more until its first
numbers are there; a decode step has four hundred of them. A kernel that is launched like this begins as soon as all
programs of the one before it have called `release_next`. Every program must then call `wait_for_last` before it reads
what a kernel wrote, writes anything or ends: whoever waits for this kernel relies on its having waited.
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

__all__ = ["is_known", "overlapping", "release_next", "wait_for_last"]


@triton.jit
def release_next(OVERLAPS: tl.constexpr) -> None:
    """The next kernel may begin, as far as this program is concerned."""
    if OVERLAPS:
        gdc_launch_dependents()


@triton.jit
def wait_for_last(OVERLAPS: tl.constexpr) -> None:
    """Until the kernel before is done, and all that it wrote can be read."""
    if OVERLAPS:
        gdc_wait()


def overlapping(tensor: Tensor) -> dict[str, Any]:
    """How to launch a kernel with a parameter OVERLAPS on the tensor's device."""
    return {"OVERLAPS": True, "launch_pdl": True} if is_known(tensor.device) else {"OVERLAPS": False}


@cache
def is_known(device: torch.device) -> bool:
    """Whether the device has it: Hopper and what came after."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)
