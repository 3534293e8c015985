"""`arithmetic` with the rewards of benchmarks/trl_baseline.py, which differ between almost any two answers."""

from __future__ import annotations

from typing import Any

from rlloop.envs.arithmetic import Arithmetic

from rlloop.types import Rollout


class Digits(Arithmetic):
    """The fraction of digits among the characters of the answer."""

    def score(self, task: Any, rollout: Rollout) -> float:
        """In [0, 1]."""
        return sum(character.isdigit() for character in rollout.text) / max(len(rollout.text), 1)


class Vowels(Arithmetic):
    """The same for models with random weights, whose tokens are almost never digits: the fraction of vowels."""

    def score(self, task: Any, rollout: Rollout) -> float:
        """In [0, 1]."""
        return sum(character in "aeiou" for character in rollout.text) / max(len(rollout.text), 1)
