"""Outputs that are held back until a request ends, against a stand-in for vLLM's scheduler that sends each token's at once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest

from rlloop.engine.scheduler import OUTPUTS_AT_THE_END, LeanScheduler
from rlloop.engine.tally import Tally


class FakeLists(NamedTuple):
    """vLLM's LogprobsLists."""

    logprob_token_ids: np.ndarray
    logprobs: np.ndarray
    sampled_token_ranks: np.ndarray
    cu_num_generated_tokens: list[int] | None = None

    def slice_request(self, index: int, number: int) -> FakeLists:
        start = index if self.cu_num_generated_tokens is None else self.cu_num_generated_tokens[index]
        return FakeLists(*(array[start : start + number] for array in self[:3]))


class FakeScheduler:
    """What vLLM's does with logprobs, in the order in which it does it: requests that end are forgotten first."""

    tally: Tally

    def __init__(self, *late: str, at_once: tuple[str, ...] = ()) -> None:
        self.requests: dict[str, Any] = {}
        self.tally = Tally()
        for name in (*late, *at_once):
            extra_args = {OUTPUTS_AT_THE_END: True} if name in late else None
            params = SimpleNamespace(extra_args=extra_args, eos_token_id=None, stop_token_ids=None)
            self.add_request(SimpleNamespace(request_id=name, sampling_params=params, output_token_ids=[]))

    def add_request(self, request: Any) -> None:
        self.requests[request.request_id] = request

    def update_from_output(self, ended: set[str], output: Any) -> Any:
        outputs = []
        for index, name in enumerate(output.req_ids):
            if name not in self.requests:
                continue
            self.requests[name].output_token_ids += output.sampled_token_ids[index][: output.num_kept[index]]
            if name in ended:
                del self.requests[name]
            logprobs = output.logprobs.slice_request(index, output.num_kept[index]) if output.logprobs else None
            reason = "length" if name in ended else None
            tokens = output.sampled_token_ids[index][: output.num_kept[index]]
            outputs.append(
                SimpleNamespace(request_id=name, finish_reason=reason, new_logprobs=logprobs, new_token_ids=tokens)
            )
        load = SimpleNamespace(num_running_reqs=len(self.requests), num_waiting_reqs=2, kv_cache_usage=0.5)
        return {0: SimpleNamespace(outputs=outputs, scheduler_stats=load, finished_requests=None)}


class Scheduler(LeanScheduler, FakeScheduler):
    pass


def step(
    scheduler: Scheduler, sampled: dict[str, list[int]], ended: str = "", kept: int | None = None
) -> dict[str, Any]:
    """Token t has logprob -t; -> what each request was sent."""
    tokens = np.array([token for each in sampled.values() for token in each])
    starts = np.cumsum([0, *map(len, sampled.values())]).tolist()
    several = any(len(each) != 1 for each in sampled.values())
    lists = FakeLists(tokens[:, None], -tokens[:, None].astype(np.float32), tokens, starts if several else None)
    num_kept = [len(each) if kept is None else kept for each in sampled.values()]
    output = SimpleNamespace(req_ids=list(sampled), logprobs=lists, num_kept=num_kept)
    output.req_id_to_index = {name: index for index, name in enumerate(sampled)}
    output.sampled_token_ids = [*sampled.values()]
    found = scheduler.update_from_output({*ended}, output)
    return {each.request_id: each for message in found.values() for each in message.outputs}


def check(output: Any, tokens: list[int], logprobs_of: list[int] | None) -> None:
    assert output.new_token_ids == tokens
    if logprobs_of is None:
        assert output.new_logprobs is None
        return
    assert output.new_logprobs.logprob_token_ids.tolist() == [[token] for token in logprobs_of]
    assert output.new_logprobs.logprobs.tolist() == [[-token] for token in logprobs_of]
    assert len(output.new_logprobs.sampled_token_ranks) == len(logprobs_of)


def test_the_first_token_is_sent_and_the_rest_at_the_end() -> None:
    scheduler = Scheduler("a", "b")
    found = step(scheduler, {"a": [3], "b": [4]})
    check(found["a"], [3], None)
    check(found["b"], [4], None)
    assert step(scheduler, {"b": [5], "a": [6]}) == {}
    found = step(scheduler, {"a": [7], "b": [8]}, ended="a")
    assert [*found] == ["a"]
    check(found["a"], [6, 7], [3, 6, 7])
    check(step(scheduler, {"b": [9]}, ended="b")["b"], [5, 8, 9], [4, 5, 8, 9])


def test_one_of_a_single_token_comes_whole() -> None:
    check(step(Scheduler("a"), {"a": [3]}, ended="a")["a"], [3], [3])


def test_others_get_them_at_once() -> None:
    scheduler = Scheduler("a", at_once=("b",))
    found = step(scheduler, {"a": [3], "b": [4]})
    check(found["a"], [3], None)
    check(found["b"], [4], [4])
    found = step(scheduler, {"a": [5], "b": [6]}, ended="ab")
    check(found["a"], [5], [3, 5])
    check(found["b"], [6], [6])


def test_what_is_sampled_is_counted_when_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("rlloop.engine.scheduler.time.monotonic", lambda: now[0])
    scheduler = Scheduler("a", at_once=("b",))
    tally = Tally(scheduler.tally.location)  # as another process sees it
    step(scheduler, {"a": [3, 4], "b": [5]})
    assert (tally.num_tokens, tally.longest_gap_seconds) == (3, 0.0)
    assert (tally.num_running, tally.num_waiting, tally.kv_cache_usage) == (2, 2, 0.5)
    now[0] += 0.5
    step(scheduler, {"a": [6]}, ended="a")
    now[0] += 0.25
    step(scheduler, {"b": [7]})  # which had to wait
    assert (tally.num_tokens, tally.longest_gap_seconds, tally.num_running) == (5, 0.75, 1)
    tally.reset_longest_gap()
    now[0] += 0.125
    step(scheduler, {"b": [8]})
    assert tally.longest_gap_seconds == 0.125
    del scheduler.requests["b"]  # aborted: nobody waits for a token
    now[0] += 9.0
    scheduler.add_request(SimpleNamespace(request_id="c", sampling_params=None, output_token_ids=[]))
    step(scheduler, {"c": [1]})
    assert (tally.num_tokens, tally.longest_gap_seconds) == (7, 0.125)


def test_where_nothing_is_left_there_is_no_message() -> None:
    scheduler = Scheduler("a")
    step(scheduler, {"a": [3]})
    output = SimpleNamespace(req_ids=["a"], logprobs=None, num_kept=[1], sampled_token_ids=[[4]])
    assert scheduler.update_from_output(set(), output) == {}


@pytest.mark.parametrize("kept", [0, 1])
def test_only_of_the_tokens_that_are_kept(kept: int) -> None:
    """vLLM throws tokens away that were sampled ahead."""
    scheduler = Scheduler("a", "b")
    step(scheduler, {"a": [3, 4], "b": [5]})
    step(scheduler, {"a": [6, 7], "b": [8]}, kept=kept)
    rest = [*[6, 7][:kept], 9]
    check(step(scheduler, {"a": [9], "b": [2]}, ended="a")["a"], rest, [3, 4, *rest])


def test_requests_that_are_gone_are_passed_over() -> None:
    scheduler = Scheduler("a")
    check(step(scheduler, {"gone": [1], "a": [3]}, ended="a")["a"], [3], [3])


def test_a_step_without_logprobs_is_vllms() -> None:
    scheduler = Scheduler("a")
    output = SimpleNamespace(req_ids=["a"], logprobs=None, num_kept=[0], sampled_token_ids=[[]])
    assert scheduler.update_from_output(set(), output)[0].outputs[0].new_logprobs is None
