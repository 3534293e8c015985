"""What a step of PPO asks of the trainer, in which order, and what a stop leaves of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import anyio
import anyio.lowlevel
import numpy as np
import pytest
from pydantic import ValidationError
from rlloop.algorithms.ppo import CRITIC, Config, update

from rlloop.adapters import POLICY
from rlloop.trainer import Loss
from rlloop.trainer.fake import FakeTrainer
from rlloop.types import AdamConfig, FloatArray, Group, LoraConfig, Metrics, OptimResult, Prompt, Rollout, Sample

Moment = Callable[[str], None]


class RecordingTrainer(FakeTrainer):
    """Values are 0.25 everywhere; the base's logprobs one nat below those of the rollouts. Each minibatch moves the policy by
    0.02 nats more."""

    def __init__(self, moment: Moment = lambda call: None) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.batches: dict[str, list[Sequence[Sample]]] = {POLICY: [], CRITIC: []}
        self._moment = moment

    async def _record(self, call: str) -> None:
        self.calls.append(call)
        self._moment(call)
        await anyio.lowlevel.checkpoint()

    async def values(self, name: str, samples: Sequence[Sample]) -> list[FloatArray]:
        await self._record(f"values {name}")
        return [np.full(len(sample.tokens), 0.25, np.float32) for sample in samples]

    async def logprobs(self, name: str | None, samples: Sequence[Sample]) -> list[FloatArray]:
        await self._record(f"logprobs {name}")
        return [sample.rollout_logprobs - (name is None) * sample.loss_mask for sample in samples]

    async def forward_backward(self, name: str, samples: Sequence[Sample], loss: Loss) -> Metrics:
        await self._record(f"forward_backward {name}")
        self.batches[name].append(samples)
        found = await super().forward_backward(name, samples, loss)
        return found | {"update_kl/mean": 0.02 * len(self.batches[name])}

    async def optim_step(self, name: str, adam: AdamConfig) -> OptimResult:
        await self._record(f"optim_step {name} {adam.lr}")
        return await super().optim_step(name, adam)


def rollout(num_sampled: int) -> Rollout:
    loss_mask = np.arange(2 + num_sampled) >= 2
    tokens = np.arange(len(loss_mask), dtype=np.int32)
    return Rollout(tokens, loss_mask, np.where(loss_mask, -2, 0).astype(np.float32), 0, "stop", 1, "")


GROUPS = [Group(Prompt(i, i, 0, None), (rollout(1), rollout(2 + i)), (1.0, 0.0), 0) for i in range(4)]


def step(trainer: RecordingTrainer | None = None, **settings: Any) -> tuple[RecordingTrainer, Metrics]:
    trainer = trainer or RecordingTrainer()
    found: list[Metrics] = []

    async def run() -> None:
        await trainer.create_adapter(POLICY, LoraConfig())
        await trainer.create_adapter(CRITIC, LoraConfig(), "value")
        found.append(await update(trainer, GROUPS, Config(**{"num_minibatches": 1, **settings}), {}))

    anyio.run(run)
    return trainer, found[0]


STEP = ["forward_backward policy", "optim_step policy 0.0001", "forward_backward critic", "optim_step critic 0.001"]


def test_one_step_asks_for_nothing_that_it_does_not_use() -> None:
    trainer, metrics = step()
    assert trainer.calls == ["values critic", *STEP]
    assert {"loss/policy", "loss/value", "value/explained_variance", "value/mean", "optim/grad_norm"} <= metrics.keys()
    assert metrics["value/mean"] == 0.25
    assert metrics["value/explained_variance"] == 0  # a constant


def test_credit_is_the_critics() -> None:
    """With trace_decay 0 a token's advantage is the next value less its own, and the last one's the reward less its own.

    The critic learns the rewards that came, unless it is told otherwise."""
    trainer, _ = step(trace_decay=0.0, whiten=False)
    (batch,) = trainer.batches[POLICY]
    by_length = {(len(sample.tokens), sample.prompt_id): sample for sample in batch}
    np.testing.assert_allclose(by_length[3, 0].advantages, [0, 0, 0.75])
    np.testing.assert_allclose(by_length[5, 1].advantages, [0, 0, 0, 0, -0.25])
    np.testing.assert_allclose(by_length[3, 0].returns, [0, 0, 1])
    np.testing.assert_allclose(by_length[5, 1].returns, [0, 0, 0, 0, 0])
    trainer, _ = step(trace_decay=0.0, whiten=False, critic={"trace_decay": 0.0})
    (batch,) = trainer.batches[POLICY]
    (longest,) = (sample.returns for sample in batch if (len(sample.tokens), sample.prompt_id) == (5, 1))
    np.testing.assert_allclose(longest, [0, 0, 0.25, 0.25, 0])


def test_several_steps_recompute_the_old_policy_and_use_every_sample_each_epoch() -> None:
    trainer, metrics = step(num_epochs=2, num_minibatches=2)
    assert trainer.calls == ["values critic", "logprobs policy", *STEP * 4]
    for name in (POLICY, CRITIC):
        prompts = [sorted({sample.prompt_id for sample in batch}) for batch in trainer.batches[name]]
        assert sorted(prompts[0] + prompts[1]) == sorted(prompts[2] + prompts[3]) == [0, 1, 2, 3]
    assert all(sample.old_logprobs is not None for batch in trainer.batches[POLICY] for sample in batch)
    assert metrics["progress/tokens_trained"] == 2 * sum(
        int(r.loss_mask.sum()) for group in GROUPS for r in group.rollouts
    )


def test_an_interpolated_proximal_policy_saves_the_pass_before_the_update() -> None:
    trainer, _ = step(num_minibatches=2, proximal="interpolated")
    assert trainer.calls == ["values critic", *STEP * 2]
    assert all(sample.old_logprobs is None for batch in trainer.batches[POLICY] for sample in batch)
    ages = {sample.prompt_id: sample.staleness for batch in trainer.batches[POLICY] for sample in batch}
    assert {prompt: set(age.tolist()) for prompt, age in ages.items()} == {
        g.prompt.ordinal: {g.staleness} for g in GROUPS
    }


def test_an_update_that_has_gone_far_ends() -> None:
    trainer, metrics = step(num_epochs=2, num_minibatches=2, max_update_kl=0.03)
    assert len(trainer.batches[POLICY]) == len(trainer.batches[CRITIC]) == 2
    assert metrics["policy/update_kl_max"] == pytest.approx(0.04)


@pytest.mark.parametrize(("kl_in", "advantage"), [("reward", 0.75 - 0.5), ("loss", 0.75)])
def test_the_base_is_asked_only_for_a_kl_penalty(kl_in: str, advantage: float) -> None:
    trainer, _ = step(kl_coef=0.5, kl_in=kl_in, whiten=False)
    assert trainer.calls[:2] == ["values critic", "logprobs None"]
    (batch,) = trainer.batches[POLICY]
    assert next(s for s in batch if len(s.tokens) == 3).advantages[-1] == pytest.approx(advantage)


@pytest.mark.parametrize("at", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
@pytest.mark.anyio
async def test_a_stopped_update_is_made_whole_or_not_at_all(anyio_backend: str, at: int) -> None:
    scope = anyio.CancelScope()

    def stop(call: str) -> None:
        if len(trainer.calls) == at + 1:
            scope.cancel()

    trainer = RecordingTrainer(stop)
    await trainer.create_adapter(POLICY, LoraConfig())
    await trainer.create_adapter(CRITIC, LoraConfig(), "value")
    returned = False
    with scope:
        await update(trainer, GROUPS, Config(num_epochs=1, num_minibatches=2), {})
        returned = True
    # values, logprobs, forward_backward; then the first optimizer step, from which on it goes to its end.
    assert trainer.steps == dict.fromkeys((POLICY, CRITIC), 2 if at >= 3 else 0)
    assert returned == (at >= 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_update_kl": 0.1, "num_minibatches": 1}, "--max-update-kl: one optimizer step cannot end early"),
        ({"proximal": "rollout", "correction": {"cap": 3.0}}, "--correction: not used with --proximal rollout"),
        ({"max_update_kl": 0.1, "proximal": "interpolated"}, "--max-update-kl: measured from the policy before"),
        ({"max_update_kl": 0.1, "groups_per_step": 1}, "--max-update-kl: one optimizer step cannot end early"),
        ({"clip_low": 4.0}, "--clip-low: expected at most 1, got 4"),
        ({"dynamic_sampling": 1.0}, "--dynamic-sampling: groups whose rewards are all equal do teach"),
        ({"critic": {"clip": 0.0}}, "greater than 0"),
    ],
)
def test_refuses(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Config(**settings)


def test_without_a_correction_stale_samples_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    class Stale(RecordingTrainer):
        async def forward_backward(self, name: str, samples: Sequence[Sample], loss: Loss) -> Metrics:
            return await super().forward_backward(name, samples, loss) | {"sampler_kl/mean": 0.5}

    step(Stale(), correction={"bound": "none"})
    assert "nothing corrects for it" in caplog.text


def test_the_penaltys_weight_is_adapted_from_step_to_step() -> None:
    class Far(RecordingTrainer):
        async def forward_backward(self, name: str, samples: Sequence[Sample], loss: Loss) -> Metrics:
            return await super().forward_backward(name, samples, loss) | {"kl_ref/mean": 0.5}

    async def steps() -> list[float]:
        trainer, state = Far(), {}
        await trainer.create_adapter(POLICY, LoraConfig())
        await trainer.create_adapter(CRITIC, LoraConfig(), "value")
        config = Config(kl_coef=0.1, kl_target=0.1)
        return [(await update(trainer, GROUPS, config, state))["policy/kl_coef"] for _ in range(3)]

    assert anyio.run(steps) == pytest.approx([0.1, 0.102, 0.10404])


def test_a_partial_table_of_the_critics_optimizer_keeps_its_learning_rate() -> None:
    assert Config(critic={"optim": {"beta2": 0.9}}).critic.optim.adam.lr == 1e-3


def test_without_a_sampled_token_there_is_no_step() -> None:
    trainer = RecordingTrainer()
    groups = [Group(Prompt(0, 0, 0, None), (rollout(0), rollout(0)), (1.0, 0.0), 0)]
    assert anyio.run(update, trainer, groups, Config(), {})["optim/skipped_steps"] == 1
    assert trainer.calls == []


def test_groups_of_one_are_whole() -> None:
    assert Config(group_size=1).min_group_size == 1
    assert Config().min_group_size == 2


def test_settings_of_the_credit_reach_it() -> None:
    trainer, metrics = step(trace_decay=0.0, discount=0.5)
    (batch,) = trainer.batches[POLICY]
    longest = next(sample for sample in batch if len(sample.tokens) == 7)
    np.testing.assert_allclose(longest.advantages[2:], [0.5 * 0.25 - 0.25] * 4 + [-0.25])
    assert metrics["value/explained_variance"] == 0
    trainer, _ = step(whiten=True)
    (batch,) = trainer.batches[POLICY]
    credit = np.concatenate([sample.advantages[sample.loss_mask] for sample in batch])
    assert (credit.mean(), credit.std()) == pytest.approx((0, 1), abs=1e-6)


@pytest.mark.parametrize(("kl_in", "kl_coef"), [("loss", 0.5), ("reward", 0.0)])
def test_the_losses_are_bound_with_what_is_set(kl_in: str, kl_coef: float) -> None:
    losses: dict[str, Any] = {}

    class Keeping(RecordingTrainer):
        async def forward_backward(self, name: str, samples: Sequence[Sample], loss: Loss) -> Metrics:
            losses[name] = loss
            return await super().forward_backward(name, samples, loss)

    step(Keeping(), kl_coef=0.5, kl_in=kl_in, critic={"clip": 0.25})
    assert losses[POLICY].keywords["kl_coef"] == kl_coef, "once, in the loss or in the reward"
    assert losses[CRITIC].keywords == {"clip": 0.25}
