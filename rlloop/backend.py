"""Engine and trainer of one base model: started for a run, or once for several that follow each other.

    async with open_backend(settings, marker, folder) as backend:
        for seed in range(3):
            await grpo.train(settings.model_copy(update={"seed": seed, "run_dir": ...}), marker, backend)

Starting vLLM takes longer than a short run; the base model is frozen, so nothing of one run is left for the next.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from anyio import CancelScope, create_task_group, to_thread

from rlloop.config import EngineSettings, RefitSettings, RunSettings, TrainingSettings
from rlloop.engine import Engine
from rlloop.engine.replicas import Replicas
from rlloop.errors import ConfigError, one_line
from rlloop.events import Events
from rlloop.models import resolve_model
from rlloop.placement import Placement, place
from rlloop.processes import shared_memory_prefix
from rlloop.trainer import Trainer
from rlloop.types import LoraConfig

_SHARED = ("model", "chat_template_kwargs", "dtype", "engine", "placement", "trainer", "refit")


@dataclass(frozen=True, slots=True)
class Backend:
    """What `open_backend` yields."""

    settings: RunSettings
    engine: Engine
    trainer: Trainer
    tokenizer: Any

    def check(self, settings: RunSettings) -> None:
        """Raises ConfigError where a run's settings are not those of this backend, or need more than it has."""
        own = self.settings
        differences = [
            f"{name} {getattr(settings, name)}" for name in _SHARED if getattr(settings, name) != getattr(own, name)
        ]
        if settings.sampling.temperature != own.sampling.temperature:
            differences.append(f"sampling.temperature {settings.sampling.temperature}")
        if settings.lora.rank > own.lora.rank:
            differences.append(f"lora.rank {settings.lora.rank}")
        more = {*settings.lora.targets}.difference(own.lora.targets)
        if more and own.refit.form == "adapter":  # the engine has slots for others alone
            differences.append(f"lora.targets {', '.join(sorted(more))}")
        if settings.num_versions > own.num_versions:
            differences.append(f"room for {settings.num_versions} policy versions (staleness, evaluation)")
        if differences:
            raise ConfigError(
                f"the run does not fit the backend that it is given: it wants {', '.join(differences)}; start the backend "
                "with settings that every run fits, or another one"
            )


@asynccontextmanager
async def open_trainer(
    settings: TrainingSettings,
    model: str,
    placement: Placement,
    marker: str,
    folder: Path,
    events: Events,
    *,
    temperature: float = 1.0,
    refit: RefitSettings | None = None,
) -> AsyncIterator[Trainer]:
    """Start the trainer alone; `model` is a folder. See `open_backend`.

    `temperature` is that of the distributions whose logprobs it computes; `refit` says how the placement's engines get what it
    trains.
    """
    from rlloop.refit.stream import WeightsSender
    from rlloop.refit.transports import make_writer
    from rlloop.trainer.kinds import trainer_class

    refit = refit or RefitSettings()
    transport = refit.transport
    if transport == "auto":
        transport = "memory" if placement.trainer_cores else "cuda_ipc"
    segment, num_readers = f"{shared_memory_prefix(marker)}refit", placement.replicas * placement.tensor_parallel
    writer = make_writer(transport, placement.dtype, segment, folder / "refit", num_readers)
    sender = WeightsSender(transport, placement.dtype, segment, num_readers) if refit.form == "full" else None
    trainer = trainer_class(settings.trainer.kind)(
        model,
        dtype=placement.dtype,
        settings=settings.trainer,
        temperature=temperature,
        seed=settings.seed,
        writer=writer,
        sender=sender,
        cores=placement.trainer_cores,
        visible_gpus=placement.trainer_devices,
        log_path=folder / "logs" / "trainer.log",
        events=events,
    )
    async with trainer:
        yield trainer


async def _nothing(trainer: Trainer) -> None:
    pass


@asynccontextmanager
async def open_backend(
    settings: RunSettings,
    marker: str,
    folder: Path,
    *,
    placement: Placement | None = None,
    events: Events | None = None,
    prepare: Callable[[Trainer], Coroutine[Any, Any, None]] = _nothing,
) -> AsyncIterator[Backend]:
    """Start engine and trainer side by side; on leaving, end them.

    `settings` say what it offers: the greatest LoRA rank, all layers that get an adapter, and the policy versions that it serves
    at once. `marker` is that of `rlloop.processes.guard`; logs are written to `folder`/logs, and the trainer's spans, unless
    there are `events` for them, to `folder`/events.jsonl. `prepare` gets the trainer while the engine starts. Raises RlloopError.
    """
    if placement is None:
        placement = await to_thread.run_sync(place, settings)
    model = str(await to_thread.run_sync(resolve_model, settings.model))
    tokenizer = await to_thread.run_sync(load_tokenizer, model, settings.chat_template_kwargs)
    logs = folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    async with AsyncExitStack() as stack:
        if events is None:
            events = Events(folder / "events.jsonl")
            stack.callback(events.close)
        trainer = await stack.enter_async_context(
            open_trainer(
                settings,
                model,
                placement,
                marker,
                folder,
                events,
                temperature=settings.sampling.temperature,
                refit=settings.refit,
            )
        )
        engines: dict[int, Engine] = {}
        open_engines = [AsyncExitStack() for _ in range(placement.replicas)]
        stack.push_async_callback(_close, open_engines)

        async def start(replica: int) -> None:
            engine = _engine(settings, placement, model, logs, replica)
            engines[replica] = await open_engines[replica].enter_async_context(engine)

        async with create_task_group() as tasks:
            tasks.start_soon(prepare, trainer)
            for replica in range(placement.replicas):
                tasks.start_soon(start, replica)
        ordered = [engines[replica] for replica in sorted(engines)]
        yield Backend(settings, ordered[0] if len(ordered) == 1 else Replicas(ordered), trainer, tokenizer)


async def _close(stacks: Sequence[AsyncExitStack]) -> None:
    """All at once, for an engine's end takes seconds."""
    with CancelScope(shield=True):
        async with create_task_group() as tasks:
            for stack in stacks:
                tasks.start_soon(stack.aclose)


def _engine(
    settings: RunSettings, placement: Placement, model: str, logs: Path, replica: int
) -> AbstractAsyncContextManager[Engine]:
    """One of the placement's."""
    from rlloop.engine.vllm import start_vllm

    return start_vllm(
        model,
        _engine_settings(settings, placement),
        dtype=placement.dtype,
        lora=LoraConfig(**dict(settings.lora)),
        num_versions=settings.num_versions,
        serves_hops=settings.refit.in_flight == "hop",
        form=settings.refit.form,
        log_path=logs / (f"engine-{replica}.log" if placement.replicas > 1 else "engine.log"),
        cores=placement.cores_of(replica),
        gpus=placement.gpus_of(replica),
        tensor_parallel=placement.tensor_parallel,
    )


def _engine_settings(settings: RunSettings, placement: Placement) -> EngineSettings:
    """With what the run and the placement come to, where they leave it open."""
    in_flight = settings.num_slots * settings.group_size + settings.num_held_out * settings.evaluation.group_size
    chosen = {"kv_cache_gib": placement.kv_cache_gib, "max_num_seqs": min(512, max(64, in_flight))}
    return settings.engine.model_copy(
        update={name: value for name, value in chosen.items() if getattr(settings.engine, name) is None}
    )


def load_tokenizer(model: str, chat_template_kwargs: Mapping[str, Any]) -> Any:
    """That of a folder in transformers' format; its chat template gets these variables, whoever renders it.

    Raises ConfigError where there is none.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--model: expected a model with its tokenizer's files, got {model}: {one_line(error)}"
        ) from error
    if chat_template_kwargs:
        tokenizer.apply_chat_template = partial(tokenizer.apply_chat_template, **chat_template_kwargs)
    return tokenizer
