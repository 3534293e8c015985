"""Requests on their way through vLLM while new policy versions arrive."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import count

import anyio
import numpy as np

from rlloop.types import Completion, GenerationRequest, InFlight, IntArray

HOPPING, HOPPING_ID = "hopping", 2**31 - 1
"""vLLM's name and number of the adapter that requests which hop have: its slot always holds the newest version."""


@dataclass(frozen=True, slots=True)
class Swap:
    """A version took over, under requests in flight, between two forward passes."""

    version: int
    at: float
    """time.monotonic() of the engine's host."""
    num_sampled: Mapping[str, int]
    """Tokens of each request so far, by id; those that no pass has seen yet, that have ended or are preempted may be missing."""


@dataclass(slots=True)
class Flight:
    """One request in the engine."""

    request_id: str
    version: int
    """That it began with."""
    in_flight: InFlight
    swaps: list[Swap] = field(default_factory=list)
    """That it lived through, oldest first."""

    def token_versions(self, num_tokens: int, first_token_at: float) -> IntArray:
        """[T] which version sampled each token; `first_token_at` is on the clock of `Swap.at`."""
        versions = np.full(num_tokens, self.version, np.int32)
        for swap in self.swaps:
            # Missing at the swap: not begun, or if it had begun, ended or preempted; then all count as older than they may be.
            missing = 0 if first_token_at >= swap.at else num_tokens
            versions[swap.num_sampled.get(self.request_id, missing) :] = swap.version
        return versions


class Flights:
    """All that are in the engine."""

    def __init__(self) -> None:
        self._ids = count()
        self._flying: dict[str, Flight] = {}
        self._landed = anyio.Event()

    @contextmanager
    def start(self, version: int, in_flight: InFlight) -> Iterator[Flight]:
        """One that lasts as long as the block."""
        flight = Flight(str(next(self._ids)), version, in_flight)
        self._flying[flight.request_id] = flight
        try:
            yield flight
        finally:
            del self._flying[flight.request_id]
            self._landed.set()
            self._landed = anyio.Event()

    def swap(self, swap: Swap, *, moves_all: bool) -> None:
        """Those that hop, or all, are on another version from here on."""
        for flight in self._flying.values():
            if moves_all or flight.in_flight == "hop":
                flight.swaps.append(swap)

    def to_restart(self, newest: int) -> list[str]:
        """Ids of those that should end, to go on with the newest version."""
        return [f.request_id for f in self._flying.values() if f.in_flight == "restart" and f.version != newest]

    async def leave(self, version: int) -> None:
        """Wait until no request needs the version's slot."""
        while any(f.version == version and f.in_flight != "hop" for f in self._flying.values()):
            await self._landed.wait()


def continued(request: GenerationRequest, sampled: Completion) -> GenerationRequest:
    """What asks for the rest of a completion that was cut off."""
    return replace(
        request,
        tokens=(*request.tokens, *sampled.tokens.tolist()),
        max_tokens=request.max_tokens - len(sampled.tokens),
        # With the same seed it would draw the same random numbers again.
        seed=None if request.seed is None else (request.seed + 0x9E3779B9 * (1 + len(sampled.tokens))) % 2**32,
    )


def joined(parts: list[Completion]) -> Completion:
    """The parts of one completion, in order."""
    if len(parts) == 1:
        return parts[0]
    versions = np.concatenate([part.versions for part in parts])
    return Completion(
        tokens=np.concatenate([part.tokens for part in parts]),
        logprobs=np.concatenate([part.logprobs for part in parts]),
        policy_version=int(versions.min()),
        finish_reason=parts[-1].finish_reason,
        token_versions=None if (versions == versions[0]).all() else versions,
    )
