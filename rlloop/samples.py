"""From scored groups to what the trainer sees. Numpy only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from rlloop.trainer import Trainer
from rlloop.types import Group, Sample

Advantages: TypeAlias = Callable[[Sequence[float]], NDArray[np.float64]]
"""Rewards [G] of one prompt -> advantages [G]; see `rlloop.advantages`."""
LossWeights: TypeAlias = Callable[[Sequence[int]], NDArray[np.float64]]
"""Loss tokens of each sample [S] -> weight of each of its tokens [S]; see `rlloop.advantages`."""


def make_samples(groups: Sequence[Group], advantages: Advantages, loss_weights: LossWeights) -> list[Sample]:
    """One sample for each rollout that has a loss token; each of its tokens gets the rollout's advantage."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    credit_of = np.concatenate([advantages(group.rewards) for group in groups])
    prompt_ids = [group.prompt.ordinal for group in groups for _ in group.rollouts]
    weights = loss_weights([int(rollout.loss_mask.sum()) for rollout in rollouts])
    return [
        Sample(
            tokens=rollout.tokens,
            loss_mask=rollout.loss_mask,
            rollout_logprobs=rollout.rollout_logprobs,
            advantages=np.full(len(rollout.tokens), credit, np.float32),
            loss_weights=np.full(len(rollout.tokens), weight, np.float32),
            prompt_id=prompt_id,
        )
        for rollout, credit, weight, prompt_id in zip(rollouts, credit_of, weights, prompt_ids, strict=True)
        if rollout.loss_mask.any()
    ]


def without_signal_free(samples: Sequence[Sample]) -> list[Sample]:
    """Leave out samples whose advantage is 0 throughout: where a loss is proportional to it, their gradient is 0."""
    return [sample for sample in samples if sample.advantages.any()]


async def with_old_logprobs(trainer: Trainer, adapter: str, samples: Sequence[Sample]) -> list[Sample]:
    """Add the trainer's logprobs before the update, by a forward pass."""
    found = await trainer.logprobs(adapter, samples)
    return [replace(sample, old_logprobs=logprobs) for sample, logprobs in zip(samples, found, strict=True)]


async def with_ref_logprobs(trainer: Trainer, samples: Sequence[Sample]) -> list[Sample]:
    """Add the frozen base's logprobs, by a forward pass with the adapter off."""
    found = await trainer.logprobs(None, samples)
    return [replace(sample, ref_logprobs=logprobs) for sample, logprobs in zip(samples, found, strict=True)]
