"""The documented metrics of one step, from what the loop, the engine and the update report."""

from __future__ import annotations

from collections import defaultdict
from time import monotonic
from typing import Any

import numpy as np

from rlloop.engine import Engine
from rlloop.ledger import Ledger
from rlloop.loop import Loop, Step
from rlloop.samples import token_staleness
from rlloop.types import Group, Metrics, Reward, Rollout
from rlloop.updates import PER_TOKEN

SAMPLED = "progress/tokens_sampled"
TOTALS = (SAMPLED, "progress/tokens_trained", "optim/skipped_steps", "optim/nonfinite_steps")
_DROPPED = ("stale", "failed", "filtered", "too_long")
UPDATE_METRICS = (
    *PER_TOKEN,
    "loss/policy",
    "optim/grad_norm",
    "optim/lr",
    "perf/mfu",
    "perf/train_tokens_per_second",
    "refit/canary_difference",
    "time/canary",
    "time/forward_backward",
    "time/optimizer",
)
"""NaN where an update does not report them (no KL without a reference, no loss without a sample to train on, no canary)."""


class StepMetrics:
    """Differences between one step's end and the next; made when the loop begins."""

    def __init__(self, loop: Loop, ledger: Ledger, engine: Engine) -> None:
        self._loop = loop
        self._ledger = ledger
        self._engine = engine
        self.totals = dict.fromkeys(TOTALS, 0.0)
        """Sums over the run; a resumed run goes on from those of its checkpoint."""
        self._before: dict[str, float] = {}
        self._change_since_last()
        engine.reset_longest_gap()  # of a run before, on the same engine

    def of(self, step: Step, checkpoint_seconds: float = 0.0) -> Metrics:
        """All metrics of a step that has just ended; the checkpoint is the one after the step before."""
        change = self._change_since_last()
        seconds = change["clock"]
        staleness = [group.staleness for group in step.groups]
        rollouts = [(rollout, group) for group in step.groups for rollout in group.rollouts]
        updating = step.update_seconds - step.metrics.get("time/canary", 0.0)
        engine_busy, trainer_busy = change["engine"] / seconds, updating / seconds
        statistics = self._engine.statistics()
        self._engine.reset_longest_gap()
        for name in TOTALS:
            self.totals[name] += change["generated"] if name == SAMPLED else step.metrics.get(name, 0.0)
        first_token = max(statistics.first_token_seconds.items(), default=(0, float("nan")))[1]
        return {
            **dict.fromkeys(UPDATE_METRICS, float("nan")),
            **_reward_metrics([*step.groups, *step.filtered]),
            **_completion_metrics(step.groups),
            **step.metrics,
            "async/staleness_mean": float(np.mean(staleness)),
            "async/staleness_max": float(max(staleness)),
            "async/token_staleness_mean": float(
                np.mean(np.concatenate([token_staleness(r, group)[r.loss_mask] for r, group in rollouts]))
            ),
            "async/frac_mixed_versions": float(np.mean([r.token_versions is not None for r, _ in rollouts])),
            "async/in_flight": float(self._loop.num_in_flight),
            "async/dropped_groups": change["dropped"],
            **{f"async/dropped_{reason}": change[reason] for reason in _DROPPED},
            "rollout/errors": change["errors"],
            "rollout/timeouts": change["timeouts"],
            "time/step": seconds,
            "time/wait_rollouts": step.wait_seconds,
            "time/refit": step.refit.publish_seconds,
            "time/refit_stall": step.refit.stall_seconds,
            "time/checkpoint": checkpoint_seconds,
            "time/trainer_idle_frac": 1.0 - min(1.0, trainer_busy),
            "time/engine_idle_frac": 1.0 - min(1.0, engine_busy),
            "refit/export_seconds": step.refit.export_seconds,
            "refit/transfer_seconds": step.refit.transfer_seconds,
            "refit/load_seconds": step.refit.load_seconds,
            "refit/verify_seconds": step.refit.verify_seconds,
            "refit/first_token_seconds": first_token,
            "refit/longest_gap_seconds": statistics.longest_gap_seconds,
            "perf/overlap_efficiency": min(1.0, max(engine_busy, trainer_busy)),
            "perf/gen_tokens_per_second": change["generated"] / seconds,
            **self.totals,
            "progress/prompts": float(self._ledger.counts["trained"]),
            "progress/passed_over": float(self._ledger.counts["curriculum"]),
            "progress/epoch": sum(self._ledger.counts.values()) / self._ledger.num_tasks,
        }

    def _change_since_last(self) -> dict[str, float]:
        statistics = self._engine.statistics()
        now = {
            "clock": monotonic(),
            "engine": statistics.busy_seconds,
            "generated": float(statistics.num_generated_tokens),
            "dropped": float(sum(self._loop.dropped.values())),
            **{reason: float(self._loop.dropped[reason]) for reason in _DROPPED},
            "errors": float(self._loop.failures["error"]),
            "timeouts": float(self._loop.failures["timeout"]),
        }
        change = {name: value - self._before.get(name, 0.0) for name, value in now.items()}
        self._before = now
        return change


def _reward_metrics(groups: list[Group]) -> Metrics:
    rewards = [np.array(group.rewards) for group in groups]
    every = np.concatenate(rewards)
    parts: defaultdict[str, list[float]] = defaultdict(list)
    for group in groups:
        for reward in group.rewards:
            if isinstance(reward, Reward):
                for name, value in reward.parts.items():
                    parts[f"reward/{name}/mean"].append(value)
    return {
        "reward/mean": float(every.mean()),
        "reward/std": float(every.std()),
        "reward/min": float(every.min()),
        "reward/max": float(every.max()),
        "reward/frac_zero_std": float(np.mean([np.ptp(group) == 0 for group in rewards])),
        **{name: float(np.mean(values)) for name, values in parts.items()},
    }


def _completion_metrics(groups: list[Group]) -> Metrics:
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    named: defaultdict[str, list[float]] = defaultdict(list)
    for rollout in rollouts:
        for name, value in rollout.metrics.items():
            named[f"env/{name}"].append(value)
    return {
        "completions/mean_length": float(np.mean([rollout.loss_mask.sum() for rollout in rollouts])),
        "completions/clipped_ratio": float(np.mean([rollout.finish_reason == "length" for rollout in rollouts])),
        **{name: float(np.mean(values)) for name, values in named.items()},
    }


def completion_rows(step: Step, tokenizer: Any) -> list[dict[str, Any]]:
    """What the policy wrote in this step, one row for each rollout; where it had several turns, what it was told between them,
    too."""
    return [
        {
            "ordinal": group.prompt.ordinal,
            "policy_version": group.policy_version,
            "prompt": tokenizer.decode(rollout.tokens[: _num_prompt_tokens(rollout)]),
            "text": rollout.text
            if rollout.num_turns == 1
            else tokenizer.decode(rollout.tokens[_num_prompt_tokens(rollout) :]),
            "reward": float(reward),
            "finish_reason": rollout.finish_reason,
            "num_tokens": int(rollout.loss_mask.sum()),
        }
        for group in step.groups
        for rollout, reward in zip(group.rollouts, group.rewards, strict=True)
    ]


def _num_prompt_tokens(rollout: Rollout) -> int:
    return int(rollout.loss_mask.argmax())
