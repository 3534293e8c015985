"""The canary on fakes that compute: a logprob is made of the tokens, and of how many optimizer steps the weights have seen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace

import anyio
import numpy as np
import pytest

from rlloop.config import RunSettings
from rlloop.engine.fake import FakeEngine
from rlloop.engine.replicas import Replicas
from rlloop.errors import RefitError
from rlloop.events import Events
from rlloop.refit.canary import NUM_COMPLETIONS, Canary, open_canary
from rlloop.refit.publisher import Refit
from rlloop.trainer.fake import FakeTrainer
from rlloop.types import (
    AdamConfig,
    AdapterTicket,
    Completion,
    FloatArray,
    GenerationRequest,
    InFlight,
    IntArray,
    LoraConfig,
    RefitReport,
    Sample,
)

pytestmark = pytest.mark.anyio
PROMPT = (11, 12, 13)


def logprobs(tokens: IntArray, steps: int, scale: float = 1.0) -> FloatArray:
    return (-3 - 0.1 * scale * steps * np.sin(tokens)).astype(np.float32)


class Engine(FakeEngine):
    """`serve` says which weights a version is served with, `scale` what they are multiplied by, `noise` how it rounds."""

    def __init__(self) -> None:
        super().__init__(num_tokens=6)
        self.steps: dict[int, int] = {}
        self.serve = lambda version: version
        self.scale = 1.0
        self.noise = 0.0
        self.requests: list[GenerationRequest] = []

    async def publish(self, version: int, ticket: AdapterTicket) -> RefitReport:
        self.steps[version] = int(ticket.digest.removeprefix("fake-"))
        return await super().publish(version, ticket)

    async def generate(self, request: GenerationRequest) -> list[Completion]:
        self.requests.append(request)
        completions = await super().generate(request)
        rng = np.random.default_rng(request.seed)
        steps = self.steps[self.serve(request.policy_version)]
        return [
            replace(
                each,
                logprobs=logprobs(each.tokens, steps, self.scale)
                + rng.normal(0, self.noise, len(each.tokens)).astype(np.float32),
            )
            for each in completions
        ]


class Trainer(FakeTrainer):
    def __init__(self) -> None:
        super().__init__()
        self.scored: list[Sample] = []

    async def logprobs(self, name: str | None, samples: Sequence[Sample]) -> list[FloatArray]:
        self.scored = list(samples)
        assert name is not None
        return [np.where(each.loss_mask, logprobs(each.tokens, self.steps[name]), 0) for each in samples]


class Harness:
    def __init__(
        self, *, dtype: str = "float32", temperature: float = 1.0, every: int = 1, num_engines: int = 1
    ) -> None:
        self.engines, self.trainer = [Engine() for _ in range(num_engines)], Trainer()
        self.engine = self.engines[-1]
        self.served = Replicas(self.engines) if num_engines > 1 else self.engine
        self.refit = Refit(self.trainer, self.served, "policy", 3, Events(None))
        self.canary = Canary(
            self.trainer,
            self.engines,
            self.refit,
            "policy",
            Events(None),
            request=GenerationRequest(PROMPT, 0, 8, temperature),
            dtype=dtype,
            every=every,
        )

    async def difference(self, num_versions: int) -> list[float]:
        """Of versions 0, 1, ...; a step is made between them. NaN where there was no canary."""
        await self.trainer.create_adapter("critic", LoraConfig(), "value")
        await self.trainer.create_adapter("policy", LoraConfig())
        found = []
        async with anyio.create_task_group() as tasks:
            for version in range(num_versions):
                await self.refit.publish(version)
                self.canary.start(tasks)
                found.append((await self.canary.check()).get("refit/canary_difference", math.nan))
                await self.trainer.optim_step("policy", AdamConfig(lr=1.0))
        return found

    async def refused(self, num_versions: int) -> str:
        with pytest.raises(ExceptionGroup) as caught:
            await self.difference(num_versions)
        [error] = caught.value.exceptions
        assert isinstance(error, RefitError)
        return str(error)


async def test_agreement(anyio_backend: str) -> None:
    harness = Harness(temperature=0.7)
    assert await harness.difference(4) == [0.0] * 4
    request = harness.engine.requests[-1]
    assert (request.tokens, request.policy_version, request.temperature) == (PROMPT, 3, 0.7)
    assert {each.seed for each in harness.engine.requests[-NUM_COMPLETIONS:]} == {*range(3, 3 + NUM_COMPLETIONS)}
    for sample in harness.trainer.scored:
        assert sample.tokens[:3].tolist() == list(PROMPT)
        assert sample.loss_mask.tolist() == [False] * 3 + [True] * 6
        assert not sample.rollout_logprobs[:3].any()
        assert sample.rollout_logprobs[3:].all()


@pytest.mark.parametrize(("every", "expected"), [(1, "yyyyyyy"), (3, "ynnynny"), (0, "nnnnnnn")])
async def test_the_first_version_and_every_nth(every: int, expected: str, anyio_backend: str) -> None:
    found = await Harness(every=every).difference(7)
    assert "".join("n" if math.isnan(each) else "y" for each in found) == expected


async def test_the_first_version_is_checked_whatever_its_number(anyio_backend: str) -> None:
    """Of a run that is resumed."""
    harness = Harness(every=10)
    await harness.trainer.create_adapter("policy", LoraConfig())
    async with anyio.create_task_group() as tasks:
        for version, expected in ((7, 0.0), (8, None)):
            await harness.refit.publish(version)
            harness.canary.start(tasks)
            assert (await harness.canary.check()).get("refit/canary_difference") == expected


async def test_the_version_before_is_caught(anyio_backend: str) -> None:
    harness = Harness()
    harness.engine.serve = lambda version: min(version, 2)  # from version 3 on the weights do not arrive
    message = await harness.refused(6)
    assert "policy version 3 " in message
    assert "Version 2 still agreed" in message


@pytest.mark.parametrize("in_flight", ["finish", "restart", "hop"])
@pytest.mark.parametrize("num_engines", [1, 2])
async def test_each_engine_is_asked_as_rollouts_are(in_flight: InFlight, num_engines: int, anyio_backend: str) -> None:
    harness = Harness(num_engines=num_engines)
    settings = RunSettings(
        refit={"in_flight": in_flight}, engine={"max_model_len": 16}, sampling={"temperature": 0.7, "max_tokens": 8}
    )
    tokenizer = SimpleNamespace(encode=lambda text: [*range(11, 40)])
    harness.canary = open_canary(
        settings, tokenizer, harness.trainer, harness.served, harness.refit, "policy", Events(None)
    )
    assert await harness.difference(1) == [0.0]
    for engine in harness.engines:
        found = {(each.tokens, each.max_tokens, each.temperature, each.in_flight, each.n) for each in engine.requests}
        assert found == {((*range(11, 19),), 8, 0.7, "hop" if in_flight == "hop" else "finish", 1)}
        assert len(engine.requests) == NUM_COMPLETIONS


async def test_one_engine_of_many_is_caught_by_itself(anyio_backend: str) -> None:
    harness = Harness(num_engines=12)
    harness.engine.scale = 1.02  # over all engines' tokens the mean would be within the bound
    message = await harness.refused(4)
    assert message.startswith("engine 11 of 12 does not compute with policy version 1 ")
    assert f"over {6 * NUM_COMPLETIONS} canary tokens their logprobs differ by 0.0013 nats" in message


async def test_a_wrong_scale_is_caught_and_the_message_says_all(anyio_backend: str) -> None:
    harness = Harness()
    harness.engine.scale = 2.0
    message = await harness.refused(6)
    # Tokens are those of seeds 1 to 8: 1, 2, ... Version 0 is the base model on any scale.
    tokens = np.array([np.arange(first, first + 6) for first in range(1, 1 + NUM_COMPLETIONS)])
    gaps = 0.1 * np.abs(np.sin(tokens))
    completion, token = np.unravel_index(gaps.argmax(), gaps.shape)
    right, wrong = (logprobs(tokens[completion], 1, scale)[token] for scale in (1.0, 2.0))
    for part in (
        "policy version 1 ",
        f"over {tokens.size} canary tokens",
        f"{gaps.mean():.2g} nats in the mean",
        "the bound is 0.001 (float32)",
        f"token {token} of completion {completion} (position {3 + token})",
        f"engine {wrong:.4f}, trainer {right:.4f}",
        "Version 0 still agreed",
        "--lora.targets",
        "checkpoint",
        "--refit.canary-every 0",
    ):
        assert part in message


async def test_logprobs_that_are_not_numbers_are_caught(anyio_backend: str) -> None:
    harness = Harness()
    harness.engine.noise = math.nan
    assert "No version of this attempt agreed" in await harness.refused(1)


async def test_bfloat16_rounds_and_is_no_error(anyio_backend: str) -> None:
    """As measured: 0.05 in the mean, single tokens far off."""
    harness = Harness(dtype="bfloat16")
    harness.engine.noise = 0.06
    assert all(0.02 < each < 0.1 for each in await harness.difference(5))


async def test_a_policy_that_has_moved_is_told_from_the_base_in_bfloat16(anyio_backend: str) -> None:
    harness = Harness(dtype="bfloat16", every=10)
    harness.engine.noise = 0.06
    harness.engine.serve = lambda version: 0
    assert "policy version 10 " in await harness.refused(12)


async def test_a_low_temperature_magnifies_what_logits_are_off(anyio_backend: str) -> None:
    harness = Harness(dtype="bfloat16", temperature=0.25)
    harness.engine.noise = 0.24
    assert all(0.15 < each < 0.4 for each in await harness.difference(3))
