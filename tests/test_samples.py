import itertools
from dataclasses import replace
from typing import Any

import anyio
import numpy as np
import pytest

from rlloop.advantages import group_centred, raw_rewards, sequence_weights, token_weights
from rlloop.errors import ConfigError
from rlloop.samples import (
    make_samples,
    minibatches,
    token_rewards,
    with_critics_credit,
    with_kl_penalty,
    with_old_logprobs,
    with_overlong_penalty,
    with_ref_logprobs,
    without_signal_free,
)
from rlloop.types import Group, Prompt, Rollout, Sample


def rollout(num_prompt: int, num_sampled: int) -> Rollout:
    loss_mask = np.arange(num_prompt + num_sampled) >= num_prompt
    tokens = np.arange(len(loss_mask), dtype=np.int32)
    return Rollout(tokens, loss_mask, np.where(loss_mask, -2, 0).astype(np.float32), 3, "stop", 1, "")


def group(ordinal: int, rollouts: tuple[Rollout, ...], rewards: tuple[float, ...]) -> Group:
    return Group(Prompt(ordinal, 0, 0, None), rollouts, rewards, 3)


GROUPS = [
    group(7, (rollout(2, 1), rollout(2, 3)), (1.0, 0.0)),
    group(9, (rollout(1, 4), rollout(1, 2)), (0.5, 0.5)),
]


def test_advantages_are_of_the_group_and_weights_of_the_batch() -> None:
    samples = make_samples(GROUPS, group_centred, token_weights)
    assert [sample.prompt_id for sample in samples] == [7, 7, 9, 9]
    assert [set(sample.advantages.tolist()) for sample in samples] == [{0.5}, {-0.5}, {0.0}, {0.0}]
    assert [len(sample.advantages) for sample in samples] == [3, 5, 5, 3]
    # 10 sampled tokens: each counts a tenth.
    total = sum(float(sample.loss_weights[sample.loss_mask].sum()) for sample in samples)
    assert total == pytest.approx(1)
    assert samples[1].loss_weights[-1] == pytest.approx(0.1)


@pytest.mark.parametrize(
    "advantages", [lambda _: 0.5, lambda rewards: list(rewards)[1:], lambda rewards: [[r] for r in rewards]]
)
def test_advantages_of_another_shape_are_refused(advantages: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"expected an array of 2 advantages for as many rewards, got one of shape \["
    ):
        make_samples(GROUPS, advantages, token_weights)


def test_a_token_is_as_stale_as_the_version_that_sampled_it() -> None:
    hopped = replace(rollout(1, 3), token_versions=np.array([3, 3, 4, 5], np.int32))
    later = replace(rollout(1, 1), policy_version=4)  # its first token was sampled when the next version was there
    stale = replace(group(1, (rollout(1, 1), hopped, later), (0.0, 1.0, 0.0)), staleness=2)  # trained by version 5
    samples = make_samples([stale], group_centred, token_weights)
    assert [sample.staleness.tolist() for sample in samples if sample.staleness is not None] == [
        [2, 2],
        [2, 2, 1, 0],
        [1, 1],
    ]


def test_every_sample_counts_the_same_with_sequence_weights() -> None:
    samples = make_samples(GROUPS, group_centred, sequence_weights)
    assert [float(s.loss_weights[s.loss_mask].sum()) for s in samples] == pytest.approx([0.25] * 4)


def test_a_rollout_without_a_sampled_token_has_no_sample_but_counts_in_its_group() -> None:
    samples = make_samples([group(1, (rollout(3, 0), rollout(3, 2)), (0.0, 1.0))], group_centred, token_weights)
    assert [sample.advantages[0] for sample in samples] == [0.5]
    assert np.isfinite(samples[0].loss_weights).all()


def test_samples_without_a_signal_are_left_out_and_the_others_keep_their_weight() -> None:
    samples = make_samples(GROUPS, group_centred, token_weights)
    kept = without_signal_free(samples)
    assert [sample.prompt_id for sample in kept] == [7, 7]
    assert kept[0].loss_weights[0] == pytest.approx(0.1)


def test_the_kl_penalty_is_the_sum_over_the_tokens_of_a_rollout() -> None:
    trainer: Any = Trainer()
    groups = [group(1, (rollout(2, 1), rollout(2, 0), rollout(2, 3)), (1.0, 1.0, 1.0)), GROUPS[1]]
    noted = groups[0].rollouts[0]  # logprobs that its environment kept of its prompt are no part of it
    noted.rollout_logprobs[~noted.loss_mask] = -7.0
    found, kl = anyio.run(with_kl_penalty, trainer, groups, 0.1)
    assert kl == pytest.approx(3)
    # Sampled at -2, the base has -5: 3 nats a token; a rollout without tokens loses nothing.
    assert found[0].rewards == pytest.approx((1 - 0.3, 1.0, 1 - 0.9))
    assert found[1].rewards == pytest.approx((0.5 - 1.2, 0.5 - 0.6))


def test_the_token_limit_is_one_of_each_turn() -> None:
    turns = replace(rollout(2, 8), loss_mask=np.array([0, 0, 1, 1, 1, 0, 1, 1, 0, 1], bool))
    found = with_overlong_penalty([group(1, (turns, rollout(2, 4)), (1.0, 1.0))], max_tokens=4, buffer=2)
    assert found[0].rewards == (0.5, 0.0)  # 3 of 4 tokens, 4 of 4


class Trainer:
    async def logprobs(self, name: str | None, samples: list[Sample]) -> list[Any]:
        return [np.where(sample.loss_mask, -1.0 if name else -5.0, 0).astype(np.float32) for sample in samples]


def test_old_and_reference_logprobs_are_those_of_adapter_and_base() -> None:
    samples = make_samples(GROUPS, group_centred, token_weights)
    trainer: Any = Trainer()
    [first, *_] = anyio.run(with_old_logprobs, trainer, "policy", samples)
    assert first.old_logprobs is not None
    assert (first.old_logprobs.tolist(), first.ref_logprobs) == ([0, 0, -1.0], None)
    [first, *_] = anyio.run(with_ref_logprobs, trainer, samples)
    assert first.ref_logprobs is not None
    assert (first.old_logprobs, first.ref_logprobs.tolist()) == (None, [0, 0, -5.0])


def with_old_values(samples: list[Sample], *values: list[float]) -> list[Sample]:
    return [
        replace(sample, old_values=np.concatenate([np.full(len(sample.tokens) - len(each), 9.0), each]))
        for sample, each in zip(samples, values, strict=True)
    ]


def test_critics_credit_by_hand() -> None:
    """What lies before the first sampled token counts nowhere."""
    samples = make_samples([group(1, (rollout(2, 1), rollout(2, 2)), (1.0, 0.5))], raw_rewards, token_weights)
    samples = with_old_values(samples, [0.25], [0.0, 0.75])
    samples = [replace(s, ref_logprobs=np.where(s.loss_mask, -2.5, 0).astype(np.float32)) for s in samples]
    rewards = token_rewards(samples, kl_coef=0.1)
    np.testing.assert_allclose(np.concatenate(rewards), [0.95, -0.05, 0.45], atol=1e-6)
    decays = {"discount": 1.0, "trace_decay": 0.5}
    found, _ = with_critics_credit(samples, rewards, **decays, critic_trace_decay=0.5, whiten=False)
    # Each token's reward is lowered by 0.1 * (-2 + 2.5). Deltas: 0.95 - 0.25; 0.45 - 0.75, and -0.05 + 0.75.
    np.testing.assert_allclose(found[0].advantages, [0, 0, 0.7], atol=1e-6)
    np.testing.assert_allclose(found[1].advantages, [0, 0, 0.7 - 0.5 * 0.3, -0.3], atol=1e-6)
    np.testing.assert_allclose(found[0].returns, [0, 0, 0.95], atol=1e-6)
    np.testing.assert_allclose(found[1].returns, [0, 0, 0.55, 0.45], atol=1e-6)
    decoupled, _ = with_critics_credit(samples, rewards, **decays, critic_trace_decay=1.0, whiten=False)
    np.testing.assert_allclose(decoupled[1].returns, [0, 0, -0.05 + 0.45, 0.45], atol=1e-6)
    for coupled, apart in zip(found, decoupled, strict=True):
        np.testing.assert_array_equal(coupled.advantages, apart.advantages)
    whitened, _ = with_critics_credit(samples, rewards, **decays, critic_trace_decay=0.5)
    credit = np.concatenate([sample.advantages[sample.loss_mask] for sample in whitened])
    assert (credit.mean(), credit.std()) == pytest.approx((0, 1), abs=1e-6)
    for plain, white in zip(found, whitened, strict=True):
        np.testing.assert_array_equal(plain.returns, white.returns)


def test_minibatches_use_every_sample_in_every_epoch_and_keep_prompts_together() -> None:
    groups = [group(ordinal, (rollout(1, 1 + ordinal), rollout(1, 2)), (1.0, 0.0)) for ordinal in range(5)]
    samples = make_samples(groups, group_centred, token_weights)
    parts = list(minibatches(samples, 2, 3, [0, 7]))
    assert len(parts) == 6
    orders = []
    for epoch in (parts[:3], parts[3:]):
        prompts = [sorted({sample.prompt_id for sample in part}) for part in epoch]
        assert sorted(itertools.chain(*prompts)) == [0, 1, 2, 3, 4]
        assert sum(map(len, epoch)) == len(samples)
        orders.append(prompts)
    assert orders[0] != orders[1]
    for part in parts:
        assert sum(float(s.loss_weights[s.loss_mask].sum()) for s in part) == pytest.approx(1)
    assert [len(part) for part in minibatches(samples, 1, 99, [0])] == [2] * 5
    again = list(minibatches(samples, 2, 3, [0, 7]))
    assert [[s.prompt_id for s in part] for part in again] == [[s.prompt_id for s in part] for part in parts]


def test_the_critic_is_compared_with_what_came() -> None:
    """Not with returns: those are nearer to any values that do not change along a rollout."""
    samples = make_samples([group(1, (rollout(2, 50), rollout(2, 50)), (1.0, 0.0))], raw_rewards, token_weights)
    samples = with_old_values(samples, [0.25] * 50, [0.75] * 50)
    decays = {"discount": 1.0, "trace_decay": 0.5, "critic_trace_decay": 0.5}
    _, metrics = with_critics_credit(samples, token_rewards(samples), **decays)
    # Residuals 0.75 and -0.75 of a variance of 0.25.
    assert metrics == {"value/mean": 0.5, "value/explained_variance": pytest.approx(1 - 0.75**2 / 0.25)}


def test_credit_of_several_turns_counts_nothing_that_the_environment_said() -> None:
    """Neither its tokens' values and logprobs, nor time: the last token of a turn is followed by the first of the next."""
    turns = replace(rollout(1, 4), loss_mask=np.array([0, 1, 0, 1, 0], bool))
    [sample] = make_samples([group(1, (turns,), (1.0,))], raw_rewards, token_weights)
    sample = replace(sample, old_values=np.array([9, 0.25, 9, 0.5, 9], np.float32))
    sample = replace(sample, ref_logprobs=np.where(sample.loss_mask, -2.5, 7).astype(np.float32))
    rewards = token_rewards([sample], kl_coef=0.1)
    np.testing.assert_allclose(rewards[0], [-0.05, 0.95], atol=1e-6)
    # Deltas: -0.05 + 0.5 * 0.5 - 0.25 = -0.05, and 0.95 - 0.5 = 0.45.
    decays = {"discount": 0.5, "trace_decay": 0.5, "critic_trace_decay": 1.0}
    [found], metrics = with_critics_credit([sample], rewards, **decays, whiten=False)
    np.testing.assert_allclose(found.advantages, [0, -0.05 + 0.25 * 0.45, 0, 0.45, 0], atol=1e-6)
    np.testing.assert_allclose(found.returns, [0, -0.05 + 0.5 * 0.95, 0, 0.95, 0], atol=1e-6)
    # Residuals 0.175 and 0.45, of what came: 0.425 and 0.95.
    assert metrics == {"value/mean": 0.375, "value/explained_variance": pytest.approx(1 - 0.1375**2 / 0.2625**2)}
