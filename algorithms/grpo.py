"""GRPO: group-relative policy optimisation, asynchronous.

    rlloop grpo --config examples/quickstart.toml
    python -m rlloop.algorithms.grpo --env reasoning_gym --env_args '{"dataset": "chain_sum"}'

Shao et al. 2024, DeepSeekMath (arXiv 2402.03300). A prompt is answered `group_size` times; an answer's advantage is its
reward relative to the group's mean; every token of it gets that advantage in PPO's clipped surrogate.

Deviations from the paper:
* One optimizer step a batch, so old and new policy are equal when the gradient is taken, and nothing is clipped. Samples may
  be `max_staleness` versions old: a truncated importance weight (`tis_cap`) corrects for that, and for the difference
  between the engine's and the trainer's arithmetic.
* Token normalisation (DAPO) is the default; the paper's is `--normalisation sequence`.
* No KL penalty unless `kl_coef` is set.
* Samples without an advantage are not computed when there is no KL penalty: their gradient is zero.

Expected: SmolLM2-135M-Instruct on `arithmetic` rises from about 0.1 to above 0.9 within 30 steps of 64 samples
(`examples/quickstart.toml`).
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Literal

from pydantic import Field

from rlloop.advantages import group_centred, group_normalised, sequence_weights, token_weights
from rlloop.config import RunSettings
from rlloop.run import POLICY, open_run, run
from rlloop.samples import make_samples, with_old_logprobs, with_ref_logprobs, without_signal_free
from rlloop.trainer import Trainer
from rlloop.types import Group, Metrics
from rlloop.updates import optimizer_step


class Config(RunSettings):
    """GRPO: group-relative policy optimisation, asynchronous."""

    advantage: Literal["normalised", "centred"] = "normalised"
    """Reward minus the group's mean, divided by its standard deviation (GRPO) or not (Dr. GRPO)."""
    normalisation: Literal["token", "sequence"] = "token"
    """Whether every token of a step counts the same in the loss, or every sample."""
    clip_low: float = Field(0.2, gt=0, le=1)
    """The ratio is clipped below 1 - clip_low."""
    clip_high: float = Field(0.2, gt=0)
    """The ratio is clipped above 1 + clip_high."""
    tis_cap: float = Field(2.0, ge=1)
    """Cap of the importance weight that corrects for stale samples and for the engine's arithmetic."""
    kl_coef: float = Field(0.0, ge=0)
    """Weight of the KL divergence to the base model in the loss."""
    recompute_old_logprobs: bool = False
    """Take old logprobs from a forward pass of their own; makes no difference with one optimizer step a batch."""


async def update(trainer: Trainer, groups: list[Group], config: Config) -> Metrics:
    """One optimizer step on the groups of one step."""
    from rlloop.losses import clipped_surrogate  # imports torch, which `rlloop --help` need not wait for

    samples = make_samples(
        groups,
        advantages={"normalised": group_normalised, "centred": group_centred}[config.advantage],
        loss_weights={"token": token_weights, "sequence": sequence_weights}[config.normalisation],
    )
    if config.kl_coef:
        samples = await with_ref_logprobs(trainer, samples)
    else:
        samples = without_signal_free(samples)
    if config.recompute_old_logprobs:
        samples = await with_old_logprobs(trainer, POLICY, samples)
    loss = partial(
        clipped_surrogate,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        tis_cap=config.tis_cap,
        kl_coef=config.kl_coef,
    )
    return await optimizer_step(trainer, POLICY, samples, loss, config.optim.adam)


async def train(config: Config, marker: str) -> None:
    """Train under a running event loop; `marker` is that of `rlloop.processes.guard`."""
    async with open_run(config, marker) as grpo:
        await grpo.train(partial(update, config=config))


def main(config: Config | None = None) -> None:
    """Train; without a config, the command line's. Raises RlloopError."""
    if config is None:
        from rlloop.cli import main as command_line

        sys.exit(command_line(["grpo", *sys.argv[1:]]))
    run(train, config)


if __name__ == "__main__":
    main()
