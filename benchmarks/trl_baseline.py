"""TRL's GRPOTrainer: the other side of benchmarks/against_trl.py and end_to_end.py, which start this as a process of its own.

    python benchmarks/trl_baseline.py --model MODEL_FOLDER --prompts prompts.json --generation transformers
    python -m torch.distributed.run --standalone --nproc_per_node 2 benchmarks/trl_baseline.py ...      # on two GPUs

The work of one step: 4 prompts x 8 completions of exactly 24 tokens, LoRA rank 8 on all linear layers, one optimizer
step, no KL, no second use of a batch; options change the sizes. prompts.json is a list of chats, each a list of
{"role", "content"} messages. Prints one line of JSON: samples/s and seconds of the median step after the warm-up, and where
that step's time went; and of each step, the warm-up's too, the reward, the mean length of a completion and all tokens so far.

Tuned against the defaults of TRL 1.16 (two shared AMD cores with AVX-512 bf16, one thread, CPU seconds a step, +-10 %):

    bf16 weights, no autocast (the default here)   30.0   (18.6 forward and backward, 11.4 generation)
    bf16 weights, bf16 autocast                    31.9   (19.0, 12.9)
    fp32 weights, bf16 autocast                    30.9   (19.4, 11.5)
    4 microbatches of 8 instead of one of 32       33.6   (21.2, 12.3)
    transformers' continuous batching              36.8   (21.7, 15 to 29)
    vLLM, with importance correction               29.7   (19.4, 4.4; recompute 5.2, weight sync 0.6), vLLM eager
    vLLM, without                                  23.7   (19.4, 3.7; weight sync 0.5), vLLM compiled, TRL's default

No gradient checkpointing, no KL, no second pass, no logging. TRL's fused LM head scores only the completions on a GPU,
but prompt and padding as well on a CPU; nothing switches that.

vLLM 0.32 on a CPU, both modes as TRL 1.16 has them:

  * colocate starts and generates, and fails at its first weight sync: "AttributeError: 'Parameter' object has no
    attribute 'weight_loader'". vLLM packs linear weights for oneDNN and drops the originals; its own reload_weights
    knows, TRL's load_weights does not. `sync_weights` below replaces this one call, so that there is something to
    compare with. Checked with steps at a learning rate of 3e-3: the logprobs of sampler and trainer stay 0.03 apart in
    the mean, as with equal weights (bf16); without any sync they are 0.30 to 0.40 apart.
  * server refuses: "NotImplementedError: Weight synchronization runs on vLLM's NCCL weight-transfer engine, which needs
    a CUDA device, got 'cpu'."
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from pathlib import Path
from typing import Any

GROUPS, GROUP_SIZE, COMPLETION_TOKENS = 4, 8, 24
SAMPLES = GROUPS * GROUP_SIZE
NUM_RANKS = int(os.environ.get("WORLD_SIZE", "1"))  # as torch.distributed.run sets it


class Stopwatch:
    """Seconds per name, each moment counted for the innermost name only. `synchronize` waits for the device."""

    def __init__(self, synchronize: Callable[[], None]) -> None:
        self.seconds: dict[str, float] = {}
        self._synchronize = synchronize
        self._names = ["other"]
        self._since = time.perf_counter()

    def _charge(self) -> None:
        self._synchronize()
        now = time.perf_counter()
        self.seconds[self._names[-1]] = self.seconds.get(self._names[-1], 0.0) + now - self._since
        self._since = now

    @contextmanager
    def running(self, name: str) -> Iterator[None]:
        """Count the time inside for `name`."""
        self._charge()
        self._names.append(name)
        try:
            yield
        finally:
            self._charge()
            self._names.pop()

    def wrap(self, owner: Any, method: str, name: Callable[[], str]) -> None:
        """Replace the method of one object by itself, timed."""
        original = getattr(owner, method)

        @wraps(original)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.running(name()):
                return original(*args, **kwargs)

        setattr(owner, method, timed)

    def lap(self) -> dict[str, float]:
        """What was counted since the last lap."""
        self._charge()
        seconds, self.seconds = self.seconds, {}
        return seconds


def fraction_of_digits(completions: list[list[dict[str, str]]], **_: Any) -> list[float]:
    """A reward that costs nothing and varies within a group, so that every sample has a gradient."""
    texts = [completion[0]["content"] for completion in completions]
    return [sum(character.isdigit() for character in text) / max(len(text), 1) for text in texts]


def fraction_of_vowels(completions: list[list[dict[str, str]]], **_: Any) -> list[float]:
    """The same for random tokens, which are almost never digits."""
    texts = [completion[0]["content"] for completion in completions]
    return [sum(character in "aeiou" for character in text) / max(len(text), 1) for text in texts]


REWARDS = {"digits": fraction_of_digits, "vowels": fraction_of_vowels}


def sync_weights(generation: Any) -> None:
    """TRL's VLLMGeneration.sync_weights for colocated vLLM, through vLLM's own in-place reload.

    TRL's calls the model's load_weights, which fails on a CPU (see above). The tensors are the same merged ones.
    """
    worker = generation.llm.llm_engine.model_executor.driver_worker
    worker.reload_weights(weights_iterator=generation._iter_named_params())
    generation.llm.reset_prefix_cache()


def build_trainer(options: argparse.Namespace, output_dir: str) -> Any:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    chats = json.loads(options.prompts.read_text())
    generation: dict[str, Any] = {"generation_kwargs": {"min_new_tokens": options.tokens}}
    if options.generation == "vllm":
        generation = {
            "use_vllm": True,
            "vllm_mode": "colocate",
            "vllm_max_model_length": max(512, options.tokens + 128),
            "vllm_importance_sampling_correction": options.importance_correction,
            "generation_kwargs": {"ignore_eos": True},
        }
    if options.ends:
        generation["generation_kwargs"] = {}
    if options.continuous_batching:
        generation["use_transformers_continuous_batching"] = True
    config = GRPOConfig(
        output_dir=output_dir,
        use_cpu=not torch.cuda.is_available(),
        bf16=options.autocast,
        gradient_checkpointing=False,
        ddp_find_unused_parameters=False,
        per_device_train_batch_size=options.microbatch,
        gradient_accumulation_steps=options.groups * GROUP_SIZE // options.microbatch // NUM_RANKS,
        num_generations=GROUP_SIZE,
        max_completion_length=options.tokens,
        temperature=1.0,
        num_iterations=1,
        beta=0.0,
        learning_rate=options.lr,
        lr_scheduler_type="constant",
        max_steps=options.warmup + options.steps,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        shuffle_dataset=False,
        **generation,
    )
    return GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype)),
        reward_funcs=REWARDS[options.reward],
        args=config,
        train_dataset=Dataset.from_list([{"prompt": chat} for chat in chats]),
        processing_class=AutoTokenizer.from_pretrained(options.model),
        peft_config=LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules="all-linear"),
    )


def measure(trainer: Any) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """Train; seconds by part of each step, and what was trained in it."""
    import torch
    from transformers import TrainerCallback

    has_gpu = torch.cuda.is_available()
    watch = Stopwatch(torch.cuda.synchronize if has_gpu else lambda: None)
    laps: list[dict[str, float]] = []
    batches: list[dict[str, float]] = []

    class Laps(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            watch.wrap(trainer.optimizer, "step", lambda: "optimizer")
            watch.lap()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            laps.append(watch.lap())
            metrics = trainer._metrics["train"]
            batches.append(
                {
                    "reward": metrics["reward"][-1],
                    "mean_length": metrics["completions/mean_length"][-1],
                    "num_tokens": trainer.state.num_input_tokens_seen,
                }
            )

    watch.wrap(trainer, "_generate_and_score_completions", lambda: "other")
    watch.wrap(trainer, "_generate_single_turn", lambda: "generation")
    watch.wrap(trainer, "_calculate_rewards", lambda: "scoring")
    watch.wrap(trainer, "training_step", lambda: "forward_backward")
    # Without gradient it is the pass that recomputes the sampled tokens' logprobs, which TRL makes for vLLM's samples.
    watch.wrap(
        trainer,
        "_get_per_token_logps_and_entropies",
        lambda: "forward_backward" if torch.is_grad_enabled() else "recompute",
    )
    if trainer.use_vllm:
        if not has_gpu:
            trainer.vllm_generation.sync_weights = partial(sync_weights, trainer.vllm_generation)
        watch.wrap(trainer.vllm_generation, "sync_weights", lambda: "weight_sync")
    trainer.add_callback(Laps())
    trainer.train()
    return laps, batches


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """For the options that TRL's asynchronous trainer has, too."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a Hugging Face model")
    parser.add_argument("--prompts", type=Path, required=True, help="JSON: a list of chats")
    parser.add_argument("--steps", type=int, default=10, help="measured steps")
    parser.add_argument("--warmup", type=int, default=2, help="steps before those")
    parser.add_argument("--groups", type=int, default=GROUPS, help="prompts of a step, on all GPUs together")
    parser.add_argument("--tokens", type=int, default=COMPLETION_TOKENS, help="of a completion, at most")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--reward", choices=list(REWARDS), default="digits")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of the frozen weights")
    return parser


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--generation", choices=["transformers", "vllm"], default="transformers")
    parser.add_argument("--ends", action="store_true", help="completions end where the model ends them, and by then")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--autocast", action=argparse.BooleanOptionalAction, default=False, help="to bf16")
    parser.add_argument("--microbatch", type=int, default=SAMPLES, help="samples of one forward and backward pass")
    parser.add_argument(
        "--importance-correction",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="truncated importance sampling against vLLM, for which TRL recomputes the logprobs",
    )
    parser.add_argument("--continuous-batching", action="store_true")
    options = parser.parse_args()

    # In the trainer's own process vLLM must not pin its threads: torch's are the same ones.
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

    import torch

    with tempfile.TemporaryDirectory() as output_dir:
        trainer = build_trainer(options, output_dir)
        torch.set_num_threads(options.threads)  # after vLLM, which sets it
        laps, batches = measure(trainer)
    if os.environ.get("RANK", "0") != "0":
        return
    laps = laps[options.warmup :]
    step_seconds = statistics.median(sum(lap.values()) for lap in laps)
    parts = sorted({name for lap in laps for name in lap})
    print(
        json.dumps(
            {
                "samples_per_second": options.groups * GROUP_SIZE / step_seconds,
                "step_seconds": step_seconds,
                "seconds": {name: statistics.median(lap.get(name, 0.0) for lap in laps) for name in parts},
                "steps": [sum(lap.values()) for lap in laps],
                "batches": batches,
                "settings": {name: str(value) for name, value in vars(options).items()},
            }
        )
    )


if __name__ == "__main__":
    main()
