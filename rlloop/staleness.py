"""Which finished groups an update may train on, and which it must wait for or drop.

staleness = version that trains - version that sampled. The slots of the loop bound it only on average: a straggler finishes
late however few others started meanwhile. `on_stale` says what happens then:

    correct   it is trained, with importance correction by the loss, up to `cap`; beyond that it is dropped
    drop      it is dropped beyond `bound`
    wait      an update waits until every group that would be too old after it is in

Among finished groups the oldest are trained first, which is what makes `wait` possible at all.
"""

from __future__ import annotations

import heapq
from collections import Counter
from typing import Literal

from rlloop.types import Group


class Backlog:
    """Groups between admission and training."""

    def __init__(
        self, groups_per_step: int, max_staleness: int, on_stale: Literal["correct", "drop", "wait"], cap: int
    ) -> None:
        self._groups_per_step = groups_per_step
        self._bound = max_staleness
        self._waits = on_stale == "wait"
        self.limit = cap if on_stale == "correct" else max_staleness
        """The greatest staleness that is ever trained."""
        self._outstanding: Counter[int] = Counter()  # version -> groups that are sampled or wait to be trained
        self._finished: list[tuple[int, int, Group]] = []  # a heap: oldest version, then ordinal, first

    def start(self, version: int) -> None:
        """A group begins to be sampled by this version."""
        self._outstanding[version] += 1

    def abandon(self, version: int) -> None:
        """A group that was started will not be trained."""
        self._leave(version)

    def finish(self, group: Group) -> None:
        """A group that was started is ready to be trained."""
        heapq.heappush(self._finished, (group.policy_version, group.prompt.ordinal, group))

    def take_stale(self, trainer_version: int) -> list[Group]:
        """Remove and return the finished groups that are too old to be trained."""
        stale = []
        while self._finished and trainer_version - self._finished[0][0] > self.limit:
            stale.append(self._pop())
        return stale

    def take_batch(self, trainer_version: int) -> list[Group] | None:
        """The groups of the next update, in the order of version and prompt; None while more must come in first."""
        if len(self._finished) < self._groups_per_step:
            return None
        if self._waits and not self._leaves_time_for_the_rest(trainer_version):
            return None
        return [self._pop() for _ in range(self._groups_per_step)]

    def _pop(self) -> Group:
        version, _, group = heapq.heappop(self._finished)
        self._leave(version)
        return group

    def _leave(self, version: int) -> None:
        self._outstanding[version] -= 1
        if not self._outstanding[version]:  # each `wait` looks through all that are kept
            del self._outstanding[version]

    def _leaves_time_for_the_rest(self, trainer_version: int) -> bool:
        """Whether, if the oldest finished groups are trained now, all others can still be trained within the bound.

        A group of version v must be trained by trainer version v + bound; each version trains `groups_per_step`. Earliest
        deadline first meets all deadlines if and only if, for every j, at most j steps' worth is due within j steps.
        """
        left = Counter(self._outstanding)
        left.subtract(version for version, _, _ in heapq.nsmallest(self._groups_per_step, self._finished))
        return all(
            sum(number for version, number in left.items() if version + self._bound <= trainer_version + steps)
            <= steps * self._groups_per_step
            for steps in range(self._bound + 1)
        )
