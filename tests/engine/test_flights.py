"""Which version sampled which token of a request that versions changed under."""

from __future__ import annotations

from dataclasses import replace

import anyio
import numpy as np
import pytest
from anyio.abc import TaskStatus

from rlloop.engine.flights import Flights, Swap, continued, joined
from rlloop.types import Completion, GenerationRequest, InFlight

pytestmark = pytest.mark.anyio

REQUEST = GenerationRequest((1, 2, 3), policy_version=0, max_tokens=10, seed=5, in_flight="restart")


def completion(version: int, *tokens: int) -> Completion:
    return Completion(np.array(tokens, np.int32), -np.array(tokens, np.float32), version, "length")


def test_a_swap_is_where_the_engine_saw_it() -> None:
    flights = Flights()
    with flights.start(3, "hop") as flight, flights.start(3, "finish") as pinned, flights.start(3, "hop") as other:
        flights.swap(Swap(4, 10.0, {flight.request_id: 2, pinned.request_id: 1, other.request_id: 5}))
        flights.swap(Swap(5, 20.0, {flight.request_id: 4, pinned.request_id: 3, other.request_id: 5}))
    versions = flight.token_versions(6, last_token_at=25.0)
    assert versions is not None
    assert versions.tolist() == [3, 3, 4, 4, 5, 5]
    assert versions.dtype == np.int32
    assert pinned.token_versions(6, 25.0) is None
    versions = other.token_versions(6, 25.0)
    assert versions is not None
    assert versions.tolist() == [3, 3, 3, 3, 3, 5]  # version 4 sampled nothing of it


def test_a_request_that_the_engine_does_not_know_at_a_swap_had_ended_or_not_begun() -> None:
    flights = Flights()
    with flights.start(3, "hop") as flight:
        flights.swap(Swap(4, 10.0, {}))
    ended, begun = flight.token_versions(2, last_token_at=9.0), flight.token_versions(2, last_token_at=11.0)
    assert ended is not None
    assert begun is not None
    assert (ended.tolist(), begun.tolist()) == ([3, 3], [4, 4])


def test_those_that_restart_are_cut_off_once() -> None:
    flights = Flights()
    with flights.start(3, "restart") as old, flights.start(4, "restart"), flights.start(3, "hop"):
        assert flights.to_restart(4) == [old.request_id]
    assert flights.to_restart(4) == []


@pytest.mark.parametrize(("in_flight", "waits"), [("finish", True), ("restart", True), ("hop", False)])
async def test_a_slot_is_left_when_no_request_needs_it(in_flight: InFlight, waits: bool) -> None:
    flights, order = Flights(), []

    async def fly(*, task_status: TaskStatus[None]) -> None:
        with flights.start(3, in_flight):
            task_status.started()
            await anyio.wait_all_tasks_blocked()
            order.append("landed")

    async with anyio.create_task_group() as tasks:
        await tasks.start(fly)
        await flights.leave(2)
        order.append("2 is free")
        await flights.leave(3)
        order.append("3 is free")
    assert order == (["2 is free", "landed", "3 is free"] if waits else ["2 is free", "3 is free", "landed"])


def test_a_completion_goes_on_where_it_was_cut_off() -> None:
    first = completion(0, 7, 8)
    rest = continued(REQUEST, first)
    assert (rest.tokens, rest.max_tokens) == ((1, 2, 3, 7, 8), 8)
    assert rest.seed is not None
    assert 0 <= rest.seed < 2**32
    assert len({REQUEST.seed, rest.seed, continued(rest, completion(1)).seed}) == 3  # also where nothing was sampled
    assert continued(replace(REQUEST, seed=None), first).seed is None
    whole = joined([completion(0), first, completion(2), completion(3, 9)])
    assert whole.tokens.tolist() == [7, 8, 9]
    assert whole.logprobs.tolist() == [-7, -8, -9]
    assert whole.policy_version == 0
    assert whole.token_versions is not None
    assert whole.token_versions.tolist() == [0, 0, 3]
    assert joined([first]) is first
    assert joined([completion(0), completion(2, 9)]).policy_version == 2
