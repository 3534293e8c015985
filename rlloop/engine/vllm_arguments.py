"""What vLLM is started with: arguments and environment, from an engine's settings and its place."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlloop.config import EngineSettings
from rlloop.errors import ConfigError
from rlloop.placement import MEMORY_SHARE, divide, gpu_bytes, visible_gpus
from rlloop.types import LoraConfig

_BLOCKS = "VLLM_TUNED_CONFIG_FOLDER"
"""Where vLLM looks for blocks of its LoRA kernels, by the GPU's name. `benchmarks/lora_kernels.py` found those here."""


def slots(number: int, lora: LoraConfig) -> dict[str, Any]:
    """Room for so many adapters, and only on the layers that get one: on others vLLM would compute with empty ones."""
    return {
        "enable_lora": True,
        "max_loras": number,
        "max_cpu_loras": number,  # fewer, and vLLM's caches evict one in use
        "max_lora_rank": next(rank for rank in (8, 16, 32, 64, 128, 256, 320, 512) if rank >= lora.rank),
        "lora_target_modules": list(lora.targets),
    }


def device_arguments(settings: EngineSettings, cores: frozenset[int] | None, kept_bytes: int) -> dict[str, Any]:
    """How it computes, and the memory it may take; `kept_bytes` of each GPU's are for W0, beside the weights that are merged.

    Raises ConfigError when nothing is left.
    """
    if cores is None:
        share = settings.gpu_memory_utilization or MEMORY_SHARE
        memory: dict[str, float] = {"gpu_memory_utilization": share}
        if settings.kv_cache_gib is not None:
            # Then the share is not used, only held against what is free, of which others may have taken much.
            memory = {"kv_cache_memory_bytes": settings.kv_cache_gib << 30, "gpu_memory_utilization": 0.01}
        elif kept_bytes:
            memory["gpu_memory_utilization"] -= kept_bytes / gpu_bytes()
            if memory["gpu_memory_utilization"] <= 0:
                raise ConfigError(
                    f"--refit.form merged keeps {kept_bytes / 1e9:.1f} GB of weights on each GPU beside those that are merged, "
                    f"more than --engine.gpu-memory-utilization {share} allows: raise it, or set "
                    "--placement.tensor-parallel"
                )
        if settings.enforce_eager:
            return {**memory, "enforce_eager": True}
        return {**memory, "compilation_config": {"cudagraph_capture_sizes": graph_sizes(settings.max_num_seqs or 512)}}
    return {
        "enforce_eager": True,
        "block_size": 32,  # small, for only whole blocks are shared between prompts
        # A prompt that is split over two steps rewinds its generator, which CPU generators refuse, and the engine dies.
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(4096, settings.max_model_len),
    }


def graph_sizes(max_num_seqs: int) -> list[int]:
    """Tokens of the steps that are recorded as CUDA graphs; smaller steps are padded, larger ones launched kernel by kernel.

    Up to `max_num_seqs` they are vLLM's own, and that number itself, or a full batch has no graph of its own. vLLM's end at 512,
    or at twice that number; but with 512 requests in flight each step in which one begins is larger, and takes 50 ms with
    adapters on an H200, 8B or 135M alike. So they go on to 2,048, at which vLLM's engine ends a step, each an eighth larger.
    """
    own = [1, 2, 4, *range(8, 256, 8), *range(256, 2049, 16)]
    eighths = [size for start in (64, 128, 256, 512, 1024) for size in range(start, 2 * start, start // 8)]
    fine = {size for size in own if size <= max(64, max_num_seqs)}
    return sorted({max_num_seqs, *fine, *eighths, 2048})


def gpu_order(gpus: Sequence[int]) -> dict[str, str]:
    """The environment in which vLLM's first GPUs are `gpus` of those that this process sees. It sees the others too, for it maps
    the trainer's memory. Not `device_ids`: code that was compiled for the first GPU is in vLLM's cache, and fails on others.
    """
    visible = visible_gpus()
    order = [*gpus, *(gpu for gpu in range(len(visible)) if gpu not in gpus)]
    return {"CUDA_VISIBLE_DEVICES": ",".join(visible[gpu] for gpu in order)} if visible else {}


def variables(
    settings: EngineSettings, log_path: Path, cores: frozenset[int] | None, tensor_parallel: int, gpus: Sequence[int]
) -> dict[str, str]:
    """The environment of one engine's process."""
    handler = {"class": "logging.FileHandler", "filename": str(log_path.resolve()), "formatter": "plain"}
    logging_config = {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"plain": {"format": "%(asctime)s %(levelname)s %(process)d %(name)s: %(message)s"}},
        "handlers": {"file": handler},
        "loggers": {"vllm": {"handlers": ["file"], "level": "INFO", "propagate": False}},
    }
    config_path = log_path.with_suffix(".logging.json")
    config_path.write_text(json.dumps(logging_config))
    found = {"VLLM_LOGGING_CONFIG_PATH": str(config_path.resolve()), **gpu_order(gpus)}
    if cores is None:
        found[_BLOCKS] = os.environ.get(_BLOCKS, str(Path(__file__).with_name("lora_blocks")))
    else:
        found["VLLM_CPU_KVCACHE_SPACE"] = str(settings.kv_cache_gib or 1)
        parts = [",".join(map(str, sorted(part or ()))) for part in divide(cores, tensor_parallel)]
        found["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(parts)
    return found


def set_environment() -> None:
    """What holds for all engines, and for vLLM in this process while they run."""
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    # After so many the event loop gets a turn; an output is a whole completion.
    os.environ["VLLM_V1_OUTPUT_PROC_CHUNK_SIZE"] = "4"
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
