"""The loop on fakes, with real concurrency, on asyncio and trio."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import anyio
import pytest
import trio.testing
from anyio.abc import TaskGroup
from hypothesis import given, settings
from hypothesis import strategies as st

from rlloop.engine.fake import FakeEngine
from rlloop.environment import PromptTooLong
from rlloop.errors import BadEnvironmentError, EngineError, first_error
from rlloop.events import Events
from rlloop.ledger import Ledger
from rlloop.loop import Loop, Step
from rlloop.refit.publisher import Refit
from rlloop.staleness import Backlog
from rlloop.trainer.fake import FakeTrainer
from rlloop.types import AdamConfig, AdapterTicket, Failure, Group, LoraConfig, Metrics, Prompt, Rollout

BACKENDS = ("asyncio", "trio")
CAP = 3


@dataclass
class FakeStages:
    """Samples with random delays; every `straggler`-th group takes many times longer."""

    trainer: FakeTrainer
    rng: random.Random
    straggler: int = 0
    fail: Any = lambda prompt: None
    rewards: Any = lambda prompt: (0.0,)
    update_seconds: float = 0.0005
    seconds: Any = None
    """(prompt) -> how long it samples."""
    steps: list[Step] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    num_sampling: int = 0
    peak: int = 0

    def task(self, index: int) -> int:
        return index

    async def sample(self, prompt: Prompt, version: int) -> Group:
        self.log.append(f"sample {prompt.ordinal} on {version}")
        self.num_sampling += 1
        self.peak = max(self.peak, self.num_sampling)
        try:
            slow = self.straggler and prompt.ordinal % self.straggler == 0
            at_random = 0.012 if slow else self.rng.random() * 0.002
            await anyio.sleep(self.seconds(prompt) if self.seconds else at_random)
            failure = self.fail(prompt)
            if isinstance(failure, Failure):
                return Group(prompt, (), (), version, (failure,))
        finally:
            self.num_sampling -= 1
        rewards = self.rewards(prompt)
        return Group(prompt, (rollout(version),) * len(rewards), rewards, version)

    async def update(self, groups: list[Group]) -> Metrics:
        await anyio.sleep(self.update_seconds)
        await self.trainer.optim_step("policy", AdamConfig(lr=1.0))
        self.log.append(f"step {self.trainer.steps['policy']}")
        return {}

    def finish_step(self, step: Step) -> None:
        self.steps.append(step)

    async def checkpoint(self, step: int) -> None:
        self.log.append(f"checkpoint {step}")


def rollout(version: int) -> Rollout:
    import numpy as np

    one = np.zeros(1, np.int32)
    return Rollout(one, one.astype(bool), one.astype(np.float32), version, "stop", 1, "")


async def run(
    stages: FakeStages,
    on_stale: str,
    *,
    bound: int,
    per_step: int = 2,
    num_steps: int = 12,
    num_tasks: int = 7,
    max_filtered: int = 0,
) -> tuple[Loop, Ledger, FakeEngine]:
    limit = CAP * max(bound, 1) if on_stale == "correct" else bound
    engine, ledger = FakeEngine(), Ledger(num_tasks, 0, "")
    await stages.trainer.create_adapter("policy", LoraConfig())
    refit = Refit(stages.trainer, engine, "policy", limit + 2, Events(None))
    publish = refit.publish

    async def logged_publish(version: int) -> Any:
        report = await publish(version)
        stages.log.append(f"refit {version}")
        return report

    refit.publish = logged_publish  # type: ignore[method-assign]
    await refit.publish(0)
    loop = Loop(
        stages,
        refit,
        ledger,
        Backlog(per_step, bound, on_stale, limit),  # type: ignore[arg-type]
        groups_per_step=per_step,
        num_slots=per_step * (bound + 1),
        num_steps=num_steps,
        max_filtered=max_filtered,
    )
    with anyio.fail_after(20):
        await loop.run()
    return loop, ledger, engine


def staleness(stages: FakeStages) -> list[int]:
    return [step.number - 1 - group.policy_version for step in stages.steps for group in step.groups]


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 999),
    bound=st.integers(0, 3),
    per_step=st.integers(1, 3),
    on_stale=st.sampled_from(["correct", "drop", "wait"]),
    straggler=st.sampled_from([0, 3, 5]),
    failing=st.sampled_from([0, 4]),
)
def test_bounds_hold_and_no_prompt_is_lost_or_trained_twice(
    backend: str, seed: int, bound: int, per_step: int, on_stale: str, straggler: int, failing: int
) -> None:
    def fail(prompt: Prompt) -> Failure | None:
        if failing and prompt.ordinal % failing == 1:
            return Failure("error", "rollout", "boom")
        if failing and prompt.ordinal % 7 == 5:
            raise PromptTooLong("too long")
        return None

    stages = FakeStages(FakeTrainer(), random.Random(seed), straggler, fail)
    kept = anyio.run(lambda: run(stages, on_stale, bound=bound, per_step=per_step), backend=backend)
    loop, ledger, engine = kept
    limit = CAP * max(bound, 1) if on_stale == "correct" else bound
    assert max(staleness(stages)) <= limit
    assert stages.peak <= per_step * (bound + 1)
    assert [step.number for step in stages.steps] == list(range(1, 13))
    assert all(len(step.groups) == per_step for step in stages.steps)
    trained = Counter(group.prompt.ordinal for step in stages.steps for group in step.groups)
    assert max(trained.values()) == 1
    # Every prompt below the mark is trained or was dropped, with a reason.
    assert ledger.counts["trained"] == 12 * per_step == len(trained)
    assert sum(loop.dropped.values()) == sum(n for reason, n in ledger.counts.items() if reason != "trained")
    assert max(trained) + 1 <= 12 * per_step + sum(loop.dropped.values()) + per_step * (bound + 1)
    assert len(engine.versions) <= limit + 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_synchronous_loop_alternates(backend: str) -> None:
    stages = FakeStages(FakeTrainer(), random.Random(0))
    anyio.run(lambda: run(stages, "correct", bound=0, num_steps=3), backend=backend)
    assert set(staleness(stages)) == {0}
    kinds = [line.split()[0] for line in stages.log]
    assert kinds == ["refit"] + ["sample", "sample", "step", "refit", "checkpoint"] * 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_whose_refit_is_interrupted_is_finished(backend: str) -> None:
    class HangsInTheSecondStep(FakeTrainer):
        async def export_adapter(self, name: str) -> AdapterTicket:
            if self.steps[name] == 2:
                stop.cancel()
                await anyio.sleep_forever()
            return await super().export_adapter(name)

    async def interrupted() -> None:
        nonlocal stop
        with anyio.CancelScope() as stop:
            await run(stages, "correct", bound=1)

    stop: anyio.CancelScope
    stages = FakeStages(HangsInTheSecondStep(), random.Random(0))
    anyio.run(interrupted, backend=backend)
    assert [step.number for step in stages.steps] == [1, 2]
    assert [math.isnan(step.refit.publish_seconds) for step in stages.steps] == [False, True]
    assert "checkpoint 2" not in stages.log


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_slot_comes_back_only_after_the_refit(backend: str) -> None:
    stages = FakeStages(FakeTrainer(), random.Random(0))
    anyio.run(lambda: run(stages, "drop", bound=1, num_steps=8), backend=backend)
    for version in range(1, 7):
        step, refit = stages.log.index(f"step {version}"), stages.log.index(f"refit {version}")
        first = next(i for i, line in enumerate(stages.log) if line.endswith(f" on {version}"))
        assert step < refit < first
        between = stages.log[step:refit]
        assert not any(line.startswith("sample") for line in between), "all slots were taken until the refit"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("on_stale", "straggler"), [("correct", 0), ("correct", 2), ("drop", 2)])
def test_few_groups_begin_at_once(backend: str, on_stale: str, straggler: int) -> None:
    """However many slots a refit freed and groups became too old: the trainer's calls pass between them."""
    stages = FakeStages(FakeTrainer(), random.Random(0), straggler)
    most = 0

    async def count_those_of_a_pass(tasks: TaskGroup) -> None:
        nonlocal most
        while not tasks.cancel_scope.cancel_called:
            before = len(begun())
            await anyio.lowlevel.checkpoint()
            most = max(most, len(begun()) - before)

    def begun() -> list[str]:
        return [line for line in stages.log if line.startswith("sample")]

    async def count() -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(count_those_of_a_pass, tasks)
            await run(stages, on_stale, bound=3, per_step=16, num_steps=12)
            tasks.cancel_scope.cancel()

    anyio.run(count, backend=backend)
    assert 4 <= most <= 8  # trio runs the tasks of a pass in any order


@pytest.mark.parametrize("on_stale", ["correct", "drop"])
def test_of_what_finishes_during_an_update_the_oldest_is_trained_first(on_stale: str) -> None:
    # 0, 1 and 2 begin with version 0, 3 with version 1. While 2 is trained 3 is finished, and after it 1.
    seconds = [1.0, 5.0, 1.5, 0.5, 9.0]
    stages = FakeStages(FakeTrainer(), random.Random(0), update_seconds=3.0)
    stages.seconds = lambda prompt: seconds[min(prompt.ordinal, 4)]
    clock = {"clock": trio.testing.MockClock(autojump_threshold=0)}
    anyio.run(lambda: run(stages, on_stale, bound=2, per_step=1, num_steps=4), backend="trio", backend_options=clock)
    assert [group.prompt.ordinal for step in stages.steps for group in step.groups] == [0, 2, 1, 3]
    assert staleness(stages) == [0, 1, 2, 2]


def test_correct_trains_stragglers_that_drop_discards() -> None:
    def sampled(on_stale: str) -> tuple[int, int]:
        stages = FakeStages(FakeTrainer(), random.Random(1), straggler=4)
        # A simulated clock: what is a straggler must not depend on the load of the machine.
        clock = {"clock": trio.testing.MockClock(autojump_threshold=0)}
        loop, *_ = anyio.run(
            lambda: run(stages, on_stale, bound=1, num_steps=25), backend="trio", backend_options=clock
        )
        return max(staleness(stages)), loop.dropped["stale"]

    assert sampled("drop")[1] > 0
    greatest, dropped = sampled("correct")
    assert greatest > 1
    assert dropped <= sampled("drop")[1]
    assert sampled("wait") == (1, 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_error_of_any_stage_ends_the_loop_with_that_error(backend: str) -> None:
    def die(prompt: Prompt) -> None:
        if prompt.ordinal == 9:
            raise EngineError("the engine died")

    stages = FakeStages(FakeTrainer(), random.Random(0), fail=die)
    with pytest.raises(ExceptionGroup) as caught:
        anyio.run(lambda: run(stages, "correct", bound=1), backend=backend)
    assert caught.group_contains(EngineError, match="the engine died")
    assert stages.num_sampling == 0


def test_an_environment_that_always_fails_ends_the_run_and_says_why() -> None:
    stages = FakeStages(FakeTrainer(), random.Random(0), fail=lambda _: Failure("error", "score", "KeyError: 'answer'"))
    with pytest.raises(ExceptionGroup) as caught:
        anyio.run(lambda: run(stages, "correct", bound=1))
    assert caught.group_contains(BadEnvironmentError, match="KeyError: 'answer'")


def test_no_prompt_is_sampled_that_no_step_needs() -> None:
    stages = FakeStages(FakeTrainer(), random.Random(0))
    anyio.run(lambda: run(stages, "correct", bound=3, num_steps=5))
    assert sum(line.startswith("sample") for line in stages.log) == 10


@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_without_a_signal_are_replaced(backend: str) -> None:
    stages = FakeStages(FakeTrainer(), random.Random(0), rewards=lambda p: (1.0, float(p.ordinal % 3 == 0)))
    loop, ledger, _ = anyio.run(
        partial(run, stages, "correct", bound=1, num_steps=6, max_filtered=100), backend=backend
    )
    trained = [group.prompt.ordinal for step in stages.steps for group in step.groups]
    assert len(trained) == 12
    assert all(ordinal % 3 for ordinal in trained)
    assert loop.dropped == {"filtered": ledger.counts["filtered"]}
    assert ledger.counts["filtered"] >= 5
    filtered = [group for step in stages.steps for group in step.filtered]
    assert all(group.prompt.ordinal % 3 == 0 for group in filtered)
    assert 4 <= len(filtered) <= ledger.counts["filtered"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_more_groups_are_replaced_in_a_step_than_allowed(backend: str) -> None:
    """Not even where no group has a signal: the run goes on, and does not count them as failures."""
    stages = FakeStages(FakeTrainer(), random.Random(0), rewards=lambda p: (1.0, 1.0))
    loop, _, _ = anyio.run(partial(run, stages, "correct", bound=1, num_steps=6, max_filtered=30), backend=backend)
    assert [step.number for step in stages.steps] == [1, 2, 3, 4, 5, 6]
    assert 30 <= loop.dropped["filtered"] <= 6 * 30


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_environment_that_fails_now_and_then_does_not_end_the_run(backend: str) -> None:
    """However often: only what fails in a row counts."""
    boom = Failure("error", "rollout", "boom")
    stages = FakeStages(FakeTrainer(), random.Random(0), fail=lambda p: boom if p.ordinal % 2 else None)
    loop, *_ = anyio.run(partial(run, stages, "correct", bound=1, num_steps=30), backend=backend)
    assert loop.dropped["failed"] > 40
    assert len(stages.steps) == 30


@pytest.mark.parametrize(
    ("num_failing", "message"),
    [
        (99, "20 groups in a row failed; the last rollout ended with error: boom"),
        (19, "20 groups in a row failed, 1 of them for too long a prompt; the last rollout ended with error: boom"),
        (0, "20 prompts in a row left no room for an answer: raise --engine.max-model-len"),
    ],
)
def test_an_environment_that_always_fails_ends_the_run_with_the_reason(num_failing: int, message: str) -> None:
    def fail(prompt: Prompt) -> Failure:
        if next(asked) < num_failing:
            return Failure("error", "rollout", "boom")
        raise PromptTooLong("too long")

    asked = itertools.count()
    stages = FakeStages(FakeTrainer(), random.Random(0), fail=fail, seconds=lambda prompt: 0.001)
    with pytest.raises(ExceptionGroup) as caught:
        anyio.run(partial(run, stages, "correct", bound=1))
    assert str(first_error(caught.value)) == message


@pytest.mark.parametrize("on_stale", ["correct", "drop"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_group_that_never_ends_is_given_up_when_it_is_too_old(backend: str, on_stale: str) -> None:
    stages = FakeStages(FakeTrainer(), random.Random(0))
    stages.seconds = lambda prompt: math.inf if prompt.ordinal == 0 else 0.001
    loop, ledger, _ = anyio.run(partial(run, stages, on_stale, bound=1), backend=backend)
    assert (loop.dropped, ledger.counts["stale"], loop.num_in_flight) == ({"stale": 1}, 1, 0)


def test_an_update_that_waited_for_a_group_begins_when_it_is_dropped() -> None:
    """0 fails after 5 s. Until then 2 must wait, or 0 would be too old; what comes in its place takes 10 s."""
    seconds, boom = [5.0, 1.0, 1.0, 10.0], Failure("error", "rollout", "boom")
    began: list[float] = []

    class Timed(FakeStages):
        async def update(self, groups: list[Group]) -> Metrics:
            began.append(anyio.current_time() - started)
            return await super().update(groups)

    stages = Timed(FakeTrainer(), random.Random(0), fail=lambda prompt: boom if prompt.ordinal == 0 else None)
    stages.seconds = lambda prompt: seconds[min(prompt.ordinal, 3)]
    clock = trio.testing.MockClock(autojump_threshold=0)
    started = clock.current_time()
    anyio.run(
        lambda: run(stages, "wait", bound=1, per_step=1, num_steps=3),
        backend="trio",
        backend_options={"clock": clock},
    )
    assert began == pytest.approx([1.0, 5.0, 15.0], abs=0.1)


def test_a_step_says_how_long_it_waited_and_how_long_the_update_took(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("rlloop.loop.monotonic", lambda: now[0])

    class Slow(FakeStages):
        async def sample(self, prompt: Prompt, version: int) -> Group:
            now[0] += 1
            return await super().sample(prompt, version)

        async def update(self, groups: list[Group]) -> Metrics:
            now[0] += 3
            return await super().update(groups)

    stages = Slow(FakeTrainer(), random.Random(0))
    anyio.run(lambda: run(stages, "correct", bound=0, per_step=1, num_steps=3))
    assert [(step.wait_seconds, step.update_seconds) for step in stages.steps] == [(1, 3)] * 3
