"""Whole runs on the fake engine and the fake trainer: killed at any moment, stopped, resumed; rewards that fail."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import sys
import tempfile
import traceback
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rlloop.algorithms import ppo

from rlloop import checkpoint as checkpoints
from rlloop.adapters import POLICY, Adapters, create_adapters
from rlloop.advantages import group_centred, token_weights
from rlloop.checkpoint import newest_checkpoint
from rlloop.config import RunSettings, SettingsT
from rlloop.engine.fake import FakeEngine
from rlloop.environment import Policy, PromptTooLong, Trajectory
from rlloop.errors import (
    BadEnvironmentError,
    CheckpointError,
    EngineError,
    RefitError,
    RunDirectoryError,
    Stopped,
    TrainerError,
    first_error,
)
from rlloop.events import Events
from rlloop.ledger import Ledger
from rlloop.refit.publisher import Refit
from rlloop.rewards import Scorer
from rlloop.run import Run, _open_ledger, open_records, run
from rlloop.run_directory import open_run_directory
from rlloop.samples import make_samples
from rlloop.signals import stop_on_signals
from rlloop.tracking import Trackers, jsonl
from rlloop.tracking.files import Files, read_metrics
from rlloop.trainer import Loss
from rlloop.trainer.fake import FakeTrainer
from rlloop.types import (
    AdamConfig,
    AdapterTicket,
    Completion,
    Failure,
    FloatArray,
    GenerationRequest,
    Group,
    InFlight,
    LoraConfig,
    Metrics,
    OptimResult,
    RefitReport,
    Rollout,
    Sample,
)
from rlloop.updates import optimizer_step

NUM_TASKS = 5
Moment = Callable[[], None]


def nothing() -> None:
    """A moment at which nothing happens."""


class Tokenizer:
    def decode(self, tokens: Any) -> str:
        return " ".join(map(str, tokens))

    def encode(self, text: str) -> list[int]:
        return list(text.encode())


class Environment:
    """One answer a rollout; tasks are their indices."""

    def __len__(self) -> int:
        return NUM_TASKS

    def task(self, index: int) -> int:
        return index

    async def rollout(self, task: int, policy: Policy) -> Rollout:
        trajectory = Trajectory()
        trajectory.observe([task, 2, 3])
        trajectory.act(await policy.generate(trajectory.tokens))
        return trajectory.finish(f"answer to {task}", "stop")

    def score(self, task: int, rollout: Rollout) -> float:
        return float(rollout.tokens[-1] % 7)


class Scores:
    """Scores at once, in this process."""

    async def score(self, task: Any, rollout: Rollout) -> float | Failure:
        return Environment().score(task, rollout)


class Engine(FakeEngine):
    def __init__(self, moment: Moment, steps_per_version: int) -> None:
        super().__init__(delay=self._wait)
        self._moment = moment
        self._steps_per_version = steps_per_version

    async def _wait(self, request: GenerationRequest) -> None:
        await anyio.sleep((request.seed or 0) % 5 / 2000)

    async def generate(self, request: GenerationRequest) -> list[Completion]:
        completions = await super().generate(request)
        self._moment()
        return completions

    async def publish(self, version: int, ticket: AdapterTicket) -> RefitReport:
        assert ticket.digest == f"fake-{version * self._steps_per_version}", "the weights are not those of the version"
        self._moment()
        return await super().publish(version, ticket)


class Trainer(FakeTrainer):
    """An adapter's weights are the prompts that it was trained on."""

    def __init__(self, moment: Moment) -> None:
        super().__init__()
        self._moment = moment
        self.weights: defaultdict[str, list[int]] = defaultdict(list)

    async def forward_backward(self, name: str, samples: Sequence[Sample], loss: Loss) -> Metrics:
        self.prompt_ids = []
        return await super().forward_backward(name, samples, loss)

    async def optim_step(self, name: str, adam: AdamConfig) -> OptimResult:
        self._moment()
        # What a rank was told it does, whether or not anybody still waits for the answer.
        result = await super().optim_step(name, adam)
        self.weights[name] += self.prompt_ids
        await anyio.sleep(0.002)
        self._moment()
        return result

    async def save(self, name: str, folder: Path) -> None:
        await super().save(name, folder)
        self._moment()
        (folder / "state" / "weights.json").write_text(json.dumps(self.weights[name]))

    async def load(self, name: str, folder: Path) -> None:
        await super().load(name, folder)
        self.weights[name] = json.loads((folder / "state" / "weights.json").read_text())


@asynccontextmanager
async def open_fake_run(config: RunSettings, scorer: Any = None, moment: Moment = nothing) -> AsyncIterator[Run]:
    """As `rlloop.run.open_run`, with the fakes."""
    with open_run_directory(config) as directory:
        checkpoint = directory.checkpoint
        identity = (NUM_TASKS, config.seed, "fingerprint")
        ledger = Ledger.restore(checkpoint.ledger, *identity) if checkpoint else Ledger(*identity)
        steps_per_version = config.num_epochs * config.num_minibatches if isinstance(config, ppo.Config) else 1
        engine, trainer, events = (
            Engine(moment, steps_per_version),
            Trainer(moment),
            Events(directory.path / "events.jsonl"),
        )
        tracker = Trackers({"files": Files(directory.path, directory.attempt)}, lambda text: None)
        adapters: Adapters = {POLICY: (LoraConfig(), "policy"), ppo.CRITIC: (LoraConfig(), "value")}
        await create_adapters(trainer, adapters, checkpoint)
        try:
            yield Run(
                settings=config,
                directory=directory,
                environment=Environment(),
                scorer=scorer or Scores(),  # type: ignore[arg-type]
                tokenizer=Tokenizer(),
                engine=engine,
                trainer=trainer,
                refit=Refit(trainer, engine, POLICY, config.num_versions, events, config.refit.in_flight),
                ledger=ledger,
                events=events,
                tracker=tracker,
                adapters=tuple(adapters),
                state=checkpoint.manifest["state"] if checkpoint else {},
            )
        finally:
            tracker.close()
            events.close()


async def update(trainer: Any, groups: list[Group]) -> Metrics:
    samples = make_samples(groups, group_centred, token_weights)
    return await optimizer_step(trainer, POLICY, samples, None, AdamConfig(lr=1.0))  # type: ignore[arg-type]


def make_settings(run_dir: Path, kind: type[SettingsT] = RunSettings, **changes: Any) -> SettingsT:
    fixed = {"groups_per_step": 2, "group_size": 2, "num_steps": 6, "max_staleness": 1, "on_stale": "wait"}
    return kind(run_dir=run_dir, env="arithmetic", **{**fixed, **changes})


def train(config: RunSettings, moment: Moment = nothing, scorer: Any = None) -> None:
    async def main() -> None:
        async with stop_on_signals(), open_fake_run(config, scorer, moment) as fake:
            await fake.train(
                partial(ppo.update, config=config, state=fake.state) if isinstance(config, ppo.Config) else update
            )

    anyio.run(main)


# --- Killed and stopped at random moments -------------------------------------------------------------------------------


def attempt(config: RunSettings, number: signal.Signals, at: int) -> int:
    """Run in a forked process that sends itself the signal at moment `at`; -> its exit status."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    status = 1
    try:
        left = at

        def moment(*_: object) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), number)

        sync = checkpoints._sync  # called for each file of a checkpoint, before and after it gets its name

        def sync_and_moment(path: Path) -> None:
            sync(path)
            moment()

        checkpoints._sync = sync_and_moment
        train(config, moment)
        status = 0
    except Stopped as stop:
        status = stop.exit_code
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@settings(max_examples=25, deadline=None)
@given(
    ends=st.lists(
        st.tuples(st.sampled_from([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]), st.integers(1, 90)), max_size=4
    ),
    every=st.integers(1, 4),
    max_staleness=st.integers(0, 2),
    num_epochs=st.integers(0, 2),
    in_flight=st.sampled_from(["finish", "restart", "hop"]),
)
def test_every_prompt_is_trained_exactly_once_whenever_the_run_is_ended(
    ends: list[tuple[signal.Signals, int]], every: int, max_staleness: int, num_epochs: int, in_flight: InFlight
) -> None:
    """By one optimizer step a batch, or in minibatches, with a critic."""
    several: dict[str, Any] = {"kind": ppo.Config, "num_epochs": num_epochs, "num_minibatches": 2} if num_epochs else {}
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        more: dict[str, Any] = {"checkpoint": {"every": every}, "refit": {"in_flight": in_flight}} | several
        config = make_settings(run_dir, max_staleness=max_staleness, **more)
        done = False
        for number, at in ends:
            status = attempt(config, number, at)
            assert status in (0, -number, 128 + number)
            done = status == 0
            if run_dir.exists():
                config = config.model_copy(update={"resume": True})
            if done:
                break
        if not done:
            train(config)
        final = newest_checkpoint(run_dir)
        assert final is not None
        assert final.step == 6
        for state in ("state", "critic/state")[: 2 if num_epochs else 1]:
            trained = Counter(json.loads((final.folder / state / "weights.json").read_text()))
            # Of the weights that came out of it, so a step that was lost with its attempt does not count.
            assert trained == dict.fromkeys(range(12), 2 * max(1, num_epochs)), "2 samples of each of the 12 prompts"
            steps = 6 * max(1, 2 * num_epochs)
            assert json.loads((final.folder / state / "fake.json").read_text())["steps"] == steps
        assert final.ledger["counts"]["trained"] == final.ledger["low_water"] == 12
        epochs = [
            sorted(Ledger(NUM_TASKS, 0, "")._index(ordinal) for ordinal in range(first, first + 5)) for first in (0, 5)
        ]
        assert epochs == [list(range(NUM_TASKS))] * 2
        assert not list((run_dir / "checkpoints").glob(".tmp-*"))


def test_rollouts_that_move_on_are_of_several_versions_of_which_two_are_loaded(tmp_path: Path) -> None:
    config = make_settings(tmp_path / "run", num_steps=20, max_staleness=2, refit={"in_flight": "hop"})
    loaded = []

    async def main() -> None:
        async with open_fake_run(config, moment=lambda: loaded.append(len(fake.engine.versions))) as fake:
            await fake.train(update)

    anyio.run(main)
    assert max(loaded) == 2
    lines = read_metrics(config.run_dir)
    assert sum(line["async/frac_mixed_versions"] for line in lines) > 0
    for line in lines:
        assert 0 <= line["async/token_staleness_mean"] <= line["async/staleness_mean"] <= 2
    assert any(line["async/token_staleness_mean"] < line["async/staleness_mean"] for line in lines)


def test_an_update_that_fails_halfway_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the third step, between its two minibatches: what is saved is what two whole steps made."""
    config = make_settings(tmp_path / "run", ppo.Config, num_minibatches=2, checkpoint={"every": 2})

    async def fail(self: Trainer, name: str, samples: Sequence[Sample], loss: Loss) -> Metrics:
        if self.steps == {POLICY: 5, ppo.CRITIC: 5}:
            raise TrainerError("out of memory")
        return await sound(self, name, samples, loss)

    sound = Trainer.forward_backward
    monkeypatch.setattr(Trainer, "forward_backward", fail)
    with pytest.raises(BaseExceptionGroup) as caught:
        train(config)
    assert str(first_error(caught.value)) == "out of memory"
    monkeypatch.undo()
    saved = newest_checkpoint(config.run_dir)
    assert saved is not None
    assert saved.step == 2
    train(config.model_copy(update={"resume": True}))
    final = newest_checkpoint(config.run_dir)
    assert final is not None
    trained = Counter(json.loads((final.folder / "state" / "weights.json").read_text()))
    assert trained == dict.fromkeys(range(12), 2)


def test_totals_go_on_after_a_resume(tmp_path: Path) -> None:
    """But for canaries: each start has one more."""
    whole, parts = (make_settings(tmp_path / name, refit={"canary_every": 0}) for name in ("whole", "parts"))
    train(whole)
    for num_steps, resume in ((2, False), (4, True), (6, True)):
        train(parts.model_copy(update={"num_steps": num_steps, "resume": resume}))
    for name in ("progress/tokens_trained", "progress/prompts", "progress/tokens_sampled", "optim/skipped_steps"):
        assert [line["attempt"] for line in read_metrics(parts.run_dir)] == [1, 1, 2, 2, 3, 3]
        assert read_metrics(parts.run_dir)[-1][name] == read_metrics(whole.run_dir)[-1][name], name


def test_a_stop_is_saved_within_the_step(tmp_path: Path) -> None:
    left = 30

    def moment() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGINT)

    config = make_settings(tmp_path / "run", num_steps=1000, checkpoint={"every": 1000})
    with pytest.raises(Stopped, match="SIGINT"):
        train(config, moment)
    saved = newest_checkpoint(config.run_dir)
    assert saved is not None
    assert saved.step in range(1, 10)
    assert Counter(json.loads((saved.folder / "state" / "weights.json").read_text())).total() == 4 * saved.step


def test_a_stop_during_the_last_checkpoint_does_not_lose_it(tmp_path: Path) -> None:
    signals = 0

    def moment() -> None:
        nonlocal signals
        if sys._getframe(1).f_code.co_name == "save" and not signals:
            signals += 1
            os.kill(os.getpid(), signal.SIGINT)

    config = make_settings(tmp_path / "run", num_steps=4, checkpoint={"every": 1000})
    with pytest.raises(Stopped, match="SIGINT"):
        train(config, moment)
    saved = newest_checkpoint(config.run_dir)
    assert saved is not None
    assert saved.step == 4


# --- Rewards that fail --------------------------------------------------------------------------------------------------

FAILING = """
import time

class Failing:
    def __init__(self, how):
        self.how = how

    def __len__(self):
        return 5

    def task(self, index):
        return index

    async def rollout(self, task, policy):
        raise NotImplementedError("only scores")

    def score(self, task, rollout):
        if rollout.tokens[-1] % 3:
            return 1.0
        if self.how == "raise":
            raise KeyError("answer")
        if self.how == "hang":
            time.sleep(600)
        return {"nan": float("nan"), "none": None}[self.how]
"""


@pytest.fixture
def failing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "tests_env_failing.py").write_text(FAILING)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "tests_env_failing:Failing"


@pytest.mark.parametrize(
    ("how", "metric"),
    [("raise", "rollout/errors"), ("nan", "rollout/errors"), ("none", "rollout/errors"), ("hang", "rollout/timeouts")],
)
@pytest.mark.anyio
async def test_a_reward_that_fails_is_counted_and_is_no_reward(
    how: str, metric: str, failing: str, tmp_path: Path, anyio_backend: str
) -> None:
    num_steps = 2 if how == "hang" else 4
    config = make_settings(tmp_path / "run", group_size=4, num_steps=num_steps, environment={"min_group_size": 1})
    async with (
        Scorer(failing, {"how": how}, num_workers=2, timeout=0.4) as scorer,
        open_fake_run(config, scorer) as fake,
    ):
        await fake.train(update)
    lines = read_metrics(config.run_dir)
    other = {"rollout/errors": "rollout/timeouts", "rollout/timeouts": "rollout/errors"}[metric]
    rows = [row for step in range(1, num_steps + 1) for row in rows_of(config.run_dir, step)]
    assert len(lines) == num_steps
    assert sum(line[metric] for line in lines) > 0
    assert sum(line[other] for line in lines) == 0
    # All that came through is what the reward function returned; a failure has become neither 0 nor NaN.
    assert {row["reward"] for row in rows} == {1.0}
    assert {(line["reward/min"], line["reward/mean"], line["reward/max"]) for line in lines} == {(1.0, 1.0, 1.0)}
    dropped = sum(line["async/dropped_failed"] for line in lines)
    assert len(rows) + sum(line[metric] for line in lines) == 4 * (2 * num_steps + dropped)


def rows_of(run_dir: Path, step: int) -> list[dict[str, Any]]:
    return list(jsonl.read(run_dir / "completions" / f"step_{step:06d}.jsonl"))


@pytest.mark.anyio
async def test_a_reward_that_always_fails_ends_the_run_with_its_error(tmp_path: Path, anyio_backend: str) -> None:
    class Broken:
        async def score(self, task: Any, rollout: Rollout) -> float | Failure:
            return Failure("error", "score", "KeyError: 'answer' (my_env.py:7)")

    config = make_settings(tmp_path / "run")
    with pytest.raises(ExceptionGroup) as caught:
        async with open_fake_run(config, Broken()) as fake:
            await fake.train(update)
    error = first_error(caught.value)
    assert isinstance(error, BadEnvironmentError)
    assert "my_env.py:7" in str(error)


def test_a_group_of_which_too_many_fail_is_not_trained(tmp_path: Path) -> None:
    class Some(Scores):
        async def score(self, task: Any, rollout: Rollout) -> float | Failure:
            failed = rollout.tokens[-1] % 3 == 0
            return Failure("error", "score", "boom") if failed else await super().score(task, rollout)

    config = make_settings(tmp_path / "run", group_size=4, environment={"min_group_size": 3})
    train(config, scorer=Some())
    sizes = Counter(row["ordinal"] for step in range(1, 7) for row in rows_of(config.run_dir, step))
    assert (len(sizes), set(sizes.values())) == (12, {3, 4})
    assert sum(line["async/dropped_failed"] for line in read_metrics(config.run_dir)) > 0


@pytest.mark.anyio
async def test_a_task_that_cannot_be_made_costs_its_group_and_is_said(
    tmp_path: Path, anyio_backend: str, caplog: pytest.LogCaptureFixture
) -> None:
    class Corrupt(Environment):
        def task(self, index: int) -> int:
            if index == 3:
                raise ValueError("row 3 is corrupt")
            return index

    config = make_settings(tmp_path / "run", num_steps=NUM_TASKS)  # two epochs
    async with open_fake_run(config) as fake:
        fake.environment = Corrupt()
        await fake.train(update)
    lines = read_metrics(config.run_dir)
    assert len(lines) == NUM_TASKS
    assert sum(line["async/dropped_failed"] for line in lines) >= 2
    assert sum(line["rollout/errors"] for line in lines) == 2 * sum(line["async/dropped_failed"] for line in lines)
    [said] = [message for message in caplog.messages if "has no reward" in message]
    assert said.startswith(
        "a rollout of task 3 has no reward: error in task: ValueError: row 3 is corrupt (test_run.py:"
    )


@pytest.mark.anyio
async def test_a_prompt_that_is_too_long_is_said_and_counted(
    tmp_path: Path, anyio_backend: str, caplog: pytest.LogCaptureFixture
) -> None:
    class Long(Environment):
        async def rollout(self, task: Any, policy: Any) -> Rollout:
            if task == 3:
                raise PromptTooLong("900 tokens leave no room for an answer within 512")
            return await super().rollout(task, policy)

    config = make_settings(tmp_path / "run", num_steps=NUM_TASKS)  # two epochs
    async with open_fake_run(config) as fake:
        fake.environment = Long()
        await fake.train(update)
    assert sum(line["async/dropped_too_long"] for line in read_metrics(config.run_dir)) >= 2
    [said] = [message for message in caplog.messages if "has no reward" in message]
    assert said.startswith("a rollout of task 3 has no reward: error in rollout: 900 tokens leave no room")
    assert said.endswith("within 512 (--engine.max-model-len)")


def test_a_failing_task_does_not_change_what_a_run_is_and_only_failing_ones_end_it_at_once(tmp_path: Path) -> None:
    class Corrupt(Environment):
        text, last = "row 3 is corrupt", 3

        def task(self, index: int) -> int:
            if 3 <= index <= self.last or self.last < 0:
                raise ValueError(self.text)
            return index

    config, environment = make_settings(tmp_path / "run"), Corrupt()
    identity = _open_ledger(config, environment, NUM_TASKS, None).fingerprint
    environment.text = "row 3 is corrupt (0x7f01)"
    assert _open_ledger(config, environment, NUM_TASKS, None).fingerprint == identity
    environment.last = 4
    assert _open_ledger(config, environment, NUM_TASKS, None).fingerprint != identity
    environment.last = -1
    with pytest.raises(
        BadEnvironmentError, match="environment arithmetic cannot make a task: ValueError: row 3 is corrupt"
    ):
        _open_ledger(config, environment, NUM_TASKS, None)


def test_a_resume_of_more_steps_than_are_asked_for_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    config = make_settings(tmp_path / "run")
    train(config)
    before = (config.run_dir / "config.toml").read_text()
    fewer = config.model_copy(update={"resume": True, "num_steps": 4})
    with pytest.raises(
        RunDirectoryError, match=r"^--num-steps: expected at least the 6 steps that .*run has made, got 4$"
    ):
        open_run_directory(fewer)
    assert (config.run_dir / "config.toml").read_text() == before
    train(config.model_copy(update={"resume": True}))


@pytest.mark.anyio
async def test_what_a_resume_has_found_is_said_and_stays(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, anyio_backend: str
) -> None:
    config = make_settings(tmp_path / "run", checkpoint={"every": 2})
    async with open_fake_run(config) as fake:
        await fake.train(update)
    for step, message in ((6, "all 6 steps are made"), (4, r"passed over a broken checkpoint: .*step_000006")):
        caplog.clear()
        async with AsyncExitStack() as stack:
            directory, *_ = open_records(config.model_copy(update={"resume": True}), stack)
            assert directory.checkpoint is not None
            assert directory.checkpoint.step == step
            (directory.path / "checkpoints" / "step_000006" / "manifest.json").write_text("{")
        [record] = caplog.records
        assert re.match(message, record.getMessage())


@pytest.mark.anyio
async def test_a_refit_with_room_for_one_version_waits_for_rollouts_and_not_for_their_scores(
    tmp_path: Path, anyio_backend: str
) -> None:
    class Slow(Scores):
        async def score(self, task: Any, rollout: Rollout) -> float | Failure:
            await anyio.sleep(0.3)
            return await super().score(task, rollout)

    config = make_settings(tmp_path / "run", num_steps=4, refit={"form": "merged"})
    assert config.num_versions == 1
    async with open_fake_run(config, Slow()) as fake:
        await fake.train(update)
    steps = list(jsonl.read(config.run_dir / "metrics.jsonl"))
    assert len(steps) == 4
    assert max(step["time/refit"] for step in steps) < 0.15


# --- Errors -------------------------------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_a_run_whose_directory_is_replaced_ends_and_leaves_the_other_alone(
    tmp_path: Path, anyio_backend: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def replacing(trainer: Any, groups: list[Group]) -> Metrics:
        if trainer.steps[POLICY] == 2:
            config.run_dir.rename(tmp_path / "gone")
            with open_run_directory(config):  # another run's
                pass
        return await update(trainer, groups)

    config = make_settings(tmp_path / "run", checkpoint={"every": 1})
    async with open_fake_run(config) as fake:
        with pytest.raises(ExceptionGroup) as caught:
            await fake.train(replacing)
    assert isinstance(first_error(caught.value), RunDirectoryError)
    assert "what came after step 2 is lost" in caplog.text
    assert [line["step"] for line in jsonl.read(tmp_path / "gone" / "metrics.jsonl")] == [1, 2]
    assert not list((config.run_dir / "checkpoints").iterdir())
    assert not (config.run_dir / "latest").exists()


@pytest.mark.anyio
async def test_an_engine_that_dies_leaves_a_checkpoint_of_the_last_step(tmp_path: Path, anyio_backend: str) -> None:
    config = make_settings(tmp_path / "run", checkpoint={"every": 1000})
    async with open_fake_run(config) as fake:
        generate = fake.engine.generate

        async def die(request: GenerationRequest) -> list[Completion]:
            if request.policy_version == 3:
                raise EngineError("the engine died")
            return await generate(request)

        fake.engine.generate = die  # type: ignore[method-assign]
        with pytest.raises(ExceptionGroup) as caught:
            await fake.train(update)
    assert isinstance(first_error(caught.value), EngineError)
    saved = newest_checkpoint(config.run_dir)
    assert saved is not None
    assert saved.step in (3, 4)
    async with open_fake_run(config.model_copy(update={"resume": True})) as fake:
        await fake.train(update)
        assert fake.ledger.counts["trained"] == fake.ledger.low_water == 12


@pytest.mark.anyio
async def test_the_first_error_is_told_even_if_nothing_can_be_saved(tmp_path: Path, anyio_backend: str) -> None:
    config = make_settings(tmp_path / "run", checkpoint={"every": 1000})

    async def die(*_: Any) -> Any:
        raise TrainerError("trainer rank 0 was killed by SIGKILL")

    async with open_fake_run(config) as fake:
        fake.trainer.save = die  # type: ignore[assignment, method-assign]
        fake.trainer.optim_step = die  # type: ignore[assignment, method-assign]
        with pytest.raises((ExceptionGroup, TrainerError)) as caught:
            await fake.train(update)
    error = first_error(caught.value)
    assert isinstance(error, TrainerError)
    assert not isinstance(error, CheckpointError)


def test_run_raises_the_error_that_says_most() -> None:
    nested = BaseExceptionGroup("", [ValueError("b"), ExceptionGroup("", [KeyError("a"), EngineError("died")])])
    assert str(first_error(nested)) == "died"
    assert isinstance(first_error(ExceptionGroup("", [KeyError("a"), ValueError("b")])), KeyError)


def test_run_unwraps_the_groups_of_task_groups() -> None:
    async def main(config: RunSettings, marker: str) -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(partial(fail, marker))

    async def fail(marker: str) -> Awaitable[None]:
        raise EngineError(f"with mark {len(marker)}")

    with pytest.raises(EngineError, match="with mark 32"):
        run(main, RunSettings())


class EqualScores:
    async def score(self, task: Any, rollout: Rollout) -> float | Failure:
        return 1.0


def test_groups_without_a_signal_are_replaced_up_to_a_share_of_the_step(tmp_path: Path) -> None:
    # Synchronous: else groups of a step that end while the step before has had its share are not replaced.
    train(make_settings(tmp_path / "run", dynamic_sampling=0.4, max_staleness=0), scorer=EqualScores())
    lines = read_metrics(tmp_path / "run")
    assert len(lines) == 6
    assert [line["async/dropped_filtered"] for line in lines] == [1.0] * 6  # one of two groups, each step


# --- The canary ---------------------------------------------------------------------------------------------------------


def test_a_canary_lies_between_a_publish_and_the_next_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Version 0, with which the run begins, and every second one; also the last, which no update follows."""
    log: list[str] = []

    class Logged(Trainer):
        async def logprobs(self, name: str | None, samples: Sequence[Sample]) -> list[FloatArray]:
            log.append(f"canary of {self.steps[POLICY]}")
            assert name == POLICY
            return await super().logprobs(name, samples)

        async def export_adapter(self, name: str) -> AdapterTicket:
            log.append(f"publish {self.steps[POLICY]}")
            return await super().export_adapter(name)

        async def optim_step(self, name: str, adam: AdamConfig) -> OptimResult:
            log.append(f"update {self.steps[POLICY]}")
            return await super().optim_step(name, adam)

    monkeypatch.setattr(sys.modules[__name__], "Trainer", Logged)
    config = make_settings(tmp_path / "run", num_steps=4, refit={"canary_every": 2})
    train(config)
    assert ", ".join(log) == (
        "publish 0, canary of 0, update 0, publish 1, update 1, publish 2, canary of 2, update 2, publish 3, update 3, "
        "publish 4, canary of 4"
    )
    lines = read_metrics(config.run_dir)
    assert [line["refit/canary_difference"] for line in lines] == pytest.approx([0, math.nan] * 2, nan_ok=True)
    assert [line["time/canary"] >= 0 for line in lines] == [True, False] * 2
    spans = [event for event in jsonl.read(config.run_dir / "events.jsonl") if event["name"] == "canary"]
    assert [span["policy_version"] for span in spans] == [0, 2, 4]


def test_a_canary_that_disagrees_ends_the_run_before_the_next_update(tmp_path: Path) -> None:
    async def main() -> None:
        config = make_settings(tmp_path / "run", max_staleness=0, refit={"canary_every": 3})
        async with open_fake_run(config) as fake:

            async def other(name: str | None, samples: Sequence[Sample]) -> list[FloatArray]:
                away = 0.25 * (fake.trainer.steps[POLICY] == 3)  # type: ignore[attr-defined]
                return [sample.rollout_logprobs - np.float32(away) for sample in samples]

            fake.trainer.logprobs = other  # type: ignore[method-assign]
            await fake.train(update)

    with pytest.raises(BaseExceptionGroup) as caught:
        anyio.run(main)
    error = first_error(caught.value)
    assert isinstance(error, RefitError)
    assert "policy version 3" in str(error)
    saved = newest_checkpoint(tmp_path / "run")
    assert saved is not None
    assert saved.step == 3


# --- Held-out prompts ---------------------------------------------------------------------------------------------------


def evaluations(run_dir: Path) -> list[dict[str, Any]]:
    return list(jsonl.read(run_dir / "evaluations.jsonl"))


HELD_OUT = {"every": 2, "num_prompts": 2, "group_size": 3}


def test_held_out_prompts_are_answered_by_pinned_versions_and_never_trained_on(tmp_path: Path) -> None:
    asked: list[tuple[int, int]] = []

    class Noting(Scores):
        async def score(self, task: Any, rollout: Rollout) -> float | Failure:
            asked.append((task, rollout.policy_version))
            return await super().score(task, rollout)

    config = make_settings(tmp_path / "run", evaluation=HELD_OUT)
    train(config, scorer=Noting())
    found = evaluations(config.run_dir)
    assert [line["policy_version"] for line in found] == [0, 2, 4, 6]
    for line in found:
        assert (line["eval/prompts"], line["eval/failures"]) == (2, 0)
        assert line["eval/mean_length"] > 0
        assert line["time/eval"] > 0
        of_it = [task for task, version in asked if version == line["policy_version"] and task >= NUM_TASKS]
        assert sorted(of_it) == [NUM_TASKS] * 3 + [NUM_TASKS + 1] * 3
    assert len(read_metrics(config.run_dir)) == 6
    saved = newest_checkpoint(config.run_dir)
    assert saved is not None
    assert saved.step == 6


def test_an_evaluation_has_a_temperature_of_its_own(tmp_path: Path) -> None:
    config = make_settings(tmp_path / "run", evaluation=HELD_OUT | {"temperature": 0.0})
    seen: set[tuple[bool, float]] = set()

    async def main() -> None:
        async with open_fake_run(config) as fake:
            generate = fake.engine.generate

            async def noting(request: GenerationRequest) -> list[Completion]:
                if len(request.tokens) == 3:  # no canary
                    seen.add((request.tokens[0] >= NUM_TASKS, request.temperature))
                return await generate(request)

            fake.engine.generate = noting  # type: ignore[method-assign]
            await fake.train(update)

    anyio.run(main)
    assert seen == {(True, 0.0), (False, 1.0)}


def test_training_goes_on_during_an_evaluation_which_keeps_its_version(tmp_path: Path) -> None:
    """The base model's answers to held-out prompts are scored only when version 2 samples."""
    config = make_settings(tmp_path / "run", evaluation={**HELD_OUT, "every": 3}, max_staleness=0)

    class Slow(Scores):
        later = anyio.Event()

        async def score(self, task: Any, rollout: Rollout) -> float | Failure:
            if rollout.policy_version == 2:
                self.later.set()
            if task >= NUM_TASKS and rollout.policy_version == 0:
                await self.later.wait()
            return await super().score(task, rollout)

    train(config, scorer=Slow())
    assert [line["policy_version"] for line in evaluations(config.run_dir)] == [0, 3, 6]


def test_an_evaluation_that_fails_ends_the_run(tmp_path: Path) -> None:
    class Broken(Scores):
        async def score(self, task: Any, rollout: Rollout) -> float | Failure:
            if task >= NUM_TASKS:
                raise EngineError("gone")
            return await super().score(task, rollout)

    with pytest.raises(BaseExceptionGroup) as caught:
        train(make_settings(tmp_path / "run", evaluation=HELD_OUT), scorer=Broken())
    assert isinstance(first_error(caught.value), EngineError)
