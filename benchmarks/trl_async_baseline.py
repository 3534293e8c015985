"""TRL's AsyncGRPOTrainer with a vLLM server beside it: the other side of end_to_end.py, which starts this as its own process.

    python benchmarks/trl_async_baseline.py --model MODEL_FOLDER --prompts prompts.json --groups 32 --tokens 256

The server has the first of the visible GPUs, the trainer the last; a single one they share. New adapters go to the server as
files, in TRL's way, and each request names its own. Prints one line of JSON: of each step the seconds, those in which it
trained, samples, and tokens: those sampled, those of whole sequences, and those computed, a prompt once for the samples that
share a pass. Age, reward and what was dropped are of the passes that TRL had fetched by then, one ahead.

Tuned against the defaults of TRL 1.16: frozen weights in bfloat16 (fp32), no gradient checkpointing (on), passes of so many
samples that they have as many tokens as rlloop's, a queue of one step (1,024 samples). As by default two steps are in flight,
beside that queue, where rlloop counts both together, and what is more than four versions old is dropped, where rlloop corrects
for its age. Its attention is a kernel from the hub, FlashAttention 3. torch's FlashAttention 2 stands in for it, as machines
without network need: slower in attention, a few percent of the work of these shapes. On a CPU, to rehearse, plain attention.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from trl_baseline import GROUP_SIZE, REWARDS, make_parser

if TYPE_CHECKING:
    from torch import Tensor

# How to read an answer, which TRL knows of some chat templates only.
ANSWER = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {"content": {"close_pattern": r"<\|im_end\|>\s*", "content": "text"}},
}
GPUS = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]


@contextmanager
def serving(options: argparse.Namespace, log: Path) -> Iterator[str]:
    """-> the address of a server that starts. Adapters can be loaded into it as it runs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    slots = "10"  # as rlloop has; TRL asks for two more than its max_staleness
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", options.model]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", options.dtype, "--max-model-len", str(options.max_model_len), "--max-num-seqs", "512"]
    command += ["--enable-lora", "--max-lora-rank", str(options.rank), "--max-loras", slots, "--max-cpu-loras", slots]
    command += ["--disable-uvicorn-access-log", "--no-enable-log-requests"]
    if GPUS:
        command += ["--kv-cache-memory-bytes", str(options.kv_cache_gib << 30), "--gpu-memory-utilization", "0.01"]
    else:
        command += ["--enforce-eager", "--no-enable-chunked-prefill", "--max-num-batched-tokens", "4096"]
    flags = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    flags |= {"CUDA_VISIBLE_DEVICES": GPUS[0]} if GPUS else {}
    with log.open("w") as output:
        server = subprocess.Popen(command, env={**os.environ, **flags}, stdout=output, stderr=output)
        is_over = threading.Event()

        def watch() -> None:
            server.wait()
            if not is_over.is_set():  # TRL would ask it for minutes
                os.kill(os.getpid(), signal.SIGTERM)

        threading.Thread(target=watch, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            is_over.set()
            server.terminate()
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:
                server.kill()


def attend(
    query: Tensor, key: Tensor, value: Tensor, query_ends: Tensor, key_ends: Tensor, *longest: int, **how: Any
) -> Tensor:
    """Of FlashAttention 3's interface what TRL uses, causal: query [T, H, D], key and value [U, K, D] -> [T, H, D]."""
    import torch

    scale, ends = how["softmax_scale"], (query_ends, key_ends)
    if query.is_cuda:
        forward = torch.ops.aten._flash_attention_forward
        out: Tensor = forward(query, key, value, *ends, *longest, 0.0, True, False, scale=scale)[0]
        return out
    parts = []
    for (begin, end), (first, last) in zip(*map(pairwise, ends), strict=True):
        # [1, heads, tokens, D]; causal from the last key on.
        q, k, v = (each.transpose(0, 1)[None] for each in (query[begin:end], key[first:last], value[first:last]))
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
        part = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
        parts.append(part[0].transpose(0, 1))
    return torch.cat(parts)


def build_trainer(options: argparse.Namespace, address: str, output_dir: str) -> Any:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer
    from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer, async_grpo_trainer, packing

    packing._flash_attn = lambda: SimpleNamespace(flash_attn_varlen_func=attend)
    async_grpo_trainer.get_peak_flops_per_device = lambda *_: None  # it fails without a GPU, and is for logs
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokenizer.response_template = ANSWER
    config = AsyncGRPOConfig(
        output_dir=output_dir,
        use_cpu=not torch.cuda.is_available(),
        bf16=torch.cuda.is_available(),
        dtype=options.dtype,
        gradient_checkpointing=False,
        token_budget=-1,
        per_device_train_batch_size=options.groups * GROUP_SIZE // options.passes,
        gradient_accumulation_steps=options.passes,
        num_generations=GROUP_SIZE,
        max_completion_length=options.tokens,
        temperature=1.0,
        learning_rate=options.lr,
        max_steps=options.warmup + options.steps,
        max_staleness=4,
        max_inflight_tasks=2 * options.groups * GROUP_SIZE,
        queue_maxsize=options.groups * GROUP_SIZE,
        vllm_server_base_url=address,
        vllm_server_timeout=600.0,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    return AsyncGRPOTrainer(
        options.model,
        reward_funcs=REWARDS[options.reward],
        args=config,
        train_dataset=Dataset.from_list([{"prompt": chat} for chat in json.loads(options.prompts.read_text())]),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules="all-linear"),
    )


def measure(trainer: Any) -> list[dict[str, float]]:
    """Train; what each step was."""
    import torch
    from transformers import TrainerCallback

    steps: list[dict[str, float]] = []
    ends, training, run_pass = [0.0], [0.0], trainer.training_step

    def timed_pass(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        result = run_pass(*args, **kwargs)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        training[0] += time.perf_counter() - started
        return result

    class Steps(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            ends[0] = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())
            metrics = trainer._metrics["train"]
            samples = round(metrics["batch/samples_per_step"][-1])
            steps.append(
                {
                    "seconds": ends[-1] - ends[-2],
                    "training": training[0] + metrics["perf/optimizer_s"][-1],
                    "samples": samples,
                    "num_sampled": metrics["batch/trained_tokens_per_step"][-1],
                    "num_whole": samples * statistics.fmean(metrics["sample/forwarded_tokens_mean"]),
                    "num_computed": metrics["batch/forwarded_tokens_per_step"][-1],
                    "reward": statistics.fmean(metrics["reward"]),
                    "age": statistics.fmean(metrics["sample/staleness_mean"]),
                    "dropped": sum(metrics["sample/dropped_stale_total"]),
                }
            )
            metrics.clear()
            training[0] = 0.0
            sys.stderr.write(
                f"step {len(steps)}: {steps[-1]['seconds']:.1f} s, of training {steps[-1]['training']:.1f}\n"
            )

    trainer.training_step = timed_pass
    trainer.add_callback(Steps())
    trainer.train()
    return steps


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--passes", type=int, default=1, help="forward and backward passes of a step; divides its samples"
    )
    parser.add_argument("--max_model_len", type=int, default=512)
    parser.add_argument("--kv_cache_gib", type=int, default=8)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through what ends the server
    with tempfile.TemporaryDirectory() as scratch, serving(options, Path(scratch) / "server.log") as address:
        if GPUS:
            os.environ["CUDA_VISIBLE_DEVICES"] = GPUS[-1]  # before torch looks
        try:
            steps = measure(build_trainer(options, address, scratch))
        except BaseException:
            sys.stderr.write((Path(scratch) / "server.log").read_text()[-5000:])
            raise
    print(json.dumps({"steps": steps[options.warmup :], "rewards": [step["reward"] for step in steps]}))


if __name__ == "__main__":
    main()
