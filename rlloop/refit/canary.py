"""A few tokens that the engine samples with a version just published, scored by the trainer: do both compute the same policy?

    publish v ──▶ each engine samples 8 x 8 tokens with v ──▶ trainer scores them ──▶ update to v + 1
                  (beside the rollouts)                       (one short forward pass, while its weights are still v's)

The digest proves that a version's bytes are in the engine; the canary, that the engine computes with them what the trainer
does: the right scale, slot and layers, the same base model and temperature.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from time import monotonic
from typing import Any

import numpy as np
from anyio import TaskHandle, create_task_group
from anyio.abc import TaskGroup

from rlloop.config import RunSettings
from rlloop.engine import Engine
from rlloop.engine.replicas import Replicas
from rlloop.errors import RefitError
from rlloop.events import Events
from rlloop.placement import resolve_dtype
from rlloop.refit.publisher import Refit
from rlloop.trainer import Trainer
from rlloop.types import Completion, FloatArray, GenerationRequest, Metrics, Sample

PROMPT = "The canary began to sing, and then"
"""Goes on in many ways, so that an answer's tokens depend on the weights."""
NUM_COMPLETIONS = 8
NUM_TOKENS = 8
"""Of each: many short ones are there sooner than one long one."""
BOUNDS = {"float32": 1e-3, "bfloat16": 0.15}
"""Greatest mean of |engine's logprob - trainer's|, in nats, by the number format of both.

On right weights they measured at most 8e-6 in 64 tokens (benchmarks/results/canary.txt), and 0.023 (h200_parity.txt; a mean of
0.05 is the most that parity allows). A single token in bfloat16 may be 0.4 off, so nothing is asked of one."""


class Canary:
    """Checks the first version that a run publishes and every `every`-th, on each engine by itself; 0: none.

    `request` is asked with other seeds and the version that is checked; its temperature is that of the trainer's logprobs.
    """

    def __init__(
        self,
        trainer: Trainer,
        engines: Sequence[Engine],
        refit: Refit,
        adapter: str,
        events: Events,
        *,
        request: GenerationRequest,
        dtype: str,
        every: int,
    ) -> None:
        self._trainer = trainer
        self._engines = engines
        self._refit = refit
        self._adapter = adapter
        self._events = events
        self._request = request
        self._dtype = dtype
        # Logits are divided by it, and so is what they are off.
        self._bound = BOUNDS[dtype] / min(1.0, request.temperature)
        self._every = every
        self._sampling: TaskHandle[list[list[Completion]], None] | None = None
        self._agreed: int | None = None
        """The last version that did."""

    def start(self, tasks: TaskGroup) -> None:
        """Have the engines sample with the newest version, in the background, if its turn has come."""
        if self._every and (self._agreed is None or self._refit.latest % self._every == 0):
            self._sampling = tasks.start_soon(self._sample)

    async def check(self) -> Metrics:
        """Compare what was started since the last check: to be called before the trainer's weights change.

        -> `refit/canary_difference`, the greatest of the engines', and `time/canary`; nothing if nothing was started. Raises
        RefitError beyond the bound.
        """
        sampling, self._sampling = self._sampling, None
        if sampling is None:
            return {}
        started = monotonic()
        of_engines, prompt = await sampling, self._request.tokens
        samples = [to_score(prompt, completion) for completions in of_engines for completion in completions]
        by_trainer = (found[len(prompt) :] for found in await self._trainer.logprobs(self._adapter, samples))
        differences = [
            self._compare(number, completions, list(islice(by_trainer, len(completions))))
            for number, completions in enumerate(of_engines)
        ]
        self._agreed = of_engines[0][0].policy_version
        return {"refit/canary_difference": max(differences), "time/canary": monotonic() - started}

    async def _sample(self) -> list[list[Completion]]:
        """What each engine answers."""
        async with self._refit.pin() as version:
            requests = [
                replace(self._request, policy_version=version, seed=version + number)
                for number in range(NUM_COMPLETIONS)
            ]
            with self._events.span("canary", "refit", policy_version=version):
                async with create_task_group() as tasks:
                    asked = [[tasks.start_soon(engine.generate, each) for each in requests] for engine in self._engines]
            return [[completion for answer in answers for completion in await answer] for answers in asked]

    def _compare(self, engine: int, completions: Sequence[Completion], by_trainer: Sequence[FloatArray]) -> float:
        """-> mean of the absolute differences, in nats."""
        by_engine = np.concatenate([completion.logprobs for completion in completions])
        differences = np.abs(by_engine - np.concatenate(by_trainer))
        difference = float(differences.mean())
        version = completions[0].policy_version
        if difference <= self._bound:  # NaN is not
            return difference
        worst = int(differences.argmax())
        places = [(c, t) for c, completion in enumerate(completions) for t in range(len(completion.tokens))]
        completion, token = places[worst]
        name = "the engine" if len(self._engines) == 1 else f"engine {engine} of {len(self._engines)}"
        raise RefitError(
            f"{name} does not compute with policy version {version} what the trainer does, though its bytes arrived: "
            f"over {len(differences)} canary tokens their logprobs differ by {difference:.2g} nats in the mean, the bound is "
            f"{self._bound:.2g} ({self._dtype}). Most at token {token} of completion {completion} (position "
            f"{len(self._request.tokens) + token}): engine {by_engine[worst]:.4f}, trainer {by_trainer[completion][token]:.4f}. "
            f"{self._advice()}"
        )

    def _advice(self) -> str:
        since, again = "No version of this attempt agreed", "start anew, or go on from before it"
        if self._agreed is not None:
            since = f"Version {self._agreed} still agreed"
            again = f"delete the checkpoints of steps after {self._agreed} and --resume"
        return (
            f"{since}; steps since then were trained on samples of another policy. Look in logs/engine.log for layers "
            f"without LoRA, try fewer --lora.targets and --engine.enforce-eager, then {again}; --refit.canary-every 0 leaves the "
            "check out"
        )


def to_score(prompt: Sequence[int], completion: Completion) -> Sample:
    """As a trainer takes it: the completion's tokens carry loss."""
    tokens = np.concatenate([np.array(prompt, np.int32), completion.tokens])
    zeros = np.zeros(len(tokens), np.float32)
    return Sample(
        tokens=tokens,
        loss_mask=np.arange(len(tokens)) >= len(prompt),
        rollout_logprobs=np.concatenate([zeros[: len(prompt)], completion.logprobs]),
        advantages=zeros,
        loss_weights=zeros,
        prompt_id=0,
    )


def open_canary(
    settings: RunSettings, tokenizer: Any, trainer: Trainer, engine: Engine, refit: Refit, adapter: str, events: Events
) -> Canary:
    """As a run's settings say. Where rollouts hop the canary does, too, for they sample from a slot of their own; no version is
    published before it is checked."""
    tokens, max_model_len = tokenizer.encode(PROMPT), settings.engine.max_model_len
    tokens = tuple(tokens)[: max_model_len // 2]
    request = GenerationRequest(
        tokens,
        policy_version=0,
        max_tokens=min(NUM_TOKENS, max_model_len - len(tokens)),
        temperature=settings.sampling.temperature,
        in_flight="hop" if settings.refit.in_flight == "hop" else "finish",
    )
    return Canary(
        trainer,
        engine.engines if isinstance(engine, Replicas) else [engine],
        refit,
        adapter,
        events,
        request=request,
        dtype=resolve_dtype(settings),
        every=settings.refit.canary_every,
    )
