"""Which version sampled which token of a request that versions changed under."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import anyio
import numpy as np
import pytest
import torch
from anyio.abc import TaskStatus

from rlloop.engine.flights import Flights, Swap, continued, joined
from rlloop.engine.vllm import _completion
from rlloop.engine.vllm_compat import num_sampled_tokens
from rlloop.errors import EngineError
from rlloop.types import Completion, GenerationRequest, InFlight

pytestmark = pytest.mark.anyio

REQUEST = GenerationRequest((1, 2, 3), policy_version=0, max_tokens=10, seed=5, in_flight="restart")


def completion(version: int, *tokens: int) -> Completion:
    return Completion(np.array(tokens, np.int32), -np.array(tokens, np.float32), version, "length")


def test_a_swap_is_where_the_engine_saw_it() -> None:
    flights = Flights()
    with flights.start(3, "hop") as flight, flights.start(3, "finish") as pinned, flights.start(3, "hop") as other:
        flights.swap(Swap(4, 10.0, {flight.request_id: 2, pinned.request_id: 1, other.request_id: 5}), moves_all=False)
        flights.swap(Swap(5, 20.0, {flight.request_id: 4, pinned.request_id: 3, other.request_id: 5}), moves_all=False)
    versions = flight.token_versions(6, first_token_at=5.0)
    assert versions.tolist() == [3, 3, 4, 4, 5, 5]
    assert versions.dtype == np.int32
    assert (pinned.token_versions(6, 5.0) == 3).all()
    assert other.token_versions(6, 5.0).tolist() == [3, 3, 3, 3, 3, 5]  # version 4 sampled nothing of it


def test_a_request_that_the_engine_does_not_know_at_a_swap_has_not_begun_or_counts_as_old() -> None:
    """Having begun, it has ended or is preempted, which vLLM's newer model runner forgets."""
    flights = Flights()
    with flights.start(3, "hop") as flight:
        flights.swap(Swap(4, 10.0, {}), moves_all=False)
    assert flight.token_versions(2, first_token_at=9.0).tolist() == [3, 3]
    assert flight.token_versions(2, first_token_at=11.0).tolist() == [4, 4]


def test_a_hop_before_the_first_token_is_none() -> None:
    flights = Flights()
    logprobs = SimpleNamespace(logprobs=[-0.5, -0.25])
    output = SimpleNamespace(token_ids=[7, 8], logprobs=logprobs, finish_reason="length")
    with flights.start(3, "hop") as flight:
        flights.swap(Swap(4, 10.0, {}), moves_all=False)
    whole = _completion(output, flight, first_token_at=11.0)
    assert (whole.policy_version, whole.token_versions) == (4, None)
    flight.swaps.append(Swap(5, 12.0, {flight.request_id: 1}))
    mixed = _completion(output, flight, first_token_at=11.0)
    assert mixed.token_versions is not None
    assert (mixed.policy_version, mixed.token_versions.tolist()) == (4, [4, 5])
    with pytest.raises(EngineError, match="2 tokens with 0 logprobs"):
        _completion(SimpleNamespace(token_ids=[7, 8], logprobs=None, finish_reason="length"), flight, 0.0)
    nothing = _completion(SimpleNamespace(token_ids=[], logprobs=None, finish_reason="abort"), flight, 0.0)
    assert (nothing.policy_version, nothing.token_versions, len(nothing.logprobs)) == (3, None, 0)


def test_both_model_runners_say_how_many_tokens_there_are() -> None:
    older = SimpleNamespace(
        requests={"7-ab12": SimpleNamespace(output_token_ids=[1, 2]), "8": SimpleNamespace(output_token_ids=[])}
    )
    assert num_sampled_tokens(older) == {"7": 2, "8": 0}
    states = SimpleNamespace(
        total_len=SimpleNamespace(gpu=torch.tensor([0, 12, 9], dtype=torch.int32)),
        prompt_len=SimpleNamespace(np=np.array([5, 10, 9], np.int32)),  # the first is of a request that has ended
        req_id_to_index={"7-ab12": 1, "8-cd34": 2},
    )
    assert num_sampled_tokens(SimpleNamespace(req_states=states)) == {"7": 2, "8": 0}


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
    assert joined([completion(0), completion(2, 9)]).token_versions is None
