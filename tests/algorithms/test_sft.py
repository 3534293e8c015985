"""Supervised fine-tuning: its loss, a run that is stopped and resumed, and one with the real trainer."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import numpy as np
import pytest
from rlloop.algorithms.sft import Config, main, train, update

from rlloop import cli, supervised_run
from rlloop.adapters import POLICY
from rlloop.backend import load_tokenizer
from rlloop.checkpoint import newest_checkpoint
from rlloop.config import TrainerSettings
from rlloop.errors import ConfigError, RunDirectoryError, TrainerError
from rlloop.losses import negative_log_likelihood
from rlloop.refit.transports import DiskWriter
from rlloop.supervised import Example, make_samples
from rlloop.tracking import jsonl
from rlloop.tracking.files import read_metrics
from rlloop.tracking.keys import DOCUMENTED, OPTIONAL
from rlloop.trainer import Loss
from rlloop.trainer.fake import FakeTrainer
from rlloop.trainer.peft import PeftTrainer
from rlloop.types import AdamConfig, LoraConfig, Metrics, OptimResult, Sample

EXAMPLE = Path(__file__).parents[2] / "examples" / "sft" / "questions.jsonl"
NUM_ROWS = 5
pytestmark = pytest.mark.filterwarnings("ignore")  # of datasets
Moment = Callable[[], None]
cached_tokenizer = cache(lambda model: load_tokenizer(model, {}))


# --- The loss -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.anyio
async def test_the_loss_is_the_cross_entropy_of_transformers(tiny_llama: Path, tmp_path: Path) -> None:
    """Whatever the microbatches: 24 tokens hold two or three of the samples."""
    import torch
    from transformers import AutoModelForCausalLM

    generator = np.random.default_rng(0)
    examples = []
    for length, num_learned in ((9, 3), (5, 4), (12, 1), (7, 6)):
        tokens = generator.integers(100, 40_000, length).astype(np.int32)
        examples.append(Example(tokens, np.arange(length) >= length - num_learned))
    ids, labels = torch.zeros((4, 12), dtype=torch.long), torch.full((4, 12), -100)
    for row, example in enumerate(examples):
        tokens = torch.from_numpy(example.tokens).long()
        ids[row, : len(tokens)] = tokens
        labels[row, : len(tokens)] = torch.where(torch.from_numpy(example.loss_mask), tokens, -100)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    with torch.no_grad():
        expected = float(model(input_ids=ids, attention_mask=(ids != 0).long(), labels=labels).loss)
    async with PeftTrainer(
        str(tiny_llama),
        dtype="float32",
        settings=TrainerSettings(max_tokens_per_microbatch=24),
        temperature=1.0,
        writer=DiskWriter("float32", tmp_path / "refit"),
        cores=frozenset({max(os.sched_getaffinity(0))}),
        log_path=tmp_path / "trainer.log",
    ) as trainer:
        await trainer.create_adapter(POLICY, LoraConfig(rank=4))
        found = await trainer.forward_backward(POLICY, make_samples(examples, range(4)), negative_log_likelihood)
        assert found["loss"] == pytest.approx(expected, abs=1e-4)
        assert found["nll/mean"] == pytest.approx(expected, abs=1e-4)
        assert found["num_tokens"] == 14
        await trainer.optim_step(POLICY, AdamConfig(lr=1e-2))
        metrics = await update(trainer, make_samples(examples, range(4)), Config(dataset=""))
        assert metrics["loss/policy"] < found["loss"]


# --- Stopped and resumed, on the fake trainer ----------------------------------------------------------------------------


class RecordingTrainer(FakeTrainer):
    """An adapter's weights are the answers that it was trained on, in order."""

    def __init__(self, moment: Moment) -> None:
        super().__init__()
        self._moment = moment
        self.weights: list[list[int]] = []
        self.batch: Sequence[Sample] = ()

    async def forward_backward(self, name: str, samples: Sequence[Sample], loss: Loss) -> Metrics:
        self._moment()
        await anyio.lowlevel.checkpoint()
        self.batch = samples
        return await super().forward_backward(name, samples, loss)

    async def optim_step(self, name: str, adam: AdamConfig) -> OptimResult:
        self._moment()
        await anyio.lowlevel.checkpoint()
        self.weights += [sample.tokens[sample.loss_mask].tolist() for sample in self.batch]
        return await super().optim_step(name, adam)

    async def save(self, name: str, folder: Path) -> None:
        self._moment()
        await anyio.lowlevel.checkpoint()
        await super().save(name, folder)
        (folder / "state" / "weights.json").write_text(json.dumps(self.weights))

    async def load(self, name: str, folder: Path) -> None:
        await super().load(name, folder)
        self.weights = json.loads((folder / "state" / "weights.json").read_text())


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[[Moment], None]:
    """fake(moment): runs get a RecordingTrainer that calls `moment` within each of its calls."""

    def install(moment: Moment) -> None:
        @asynccontextmanager
        async def open_trainer(*_: Any) -> AsyncIterator[RecordingTrainer]:
            yield RecordingTrainer(moment)

        monkeypatch.setattr(supervised_run, "open_trainer", open_trainer)
        monkeypatch.setattr(supervised_run, "load_tokenizer", lambda model, _: cached_tokenizer(model))

    install(lambda: None)
    return install


@pytest.fixture
def config(tmp_path: Path, smollm2: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """Six steps of two on five rows."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"prompt": f"row {index}", "completion": " yes" * index} for index in range(NUM_ROWS)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Config(
        model=str(smollm2),
        dataset=str(tmp_path / "rows.jsonl"),
        run_dir=tmp_path / "run",
        batch_size=2,
        num_steps=6,
        checkpoint={"every": 4},
    )


def resumed(config: Config, **changes: Any) -> Config:
    return config.model_copy(update={"resume": True, **changes})


def weights(config: Config) -> list[list[int]]:
    """Those of the newest checkpoint, which its ledger and the step's number agree with."""
    saved = newest_checkpoint(config.run_dir)
    assert saved is not None
    found: list[list[int]] = json.loads((saved.folder / "state" / "weights.json").read_text())
    assert len(found) == config.batch_size * saved.step == saved.ledger["counts"]["trained"]
    assert (saved.ledger["low_water"], saved.ledger["done"]) == (len(found), [])
    assert saved.manifest["policy_version"] == saved.step
    assert (config.run_dir / "latest").resolve() == saved.folder.resolve()
    return found


@pytest.mark.anyio
async def test_each_row_is_trained_on_once_an_epoch_in_an_order_of_the_seed(
    fake: Any, config: Config, tmp_path: Path, anyio_backend: str
) -> None:
    await train(config, "")
    found = weights(config)
    # Batches run on into the next epoch: 12 rows are two epochs of five and two rows of the third.
    epochs = [sorted(map(len, found[first : first + NUM_ROWS])) for first in (0, NUM_ROWS)]
    assert epochs == [[1, 2, 3, 4, 5]] * 2
    assert found[:NUM_ROWS] != found[NUM_ROWS : 2 * NUM_ROWS]
    again, other = (
        config.model_copy(update={"run_dir": tmp_path / name, "seed": seed}) for name, seed in (("a", 0), ("b", 1))
    )
    await train(again, "")
    await train(other, "")
    assert weights(again) == found != weights(other)


@pytest.mark.parametrize("at", [1, 2, 3, 8, 9, 10, 13, 14])
@pytest.mark.anyio
async def test_a_stopped_run_goes_on_where_it_was(
    fake: Any, config: Config, tmp_path: Path, at: int, anyio_backend: str
) -> None:
    """Stopped within the call `at` of the trainer: two a step, a save after the fourth step and at the end."""
    whole = config.model_copy(update={"run_dir": tmp_path / "whole"})
    await train(whole, "")
    scope, left = anyio.CancelScope(), at

    def moment() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            scope.cancel()

    fake(moment)
    with scope:
        await train(config, "")
    assert scope.cancelled_caught == (at < 13)  # from the last optimizer step on nothing is left to stop
    num_steps = (at - (at > 9)) // 2  # a step whose optimizer step has begun is made
    if num_steps:
        assert len(weights(config)) == 2 * num_steps
    fake(lambda: None)
    await train(resumed(config), "")
    assert weights(config) == weights(whole)
    lines = read_metrics(config.run_dir)
    assert [line["step"] for line in lines] == list(range(1, 7))
    for name in ("progress/tokens_trained", "progress/prompts", "progress/epoch"):
        assert [line[name] for line in lines] == [line[name] for line in read_metrics(whole.run_dir)]


@pytest.mark.anyio
async def test_what_a_failed_step_came_after_is_saved(fake: Any, config: Config, anyio_backend: str) -> None:
    def moment() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise TrainerError("out of memory")

    left = 7  # the forward pass of the fourth step
    fake(moment)
    with pytest.raises(TrainerError, match="out of memory"):
        await train(config, "")
    assert len(weights(config)) == 6


@pytest.mark.anyio
async def test_the_last_rows_can_be_held_out(fake: Any, config: Config, anyio_backend: str) -> None:
    config = config.model_copy(update={"evaluation": supervised_run.HeldOutSettings(every=3, num_rows=2)})
    await train(config, "")
    assert Counter(map(len, weights(config))) == {1: 4, 2: 4, 3: 4}
    found = list(jsonl.read(config.run_dir / "evaluations.jsonl"))
    assert [line["policy_version"] for line in found] == [0, 3, 6]
    assert {"eval/loss", "time/eval"} <= found[0].keys() & OPTIONAL.keys()


# --- Errors -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_length": 2}, "all 5 are longer than --max-length 2 tokens"),
        ({"dataset": "missing.jsonl"}, "missing.jsonl cannot be loaded"),
        (
            {"evaluation": {"every": 1, "num_rows": 5}},
            "--evaluation.num-rows: expected less than the dataset's 5 rows, got 5",
        ),
        ({"trainer": {"cpu_cores": "0-9999"}}, "--trainer.cpu-cores: expected cores among"),
    ],
)
def test_a_mistake_leaves_no_run_directory_behind(
    fake: Any, config: Config, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        anyio.run(train, Config(**{**config.model_dump(), **changes}), "")
    assert not config.run_dir.exists()


def test_rows_that_are_left_out_are_told_of_once(fake: Any, config: Config, caplog: pytest.LogCaptureFixture) -> None:
    anyio.run(train, config.model_copy(update={"max_length": 6}), "")
    assert [record.message.partition(": ")[2] for record in caplog.records] == [
        "of 5 rows, 2 are longer than --max-length 6 tokens and 0 hold nothing to learn: they are left out"
    ]
    assert Counter(map(len, weights(config))) == {1: 4, 2: 4, 3: 4}


def test_a_run_is_not_resumed_on_other_rows(fake: Any, config: Config) -> None:
    anyio.run(train, config.model_copy(update={"num_steps": 2}), "")
    with pytest.raises(RunDirectoryError, match="--max-length was 512 and is 511"):
        anyio.run(train, resumed(config, max_length=511), "")
    rows = Path(config.dataset)
    rows.write_text(rows.read_text().replace("row 4", "row 5"))
    with pytest.raises(RunDirectoryError, match="the fingerprint of the tasks was"):
        anyio.run(train, resumed(config), "")


def test_help_has_what_means_something(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["sft", "--help"])
    text = capsys.readouterr().out
    for flag in (
        "--dataset",
        "--batch-size",
        "--max-length",
        "--lora.rank",
        "--checkpoint.every",
        "--evaluation.num-rows",
    ):
        assert flag in text
    for flag in ("--group-size", "--env", "--engine", "--sampling", "--max-staleness", "--refit"):
        assert flag not in text.replace("engine.cpu_cores", "")
    assert cli.main(["sft"]) == 2
    assert "error: --dataset: Field required" in capsys.readouterr().err


# --- A whole run --------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(240)
def test_a_real_run_learns_the_example(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    run_dir = tmp_path / "run"
    main(
        Config(
            model=str(tiny_llama),
            dataset=str(EXAMPLE),
            run_dir=run_dir,
            dtype="float32",
            num_steps=40,
            optim={"lr": 1e-2},
            evaluation={"every": 40, "num_rows": 8},
        )
    )
    lines = read_metrics(run_dir)
    assert len(lines) == 40
    losses = [line["loss/policy"] for line in lines]
    assert losses[0] == pytest.approx(math.log(49152), abs=2)
    assert np.mean(losses[-5:]) < losses[0] - 3
    first, last = jsonl.read(run_dir / "evaluations.jsonl")
    assert last["eval/loss"] < first["eval/loss"] - 1
    assert lines[-1].keys() - {"step", "attempt", "time"} <= DOCUMENTED.keys()
    assert lines[-1]["progress/epoch"] == 16  # 40 steps of 16 rows on 40
    adapter = json.loads((run_dir / "latest" / "adapter" / "adapter_config.json").read_text())
    assert (adapter["peft_type"], adapter["r"]) == ("LORA", 16)
    events = {event["name"] for event in jsonl.read(run_dir / "events.jsonl")}
    assert {"forward_backward", "optim_step", "logprobs", "checkpoint"} <= events
