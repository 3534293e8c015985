"""Against numbers worked out by hand; tests/test_losses.py compares the same functions with TRL."""

import math

import torch

from rlloop.corrections import mismatch_ratio, truncated


def test_mismatch_ratio() -> None:
    old = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64).log()
    rollout = torch.tensor([0.25, 0.4, 0.3], dtype=torch.float64).log()
    expected = torch.tensor([2.0, 0.5, 1.0], dtype=torch.float64)
    torch.testing.assert_close(mismatch_ratio(old, rollout), expected, rtol=0, atol=1e-12)


def test_mismatch_ratio_averages_to_one_under_the_rollout_distribution() -> None:
    rollout = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    old = torch.tensor([0.1, 0.3, 0.6], dtype=torch.float64)
    assert math.isclose(float((rollout * mismatch_ratio(old.log(), rollout.log())).sum()), 1.0, abs_tol=1e-12)


def test_truncated_caps_from_above_only() -> None:
    ratio = torch.tensor([0.01, 1.0, 2.0, 2.5, math.inf])
    assert truncated(ratio, 2.0).tolist() == torch.tensor([0.01, 1.0, 2.0, 2.0, 2.0]).tolist()


def test_truncated_lets_a_non_finite_logprob_through() -> None:
    # The trainer skips a step whose loss is not finite; a weight that hid the NaN would train on it.
    assert truncated(torch.tensor([math.nan]), 2.0).isnan().all()
