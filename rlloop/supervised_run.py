"""A run that trains on a dataset: a trainer without an engine, its ledger, checkpoints and metrics."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import TypeAlias

from anyio import CancelScope, to_thread
from pydantic import Field

from rlloop.adapters import POLICY, create_adapters
from rlloop.backend import load_tokenizer, open_trainer
from rlloop.checkpoint import write_checkpoint
from rlloop.config import Settings, TrainingSettings, UserPath
from rlloop.errors import CheckpointError, ConfigError, RankDied, RunDirectoryError
from rlloop.events import Events
from rlloop.ledger import Ledger
from rlloop.models import resolve_model
from rlloop.placement import place_trainer
from rlloop.plugins import check_installed
from rlloop.rows import load_rows
from rlloop.run import open_records
from rlloop.run_directory import RunDirectory
from rlloop.supervised import Example, Examples, make_samples, tokenise
from rlloop.tracking import Trackers
from rlloop.trainer import Trainer
from rlloop.types import LoraConfig, Metrics, Sample

Update: TypeAlias = Callable[[Trainer, list[Sample]], Awaitable[Metrics]]
"""Trains the adapter `POLICY` on one batch; its last await is an optimizer step, which is not cancelled."""

TOTALS = ("optim/skipped_steps", "optim/nonfinite_steps", "progress/tokens_trained")
logger = logging.getLogger(__name__)


class HeldOutSettings(Settings):
    """The loss on rows that are not trained on."""

    every: int = Field(0, ge=0)
    """Steps between evaluations; 0: none. The base model, version 0, is evaluated too."""
    num_rows: int = Field(64, ge=1)
    """The dataset's last rows, which are then not trained on."""


class SupervisedSettings(TrainingSettings):
    """Settings of a run on a dataset."""

    dataset: str
    """A JSON, CSV or Parquet file, or what `datasets.load_dataset` takes; with prompt and completion, messages, or text."""
    dataset_name: str | None = None
    """Which of the dataset's configurations."""
    split: str = "train"
    """Which of its splits."""
    batch_size: int = Field(16, ge=1)
    """Rows that one step trains on."""
    max_length: int = Field(512, ge=2)
    """Most tokens of a row; longer ones are left out, and counted."""
    run_dir: UserPath = Path("runs/sft")
    """Where everything that the run writes goes."""
    evaluation: HeldOutSettings = HeldOutSettings()


@dataclass
class SupervisedRun:
    """What `open_supervised_run` yields. The ledger's prompts are the rows: each is trained on once in an epoch."""

    settings: SupervisedSettings
    directory: RunDirectory
    examples: Sequence[Example]
    held_out: Sequence[Example]
    ledger: Ledger
    trainer: Trainer
    events: Events
    tracker: Trackers
    step: int
    """The last that was made."""
    totals: Metrics = field(default_factory=lambda: dict.fromkeys(TOTALS, 0.0))
    """Of the run so far."""

    async def train(self, update: Update) -> None:
        """Make all steps. A checkpoint is written every so often, and at the end however it comes."""
        settings = self.settings
        self._saved, self._checkpoint_seconds, self._ended = self.step, 0.0, monotonic()
        try:
            await self._evaluate()
            while self.step < settings.num_steps:
                await self._train_step(update)
                await self._evaluate()
                if self.step % settings.checkpoint.every == 0:
                    await self._save()
            await self._save()  # within the block: a stop that comes now must not lose the last steps
        except BaseException:
            with CancelScope(shield=True):
                try:
                    await self._save()
                # The trainer may be what died; the first error is the one to raise.
                except (CheckpointError, RankDied, RunDirectoryError) as error:
                    logger.error("what came after step %d is lost: %s", self._saved, error)
            raise

    async def _train_step(self, update: Update) -> None:
        ordinals, rows, _ = zip(*[self.ledger.next() for _ in range(self.settings.batch_size)], strict=True)
        metrics = await update(self.trainer, make_samples([self.examples[row] for row in rows], ordinals))
        # No await from here on: a stop finds the ledger as the weights are.
        self.step += 1
        self.ledger.trained(ordinals, self.step)
        for name in TOTALS:
            self.totals[name] += metrics[name]
        seconds, self._ended = monotonic() - self._ended, monotonic()
        times = {"time/step": seconds, "time/checkpoint": self._checkpoint_seconds}
        num_rows = self.ledger.counts["trained"]
        progress = {"progress/prompts": float(num_rows), "progress/epoch": num_rows / len(self.examples)}
        self.directory.check()
        self.tracker.log(self.step, {**metrics, **times, **self.totals, **progress})
        self.events.flush()
        self._checkpoint_seconds = 0.0

    async def _evaluate(self) -> None:
        if not self.held_out or self.step % self.settings.evaluation.every:
            return
        started = monotonic()
        samples = make_samples(self.held_out, range(len(self.held_out)))
        logprobs = await self.trainer.logprobs(POLICY, samples)
        loss = -sum(float(s.loss_weights[0] * found.sum()) for s, found in zip(samples, logprobs, strict=True))
        self.tracker.evaluation(self.step, {"eval/loss": loss, "time/eval": monotonic() - started})

    async def _save(self) -> None:
        if self.step == self._saved:
            return
        self.directory.check()
        started = monotonic()
        meta = {
            "policy_version": self.step,
            "attempt": self.directory.attempt,
            "config_sha256": self.directory.config_sha256,
            "totals": self.totals,
        }
        path, keep = self.directory.path, self.settings.checkpoint.keep
        with self.events.span("checkpoint", "checkpoint", policy_version=self.step):
            await write_checkpoint(path, self.step, self._save_adapter, self.ledger.state(), meta, keep)
        self._saved, self._checkpoint_seconds = self.step, monotonic() - started

    async def _save_adapter(self, folder: Path) -> None:
        await self.trainer.save(POLICY, folder)


@asynccontextmanager
async def open_supervised_run(settings: SupervisedSettings, marker: str) -> AsyncIterator[SupervisedRun]:
    """Read the dataset and start a trainer, which has the machine to itself; on leaving, end it.

    `marker` is that of `rlloop.processes.guard`. Raises RlloopError for anything that the user can mend.
    """
    # First what needs no run directory: a mistake leaves none behind.
    check_installed("torch", "transformers")
    placement = place_trainer(settings)
    model = str(await to_thread.run_sync(resolve_model, settings.model))
    examples = await to_thread.run_sync(_read, settings, model)
    num_rows = len(examples.kept) - (settings.evaluation.num_rows if settings.evaluation.every else 0)
    if num_rows < 1:
        raise ConfigError(
            f"--evaluation.num-rows: expected less than the dataset's {len(examples.kept)} rows, "
            f"got {settings.evaluation.num_rows}"
        )
    async with AsyncExitStack() as stack:
        directory, events, tracker = open_records(settings, stack)
        checkpoint = directory.checkpoint
        identity = (num_rows, settings.seed, examples.fingerprint)
        ledger = Ledger.restore(checkpoint.ledger, *identity) if checkpoint else Ledger(*identity)
        tracker.status(f"starting the trainer {placement}")
        trainer = await stack.enter_async_context(
            open_trainer(settings, model, placement, marker, directory.path, events)
        )
        lora = LoraConfig(**dict(settings.lora), seed=settings.seed)
        await create_adapters(trainer, {POLICY: (lora, "policy")}, checkpoint)
        run = SupervisedRun(
            settings=settings,
            directory=directory,
            examples=examples.kept[:num_rows],
            held_out=examples.kept[num_rows:],
            ledger=ledger,
            trainer=trainer,
            events=events,
            tracker=tracker,
            step=checkpoint.step if checkpoint else 0,
        )
        run.totals.update(checkpoint.manifest["totals"] if checkpoint else {})
        yield run


def _read(settings: SupervisedSettings, model: str) -> Examples:
    rows = load_rows(settings.dataset, settings.dataset_name, settings.split)
    examples = tokenise(rows, load_tokenizer(model, settings.chat_template_kwargs), settings.max_length)
    if examples.num_too_long or examples.num_empty:
        logger.warning(
            "%s: of %d rows, %d are longer than --max-length %d tokens and %d hold nothing to learn: they are left out",
            *(settings.dataset, len(rows), examples.num_too_long, settings.max_length, examples.num_empty),
        )
    return examples
