"""Settings of the algorithms that train a policy with a clipped surrogate, and of a critic beside it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from rlloop.config import LoraSettings, OptimSettings, RunSettings, Settings


class CorrectionSettings(Settings):
    """What a token counts that another policy version sampled, or an engine that computes a little differently."""

    level: Literal["token", "sequence", "geometric"] = "token"
    """Importance weight of each token, of its whole sample, or the sample's geometric mean."""
    bound: Literal["truncate", "mask", "none"] = "truncate"
    """Truncate the weight at `cap`, drop tokens whose weight lies outside floor to cap, or do not correct."""
    floor: float = Field(0.0, ge=0)
    """Lowest weight that `mask` keeps."""
    cap: float = Field(2.0, gt=0)
    """Greatest weight."""

    @model_validator(mode="after")
    def _check(self) -> CorrectionSettings:
        if self.bound == "none" and self.model_copy(update={"bound": "truncate"}) != CorrectionSettings():
            raise ValueError("with bound none nothing is corrected: leave out level, floor and cap")
        if self.floor >= self.cap:
            raise ValueError(f"floor {self.floor} is not below cap {self.cap}")
        if self.floor and self.bound != "mask":
            raise ValueError(f"floor is for bound mask only, got bound {self.bound}")
        return self


class PolicySettings(RunSettings):
    """What `rlloop.losses.policy_loss` is bound with, beside the surrogate."""

    clip_low: float = Field(0.2, gt=0)
    """The ratio is clipped below 1 - clip_low (with --loss geometric_clipped, exp(-clip_low))."""
    clip_high: float = Field(0.2, gt=0)
    """The ratio is clipped above 1 + clip_high (with --loss geometric_clipped, exp(clip_high))."""
    proximal: Literal["trainer", "rollout", "interpolated"] = "trainer"
    """The policy that the clipped ratio is to: the trainer's before the update, beside the correction; the one that sampled,
    which needs none; or one between them by age, in place of a forward pass for the trainer's."""
    correction: CorrectionSettings = CorrectionSettings()
    """Importance weights for stale samples and for the engine's arithmetic."""
    kl_coef: float = Field(0.0, ge=0)
    """Weight of the KL divergence to the base model."""
    kl_target: float | None = Field(None, gt=0)
    """Adapt that weight after every step, so that the divergence comes to this, in nats a token."""
    kl_in: Literal["loss", "reward"] = "loss"
    """Whether that is added to the loss of each token, or taken off the reward of each rollout."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """How it is estimated at each token, in the loss; in the reward it is k1."""

    @model_validator(mode="after")
    def _check_policy(self) -> PolicySettings:
        if self.kl_target is not None and not self.kl_coef:
            raise ValueError("--kl-target: needs a --kl-coef above 0 to begin with")
        if self.kl_estimator != "k3" and (not self.kl_coef or self.kl_in == "reward"):
            raise ValueError("--kl-estimator: needs a --kl-coef above 0 and --kl-in loss; in the reward it is k1")
        if self.proximal == "rollout" and self.correction != CorrectionSettings():
            raise ValueError(
                "--correction: not used with --proximal rollout, whose ratio is to the policy that sampled"
            )
        return self


class CriticOptimSettings(OptimSettings):
    """AdamW, of the critic."""

    lr: float = Field(1e-3, gt=0)
    """Learning rate."""


class CriticSettings(Settings):
    """The critic: an adapter of its own on the same base, with a scalar head."""

    lora: LoraSettings = LoraSettings()
    optim: CriticOptimSettings = CriticOptimSettings()
    trace_decay: float = Field(1.0, ge=0, le=1)
    """What the critic learns: the rollout's own reward (1), or down to its own word one token ahead (0)."""
    clip: float | None = Field(None, gt=0)
    """Hold values within this of the old ones in the loss; without it they are not held."""
