"""What to do with stragglers: correct, drop or wait? The real loop, simulated, against answers with long tails.

    python benchmarks/on_stale.py              all tables, some minutes
    python benchmarks/on_stale.py --steps 60   a first look

Real: Loop, Ledger, Refit, Backlog, on trio under a simulated clock, so that results are exact and repeat. Fake: engine
and trainer are sleeps. Nothing is learned here: the tables say what each choice costs, not what stale data does to a policy.

* Lengths of answers are lognormal, mean 1,024 tokens, cut at 8,192, 8 answers a group; half of the log-variance is
  shared by a group (some prompts ask for long answers). P99/median 1, 2, 4, 8.
* A group is decoded in the time of its longest answer, at a fixed token rate.
* An update takes time in proportion to the tokens of its batch. Balance: a batch of mean length trains in the time in
  which a mean group decodes. A refit takes 1 % of that.
* `roomy` engine: all admitted groups decode at once. `full` engine: as many groups decode at once as one step trains, so
  that engine and trainer have the same throughput; other groups queue, and age, in the engine.

Columns. `steps/s`: over those of the synchronous loop (max_staleness 0), in the middle three fifths of the run.
`tokens/s`: the same of the tokens trained, for who trains short answers makes more steps. `beyond`: groups trained beyond
max_staleness. `groups lost`: dropped, or cancelled as too old while they decoded, of all admitted; `tokens lost`: what
their answers would have been. `length`: mean trained over mean sampled. `versions`: that the engine held at most.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import product
from statistics import mean
from typing import Literal

import anyio
import numpy as np
from _report import Cell, Report
from numpy.typing import NDArray
from trio.testing import MockClock

from rlloop.engine.fake import FakeEngine
from rlloop.events import Events
from rlloop.ledger import Ledger
from rlloop.loop import Loop, Step
from rlloop.refit.publisher import Refit
from rlloop.staleness import Backlog
from rlloop.trainer.fake import FakeTrainer
from rlloop.types import AdapterTicket, Group, LoraConfig, Metrics, Prompt, Rollout

MEAN_TOKENS, MAX_TOKENS, GROUP_SIZE = 1024, 8192, 8
REFIT_SECONDS = 0.01  # a mean group decodes in 1 s
TAILS = (1, 2, 4, 8)
BOUNDS = (1, 2, 4)
CAP = 4  # times the bound: the default of staleness_cap

FORMATS = {
    "steps/s": "{:.2f}x",
    "tokens/s": "{:.2f}x",
    "staleness": "{:.2f}",
    "beyond": "{:.1%}",
    "groups lost": "{:.1%}",
    "tokens lost": "{:.1%}",
    "length": "{:.2f}",
}

EngineKind = Literal["roomy", "full"]
OnStale = Literal["correct", "drop", "wait"]
POLICIES: tuple[OnStale, ...] = ("correct", "drop", "wait")


def draw_lengths(rng: np.random.Generator, tail: float, num_groups: int = 1) -> NDArray[np.float64]:
    """Tokens of each answer [groups, GROUP_SIZE], with P99/median = `tail` before the cut."""
    sigma = math.log(tail) / 2.326
    shared, own = rng.standard_normal((num_groups, 1)), rng.standard_normal((num_groups, GROUP_SIZE))
    log_lengths = math.log(MEAN_TOKENS) - sigma**2 / 2 + sigma * math.sqrt(0.5) * (shared + own)
    return np.clip(np.exp(log_lengths), 1, MAX_TOKENS)


@cache
def means(tail: float) -> tuple[float, float]:
    """(tokens, longest answer) of a mean group."""
    lengths = draw_lengths(np.random.default_rng(0), tail, 200_000)
    return float(lengths.sum(1).mean()), float(lengths.max(1).mean())


@dataclass
class Stages:
    """See `rlloop.loop.Stages`; sleeps instead of working. Times are in units of a mean group's decode."""

    tail: float
    bound: int
    groups_per_step: int
    engine: FakeEngine
    decoding: anyio.CapacityLimiter
    lengths: dict[int, NDArray[np.float64]] = field(default_factory=dict)
    """Of the answers of each prompt that was admitted."""
    steps: list[Step] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)
    num_versions: int = 0

    def task(self, index: int) -> None:
        return None

    async def sample(self, prompt: Prompt, version: int) -> Group:
        self.lengths[prompt.ordinal] = lengths = draw_lengths(np.random.default_rng(prompt.seed), self.tail)[0]
        async with self.decoding:
            await anyio.sleep(lengths.max() / means(self.tail)[1])
        return Group(prompt, (NO_ROLLOUT,), (0.0,), version)

    async def update(self, groups: list[Group]) -> Metrics:
        await anyio.sleep(self.tokens(groups) / (means(self.tail)[0] * self.groups_per_step))
        return {}

    def finish_step(self, step: Step) -> None:
        self.steps.append(step)
        self.ends.append(anyio.current_time())
        self.num_versions = max(self.num_versions, len(self.engine.versions))

    async def checkpoint(self, step: int) -> None:
        """Nothing is saved."""

    def tokens(self, groups: list[Group]) -> float:
        return float(sum(self.lengths[group.prompt.ordinal].sum() for group in groups))


NO_ROLLOUT = Rollout(np.zeros(0, np.int32), np.zeros(0, np.bool_), np.zeros(0, np.float32), 0, "stop", 1, "")


class SlowToExport(FakeTrainer):
    """Its export takes as long as a refit."""

    async def export_adapter(self, name: str) -> AdapterTicket:
        await anyio.sleep(REFIT_SECONDS)
        return await super().export_adapter(name)


async def simulate(
    tail: float, kind: EngineKind, bound: int, on_stale: OnStale, *, groups_per_step: int, num_steps: int, seed: int
) -> Stages:
    """One run of the loop."""
    num_slots = groups_per_step * (bound + 1)
    limit = CAP * bound if on_stale == "correct" else bound
    engine, trainer = FakeEngine(), SlowToExport()
    decoding = anyio.CapacityLimiter(groups_per_step if kind == "full" else num_slots)
    stages = Stages(tail, bound, groups_per_step, engine, decoding)
    await trainer.create_adapter("policy", LoraConfig())
    refit = Refit(trainer, engine, "policy", limit + 2, Events(None))
    await refit.publish(0)
    await Loop(
        stages,
        refit,
        Ledger(1000, seed, ""),
        Backlog(groups_per_step, bound, on_stale, limit),
        groups_per_step=groups_per_step,
        num_slots=num_slots,
        num_steps=num_steps,
    ).run()
    return stages


def summary(stages: Stages) -> dict[str, float]:
    """The columns of one run."""
    tokens = {ordinal: float(lengths.sum()) for ordinal, lengths in stages.lengths.items()}
    trained = [group.prompt.ordinal for step in stages.steps for group in step.groups]
    lost = tokens.keys() - set(trained)
    edge = len(stages.steps) // 5
    middle = stages.steps[edge:-edge]
    seconds = stages.ends[-edge - 1] - stages.ends[edge - 1]
    staleness = np.array([step.number - 1 - group.policy_version for step in middle for group in step.groups])
    return {
        "steps/s": len(middle) / seconds,
        "tokens/s": sum(stages.tokens(step.groups) for step in middle) / seconds,
        "staleness": float(staleness.mean()),
        "greatest": int(staleness.max()),
        "beyond": float(np.mean(staleness > stages.bound)),
        "groups lost": len(lost) / len(tokens),
        "tokens lost": sum(tokens[ordinal] for ordinal in lost) / sum(tokens.values()),
        "length": mean(tokens[ordinal] for ordinal in trained) / mean(tokens.values()),
        "versions": stages.num_versions,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--groups-per-step", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    report = Report("on_stale", ["anyio", "trio", "numpy"])

    def run(tail: float, kind: EngineKind, bound: int, on_stale: OnStale) -> dict[str, float]:
        simulation = partial(
            simulate,
            tail,
            kind,
            bound,
            on_stale,
            groups_per_step=args.groups_per_step,
            num_steps=args.steps,
            seed=args.seed,
        )
        clock = MockClock(autojump_threshold=0)
        return summary(anyio.run(simulation, backend="trio", backend_options={"clock": clock}))

    # A synchronous loop admits as many groups as a full engine decodes at once: for it, the two engines are the same.
    synchronous = {tail: run(tail, "full", 0, "correct") for tail in TAILS}
    for kind in ("full", "roomy"):
        rows: list[dict[str, Cell]] = []
        for tail, bound, on_stale in product(TAILS, BOUNDS, POLICIES):
            row = run(tail, kind, bound, on_stale)
            for rate in ("steps/s", "tokens/s"):
                row[rate] /= synchronous[tail][rate]
            rows.append({"P99/median": tail, "max_staleness": bound, "on_stale": on_stale, **row})
        report.table(f"A {kind} engine", rows, FORMATS)
    report.write()


if __name__ == "__main__":
    main()
