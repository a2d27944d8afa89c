"""A step captured as a CUDA graph and replayed with one call. Knows nothing of models; `tape` is its like for the CPU.

What is captured are launches with their addresses: whoever captures keeps inputs in place and writes new values there.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch

__all__ = ["Graph"]

#: What a captured function returns: tensors.
Found = TypeVar("Found")


class Graph(Generic[Found]):
    """Everything that a function launched on a GPU."""

    def __init__(self, graph: Any, output: Found) -> None:
        self._graph = graph
        #: What the function returned; a replay writes it anew, in place.
        self.output = output

    @classmethod
    def capture(cls, function: Callable[[], Found], pool: Any) -> tuple[Found, Graph[Found] | None]:
        """Run `function`, then capture it; its result, and a graph if it never asked the GPU for a value meanwhile.

        It is run more than once. Graphs of one `pool` (`torch.cuda.graph_pool_handle()`) share memory between their
        kernels, so that what one leaves in its output holds until the next one is captured or replayed.
        """
        output = function()  # the first run: kernels are compiled, libraries make their handles
        torch.cuda.synchronize()
        try:
            with _never_waiting():  # a capture that fails leaves streams and memory as no one after it expects them
                function()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                captured = function()
        except RuntimeError as error:
            torch.cuda.synchronize()
            why = str(error).splitlines()[0]
            warnings.warn(f"a step is launched kernel by kernel, not captured: {why}", RuntimeWarning, stacklevel=2)
            return output, None
        return output, cls(graph, captured)

    def replay(self) -> Found:
        """Launch it all again, over what the inputs' memory holds now, and return `output`."""
        self._graph.replay()
        return self.output


@contextmanager
def _never_waiting() -> Iterator[None]:
    """Meanwhile an operation that waits for the GPU, which a captured stream cannot, raises RuntimeError."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that it may miss some: those are found when they are captured
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
