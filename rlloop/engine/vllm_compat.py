"""What must be done differently with the vLLM versions that rlloop supports, 0.26 to 0.32. Imports vLLM only when called."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

EXPERTS = ("FusedMoE", "RoutedExperts")
"""Names of the class that holds a layer's experts: in 0.26, in 0.32."""


def rename_mapper(model: Any) -> Any:
    """vLLM's renames of Hugging Face names, without its stacking of q, k, v into one key.

    With the unreduced mapper the three fall on one key, nothing is packed, and `set_lora` ends in an IndexError. The
    reduced one is `get_unstacked_mapper()` in 0.26 and `get_rename_mapper()` in 0.32.
    """
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    for name in ("get_rename_mapper", "get_unstacked_mapper"):
        if hasattr(mapper, name):
            return getattr(mapper, name)()
    if getattr(mapper, "orig_to_new_stacked", None):
        raise NotImplementedError("this vLLM's WeightsMapper has neither get_rename_mapper nor get_unstacked_mapper")
    return mapper


def occupy_slot(manager: Any, slot: int, adapter_id: int) -> None:
    """Tell vLLM's LoRAModelManager that a slot holds an adapter, which was put there past it.

    Pinned, or its caches may evict it under requests in flight, and the engine dies.
    """
    from vllm.lora.lora_model import LoRAModel

    manager._registered_adapters[adapter_id] = LoRAModel(adapter_id, 1, {})
    manager._active_adapters[adapter_id] = None
    manager.lora_index_to_id[slot] = adapter_id
    manager.pin_adapter(adapter_id)


def num_shards(layer: Any) -> int:
    """Of how many tensor-parallel ranks each has a part of this LoRA layer. An embedding's does not say in 0.26, and is whole."""
    return int(getattr(layer, "tp_size", 1))


def start_with_what_is_used() -> None:
    """To be called in a worker on a GPU before all else: it records fewer CUDA graphs and compiles fewer kernels than vLLM would.

    Where there are adapters each request has one, so half of the graphs, which are of steps without any, would never be used.
    And of the kernels for sampling the one for top-k and top-p takes some ten seconds. What is asked for nevertheless is
    launched without a graph, or compiled then.
    """
    from vllm import SamplingParams
    from vllm.v1.worker.gpu import model_runner

    numbers_of_adapters = model_runner.get_lora_capture_cases
    model_runner.get_lora_capture_cases = lambda *of: [each for each in numbers_of_adapters(*of) if each] or [0]
    # At 1 vLLM leaves out the temperature's kernel, which the first request at another would then wait for.
    asked = partial(SamplingParams, temperature=0.9, seed=0, logprobs=0, flat_logprobs=True)
    SamplingParams.for_sampler_warmup = staticmethod(asked)


def num_sampled_tokens(model_runner: Any) -> dict[str, int]:
    """How many tokens each request has that the worker knows, by the id that `generate` was given, between two forward passes.

    There are two model runners; 0.26 has the newer one for dense models on GPUs, CPUs have the older one. The newer one forgets
    requests that are preempted. vLLM appends a random suffix to ids, unless it is told not to.
    """
    if hasattr(model_runner, "req_states"):
        states = model_runner.req_states
        lengths = (states.total_len.gpu.cpu() - torch.from_numpy(states.prompt_len.np)).tolist()
        found = {request: lengths[index] for request, index in states.req_id_to_index.items()}
    else:
        found = {request: len(state.output_token_ids) for request, state in model_runner.requests.items()}
    return {request.partition("-")[0]: number for request, number in found.items()}


@contextmanager
def watched_spawn(before: Callable[[], None], after: Callable[[list[Any]], None]) -> Iterator[None]:
    """What vLLM calls in the block before it spawns an engine's processes, and then, with them; for their weights and graphs it
    waits afterwards. What `before` raises goes to who starts the engine."""
    from vllm.v1.engine.utils import CoreEngineProcManager

    spawn = CoreEngineProcManager.__init__

    def watched(manager: Any, *args: Any, **kwargs: Any) -> None:
        before()
        spawn(manager, *args, **kwargs)
        after(manager.processes)

    CoreEngineProcManager.__init__ = watched  # not the class, for which vLLM asks
    try:
        yield
    finally:
        CoreEngineProcManager.__init__ = spawn


def no_metrics() -> Any:
    """In the place of vLLM's Prometheus metrics: those are one set a process, which engines that start side by side register over
    each other, and they take time for each message. vLLM keeps its statistics all the same, and with them first tokens' times."""
    from vllm.v1.metrics.loggers import PrometheusStatLogger

    class NoMetrics(PrometheusStatLogger):
        def __init__(self, vllm_config: Any, engine_indexes: Any) -> None:
            pass

        def record(self, *args: Any, **kwargs: Any) -> None:
            pass

        def log_engine_initialized(self) -> None:
            pass

    return NoMetrics


def sentinels(llm: Any) -> list[int]:
    """File descriptors of which one becomes readable when an engine process has ended."""
    return [process.sentinel for process in llm.engine_core.resources.engine_manager.processes]


def end_processes(llm: Any) -> None:
    """The part of vLLM's shutdown that waits for them, some seconds; what belongs to the event loop is left to `shutdown`."""
    resources = llm.engine_core.resources
    resources.engine_dead = True  # so nobody takes their end for an accident
    resources.engine_manager.shutdown()


def is_death(error: Exception) -> bool:
    """Whether the engine or one of its workers is gone, rather than has refused what it was asked."""
    from vllm.v1.engine.exceptions import EngineDeadError

    return isinstance(error, EngineDeadError) or str(error).endswith((": cancelled", ": Executor failed."))


def num_unwanted_tokens(request: Any) -> int:
    """Tokens of a request of vLLM's scheduler that are on their way, and were asked for before it had to give way."""
    if hasattr(request, "num_stale_output_tokens"):
        return request.num_stale_output_tokens
    return request.async_tokens_to_discard  # vLLM 0.26
