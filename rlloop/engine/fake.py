"""An engine for tests and for measuring the loop: no model, made-up tokens, delays as asked."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import numpy as np

from rlloop.errors import EngineError
from rlloop.types import Completion, EngineStatistics, GenerationRequest, RefitReport, Ticket


class FakeEngine:
    """See `rlloop.engine.Engine`. Tokens depend on the request's seed alone; `delay(request)` is awaited before they come, and
    where a request does not finish on its own version, the newest after that sampled the second half."""

    def __init__(
        self,
        *,
        num_tokens: int = 4,
        vocabulary: int = 100,
        delay: Callable[[GenerationRequest], Awaitable[None]] | None = None,
    ) -> None:
        self._num_tokens = num_tokens
        self._vocabulary = vocabulary
        self._delay = delay
        self._logprobs = np.full(num_tokens, -np.log(vocabulary), dtype=np.float32)
        self.versions: set[int] = set()
        self.num_generated_tokens = 0
        self.num_in_flight = 0

    async def generate(self, request: GenerationRequest) -> list[Completion]:
        """See `Engine.generate`."""
        pinned = request.in_flight == "finish"
        version = request.policy_version if pinned else max(self.versions)
        if version not in self.versions:
            raise EngineError(
                f"policy version {request.policy_version} is not loaded; the engine serves {self.versions}"
            )
        self.num_in_flight += 1
        try:
            if self._delay is not None:
                await self._delay(request)
        finally:
            self.num_in_flight -= 1
        self.num_generated_tokens += self._num_tokens * request.n
        newest = version if pinned else max(self.versions)
        return [self._completion(request, member, version, newest) for member in range(request.n)]

    def _completion(self, request: GenerationRequest, member: int, oldest: int, newest: int) -> Completion:
        first = (request.seed or 0) + member
        tokens = (np.arange(first, first + self._num_tokens) % self._vocabulary).astype(np.int32)
        if oldest == newest:
            return Completion(tokens, self._logprobs, oldest, "length")
        half = np.arange(self._num_tokens) < self._num_tokens // 2
        return Completion(tokens, self._logprobs, oldest, "length", np.where(half, oldest, newest).astype(np.int32))

    async def publish(self, version: int, ticket: Ticket) -> RefitReport:
        """See `Engine.publish`."""
        if version in self.versions:
            raise ValueError(f"policy version {version} is loaded already")
        self.versions.add(version)
        return RefitReport(version, ticket.num_bytes, ticket.export_seconds, 0.0, 0.0, 0.0, ticket.export_seconds)

    async def retire(self, version: int) -> None:
        """See `Engine.retire`."""
        self.versions.remove(version)

    def statistics(self) -> EngineStatistics:
        """See `Engine.statistics`; a fake engine is never busy."""
        return EngineStatistics(
            num_generated_tokens=self.num_generated_tokens,
            busy_seconds=0.0,
            num_running=self.num_in_flight,
            num_waiting=0,
            kv_cache_usage=0.0,
            longest_gap_seconds=0.0,
            first_token_seconds={},
        )

    def reset_longest_gap(self) -> None:
        """See `Engine.reset_longest_gap`."""
