"""What an evaluation says of its answers, against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rlloop.evaluation import _summarise
from rlloop.types import Failure, Group, Prompt, Rollout

ROLLOUT = Rollout(np.zeros(3, np.int32), np.array([False, True, True]), np.zeros(3, np.float32), 0, "stop", 1, "")


def group(ordinal: int, *rewards: float) -> Group:
    failures = () if rewards else (Failure("error", "score", "made up"),)
    return Group(Prompt(ordinal, ordinal, 0, None), (ROLLOUT,) * len(rewards), rewards, 0, failures)


def test_answers_to_one_prompt_are_no_independent_draws() -> None:
    found = _summarise(
        [group(0, 1.0, 1.0, 1.0, 0.0), group(1, 0.0, 0.0, 0.0, 0.0), group(2, 1.0, 1.0, 1.0, 1.0), group(3)]
    )
    assert found["eval/reward_mean"] == pytest.approx(7 / 12)
    # Means 3/4, 0 and 1: their variance is 13/48.
    assert found["eval/reward_stderr"] == pytest.approx(math.sqrt(13 / 48 / 3))
    assert (found["eval/prompts"], found["eval/failures"], found["eval/mean_length"]) == (4, 1, 2)
