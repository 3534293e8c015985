"""The same run on a CUDA GPU: RLLOOP_TEST_MODEL names a folder with SmolLM2-135M-Instruct, where its package is missing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlloop.placement import visible_gpus
from rlloop.tracking.files import read_metrics

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]


PLACEMENTS = {
    "each on a GPU of its own": ([], 2),
    "an engine on each of two GPUs, the trainer beside one": (["--placement.colocate"], 2),
    "two engines and the trainer on GPUs of their own": (["--placement.replicas", "2"], 3),
}


def train(folder: Path, max_staleness: int, *flags: str) -> None:
    model = os.environ.get("RLLOOP_TEST_MODEL", "SmolLM2-135M-Instruct")
    command = [sys.executable, "-m", "rlloop.cli", "grpo", "--model", model, "--run_dir", str(folder), *flags]
    command += ["--num_steps", "6", "--max_staleness", str(max_staleness), "--sampling.max_tokens", "12"]
    command += ["--engine.max_model_len", "128", "--optim.lr", "1e-4"]
    subprocess.run(command, check=True)
    steps = read_metrics(folder)
    assert [step["step"] for step in steps] == [1, 2, 3, 4, 5, 6]
    assert max(step["async/staleness_max"] for step in steps) <= 4 * max_staleness
    assert max(step["policy/sampler_kl_mean"] for step in steps) < 0.02
    assert min(step["optim/grad_norm"] for step in steps) > 0


@pytest.mark.parametrize("max_staleness", [0, 2])
def test_grpo_trains_and_engine_and_trainer_agree(tmp_path: Path, max_staleness: int) -> None:
    train(tmp_path / "run", max_staleness)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_wherever_they_are(tmp_path: Path, placement: str) -> None:
    flags, num_gpus = PLACEMENTS[placement]
    if len(visible_gpus()) < num_gpus:
        pytest.skip(f"needs {num_gpus} GPUs")
    train(tmp_path / "run", 0, *flags)
