"""An advantage and a surrogate of one's own."""

import numpy as np


def best_of_group(rewards):
    """Rewards [G] of one prompt -> advantages [G]: only the best rollouts are learned from."""
    rewards = np.asarray(rewards)
    return np.where(rewards == rewards.max(), rewards - rewards.mean(), 0.0)


def soft_gate(logprobs, old_logprobs, tokens, *, clip_low, clip_high):
    """SAPO (Gao et al. 2025, arXiv 2511.20347): a sigmoid around ratio 1 where PPO clips. Returns the loss of each token [N]
    and metrics [N]; clip_low and clip_high are its temperatures, for A < 0 and A > 0."""
    ratio = (logprobs - old_logprobs).exp()
    temperature = (tokens.advantages > 0) * (clip_high - clip_low) + clip_low
    gate = 4 / temperature * (temperature * (ratio - 1)).sigmoid()
    return -gate * tokens.advantages, {}
