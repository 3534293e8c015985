"""Several engines with the same model as one: prompts are shared out among them, policy versions are published to all."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from anyio import CancelScope, create_task_group

from rlloop.engine import Engine
from rlloop.errors import EngineError
from rlloop.types import Completion, EngineStatistics, GenerationRequest, RefitReport, Ticket

T = TypeVar("T")


@dataclass(eq=False)
class _Replica:
    engine: Engine
    num_in_flight: int = 0
    """Completions that are asked for."""
    num_groups: int = 0
    """That came here and whose version is served: between two turns they have nothing in flight."""


class Replicas:
    """See `rlloop.engine.Engine`. For two engines or more.

    A group's requests (`GenerationRequest.group`) go to one replica, the least loaded when the first of them comes, until their
    version is retired; those that go on with another version get a home of that one. Other requests go to the least loaded.
    """

    def __init__(self, engines: Sequence[Engine]) -> None:
        self._replicas = [_Replica(engine) for engine in engines]
        self._homes: dict[int, dict[int, _Replica]] = {}
        """Per version that is served, the groups that have come, and where they went."""
        self._refusal: Exception | None = None
        """Why the version that was published last is not served; None where it is."""

    @property
    def engines(self) -> list[Engine]:
        """Each by itself."""
        return [replica.engine for replica in self._replicas]

    async def generate(self, request: GenerationRequest) -> list[Completion]:
        """See `Engine.generate`. A version is served when all replicas hold it."""
        version = request.policy_version
        if request.in_flight != "finish" and self._homes and version not in self._homes:
            version = max(self._homes)  # the newest samples it, also when the one that the group began with is gone
        if version not in self._homes:
            raise EngineError(f"policy version {version} is not loaded; the engines serve {sorted(self._homes)}")
        replica = self._route(version, request.group)
        replica.num_in_flight += request.n
        try:
            return await replica.engine.generate(request)
        except EngineError as error:
            if self._refusal is not None:
                raise self._refusal from error
            raise
        finally:
            replica.num_in_flight -= request.n

    async def publish(self, version: int, ticket: Ticket) -> RefitReport:
        """See `Engine.publish`; the report is that of the slowest replica.

        Where one refuses the version, the others give it back; those that have it in their weights serve none then. Cancelling
        waits for that.
        """
        with CancelScope(shield=True):
            reports, errors = await _each(self._replicas, lambda engine: engine.publish(version, ticket))
            if errors:
                self._refusal = errors[0]  # requests to those that give it back and have no other would hide it
                errors += (await _each(reports, lambda engine: engine.retire(version)))[1]
                raise _first(errors)
        self._homes[version], self._refusal = {}, None
        return max(reports.values(), key=lambda report: report.publish_seconds)

    async def retire(self, version: int) -> None:
        """See `Engine.retire`."""
        for replica in self._homes.pop(version, {}).values():  # first: from here on `generate` refuses it
            replica.num_groups -= 1
        _, errors = await _each(self._replicas, lambda engine: engine.retire(version))
        if errors:
            raise _first(errors)

    def statistics(self) -> EngineStatistics:
        """See `Engine.statistics`. Counts are sums, `busy_seconds` a mean, the rest the greatest or the first."""
        every = [replica.engine.statistics() for replica in self._replicas]
        first: dict[int, float] = {}
        for each in every:
            for version, seconds in each.first_token_seconds.items():
                first[version] = min(seconds, first.get(version, seconds))
        return EngineStatistics(
            num_generated_tokens=sum(each.num_generated_tokens for each in every),
            busy_seconds=sum(each.busy_seconds for each in every) / len(every),
            num_running=sum(each.num_running for each in every),
            num_waiting=sum(each.num_waiting for each in every),
            kv_cache_usage=max(each.kv_cache_usage for each in every),
            longest_gap_seconds=max(each.longest_gap_seconds for each in every),
            first_token_seconds=first,
        )

    def reset_longest_gap(self) -> None:
        """See `Engine.reset_longest_gap`."""
        for replica in self._replicas:
            replica.engine.reset_longest_gap()

    def _route(self, version: int, group: int | None) -> _Replica:
        if group is None:
            return self._least_loaded()
        homes = self._homes[version]
        if group not in homes:
            homes[group] = self._least_loaded()
            homes[group].num_groups += 1
        return homes[group]

    def _least_loaded(self) -> _Replica:
        return min(self._replicas, key=lambda replica: (replica.num_in_flight, replica.num_groups))


async def _each(
    replicas: Iterable[_Replica], call: Callable[[Engine], Awaitable[T]]
) -> tuple[dict[_Replica, T], list[Exception]]:
    """What all answer, asked at the same time. One's error does not end the others' calls: what they hold must be known."""
    answers: dict[_Replica, T] = {}
    errors: list[Exception] = []

    async def ask(replica: _Replica) -> None:
        try:
            answers[replica] = await call(replica.engine)
        except Exception as error:
            errors.append(error)

    async with create_task_group() as tasks:
        for replica in replicas:
            tasks.start_soon(ask, replica)
    return answers, errors


def _first(errors: Sequence[Exception]) -> Exception:
    first, *others = errors
    for error in others:
        first.add_note(f"on another replica: {error}")
    return first
