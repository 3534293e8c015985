"""`arithmetic` with the reward of benchmarks/trl_baseline.py, which differs between almost any two answers."""

from __future__ import annotations

from typing import Any

from rlloop.envs.arithmetic import Arithmetic

from rlloop.types import Rollout


class Digits(Arithmetic):
    """The fraction of digits among the characters of the answer."""

    def score(self, task: Any, rollout: Rollout) -> float:
        """In [0, 1]."""
        return sum(character.isdigit() for character in rollout.text) / max(len(rollout.text), 1)
