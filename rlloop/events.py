"""Who was busy when: spans on one monotonic clock, in events.jsonl.

    {"name": "rollout", "resource": "engine", "start": 12.5, "end": 14.0, "policy_version": 3, "fields": {"ordinal": 7}}

Times are seconds of CLOCK_MONOTONIC, which all processes of a Linux machine share. A span that an exception left also
has `error`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from rlloop.tracking import jsonl
from rlloop.tracking.isolation import Isolated

FLUSH_LINES = 1024


class Events:
    """Spans of one process. For the event loop's thread only; nothing here waits or raises but for a bug.

    Lines are buffered: call `flush` once per optimizer step. A full disk does not end the run. `path` None writes nothing.
    """

    def __init__(self, path: Path | None, *, clock: Callable[[], float] = time.monotonic):
        self.clock = clock
        self.path = path
        self._file = jsonl.Lines(path) if path else None
        self._lines: list[bytes] = []
        self._isolated = Isolated("events.jsonl")

    def span(self, name: str, resource: str, *, policy_version: int | None = None, **fields: Any) -> Span:
        """Context manager: from enter to exit the resource is busy with this."""
        return Span(self, name, resource, policy_version, fields)

    def record(
        self,
        name: str,
        resource: str,
        start: float,
        end: float,
        *,
        policy_version: int | None = None,
        error: BaseException | None = None,
        **fields: Any,
    ) -> None:
        """A span that was timed elsewhere."""
        if self._file is None:
            return
        line: dict[str, Any] = {
            "name": name,
            "resource": resource,
            "start": start,
            "end": end,
            "policy_version": policy_version,
            "fields": fields,
        }
        if error is not None:
            line["error"] = f"{type(error).__name__}: {error}"
        self._lines.append(jsonl.encode(line))
        if len(self._lines) >= FLUSH_LINES:
            self.flush()

    def flush(self) -> None:
        """Hand the buffered lines to the operating system, in one write."""
        lines, self._lines = self._lines, []
        if self._file and lines:
            with self._isolated:
                self._file.append(b"".join(lines))

    def close(self) -> None:
        """Flush, and close the file."""
        self.flush()
        if self._file:
            with self._isolated:
                self._file.close()
            self._file = None


class Span:
    """One span; made by `Events.span`, entered once."""

    __slots__ = ("_events", "_fields", "_name", "_policy_version", "_resource", "_start")

    def __init__(self, events: Events, name: str, resource: str, policy_version: int | None, fields: dict[str, Any]):
        self._events = events
        self._name = name
        self._resource = resource
        self._policy_version = policy_version
        self._fields = fields

    def __enter__(self) -> None:
        self._start = self._events.clock()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        where = self._name, self._resource, self._start, self._events.clock()
        self._events.record(*where, policy_version=self._policy_version, error=error, **self._fields)


def chrome_trace(events: str | Path, out: str | Path) -> None:
    """Convert events.jsonl to Chrome's trace format, which Perfetto and chrome://tracing show.

    A resource is a process there; spans that overlap get lanes (threads) of their own, as few as they need.
    """
    resources: dict[str, list[float]] = {}  # per lane: when its last span ends
    trace: list[dict[str, Any]] = []
    for event in sorted(jsonl.read(Path(events)), key=lambda event: (event["start"], event["end"])):
        lanes = resources.setdefault(event["resource"], [])
        free = (lane for lane, end in enumerate(lanes) if end <= event["start"])
        lane = next(free, len(lanes))
        lanes[lane : lane + 1] = [event["end"]]
        details = {"policy_version": event["policy_version"], **event["fields"]}
        if "error" in event:
            details["error"] = event["error"]
        place = {"pid": list(resources).index(event["resource"]), "tid": lane, "ts": event["start"] * 1e6}
        seconds = event["end"] - event["start"]
        kind = {"ph": "X", "dur": seconds * 1e6} if seconds else {"ph": "i", "s": "t"}
        trace.append({"name": event["name"], **kind, **place, "args": details})  # times in microseconds
    names = [
        {"name": "process_name", "ph": "M", "pid": pid, "args": {"name": resource}}
        for pid, resource in enumerate(resources)
    ]
    Path(out).write_bytes(jsonl.encode({"traceEvents": names + trace}))
