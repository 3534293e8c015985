"""PPO with a learned critic on the policy's own base model, asynchronous.

    rlloop ppo --config examples/quickstart.toml --optim.lr 1e-4
    rlloop ppo --env reasoning_gym --env_args '{"dataset": "products", "max_terms": 2, "min_digits": 1, "max_digits": 1}'

Schulman et al. 2017, "Proximal Policy Optimization Algorithms" (arXiv 1707.06347), with generalised advantages (Schulman et
al. 2016, arXiv 1506.02438). One frozen base serves three: the policy is a LoRA adapter, the critic another one with a scalar
head, the reference policy the base with the adapters off. The critic says at each token what reward to expect; a token's
advantage is what the rest of its rollout did better than that, so no prompt needs several rollouts. See docs/algorithms.md.

Deviations from the paper:
* Samples may be `max_staleness` versions old. The clipped ratio is to the trainer's policy before the update, and an importance
  weight (`correction`) makes up for age and for the engine's arithmetic (decoupled PPO, Hilton et al. 2021, arXiv 2110.00641).
  With `--proximal rollout` the ratio is to the policy that sampled, as published.
* One epoch, of four minibatches. With a single one every gradient would be taken where old and new policy are equal, so nothing
  would be clipped, and the critic learns too little from one step a batch.
* The critic has an optimizer of its own instead of a weight in a common loss, and learns the rewards that came instead of returns
  that are made of its own word in part (decoupled GAE, Yuan et al. 2025, arXiv 2503.01491).

Expected: SmolLM2-135M-Instruct on `arithmetic` rises from about 0.15 to above 0.9 within 20 steps of 64 samples. At 3e-4, which
suits one optimizer step a batch, it gets there sooner and may collapse later.
"""

from __future__ import annotations

from functools import partial
from time import monotonic
from typing import Literal

from pydantic import Field, model_validator

from rlloop.adapters import POLICY
from rlloop.advantages import raw_rewards, token_weights
from rlloop.backend import Backend
from rlloop.cli import entry_point
from rlloop.policy_settings import CriticSettings, PolicySettings
from rlloop.run import open_run
from rlloop.samples import (
    make_samples,
    minibatches,
    token_rewards,
    with_critics_credit,
    with_old_logprobs,
    with_ref_logprobs,
    with_values,
)
from rlloop.trainer import Trainer
from rlloop.types import Group, LoraConfig, Metrics
from rlloop.updates import (
    after_step,
    bind_policy_loss,
    made_whole,
    merged,
    optimizer_step,
    present_kl_coef,
    value_step,
)

CRITIC = "critic"


class Config(PolicySettings):
    """PPO with a learned critic on the policy's own base model, asynchronous."""

    discount: float = Field(1.0, gt=0, le=1)
    """What a reward one token later counts (gamma)."""
    trace_decay: float = Field(0.95, ge=0, le=1)
    """Between the critic's word one token ahead (0) and the rollout's own reward (1) (lambda)."""
    whiten: bool = False
    """Bring the advantages of a step's tokens to mean 0 and standard deviation 1; where nearly all rewards are equal, that blows
    the critic's errors up."""
    num_epochs: int = Field(1, ge=1)
    """Times that a step's samples are used."""
    num_minibatches: int = Field(4, ge=1)
    """Optimizer steps of policy and critic each time, at most one for each prompt; prompts are divided among them."""
    max_update_kl: float | None = Field(None, gt=0)
    """End a step's update after a minibatch at which the policy was this far from that before it, in nats a token."""
    kl_in: Literal["loss", "reward"] = "reward"
    """Whether the penalty is added to the loss of each token, or taken off its reward."""
    critic: CriticSettings = CriticSettings()

    @property
    def takes_several_steps(self) -> bool:
        """Of one step's samples."""
        return self.num_epochs * min(self.num_minibatches, self.groups_per_step) > 1

    @model_validator(mode="after")
    def _check_objective(self) -> Config:
        if self.clip_low > 1:
            raise ValueError(f"--clip-low: expected at most 1, got {self.clip_low}")
        if self.dynamic_sampling:
            raise ValueError("--dynamic-sampling: groups whose rewards are all equal do teach where there is a critic")
        if self.max_update_kl is not None and not self.takes_several_steps:
            raise ValueError(
                "--max-update-kl: one optimizer step cannot end early: raise --num-minibatches (and "
                "--groups-per-step) or --num-epochs"
            )
        if self.max_update_kl is not None and self.proximal == "interpolated":
            raise ValueError(
                "--max-update-kl: measured from the policy before the update, which --proximal interpolated saves"
            )
        return self


async def update(trainer: Trainer, groups: list[Group], config: Config, state: dict[str, float]) -> Metrics:
    """Policy and critic learn from the groups of one step; `state` is the run's."""
    from rlloop.losses import clipped, value_loss  # torch, which `rlloop --help` need not wait for

    samples = make_samples(groups, raw_rewards, token_weights)
    if not samples:
        return {"optim/skipped_steps": 1.0, "optim/lr": config.optim.lr}
    started = monotonic()
    samples = await with_values(trainer, CRITIC, samples)
    found: Metrics = {"time/value": monotonic() - started}
    if kl_coef := present_kl_coef(config, state):
        found["policy/kl_coef"] = kl_coef
        samples = await with_ref_logprobs(trainer, samples)
    if config.takes_several_steps and config.proximal != "interpolated":
        samples = await with_old_logprobs(trainer, POLICY, samples)
    rewards = token_rewards(samples, kl_coef if config.kl_in == "reward" else 0.0)
    samples, of_critic = with_critics_credit(
        samples,
        rewards,
        discount=config.discount,
        trace_decay=config.trace_decay,
        critic_trace_decay=config.critic.trace_decay,
        whiten=config.whiten,
    )
    found |= of_critic
    policy_loss = bind_policy_loss(config, clipped, kl_coef if config.kl_in == "loss" else 0.0)
    critic_loss = partial(value_loss, clip=config.critic.clip)
    steps: list[Metrics] = [found]
    seed = [config.seed, groups[0].prompt.ordinal]
    with made_whole() as begin:
        for batch in minibatches(samples, config.num_epochs, config.num_minibatches, seed):
            step = await optimizer_step(trainer, POLICY, batch, policy_loss, config.optim.adam)
            begin()
            step |= await value_step(trainer, CRITIC, batch, critic_loss, config.critic.optim.adam)
            steps.append(step)
            if config.max_update_kl is not None and step["policy/update_kl_max"] > config.max_update_kl:
                break
    metrics = merged(steps)
    after_step(config, state, metrics)
    return metrics


async def train(config: Config, marker: str, backend: Backend | None = None) -> None:
    """Train under a running event loop; `marker` is that of `rlloop.processes.guard`."""
    critic = LoraConfig(**dict(config.critic.lora), seed=config.seed)
    async with open_run(config, marker, {CRITIC: (critic, "value")}, backend) as ppo:
        await ppo.train(partial(update, config=config, state=ppo.state))


main = entry_point("ppo", train)

if __name__ == "__main__":
    main()
