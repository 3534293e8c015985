"""Versions, leases and slots, on the fakes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext

import anyio
import anyio.lowlevel
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlloop.engine.fake import FakeEngine
from rlloop.errors import RefitError
from rlloop.events import Events
from rlloop.refit.publisher import Refit
from rlloop.trainer.fake import FakeTrainer
from rlloop.types import AdamConfig, AdapterTicket, InFlight, LoraConfig, RefitReport, Ticket, WeightsTicket

pytestmark = pytest.mark.anyio


class InWeights(FakeEngine):
    """As vLLM where a version's weights take the place of those before: meanwhile it serves none."""

    async def publish(self, version: int, ticket: Ticket) -> RefitReport:
        self.versions.clear()
        await anyio.sleep(0.002)
        return await super().publish(version, ticket)

    async def retire(self, version: int) -> None:
        self.versions.discard(version)


async def make_refit(engine: FakeEngine, num_versions: int, in_flight: InFlight = "finish") -> Refit:
    trainer = FakeTrainer()
    await trainer.create_adapter("policy", LoraConfig())
    return Refit(trainer, engine, "policy", num_versions, Events(None), in_flight)


async def test_a_lease_is_on_the_newest_version(anyio_backend: str) -> None:
    engine = FakeEngine()
    refit = await make_refit(engine, 3)
    await refit.publish(0)
    async with refit.lease(1) as old:
        await refit.publish(1)
        async with refit.lease(2) as new:
            assert (old, new) == (0, 1)
            assert engine.versions == {0, 1}
    await refit.publish(2)
    assert engine.versions == {1, 2}, "1 was the newest until 2 was there"


async def test_a_leased_version_stays_and_others_go(anyio_backend: str) -> None:
    engine = FakeEngine()
    refit = await make_refit(engine, 3)
    await refit.publish(0)
    async with refit.lease(1):
        for version in range(1, 6):
            await refit.publish(version)
            assert engine.versions == {0, version - 1, version}
    await refit.publish(6)
    assert engine.versions == {5, 6}


@pytest.mark.parametrize("in_flight", ["restart", "hop"])
async def test_a_lease_keeps_nothing_where_requests_move_on(in_flight: InFlight, anyio_backend: str) -> None:
    engine = FakeEngine()
    refit = await make_refit(engine, 3, in_flight)
    await refit.publish(0)
    async with refit.lease(1) as begins_with, refit.pin() as pinned:
        assert (begins_with, pinned) == (0, 0)
        await refit.publish(1)
        async with refit.lease(2) as next_one:
            assert next_one == 1
            for version in range(2, 5):
                await refit.publish(version)
                assert engine.versions == {0, version - 1, version}, "1 is not kept, 0 is pinned"


async def test_with_room_for_one_the_next_takes_its_place_when_nobody_has_leased_it(anyio_backend: str) -> None:
    engine = FakeEngine()
    refit = await make_refit(engine, 1)
    for version in range(3):
        await refit.publish(version)
    assert refit.latest == 2
    log = []

    async def publish() -> None:
        await refit.publish(3)
        log.append("published")

    async with anyio.create_task_group() as tasks, refit.lease(1) as version:
        tasks.start_soon(publish)
        await anyio.wait_all_tasks_blocked()
        assert (version, refit.latest) == (2, 2)
        log.append("done")
    assert log == ["done", "published"]


async def test_a_lease_may_end_before_its_block(anyio_backend: str) -> None:
    refit = await make_refit(FakeEngine(), 1)
    await refit.publish(0)
    with anyio.fail_after(5):
        async with refit.lease(1) as version, anyio.create_task_group() as tasks:
            tasks.start_soon(refit.publish, 1)
            await anyio.wait_all_tasks_blocked()
            assert (version, refit.latest) == (0, 0)
            refit.end_lease(1)
        async with refit.lease(1), refit.lease(2):  # what has ended once has not ended twice
            refit.end_lease(2)
            with anyio.move_on_after(0.02) as waits:
                await refit.publish(2)
            assert waits.cancelled_caught


@pytest.mark.parametrize("waits_for", ["the last request", "the weights"])
async def test_who_comes_while_the_only_version_gives_way_gets_the_next(waits_for: str, anyio_backend: str) -> None:
    refit = await make_refit(engine := InWeights(), 1)
    await refit.publish(0)
    leased = []

    async def come() -> None:
        async with refit.lease(2) as version:
            assert engine.versions == {version}
            leased.append(version)

    async with anyio.create_task_group() as tasks, refit.lease(1) if waits_for == "the last request" else nullcontext():
        tasks.start_soon(refit.publish, 1)
        await anyio.lowlevel.checkpoint()
        await anyio.lowlevel.checkpoint()
        tasks.start_soon(come)
        await anyio.lowlevel.checkpoint()
    assert leased == [1]


async def test_publish_waits_for_a_slot(anyio_backend: str) -> None:
    engine = FakeEngine()
    refit = await make_refit(engine, 2)
    await refit.publish(0)
    log = []

    async def use(group: int, seconds: float) -> None:
        async with refit.lease(group) as version:
            await anyio.sleep(seconds)
            log.append(f"done with {version}")

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(use, 1, 0.05)
        tasks.start_soon(use, 2, 0.01)
        await anyio.wait_all_tasks_blocked()
        await refit.publish(1)
        log.append("published 1")
        tasks.start_soon(use, 3, 0.02)
        await anyio.wait_all_tasks_blocked()
        await refit.publish(2)
        log.append("published 2")
    assert len(engine.versions) == 2
    assert log.index("done with 0") < log.index("published 2")
    assert log[0] == "published 1"


async def test_a_refused_version_is_not_leased(anyio_backend: str) -> None:
    class Refusing(FakeEngine):
        async def publish(self, version: int, ticket: AdapterTicket) -> RefitReport:
            if version == 1:
                raise RefitError("engine rank 0 holds something else")
            return await super().publish(version, ticket)

    refit = await make_refit(Refusing(), 3)
    await refit.publish(0)
    with pytest.raises(RefitError):
        await refit.publish(1)
    assert refit.latest == 0
    async with refit.lease(1) as version:
        assert version == 0


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@settings(max_examples=30, deadline=None)
@given(
    num_versions=st.integers(1, 5),
    stays=st.lists(st.tuples(st.integers(0, 8), st.integers(0, 12)), max_size=12),
)
def test_whatever_is_leased_is_served(backend: str, num_versions: int, stays: list[tuple[int, int]]) -> None:
    """Leases that begin and end at random times: a version in use is served, and there are never too many."""

    async def run() -> None:
        engine = InWeights() if num_versions == 1 else FakeEngine()
        refit = await make_refit(engine, num_versions)
        await refit.publish(0)

        async def use(group: int, begin: int, duration: int) -> None:
            await anyio.sleep(begin / 1000)
            async with refit.lease(group) as version:
                for _ in range(duration):
                    assert version in engine.versions
                    await anyio.sleep(0.001)

        with anyio.fail_after(10):
            async with anyio.create_task_group() as tasks:
                for group, (begin, duration) in enumerate(stays):
                    tasks.start_soon(use, group, begin, duration)
                for version in range(1, 8):
                    await refit.publish(version)
                    assert version in engine.versions
                    assert len(engine.versions) <= num_versions
                    await anyio.sleep(0.001)

    anyio.run(run, backend=backend)


class Sending(FakeTrainer):
    """Notes when it hands out weights."""

    is_sending = False

    @asynccontextmanager
    async def sending_weights(self, name: str) -> AsyncIterator[WeightsTicket]:
        async with super().sending_weights(name) as ticket:
            self.is_sending = True
            yield ticket
            self.is_sending = False


async def test_full_weights_are_sent_while_the_engine_takes_them(anyio_backend: str) -> None:
    trainer, taken = Sending(), []

    class Taking(FakeEngine):
        async def publish(self, version: int, ticket: Ticket) -> RefitReport:
            taken.append((version, ticket, trainer.is_sending))
            return await super().publish(version, ticket)

    await trainer.create_adapter("policy", LoraConfig())
    refit = Refit(trainer, Taking(), "policy", 2, Events(None), form="full")
    for version in range(2):
        await refit.publish(version)
        await trainer.optim_step("policy", AdamConfig(lr=1e-3))
    assert taken == [(version, WeightsTicket(f"fake-{version}"), True) for version in range(2)]
    assert not trainer.is_sending
    assert refit.latest == 1


async def test_a_publish_takes_as_long_as_the_export_and_the_room_for_it(anyio_backend: str) -> None:
    class Slow(FakeTrainer):
        async def export_adapter(self, name: str) -> AdapterTicket:
            await anyio.sleep(0.02)
            return await super().export_adapter(name)

    trainer = Slow()
    await trainer.create_adapter("policy", LoraConfig())
    report = await Refit(trainer, FakeEngine(), "policy", 2, Events(None)).publish(0)
    assert report.publish_seconds >= 0.019


async def test_a_version_that_is_retired_when_a_publish_is_cancelled_is_gone(anyio_backend: str) -> None:
    """Retired by half its slot would stay taken, and of several engines a second try would be an error."""

    class Slow(FakeEngine):
        async def retire(self, version: int) -> None:
            await anyio.sleep(0.02)
            await super().retire(version)

    refit = await make_refit(engine := Slow(), 2)
    for version in range(2):
        await refit.publish(version)
    with anyio.move_on_after(0.01):
        await refit.publish(2)
    assert 0 not in engine.versions
    await refit.retire_all()
    assert engine.versions == set()
