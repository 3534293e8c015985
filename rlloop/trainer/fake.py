"""A trainer for tests and for measuring the loop: no model; it counts, and waits as asked."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np

from rlloop.trainer import Head, Loss
from rlloop.types import (
    AdamConfig,
    AdapterTicket,
    FloatArray,
    LoraConfig,
    Metrics,
    OptimResult,
    Sample,
    WeightsTicket,
)


class FakeTrainer:
    """See `rlloop.trainer.Trainer`. An adapter is the number of optimizer steps that it has made."""

    def __init__(self, *, delay: Callable[[], Awaitable[None]] | None = None) -> None:
        self._delay = delay
        self.steps: dict[str, int] = {}
        self.prompt_ids: list[int] = []
        """Of all samples of all forward_backward calls, in order."""

    async def create_adapter(self, name: str, lora: LoraConfig, head: Head = "policy") -> None:
        """See `Trainer.create_adapter`."""
        self.steps[name] = 0

    async def remove_adapter(self, name: str) -> None:
        """See `Trainer.remove_adapter`."""
        self.steps.pop(name, None)

    async def forward_backward(self, name: str, samples: Sequence[Sample], loss: Loss) -> Metrics:
        """See `Trainer.forward_backward`; `loss` is not called."""
        if self._delay is not None:
            await self._delay()
        self.prompt_ids += [sample.prompt_id for sample in samples]
        num_tokens = float(sum(sample.loss_mask.sum() for sample in samples))
        return {"loss": 0.0, "num_tokens": num_tokens, "num_computed_tokens": num_tokens, "mfu": 0.0}

    async def optim_step(self, name: str, adam: AdamConfig) -> OptimResult:
        """See `Trainer.optim_step`."""
        self.steps[name] += 1
        return OptimResult(grad_norm=1.0, skipped=False)

    async def logprobs(self, name: str | None, samples: Sequence[Sample]) -> list[FloatArray]:
        """See `Trainer.logprobs`: always those of the engine."""
        return [sample.rollout_logprobs for sample in samples]

    async def values(self, name: str, samples: Sequence[Sample]) -> list[FloatArray]:
        """See `Trainer.values`: 0."""
        return [np.zeros(len(sample.tokens), np.float32) for sample in samples]

    async def export_adapter(self, name: str) -> AdapterTicket:
        """See `Trainer.export_adapter`; a ticket for no bytes."""
        return AdapterTicket((), "float32", f"fake-{self.steps[name]}", "memory", "", 0, 0.0)

    @asynccontextmanager
    async def sending_weights(self, name: str) -> AsyncIterator[WeightsTicket]:
        """See `Trainer.sending_weights`; nobody gets any."""
        yield WeightsTicket(f"fake-{self.steps[name]}")

    async def save(self, name: str, folder: Path) -> None:
        """See `Trainer.save`."""
        (folder / "state").mkdir(parents=True)
        (folder / "state" / "fake.json").write_text(json.dumps({"steps": self.steps[name]}))

    async def load(self, name: str, folder: Path) -> None:
        """See `Trainer.load`."""
        self.steps[name] = json.loads((folder / "state" / "fake.json").read_text())["steps"]
