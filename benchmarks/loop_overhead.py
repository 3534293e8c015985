"""What the loop itself costs for each sample, when engine, trainer and rewards cost nothing.

    python benchmarks/loop_overhead.py                 the table, then 10^6 samples with the memory printed
    python benchmarks/loop_overhead.py --profile 1000  where the time goes, with this many samples in flight

Real: Loop, Ledger, Refit, Backlog, Events (written to a file), sample_group, Trajectory, make_samples, optimizer_step.
Fake: the engine (made-up tokens), the trainer (counts), the environment (one turn of 8 prompt tokens) and the scorer,
which scores in this process; the product scores in worker processes, whose cost is the reward's.

The engine holds all requests but those of one step, and finishes the oldest whenever another comes: no timers, no idle
time, and 80 to 100 % of the stated number in flight at every moment. `CPU` is this process's time, which other load on
the machine disturbs less than the wall clock. Targets: 20,000 samples/s at 10^3 in flight, 5,000 at 10^5, and flat memory.
"""

from __future__ import annotations

import tempfile
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import psutil

from rlloop.advantages import group_centred, token_weights
from rlloop.config import EngineSettings, RunSettings, SamplingSettings
from rlloop.engine.fake import FakeEngine
from rlloop.environment import Environment, Policy, Trajectory
from rlloop.events import Events
from rlloop.ledger import Ledger
from rlloop.loop import Loop, Step
from rlloop.refit.publisher import Refit
from rlloop.rollouts import sample_group
from rlloop.samples import make_samples
from rlloop.staleness import Backlog
from rlloop.trainer.fake import FakeTrainer
from rlloop.types import AdamConfig, Failure, GenerationRequest, Group, LoraConfig, Metrics, Prompt, Rollout
from rlloop.updates import optimizer_step

GROUP_SIZE, MAX_STALENESS = 8, 4


class HoldingEngine(FakeEngine):
    """Keeps `num_held` requests waiting and finishes the oldest when another comes; all, once the last has come."""

    def __init__(self, num_tokens: int, num_held: int, num_requests: int) -> None:
        super().__init__(num_tokens=num_tokens, delay=self._hold)
        self._num_held = num_held
        self._num_to_come = num_requests
        self._held: deque[anyio.Event] = deque()

    async def _hold(self, request: GenerationRequest) -> None:
        done = anyio.Event()
        self._held.append(done)
        self._num_to_come -= 1
        while len(self._held) > (self._num_held if self._num_to_come else 0):
            self._held.popleft().set()
        await done.wait()


class OneTurn:
    """See `rlloop.environment.Environment`."""

    PROMPT = (1, 2, 3, 4, 5, 6, 7, 8)

    def __len__(self) -> int:
        return 10_000

    def task(self, index: int) -> int:
        return index

    async def rollout(self, task: Any, policy: Policy) -> Rollout:
        trajectory = Trajectory()
        trajectory.observe(self.PROMPT)
        trajectory.act(await policy.generate(trajectory.tokens))
        return trajectory.finish("", "length")

    def score(self, task: Any, rollout: Rollout) -> float:
        return float(rollout.tokens[-1] % 2)


class InProcessScorer:
    """Has the one method of `rlloop.rewards.Scorer` that `sample_group` calls."""

    def __init__(self, environment: Environment) -> None:
        self._environment = environment

    async def score(self, task: Any, rollout: Rollout) -> float | Failure:
        return self._environment.score(task, rollout)


@dataclass(frozen=True)
class Mark:
    """Readings at the end of a step."""

    wall: float
    cpu: float
    rss: int
    in_flight: int

    @classmethod
    def now(cls, in_flight: int = 0) -> Mark:
        return cls(time.perf_counter(), time.process_time(), psutil.Process().memory_info().rss, in_flight)


@dataclass
class Stages:
    """See `rlloop.loop.Stages`."""

    settings: RunSettings
    engine: FakeEngine
    trainer: FakeTrainer
    events: Events
    environment: Environment = field(default_factory=OneTurn)
    marks: list[Mark] = field(default_factory=list)

    def task(self, index: int) -> Any:
        return self.environment.task(index)

    async def sample(self, prompt: Prompt, version: int) -> Group:
        return await sample_group(
            prompt,
            environment=self.environment,
            scorer=InProcessScorer(self.environment),  # type: ignore[arg-type]
            engine=self.engine,
            tokenizer=None,
            policy_version=version,
            settings=self.settings,
            events=self.events,
        )

    async def update(self, groups: list[Group]) -> Metrics:
        samples = make_samples(groups, group_centred, token_weights)
        return await optimizer_step(self.trainer, "policy", samples, no_loss, AdamConfig(lr=1e-4))

    async def finish_step(self, step: Step) -> None:
        self.events.flush()
        self.trainer.prompt_ids.clear()  # the fake remembers them for tests
        self.marks.append(Mark.now(self.engine.num_in_flight))


def no_loss(*_: Any) -> Any:
    raise AssertionError("a fake trainer computes no loss")


async def run(num_in_flight: int, num_samples: int, num_tokens: int) -> list[Mark]:
    """Run the loop over at least `num_samples` samples; readings at the end of every step."""
    groups_per_step = num_in_flight // (GROUP_SIZE * (MAX_STALENESS + 1))
    num_steps = -(-num_samples // (groups_per_step * GROUP_SIZE))
    settings = RunSettings(
        groups_per_step=groups_per_step,
        group_size=GROUP_SIZE,
        max_staleness=MAX_STALENESS,
        num_steps=num_steps,
        sampling=SamplingSettings(max_tokens=num_tokens),
        engine=EngineSettings(max_model_len=num_tokens + 64),
    )
    per_step = groups_per_step * GROUP_SIZE
    engine = HoldingEngine(num_tokens, settings.num_slots * GROUP_SIZE - per_step, num_steps * per_step)
    trainer = FakeTrainer()
    await trainer.create_adapter("policy", LoraConfig())
    with tempfile.TemporaryDirectory() as folder:
        events = Events(Path(folder) / "events.jsonl")
        refit = Refit(trainer, engine, "policy", settings.num_versions, events)
        await refit.publish(0)
        stages = Stages(settings, engine, trainer, events)
        ledger = Ledger(len(stages.environment), 0, "")
        backlog = Backlog(groups_per_step, MAX_STALENESS, "correct", settings.staleness_limit)
        loop = Loop(
            stages,
            refit,
            ledger,
            backlog,
            groups_per_step=groups_per_step,
            num_slots=settings.num_slots,
            num_steps=num_steps,
        )
        await loop.run()
        events.close()
    assert ledger.counts["trained"] == num_steps * groups_per_step
    return stages.marks


def rates(marks: Sequence[Mark], per_step: int) -> dict[str, Cell]:
    """Between the second step and the last admission, so that starting and draining are left out."""
    steady = marks[1 : -MAX_STALENESS - 1]
    first, last = steady[0], steady[-1]
    num_samples = (len(steady) - 1) * per_step
    cpu = last.cpu - first.cpu
    return {
        "least in flight": min(mark.in_flight for mark in steady),
        "samples/s": num_samples / (last.wall - first.wall),
        "samples/CPU s": num_samples / cpu,
        "CPU us/sample": cpu / num_samples * 1e6,
    }


def measure(num_in_flight: int, num_samples: int, num_tokens: int, uvloop: bool) -> tuple[dict[str, Cell], list[Mark]]:
    """One row of the table, and its readings."""
    gc.collect()
    before = Mark.now()
    marks = anyio.run(run, num_in_flight, num_samples, num_tokens, backend_options={"use_uvloop": uvloop})
    row: dict[str, Cell] = {
        "in flight": num_in_flight,
        "tokens": num_tokens,
        "loop": "uvloop" if uvloop else "asyncio",
        **rates(marks, num_in_flight // (MAX_STALENESS + 1)),
        "KiB/sample in flight": (max(mark.rss for mark in marks) - before.rss) / num_in_flight / 2**10,
    }
    return row, marks


def memory_rows(marks: Sequence[Mark], per_step: int, num_rows: int = 10) -> list[dict[str, Cell]]:
    """RSS at equal distances."""
    every = len(marks) // num_rows
    return [
        {"samples": (number + 1) * per_step, "RSS MiB": round(mark.rss / 2**20, 1)}
        for number, mark in list(enumerate(marks))[every - 1 :: every]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", type=int, metavar="IN_FLIGHT", help="print where the time goes; write nothing")
    parser.add_argument("--samples", type=int, default=10**6, help="of the run that watches the memory")
    args = parser.parse_args()
    if args.profile:
        with cProfile.Profile() as profile:
            measure(args.profile, 10 * args.profile, 4, uvloop=False)
        pstats.Stats(profile).sort_stats("tottime").print_stats(40)
        return
    report = Report("loop_overhead", ["anyio", "uvloop", "numpy"])
    rows = []
    # Ascending, because memory that a larger run has freed would hide what a smaller one takes.
    for num_in_flight, num_samples in ((10**3, 40_000), (10**4, 100_000), (10**5, 400_000)):
        for uvloop in (False, True):
            rows.append(measure(num_in_flight, num_samples, 4, uvloop)[0])
    rows.append(measure(10**3, 20_000, 1024, uvloop=False)[0])
    report.table("Cost of a sample", rows)
    per_step = 10**3 // (MAX_STALENESS + 1)
    row, marks = measure(10**3, args.samples, 4, uvloop=False)
