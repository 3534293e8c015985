"""Who samples. An engine serves several policy versions at once; a version is immutable."""

from __future__ import annotations

from typing import Protocol

from rlloop.types import Completion, EngineStatistics, GenerationRequest, RefitReport, Ticket


class Engine(Protocol):
    """Token ids in, token ids and logprobs out."""

    async def generate(self, request: GenerationRequest) -> list[Completion]:
        """Sample `request.n` completions. Cancelling the call ends the request.

        Raises EngineError when `request.policy_version` is not loaded, when the prompt and `max_tokens` do not fit, and
        when the engine has died. Where a refused version left none, it raises what `publish` did.
        """
        ...

    async def publish(self, version: int, ticket: Ticket) -> RefitReport:
        """Serve a new version beside the others; requests in flight go on as their `in_flight` says, `finish` undisturbed.

        Raises RefitError unless every rank holds exactly what the ticket says.
        """
        ...

    async def retire(self, version: int) -> None:
        """Free the slot of a version that nobody asks for any more; wait for requests that still use it."""
        ...

    def statistics(self) -> EngineStatistics:
        """Totals since the start, and the present load."""
        ...

    def reset_longest_gap(self) -> None:
        """Begin a new measurement of `EngineStatistics.longest_gap_seconds`."""
        ...
