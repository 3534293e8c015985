"""Against numbers worked out by hand; tests/test_losses.py compares the same functions with TRL."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlloop.advantages import (
    constant_weights,
    explained_variance,
    generalised_advantages,
    group_centred,
    group_normalised,
    leave_one_out,
    overlong_penalties,
    sequence_weights,
    token_weights,
    whitened,
)


def test_group_centred() -> None:
    np.testing.assert_allclose(group_centred([1.0, 0.0, 0.0, 0.5]), [0.625, -0.375, -0.375, 0.125], atol=1e-12)


def test_group_normalised_divides_by_the_unbiased_standard_deviation() -> None:
    # mean 2, squared deviations 4 + 0 + 0 + 4, over G - 1 = 3: std 1.6329931618554521
    expected = [-1.2246699, 0.0, 0.0, 1.2246699]  # 2 / 1.6330931618554521
    np.testing.assert_allclose(group_normalised([0.0, 2.0, 2.0, 4.0]), expected, atol=1e-6)


def test_group_normalised_eps() -> None:
    # std of (0, 1) is sqrt(1/2) = 0.70710678; 0.5 / (0.70710678 + 0.29289322) = 0.5
    np.testing.assert_allclose(group_normalised([0.0, 1.0], eps=0.29289322), [-0.5, 0.5], atol=1e-6)


@pytest.mark.parametrize("rewards", [[0.3] * 8, [1.0, 1.0], [0.0], [7.0]])
def test_a_group_that_shows_no_difference_gives_no_credit(rewards: list[float]) -> None:
    np.testing.assert_allclose(group_normalised(rewards), np.zeros(len(rewards)), atol=1e-9)
    np.testing.assert_allclose(group_centred(rewards), np.zeros(len(rewards)), atol=1e-9)


def test_token_weights_count_every_token_the_same() -> None:
    np.testing.assert_allclose(token_weights([1, 3, 4]), [0.125, 0.125, 0.125], atol=1e-12)


def test_sequence_weights_count_every_sample_the_same() -> None:
    np.testing.assert_allclose(sequence_weights([1, 2, 4, 5]), [0.25, 0.125, 0.0625, 0.05], atol=1e-12)


def test_weights_of_samples_without_loss_tokens_are_finite() -> None:
    assert np.isfinite(token_weights([0, 0])).all()
    # The empty sample still counts: the other keeps 1 / (2 * 4).
    np.testing.assert_allclose(sequence_weights([0, 4])[1], 0.125, atol=1e-12)


def test_leave_one_out_is_the_difference_to_the_others_mean() -> None:
    np.testing.assert_allclose(leave_one_out([1.0, 0.0, 0.5]), [0.75, -0.75, 0.0], atol=1e-12)  # 1 - (0 + 0.5) / 2
    assert leave_one_out([3.0]).tolist() == [0.0]


def test_whitened() -> None:
    # mean 2, squared deviations 4 + 0 + 4 over 3: std 1.6329932
    np.testing.assert_allclose(whitened([0.0, 2.0, 4.0]), [-1.2247449, 0.0, 1.2247449], atol=1e-6)
    assert whitened([0.1, 0.1, 0.1]).tolist() == [0.0, 0.0, 0.0]


def test_overlong_penalties_fall_over_the_buffer() -> None:
    found = overlong_penalties([1, 80, 90, 95, 100, 130], max_tokens=100, buffer=20)
    np.testing.assert_allclose(found, [0, 0, -0.5, -0.75, -1, -1], atol=1e-12)


def test_constant_weights_depend_on_no_length() -> None:
    assert constant_weights([1, 7], max_tokens=10).tolist() == [0.05, 0.05]
    assert constant_weights([], max_tokens=10).tolist() == []


def test_generalised_advantages_by_hand() -> None:
    # delta_2 = 1 - 0.5; delta_1 = 0.8 * 0.5 - 0.25; delta_0 = 0.8 * 0.25 - 0.1; each plus 0.8 * 0.5 of the next advantage
    second, first, one = 0.5, 0.15 + 0.4 * 0.5, -0.6
    found = generalised_advantages([[0, 0, 1], [-0.5]], [[0.1, 0.25, 0.5], [0.1]], discount=0.8, trace_decay=0.5)
    np.testing.assert_allclose(found[0], [0.1 + 0.4 * first, first, second], atol=1e-12)
    np.testing.assert_allclose(found[1], [one], atol=1e-12)


NUMBERS = st.floats(-3, 3)


@given(
    st.lists(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=7), min_size=1, max_size=4),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_generalised_advantages_are_the_sum(
    tokens: list[list[tuple[float, float]]], discount: float, trace_decay: float
) -> None:
    rewards, values = ([[pair[i] for pair in each] for each in tokens] for i in (0, 1))
    found = generalised_advantages(rewards, values, discount=discount, trace_decay=trace_decay)
    for r, v, advantages in zip(rewards, values, found, strict=True):
        after = [*v[1:], 0.0]
        deltas = [r[t] + discount * after[t] - v[t] for t in range(len(r))]
        for t, advantage in enumerate(advantages):
            expected = sum((discount * trace_decay) ** (k - t) * deltas[k] for k in range(t, len(r)))
            assert advantage == pytest.approx(expected, abs=1e-9)


@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=7), st.floats(0, 1))
def test_without_decay_returns_are_the_discounted_sum_of_rewards(
    tokens: list[tuple[float, float]], discount: float
) -> None:
    rewards, values = zip(*tokens, strict=True)
    (advantages,) = generalised_advantages([rewards], [values], discount=discount, trace_decay=1.0)
    for t in range(len(rewards)):
        expected = sum(discount ** (k - t) * rewards[k] for k in range(t, len(rewards)))
        assert advantages[t] + values[t] == pytest.approx(expected, abs=1e-9)


def test_explained_variance() -> None:
    assert explained_variance([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]) == 1
    assert explained_variance([2.0, 2.0, 2.0], [1.0, 2.0, 3.0]) == 0
    assert explained_variance([3.0, 2.0, 1.0], [1.0, 2.0, 3.0]) == -3  # residuals -2, 0, 2
    assert math.isnan(explained_variance([1.0, 2.0], [0.5, 0.5]))
