"""The `peft` trainer as the loop sees it: a process behind the Trainer protocol."""

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from time import monotonic

import anyio
import numpy as np
import pytest

from rlloop.config import TrainerSettings
from rlloop.errors import TrainerError
from rlloop.losses import policy_loss
from rlloop.refit.transports import DiskWriter
from rlloop.trainer import Trainer
from rlloop.trainer.peft import PeftTrainer
from rlloop.trainer.ranks import Interrupted
from rlloop.types import AdamConfig, LoraConfig, Sample

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    """The other one is for `Ranks` alone (test_ranks.py), whose processes import no torch."""
    return "asyncio"


LOSS = policy_loss


def make_trainer(model: str, folder: Path, max_tokens: int = 64) -> PeftTrainer:
    return PeftTrainer(
        model,
        dtype="float32",
        settings=TrainerSettings(max_tokens_per_microbatch=max_tokens),
        temperature=1.0,
        writer=DiskWriter("float32", folder / "refit"),
        cores=frozenset({max(os.sched_getaffinity(0))}),
        log_path=folder / "trainer.log",
    )


async def test_learns_exports_and_resumes(
    models: dict[str, str], make_samples: Callable[..., list[Sample]], tmp_path: Path
) -> None:
    samples = make_samples()
    async with make_trainer(models["llama"], tmp_path) as peft:
        trainer: Trainer = peft
        await trainer.create_adapter("policy", LoraConfig(rank=4, alpha=8.0))
        base = await trainer.logprobs(None, samples)
        metrics = await trainer.forward_backward("policy", samples, LOSS)
        assert metrics["num_tokens"] == sum(s.loss_mask.sum() for s in samples)
        assert not (await trainer.optim_step("policy", AdamConfig(lr=1e-2))).skipped
        trained = await trainer.logprobs("policy", samples)
        assert max(abs(a - b).max() for a, b in zip(trained, base, strict=True)) > 1e-3
        ticket = await trainer.export_adapter("policy")
        assert ticket.transport == "disk"
        await trainer.save("policy", tmp_path / "step")
        await trainer.forward_backward("policy", samples, LOSS)
        await trainer.optim_step("policy", AdamConfig(lr=1e-2))
        await trainer.load("policy", tmp_path / "step")
        for again, before in zip(await trainer.logprobs("policy", samples), trained, strict=True):
            np.testing.assert_array_equal(again, before)
        await trainer.create_adapter("critic", LoraConfig(), head="value")
        assert not np.concatenate(await trainer.values("critic", samples)).any()
        with pytest.raises(TrainerError, match="adapter 'critic' has a value head"):
            await trainer.export_adapter("critic")
        with pytest.raises(TrainerError, match="no adapter is named 'other'"):
            await trainer.export_adapter("other")
    assert not (tmp_path / "refit" / "refit.safetensors").exists()  # the writer was closed
    assert not multiprocessing.active_children()


async def test_save_ends_a_forward_backward(
    models: dict[str, str], make_samples: Callable[..., list[Sample]], tmp_path: Path
) -> None:
    samples = make_samples() * 400  # minutes, in microbatches of one sample
    async with make_trainer(models["llama"], tmp_path, max_tokens=16) as trainer:
        await trainer.create_adapter("policy", LoraConfig(rank=4))
        with anyio.move_on_after(0.5):  # Ctrl-C: the call is cancelled, then the loop saves
            await trainer.forward_backward("policy", samples, LOSS)
        started = monotonic()
        await trainer.save("policy", tmp_path / "first")
        async with anyio.create_task_group() as tasks:

            async def train() -> None:
                with pytest.raises(Interrupted):
                    await trainer.forward_backward("policy", samples, LOSS)

            tasks.start_soon(train)
            await anyio.sleep(0.5)
            await trainer.save("policy", tmp_path / "second")
        assert monotonic() - started < 15
    for name in ("first", "second"):
        assert (tmp_path / name / "state" / "optimizer.safetensors").exists()


async def test_killed_rank(models: dict[str, str], make_samples: Callable[..., list[Sample]], tmp_path: Path) -> None:
    async with make_trainer(models["llama"], tmp_path, max_tokens=16) as trainer:
        await trainer.create_adapter("policy", LoraConfig(rank=4))
        (process,) = multiprocessing.active_children()

        async def kill() -> None:
            await anyio.sleep(0.5)
            os.kill(process.pid, signal.SIGKILL)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(kill)
            started = monotonic()
            with pytest.raises(TrainerError, match=r"SIGKILL.*trainer\.log"):
                await trainer.forward_backward("policy", make_samples() * 400, LOSS)
            assert monotonic() - started < 5


async def test_a_model_that_does_not_load(tmp_path: Path) -> None:
    async with make_trainer(str(tmp_path / "nowhere"), tmp_path) as trainer:
        with pytest.raises(TrainerError, match="nowhere"):
            await trainer.create_adapter("policy", LoraConfig(rank=4))
