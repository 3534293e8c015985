import os
import signal
from math import isfinite
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from rlloop.checkpoint import newest_checkpoint
from rlloop.tracking.files import read_metrics

pytestmark = [pytest.mark.real, pytest.mark.timeout(900)]


@pytest.mark.parametrize(
    ("victim", "message"),
    [
        ("spawn_main", "error: trainer rank 0 was killed by SIGKILL"),
        ("VLLM::Worker", "error: the vLLM engine process died"),  # and of EngineCore: tests/engine
    ],
)
def test_a_killed_stage_ends_the_run_with_an_error_that_says_so(
    victim: str, message: str, start: Any, tmp_path: Path
) -> None:
    run = start(tmp_path / "run", "--num_steps", "1000")
    run.wait_for_steps(2)
    os.kill(run.find(victim).pid, signal.SIGKILL)
    assert run.wait(40) == 1, run.text()
    assert message in run.text()
    assert f"run directory: {run.run_dir}" in run.text()
    assert run.left_behind() == []


def test_ctrl_c_ends_a_run_of_smollm2_with_a_critic(start: Any, tmp_path: Path) -> None:
    flags = ("--num_steps", "1000", "--checkpoint.every", "1000", "--optim.lr", "1e-4")
    run = start(tmp_path / "run", *flags, model="SmolLM2-135M-Instruct", algorithm="ppo")
    run.wait_for_steps(2)
    run.signal_group(signal.SIGINT)
    assert run.wait(60) == 130, run.text()
    assert run.left_behind() == []
    assert "stopped by SIGINT; continue with: rlloop ppo" in run.text()
    assert "Traceback" not in run.text()
    checkpoint = newest_checkpoint(run.run_dir)
    assert checkpoint is not None
    assert checkpoint.step >= 2
    head = load_file(checkpoint.folder / "critic" / "adapter" / "value_head.safetensors")["value_head.weight"]
    assert head.any()
    for line in read_metrics(run.run_dir):
        assert line["policy/sampler_kl_mean"] < 0.05  # bfloat16 where the processor has it
        assert isfinite(line["loss/value"])
