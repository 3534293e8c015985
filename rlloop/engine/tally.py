"""What an engine's process counts and ours reads, in memory that both have: nothing needs to be sent for it."""

from __future__ import annotations

import mmap
import os

import numpy as np


class Tally:
    """Made in our process; in the engine's, from its `location`. Linux."""

    def __init__(self, location: str | None = None) -> None:
        self._file = os.memfd_create("tally") if location is None else os.open(location, os.O_RDWR)
        if location is None:
            os.ftruncate(self._file, 16)
        self._numbers = np.frombuffer(mmap.mmap(self._file, 16), np.float64)

    @property
    def location(self) -> str:
        """Valid while this process has it open."""
        return f"/proc/{os.getpid()}/fd/{self._file}"

    @property
    def num_tokens(self) -> int:
        """Sampled since the engine started."""
        return int(self._numbers[0])

    @property
    def longest_gap_seconds(self) -> float:
        """Since `reset_longest_gap`."""
        return float(self._numbers[1])

    def add(self, num_tokens: int, gap_seconds: float) -> None:
        """Of one step; the gap is between two tokens of one request."""
        self._numbers[0] += num_tokens
        self._numbers[1] = max(self._numbers[1], gap_seconds)

    def reset_longest_gap(self) -> None:
        """Begin a new measurement."""
        self._numbers[1] = 0.0

    def close(self) -> None:
        """No other process can open it after that."""
        os.close(self._file)
