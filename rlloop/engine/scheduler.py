"""vLLM's scheduler, but that the logprobs of a request's tokens leave the engine's process at its end, and not one by one.

vLLM slices, encodes, sends and unpacks three small arrays for each sampled token, which is what bounds small models.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
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

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """vLLM's, whose outputs have no logprobs of requests that want them at the end, but all of them there."""
        step = None
        if model_runner_output.logprobs is not None:
            # Here, for vLLM forgets those that end.
            requests = [self.requests.get(name) for name in model_runner_output.req_ids]
            step = model_runner_output.logprobs = _Step(model_runner_output.logprobs, requests)
        outputs = super().update_from_output(scheduler_output, model_runner_output)  # type: ignore[misc]
        if step is not None:
            step.hand_over(output for each in outputs.values() for output in each.outputs)
        return outputs


class _Step:
    """In the place of one step's LogprobsLists: vLLM asks it for those of each token that it keeps."""

    def __init__(self, lists: Any, requests: Sequence[Any]) -> None:
        self._lists = lists
        self._requests = requests
        self._columns = [lists.logprob_token_ids[:, 0].tolist(), lists.logprobs[:, 0].tolist()]
        self._columns.append(lists.sampled_token_ranks.tolist())
        self._held: dict[str, _Held] = {}

    def slice_request(self, index: int, number: int) -> Any:
        """Of so many tokens of one request; None where they are held back."""
        request = self._requests[index]
        if LOGPROBS_AT_THE_END not in (request.sampling_params.extra_args or ()):
            return self._lists.slice_request(index, number)
        if not hasattr(request, "held_logprobs"):
            request.held_logprobs = _Held()
        starts = self._lists.cu_num_generated_tokens
        start = index if starts is None else starts[index]
        request.held_logprobs.extend(column[start : start + number] for column in self._columns)
        self._held[request.request_id] = request.held_logprobs
        return None

    def hand_over(self, outputs: Iterable[Any]) -> None:
        """Give those of requests that end in this step all that was held back."""
        for output in outputs:
            if output.finish_reason is not None and output.request_id in self._held:
                output.new_logprobs = type(self._lists)(*self._held[output.request_id].arrays())


class _Held:
    """Of all of a request's tokens so far: ids, logprobs and ranks."""

    def __init__(self) -> None:
        self._columns: tuple[array[Any], ...] = (array("q"), array("f"), array("q"))

    def extend(self, columns: Iterable[Sequence[Any]]) -> None:
        for own, more in zip(self._columns, columns, strict=True):
            own.extend(more)

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """[n, 1], [n, 1] and [n], as vLLM has those of several tokens of one request."""
        ids, logprobs, ranks = map(np.array, self._columns)
        return ids[:, None], logprobs[:, None], ranks
