"""Fixtures of the kernel tests: every backend that this machine can run, and a fixed seed."""

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before the first kernel is defined

from bestiary_kernels import library, status

NATIVE = status().available[1:]


@pytest.fixture(params=NATIVE or [pytest.param("none", marks=pytest.mark.skip(reason="no C++ library was built"))])
def variant(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set's kernels in turn, in use for the length of the test."""
    with library.using(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)
