"""Publishes policy versions and keeps count of who uses them."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from time import monotonic

from anyio import CancelScope, Event

from rlloop.engine import Engine
from rlloop.events import Events
from rlloop.trainer import Trainer
from rlloop.types import AdapterTicket, InFlight, RefitForm, RefitReport


class Refit:
    """Which versions of one adapter the engine serves, at most `num_versions` at once; where that is one, each takes the place of
    the one before it."""

    def __init__(
        self,
        trainer: Trainer,
        engine: Engine,
        adapter: str,
        num_versions: int,
        events: Events,
        in_flight: InFlight = "finish",
        form: RefitForm = "adapter",
    ) -> None:
        self._trainer = trainer
        self._engine = engine
        self._adapter = adapter
        self._num_versions = num_versions
        self._events = events
        self._form = form
        self.in_flight: InFlight = in_flight
        """Of those who take a `lease`."""
        self._leases: Counter[int] = Counter()
        self._leased: dict[int, int] = {}
        """Group -> the version that it has leased."""
        self._served: set[int] = set()
        self._lease_ended = Event()
        self._replaced = Event()
        """Where there is room for one version: not set while it gives way to the next, for which whoever wants one waits."""
        self.latest = -1
        """The newest version that the engine serves."""

    @asynccontextmanager
    async def lease(self, group: int) -> AsyncIterator[int]:
        """The newest version, to begin with; it stays loaded until `end_lease` or the block's end unless requests move on to the
        next."""
        if self.in_flight != "finish":
            yield self.latest
            return
        version = self._leased[group] = await self._take()
        try:
            yield version
        finally:
            self.end_lease(group)

    def end_lease(self, group: int) -> None:
        """Of what samples no more, while it is scored: a publish need not wait for that."""
        if (version := self._leased.pop(group, None)) is not None:
            self._release(version)

    @asynccontextmanager
    async def pin(self) -> AsyncIterator[int]:
        """The newest version, which stays loaded until the block ends."""
        version = await self._take()
        try:
            yield version
        finally:
            self._release(version)

    async def _take(self) -> int:
        while not self._replaced.is_set():
            await self._replaced.wait()
        self._leases[self.latest] += 1
        return self.latest

    def _release(self, version: int) -> None:
        self._leases[version] -= 1
        self._lease_ended.set()

    async def publish(self, version: int) -> RefitReport:
        """Make the engine serve the trainer's present weights as `version`; returns when new requests get them.

        Raises RefitError when what the engine holds is not what the trainer sent.
        """
        started = monotonic()
        if self._num_versions == 1:
            self._replaced = Event()
        with self._events.span("refit", "refit", policy_version=version):
            ticket = None if self._form == "full" else await self._trainer.export_adapter(self._adapter)
            await self._make_room()
            with CancelScope(shield=True):  # a version that is loaded is known, and so retired
                report = await self._load(version, ticket)
                self._served.add(version)
        self.latest = version
        self._replaced.set()
        return replace(report, publish_seconds=monotonic() - started)

    async def retire_all(self) -> None:
        """When nobody samples any more: the engine is left as it was found."""
        for version in sorted(self._served):
            await self._engine.retire(version)
        self._served.clear()

    async def _load(self, version: int, ticket: AdapterTicket | None) -> RefitReport:
        if ticket is not None:
            return await self._engine.publish(version, ticket)
        async with self._trainer.sending_weights(self._adapter) as weights:
            return await self._engine.publish(version, weights)

    async def _make_room(self) -> None:
        """Retire versions that nobody uses; if all are in use, wait until one is not."""
        while True:
            self._lease_ended = Event()
            for old in sorted(v for v in self._served if not self._leases[v] and v != self.latest):
                with CancelScope(shield=True):  # half retired, its slot would stay taken
                    await self._engine.retire(old)
                    self._served.remove(old)
                    del self._leases[old]
            if len(self._served) < self._num_versions:
                return
            if self._num_versions == 1 and not self._leases[self.latest]:  # the next takes its place
                return
            await self._lease_ended.wait()
