"""Metrics of steps that are made up, against numbers worked out by hand."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rlloop import metrics as module
from rlloop.ledger import Ledger
from rlloop.loop import Step
from rlloop.metrics import StepMetrics, completion_rows
from rlloop.tracking.keys import DOCUMENTED
from rlloop.types import EngineStatistics, Group, Prompt, RefitReport, Reward, Rollout

STATISTICS = EngineStatistics(100, 10.0, 0, 0, 0.0, 0.25, {1: 0.5})
REPORT = RefitReport(2, 4096, 0.01, 0.02, 0.03, 0.04, 0.2)


@dataclass
class Engine:
    now: EngineStatistics = STATISTICS
    num_resets: int = 0

    def statistics(self) -> EngineStatistics:
        return self.now

    def reset_longest_gap(self) -> None:
        self.num_resets += 1


@dataclass
class Counts:
    """What StepMetrics reads of a Loop."""

    num_in_flight: int = 3
    dropped: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(module, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def rollout(text: str, num_sampled: int = 2, finish_reason: str = "stop", **metrics: float) -> Rollout:
    loss_mask = np.array([False, False] + [True] * num_sampled)
    tokens = np.arange(10, 10 + len(loss_mask), dtype=np.int32)
    return Rollout(tokens, loss_mask, np.zeros(len(tokens), np.float32), 1, finish_reason, 1, text, metrics)


def make_step(**changes: Any) -> Step:
    old = replace(rollout("c"), policy_version=0)
    hopped = replace(rollout("d", tries=4), policy_version=0, token_versions=np.array([0, 0, 0, 1], np.int32))
    groups = [
        Group(Prompt(4, 0, 0, None), (rollout("a"), rollout("b", 4, "length", tries=2)), (0.0, 1.0), policy_version=1),
        Group(Prompt(5, 1, 0, None), (old, hopped), (0.5, 0.5), policy_version=0, staleness=1),
    ]
    trained = {"optim/skipped_steps": 0.0, "progress/tokens_trained": 10.0, "optim/lr": 0.1}
    return replace(Step(2, groups, trained, 1.5, 2.0, REPORT), **changes)


def make_metrics() -> tuple[StepMetrics, Engine, Counts]:
    engine, counts, ledger = Engine(), Counts(), Ledger(4, 0, "")
    for _ in range(6):
        ledger.next()
    ledger.trained(range(6), 2)
    return StepMetrics(counts, ledger, engine), engine, counts  # type: ignore[arg-type]


def test_one_step(clock: Clock) -> None:
    metrics, engine, counts = make_metrics()
    clock.now += 4.0
    engine.now = replace(STATISTICS, num_generated_tokens=180, busy_seconds=13.0)
    counts.dropped.update(stale=2, failed=1, too_long=1)
    counts.failures.update(error=3, timeout=1)
    found = metrics.of(make_step())
    expected = {
        "reward/mean": 0.5,
        "reward/std": np.std([0, 1, 0.5, 0.5]),
        "reward/min": 0.0,
        "reward/max": 1.0,
        "reward/frac_zero_std": 0.5,
        "completions/mean_length": 2.5,
        "completions/clipped_ratio": 0.25,
        "env/tries": 3.0,
        "async/staleness_mean": 0.5,  # step 2 trains on version 1
        "async/staleness_max": 1.0,
        "async/token_staleness_mean": 0.3,  # 3 of 10 tokens
        "async/frac_mixed_versions": 0.25,
        "async/in_flight": 3.0,
        "async/dropped_groups": 4.0,
        "async/dropped_stale": 2.0,
        "async/dropped_failed": 1.0,
        "async/dropped_too_long": 1.0,
        "rollout/errors": 3.0,
        "rollout/timeouts": 1.0,
        "time/step": 4.0,
        "time/wait_rollouts": 1.5,
        "time/refit": 0.2,
        "time/refit_stall": 0.09,
        "time/trainer_idle_frac": 0.5,
        "time/engine_idle_frac": 0.25,
        "refit/first_token_seconds": 0.5,
        "refit/longest_gap_seconds": 0.25,
        "perf/overlap_efficiency": 0.75,
        "perf/gen_tokens_per_second": 20.0,
        "progress/tokens_sampled": 80.0,
        "progress/tokens_trained": 10.0,
        "progress/prompts": 6.0,
        "progress/epoch": 1.5,
        "optim/lr": 0.1,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert engine.num_resets == 2  # as the run began, for others may have used the engine; and after the step


def test_parts_of_rewards_are_averaged_over_the_rollouts_that_have_them(clock: Clock) -> None:
    metrics, _, _ = make_metrics()
    clock.now += 4.0
    rewards = (Reward(1.5, {"right": 1.0, "brief": 0.5}), Reward(0.25, {"brief": 0.25}))
    step = make_step()
    first, second = step.groups
    found = metrics.of(replace(step, groups=[replace(first, rewards=rewards), second]))
    assert (found["reward/right/mean"], found["reward/brief/mean"]) == (1.0, 0.375)
    assert found["reward/mean"] == pytest.approx((1.5 + 0.25 + 0.5 + 0.5) / 4)


def test_the_next_step_has_its_own_changes_and_the_totals_of_both(clock: Clock) -> None:
    metrics, engine, counts = make_metrics()
    clock.now += 4.0
    counts.failures.update(error=3)
    metrics.of(make_step(metrics={"optim/skipped_steps": 1.0}))
    clock.now += 2.0
    counts.failures.update(error=1)
    engine.now = replace(STATISTICS, num_generated_tokens=140)
    found = metrics.of(make_step(metrics={"optim/skipped_steps": 1.0, "progress/tokens_trained": 7.0}))
    assert (found["time/step"], found["rollout/errors"], found["perf/gen_tokens_per_second"]) == (2.0, 1.0, 20.0)
    assert (found["optim/skipped_steps"], found["progress/tokens_trained"]) == (2.0, 7.0)


def test_every_documented_metric_is_there_even_if_nothing_was_trained(clock: Clock) -> None:
    metrics, *_ = make_metrics()
    clock.now += 1.0
    found = metrics.of(make_step(metrics={"optim/skipped_steps": 1.0}))
    assert set(DOCUMENTED) - set(found) == set()
    assert np.isnan(found["loss/policy"])
    assert np.isnan(found["policy/kl_ref"])


def test_completion_rows() -> None:
    tokenizer = SimpleNamespace(decode=lambda tokens: "|".join(map(str, tokens)))
    rows = completion_rows(make_step(), tokenizer)
    assert [row["ordinal"] for row in rows] == [4, 4, 5, 5]
    assert rows[1] == {
        "ordinal": 4,
        "policy_version": 1,
        "prompt": "10|11",
        "text": "b",
        "reward": 1.0,
        "finish_reason": "length",
        "num_tokens": 4,
    }
    step = make_step()
    several = replace(
        step.groups[0].rollouts[0], num_turns=2, tokens=np.arange(4), loss_mask=np.array([0, 1, 0, 1], bool)
    )
    step = replace(step, groups=[replace(step.groups[0], rollouts=(several,), rewards=(1.0,))])
    assert [(row["prompt"], row["text"]) for row in completion_rows(step, tokenizer)] == [("0", "1|2|3")]


def test_rewards_of_groups_that_were_filtered_count(clock: Clock) -> None:
    """Or the reward would look better at first, and worse at last, than it is."""
    metrics, _, _ = make_metrics()
    solved = Group(Prompt(6, 2, 0, None), (rollout("e"), rollout("f")), (1.0, 1.0), policy_version=1)
    clock.now += 4.0
    found = metrics.of(make_step(filtered=(solved,)))
    assert found["reward/mean"] == pytest.approx(4 / 6)
    assert found["reward/frac_zero_std"] == pytest.approx(2 / 3)
    assert found["completions/mean_length"] == 2.5  # of what was trained


def test_the_canary_is_no_training_and_the_newest_version_is_the_one_whose_first_token_counts(clock: Clock) -> None:
    metrics, engine, _ = make_metrics()
    clock.now += 4.0
    engine.now = replace(STATISTICS, first_token_seconds={1: 0.5, 2: 0.25})
    found = metrics.of(make_step(metrics={"time/canary": 1.0}), checkpoint_seconds=0.75)
    assert found["time/trainer_idle_frac"] == 0.75, "1 of 4 s; its update took 2, of which the canary 1"
    assert found["refit/first_token_seconds"] == 0.25
    assert found["time/checkpoint"] == 0.75
    parts = [found[f"refit/{name}_seconds"] for name in ("export", "transfer", "load", "verify")]
    assert parts == [0.01, 0.02, 0.03, 0.04]
