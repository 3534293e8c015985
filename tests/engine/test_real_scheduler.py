"""rlloop's scheduler beside vLLM's own: real schedulers, tokens that no model sampled."""

from __future__ import annotations

import random
from collections import defaultdict, deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rlloop.engine.scheduler import OUTPUTS_AT_THE_END, TALLY, make_scheduler
from rlloop.engine.tally import Tally

pytestmark = [pytest.mark.timeout(120), pytest.mark.filterwarnings("ignore")]  # of vLLM
BLOCK = 16


def make_config(model: Path, num_blocks: int, budget: int, is_async: bool, seats: int = 8) -> Any:
    from vllm.config import CacheConfig, ModelConfig, ParallelConfig, SchedulerConfig, VllmConfig

    scheduler = SchedulerConfig(
        max_num_seqs=seats, max_num_batched_tokens=budget, max_model_len=256, is_encoder_decoder=False
    )
    cache = CacheConfig(block_size=BLOCK, enable_prefix_caching=True)
    cache.num_gpu_blocks = num_blocks
    config = VllmConfig(
        scheduler_config=scheduler,
        model_config=ModelConfig(model=str(model), max_model_len=256),
        cache_config=cache,
        parallel_config=ParallelConfig(),
    )
    config.scheduler_config.async_scheduling = is_async  # on a CPU vLLM turns it off
    return config


def start(config: Any, make: Any) -> Any:
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=1, dtype=torch.float32)
    return make(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(config.cache_config.num_gpu_blocks, [], [KVCacheGroupSpec(["layer"], spec)]),
        structured_output_manager=StructuredOutputManager(config),
        block_size=BLOCK,
    )


def request(name: str, prompt: list[int], max_tokens: int, **more: Any) -> Any:
    from vllm import SamplingParams
    from vllm.utils.hashing import get_hash_fn_by_name
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.request import Request

    hash_block = get_hash_fn_by_name("sha256")
    init_none_hash(hash_block)
    return Request(
        name,
        prompt,
        SamplingParams(max_tokens=max_tokens, ignore_eos=True, logprobs=0, **more),
        None,
        block_hasher=get_request_block_hasher(BLOCK, hash_block),
    )


def sampled(scheduled: Any, scheduler: Any) -> Any:
    """A token for each request whose prompt this step completes, or completed before, and 9 once it may end; to be asked right
    after scheduling."""
    from vllm.v1.outputs import LogprobsLists, ModelRunnerOutput

    names = [*scheduled.num_scheduled_tokens]
    rows = np.arange(len(names))
    requests = [scheduler.requests[name] for name in names]
    may_end = [
        0 < one.sampling_params.min_tokens <= one.num_computed_tokens - one.num_prompt_tokens + 1 for one in requests
    ]
    return ModelRunnerOutput(
        req_ids=names,
        req_id_to_index={name: index for index, name in enumerate(names)},
        sampled_token_ids=[
            [9 if ends else 7] if one.num_computed_tokens >= one.num_tokens else []
            for one, ends in zip(requests, may_end, strict=True)
        ],
        logprobs=LogprobsLists(7 + 0 * rows[:, None], -np.random.rand(len(rows), 1).astype(np.float32), rows),
        prompt_logprobs_dict={},
        pooler_output=[],
    )


def follow(scheduler: Any, num_ahead: int) -> tuple[list[Any], dict[str, Any]]:
    """What each step schedules, and where it lies: groups that share a prompt and come at any time, then their whole texts; and
    the tokens and logprobs that went out. The host schedules so many steps before it knows what came of one."""
    generator, seen, running = random.Random(0), [], deque[Any]()
    prompts = [[*range(start, start + generator.randint(1, 40))] for start in range(0, 300, 50)]
    waiting = [(f"{i}-{j}", prompt, generator.randint(1, 70)) for i, prompt in enumerate(prompts) for j in range(3)]
    waiting += [(f"{name}-again", [*prompt, *[7] * length, 1], 3) for name, prompt, length in waiting]
    pool = scheduler.kv_cache_manager.block_pool
    sent = defaultdict[str, Any](lambda: ([], [], []))
    np.random.seed(0)

    def update() -> None:
        for message in scheduler.update_from_output(*running.popleft()).values():
            for one in message.outputs:
                tokens, logprobs, reasons = sent[one.request_id]
                tokens += one.new_token_ids
                logprobs += [] if one.new_logprobs is None else one.new_logprobs.logprobs[:, 0].tolist()
                reasons += [] if one.finish_reason is None else [one.finish_reason]

    while waiting or scheduler.has_requests():
        for _ in range(min(len(waiting), generator.choice([0, 0, 0, 1, 2]))):
            name, prompt, length = waiting.pop(0)
            at_once, stops = name.endswith("2"), name.endswith("1")
            more: dict[str, Any] = {} if at_once else {"extra_args": {OUTPUTS_AT_THE_END: True}}
            more |= {"stop_token_ids": [9], "min_tokens": length} if stops else {}
            scheduler.add_request(request(name, prompt, 99 if stops else length, **more))
        scheduled = scheduler.schedule()
        running.append((scheduled, sampled(scheduled, scheduler)))
        if len(running) > num_ahead:
            update()
        blocks = {name: scheduler.kv_cache_manager.get_block_ids(name) for name in scheduled.num_scheduled_tokens}
        new = {one.req_id: (one.block_ids, one.num_computed_tokens) for one in scheduled.scheduled_new_reqs}
        more = scheduled.scheduled_cached_reqs
        gave_way, cached = {*(scheduled.preempted_req_ids or ())}, [block.block_hash for block in pool.blocks]
        seen.append(
            (dict(scheduled.num_scheduled_tokens), blocks, new, more.req_ids, more.new_block_ids, cached, gave_way)
        )
    while running:
        update()
    return seen, sent


def count_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The new tokens of each call that reaches vLLM's manager of the cache."""
    from vllm.v1.core.kv_cache_manager import KVCacheManager

    found: list[int] = []
    allocate = KVCacheManager.allocate_slots

    def counted(manager: Any, request: Any, num_new_tokens: int, *rest: Any, **more: Any) -> Any:
        found.append(num_new_tokens)
        return allocate(manager, request, num_new_tokens, *rest, **more)

    monkeypatch.setattr(KVCacheManager, "allocate_slots", counted)
    return found


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("budget", [512, 17], ids=["prompts whole", "prompts in parts"])
@pytest.mark.parametrize("num_blocks", [200, 18], ids=["room for all", "some must give way"])
def test_every_token_lies_where_vllm_would_put_it(
    num_blocks: int, budget: int, is_async: bool, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler

    tally = Tally()
    monkeypatch.setenv(TALLY, tally.location)
    config = make_config(tiny_llama, num_blocks, budget, is_async)
    theirs, sent_by_them = follow(start(config, AsyncScheduler if is_async else Scheduler), int(is_async))
    calls = count_calls(monkeypatch)
    found, sent = follow(start(config, make_scheduler), int(is_async))
    assert found == theirs
    assert sent == sent_by_them
    assert len({len(tokens) for name, (tokens, *_) in sent.items() if tokens[-1] == 9}) > 3, "some stop, not at once"
    assert tally.num_tokens == sum(len(tokens) for tokens, *_ in sent.values())
    hits = [computed for step in found for name, (_, computed) in step[2].items() if name.endswith("again")]
    assert max(hits) > 3 * BLOCK, "what was sampled is in the prefix cache"
    assert any(step[-1] for step in found) == (num_blocks < 100)
    num_tokens = sum(number == 1 for step in found for number in step[0].values())
    assert calls.count(1) < 0.4 * num_tokens


class Driver:
    """A scheduler, step by step, as its engine calls it."""

    def __init__(self, model: Path, seats: int, *, is_async: bool, budget: int = 2048, has_graphs: bool = True) -> None:
        from vllm.config import CUDAGraphMode

        self._tally = Tally()
        config = make_config(model, 2000, budget, is_async, seats)
        if has_graphs:
            config.compilation_config.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(TALLY, self._tally.location)
            self.scheduler = start(config, make_scheduler)
        self._num_added = 0
        self._num_ahead = int(is_async)
        self._running = deque[Any]()

    def add(self, number: int, max_tokens: int = 200, prompt: int = 4) -> None:
        for _ in range(number):
            self._num_added += 1
            tokens = [1000 * self._num_added, *range(1, prompt)]
            self.scheduler.add_request(request(f"{self._num_added}", tokens, max_tokens))

    def steps(self, number: int) -> list[int]:
        """How many requests begin in each of so many steps."""
        begin = []
        for _ in range(number):
            scheduled = self.scheduler.schedule()
            self._running.append((scheduled, sampled(scheduled, self.scheduler)))
            if len(self._running) > self._num_ahead:
                self.scheduler.update_from_output(*self._running.popleft())
            begin.append(len(scheduled.scheduled_new_reqs))
        return begin


either = pytest.mark.parametrize("is_async", [False, True])


@either
def test_few_requests_wait_for_others_to_begin_with(is_async: bool, tiny_llama: Path) -> None:
    driver = Driver(tiny_llama, seats=100, is_async=is_async)
    driver.add(48)
    assert driver.steps(2) == [48, 0]  # nobody runs whom a prompt would hold up
    driver.add(1)
    assert driver.steps(10) == [*[0] * 8, 1, 0]  # not for long
    driver.add(2)
    assert driver.steps(2) == [0, 0]
    driver.add(1)
    assert driver.steps(2) == [3, 0]  # of 49 that run 3 are enough
    driver.add(1)
    assert driver.steps(9) == [*[0] * 8, 1]  # counted anew


@either
def test_seats_are_taken_several_at_once(is_async: bool, tiny_llama: Path) -> None:
    """More wait than there is room for, and one of those that run ends in each step."""
    driver = Driver(tiny_llama, seats=64, is_async=is_async)
    for length in range(1, 65):
        driver.add(1, max_tokens=10 + length)
    driver.steps(10)
    driver.add(100)
    begin = driver.steps(40)
    assert sum(begin) >= 36
    assert {number for number in begin if number} == {3}  # of the 61 that run, when three seats are free


@either
def test_where_few_run_or_a_prompt_is_computed_anyway_none_waits(is_async: bool, tiny_llama: Path) -> None:
    few = Driver(tiny_llama, seats=64, is_async=is_async)
    few.add(31)
    few.steps(1)
    few.add(1)
    assert few.steps(1) == [1]
    in_parts = Driver(tiny_llama, seats=100, is_async=is_async, budget=100)
    in_parts.add(48)
    in_parts.steps(3)
    in_parts.add(3, prompt=100)
    assert in_parts.steps(2) == [1, 1]  # where the first one's prompt goes on


def test_without_graphs_none_waits(tiny_llama: Path) -> None:
    driver = Driver(tiny_llama, seats=100, is_async=False, has_graphs=False)
    driver.add(48)
    driver.steps(1)
    driver.add(1)
    assert driver.steps(1) == [1]


def test_a_gap_between_tokens_that_are_held_back_is_measured(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("rlloop.engine.scheduler.time", SimpleNamespace(monotonic=lambda: now[0]))
    driver = Driver(tiny_llama, seats=4, is_async=False)
    driver.scheduler.add_request(request("a", [1, 2, 3, 4], 50, extra_args={OUTPUTS_AT_THE_END: True}))
    driver.steps(3)
    now[0] += 0.5
    driver.steps(1)  # its eighth token, in the midst of a block
    assert (driver._tally.num_tokens, driver._tally.longest_gap_seconds) == (4, 0.5)
