"""Policy losses: functions of (logprobs, tokens) that a trainer runs in its ranks. See `rlloop.trainer.Loss`.

A loss is a sum over tokens, each times its `loss_weights`, so that neither microbatches nor ranks change it. It returns
per-token metrics without gradient, which the trainer reduces. Bind the settings with functools.partial:

    loss = functools.partial(clipped_surrogate, clip_low=0.2, clip_high=0.28, tis_cap=2.0, kl_coef=0.0)

Shapes: everything is [N], the tokens of a microbatch that carry loss.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlloop.corrections import mismatch_ratio, truncated

if TYPE_CHECKING:
    from rlloop.trainer import TokenBatch


def clipped_surrogate(
    logprobs: Tensor,
    tokens: TokenBatch,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    tis_cap: float = 2.0,
    kl_coef: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped surrogate, with a weight for tokens of another sampler and a KL penalty to the base.

        loss = sum_n loss_weights_n * (kl_coef * ratio_n * kl_ref_n - w_n * min(ratio_n * A_n, clip(ratio_n) * A_n))
        ratio = exp(logprobs - old_logprobs),  clip(x) = min(max(x, 1 - clip_low), 1 + clip_high)
        w = min(exp(old_logprobs - rollout_logprobs), tis_cap)

    Surrogate: Schulman et al. 2017, arXiv 1707.06347, equation 7; separate bounds: DAPO (Yu et al. 2025, arXiv
    2503.14476); w: see `corrections.truncated`; kl_ref: see `kl_k3`. The ratio before kl_ref, even where its value is
    1, makes the gradient that of the KL (for samples of the present version), which k3 alone does not (DeepSeek-V3.2,
    arXiv 2512.02556; TRL's default, too).

    `tokens.old_logprobs` None stands for `logprobs.detach()`. That is exact when the batch is used for one optimizer
    step, because the gradient is taken where old and new policy are equal: ratio is 1, nothing is clipped, and what
    is left is the policy gradient weighted by w, which then also corrects for the age of the sample.

    Metrics: `ratio`, `clip_frac_low` and `clip_frac_high` (1 where the bound removed the token's gradient),
    `mismatch_ratio` (w before the cap), `sampler_kl` (KL of the rollout's policy to the old one), and `kl_ref` where
    the samples carry `ref_logprobs`. Raises ValueError for a kl_coef without `tokens.ref_logprobs`.
    """
    advantages = tokens.advantages
    old_logprobs = logprobs.detach() if tokens.old_logprobs is None else tokens.old_logprobs

    ratio = (logprobs - old_logprobs).exp()
    surrogate = torch.min(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)
    mismatch = mismatch_ratio(old_logprobs, tokens.rollout_logprobs)
    token_loss = -truncated(mismatch, tis_cap) * surrogate

    metrics = {
        "ratio": ratio,
        "clip_frac_low": (ratio < 1 - clip_low) & (advantages < 0),
        "clip_frac_high": (ratio > 1 + clip_high) & (advantages > 0),
        "mismatch_ratio": mismatch,
        "sampler_kl": kl_k3(tokens.rollout_logprobs, old_logprobs),
    }
    if tokens.ref_logprobs is not None:
        metrics["kl_ref"] = kl_ref = kl_k3(logprobs, tokens.ref_logprobs)
        token_loss = token_loss + kl_coef * ratio * kl_ref
    elif kl_coef:
        raise ValueError(f"kl_coef={kl_coef} needs the base's logprobs, but the samples carry no ref_logprobs")

    loss = (tokens.loss_weights * token_loss).sum()
    return loss, {name: metric.detach().to(logprobs.dtype) for name, metric in metrics.items()}


def kl_k3(logprobs: Tensor, other_logprobs: Tensor) -> Tensor:
    """Estimate [N] of KL(policy || other) at tokens that the policy sampled: exp(d) - d - 1 with d = other - logprobs.

    Unbiased, never negative, and of low variance where the two are close: k3 of Schulman 2020, "Approximating KL
    Divergence".
    """
    difference = other_logprobs - logprobs
    return difference.expm1() - difference
