"""vLLM's scheduler with less to do for each token: that is what bounds small models, and how many engines one loop can serve.

A request's tokens and their logprobs leave the engine's process at its end: vLLM slices and encodes an output for each of them,
and our process decodes it and keeps its books. Until then a token after which the request goes on is written down, and no more.
One that fits into its request's last block asks for no memory. And requests begin several at once: a step with a prompt in it is
launched piece by piece, one that only decodes as one CUDA graph.
"""

from __future__ import annotations

import os
import time
from array import array
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from typing import Any

import numpy as np

from rlloop.engine import vllm_compat
from rlloop.engine.tally import Tally
from rlloop.processes import end_with_parent

SCHEDULER = f"{__name__}.make_scheduler"
OUTPUTS_AT_THE_END = "outputs_at_the_end"
"""In a request's `extra_args`. Not for one that may end elsewhere and be read nevertheless, by an abort or at a stop string: what
is held goes with it. Nor with a grammar, images or a search for repetitions, for which each token is more than written down."""
BEGIN_TOGETHER = 16
"""Requests wait until they are one for so many that run,"""
LONGEST_WAIT = 8
"""but not for more steps than this."""
TALLY = "RLLOOP_TALLY"
"""Environment variable: where the engine's `Tally` is."""


def make_scheduler(vllm_config: Any, **arguments: Any) -> Any:
    """What vLLM calls to make its scheduler: its own, with outputs held back."""
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler

    end_with_parent()  # here, for vLLM calls this in the engine's process, whose workers end with it
    base = AsyncScheduler if vllm_config.scheduler_config.async_scheduling else Scheduler
    scheduler: Any = type(base.__name__, (LeanScheduler, base), {})(vllm_config=vllm_config, **arguments)
    scheduler.tally = Tally(os.environ[TALLY])
    scheduler.begins_together = vllm_config.compilation_config.cudagraph_mode.has_full_cudagraphs()
    _skip_open_blocks(scheduler)
    return scheduler


def _skip_open_blocks(scheduler: Any) -> None:
    """vLLM asks the manager of the KV cache for room for each token, half of what it does to schedule one; it has an answer
    only where a block begins, and writes down for the prefix cache where one is full."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    manager, groups = scheduler.kv_cache_manager, scheduler.kv_cache_config.kv_cache_groups
    allocate, cache, nothing = manager.allocate_slots, manager.cache_blocks, manager.empty_kv_cache_blocks
    if len(groups) != 1 or type(groups[0].kv_cache_spec) is not FullAttentionSpec or scheduler.num_lookahead_tokens:
        return
    size = scheduler.open_block_size = groups[0].kv_cache_spec.block_size

    def allocate_slots(request: Any, num_new_tokens: int, **more: Any) -> Any:
        is_within = 0 < request.num_computed_tokens % size < size - 1  # not of one that waits, which has computed none
        if num_new_tokens == 1 and is_within:
            return nothing
        return allocate(request, num_new_tokens, **more)

    def cache_blocks(request: Any, num_computed_tokens: int) -> None:
        if num_computed_tokens % size == 0:
            cache(request, num_computed_tokens)

    manager.allocate_slots, manager.cache_blocks = allocate_slots, cache_blocks


class LeanScheduler:
    """Mixed into a scheduler."""

    requests: dict[str, Any]
    running: list[Any]
    waiting: Any
    max_num_running_reqs: int
    tally: Tally
    max_model_len: int
    scheduler_config: Any
    begins_together = False
    open_block_size = 0
    """Tokens of a block of the KV cache; 0 where something else may happen within one."""
    _num_held_steps = 0

    def schedule(self, throttle_prefills: bool = False) -> Any:
        """vLLM's, which can leave prompts to a later step, but does so with engines that step together in mind, and not where all
        seats are taken. There one that ends makes room for the next, so nearly every step would have a prompt."""
        num_beginning = min(len(self.waiting), self.max_num_running_reqs - len(self.running))
        are_few = self.begins_together and 0 < num_beginning < len(self.running) // BEGIN_TOGETHER
        if are_few and self._num_held_steps < LONGEST_WAIT and not any(each.is_prefill_chunk for each in self.running):
            self._num_held_steps += 1
            self.prefill_capacity_bound = False
            throttle_prefills = True
        else:
            self._num_held_steps = 0
        return super().schedule(throttle_prefills)  # type: ignore[misc]

    def add_request(self, request: Any) -> None:
        """vLLM's, and whether this one's outputs are held back."""
        params = request.sampling_params
        is_late = params is not None and OUTPUTS_AT_THE_END in (params.extra_args or ())
        request.held_logprobs = array("f") if is_late else None
        request.last_tokens = {params.eos_token_id, *(params.stop_token_ids or ())} if is_late else ()
        request.num_sent = 0
        request.last_token_at = None
        super().add_request(request)  # type: ignore[misc]

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """vLLM's, but of requests that want it so only the first token goes out at once, for the time at which it came; and where
        nothing is left there is no message."""
        # Here, for vLLM forgets those that end.
        requests = {name: self.requests.get(name) for name in model_runner_output.req_ids}
        lists = model_runner_output.logprobs
        if lists is not None:
            model_runner_output.logprobs = _Logprobs(lists, [*requests.values()])
            if self.open_block_size and model_runner_output.sampled_token_ids:
                scheduler_output = copy(scheduler_output)
                scheduler_output.num_scheduled_tokens = self._go_on(
                    scheduler_output.num_scheduled_tokens, model_runner_output, requests
                )
        outputs = super().update_from_output(scheduler_output, model_runner_output)  # type: ignore[misc]
        for each in outputs.values():
            each.outputs = self._to_send(each.outputs, requests, type(lists))
            if (load := each.scheduler_stats) is not None:
                self.tally.set_load(load.num_running_reqs, load.num_waiting_reqs, load.kv_cache_usage)
        return {client: each for client, each in outputs.items() if each.outputs or each.finished_requests}

    def _go_on(self, scheduled: Mapping[str, int], output: Any, requests: Mapping[str, Any]) -> dict[str, int]:
        """What vLLM's does for a request that gets one token in the midst of a block, and neither begins nor ends with it; ->
        `scheduled` without those."""
        from vllm.v1.request import RequestStatus

        rest, now = dict(scheduled), time.monotonic()
        num_tokens, since = 0, now
        size, is_async = self.open_block_size, self.scheduler_config.async_scheduling
        for index, (name, request) in enumerate(requests.items()):
            sampled = output.sampled_token_ids[index]
            if (
                request is None
                or not request.held_logprobs
                or len(sampled) != 1
                or scheduled[name] != 1
                or request.status != RequestStatus.RUNNING
                or vllm_compat.num_unwanted_tokens(request)
                or sampled[0] in request.last_tokens
            ):
                continue
            number = len(request._all_token_ids) + 1
            # vLLM hashes a block when it is full, and puts it into the prefix cache with the token after.
            if (
                number % size < 2
                or number >= self.max_model_len
                or len(request._output_token_ids) + 1 >= request.max_tokens
            ):
                continue
            del rest[name]
            request.num_in_flight_tokens -= 1
            if is_async:  # it knew of the token before it was sampled
                request.num_output_placeholders -= 1
            request._output_token_ids.append(sampled[0])
            request._all_token_ids.append(sampled[0])
            output.logprobs.slice_request(index, 1)
            num_tokens += 1
            since = min(since, request.last_token_at)
            request.last_token_at = now
        self.tally.add(num_tokens, now - since)
        return rest

    def _to_send(self, outputs: Iterable[Any], requests: Mapping[str, Any], lists_type: Any) -> list[Any]:
        sent, num_tokens, gap, now = [], 0, 0.0, time.monotonic()
        for output in outputs:
            request = requests.get(output.request_id)
            if request is not None:
                if output.new_token_ids:
                    num_tokens += len(output.new_token_ids)
                    gap = max(gap, now - (request.last_token_at or now))
                    request.last_token_at = now
                if request.held_logprobs is not None:
                    if output.finish_reason is not None:
                        _hand_over(request, output, lists_type)
                    elif request.num_sent:
                        continue
                    else:
                        request.num_sent = len(output.new_token_ids)
            sent.append(output)
        self.tally.add(num_tokens, gap)
        return sent


def _hand_over(request: Any, output: Any, lists_type: Any) -> None:
    """All that was held back of a request that ends. Nobody reads the ranks, which vLLM wants to see."""
    tokens = request.output_token_ids[:]
    output.new_token_ids = tokens[request.num_sent :]
    if request.held_logprobs:
        ids, logprobs = np.array(tokens), np.array(request.held_logprobs)
        output.new_logprobs = lists_type(ids[:, None], logprobs[:, None], np.zeros_like(ids))


class _Logprobs:
    """In the place of one step's LogprobsLists: vLLM asks it for those of each request's tokens that it keeps."""

    def __init__(self, lists: Any, requests: Sequence[Any]) -> None:
        self._lists = lists
        self._requests = requests
        self._logprobs = lists.logprobs[:, 0].tolist()
        self._starts = lists.cu_num_generated_tokens

    def slice_request(self, index: int, number: int) -> Any:
        """Of so many tokens of one request; None where they are held back. Some µs here would halve what is gained."""
        held = self._requests[index].held_logprobs
        if held is None:
            return self._lists.slice_request(index, number)
        start = self._starts[index] if self._starts else index
        held.extend(self._logprobs[start : start + number])
        return None
