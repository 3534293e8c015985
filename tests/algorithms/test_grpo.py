"""What a step of GRPO and its family asks of the trainer."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest
import torch
from pydantic import ValidationError
from rlloop.algorithms.grpo import PRESETS, Config, train, update

from rlloop import losses
from rlloop.errors import ConfigError
from rlloop.trainer import Loss, TokenBatch
from rlloop.trainer.fake import FakeTrainer
from rlloop.types import FloatArray, Group, LoraConfig, Metrics, Prompt, Rollout, Sample

EXAMPLE = Path(__file__).parents[2] / "examples" / "custom_loss"


class RecordingTrainer(FakeTrainer):
    """Its samples are far from its policy, and at each token one nat likelier than for its base."""

    def __init__(self) -> None:
        super().__init__()
        self.samples: Sequence[Sample] = ()
        self.loss: Any = None
        self.metrics: Metrics = {}

    async def forward_backward(self, name: str, samples: Sequence[Sample], loss: Loss) -> Metrics:
        self.samples, self.loss = samples, loss
        return {**await super().forward_backward(name, samples, loss), "sampler_kl/mean": 0.5}

    async def logprobs(self, name: str | None, samples: Sequence[Sample]) -> list[FloatArray]:
        assert name is None
        return [sample.rollout_logprobs - sample.loss_mask for sample in samples]


def rollout(num_sampled: int, finish_reason: str = "stop") -> Rollout:
    loss_mask = np.arange(2 + num_sampled) >= 2
    return Rollout(
        np.arange(len(loss_mask), dtype=np.int32),
        loss_mask,
        np.where(loss_mask, -2, 0).astype(np.float32),
        0,
        finish_reason,
        1,
        "",
    )


GROUPS = [
    Group(Prompt(7, 0, 0, None), (rollout(1), rollout(3), rollout(10, "length")), (1.0, 0.0, 0.5), 0),
    Group(Prompt(8, 1, 0, None), (rollout(2), rollout(2), rollout(2)), (1.0, 1.0, 0.0), 0),
]


def step(**settings: Any) -> RecordingTrainer:
    trainer = RecordingTrainer()

    async def run() -> None:
        await trainer.create_adapter("policy", LoraConfig())
        trainer.metrics = await update(trainer, GROUPS, Config(**settings, sampling={"max_tokens": 10}), {})

    anyio.run(run)
    return trainer


def advantages(trainer: RecordingTrainer) -> list[float]:
    return [float(sample.advantages[-1]) for sample in trainer.samples]


def weights(trainer: RecordingTrainer) -> list[float]:
    return [float(sample.loss_weights[-1]) for sample in trainer.samples]


THIRD = 1 / 3
LENGTHS = [1, 3, 10, 2, 2, 2]
# Standard deviations 0.5 and 0.57735.
NORMALISED = [0.5 / 0.5001, -0.5 / 0.5001, 0, THIRD / 0.577450, THIRD / 0.577450, -2 * THIRD / 0.577450]


@pytest.mark.parametrize(
    ("preset", "expected", "weight", "surrogate"),
    [
        ("grpo", NORMALISED, [1 / (6 * n) for n in LENGTHS], losses.clipped),
        ("dr_grpo", [0.5, -0.5, 0, THIRD, THIRD, -2 * THIRD], [1 / 60] * 6, losses.clipped),
        ("gspo", NORMALISED, [1 / (6 * n) for n in LENGTHS], losses.sequence_clipped),
        ("gmpo", NORMALISED, [1 / (6 * n) for n in LENGTHS], losses.geometric_clipped),
        ("cispo", NORMALISED, [1 / 20] * 6, losses.clipped_weight),
        ("rloo", [0.75, -0.75, 0, 0.5, 0.5, -1], [1 / 60] * 6, losses.clipped),
        # mean 7 / 12, standard deviation sqrt(1.2083333 / 6) = 0.4487637
        ("reinforce_pp", [0.928477, -1.299867, -0.185695, 0.928477, 0.928477, -1.299867], [1 / 20] * 6, losses.clipped),
    ],
)
def test_presets(preset: Any, expected: list[float], weight: list[float], surrogate: Any) -> None:
    trainer = step(preset=preset)
    signal = [index for index, credit in enumerate(expected) if credit or preset == "grpo"]  # KL needs all samples
    assert advantages(trainer) == pytest.approx([expected[index] for index in signal], abs=1e-5)
    assert weights(trainer) == pytest.approx([weight[index] for index in signal], abs=1e-7)
    assert trainer.loss.keywords["surrogate"].func is surrogate
    assert trainer.loss.keywords["proximal"] == ("rollout" if preset in ("gspo", "gmpo", "cispo") else "trainer")
    assert trainer.loss.keywords["kl_coef"] == (0.04 if preset == "grpo" else 0)


def test_the_groups_standard_deviation_divides_only_where_a_preset_says_so() -> None:
    assert advantages(step()) == pytest.approx([0.5, -0.5, THIRD, THIRD, -2 * THIRD])
    assert advantages(step(preset="dapo", overlong_buffer=0)) == pytest.approx([n for n in NORMALISED if n], abs=1e-5)


def test_dapo_lowers_the_rewards_of_long_completions() -> None:
    trainer = step(preset="dapo", advantage="centred")
    # The last 2 of 10 tokens: the third rollout's reward falls from 0.5 to -0.5, the mean of the three to 1 / 6.
    assert advantages(trainer) == pytest.approx([5 / 6, -1 / 6, -4 / 6, THIRD, THIRD, -2 * THIRD])
    assert weights(trainer) == pytest.approx([1 / 20] * 6)
    assert trainer.loss.keywords["surrogate"].keywords == {"clip_low": 0.2, "clip_high": 0.28}


def test_completions_that_were_cut_off_can_be_left_out() -> None:
    trainer = step(advantage="centred", mask_truncated=True, kl_coef=0.1)
    assert advantages(trainer) == pytest.approx([0.5, -0.5, THIRD, THIRD, -2 * THIRD], abs=1e-6)
    assert weights(trainer) == pytest.approx([1 / 10] * 5)


@pytest.mark.parametrize("mask_truncated", [False, True])
def test_the_kl_penalty_can_be_in_the_reward(mask_truncated: bool) -> None:
    trainer = step(preset="rloo", kl_coef=0.1, mask_truncated=mask_truncated)
    # 0.1 a token: rewards 0.9, -0.3, -0.5 and 0.8, 0.8, -0.2; what was cut off counts in the mean in any case
    expected = [1.3, -0.5, -0.8, 0.5, 0.5, -1.0]
    if mask_truncated:
        expected.pop(2)
    assert advantages(trainer) == pytest.approx(expected)
    assert trainer.loss.keywords["kl_coef"] == 0
    assert all(sample.ref_logprobs is None for sample in trainer.samples)
    assert trainer.metrics["policy/kl_ref"] == pytest.approx(1)


def test_every_preset_is_offered_and_what_is_set_wins_over_it() -> None:
    assert set(PRESETS) == set(Config.model_json_schema()["properties"]["preset"]["anyOf"][0]["enum"])
    config = Config(preset="gspo", clip_low=0.01)
    assert (config.loss, config.clip_low, config.clip_high) == ("sequence_clipped", 0.01, 4e-4)
    assert Config(preset="dapo").dynamic_sampling == 3
    assert Config(**config.model_dump()) == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"loss": "sequence_cliped"},
            r"expected clipped, .* or package.module:name \(did you mean sequence_clipped\?\)",
        ),
        ({"advantage": "best"}, "expected centred, normalised, leave_one_out, raw or package.module:name"),
        ({"correction": {"bound": "mask", "floor": 3.0}}, "floor 3.0 is not below cap 2.0"),
        ({"correction": {"floor": 0.5}}, "floor is for bound mask only"),
        ({"preset": "cispo", "correction": {"bound": "none"}}, "--correction: not used with --proximal rollout"),
        (
            {"preset": "reinforce_pp", "dynamic_sampling": 1},
            "--dynamic-sampling: groups whose rewards are all equal do teach",
        ),
        (
            {"group_size": 1},
            "--group-size 1: --advantage centred compares the rollouts of a prompt",
        ),
        ({"preset": "rloo", "kl_coef": 0.1, "dynamic_sampling": 1}, "--dynamic-sampling: groups"),
        ({"clip_low": 1.5}, "--clip-low: expected at most 1 with --loss clipped, got 1.5"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Config(**settings)


def test_ones_own_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXAMPLE)
    monkeypatch.setattr(sys, "path", list(sys.path))
    trainer = step(advantage="my_loss:best_of_group", loss="my_loss:soft_gate", clip_low=0.7, clip_high=1.0)
    # A loss that need not be proportional to the advantage sees all samples.
    assert advantages(trainer) == pytest.approx([0.5, 0, 0, THIRD, THIRD, 0])

    row = torch.tensor([2.0, -1.0], dtype=torch.float64)
    tokens = TokenBatch(row, torch.ones(2), torch.zeros(2), None, None, torch.tensor([0, 1]), torch.zeros(2))
    logprobs = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    loss, _ = partial(trainer.loss, correction={"bound": "none"})(logprobs, tokens)
    assert loss.item() == pytest.approx(-2 * 4 / 1.0 * 0.5 + 1 * 4 / 0.7 * 0.5)
    loss.backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == pytest.approx([-2, 1])  # at ratio 1 the gradient is the policy gradient


def test_a_function_that_is_missing_is_named_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXAMPLE)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(ConfigError, match=r"my_loss has no function or class soft_gates \(did you mean soft_gate\?\)"):
        anyio.run(train, Config(loss="my_loss:soft_gates"), "marker")


@pytest.mark.parametrize(
    ("settings", "warns"),
    [
        ({}, False),
        ({"correction": {"bound": "none"}}, True),
        ({"correction": {"bound": "mask"}}, False),
        ({"preset": "cispo"}, False),
    ],
)
def test_a_correction_that_is_missing_is_warned_of(
    settings: dict[str, Any], warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    step(**settings)
    assert ("nothing corrects for it" in caplog.text) == warns
