"""vLLM's scheduler, but that the logprobs of a request's tokens leave the engine's process at its end, and not one by one.

vLLM slices, encodes, sends and unpacks three small arrays for each sampled token, which is what bounds small models.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np

SCHEDULER = f"{__name__}.make_scheduler"
LOGPROBS_AT_THE_END = "logprobs_at_the_end"
"""In a request's `extra_args`. Not for one that may end elsewhere and be read nevertheless, by an abort or at a stop string: what
is held goes with it."""


def make_scheduler(vllm_config: Any, **arguments: Any) -> Any:
    """What vLLM calls to make its scheduler: its own, with logprobs held back."""
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler

    base = AsyncScheduler if vllm_config.scheduler_config.async_scheduling else Scheduler
    return type(base.__name__, (HoldsLogprobs, base), {})(vllm_config=vllm_config, **arguments)


class HoldsLogprobs:
    """Mixed into a scheduler."""

    requests: dict[str, Any]

    def add_request(self, request: Any) -> None:
        """vLLM's, and whether this one's logprobs are held back."""
        wants = (request.sampling_params and request.sampling_params.extra_args) or ()
        request.held_logprobs = array("f") if LOGPROBS_AT_THE_END in wants else None
        super().add_request(request)  # type: ignore[misc]

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """vLLM's, whose outputs have no logprobs of requests that want them at the end, but all of them there."""
        step = None
        if model_runner_output.logprobs is not None:
            # Here, for vLLM forgets those that end.
            requests = [self.requests.get(name) for name in model_runner_output.req_ids]
            step = model_runner_output.logprobs = _Step(model_runner_output.logprobs, requests)
        outputs = super().update_from_output(scheduler_output, model_runner_output)  # type: ignore[misc]
        if step is not None:
            for each in outputs.values():
                for output in each.outputs:
                    index = model_runner_output.req_id_to_index.get(output.request_id)
                    if output.finish_reason is not None and index is not None:
                        step.hand_over(output, index)
        return outputs


class _Step:
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

    def hand_over(self, output: Any, index: int) -> None:
        """Give a request that ends all that was held back of it. Nobody reads the ranks, which vLLM wants to see."""
        request = self._requests[index]
        if request.held_logprobs:
            tokens, logprobs = np.array(request.output_token_ids), np.array(request.held_logprobs)
            output.new_logprobs = type(self._lists)(tokens[:, None], logprobs[:, None], np.zeros_like(tokens))
