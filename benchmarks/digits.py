"""`arithmetic` with the rewards of benchmarks/trl_baseline.py, which differ between almost any two answers."""

from __future__ import annotations

import random
from math import log
from typing import Any

import anyio
from rlloop.envs.arithmetic import Arithmetic

from rlloop.environment import Policy
from rlloop.types import Rollout


class Digits(Arithmetic):
    """The fraction of digits among the characters of the answer."""

    def score(self, task: Any, rollout: Rollout) -> float:
        """In [0, 1]."""
        return sum(character.isdigit() for character in rollout.text) / max(len(rollout.text), 1)


class SlowDigits(Digits):
    """Every rollout waits for something outside, as with tools and sandboxes: lognormally (mean `mean` seconds, shape `sigma`),
    before it answers, by a published seed."""

    def __init__(self, mean: float = 2.0, sigma: float = 0.6, seed: int = 0, **arguments: Any) -> None:
        super().__init__(seed=seed, **arguments)
        self._mu, self._sigma = log(mean) - sigma**2 / 2, sigma  # exp(mu + sigma^2 / 2) is the mean
        self._random = random.Random(seed)

    async def rollout(self, task: Any, policy: Policy) -> Rollout:
        """Then as the parent."""
        await anyio.sleep(self._random.lognormvariate(self._mu, self._sigma))
        return await super().rollout(task, policy)


class Vowels(Arithmetic):
    """The same for models with random weights, whose tokens are almost never digits: the fraction of vowels."""

    def score(self, task: Any, rollout: Rollout) -> float:
        """In [0, 1]."""
        return sum(character in "aeiou" for character in rollout.text) / max(len(rollout.text), 1)
