"""Counting, with a long tail: an answer takes time by its length and by luck, as on a crowded engine or in a sandbox."""

from __future__ import annotations

import random
import re
from typing import Any

import anyio

from rlloop.environment import MessageEnvironment, Policy
from rlloop.types import Message, Rollout


class SlowCounting(MessageEnvironment):
    """ "Count from 1 to n", n in [2, `largest`]; right answers to large n are long, so whoever drops late answers drops those.

    A token takes `seconds_per_token`, times a factor of the rollout that is lognormal with shape `sigma` and median 1.
    The reward is the share of numbers in their right place. Tasks from `num_tasks` on are not trained.
    """

    def __init__(self, seconds_per_token: float, sigma: float = 0.8, largest: int = 15, num_tasks: int = 1000) -> None:
        self.seconds_per_token, self.sigma, self.largest, self.num_tasks = seconds_per_token, sigma, largest, num_tasks
        self._luck = random.Random(0)

    def __len__(self) -> int:
        return self.num_tasks

    def task(self, index: int) -> int:
        """The number to count to."""
        return random.Random(index).randint(2, self.largest)

    def messages(self, task: int) -> list[Message]:
        """One question."""
        return [
            {"role": "user", "content": f"Count from 1 to {task}. Reply with the numbers only, separated by spaces."}
        ]

    async def rollout(self, task: Any, policy: Policy) -> Rollout:
        """As the parent, then the wait."""
        rollout = await super().rollout(task, policy)
        factor = self._luck.lognormvariate(0, self.sigma)
        await anyio.sleep(int(rollout.loss_mask.sum()) * self.seconds_per_token * factor)
        return rollout

    def score(self, task: int, rollout: Rollout) -> float:
        """In [0, 1]."""
        return share_right(task, rollout.text)


def share_right(largest: int, text: str) -> float:
    """Numbers in their right place, of those that are asked for or given, whichever are more."""
    numbers = [int(digits) for digits in re.findall(r"\d+", text)]
    right = sum(number == place for place, number in enumerate(numbers[:largest], start=1))
    return right / max(largest, len(numbers))
