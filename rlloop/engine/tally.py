"""What an engine's process counts and ours reads, in memory that both have: no message is sent for it."""

from __future__ import annotations

import mmap
import os
import weakref

import numpy as np

_TOKENS, _GAP, _RUNNING, _WAITING, _CACHE = range(5)


class Tally:
    """Made in our process; in the engine's, from its `location`. Linux."""

    def __init__(self, location: str | None = None) -> None:
        file = os.memfd_create("tally") if location is None else os.open(location, os.O_RDWR)
        if location is None:
            os.ftruncate(file, 64)
        self._numbers = np.frombuffer(mmap.mmap(file, 64), np.float64)
        self.location = f"/proc/{os.getpid()}/fd/{file}"
        """Valid while this lives."""
        weakref.finalize(self, os.close, file)

    @property
    def num_tokens(self) -> int:
        """Sampled since the engine started."""
        return int(self._numbers[_TOKENS])

    @property
    def longest_gap_seconds(self) -> float:
        """Between two tokens of one request, since `reset_longest_gap`."""
        return float(self._numbers[_GAP])

    @property
    def num_running(self) -> int:
        """Requests."""
        return int(self._numbers[_RUNNING])

    @property
    def num_waiting(self) -> int:
        """Requests."""
        return int(self._numbers[_WAITING])

    @property
    def kv_cache_usage(self) -> float:
        """The share that is used."""
        return float(self._numbers[_CACHE])

    def add(self, num_tokens: int, gap_seconds: float) -> None:
        """Of one step."""
        self._numbers[_TOKENS] += num_tokens
        if gap_seconds > self._numbers[_GAP]:
            self._numbers[_GAP] = gap_seconds

    def set_load(self, num_running: int, num_waiting: int, kv_cache_usage: float) -> None:
        """After a step."""
        self._numbers[_RUNNING : _CACHE + 1] = num_running, num_waiting, kv_cache_usage

    def reset_longest_gap(self) -> None:
        """Begin a new measurement."""
        self._numbers[_GAP] = 0.0
