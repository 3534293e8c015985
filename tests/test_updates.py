import math
from typing import Any

import anyio
import numpy as np
import pytest

from rlloop.errors import TornUpdate, TrainerError
from rlloop.losses import clipped
from rlloop.policy_settings import PolicySettings
from rlloop.trainer.tokens import Summary
from rlloop.types import AdamConfig, Metrics, OptimResult, Sample
from rlloop.updates import (
    PER_TOKEN,
    adapted_kl_coef,
    after_step,
    bind_policy_loss,
    made_whole,
    merged,
    optimizer_step,
    present_kl_coef,
    value_step,
    warn_if_stale,
)

ADAM = AdamConfig(lr=0.25)


class Trainer:
    """Its optimizer step takes a while, and is made although nobody may be waiting for it."""

    def __init__(self, *, skipped: bool = False) -> None:
        self.log: list[str] = []
        self._skipped = skipped

    async def forward_backward(self, name: str, samples: list[Sample], loss: Any) -> Metrics:
        self.log.append(f"forward_backward {name} {len(samples)}")
        await anyio.sleep(0.01)
        reduced = dict.fromkeys(PER_TOKEN.values(), 0.5)
        return {"loss": 2.0, "num_tokens": 6.0, "mfu": 0.1, **reduced}

    async def optim_step(self, name: str, adam: AdamConfig) -> OptimResult:
        self.log.append(f"optim_step {name} {adam.lr}")
        await anyio.sleep(0.02)
        self.log.append("answered")
        return OptimResult(grad_norm=float("nan") if self._skipped else 3.0, skipped=self._skipped)


def samples() -> list[Sample]:
    row = np.ones(4, np.float32)
    return [Sample(row.astype(np.int32), row.astype(bool), row, row, row, prompt_id=i) for i in range(2)]


async def step(trainer: Any, batch: list[Sample]) -> Metrics:
    return await optimizer_step(trainer, "policy", batch, None, ADAM)  # type: ignore[arg-type]


@pytest.mark.anyio
async def test_one_step(anyio_backend: str) -> None:
    trainer = Trainer()
    metrics = await step(trainer, samples())
    assert trainer.log == ["forward_backward policy 2", "optim_step policy 0.25", "answered"]
    assert metrics["loss/policy"] == 2.0
    assert metrics["optim/grad_norm"] == 3.0
    assert metrics["optim/lr"] == 0.25
    assert metrics["optim/skipped_steps"] == 0
    assert {metrics[name] for name in PER_TOKEN} == {0.5}
    assert metrics["time/forward_backward"] >= 0.009
    assert metrics["time/optimizer"] >= 0.019


@pytest.mark.anyio
async def test_a_step_that_the_trainer_skips_is_counted_and_keeps_its_raw_norm(anyio_backend: str) -> None:
    metrics = await step(Trainer(skipped=True), samples())
    assert (metrics["optim/skipped_steps"], metrics["optim/nonfinite_steps"]) == (1, 1)
    assert np.isnan(metrics["optim/grad_norm"])


@pytest.mark.anyio
async def test_a_batch_without_samples_makes_no_step(anyio_backend: str) -> None:
    trainer = Trainer()
    metrics = await step(trainer, [])
    assert trainer.log == []
    assert metrics["optim/skipped_steps"] == 1
    assert "optim/nonfinite_steps" not in metrics


@pytest.mark.anyio
async def test_cancelled_in_the_forward_pass_no_step_is_made(anyio_backend: str) -> None:
    trainer = Trainer()
    with anyio.move_on_after(0.005):
        await step(trainer, samples())
        pytest.fail("it was to be cancelled")
    assert trainer.log == ["forward_backward policy 2"]


@pytest.mark.anyio
async def test_cancelled_in_the_optimizer_step_the_caller_still_hears_of_it(anyio_backend: str) -> None:
    trainer = Trainer()
    heard = []
    with anyio.move_on_after(0.02):
        heard.append(await step(trainer, samples()))
    assert len(heard) == 1
    assert trainer.log[-1] == "answered"


def test_samples_that_nothing_corrects_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    warn_if_stale({"policy/sampler_kl_mean": 0.009})
    warn_if_stale({})
    warn_if_stale({"policy/sampler_kl_mean": float("nan")})
    assert not caplog.records
    warn_if_stale({"policy/sampler_kl_mean": 0.2})
    assert "samples were 0.2 nats a token from the trainer's policy" in caplog.text


@pytest.mark.anyio
async def test_a_value_step_reports_beside_the_policys(anyio_backend: str) -> None:
    trainer = Trainer()
    metrics = await value_step(trainer, "critic", samples(), None, ADAM)  # type: ignore[arg-type]
    assert trainer.log == ["forward_backward critic 2", "optim_step critic 0.25", "answered"]
    assert (metrics["loss/value"], metrics["value/grad_norm"], metrics["value/nonfinite_steps"]) == (2.0, 3.0, 0.0)
    assert not metrics.keys() & (await step(trainer, samples())).keys()


def test_merged_steps() -> None:
    steps = [
        {"loss/policy": 1.0, "optim/skipped_steps": 1.0, "time/optimizer": 0.25, "policy/sampler_kl_max": 0.5},
        {"loss/policy": 2.0, "optim/skipped_steps": 1.0, "time/optimizer": 0.5, "policy/sampler_kl_max": 0.25},
    ]
    expected = {"loss/policy": 1.5, "optim/skipped_steps": 2.0, "time/optimizer": 0.75, "policy/sampler_kl_max": 0.5}
    assert merged(steps) == expected
    assert merged([{"value/mean": 3.0}, *steps]) == {"value/mean": 3.0, **expected}


def test_a_greatest_value_that_is_no_number_is_kept() -> None:
    kinds: list[Metrics] = [{"policy/sampler_kl_max": 0.5}, {"policy/sampler_kl_max": math.nan}]
    parts = [Summary(num_tokens=1, sums={"kl": each}, maxima={"kl": each}) for each in (0.5, math.nan)]
    for step in (1, -1):
        assert math.isnan(merged(kinds[::step])["policy/sampler_kl_max"])
        assert math.isnan(Summary.merge(parts[::step]).maxima["kl"])


def test_means_over_tokens_are_merged_by_tokens_and_rates_by_time() -> None:
    few = {"policy/kl_ref": 1.0, "value/clip_frac": 1.0, "value/grad_norm": 1.0, "progress/tokens_trained": 10.0}
    many = {"policy/kl_ref": 0.2, "value/clip_frac": 0.2, "value/grad_norm": 2.0, "progress/tokens_trained": 30.0}
    few |= {"perf/train_tokens_per_second": 100.0, "time/forward_backward": 3.0}
    many |= {"perf/train_tokens_per_second": 200.0, "time/forward_backward": 1.0}
    assert merged([few, many]) == {
        "policy/kl_ref": pytest.approx(0.4),
        "value/clip_frac": pytest.approx(0.4),
        "value/grad_norm": 1.5,
        "progress/tokens_trained": 40.0,
        "perf/train_tokens_per_second": 125.0,
        "time/forward_backward": 4.0,
    }


@pytest.mark.parametrize(
    ("kl", "expected"),
    [(0.11, 0.5 * 1.01), (0.05, 0.5 * 0.98), (0.5, 0.5 * 1.02), (0.1, 0.5)],
)
def test_adapted_kl_coef(kl: float, expected: float) -> None:
    assert adapted_kl_coef(0.5, kl, 0.1) == pytest.approx(expected, abs=1e-12)


def test_the_penaltys_weight_is_kept_only_for_a_target() -> None:
    state: dict[str, float] = {}
    fixed, adaptive = PolicySettings(kl_coef=0.1), PolicySettings(kl_coef=0.1, kl_target=0.2)
    after_step(fixed, state, {"policy/kl_ref": 1.0})
    after_step(adaptive, state, {"policy/kl_ref": float("nan")})
    after_step(adaptive, state, {})
    assert state == {}
    after_step(adaptive, state, {"policy/kl_ref": 1.0})
    assert present_kl_coef(adaptive, state) == pytest.approx(0.102)
    assert present_kl_coef(fixed, state) == 0.1, "what is set wins in a resumed run"


@pytest.mark.parametrize("has_begun", [False, True])
def test_an_update_that_fails_halfway_is_torn(has_begun: bool) -> None:
    async def fail() -> None:
        with made_whole() as begin:
            if has_begun:
                begin()
            raise TrainerError("gone")

    with pytest.raises(TrainerError, match="gone") as caught:
        anyio.run(fail)
    assert isinstance(caught.value, TornUpdate) == has_begun


def test_the_policys_loss_is_bound_with_what_is_set() -> None:
    settings = PolicySettings(
        clip_low=0.1,
        clip_high=0.3,
        proximal="interpolated",
        correction={"level": "sequence", "bound": "mask", "floor": 0.5, "cap": 3.0},
        kl_coef=0.1,
        kl_estimator="k1",
    )
    found = dict(bind_policy_loss(settings, clipped, 0.05).keywords)  # type: ignore[attr-defined]
    surrogate = found.pop("surrogate")
    assert (surrogate.func, surrogate.keywords) == (clipped, {"clip_low": 0.1, "clip_high": 0.3})
    assert found == {
        "proximal": "interpolated",
        "correction": {"level": "sequence", "bound": "mask", "floor": 0.5, "cap": 3.0},
        "kl_coef": 0.05,
        "kl_estimator": "k1",
    }


@pytest.mark.anyio
async def test_a_critics_step_that_the_trainer_skips_is_counted(anyio_backend: str) -> None:
    metrics = await value_step(Trainer(skipped=True), "critic", samples(), None, ADAM)  # type: ignore[arg-type]
    assert metrics["value/nonfinite_steps"] == 1


@pytest.mark.anyio
async def test_tokens_per_second_are_of_the_forward_and_backward_pass(anyio_backend: str) -> None:
    metrics = await step(Trainer(), samples())
    assert metrics["perf/train_tokens_per_second"] == pytest.approx(2 * 4 / metrics["time/forward_backward"])
