"""What the loop itself costs for each sample, when engine, trainer and rewards cost nothing.

    python benchmarks/loop_overhead.py                 both tables
    python benchmarks/loop_overhead.py --profile 1000  where the time goes, with this many samples in flight

`loop`: the real Loop, Ledger, Refit, Backlog, Events (written to a file) and sample_group; an environment that asks the
engine once and returns a rollout made before; a trainer that counts. `data path`: with the real Trajectory, make_samples and
optimizer_step, too, whose cost grows with the tokens. Both: the fake engine, and a scorer that scores in this process; the
product's scores in worker processes.

The engine holds all requests but those of one step, and finishes the oldest whenever another comes: no timers, no idle
time, and at least 80 % of the stated number in flight at every moment. CPU seconds are this process's, which other load
disturbs less than the wall clock. The garbage collector is set as `rlloop.run.run` sets it; `gc: default` shows why.
`anyio alone` is a task with one wait for each sample, in groups, and nothing else. Each row is the median of three runs.

Goals: 20,000 samples/s at 10^3 in flight, 5,000 at 10^5, and memory that stays flat over 10^6 samples.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import pstats
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import anyio
import numpy as np
import psutil
from _report import Cell, Report

from rlloop.advantages import group_centred, token_weights
from rlloop.config import EngineSettings, RunSettings, SamplingSettings
from rlloop.engine.fake import FakeEngine
from rlloop.environment import Environment, Policy, Trajectory
from rlloop.events import Events
from rlloop.ledger import Ledger
from rlloop.loop import Loop, Step
from rlloop.refit.publisher import Refit
from rlloop.rollouts import sample_group
from rlloop.run import tune_garbage_collector
from rlloop.samples import make_samples
from rlloop.staleness import Backlog
from rlloop.trainer.fake import FakeTrainer
from rlloop.types import AdamConfig, Completion, Failure, GenerationRequest, Group, LoraConfig, Metrics, Prompt, Rollout
from rlloop.updates import optimizer_step

GROUP_SIZE, MAX_STALENESS = 8, 4
REPEATS = 3
PROMPT = (1, 2, 3, 4, 5, 6, 7, 8)
ROLLOUT = Rollout(np.ones(12, np.int32), np.arange(12) >= 8, np.zeros(12, np.float32), 0, "length", 1, "")


class HoldingEngine(FakeEngine):
    """Keeps `num_held` requests waiting and finishes the oldest when another comes; all, once the last has come."""

    def __init__(self, num_tokens: int, num_held: int, num_requests: int) -> None:
        super().__init__(num_tokens=num_tokens, delay=self._hold)
        self._num_held = num_held
        self._num_to_come = num_requests
        self._held: deque[asyncio.Future[None]] = deque()
        self._made = super()._completion(GenerationRequest(PROMPT, 0, num_tokens, seed=0), 0, 0, 0)

    async def _hold(self, request: GenerationRequest) -> None:
        done = asyncio.get_running_loop().create_future()
        self._held.append(done)
        self._num_to_come -= 1
        while len(self._held) > (self._num_held if self._num_to_come else 0):
            self._held.popleft().set_result(None)
        await done

    def _completion(self, request: GenerationRequest, member: int, oldest: int, newest: int) -> Completion:
        return self._made


class OneTurn:
    """See `rlloop.environment.Environment`."""

    def __len__(self) -> int:
        return 10_000

    def task(self, index: int) -> int:
        return index

    async def rollout(self, task: Any, policy: Policy) -> Rollout:
        trajectory = Trajectory()
        trajectory.observe(PROMPT)
        trajectory.act(await policy.generate(trajectory.tokens))
        return trajectory.finish("", "length")

    def score(self, task: Any, rollout: Rollout) -> float:
        return float(rollout.tokens[-1] % 2)


class Premade(OneTurn):
    """Makes no rollout of what the engine sampled."""

    async def rollout(self, task: Any, policy: Policy) -> Rollout:
        await policy.generate(PROMPT)
        return ROLLOUT


class InProcessScorer:
    """Has the one method of `rlloop.rewards.Scorer` that `sample_group` calls."""

    def __init__(self, environment: Environment) -> None:
        self._environment = environment

    async def score(self, task: Any, rollout: Rollout) -> float | Failure:
        return self._environment.score(task, rollout)


@dataclass(frozen=True, slots=True)
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
    environment: Environment
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
        if isinstance(self.environment, Premade):
            return await self.trainer.forward_backward("policy", [], no_loss)
        samples = make_samples(groups, group_centred, token_weights)
        return await optimizer_step(self.trainer, "policy", samples, no_loss, AdamConfig(lr=1e-4))

    def finish_step(self, step: Step) -> None:
        self.events.flush()
        self.trainer.prompt_ids.clear()  # the fake remembers them for tests
        self.marks.append(Mark.now(self.engine.num_in_flight))

    async def checkpoint(self, step: int) -> None:
        """Nothing is saved."""


def no_loss(*_: Any) -> Any:
    raise AssertionError("a fake trainer computes no loss")


async def run(environment: Environment, num_in_flight: int, num_samples: int, num_tokens: int) -> list[Mark]:
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
        stages = Stages(settings, engine, trainer, events, environment)
        ledger = Ledger(len(environment), 0, "")
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


def measure(
    what: Literal["loop", "data path"],
    num_in_flight: int,
    num_samples: int,
    num_tokens: int = 4,
    uvloop: bool = False,
    tuned: bool = True,
) -> tuple[dict[str, Cell], list[Mark]]:
    """One row of the table, and its readings."""
    if tuned:
        tune_garbage_collector()
    before = Mark.now()
    environment = Premade() if what == "loop" else OneTurn()
    options = {"use_uvloop": uvloop}
    marks = anyio.run(run, environment, num_in_flight, num_samples, num_tokens, backend_options=options)
    row: dict[str, Cell] = {
        "what": what,
        "in flight": num_in_flight,
        "tokens": num_tokens,
        "on": "uvloop" if uvloop else "asyncio",
        "gc": "tuned" if tuned else "default",
        **rates(marks, num_in_flight // (MAX_STALENESS + 1)),
        "KiB/sample in flight": (max(mark.rss for mark in marks) - before.rss) / num_in_flight / 2**10,
    }
    return row, marks


def anyio_alone(num_samples: int, uvloop: bool) -> float:
    """Samples per CPU second of the least that any loop on anyio does: a task with one wait for each."""
    tune_garbage_collector()
    held: deque[asyncio.Future[None]] = deque()

    async def member() -> None:
        held.append(asyncio.get_running_loop().create_future())
        await held[-1]

    async def group() -> None:
        async with anyio.create_task_group() as members:
            for _ in range(GROUP_SIZE):
                members.start_soon(member)

    async def groups() -> None:
        async with anyio.create_task_group() as tasks:
            for _ in range(num_samples // GROUP_SIZE):
                tasks.start_soon(group)
                while len(held) > 800:
                    held.popleft().set_result(None)
                await anyio.lowlevel.checkpoint()
            while held:
                held.popleft().set_result(None)
                await anyio.lowlevel.checkpoint()

    started = time.process_time()
    anyio.run(groups, backend_options={"use_uvloop": uvloop})
    return num_samples / (time.process_time() - started)


def memory_rows(marks: Sequence[Mark], per_step: int) -> list[dict[str, Cell]]:
    """RSS after each tenth of the samples."""
    every = len(marks) // 10
    numbered = list(enumerate(marks, start=1))[every - 1 :: every]
    return [{"samples": step * per_step, "RSS MiB": round(mark.rss / 2**20, 1)} for step, mark in numbered]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", type=int, metavar="IN_FLIGHT", help="print where the time goes; write nothing")
    args = parser.parse_args()
    if args.profile:
        with cProfile.Profile() as profile:
            measure("data path", args.profile, 10 * args.profile)
        pstats.Stats(profile).sort_stats("tottime").print_stats(40)
        return

    def fresh(*arguments: Any) -> tuple[dict[str, Cell], list[Mark]]:
        """The median run of three, each in a process of its own, whose memory nothing else has used."""
        runs = []
        for _ in range(REPEATS):
            with ProcessPoolExecutor(1, get_context("spawn")) as process:
                runs.append(process.submit(measure, *arguments).result())
        return sorted(runs, key=lambda run: float(run[0]["samples/s"] or 0))[REPEATS // 2]

    report = Report("loop_overhead", ["anyio", "uvloop", "numpy"])
    rows = [
        fresh(what, num_in_flight, num_samples, 4, uvloop)[0]
        for num_in_flight, num_samples in ((10**3, 40_000), (10**4, 80_000), (10**5, 220_000))
        for what, uvloop in (("loop", False), ("loop", True), ("data path", False))
    ]
    rows.append(fresh("data path", 10**3, 20_000, 1024)[0])
    rows.append(fresh("loop", 10**3, 40_000, 4, False, False)[0])
    rows.append(fresh("loop", 10**5, 220_000, 4, False, False)[0])
    report.table("Cost of a sample", rows)
    for uvloop in (False, True):
        rate = anyio_alone(40_000, uvloop)
        report.line(
            f"anyio alone, on {'uvloop' if uvloop else 'asyncio'}: {rate:,.0f} samples/CPU s, {1e6 / rate:.1f} us/sample"
        )

    _, marks = measure("data path", 10**3, 10**6)
    rows = memory_rows(marks, 10**3 // (MAX_STALENESS + 1))
    report.table("Memory of the data path over 10^6 samples, 10^3 in flight", rows)
    later = marks[len(marks) // 10 :]
    samples = np.arange(len(later)) * (10**3 // (MAX_STALENESS + 1))
    slope = np.polyfit(samples, [mark.rss for mark in later], 1)[0]
    report.line(f"slope after the first tenth: {slope:.2f} bytes/sample, of which these readings are about 1")
    report.write()


if __name__ == "__main__":
    main()
