"""Several engines as one, on fakes: who gets which request, and that a version is held by all or by none."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlloop.engine.fake import FakeEngine
from rlloop.engine.replicas import Replicas
from rlloop.errors import EngineError, RefitError
from rlloop.types import AdapterTicket, Completion, EngineStatistics, GenerationRequest, InFlight, RefitReport

pytestmark = pytest.mark.anyio

TICKET = AdapterTicket((), "float32", "", "memory", "", num_bytes=7, export_seconds=0.5)


class Engine(FakeEngine):
    """Notes who came; `refuse` are versions that it does not take; an answer waits for its `gate`."""

    def __init__(self, refuse: Sequence[int] = (), seconds: float = 0.0, error: type[Exception] = RefitError) -> None:
        super().__init__(delay=self._wait)
        self.came: list[tuple[int, int | None]] = []
        self.gate = anyio.Event()
        self.gate.set()
        self._refuse, self._seconds, self._error = refuse, seconds, error

    async def _wait(self, request: GenerationRequest) -> None:
        await self.gate.wait()

    async def generate(self, request: GenerationRequest) -> list[Completion]:
        self.came.append((request.policy_version, request.group))
        return await super().generate(request)

    async def publish(self, version: int, ticket: AdapterTicket) -> RefitReport:
        await anyio.sleep(self._seconds)
        if version in self._refuse:
            raise self._error(f"{version} is refused")
        report = await super().publish(version, ticket)
        return replace(report, load_seconds=self._seconds, publish_seconds=report.publish_seconds + self._seconds)


def request(version: int = 0, group: int | None = None, n: int = 1) -> GenerationRequest:
    return GenerationRequest((1, 2), version, max_tokens=4, n=n, group=group)


async def published(*engines: Engine, version: int = 0) -> Replicas:
    replicas = Replicas(engines)
    await replicas.publish(version, TICKET)
    return replicas


@given(
    st.integers(2, 4), st.lists(st.tuples(st.integers(0, 1), st.integers(0, 5), st.booleans()), min_size=1, max_size=40)
)
@settings(max_examples=100, deadline=None)
def test_a_group_stays_on_one_replica_and_a_new_one_goes_to_the_least_loaded(
    num_engines: int, requests: list[tuple[int, int, bool]]
) -> None:
    """Each request may be waited for before the next one comes, as between two turns, or not."""

    async def run() -> None:
        engines = [Engine() for _ in range(num_engines)]
        replicas = await published(*engines)
        await replicas.publish(1, TICKET)
        homes: dict[tuple[int, int], Engine] = {}
        async with anyio.create_task_group() as tasks:
            for engine in engines:
                engine.gate = anyio.Event()
            for version, group, is_waited_for in requests:
                loads = [engine.num_in_flight for engine in engines]
                tasks.start_soon(replicas.generate, request(version, group))
                await anyio.wait_all_tasks_blocked()
                [chosen] = [e for e, load in zip(engines, loads, strict=True) if e.num_in_flight > load]
                if (version, group) in homes:
                    assert homes[version, group] is chosen
                else:
                    assert loads[engines.index(chosen)] == min(loads)
                homes[version, group] = chosen
                if is_waited_for:
                    for engine in engines:
                        engine.gate.set()
                    await anyio.wait_all_tasks_blocked()
                    for engine in engines:
                        engine.gate = anyio.Event()
            for engine in engines:
                engine.gate.set()

    anyio.run(run)


@given(st.integers(2, 4), st.integers(1, 12), st.integers(1, 4), st.booleans())
@settings(max_examples=50, deadline=None)
def test_equal_groups_are_shared_out_evenly(num_engines: int, num_groups: int, size: int, is_busy: bool) -> None:
    """Also where none has anything in flight when the next one comes: tools may take longer than answers."""

    async def run() -> None:
        engines = [Engine() for _ in range(num_engines)]
        replicas = await published(*engines)
        async with anyio.create_task_group() as tasks:
            for group in range(num_groups):
                for engine in engines:
                    engine.gate = anyio.Event()
                for _ in range(size):
                    tasks.start_soon(replicas.generate, request(group=group))
                await anyio.wait_all_tasks_blocked()
                if not is_busy:
                    for engine in engines:
                        engine.gate.set()
                    await anyio.wait_all_tasks_blocked()
            tasks.cancel_scope.cancel()
        counts = [len({group for _, group in engine.came}) for engine in engines]
        assert max(counts) - min(counts) <= 1
        assert sum(len(engine.came) for engine in engines) == num_groups * size

    anyio.run(run)


async def test_a_request_of_no_group_goes_where_there_is_least_to_do(anyio_backend: str) -> None:
    engines = [Engine(), Engine()]
    replicas = await published(*engines)
    for engine in engines:
        engine.gate = anyio.Event()
    async with anyio.create_task_group() as tasks:
        for n, expected in ((3, (3, 0)), (1, (3, 1)), (1, (3, 2)), (2, (3, 4)), (1, (4, 4))):
            tasks.start_soon(replicas.generate, request(n=n))
            await anyio.wait_all_tasks_blocked()
            assert tuple(replica.num_in_flight for replica in replicas._replicas) == expected
        tasks.cancel_scope.cancel()
    assert [replica.num_in_flight for replica in replicas._replicas] == [0, 0], "a request that is cancelled is over"


async def test_a_group_is_forgotten_with_its_version(anyio_backend: str) -> None:
    replicas = await published(Engine(), Engine())
    for group in range(5):
        await replicas.generate(request(group=group))
    await replicas.publish(1, TICKET)
    await replicas.generate(request(1, group=0))
    await replicas.retire(0)
    assert [replica.num_groups for replica in replicas._replicas] == [0, 1]
    assert list(replicas._homes) == [1]


async def test_a_version_is_published_to_all_at_once_and_retired_by_all(anyio_backend: str) -> None:
    engines = [Engine(seconds=0.1), Engine(seconds=0.3), Engine(seconds=0.2)]
    replicas = Replicas(engines)
    with anyio.fail_after(0.5):  # one after the other they would take 0.6 s
        report = await replicas.publish(0, TICKET)
    assert report == RefitReport(0, 7, 0.5, 0.0, 0.3, 0.0, 0.8), "of the slowest"
    assert [engine.versions for engine in engines] == [{0}] * 3
    await replicas.retire(0)
    assert [engine.versions for engine in engines] == [set()] * 3
    with pytest.raises(EngineError, match=r"policy version 0 is not loaded; the engines serve \[\]"):
        await replicas.generate(request())


@given(st.lists(st.tuples(st.booleans(), st.sampled_from([0.0, 0.001, 0.002])), min_size=2, max_size=4), st.booleans())
@settings(max_examples=50, deadline=None)
def test_all_hold_a_version_or_none(replicas_to_be: list[tuple[bool, float]], is_cancelled: bool) -> None:
    async def run() -> None:
        engines = [Engine([1] if refuses else [], seconds) for refuses, seconds in replicas_to_be]
        replicas = await published(*engines)
        failed = None
        async with anyio.create_task_group() as tasks:
            if is_cancelled:
                tasks.cancel_scope.deadline = anyio.current_time() + 0.001
            try:
                await replicas.publish(1, TICKET)
            except RefitError as error:
                failed = error
        num_refusing = sum(refuses for refuses, _ in replicas_to_be)
        expected = {0} if num_refusing else {0, 1}
        assert [engine.versions for engine in engines] == [expected] * len(engines)
        assert (failed is not None) == bool(num_refusing)
        if failed:
            assert failed.__dict__.get("__notes__", []) == ["on another replica: 1 is refused"] * (num_refusing - 1)
            with pytest.raises(EngineError, match=r"policy version 1 is not loaded; the engines serve \[0\]"):
                await replicas.generate(request(1))
        else:
            await replicas.generate(request(1))

    anyio.run(run)


async def test_nobody_samples_with_what_is_only_half_published(anyio_backend: str) -> None:
    engines = [Engine(), Engine(seconds=0.2)]
    replicas = Replicas(engines)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(replicas.publish, 0, TICKET)
        await anyio.sleep(0.05)
        assert [engine.versions for engine in engines] == [{0}, set()]
        with pytest.raises(EngineError, match="not loaded"):
            await replicas.generate(request())
    await replicas.generate(request())


async def test_whatever_one_raises_the_others_give_the_version_back(anyio_backend: str) -> None:
    engines = [Engine(), Engine([0], seconds=0.05, error=KeyError)]
    with pytest.raises(KeyError):
        await Replicas(engines).publish(0, TICKET)
    assert [engine.versions for engine in engines] == [set(), set()]


async def test_a_replica_that_cannot_retire_keeps_no_other_from_it(anyio_backend: str) -> None:
    class Dead(Engine):
        async def retire(self, version: int) -> None:
            raise EngineError("died")

    engines = [Dead(), Engine()]
    replicas = await published(*engines)
    with pytest.raises(EngineError, match="died"):
        await replicas.retire(0)
    assert engines[1].versions == set()


async def test_statistics() -> None:
    class Measured(Engine):
        def __init__(self, **statistics: Any) -> None:
            super().__init__()
            self._statistics = EngineStatistics(**statistics)

        def statistics(self) -> EngineStatistics:
            return self._statistics

        def reset_longest_gap(self) -> None:
            self._statistics = replace(self._statistics, longest_gap_seconds=0.0)

    common = {"num_waiting": 1, "num_running": 2}
    one = Measured(
        num_generated_tokens=10,
        busy_seconds=1.0,
        kv_cache_usage=0.2,
        longest_gap_seconds=0.3,
        first_token_seconds={0: 0.5, 1: 0.1},
        **common,
    )
    other = Measured(
        num_generated_tokens=5,
        busy_seconds=4.0,
        kv_cache_usage=0.1,
        longest_gap_seconds=0.4,
        first_token_seconds={0: 0.2, 2: 0.7},
        **common,
    )
    replicas = Replicas([one, other])
    expected = EngineStatistics(15, 2.5, 4, 2, 0.2, 0.4, {0: 0.2, 1: 0.1, 2: 0.7})
    assert replicas.statistics() == expected
    replicas.reset_longest_gap()
    assert replicas.statistics() == replace(expected, longest_gap_seconds=0.0)


def test_a_groups_replica_does_not_depend_on_its_tokens() -> None:
    """Turns of one rollout begin differently from those of another."""

    async def run() -> None:
        engines = [Engine(), Engine()]
        replicas = await published(*engines)
        by_group: dict[int | None, set[int]] = defaultdict(set)
        for turn in range(3):
            for group in range(4):
                tokens = tuple(range(group, group + 2 + turn))
                await replicas.generate(replace(request(group=group), tokens=tokens))
        for index, engine in enumerate(engines):
            for _, came in engine.came:
                by_group[came].add(index)
        assert sorted(map(tuple, by_group.values())) == [(0,), (0,), (1,), (1,)]

    anyio.run(run)


@pytest.mark.parametrize("in_flight", ["restart", "hop"])
async def test_a_request_that_moves_on_outlives_the_version_that_its_group_began_with(in_flight: InFlight) -> None:
    first, second = Engine(), Engine()
    replicas = await published(first, second)
    await replicas.publish(1, TICKET)
    await replicas.retire(0)
    [completion] = await replicas.generate(replace(request(0, group=3), in_flight=in_flight))
    assert completion.policy_version == 1
    await replicas.generate(replace(request(1, group=3), in_flight=in_flight))
    assert sorted([len(first.came), len(second.came)]) == [0, 2], "the group stays where it is"


@pytest.mark.parametrize("in_flight", ["restart", "hop"])
async def test_a_request_whose_version_is_gone_is_at_home_with_the_newest(in_flight: InFlight) -> None:
    """That of an older one is forgotten first, and the group's next turn would find no prefix cache."""
    replicas = await published(Engine(), Engine())
    for version in (1, 2):
        await replicas.publish(version, TICKET)
    await replicas.retire(0)
    await replicas.generate(replace(request(0, group=3), in_flight=in_flight))
    assert {version: [*groups] for version, groups in replicas._homes.items()} == {1: [], 2: [3]}
