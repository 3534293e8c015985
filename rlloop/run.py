"""A run: everything that the loop needs, made from the settings, and put away in the right order."""

from __future__ import annotations

import gc
import logging
import math
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any, TypeAlias, TypeVar

import anyio
from anyio import CancelScope, create_task_group, to_thread

from rlloop.adapters import POLICY, Adapters, adapter_folder, create_adapters
from rlloop.backend import Backend, open_backend
from rlloop.checkpoint import Checkpoint, write_checkpoint
from rlloop.config import RunSettings, TrainingSettings
from rlloop.engine import Engine
from rlloop.environment import Environment, PromptTooLong, load_environment
from rlloop.errors import (
    BadEnvironmentError,
    CheckpointError,
    ConfigError,
    RankDied,
    RunDirectoryError,
    TornUpdate,
    first_error,
)
from rlloop.evaluation import Evaluation
from rlloop.events import Events
from rlloop.failures import FailureLog
from rlloop.ledger import Ledger, derive_seed, fingerprint
from rlloop.loop import Loop, Step
from rlloop.metrics import StepMetrics, completion_rows
from rlloop.models import check_adapter, resolve_model
from rlloop.placement import place
from rlloop.plugins import check_installed
from rlloop.processes import guard
from rlloop.refit.canary import open_canary
from rlloop.refit.publisher import Refit
from rlloop.rewards import Scorer
from rlloop.rollouts import make_task, sample_group
from rlloop.run_directory import RunDirectory, open_run_directory
from rlloop.signals import stop_on_signals
from rlloop.staleness import Backlog
from rlloop.tracking import Trackers, check_trackers, open_trackers
from rlloop.trainer import Head, Trainer
from rlloop.types import Failure, Group, InFlight, LoraConfig, Metrics, Prompt

Update: TypeAlias = Callable[[Trainer, list[Group]], Awaitable[Metrics]]
"""Trains the adapter `POLICY` on the groups of one step; cancelled, it has made all of its optimizer steps or none."""

SettingsT = TypeVar("SettingsT", bound=TrainingSettings)

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """What `open_run` yields. Implements `rlloop.loop.Stages`."""

    settings: RunSettings
    directory: RunDirectory
    environment: Environment
    scorer: Scorer
    tokenizer: Any
    engine: Engine
    trainer: Trainer
    refit: Refit
    ledger: Ledger
    events: Events
    tracker: Trackers
    adapters: tuple[str, ...]
    """All that are saved."""
    state: dict[str, float]
    """What an algorithm keeps between steps beside adapters; saved with them."""

    async def train(self, update: Update) -> None:
        """Run the loop to its last step. A checkpoint is written every so often, and at the end however it comes."""
        settings, checkpoint = self.settings, self.directory.checkpoint
        first_step = checkpoint.step if checkpoint else 0
        self._update = update
        self.loop = loop = Loop(
            self,
            self.refit,
            self.ledger,
            Backlog(settings.groups_per_step, settings.max_staleness, settings.on_stale, settings.staleness_limit),
            groups_per_step=settings.groups_per_step,
            num_slots=settings.num_slots,
            num_steps=settings.num_steps,
            min_group_size=settings.min_group_size,
            max_filtered=math.ceil(settings.dynamic_sampling * settings.groups_per_step),
            first_step=first_step,
        )
        self._metrics = StepMetrics(loop, self.ledger, self.engine)
        self._metrics.totals.update(checkpoint.manifest["totals"] if checkpoint else {})
        self._saved = first_step
        self._checkpoint_seconds = 0.0
        self._failures = FailureLog()
        self._evaluation = self._open_evaluation()
        self._canary = open_canary(settings, self.tokenizer, self.trainer, self.engine, self.refit, POLICY, self.events)
        async with create_task_group() as self._tasks:
            try:
                await self.refit.publish(first_step)
                self._canary.start(self._tasks)
                await self._evaluate(first_step)
                await loop.run()
                await self._canary.check()
                await self._save()  # before the last evaluation, which may take its time
            except BaseException as end:
                with CancelScope(shield=True):
                    try:
                        await self._save_unless_torn(end)
                    # The trainer may be what died; the first error is the one to raise.
                    except (CheckpointError, RankDied, RunDirectoryError, TornUpdate) as error:
                        logger.error("what came after step %d is lost: %s", self._saved, error)
                raise

    def task(self, index: int) -> Any:
        """See `Stages.task`."""
        return make_task(self.environment, index)

    async def sample(self, prompt: Prompt, version: int) -> Group:
        """See `Stages.sample`."""
        return await self._sample(
            self.settings, self.refit.in_flight, prompt, version, partial(self.refit.end_lease, prompt.ordinal)
        )

    async def _sample(
        self,
        settings: RunSettings,
        in_flight: InFlight,
        prompt: Prompt,
        version: int,
        rolled_out: Callable[[], None] = lambda: None,
    ) -> Group:
        try:
            group = await sample_group(
                prompt,
                environment=self.environment,
                scorer=self.scorer,
                engine=self.engine,
                tokenizer=self.tokenizer,
                policy_version=version,
                settings=settings,
                in_flight=in_flight,
                events=self.events,
                rolled_out=rolled_out,
            )
        except PromptTooLong as error:
            self._failures.report(prompt.index, [Failure("error", "rollout", f"{error} (--engine.max-model-len)")])
            raise
        self._failures.report(prompt.index, group.failures)
        return group

    async def update(self, groups: list[Group]) -> Metrics:
        """See `Stages.update`."""
        canary = await self._canary.check()  # of the version whose weights the trainer still has
        return {**await self._update(self.trainer, groups), **canary}

    def finish_step(self, step: Step) -> None:
        """See `Stages.finish_step`."""
        self.directory.check()
        self.tracker.completions(step.number, completion_rows(step, self.tokenizer))
        self.tracker.log(step.number, self._metrics.of(step, self._checkpoint_seconds))
        self.events.flush()
        self._checkpoint_seconds = 0.0

    async def checkpoint(self, step: int) -> None:
        """See `Stages.checkpoint`."""
        self._canary.start(self._tasks)
        await self._evaluate(step)
        if step % self.settings.checkpoint.every == 0:
            started = monotonic()
            await self._save()
            self._checkpoint_seconds = monotonic() - started

    def _open_evaluation(self) -> Evaluation | None:
        settings = self.settings
        if not settings.num_held_out:
            return None
        first = self.ledger.num_tasks
        prompts = [
            Prompt(index, index, derive_seed(settings.seed, index), self.task(index))
            for index in range(first, first + settings.num_held_out)
        ]
        sampling, wanted = settings.sampling, settings.evaluation
        if wanted.temperature is not None:
            sampling = sampling.model_copy(update={"temperature": wanted.temperature})
        settings = settings.model_copy(update={"group_size": wanted.group_size, "sampling": sampling})
        sample = partial(self._sample, settings, "finish")
        return Evaluation(prompts, sample, self.refit, self.tracker.evaluation)

    async def _evaluate(self, version: int) -> None:
        if self._evaluation is not None and version % self.settings.evaluation.every == 0:
            await self._evaluation.start(self._tasks)

    async def _save_unless_torn(self, end: BaseException) -> None:
        """Raises TornUpdate where that is what has ended the loop."""
        torn = BaseExceptionGroup("", [end]).subgroup(TornUpdate)
        if torn is not None:
            raise first_error(torn)
        await self._save()

    async def _save(self) -> None:
        version = self.loop.version
        if version == self._saved:
            return
        self.directory.check()
        meta = {
            "policy_version": version,
            "attempt": self.directory.attempt,
            "config_sha256": self.directory.config_sha256,
            "totals": self._metrics.totals,
            "state": self.state,
        }
        with self.events.span("checkpoint", "checkpoint", policy_version=version):
            await write_checkpoint(
                self.directory.path,
                version,
                self._save_adapters,
                self.ledger.state(),
                meta,
                keep=self.settings.checkpoint.keep,
            )
        self._saved = version

    async def _save_adapters(self, folder: Path) -> None:
        for name in self.adapters:
            await self.trainer.save(name, adapter_folder(folder, name))


@asynccontextmanager
async def open_run(
    settings: RunSettings, marker: str, adapters: Adapters | None = None, backend: Backend | None = None
) -> AsyncIterator[Run]:
    """Start engine, trainer and all the rest, or use a `backend` that others used before; on leaving, end them.

    `marker` is that of `rlloop.processes.guard`; `adapters` are created, saved and resumed beside `POLICY`. Raises
    RlloopError for anything that the user can mend.
    """
    # First what needs no run directory: a typo leaves none behind.
    check_installed("torch", "transformers", "vllm")
    placement = await to_thread.run_sync(place, settings)
    environment = load_environment(settings.env, settings.all_env_args)
    if settings.init_adapter is not None and not settings.resume:
        check_adapter(settings.init_adapter, settings.lora)
    if backend is None:
        await to_thread.run_sync(resolve_model, settings.model)
    else:
        backend.check(settings)
    num_tasks = _count_tasks(settings, environment)
    async with AsyncExitStack() as stack:
        directory, events, tracker = open_records(settings, stack)
        scorer = await stack.enter_async_context(
            Scorer(
                settings.env,
                settings.all_env_args,
                num_workers=settings.environment.score_workers,
                timeout=settings.environment.score_timeout,
                log_path=directory.path / "logs" / "rewards.log",
            )
        )
        checkpoint = directory.checkpoint
        ledger = _open_ledger(settings, environment, num_tasks, checkpoint)

        policy: tuple[LoraConfig, Head] = LoraConfig(**dict(settings.lora), seed=settings.seed), "policy"
        all_adapters = {POLICY: policy, **(adapters or {})}
        created: list[str] = []
        prepare = partial(
            create_adapters,
            adapters=all_adapters,
            checkpoint=checkpoint,
            begin_with=settings.init_adapter,
            created=created,
        )
        is_shared = backend is not None
        if backend is None:
            tracker.status(f"starting vLLM and the trainer {placement}")
            backend = await stack.enter_async_context(
                open_backend(settings, marker, directory.path, placement=placement, events=events, prepare=prepare)
            )
        how = settings.refit
        refit = Refit(backend.trainer, backend.engine, POLICY, settings.num_versions, events, how.in_flight, how.form)
        if is_shared:
            stack.push_async_callback(_leave, backend.trainer, refit, created)
            await prepare(backend.trainer)
        tracker.status("waiting for the first rollouts")
        yield Run(
            settings=settings,
            directory=directory,
            environment=environment,
            scorer=scorer,
            tokenizer=backend.tokenizer,
            engine=backend.engine,
            trainer=backend.trainer,
            refit=refit,
            ledger=ledger,
            events=events,
            tracker=tracker,
            adapters=tuple(all_adapters),
            state=checkpoint.manifest.get("state", {}) if checkpoint else {},
        )


def open_records(settings: TrainingSettings, stack: AsyncExitStack) -> tuple[RunDirectory, Events, Trackers]:
    """What a run writes, and the checkpoint that it goes on from; `stack` closes them."""
    check_trackers(settings)
    directory = stack.enter_context(open_run_directory(settings))
    checkpoint = directory.checkpoint
    events = Events(directory.path / "events.jsonl")
    stack.callback(events.close)
    if checkpoint and checkpoint.step == settings.num_steps:
        logger.warning("all %d steps are made; a greater --num-steps goes on", settings.num_steps)
    for what in checkpoint.passed_over if checkpoint else ():
        logger.warning("passed over a broken checkpoint: %s", what)
    tracker = open_trackers(settings, directory.path, directory.attempt)
    stack.callback(tracker.close)
    return directory, events, tracker


async def _leave(trainer: Trainer, refit: Refit, created: list[str]) -> None:
    """A backend that goes on without the run and its adapters."""
    with CancelScope(shield=True):
        async with AsyncExitStack() as stack:
            for name in created:
                stack.push_async_callback(trainer.remove_adapter, name)
            await refit.retire_all()


def _count_tasks(settings: RunSettings, environment: Environment) -> int:
    """Those to train on."""
    num_tasks = len(environment) - settings.num_held_out
    if num_tasks < 1:
        raise ConfigError(
            f"--evaluation.num-prompts: expected less than the environment's {len(environment)} tasks, "
            f"got {settings.num_held_out}"
        )
    return num_tasks


def _open_ledger(
    settings: RunSettings, environment: Environment, num_tasks: int, checkpoint: Checkpoint | None
) -> Ledger:
    tasks = [make_task(environment, index) for index in sorted({part * num_tasks // 64 for part in range(64)})]
    failures = [task for task in tasks if isinstance(task, Failure)]
    if len(failures) == len(tasks):
        raise BadEnvironmentError(f"environment {settings.env} cannot make a task: {failures[0].message}")
    # Of a failure only that it is one: its text names lines of the environment's code.
    known = [None if isinstance(task, Failure) else task for task in tasks]
    identity = fingerprint(settings.env, settings.all_env_args, num_tasks, known)
    if checkpoint is None:
        return Ledger(num_tasks, settings.seed, identity, settings.curriculum)
    return Ledger.restore(checkpoint.ledger, num_tasks, settings.seed, identity, settings.curriculum)


def run(main: Callable[[SettingsT, str], Coroutine[Any, Any, None]], settings: SettingsT) -> None:
    """Run an algorithm's `main(settings, marker)` so that no process outlives it, and signals end it in order.

    Raises the first error as it is, not in the groups of the task groups that it went through.
    """

    async def stoppable() -> None:
        async with stop_on_signals():
            await main(settings, marker)

    tune_garbage_collector()
    # What the run's processes would print over its table: remarks on a missing Triton, NUMA, renamed functions.
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("TORCH_LOGS", "-torch._library")
    with guard() as marker:
        try:
            anyio.run(stoppable, backend_options={"use_uvloop": True})  # see benchmarks/loop_overhead.py
        except BaseExceptionGroup as group:
            raise first_error(group) from None


def tune_garbage_collector() -> None:
    """Look for cyclic garbage, of which a run makes little, less often.

    Every search walks through what waiting rollouts hold: with 10^5 samples in flight, half of the loop's time at
    Python's default of 700.
    """
    gc.set_threshold(50_000)
