"""Policy losses: functions of (logprobs, tokens) that a trainer runs in its ranks. See `rlloop.trainer.Loss`.

`policy_loss` puts one together from a surrogate, a correction for tokens of another sampler, and a KL penalty. It is a sum
over tokens, each times its `loss_weights`, so that neither microbatches nor ranks change it, and returns per-token metrics
without gradient, which the trainer reduces. Bind the settings with functools.partial:

    loss = partial(policy_loss, surrogate=partial(clipped, clip_low=0.2, clip_high=0.28), kl_coef=0.0)

Shapes: everything is [N], the tokens of a microbatch that carry loss. A ratio is exp(logprobs - old_logprobs); what is old to
a surrogate, `policy_loss` says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor

from rlloop.corrections import importance_weights, mismatch_ratio, sample_mean

if TYPE_CHECKING:
    from rlloop.trainer import TokenBatch

Surrogate: TypeAlias = "Callable[[Tensor, Tensor, TokenBatch], tuple[Tensor, Mapping[str, Tensor]]]"
"""(logprobs [N] under gradient, old_logprobs [N], tokens) -> (loss of each token [N], metrics [N])."""
Proximal = Literal["trainer", "rollout", "interpolated"]
KlEstimator = Literal["k1", "k2", "k3"]


def clipped(
    logprobs: Tensor, old_logprobs: Tensor, tokens: TokenBatch, *, clip_low: float = 0.2, clip_high: float = 0.2
) -> tuple[Tensor, dict[str, Tensor]]:
    """-min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A).

    PPO (Schulman et al. 2017, arXiv 1707.06347, equation 7); separate bounds: DAPO (Yu et al. 2025, arXiv 2503.14476).
    """
    return _clipped((logprobs - old_logprobs).exp(), tokens.advantages, clip_low, clip_high)


def sequence_clipped(
    logprobs: Tensor, old_logprobs: Tensor, tokens: TokenBatch, *, clip_low: float = 3e-4, clip_high: float = 4e-4
) -> tuple[Tensor, dict[str, Tensor]]:
    """As `clipped`, with the sample's geometric mean of the ratios for each of its tokens.

    GSPO (Zheng et al. 2025, "Group Sequence Policy Optimization", arXiv 2507.18071, equations 5 to 7). The mean stays
    close to 1: the bounds are the paper's, and much narrower than a token's.
    """
    ratio = sample_mean(logprobs - old_logprobs, tokens.sample_index).exp()
    return _clipped(ratio, tokens.advantages, clip_low, clip_high)


def clipped_weight(
    logprobs: Tensor, old_logprobs: Tensor, tokens: TokenBatch, *, clip_low: float = 1.0, clip_high: float = 4.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """-detach(clip(ratio, 1 - clip_low, 1 + clip_high)) * A * logprob: a token that is clipped still has a gradient.

    CISPO (MiniMax 2025, "MiniMax-M1", arXiv 2506.13585, equations 4 and 5), which has no lower bound: clip_low 1.
    """
    ratio = (logprobs - old_logprobs).exp().detach()
    weight = ratio.clamp(1 - clip_low, 1 + clip_high)
    metrics = {"ratio": ratio, "clip_frac_low": ratio < 1 - clip_low, "clip_frac_high": ratio > 1 + clip_high}
    return -weight * tokens.advantages * logprobs, metrics


def geometric_clipped(
    logprobs: Tensor, old_logprobs: Tensor, tokens: TokenBatch, *, clip_low: float = 0.4, clip_high: float = 0.4
) -> tuple[Tensor, dict[str, Tensor]]:
    """-A * the sample's geometric mean of its ratios, each clipped (pessimistically) to [e^-clip_low, e^clip_high].

    GMPO (Zhao et al. 2025, "Geometric-Mean Policy Optimization", arXiv 2507.20673, equation 4; bounds of section 3.2).
    """
    log_ratio, sign = logprobs - old_logprobs, tokens.advantages.sign()
    lowest = torch.min(sign * log_ratio, sign * log_ratio.clamp(-clip_low, clip_high))
    mean = sample_mean(sign * lowest, tokens.sample_index).exp()
    return -mean * tokens.advantages, {
        "ratio": log_ratio.exp(),
        "clip_frac_low": (log_ratio < -clip_low) & (sign < 0),
        "clip_frac_high": (log_ratio > clip_high) & (sign > 0),
    }


def _clipped(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> tuple[Tensor, dict[str, Tensor]]:
    token_loss = -torch.min(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)
    return token_loss, {
        "ratio": ratio,
        # 1 where the bound removed the token's gradient
        "clip_frac_low": (ratio < 1 - clip_low) & (advantages < 0),
        "clip_frac_high": (ratio > 1 + clip_high) & (advantages > 0),
    }


def policy_loss(
    logprobs: Tensor,
    tokens: TokenBatch,
    *,
    surrogate: Surrogate = clipped,
    proximal: Proximal = "trainer",
    correction: Mapping[str, Any] | None = None,
    kl_coef: float = 0.0,
    kl_estimator: KlEstimator = "k3",
) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum of loss_weights * (w * surrogate + kl_coef * KL to the base).

    `proximal`: which policy the surrogate's ratio is to. `trainer`: the trainer's before the update, and w are
    `corrections.importance_weights` with the settings `correction` (decoupled PPO, Hilton et al. 2021, arXiv 2110.00641).
    `rollout`: the one that sampled, as PPO was published; the ratio itself corrects, and w is 1. `interpolated`: as
    `trainer`, with `interpolated_logprobs` for the policy before the update, which saves the pass that computes it; metrics of
    mismatch are then to the present policy, the steps that were made of the batch included.

    `tokens.old_logprobs` None stands for `logprobs.detach()`. That is exact when the batch is used for one optimizer
    step, because the gradient is taken where old and new policy are equal: the ratio to it is 1, nothing is clipped, and
    what is left is the policy gradient weighted by w, which then also corrects for the age of the sample.

    Metrics: those of the surrogate, `mismatch_ratio` (of each token, before any bound), `sampler_kl` (KL of the rollout's
    policy to the old one), `update_kl` (of the old policy to the present one) where the samples carry `old_logprobs`, and
    `kl_ref` where they carry `ref_logprobs`. Raises ValueError for a kl_coef without
    `tokens.ref_logprobs`, and for a surrogate that is not [N].
    """
    old_logprobs = logprobs.detach() if tokens.old_logprobs is None else tokens.old_logprobs
    proximal_logprobs = old_logprobs
    if proximal == "rollout":
        proximal_logprobs = tokens.rollout_logprobs
    elif proximal == "interpolated":
        proximal_logprobs = interpolated_logprobs(logprobs.detach(), tokens)
    token_loss, metrics = surrogate(logprobs, proximal_logprobs, tokens)
    if token_loss.shape != logprobs.shape:
        raise ValueError(
            f"expected a loss for each token from the surrogate, of shape {[*logprobs.shape]}, got {[*token_loss.shape]}: leave "
            "out the mean or sum, which loss_weights are for"
        )
    if proximal != "rollout":
        token_loss = token_loss * importance_weights(
            proximal_logprobs, tokens.rollout_logprobs, tokens.sample_index, **(correction or {})
        )
    metrics = {
        **metrics,
        "mismatch_ratio": mismatch_ratio(old_logprobs, tokens.rollout_logprobs),
        "sampler_kl": kl_k3(tokens.rollout_logprobs, old_logprobs),
    }
    if tokens.old_logprobs is not None:
        metrics["update_kl"] = kl_k3(old_logprobs, logprobs)
    if tokens.ref_logprobs is not None:
        metrics["kl_ref"] = kl_k3(logprobs, tokens.ref_logprobs)
        token_loss = token_loss + kl_coef * kl_penalty(logprobs, proximal_logprobs, tokens.ref_logprobs, kl_estimator)
    elif kl_coef:
        raise ValueError(f"kl_coef={kl_coef} needs the base's logprobs, but the samples carry no ref_logprobs")
    loss = (tokens.loss_weights * token_loss).sum()
    return loss, {name: metric.detach().to(logprobs.dtype) for name, metric in metrics.items()}


def interpolated_logprobs(logprobs: Tensor, tokens: TokenBatch) -> Tensor:
    """Stand-in [N] for the logprobs of the policy before the update: on the line from the policy that sampled to the one that is
    updated, at s / (s + 1) for a sample that is s versions old.

    A fresh sample's is the policy that sampled it, as in PPO; the older a sample, the closer to the present policy, the
    less is clipped and the more is left to the importance weight. A-3PO (Li et al. 2025, arXiv 2512.06547).
    Raises ValueError when the samples do not say how old they are.
    """
    if tokens.staleness is None:
        raise ValueError("an interpolated proximal policy needs samples that carry their staleness")
    return (tokens.rollout_logprobs + tokens.staleness * logprobs) / (tokens.staleness + 1)


def negative_log_likelihood(logprobs: Tensor, tokens: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum of -loss_weights * logprobs: with weights 1 / (tokens of the batch), the cross entropy of supervised training.

    Metric: `nll`, of each token.
    """
    return -(tokens.loss_weights * logprobs).sum(), {"nll": -logprobs.detach()}


def value_loss(values: Tensor, tokens: TokenBatch, *, clip: float | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Of a value adapter: the sum of loss_weights * (V - R)^2 / 2, values and `tokens.returns` [N].

    With `clip` each square is the greater one of that and of the value held within `clip` of `tokens.old_values`, so that one
    batch cannot move a value far (as in PPO's first implementation, OpenAI baselines, ppo2). Metrics: `value`, and
    `value_clip_frac`, 1 where that took the gradient away.

    Raises ValueError when the samples carry no returns, or no old values to clip at.
    """
    if tokens.returns is None or (clip is not None and tokens.old_values is None):
        raise ValueError("a value loss needs samples with `returns`, and with `old_values` to clip at")
    squares = (values - tokens.returns).square()
    metrics = {"value": values}
    if clip is not None:
        old_values = tokens.old_values
        held = old_values + (values - old_values).clamp(-clip, clip)
        held_squares = (held - tokens.returns).square()
        metrics["value_clip_frac"] = (held_squares > squares).to(values.dtype)
        squares = torch.max(squares, held_squares)
    return (tokens.loss_weights * squares).sum() / 2, {name: metric.detach() for name, metric in metrics.items()}


def kl_penalty(logprobs: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor, estimator: KlEstimator) -> Tensor:
    """What is added to the loss of each token [N] for KL(policy || base), so that its gradient is that of the KL.

    k1: ratio * (logprobs - ref); k2: (logprobs - ref)^2 / 2; k3: ratio * `kl_k3`. The ratio before k1 and k3, even where
    its value is 1, is what makes their gradient right: for samples of the present version, and of others where
    old_logprobs are those of the policy that sampled (DeepSeek-V3.2, arXiv 2512.02556). That of k2 is right without one, for
    samples of the present version (Tang & Munos 2025, arXiv 2506.09477). At ratio 1 the gradients of k2 and k3 are the
    same; that of k1 varies more.
    """
    difference = logprobs - ref_logprobs
    if estimator == "k2":
        return difference.square() / 2
    ratio = (logprobs - old_logprobs).exp()
    return ratio * (difference if estimator == "k1" else kl_k3(logprobs, ref_logprobs))


def kl_k3(logprobs: Tensor, other_logprobs: Tensor) -> Tensor:
    """Estimate [N] of KL(policy || other) at tokens that the policy sampled: exp(d) - d - 1 with d = other - logprobs.

    Unbiased, never negative, and of low variance where the two are close: k3 of Schulman 2020, "Approximating KL
    Divergence".
    """
    difference = other_logprobs - logprobs
    return difference.expm1() - difference
