"""GRPO and its family: group-relative policy optimisation, asynchronous.

    rlloop grpo --config examples/quickstart.toml
    rlloop grpo --preset gspo --env reasoning_gym --env_args '{"dataset": "chain_sum"}'

Shao et al. 2024, DeepSeekMath (arXiv 2402.03300). A prompt is answered `group_size` times; an answer's advantage is its
reward relative to the group's mean; every token of it gets that advantage in PPO's clipped surrogate. The family differs in
three choices: advantage, surrogate, and what a token counts (`normalisation`); `--preset` makes them as a paper did, and
each can be set alone, also to a function of one's own (`--loss my_file:my_surrogate`). See docs/algorithms.md.

Deviations from the papers:
* One optimizer step a batch, on samples that may be `max_staleness` versions old. The trainer's policy before the update equals
  the updated one when the gradient is taken, so nothing is clipped; an importance weight (`correction`) corrects for age, and
  for the engine's arithmetic. With `--proximal rollout` the ratio is to the policy that sampled, and clipping does that.
* Without a preset: Dr. GRPO's advantage, which is not divided by the group's standard deviation (it learned more where right
  answers are rare: docs/algorithms.md), with DAPO's normalisation, and no KL penalty.
* Samples without an advantage are not computed where their gradient is zero: not with a KL penalty or a loss of one's own.

Expected: SmolLM2-135M-Instruct on `arithmetic` rises from about 0.1 to above 0.9 within 30 steps of 64 samples
(`examples/quickstart.toml`).
"""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from rlloop.adapters import POLICY
from rlloop.advantages import constant_weights, sequence_weights, token_weights
from rlloop.backend import Backend
from rlloop.cli import entry_point
from rlloop.plugins import is_path, load_object, name_or_path
from rlloop.policy_settings import PolicySettings
from rlloop.run import open_run
from rlloop.samples import (
    LossWeights,
    make_samples,
    with_kl_penalty,
    with_overlong_penalty,
    with_ref_logprobs,
    without_signal_free,
    without_truncated,
)
from rlloop.trainer import Trainer
from rlloop.types import Group, Metrics
from rlloop.updates import after_step, bind_policy_loss, optimizer_step, present_kl_coef

ADVANTAGES = {
    "centred": "rlloop.advantages:group_centred",
    "normalised": "rlloop.advantages:group_normalised",
    "leave_one_out": "rlloop.advantages:leave_one_out",
    "raw": "rlloop.advantages:raw_rewards",
}
SURROGATES = {
    "clipped": "rlloop.losses:clipped",
    "sequence_clipped": "rlloop.losses:sequence_clipped",
    "clipped_weight": "rlloop.losses:clipped_weight",
    "geometric_clipped": "rlloop.losses:geometric_clipped",
}
_GRPO = {"advantage": "normalised", "normalisation": "sequence"}
_TO_SAMPLER = {"advantage": "normalised", "proximal": "rollout"}
_SEQUENCES = {**_GRPO, **_TO_SAMPLER}
PRESETS: dict[str, dict[str, Any]] = {
    "grpo": {**_GRPO, "kl_coef": 0.04},
    "dr_grpo": {"advantage": "centred", "normalisation": "constant"},
    "dapo": {"advantage": "normalised", "clip_high": 0.28, "overlong_buffer": 0.2, "dynamic_sampling": 3.0},
    "gspo": {**_SEQUENCES, "loss": "sequence_clipped", "clip_low": 3e-4, "clip_high": 4e-4},
    "gmpo": {**_SEQUENCES, "loss": "geometric_clipped", "clip_low": 0.4, "clip_high": 0.4},
    "cispo": {**_TO_SAMPLER, "loss": "clipped_weight", "clip_low": 1.0, "clip_high": 4.0},
    "rloo": {"advantage": "leave_one_out", "normalisation": "constant", "kl_in": "reward"},
    "reinforce_pp": {"advantage": "raw", "whiten": True, "kl_in": "reward"},
}


class Config(PolicySettings):
    """GRPO and its family: group-relative policy optimisation, asynchronous."""

    preset: Literal["grpo", "dr_grpo", "dapo", "gspo", "gmpo", "cispo", "rloo", "reinforce_pp"] | None = None
    """Defaults of the settings below as a paper has them; what is set, in a file too, wins."""
    advantage: Annotated[str, AfterValidator(partial(name_or_path, names=ADVANTAGES))] = "centred"
    """centred, normalised, leave_one_out, raw, or `module:function` of one's own: rewards [G] -> advantages [G]."""
    whiten: bool = False
    """Bring the advantages of a whole step to mean 0 and standard deviation 1."""
    loss: Annotated[str, AfterValidator(partial(name_or_path, names=SURROGATES))] = "clipped"
    """clipped, sequence_clipped, clipped_weight, geometric_clipped, or a `module:function` that takes what they take."""
    normalisation: Literal["token", "sequence", "constant"] = "token"
    """What counts the same in the loss: every token of a step, every sample, or a token of any step (1 / max_tokens)."""
    overlong_buffer: float = Field(0.0, ge=0, lt=1)
    """Over this share of `sampling.max_tokens` before the limit, a completion's reward falls by up to 1."""
    mask_truncated: bool = False
    """Completions that the token limit cut off carry no loss."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in_preset(cls, data: dict[str, Any]) -> dict[str, Any]:
        return PRESETS.get(str(data.get("preset")), {}) | data

    @model_validator(mode="after")
    def _check_objective(self) -> Config:
        if self.clip_low > 1 and self.loss in ("clipped", "sequence_clipped", "clipped_weight"):
            raise ValueError(f"--clip-low: expected at most 1 with --loss {self.loss}, got {self.clip_low}")
        if self.group_size == 1 and self.advantage in ADVANTAGES and self.advantage != "raw":
            raise ValueError(
                f"--group-size 1: --advantage {self.advantage} compares the rollouts of a prompt, so it needs two; use "
                "--advantage raw --whiten, or rlloop ppo"
            )
        if self.dynamic_sampling and (
            self.advantage == "raw" or self.whiten or (self.kl_coef and self.kl_in == "reward")
        ):
            raise ValueError(
                "--dynamic-sampling: groups whose rewards are all equal do teach with --advantage raw, --whiten and "
                "--kl-in reward"
            )
        return self


async def update(trainer: Trainer, groups: list[Group], config: Config, state: dict[str, float]) -> Metrics:
    """One optimizer step on the groups of one step; `state` is the run's."""
    max_tokens = config.sampling.max_tokens
    if config.overlong_buffer:
        groups = with_overlong_penalty(groups, max_tokens=max_tokens, buffer=config.overlong_buffer * max_tokens)
    kl_coef = present_kl_coef(config, state)
    found: Metrics = {"policy/kl_coef": kl_coef} if kl_coef else {}
    if kl_coef and config.kl_in == "reward":
        groups, found["policy/kl_ref"] = await with_kl_penalty(trainer, groups, kl_coef)
    if config.mask_truncated:
        groups = without_truncated(groups)
    advantages = load_object(ADVANTAGES.get(config.advantage, config.advantage))
    weights: dict[str, LossWeights] = {
        "token": token_weights,
        "sequence": sequence_weights,
        "constant": partial(constant_weights, max_tokens=max_tokens),
    }
    samples = make_samples(groups, advantages, weights[config.normalisation], whiten=config.whiten)
    kl_in_loss = kl_coef if config.kl_in == "loss" else 0.0
    if kl_in_loss:
        samples = await with_ref_logprobs(trainer, samples)
    elif config.loss in SURROGATES:  # one of somebody's own may not be proportional to the advantage
        samples = without_signal_free(samples)
    surrogate = load_object(SURROGATES.get(config.loss, config.loss))
    loss = bind_policy_loss(config, surrogate, kl_in_loss)
    metrics = await optimizer_step(trainer, POLICY, samples, loss, config.optim.adam) | found
    after_step(config, state, metrics)
    return metrics


async def train(config: Config, marker: str, backend: Backend | None = None) -> None:
    """Train under a running event loop; `marker` is that of `rlloop.processes.guard`."""
    for path in filter(is_path, (config.advantage, config.loss)):
        load_object(path)  # before the ranks start: they search where this process does
    async with open_run(config, marker, backend=backend) as grpo:
        await grpo.train(partial(update, config=config, state=grpo.state))


main = entry_point("grpo", train)

if __name__ == "__main__":
    main()
