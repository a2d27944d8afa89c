"""Fixtures of the kernel tests: every backend that this machine can run, and a fixed seed."""

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before the first kernel is defined

from bestiary_kernels import library, status
from bestiary_kernels.linear import squeezed

NATIVE = status().available[1:]


@pytest.fixture(params=NATIVE or [pytest.param("none", marks=pytest.mark.skip(reason="no C++ library was built"))])
def variant(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set's kernels in turn, in use for the length of the test."""
    with library.using(request.param):
        yield request.param


@pytest.fixture(params=[variant for variant in ("avx2", "avx512", "avx512_bf16", "amx_bf16") if variant in NATIVE])
def squeezes_all(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Weights are squeezed however small they are, and read so, by all kernels that can."""
    monkeypatch.setattr(squeezed, "_LEAST", 0)
    monkeypatch.delenv(squeezed.VARIABLE, raising=False)
    with library.using(request.param):
        yield


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)
