"""Weights that a trainer's rank sends to an engine, where either of them may fail."""

from __future__ import annotations

import importlib
import sys
import uuid
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from time import monotonic
from types import ModuleType

import anyio
import pytest
import torch

from rlloop.config import TrainerSettings
from rlloop.errors import RefitError, TrainerError
from rlloop.refit.stream import WeightsReader, WeightsSender
from rlloop.refit.transports import SHARED_MEMORY
from rlloop.trainer.rank_trainer import RankArguments, RankTrainer
from rlloop.trainer.ranks import RankSpec

pytestmark = pytest.mark.anyio

MODULE = """
import os, signal, torch

class Rank:
    def __init__(self, context, arguments):
        self.context, self.sender = context, arguments.sender
        self.sender.listen()

    def send_weights(self, name):
        self.sender.send(self.weights(name), self.context.check_interrupt)

    def weights(self, name):
        yield "a", torch.ones(3)
        if name == "fails":
            raise KeyError("missing")
        if name == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        yield "b", torch.ones(2)

    def close(self):
        self.sender.close()

    def remove_adapter(self, name):
        pass
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Importable in the spawned process as well."""
    (tmp_path / "sending_rank.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("sending_rank", None)
    return importlib.import_module("sending_rank")


@pytest.fixture
def trainer(module: ModuleType) -> Iterator[RankTrainer]:
    class Trainer(RankTrainer):
        def _specs(self, arguments: RankArguments, *others: object) -> list[RankSpec]:
            return [RankSpec(partial(module.Rank, arguments=arguments))]

    name = f"rlloop-test-{uuid.uuid4().hex}"
    sender = WeightsSender("memory", "float32", name, 1, bucket_bytes=4)
    yield Trainer(
        "no model", dtype="float32", settings=TrainerSettings(), temperature=1.0, writer=sender, sender=sender
    )
    for segment in SHARED_MEMORY.glob(f"{name}*"):  # of a rank that was killed; in a run its guard removes them
        segment.unlink()


async def take(location: str) -> list[str]:
    """As an engine's worker does."""
    reader = WeightsReader(torch.device("cpu"))

    def read() -> list[str]:
        with reader.connect(location) as stream:
            return [name for name, _ in reader.read(stream)]

    return await anyio.to_thread.run_sync(read)


async def test_all_have_come_when_the_block_ends(trainer: RankTrainer) -> None:
    async with trainer:
        await trainer.remove_adapter("")  # it has started
        for _ in range(2):
            async with trainer.sending_weights("policy") as ticket:
                assert await take(ticket.location) == ["a", "b"]


@pytest.mark.parametrize(("name", "reason"), [("fails", "KeyError: 'missing'"), ("dies", "was killed by SIGKILL")])
async def test_what_went_wrong_in_the_trainer_is_what_is_raised(trainer: RankTrainer, name: str, reason: str) -> None:
    async with trainer:
        await trainer.remove_adapter("")

        async def publish() -> None:
            async with trainer.sending_weights(name) as ticket:
                with pytest.raises(RefitError, match="hung up before all weights had come"):
                    await take(ticket.location)
                raise RefitError("the engine refused it")

        with pytest.raises(TrainerError, match=reason):
            await publish()


async def test_an_engine_that_does_not_take_them_leaves_the_trainer_free(trainer: RankTrainer) -> None:
    async with trainer:
        await trainer.remove_adapter("")
        started = monotonic()
        with pytest.raises(RefitError, match="the engine refused it"):
            async with trainer.sending_weights("policy"):
                raise RefitError("the engine refused it")
        await trainer.remove_adapter("")
        assert monotonic() - started < 10
