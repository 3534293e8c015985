"""The megatron trainer in whole runs, with real vLLM."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from rlloop.checkpoint import newest_checkpoint
from rlloop.models import resolve_model
from rlloop.tracking.files import read_metrics

pytestmark = [pytest.mark.real, pytest.mark.timeout(600)]

Start = Callable[..., Any]


@pytest.fixture(scope="module")
def killed(start: Start, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A real model, all of whose weights are sent, with the adapter merged into them; after 3 steps its process is killed."""
    flags = ["--trainer.kind", "megatron", "--num_steps", "1000", "--max_staleness", "0", "--dtype", "float32"]
    flags += ["--refit.form", "full", "--optim.lr", "1e-3"]
    run = start(tmp_path_factory.mktemp("killed") / "run", *flags, model="SmolLM2-135M-Instruct")
    run.wait_for_steps(3)
    assert run.find("VLLM::Engine").is_running()
    run.popen.kill()
    assert run.wait(5) == -signal.SIGKILL
    return run.run_dir, run.left_behind(timeout=20)


def test_trains_a_real_model(killed: tuple[Path, list[str]]) -> None:
    run_dir, _ = killed
    steps = read_metrics(run_dir)
    assert len(steps) >= 3
    for step in steps:  # trainer and engine hold the same weights
        assert step["policy/sampler_kl_max"] < 1e-6
        assert step["policy/mismatch_ratio_max"] == pytest.approx(1, abs=1e-3)
        assert step["optim/grad_norm"] > 0
    checkpoint = newest_checkpoint(run_dir)
    assert checkpoint is not None
    base = AutoModelForCausalLM.from_pretrained(resolve_model("SmolLM2-135M-Instruct"), dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, checkpoint.folder / "adapter")
    trained = [parameter for name, parameter in adapted.named_parameters() if "lora_B" in name]
    assert len(trained) == 7 * 30
    assert all(parameter.any() for parameter in trained)


def test_nothing_survives_a_killed_parent(killed: tuple[Path, list[str]]) -> None:
    _, left_behind = killed
    assert left_behind == []


def test_not_even_ranks_that_wait_for_each_other(start: Any, tmp_path: Path) -> None:
    """Without an engine, whose start takes longer than all the rest."""
    flags = ["--trainer.kind", "megatron", "--trainer.megatron.pipeline_parallel", "2"]
    run = start(tmp_path / "run", "--num_steps", "1000", *flags, algorithm="sft")
    run.wait_for_steps(2)
    assert len([process for process in run.processes if "spawn_main" in " ".join(process.cmdline())]) == 2
    run.popen.kill()
    assert run.wait(5) == -signal.SIGKILL
    assert run.left_behind(timeout=20) == []
