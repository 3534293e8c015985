"""From scored groups to what the trainer sees. Numpy only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from rlloop.advantages import (
    explained_variance,
    generalised_advantages,
    overlong_penalties,
    raw_rewards,
    token_weights,
    whitened,
)
from rlloop.errors import ConfigError
from rlloop.trainer import Trainer
from rlloop.types import FloatArray, Group, Metrics, Rollout, Sample

Advantages: TypeAlias = Callable[[Sequence[float]], NDArray[np.float64]]
"""Rewards [G] of one prompt -> advantages [G]; see `rlloop.advantages`."""
LossWeights: TypeAlias = Callable[[Sequence[int]], NDArray[np.float64]]
"""Loss tokens of each sample [S] -> weight of each of its tokens [S]; see `rlloop.advantages`."""


def make_samples(
    groups: Sequence[Group], advantages: Advantages, loss_weights: LossWeights, *, whiten: bool = False
) -> list[Sample]:
    """One sample for each rollout that has a loss token; each of its tokens gets the rollout's advantage.

    `whiten`: see `rlloop.advantages.whitened`. Raises ConfigError for advantages that are not one of each reward.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    credit_of = np.concatenate([_one_each(advantages(group.rewards), len(group.rewards)) for group in groups])
    if whiten:
        credit_of = whitened(credit_of)
    of_rollouts = [group for group in groups for _ in group.rollouts]
    weights = loss_weights([int(rollout.loss_mask.sum()) for rollout in rollouts])
    return [
        Sample(
            tokens=rollout.tokens,
            loss_mask=rollout.loss_mask,
            rollout_logprobs=rollout.rollout_logprobs,
            advantages=np.full(len(rollout.tokens), credit, np.float32),
            loss_weights=np.full(len(rollout.tokens), weight, np.float32),
            prompt_id=group.prompt.ordinal,
            staleness=token_staleness(rollout, group),
        )
        for rollout, group, credit, weight in zip(rollouts, of_rollouts, credit_of, weights, strict=True)
        if rollout.loss_mask.any()
    ]


def _one_each(advantages: Any, number: int) -> NDArray[np.float64]:
    found = np.asarray(advantages, np.float64)
    if found.shape != (number,):
        raise ConfigError(
            f"--advantage: expected an array of {number} advantages for as many rewards, got one of shape {[*found.shape]}"
        )
    return found


def token_staleness(rollout: Rollout, group: Group) -> FloatArray:
    """[T] versions that the trainer is ahead of the one that sampled each token."""
    sampled_by = rollout.policy_version if rollout.token_versions is None else rollout.token_versions
    staleness = group.policy_version + group.staleness - np.asarray(sampled_by, np.float32)
    return np.full(rollout.tokens.shape, staleness)


def with_overlong_penalty(groups: Sequence[Group], *, max_tokens: int, buffer: float) -> list[Group]:
    """Lower the rewards of long rollouts; see `rlloop.advantages.overlong_penalties`."""
    found = []
    for group in groups:
        lengths = [_longest_turn(rollout) for rollout in group.rollouts]
        penalties = overlong_penalties(lengths, max_tokens=max_tokens, buffer=buffer)
        rewards = tuple(float(reward + penalty) for reward, penalty in zip(group.rewards, penalties, strict=True))
        found.append(replace(group, rewards=rewards))
    return found


async def with_kl_penalty(trainer: Trainer, groups: Sequence[Group], kl_coef: float) -> tuple[list[Group], float]:
    """Lower each reward by kl_coef * sum over its tokens of (rollout_logprobs - the frozen base's logprobs).

    The KL divergence to the base as part of what is maximised (Ziegler et al. 2019, arXiv 1909.08593, equation 2; RLOO,
    Ahmadian et al. 2024, arXiv 2402.14740): it reaches all tokens of a rollout through its advantage. Also returns the mean
    of that difference over the tokens, the k1 estimate of the KL divergence.
    """
    samples = make_samples(groups, raw_rewards, token_weights)
    ref_logprobs = await trainer.logprobs(None, samples)
    kls = [float((s.rollout_logprobs - ref)[s.loss_mask].sum()) for s, ref in zip(samples, ref_logprobs, strict=True)]
    num_tokens = sum(int(sample.loss_mask.sum()) for sample in samples)
    remaining = iter(kls)

    def lowered(group: Group) -> tuple[float, ...]:
        return tuple(
            reward - kl_coef * (next(remaining) if rollout.loss_mask.any() else 0.0)
            for reward, rollout in zip(group.rewards, group.rollouts, strict=True)
        )

    return [replace(group, rewards=lowered(group)) for group in groups], sum(kls) / max(num_tokens, 1)


def _longest_turn(rollout: Rollout) -> int:
    """In tokens: the limit is one of each turn."""
    borders = np.flatnonzero(np.diff(rollout.loss_mask, prepend=False, append=False))
    return int((borders[1::2] - borders[::2]).max(initial=0))


def without_truncated(groups: Sequence[Group]) -> list[Group]:
    """Rollouts that the token limit cut off carry no loss; their rewards still count in their group's mean.

    Overlong filtering of DAPO (Yu et al. 2025, arXiv 2503.14476, section 3.4).
    """

    def mask(rollout: Rollout) -> Rollout:
        if rollout.finish_reason != "length":
            return rollout
        return replace(rollout, loss_mask=np.zeros_like(rollout.loss_mask))

    return [replace(group, rollouts=tuple(mask(rollout) for rollout in group.rollouts)) for group in groups]


def without_signal_free(samples: Sequence[Sample]) -> list[Sample]:
    """Leave out samples whose advantage is 0 throughout: where a loss is proportional to it, their gradient is 0."""
    return [sample for sample in samples if sample.advantages.any()]


async def with_old_logprobs(trainer: Trainer, adapter: str, samples: Sequence[Sample]) -> list[Sample]:
    """Add the trainer's logprobs before the update, by a forward pass."""
    found = await trainer.logprobs(adapter, samples)
    return [replace(sample, old_logprobs=logprobs) for sample, logprobs in zip(samples, found, strict=True)]


async def with_values(trainer: Trainer, adapter: str, samples: Sequence[Sample]) -> list[Sample]:
    """Add the values of a value adapter before its update, by a forward pass."""
    found = await trainer.values(adapter, samples)
    return [replace(sample, old_values=values) for sample, values in zip(samples, found, strict=True)]


def token_rewards(samples: Sequence[Sample], kl_coef: float = 0.0) -> list[NDArray[np.float64]]:
    """The rollout's reward, which `advantages` holds as yet, with its last token: of each sample's loss tokens.

    With `kl_coef`, each token's is lowered by kl_coef * (rollout_logprobs - ref_logprobs).
    """
    found = []
    for sample in samples:
        rewards = np.zeros(int(sample.loss_mask.sum()))
        rewards[-1] = sample.advantages[sample.loss_mask][-1]
        if kl_coef:
            assert sample.ref_logprobs is not None
            rewards -= kl_coef * (sample.rollout_logprobs - sample.ref_logprobs)[sample.loss_mask]
        found.append(rewards)
    return found


def with_critics_credit(
    samples: Sequence[Sample],
    rewards: Sequence[NDArray[np.float64]],
    *,
    discount: float,
    trace_decay: float,
    critic_trace_decay: float,
    whiten: bool = True,
) -> tuple[list[Sample], Metrics]:
    """From `token_rewards` and `old_values`: advantages of each token, the `returns` that the critic learns, and how good its
    values were.

    Between two turns no time passes. See `rlloop.advantages.generalised_advantages`; returns are advantages plus values, with a
    trace decay of their own (decoupled GAE, Yuan et al. 2025, "What's Behind PPO's Collapse in Long-CoT?", arXiv 2503.01491):
    with 1 they are the rewards that came, and hold nothing of the critic's own later word; against those its values are
    measured. `whiten`: the advantages, over all tokens.
    """
    values = _old_values(samples)
    ahead = {
        decay: generalised_advantages(rewards, values, discount=discount, trace_decay=decay)
        for decay in {trace_decay, critic_trace_decay, 1.0}
    }
    found = ahead[trace_decay]
    if whiten:
        found = np.split(whitened(np.concatenate(found)), np.cumsum([len(each) for each in found])[:-1])
    credited = [
        replace(sample, advantages=_spread(advantages, sample), returns=_spread(learned + value, sample))
        for sample, advantages, learned, value in zip(samples, found, ahead[critic_trace_decay], values, strict=True)
    ]
    every = np.concatenate(values)
    explained = explained_variance(every, np.concatenate(ahead[1.0]) + every)
    return credited, {"value/mean": float(every.mean()), "value/explained_variance": explained}


def _old_values(samples: Sequence[Sample]) -> list[NDArray[np.float64]]:
    """Of each sample's loss tokens."""
    found = []
    for sample in samples:
        assert sample.old_values is not None
        found.append(sample.old_values[sample.loss_mask].astype(np.float64))
    return found


def _spread(values: NDArray[np.float64], sample: Sample) -> FloatArray:
    """Of the tokens that carry loss -> of all, [T]."""
    found = np.zeros(len(sample.tokens), np.float32)
    found[sample.loss_mask] = values
    return found


def minibatches(
    samples: Sequence[Sample], num_epochs: int, num_minibatches: int, seed: Sequence[int]
) -> Iterator[list[Sample]]:
    """`num_epochs` times all samples, in `num_minibatches` parts drawn anew each time, whose weights sum to the whole's.

    Samples of one prompt stay together, for they share its computation; there are no more parts than prompts.
    """
    generator = np.random.default_rng(seed)
    by_prompt: dict[int, list[Sample]] = {}
    for sample in samples:
        by_prompt.setdefault(sample.prompt_id, []).append(sample)
    prompts = list(by_prompt)
    whole = _sum_of_weights(samples)
    for _ in range(num_epochs):
        order = generator.permutation(len(prompts))
        for part in np.array_split(order, min(num_minibatches, len(prompts))):
            chosen = [sample for index in part for sample in by_prompt[prompts[index]]]
            scale = np.float32(whole / _sum_of_weights(chosen))
            yield [replace(sample, loss_weights=sample.loss_weights * scale) for sample in chosen]


def _sum_of_weights(samples: Sequence[Sample]) -> float:
    return float(sum(sample.loss_weights[sample.loss_mask].sum(dtype=np.float64) for sample in samples))


async def with_ref_logprobs(trainer: Trainer, samples: Sequence[Sample]) -> list[Sample]:
    """Add the frozen base's logprobs, by a forward pass with the adapter off."""
    found = await trainer.logprobs(None, samples)
    return [replace(sample, ref_logprobs=logprobs) for sample, logprobs in zip(samples, found, strict=True)]
