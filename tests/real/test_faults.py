import os
import signal
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.real, pytest.mark.timeout(900)]


@pytest.mark.parametrize(
    ("victim", "message"),
    [
        ("spawn_main", "error: trainer rank 0 was killed by SIGKILL"),
        ("VLLM::EngineCore", "error: the vLLM engine process died"),
        ("VLLM::Worker", "error: the vLLM engine process died"),
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


def test_nothing_survives_a_killed_parent(start: Any, tmp_path: Path) -> None:
    """Not even ranks that wait for each other."""
    flags = ["--trainer.kind", "megatron", "--trainer.megatron.pipeline_parallel", "2"]
    run = start(tmp_path / "run", "--num_steps", "1000", *flags)
    run.wait_for_steps(2)
    assert len([process for process in run.processes if "spawn_main" in " ".join(process.cmdline())]) >= 2
    run.popen.kill()
    assert run.wait(5) == -signal.SIGKILL
    assert run.left_behind(timeout=20) == []
