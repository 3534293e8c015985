"""Against numbers worked out by hand; tests/test_losses.py compares the same functions with TRL."""

import math
from typing import Any

import pytest
import torch

from rlloop.corrections import importance_weights, mismatch_ratio, sample_mean, sample_sum


def test_mismatch_ratio() -> None:
    old = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64).log()
    rollout = torch.tensor([0.25, 0.4, 0.3], dtype=torch.float64).log()
    expected = torch.tensor([2.0, 0.5, 1.0], dtype=torch.float64)
    torch.testing.assert_close(mismatch_ratio(old, rollout), expected, rtol=0, atol=1e-12)


def test_mismatch_ratio_averages_to_one_under_the_rollout_distribution() -> None:
    rollout = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    old = torch.tensor([0.1, 0.3, 0.6], dtype=torch.float64)
    assert math.isclose(float((rollout * mismatch_ratio(old.log(), rollout.log())).sum()), 1.0, abs_tol=1e-12)


TWO_SAMPLES = torch.tensor([0, 0, 1, 1, 1])
OLD = torch.tensor([0.4, 0.1, 0.3, 0.2, 0.3], dtype=torch.float64).log()
ROLLOUT = torch.tensor([0.1, 0.2, 0.1, 0.4, 0.4], dtype=torch.float64).log()
"""Ratios 4 and 0.5, with product 2; 3, 0.5 and 0.75, with product 1.125."""


def weights(**settings: Any) -> list[float]:
    return importance_weights(OLD, ROLLOUT, TWO_SAMPLES, **settings).tolist()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [2, 0.5, 2, 0.5, 0.75]),
        ({"cap": 3.5}, [3.5, 0.5, 3, 0.5, 0.75]),
        ({"bound": "none"}, [1, 1, 1, 1, 1]),
        ({"bound": "mask", "floor": 0.6, "cap": 3.5}, [0, 0, 3, 0, 0.75]),
        ({"level": "sequence", "cap": 1.5}, [1.5, 1.5, 1.125, 1.125, 1.125]),
        ({"level": "sequence", "bound": "mask", "cap": 1.5}, [0, 0, 1.125, 1.125, 1.125]),
        # Means 2 ** (1 / 2) and 1.125 ** (1 / 3)
        ({"level": "geometric", "cap": 1.2}, [1.2, 1.2, *[1.0400419] * 3]),
        ({"level": "geometric", "bound": "mask", "floor": 0.9, "cap": 1.2}, [0, 0, 1, 1, 1]),
    ],
)
def test_importance_weights_by_hand(settings: dict[str, Any], expected: list[float]) -> None:
    assert weights(**settings) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("bound", ["truncate", "mask"])
def test_a_non_finite_logprob_shows_and_an_infinite_weight_does_not(bound: Any) -> None:
    # The trainer skips a step whose loss is not finite; a weight that hid the NaN would train on it.
    old = torch.tensor([math.nan, 0.0])
    found = importance_weights(old, torch.tensor([0.0, -math.inf]), torch.tensor([0, 1]), bound=bound)
    assert found[0].isnan()
    assert found[1] == (2.0 if bound == "truncate" else 0.0)


def test_sums_and_means_of_samples() -> None:
    values = torch.tensor([1.0, 2.0, 10.0, 20.0, 60.0])
    assert sample_sum(values, TWO_SAMPLES).tolist() == [3, 3, 90, 90, 90]
    assert sample_mean(values, TWO_SAMPLES).tolist() == [1.5, 1.5, 30, 30, 30]
