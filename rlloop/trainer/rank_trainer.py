"""The event loop's side of a trainer that runs in rank processes. It imports no torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import ClassVar, TypeVar

from anyio import create_task_group

from rlloop.config import TrainerSettings
from rlloop.errors import EngineError, RankDied, RlloopError
from rlloop.events import Events
from rlloop.trainer import AdapterWriter, Head, Loss, WeightsWriter
from rlloop.trainer.flat import Flat
from rlloop.trainer.ranks import Interrupted, Ranks, RankSpec
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

SelfT = TypeVar("SelfT", bound="RankTrainer")


@dataclass(frozen=True, slots=True)
class RankArguments:
    """What a rank is built from, in its process."""

    model: str
    dtype: str
    settings: TrainerSettings
    temperature: float
    writer: AdapterWriter
    sender: WeightsWriter | None
    seed: int


class RankTrainer(ABC):
    """A Trainer (see `rlloop.trainer`) whose ranks have its methods, by the same names, without `async`.

    Enter it to start the processes; the first call waits until the model is loaded. `model` is a folder in transformers'
    format, `dtype` that of the frozen base (adapters and optimizers are fp32), `temperature` the one that samples are drawn
    at. `cores` pins the ranks on a CPU; `visible_gpus` is their CUDA_VISIBLE_DEVICES; `log_path` takes what their libraries
    print; `events` the spans.
    """

    build_rank: ClassVar[Callable[..., object]]
    """(context, **what `_specs` binds) -> the rank. Runs in its process, so it is picklable; a subclass may wrap it."""

    def __init__(
        self,
        model: str,
        *,
        dtype: str,
        settings: TrainerSettings,
        temperature: float,
        writer: AdapterWriter,
        sender: WeightsWriter | None = None,
        cores: frozenset[int] | None = None,
        visible_gpus: str | None = None,
        seed: int = 0,
        log_path: Path | None = None,
        events: Events | None = None,
    ) -> None:
        arguments = RankArguments(model, dtype, settings, temperature, writer, sender, seed)
        self._events = events or Events(None)
        self._sender = sender
        specs = self._specs(arguments, cores, log_path)
        self._ranks = Ranks([replace(spec, visible_gpus=visible_gpus) for spec in specs])

    @abstractmethod
    def _specs(self, arguments: RankArguments, cores: frozenset[int] | None, log_path: Path | None) -> list[RankSpec]:
        """How to start each rank. Raises ConfigError for settings that do not fit the model."""

    async def __aenter__(self: SelfT) -> SelfT:
        await self._ranks.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._ranks.close()

    async def create_adapter(self, name: str, lora: LoraConfig, head: Head = "policy") -> None:
        """See `Trainer.create_adapter`."""
        await self._ranks.call("create_adapter", name, lora, head)

    async def remove_adapter(self, name: str) -> None:
        """See `Trainer.remove_adapter`."""
        await self._ranks.call("remove_adapter", name)

    async def forward_backward(self, name: str, samples: Sequence[Sample], loss: Loss) -> Metrics:
        """See `Trainer.forward_backward`."""
        with self._events.span("forward_backward", "trainer", num_samples=len(samples)):
            metrics: Metrics = await self._ranks.call("forward_backward", name, Flat(samples), loss)
        return metrics

    async def optim_step(self, name: str, adam: AdamConfig) -> OptimResult:
        """See `Trainer.optim_step`."""
        with self._events.span("optim_step", "trainer"):
            result: OptimResult = await self._ranks.call("optim_step", name, adam)
        return result

    async def logprobs(self, name: str | None, samples: Sequence[Sample]) -> list[FloatArray]:
        """See `Trainer.logprobs`."""
        return await self._outputs("logprobs", name, samples)

    async def values(self, name: str, samples: Sequence[Sample]) -> list[FloatArray]:
        """See `Trainer.values`."""
        return await self._outputs("values", name, samples)

    async def export_adapter(self, name: str) -> AdapterTicket:
        """See `Trainer.export_adapter`."""
        with self._events.span("export_adapter", "trainer"):
            ticket: AdapterTicket = await self._ranks.call("export_adapter", name)
        return ticket

    @asynccontextmanager
    async def sending_weights(self, name: str) -> AsyncIterator[WeightsTicket]:
        """See `Trainer.sending_weights`."""
        assert self._sender is not None
        errors: list[Exception] = []
        has_begun = False

        async def send() -> None:
            nonlocal has_begun
            has_begun = True
            try:
                await self._ranks.call("send_weights", name)
            except Interrupted:
                assert errors  # of the block
            except RlloopError as error:  # the engine's side hears of it, and the block ends
                errors.insert(0, error)
                if isinstance(error, RankDied):
                    self._ranks.kill()

        with self._events.span("send_weights", "trainer"):
            async with create_task_group() as tasks:
                tasks.start_soon(send)
                try:
                    yield WeightsTicket(self._sender.location)
                except Exception as error:
                    errors.append(error)
                    if has_begun:
                        self._ranks.interrupt()  # and wait for what it says
                    else:
                        tasks.cancel_scope.cancel()
        if errors:
            raise next((error for error in errors if isinstance(error, EngineError)), errors[0])

    async def save(self, name: str, folder: Path) -> None:
        """See `Trainer.save`. A forward_backward that is running raises Interrupted."""
        self._ranks.interrupt()
        await self._ranks.call("save", name, folder)

    async def load(self, name: str, folder: Path) -> None:
        """See `Trainer.load`."""
        await self._ranks.call("load", name, folder)

    async def _outputs(self, method: str, name: str | None, samples: Sequence[Sample]) -> list[FloatArray]:
        with self._events.span(method, "trainer", num_samples=len(samples)):
            outputs: list[FloatArray] = await self._ranks.call(method, name, Flat(samples))
        return outputs
