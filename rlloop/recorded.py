"""Work that is hundreds of small kernels, launched at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


class Recorded(Generic[T]):
    """Of work on tensors that stay where they are. On a GPU its second turn is recorded as a CUDA graph, and from then on that is
    replayed: what it returns is the same tensors, with new contents. Work on others wants another `Recorded`."""

    def __init__(self, device: torch.device) -> None:
        self._is_on_gpu = device.type == "cuda"
        self._has_run = False
        self._found: tuple[torch.cuda.CUDAGraph, T] | None = None

    def __call__(self, work: Callable[[], T]) -> T:
        """Behind what the current stream has to do, as the work itself."""
        if not (self._is_on_gpu and self._has_run):  # the first time may load kernels, and allocate what it keeps
            first = work()
            self._has_run = True
            return first
        if self._found is None:
            self._found = _record(work)
        graph, result = self._found
        graph.replay()
        return result


def _record(work: Callable[[], T]) -> tuple[torch.cuda.CUDAGraph, T]:
    # Not by torch.cuda.graph, which waits for all streams and collects garbage: forward passes may be running.
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(torch.cuda.Stream()):
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            result = work()
        finally:
            graph.capture_end()
    return graph, result
