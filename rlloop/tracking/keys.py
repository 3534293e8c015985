"""Every metric of metrics.jsonl. docs/metrics.md is `markdown()` with an introduction; a test compares them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Metric(NamedTuple):
    """What one key means."""

    unit: str
    meaning: str
    trl: str = ""
    """TRL's name for the same or the nearest thing; empty where it has none."""


DOCUMENTED: dict[str, Metric] = {
    "reward/mean": Metric("reward", "Mean over the rollouts of the step, those of filtered groups included.", "reward"),
    "reward/std": Metric("reward", "Standard deviation over the rollouts of the step.", "reward_std"),
    "reward/min": Metric("reward", "Least of the step."),
    "reward/max": Metric("reward", "Greatest of the step."),
    "reward/frac_zero_std": Metric(
        "fraction",
        "Groups whose rollouts all got the same reward: without a critic they teach nothing.",
        "frac_reward_zero_std",
    ),
    "completions/mean_length": Metric("tokens", "Mean sampled tokens per rollout.", "completions/mean_length"),
    "completions/clipped_ratio": Metric(
        "fraction", "Rollouts that were cut off by the token limit.", "completions/clipped_ratio"
    ),
    "loss/policy": Metric("nats", "The policy's loss, as it was differentiated.", "policy_loss"),
    "policy/entropy": Metric("nats", "Mean entropy of the policy at the tokens that are trained.", "entropy"),
    "policy/kl_ref": Metric("nats", "Mean KL from the policy to the frozen base, per token.", "kl"),
    "policy/clip_frac_low": Metric("fraction", "Tokens whose ratio was clipped from below.", "clip_ratio/low_mean"),
    "policy/clip_frac_high": Metric("fraction", "Tokens whose ratio was clipped from above.", "clip_ratio/high_mean"),
    "policy/sampler_kl_mean": Metric(
        "nats",
        "Mean KL from the engine's to the trainer's distribution, per token, estimated on the sampled tokens: "
        "the early warning that the two disagree.",
        "sampling/sampling_logp_difference/mean (absolute difference)",
    ),
    "policy/sampler_kl_max": Metric(
        "nats", "Greatest of that over the tokens.", "sampling/sampling_logp_difference/max (absolute difference)"
    ),
    "policy/mismatch_ratio_mean": Metric(
        "ratio",
        "Mean of exp(old_logprobs - rollout_logprobs), trainer against engine: 1 when they agree.",
        "sampling/importance_sampling_ratio/mean",
    ),
    "policy/mismatch_ratio_max": Metric(
        "ratio", "Greatest of that over the tokens.", "sampling/importance_sampling_ratio/max"
    ),
    "async/staleness_mean": Metric(
        "versions", "Trainer's version - version that sampled, mean over the step's groups.", "sample/staleness_mean"
    ),
    "async/staleness_max": Metric("versions", "Greatest of that.", "sample/staleness_max"),
    "async/token_staleness_mean": Metric("versions", "The same of each sampled token, mean over the step's tokens."),
    "async/frac_mixed_versions": Metric(
        "fraction", "Rollouts that more than one version sampled: `--refit.in_flight`."
    ),
    "async/in_flight": Metric("groups", "Being sampled or scored when the step ended.", "rollout/inflight (rollouts)"),
    "async/dropped_groups": Metric("groups", "Sampled but not trained since the step before, for any reason."),
    "async/dropped_stale": Metric("groups", "Of those: too old.", "sample/dropped_stale_total (total)"),
    "async/dropped_failed": Metric("groups", "Of those: too few rollouts left after failures."),
    "async/dropped_filtered": Metric("groups", "Of those: all rewards equal, with `--dynamic_sampling`."),
    "async/dropped_too_long": Metric("groups", "Of those: the prompt leaves no room within `--engine.max_model_len`."),
    "rollout/errors": Metric("rollouts", "Ended by an exception in the environment or the reward, in this step."),
    "rollout/timeouts": Metric("rollouts", "Ended by a time limit of the rollout or the reward, in this step."),
    "time/step": Metric("seconds", "Wall time since the step before ended.", "step_time, perf/step_s"),
    "time/wait_rollouts": Metric("seconds", "The trainer waited for finished groups.", "perf/rollout_wait_s"),
    "time/forward_backward": Metric("seconds", "Forward and backward passes.", "perf/fwd_bwd_s"),
    "time/optimizer": Metric("seconds", "The optimizer step.", "perf/optimizer_s"),
    "time/refit": Metric("seconds", "From the update's end until the engine serves it.", "perf/weight_sync_s"),
    "time/refit_stall": Metric("seconds", "Of that: the engine could run no forward pass.", "perf/weight_sync_pause_s"),
    "time/canary": Metric(
        "seconds", "The update waited for the canary and its forward pass; NaN in a step without one."
    ),
    "time/checkpoint": Metric("seconds", "Writing a checkpoint after the step before; 0 if that wrote none."),
    "time/trainer_idle_frac": Metric(
        "fraction",
        "Of the step in which no update ran; weights that are exported, checkpoints and a canary's scores are none.",
    ),
    "time/engine_idle_frac": Metric("fraction", "Of the step in which the engine had no request."),
    "refit/export_seconds": Metric("seconds", "In the trainer: flatten, scale, cast and digest the adapter."),
    "refit/transfer_seconds": Metric(
        "seconds", "In the engine: from the transport to its device.", "perf/weight_sync_transfer_s"
    ),
    "refit/load_seconds": Metric("seconds", "In the engine: into a free slot, or the weights."),
    "refit/verify_seconds": Metric(
        "seconds", "In the engine: digest of what the slot holds, or of what is to be merged."
    ),
    "refit/canary_difference": Metric(
        "nats",
        "Mean absolute difference of engine's and trainer's logprobs of the canary's tokens, before this step's update; "
        "NaN in a step without one.",
    ),
    "refit/first_token_seconds": Metric(
        "seconds",
        "From the end of the last publish whose version has sampled to its first token in a request that began with it.",
    ),
    "refit/longest_gap_seconds": Metric(
        "seconds",
        "Longest time between two tokens of one request since the step before, the refit included; what restarts is a new one.",
    ),
    "perf/overlap_efficiency": Metric(
        "fraction",
        "Busy seconds of the busier of engine and trainer / wall seconds: 1 when the other one is hidden behind it.",
    ),
    "perf/gen_tokens_per_second": Metric("tokens/s", "Tokens sampled / time/step.", "rollout/generated_tok_s"),
    "perf/train_tokens_per_second": Metric(
        "tokens/s",
        "Tokens of the trained sequences, prompts included / time/forward_backward.",
        "perf/trained_tok_s_wall_clock",
    ),
    "perf/mfu": Metric(
        "fraction",
        "Model FLOP/s of the training passes / peak FLOP/s of the trainer's hardware, measured at the start; "
        "NaN in a step that trains nothing.",
        "perf/mfu_wall_clock",
    ),
    "optim/grad_norm": Metric(
        "L2 norm", "Of the adapter's gradient before clipping; raw, so it may be NaN.", "grad_norm"
    ),
    "optim/lr": Metric("1", "Learning rate.", "learning_rate"),
    "optim/skipped_steps": Metric("steps", "Optimizer steps skipped since the run began, for any reason."),
    "optim/nonfinite_steps": Metric("steps", "Of those: loss or gradient was not finite."),
    "progress/tokens_sampled": Metric(
        "tokens",
        "Sampled since the run began: dropped ones, evaluations and canaries, too, but none after the last step before a resume.",
        "num_tokens",
    ),
    "progress/tokens_trained": Metric(
        "tokens",
        "Sampled tokens in optimizer steps since the run began, skipped ones among them, once for each epoch over a batch.",
    ),
    "progress/prompts": Metric("prompts", "Trained on since the run began."),
    "progress/passed_over": Metric("prompts", "Passed over by the curriculum since the run began, and not sampled."),
    "progress/epoch": Metric("epochs", "Prompts done / tasks of the environment.", "epoch"),
}
"""In every line of metrics.jsonl."""

OPTIONAL: dict[str, Metric] = {
    "policy/kl_coef": Metric("", "Weight of the KL penalty in this step.", "kl_coef"),
    "loss/value": Metric("reward²", "The critic's loss, as it was differentiated.", "value_loss"),
    "value/explained_variance": Metric(
        "fraction",
        "Share of the variance of the rewards to come that the critic's values explained, before its update.",
    ),
    "value/mean": Metric("reward", "Mean of those values.", "values/mean"),
    "value/clip_frac": Metric("fraction", "Tokens whose value was held near the old one.", "vf_clipfrac"),
    "value/grad_norm": Metric("", "As optim/grad_norm, of the critic."),
    "value/nonfinite_steps": Metric("steps", "As optim/nonfinite_steps, of the critic; of this step."),
    "time/value": Metric("s", "The critic's values and updates."),
    "policy/update_kl_max": Metric(
        "nats",
        "KL per token from the policy before this step's update to that within it, greatest of its minibatches.",
        "approxkl",
    ),
    "reward/<fn>/mean": Metric(
        "reward", "Mean of one reward function, where an environment has several.", "rewards/<fn>/mean"
    ),
    "eval/loss": Metric(
        "nats", "Mean loss per token on held-out rows of a supervised run (evaluations.jsonl).", "eval_loss"
    ),
    "eval/reward_mean": Metric("reward", "Mean on held-out prompts (evaluations.jsonl).", "eval_reward"),
    "eval/reward_stderr": Metric("reward", "Standard error of that mean."),
    "eval/mean_length": Metric("tokens", "Mean sampled tokens per rollout of an evaluation."),
    "eval/prompts": Metric("prompts", "Held-out prompts that left room for an answer."),
    "eval/failures": Metric("rollouts", "Rollouts of an evaluation that failed or could not be scored."),
    "time/eval": Metric("s", "From an evaluation's start to its end; training goes on meanwhile."),
    "env/<name>": Metric("any", "Mean over the step's rollouts of what the environment reports in `Rollout.metrics`."),
}
"""Only where there is something to report; `<...>` stands for a name."""


def markdown() -> str:
    """The tables of docs/metrics.md."""
    lines: list[str] = []
    for title, metrics in (("In every line", DOCUMENTED), ("Where there is something to report", OPTIONAL)):
        lines += [f"## {title}", "", "| metric | unit | meaning | TRL |", "|---|---|---|---|", *_rows(metrics), ""]
    return "\n".join(lines)


def _rows(metrics: Mapping[str, Metric]) -> list[str]:
    return [f"| `{key}` | {metric.unit} | {metric.meaning} | {metric.trl} |" for key, metric in metrics.items()]
