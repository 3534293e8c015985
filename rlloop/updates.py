"""One optimizer step on a batch of samples, and the metrics that every algorithm reports of it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from math import isfinite
from time import monotonic
from typing import Any

import numpy as np
from anyio import CancelScope

from rlloop.errors import TornUpdate
from rlloop.policy_settings import PolicySettings
from rlloop.trainer import Loss, Trainer
from rlloop.types import AdamConfig, Metrics, OptimResult, Sample

PER_TOKEN = {
    "policy/entropy": "entropy/mean",
    "policy/kl_ref": "kl_ref/mean",
    "policy/clip_frac_low": "clip_frac_low/mean",
    "policy/clip_frac_high": "clip_frac_high/mean",
    "policy/sampler_kl_mean": "sampler_kl/mean",
    "policy/sampler_kl_max": "sampler_kl/max",
    "policy/mismatch_ratio_mean": "mismatch_ratio/mean",
    "policy/mismatch_ratio_max": "mismatch_ratio/max",
}
"""Documented metric -> what a trainer made of the loss's per-token metrics."""
_MULTISTEP = {"policy/update_kl_max": "update_kl/mean"}
"""Likewise, only where a batch is used for several steps: the greatest of theirs."""


def adapted_kl_coef(kl_coef: float, kl: float, target: float) -> float:
    """The next step's weight of a KL penalty, after one whose divergence was `kl`: kl_coef * (1 + 0.1 * e), with e the relative
    error kl / target - 1 within +-0.2.

    Ziegler et al. 2019, "Fine-Tuning Language Models from Human Preferences" (arXiv 1909.08593, section 2.2).
    """
    return kl_coef * (1 + 0.1 * max(-0.2, min(0.2, kl / target - 1)))


def present_kl_coef(settings: PolicySettings, state: Mapping[str, float]) -> float:
    """The weight of this step's KL penalty; `state` is the run's."""
    return state.get("kl_coef", settings.kl_coef) if settings.kl_target else settings.kl_coef


def bind_policy_loss(settings: PolicySettings, surrogate: Callable[..., Any], kl_coef: float) -> Loss:
    """`rlloop.losses.policy_loss` as the settings say; `kl_coef` is its share of the KL penalty."""
    from rlloop.losses import policy_loss  # torch, which `rlloop --help` need not wait for

    return partial(
        policy_loss,
        surrogate=partial(surrogate, clip_low=settings.clip_low, clip_high=settings.clip_high),
        proximal=settings.proximal,
        correction=settings.correction.model_dump(),
        kl_coef=kl_coef,
        kl_estimator=settings.kl_estimator,
    )


def after_step(settings: PolicySettings, state: dict[str, float], metrics: Metrics) -> None:
    """Adapt the weight of the KL penalty, and warn of stale samples that nothing corrects for."""
    kl = metrics.get("policy/kl_ref")
    if settings.kl_target and kl is not None and isfinite(kl):
        state["kl_coef"] = adapted_kl_coef(present_kl_coef(settings, state), kl, settings.kl_target)
    if settings.correction.bound == "none" and settings.proximal != "rollout":
        warn_if_stale(metrics)


HIGH_SAMPLER_KL = 0.01
"""Nats a token: ten times what an engine in bfloat16 makes of the same weights."""


def warn_if_stale(metrics: Metrics) -> None:
    """Log a warning when the samples were far from the trainer's policy; for updates that do not correct for that."""
    if metrics.get("policy/sampler_kl_mean", 0.0) > HIGH_SAMPLER_KL:
        logging.getLogger(__name__).warning(
            "samples were %.2g nats a token from the trainer's policy, and nothing corrects for it: "
            "use --correction.bound truncate, or a lower --max-staleness",
            metrics["policy/sampler_kl_mean"],
        )


async def optimizer_step(
    trainer: Trainer, adapter: str, samples: Sequence[Sample], loss: Loss, adam: AdamConfig
) -> Metrics:
    """forward_backward over all samples, then optim_step: the last await, and not cancelled. Without samples, no step."""
    if not samples:  # every group got the same reward throughout: there is nothing to learn from
        return {"optim/skipped_steps": 1.0, "optim/lr": adam.lr}
    found, result, seconds, step_seconds = await _step(trainer, adapter, samples, loss, adam)
    return {
        "loss/policy": found["loss"],
        **{name: found[source] for name, source in (PER_TOKEN | _MULTISTEP).items() if source in found},
        "optim/grad_norm": result.grad_norm,
        "optim/lr": adam.lr,
        "optim/skipped_steps": float(result.skipped),
        "optim/nonfinite_steps": float(result.skipped),
        "perf/mfu": found["mfu"],
        "perf/train_tokens_per_second": sum(len(sample.tokens) for sample in samples) / seconds,
        "progress/tokens_trained": found["num_tokens"],
        "time/forward_backward": seconds,
        "time/optimizer": step_seconds,
    }


async def value_step(
    trainer: Trainer, adapter: str, samples: Sequence[Sample], loss: Loss, adam: AdamConfig
) -> Metrics:
    """As `optimizer_step`, of a value adapter; the samples are those of a policy's step, which counts them."""
    found, result, seconds, step_seconds = await _step(trainer, adapter, samples, loss, adam)
    clip_frac = {"value/clip_frac": found["value_clip_frac/mean"]} if "value_clip_frac/mean" in found else {}
    return {
        "loss/value": found["loss"],
        **clip_frac,
        "value/grad_norm": result.grad_norm,
        "value/nonfinite_steps": float(result.skipped),
        "time/value": seconds + step_seconds,
    }


async def _step(
    trainer: Trainer, adapter: str, samples: Sequence[Sample], loss: Loss, adam: AdamConfig
) -> tuple[Metrics, OptimResult, float, float]:
    """-> what forward_backward and optim_step found, and the seconds of each."""
    started = monotonic()
    found = await trainer.forward_backward(adapter, samples, loss)
    stepped = monotonic()
    # Once sent it is made: the ledger must hear of it, or a resume trains the groups again.
    with CancelScope(shield=True):
        result = await trainer.optim_step(adapter, adam)
    return found, result, stepped - started, monotonic() - stepped


@contextmanager
def made_whole() -> Iterator[Callable[[], None]]:
    """Around an update in several optimizer steps; call what it yields after the first one. From there on it is not cancelled,
    and an error raises TornUpdate: a checkpoint must not hold weights that have seen a part of its groups."""
    with CancelScope() as scope:

        def begin() -> None:
            scope.shield = True

        try:
            yield begin
        except Exception as error:
            if scope.shield:
                raise TornUpdate(str(error)) from error
            raise


_SUMMED = ("optim/skipped_steps", "optim/nonfinite_steps", "value/nonfinite_steps", "progress/tokens_trained")


_WEIGHED_BY = {
    "policy": "progress/tokens_trained",
    "value/clip_frac": "progress/tokens_trained",
    "perf": "time/forward_backward",
}
"""What a mean of this metric, or of metrics of this kind, is over."""


def merged(steps: Sequence[Metrics]) -> Metrics:
    """Of several optimizer steps on one batch: counts and times are summed, `_max` is the greatest, the rest is averaged: means
    over tokens by tokens, rates by time."""
    found: Metrics = {}
    for name in dict.fromkeys(name for step in steps for name in step):
        having = [step for step in steps if name in step]
        values = [step[name] for step in having]
        if name in _SUMMED or name.startswith("time/"):
            found[name] = sum(values)
        elif name.endswith("_max"):
            found[name] = float(np.max(values))  # which keeps a NaN
        else:
            weight = _WEIGHED_BY.get(name, _WEIGHED_BY.get(name.partition("/")[0], ""))
            found[name] = float(np.average(values, weights=[step.get(weight, 1.0) for step in having]))
    return found
