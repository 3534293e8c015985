"""Corrections for tokens that another distribution sampled: an older policy version, or the same one in an engine that
computes a little differently.

Functions of tensors [N], the tokens of a microbatch that carry loss. Nothing here has a gradient: the inputs have none.
"""

from __future__ import annotations

from torch import Tensor


def mismatch_ratio(old_logprobs: Tensor, rollout_logprobs: Tensor) -> Tensor:
    """exp(old - rollout) [N]: how much likelier a token is for the trainer before its update than for its sampler.

    Its mean over many tokens is 1 when both are the same distribution.
    """
    return (old_logprobs - rollout_logprobs).exp()


def truncated(ratio: Tensor, cap: float) -> Tensor:
    """min(ratio, cap) [N]: importance weights of bounded variance, at the price of a bias.

    Truncated importance sampling (Ionides 2008); against an inference engine: Yao et al. 2025, "Your Efficient RL
    Framework Secretly Brings You Off-Policy RL Training"; against an older policy: the rho of IMPALA (Espeholt et al.
    2018, arXiv 1802.01561, section 4.1).
    """
    return ratio.clamp(max=cap)
