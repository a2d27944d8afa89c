"""The grid of every operation, drawn by Hypothesis: every instruction set, and Triton's kernels, interpreted."""

from collections.abc import Iterator, Sequence
from typing import TypeVar

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bestiary_kernels import gpu, library

from .conftest import NATIVE
from .grid import CASES
from .grid.interpreter import interpreted

T = TypeVar("T")
TRITON = "triton"
NOT_THERE = pytest.mark.skipif(not gpu.is_installed(), reason="Triton is not installed")


class Hypothesis:
    """Draws so that a failure is shrunk to the smallest that fails."""

    def __init__(self, data: st.DataObject) -> None:
        self._data = data

    def integer(self, low: int, high: int) -> int:
        return self._data.draw(st.integers(low, high))

    def choice(self, options: Sequence[T]) -> T:
        return self._data.draw(st.sampled_from(options))


@pytest.fixture(params=["reference", *NATIVE, pytest.param(TRITON, marks=NOT_THERE)])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with interpreted() if request.param == TRITON else library.using(request.param):
        yield request.param


def draws(backend: str) -> int:
    """The interpreter takes a thousand times as long as what it interprets."""
    return 8 if backend == TRITON else 20


@pytest.mark.parametrize("name", CASES)
def test_results_are_near_float64(backend: str, name: str) -> None:
    @settings(max_examples=draws(backend), deadline=None, suppress_health_check=list(HealthCheck))
    @given(data=st.data())
    def near(data: st.DataObject) -> None:
        CASES[name](Hypothesis(data), torch.device("cpu"))

    near()
