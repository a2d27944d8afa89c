"""What the device can do at most, measured, and how long something takes on it."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

__all__ = ["Device"]

#: Seconds that a device works before anything is measured: compiling a kernel leaves it idle, and its clocks fall.
_WARMING = 0.2


@dataclass
class Device:
    """A device and its measured limits: bytes a second of a copy, and operations a second of a product in bfloat16."""

    kind: torch.device
    is_tiny: bool
    bandwidth: float = 0.0
    flops: float = 0.0

    def measure(self) -> None:
        """Fill in the limits: the best of several, since these are what shares are taken of."""
        side = 256 if self.is_tiny else 8192
        a, b = (torch.randn(side, side, dtype=torch.bfloat16, device=self.kind) for _ in range(2))
        n = 1 << (20 if self.is_tiny else 30)
        source = torch.zeros(n, dtype=torch.uint8, device=self.kind)
        target = torch.empty_like(source)
        # In a graph a copy takes another way, which is slower on Hopper: what counts is the better one.
        self.bandwidth = 2 * n / min(self._best(lambda: target.copy_(source), graph) for graph in (False, True))
        self.flops = 2 * side**3 / self._best(lambda: a @ b)

    def wait(self) -> None:
        """Until all that was launched is done."""
        if self.kind.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, function: Callable[[], object], rounds: int = 12) -> float:
        """The median time of a call, launched alone; on a GPU by its own clock, and without Python's part in it."""
        return statistics.median(self._times(function, rounds))

    def _best(self, function: Callable[[], object], graph: bool = True) -> float:
        return min(self._times(function, 12, graph))

    def _times(self, function: Callable[[], object], rounds: int, graph: bool = True) -> list[float]:
        function()
        self.wait()
        launch = self._recorded(function) if graph else function
        begin = time.perf_counter()
        while time.perf_counter() - begin < (0 if self.is_tiny else _WARMING):
            self._once(launch)
        return [self._once(launch) for _ in range(2 if self.is_tiny else rounds)]

    def _recorded(self, function: Callable[[], object]) -> Callable[[], object]:
        """All that a call launches as one graph; the call itself where it cannot be recorded."""
        if self.kind.type != "cuda":
            return function
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                function()
        except RuntimeError:  # it waits for the GPU, which a captured stream cannot
            self.wait()
            return function
        graph.replay()  # the first one brings the graph to the device
        self.wait()
        return graph.replay

    def _once(self, function: Callable[[], object]) -> float:
        if self.kind.type != "cuda":
            begin = time.perf_counter()
            function()
            return time.perf_counter() - begin
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # A flush of the second cache, in whose time the launches that follow are queued up.
        torch.zeros(1 << 26, dtype=torch.int64, device=self.kind)
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
