"""rlloop: asynchronous RL post-training. Rollouts, rewards and updates run at the same time, under one task group."""

__version__ = "0.1.0"
