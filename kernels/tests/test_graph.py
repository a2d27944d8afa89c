"""What is captured as a CUDA graph, and what is not even tried: a GPU that only counts stands for a real one."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from bestiary_kernels import Graph


class Counting:
    """What a capture asks of torch.cuda."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.mode: str | int = 0
        self.captures = self.replays = 0
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: self.mode)
        monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: setattr(self, "mode", mode))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: self)
        monkeypatch.setattr(torch.cuda, "graph", self._captured)

    @contextmanager
    def _captured(self, graph: object, pool: object) -> Iterator[None]:
        assert graph is self
        assert self.mode == 0
        self.captures += 1
        yield

    def replay(self) -> None:
        self.replays += 1


def test_what_never_waits_is_captured_and_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, value = Counting(monkeypatch), torch.ones(2)
    output, graph = Graph.capture(lambda: value, pool=None)
    assert graph is not None
    assert torch.equal(output, value)
    assert graph.replay() is value
    assert (cuda.captures, cuda.replays, cuda.mode) == (1, 1, 0)


def test_what_waits_is_not_captured_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Counting(monkeypatch)

    def step() -> torch.Tensor:
        if cuda.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        return torch.ones(2)

    with pytest.warns(RuntimeWarning, match="kernel by kernel, not captured: called a synchronizing CUDA operation"):
        output, graph = Graph.capture(step, pool=None)
    assert graph is None
    assert torch.equal(output, torch.ones(2))
    assert (cuda.captures, cuda.mode) == (0, 0)
