"""Slow sinks, kept away from the event loop."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from rlloop.tracking.isolation import Isolated

if TYPE_CHECKING:
    from rlloop.tracking import Tracker

logger = logging.getLogger(__name__)

SinkT = TypeVar("SinkT", bound="Tracker")


class Background(Generic[SinkT]):
    """A tracker that opens and calls a slow one in a daemon thread of its own, behind a bounded queue.

    Nothing here waits for the sink but `close`, and that for `close_seconds` at most. A call that finds the queue full,
    or the thread gone because the sink could not be opened, is dropped and counted.
    """

    def __init__(self, name: str, open_sink: Callable[[], SinkT], *, capacity: int = 64, close_seconds: float = 10.0):
        self.name = name
        self.dropped = 0
        self._open_sink = open_sink
        self._close_seconds = close_seconds
        self._isolated = Isolated(name)
        # None is the last entry: close the sink.
        self._queue: queue.Queue[Callable[[SinkT], None] | None] = queue.Queue(capacity)
        self._thread = threading.Thread(target=self._run, name=f"rlloop-{name}", daemon=True)
        self._thread.start()

    @property
    def failures(self) -> int:
        """Calls that raised in the sink."""
        return self._isolated.failures

    def submit(self, call: Callable[[SinkT], None]) -> None:
        """Have the thread call this with the sink."""
        try:
            if not self._thread.is_alive():
                raise queue.Full
            self._queue.put_nowait(call)
        except queue.Full:
            self.dropped += 1
            if self.dropped == 1:
                logger.warning("%s does not keep up: dropping (metrics.jsonl is complete)", self.name)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Queue the metrics of one step."""
        snapshot = dict(metrics)
        self.submit(lambda sink: sink.log(step, snapshot))

    def completions(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Queue the completions of one step."""
        snapshot = list(rows)
        self.submit(lambda sink: sink.completions(step, snapshot))

    def evaluation(self, policy_version: int, metrics: Mapping[str, float]) -> None:
        """Queue the metrics of one policy version."""
        snapshot = dict(metrics)
        self.submit(lambda sink: sink.evaluation(policy_version, snapshot))

    def close(self) -> None:
        """Let the sink finish; what it has not taken after `close_seconds` is left behind and reported."""
        deadline = time.monotonic() + self._close_seconds
        try:
            self._queue.put(None, timeout=self._close_seconds if self._thread.is_alive() else 0)
        except queue.Full:
            pass  # nobody takes from it: reported below
        else:
            self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            logger.warning("%s did not finish within %.0f s and is left behind", self.name, self._close_seconds)
        if self.dropped or self.failures:
            logger.warning("%s: %d calls dropped, %d failed", self.name, self.dropped, self.failures)

    def _run(self) -> None:
        sink: SinkT | None = None
        with self._isolated:
            sink = self._open_sink()
        if sink is None:
            return
        while (call := self._queue.get()) is not None:
            with self._isolated:
                call(sink)
        with self._isolated:
            sink.close()
