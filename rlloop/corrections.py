"""Corrections for tokens that another distribution sampled: an older policy version, or the same one in an engine that
computes a little differently.

Functions of tensors [N], the tokens of a microbatch that carry loss; `sample_index` [N] says to which of its samples each
belongs. Nothing here has a gradient: the inputs have none.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Level = Literal["token", "sequence", "geometric"]
Bound = Literal["truncate", "mask", "none"]


def mismatch_ratio(old_logprobs: Tensor, rollout_logprobs: Tensor) -> Tensor:
    """exp(old - rollout) [N]: how much likelier a token is for the trainer before its update than for its sampler.

    Its mean over many tokens is 1 when both are the same distribution.
    """
    return (old_logprobs - rollout_logprobs).exp()


def importance_weights(
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    sample_index: Tensor,
    *,
    level: Level = "token",
    bound: Bound = "truncate",
    floor: float = 0.0,
    cap: float = 2.0,
) -> Tensor:
    """What each token [N] counts because another policy sampled it: w = exp(old - rollout), bounded.

    `level`: of each token; of its whole sample, exp(sum of the differences); or their geometric mean, exp(mean), which
    does not grow with the length.
    `bound`: `truncate` w at `cap` (variance for bias); `mask`: 0 outside [floor, cap]; `none`: 1, no correction.
    At level `geometric`, `mask` is 1 inside: it only says which samples are trusted.

    Truncated: Ionides 2008; against an inference engine, Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You
    Off-Policy RL Training"; against an older policy, the rho of IMPALA (Espeholt et al. 2018, arXiv 1802.01561, section
    4.1). Masked by token: IcePop (Ling Team 2025, "Small Leak Can Sink a Great Ship"). By sequence, and the geometric
    mask: Liu et al. 2025, "When Speed Kills Stability".
    """
    if bound == "none":
        return torch.ones_like(old_logprobs)
    difference = old_logprobs - rollout_logprobs
    if level == "sequence":
        difference = sample_sum(difference, sample_index)
    elif level == "geometric":
        difference = sample_mean(difference, sample_index)
    weights = difference.exp()
    if bound == "truncate":
        return weights.clamp(max=cap)
    is_outside = (weights < floor) | (weights > cap)  # what is not a number is not, so that it shows in the loss
    return torch.where(is_outside, 0.0, torch.ones_like(weights) if level == "geometric" else weights)


def sample_sum(values: Tensor, sample_index: Tensor) -> Tensor:
    """[N] -> [N]: at each token, the sum over all tokens of its sample."""
    # As many places as tokens: the number of samples is on the device, and asking for it would wait.
    return torch.zeros_like(values).index_add(0, sample_index, values)[sample_index]


def sample_mean(values: Tensor, sample_index: Tensor) -> Tensor:
    """[N] -> [N]: at each token, the mean over all tokens of its sample."""
    return sample_sum(values, sample_index) / sample_sum(torch.ones_like(values), sample_index)
