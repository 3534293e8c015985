"""From rewards to credit: advantages of a group, and what each sample's tokens count in the loss.

Numpy only; all in float64. Shapes: G rollouts of one prompt, S samples of one optimizer step.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def group_centred(rewards: ArrayLike) -> Array:
    """Rewards [G] of one prompt -> advantages [G] = r - mean(r).

    Dr. GRPO (Liu et al. 2025, "Understanding R1-Zero-Like Training", arXiv 2503.20783): without the division by the
    standard deviation, prompts that are almost always or almost never solved are not weighted up.
    """
    rewards_g = np.asarray(rewards, np.float64)
    if np.ptp(rewards_g) == 0:
        return np.zeros_like(rewards_g)  # exactly: the mean of three times 0.1 is not 0.1
    return rewards_g - rewards_g.mean()


def group_normalised(rewards: ArrayLike, *, eps: float = 1e-4) -> Array:
    """Rewards [G] of one prompt -> advantages [G] = (r - mean(r)) / (std(r) + eps).

    GRPO (Shao et al. 2024, "DeepSeekMath", arXiv 2402.03300, section 4.1.2). The standard deviation is the unbiased one
    (divides by G - 1), as in torch and in TRL, whose eps this is, too. A single rollout has none: its advantage is 0.
    """
    centred_g = group_centred(rewards)
    if centred_g.size < 2:
        return centred_g
    return centred_g / (centred_g.std(ddof=1) + eps)


def leave_one_out(rewards: ArrayLike) -> Array:
    """Rewards [G] of one prompt -> advantages [G] = r_i - mean of the others = (r_i - mean(r)) * G / (G - 1).

    RLOO (Kool et al. 2019, "Buy 4 REINFORCE Samples, Get a Baseline for Free!"; Ahmadian et al. 2024, arXiv 2402.14740): a
    baseline that does not depend on the rollout itself, so the gradient is unbiased. A single rollout has none: 0.
    """
    centred_g = group_centred(rewards)
    return centred_g * centred_g.size / max(centred_g.size - 1, 1)


def raw_rewards(rewards: ArrayLike) -> Array:
    """Rewards [G] of one prompt -> advantages [G], the rewards themselves: for algorithms that whiten over the batch."""
    return np.asarray(rewards, np.float64)


def whitened(advantages: ArrayLike, *, eps: float = 1e-8) -> Array:
    """Advantages [S] of the rollouts, or the tokens, of one step -> (a - mean(a)) / (std(a) + eps).

    REINFORCE++ (Hu et al. 2025, arXiv 2501.03262, equation 3): one scale for the whole batch, so that a prompt whose rewards
    hardly differ is not weighted up. Advantages that are all equal become 0.
    """
    centred_s = group_centred(advantages)
    return centred_s / (centred_s.std() + eps)


def generalised_advantages(
    rewards: Sequence[ArrayLike], values: Sequence[ArrayLike], *, discount: float, trace_decay: float
) -> list[Array]:
    """Rewards and values of the tokens of each sample, [T] each -> their advantages, [T] each.

    A_t = sum over k of (discount * trace_decay)^k * delta_(t + k), delta_t = r_t + discount * V_(t + 1) - V_t, and the value
    after the last token is 0.

    GAE (Schulman et al. 2016, arXiv 1506.02438, equation 16), where the two are called gamma and lambda. trace_decay 1: the
    sum of what comes, less the value; 0: one step ahead.
    """
    lengths = [len(np.asarray(each)) for each in rewards]
    # Aligned at their ends, so that one pass from there serves all samples.
    rewards_st, values_st = (np.zeros((len(lengths), max(lengths, default=0) + 1)) for _ in range(2))
    for row, length in enumerate(lengths):
        rewards_st[row, -1 - length : -1] = rewards[row]
        values_st[row, -1 - length : -1] = values[row]
    advantages_st = np.zeros_like(rewards_st)
    for t in range(rewards_st.shape[1] - 2, -1, -1):
        delta_s = rewards_st[:, t] + discount * values_st[:, t + 1] - values_st[:, t]
        advantages_st[:, t] = delta_s + discount * trace_decay * advantages_st[:, t + 1]
    return [row[-1 - length : -1] for row, length in zip(advantages_st, lengths, strict=True)]


def explained_variance(values: ArrayLike, returns: ArrayLike) -> float:
    """Values and what they should be, [N] each -> 1 - var(returns - values) / var(returns); NaN if all returns are equal.

    1: the values are right; 0: as good as a constant; below: worse.
    """
    values_n, returns_n = np.asarray(values, np.float64), np.asarray(returns, np.float64)
    variance = float(returns_n.var())
    return 1 - float((returns_n - values_n).var()) / variance if variance else float("nan")


def overlong_penalties(lengths: ArrayLike, *, max_tokens: int, buffer: float) -> Array:
    """Lengths [G] of completions -> what is added to their rewards [G]: 0, then linearly down to -1 over the last `buffer`
    tokens before `max_tokens`.

    Soft overlong punishment of DAPO (Yu et al. 2025, arXiv 2503.14476, equation 13): an answer that is cut off was not
    wrong at once, so the reward should not fall by a step.
    """
    lengths_g = np.asarray(lengths, np.float64)
    return -np.clip((lengths_g - (max_tokens - buffer)) / buffer, 0, 1)


def token_weights(num_loss_tokens: Sequence[int]) -> Array:
    """Tokens that carry loss in each sample [S] -> weight of a token of each sample [S] = 1 / sum(num_loss_tokens).

    Every token of the step counts the same, so long answers count more than short ones (DAPO, Yu et al. 2025,
    arXiv 2503.14476, equation 8).
    """
    counts_s = np.asarray(num_loss_tokens, np.float64)
    return np.full_like(counts_s, 1 / max(counts_s.sum(), 1))


def sequence_weights(num_loss_tokens: Sequence[int]) -> Array:
    """Tokens that carry loss in each sample [S] -> weight of a token of each sample [S] = 1 / (S * num_loss_tokens).

    Every sample of the step counts the same, so the tokens of a long answer count less (GRPO, Shao et al. 2024,
    equation 3). A sample without such tokens still counts among the S.
    """
    counts_s = np.asarray(num_loss_tokens, np.float64)
    return 1 / (counts_s.size * np.maximum(counts_s, 1))


def constant_weights(num_loss_tokens: Sequence[int], *, max_tokens: int) -> Array:
    """Tokens that carry loss in each sample [S] -> weight of a token of each sample [S] = 1 / (S * max_tokens).

    A token counts the same in every step and in every sample, however long that is: dividing by a length favours short
    right answers and long wrong ones (Dr. GRPO, Liu et al. 2025, arXiv 2503.20783, section 3.1).
    """
    return np.full(len(num_loss_tokens), 1 / (max(len(num_loss_tokens), 1) * max_tokens))
