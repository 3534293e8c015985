"""The training loop: sampling, scoring and learning overlap; staleness is bounded.

    prompts ─▶ admit ─▶ sample + score (a task per group) ─▶ finished ─▶ update ─▶ refit
                 ▲                                                                   │
                 └───────────── a slot per group comes back after the refit ◀────────┘

Version v is the policy after v updates: step v + 1 trains on version v and makes version v + 1. At most
`groups_per_step * (max_staleness + 1)` groups are between admission and refit, so in steady state a group is trained at most
`max_staleness` versions after it was sampled; `rlloop.staleness` says what happens to stragglers. `max_staleness = 0` is the
synchronous loop.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from itertools import count
from statistics import fmean
from time import monotonic
from typing import Any, Protocol

from anyio import CancelScope, Event, Semaphore, create_task_group
from anyio.lowlevel import checkpoint

from rlloop.environment import PromptTooLong
from rlloop.errors import BadEnvironmentError
from rlloop.ledger import DropReason, Ledger
from rlloop.refit.publisher import Refit
from rlloop.staleness import Backlog
from rlloop.types import Failure, Group, Metrics, Prompt, RefitReport

_BEGIN_IN_A_PASS = 4
"""Groups. A refit frees the slots of a whole step; all their requests in one pass through the event loop would keep the
trainer's next call waiting, for as long as a small model's step."""


@dataclass(frozen=True, slots=True)
class Step:
    """What one turn of the loop did."""

    number: int
    """From 1; also the policy version that it made."""
    groups: list[Group]
    metrics: Metrics
    """What the update returned."""
    wait_seconds: float
    """For rollouts."""
    update_seconds: float
    refit: RefitReport
    filtered: tuple[Group, ...] = ()
    """Groups that were sampled since the step before and replaced, for their rewards were all equal."""


class Stages(Protocol):
    """What the loop calls. Each may raise; the first error cancels all others and ends the loop."""

    async def sample(self, prompt: Prompt, version: int) -> Group:
        """Roll out and score one group. Raises PromptTooLong when the prompt leaves no room for an answer."""
        ...

    def task(self, index: int) -> Any:
        """The environment's task, or the Failure that all rollouts of it are."""
        ...

    async def update(self, groups: list[Group]) -> Metrics:
        """Train on the groups of one step. A cancelled update has made all of its optimizer steps, and returns, or none."""
        ...

    def finish_step(self, step: Step) -> None:
        """Log it: also when its refit was interrupted, since its update is made and will be saved."""
        ...

    async def checkpoint(self, step: int) -> None:
        """Save what should be saved after this step."""
        ...


class Loop:
    """Runs the updates up to `num_steps`; the first `first_step` of them are done already, by the run that is resumed.

    The refit must have published version `first_step`. Up to `max_filtered` groups a step that show no difference in reward
    are replaced by others.
    """

    def __init__(
        self,
        stages: Stages,
        refit: Refit,
        ledger: Ledger,
        backlog: Backlog,
        *,
        groups_per_step: int,
        num_slots: int,
        num_steps: int,
        min_group_size: int = 1,
        max_filtered: int = 0,
        first_step: int = 0,
    ) -> None:
        self._stages = stages
        self._refit = refit
        self._ledger = ledger
        self._backlog = backlog
        self._groups_per_step = groups_per_step
        self._num_slots = num_slots
        self._num_steps = num_steps
        self._min_group_size = min_group_size
        self._max_filtered = max_filtered
        self._filtered: list[Group] = []
        """Since the last update."""
        self.version = first_step
        """Updates that the weights have seen."""
        self._scopes: defaultdict[int, set[CancelScope]] = defaultdict(set)
        self._changed = Event()
        """Set when a group has ended, whichever way; made anew before an update looks for its groups."""
        self._failed_in_a_row: list[Failure | None] = []
        self.num_in_flight = 0
        """Groups that are being sampled or scored."""
        self.dropped: Counter[str] = Counter()
        """Groups by the reason for which they were not trained."""
        self.failures: Counter[str] = Counter()
        """Failed rollouts, by kind."""

    async def run(self) -> None:
        """Return after the last update, or raise the first error of any stage."""
        self._slots = Semaphore(self._num_slots, fast_acquire=True)
        self._needed = Semaphore((self._num_steps - self.version) * self._groups_per_step, fast_acquire=True)

        async def admit() -> None:
            for number in count(1):
                await self._needed.acquire()
                await self._slots.acquire()
                tasks.start_soon(self._fill_slot)
                if number % _BEGIN_IN_A_PASS == 0:
                    await checkpoint()

        async with create_task_group() as tasks:
            tasks.start_soon(admit)
            while self.version < self._num_steps:
                started = monotonic()
                groups = await self._next_batch()
                received = monotonic()
                metrics = await self._stages.update(groups)
                self.version += 1
                filtered, self._filtered = tuple(self._filtered), []
                self._ledger.trained([group.prompt.ordinal for group in groups], self.version)
                updated = monotonic()
                report = RefitReport.interrupted(self.version)
                try:
                    report = await self._refit.publish(self.version)
                    self._cancel_stale()
                    for _ in groups:
                        self._slots.release()
                finally:
                    step = Step(self.version, groups, metrics, received - started, updated - received, report, filtered)
                    self._stages.finish_step(step)
                await self._stages.checkpoint(self.version)
            tasks.cancel_scope.cancel()  # `admit`, which waits for groups to replace

    async def _next_batch(self) -> list[Group]:
        """Wait for the groups of the next update; replace those that have become too old."""
        while True:
            self._changed = Event()
            for group in self._backlog.take_stale(self.version):
                self._drop(group.prompt.ordinal, "stale")
            if groups := self._backlog.take_batch(self.version):
                return [replace(group, staleness=self.version - group.policy_version) for group in groups]
            await self._changed.wait()

    async def _fill_slot(self) -> None:
        """Hold a slot with a group until it is trained; one that cannot be is counted and replaced."""
        ordinal, index, seed = self._ledger.next()
        prompt = Prompt(ordinal, index, seed, self._stages.task(index))
        async with self._refit.lease(ordinal) as version:
            with CancelScope() as scope:
                self._backlog.start(version)
                self._scopes[version].add(scope)
                self.num_in_flight += 1
                group = None
                reason: DropReason | None = "stale"  # if the scope is cancelled
                try:
                    group = await self._stages.sample(prompt, version)
                    self.failures.update(failure.kind for failure in group.failures)
                    if group.rewards:
                        self._ledger.answered(ordinal, index, fmean(group.rewards))
                    reason = self._reason_to_drop(group)
                except PromptTooLong:
                    reason = "too_long"
                finally:
                    self.num_in_flight -= 1
                    self._scopes[version].discard(scope)
        if group is not None and reason == "filtered":
            self._filtered.append(group)
        if reason in (None, "filtered"):
            self._failed_in_a_row.clear()
        if reason is None:
            assert group is not None
            self._backlog.finish(group)
        else:
            self._backlog.abandon(version)
            self._drop(ordinal, reason)
        self._changed.set()  # an update may have waited for it, also where it is dropped
        if reason in ("failed", "too_long"):
            self._stop_if_all_fail(group)

    def _reason_to_drop(self, group: Group) -> DropReason | None:
        if len(group.rollouts) < self._min_group_size:
            return "failed"
        if len(self._filtered) < self._max_filtered and min(group.rewards) == max(group.rewards):
            return "filtered"
        return None

    def _drop(self, ordinal: int, reason: DropReason) -> None:
        """Count it; another one gets its slot."""
        self._ledger.dropped(ordinal, reason)
        self.dropped[reason] += 1
        self._slots.release()
        self._needed.release()

    def _cancel_stale(self) -> None:
        """Groups that are too old before they are finished need not be finished."""
        for old in [v for v in self._scopes if self.version - v > self._backlog.limit]:
            for scope in self._scopes.pop(old):
                scope.cancel()

    def _stop_if_all_fail(self, group: Group | None) -> None:
        """`group`: None for a prompt that is too long."""
        self._failed_in_a_row.append(group.failures[-1] if group else None)
        number = len(self._failed_in_a_row)
        if number < max(20, 3 * self._groups_per_step):
            return
        failed = [failure for failure in self._failed_in_a_row if failure is not None]
        if not failed:
            raise BadEnvironmentError(
                f"{number} prompts in a row left no room for an answer: raise --engine.max-model-len"
            )
        last = failed[-1]
        too_long = f", {number - len(failed)} of them for too long a prompt" if len(failed) < number else ""
        raise BadEnvironmentError(
            f"{number} groups in a row failed{too_long}; the last {last.stage} ended with {last.kind}: {last.message}"
        )
