"""What a rank did when: a span for each forward and backward pass of a microbatch, in events.jsonl.

On a GPU the times are the device's, read once the call is done.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from rlloop.events import Events

_Mark: TypeAlias = "float | torch.cuda.Event"


class Trace:
    """Of one rank, whose resource is `trainer-<rank>`. Without a path it does nothing."""

    def __init__(self, path: Path | None, rank: int, device: torch.device) -> None:
        self._events = None if path is None else Events(path)
        self._resource = f"trainer-{rank}"
        self._is_cuda = device.type == "cuda"
        self._open: list[tuple[str, _Mark, _Mark, dict[str, Any]]] = []

    @contextmanager
    def span(self, name: str, **fields: Any) -> Iterator[None]:
        """What is launched inside."""
        if self._events is None:
            yield
            return
        start = self._mark()
        yield
        self._open.append((name, start, self._mark(), fields))

    def backward(self, output: Tensor, **fields: Any) -> None:
        """The backward pass that starts at this tensor, whenever it comes."""
        if self._events is None or not output.requires_grad:
            return

        def start(gradient: Tensor) -> None:
            begun = self._mark()
            torch.autograd.Variable._execution_engine.queue_callback(
                lambda: self._open.append(("backward", begun, self._mark(), fields))
            )

        output.register_hook(start)

    def flush(self) -> None:
        """Write what was launched, once the device is done with it."""
        if self._events is None or not self._open:
            return
        spans, self._open = self._open, []
        if self._is_cuda:
            torch.cuda.synchronize()
        now, reference = time.monotonic(), self._mark()
        if isinstance(reference, torch.cuda.Event):
            reference.synchronize()
        for name, start, end, fields in spans:
            times = (self._time(mark, now, reference) for mark in (start, end))
            self._events.record(name, self._resource, *times, **fields)
        self._events.flush()

    def close(self) -> None:
        """Write what is left, and close the file."""
        self.flush()
        if self._events is not None:
            self._events.close()

    def _mark(self) -> _Mark:
        if not self._is_cuda:
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @staticmethod
    def _time(mark: _Mark, now: float, reference: _Mark) -> float:
        """Seconds of CLOCK_MONOTONIC; `reference` was marked at `now`."""
        return mark if isinstance(mark, float) else now - mark.elapsed_time(reference) / 1e3
