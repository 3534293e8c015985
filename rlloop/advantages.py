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
