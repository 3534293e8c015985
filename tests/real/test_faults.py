import os
import signal
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.real, pytest.mark.timeout(900)]


def test_a_killed_engine_ends_the_run_with_an_error_that_says_so(start: Any, tmp_path: Path) -> None:
    run = start(tmp_path / "run", "--num_steps", "1000")
    run.wait_for_steps(2)
    os.kill(run.find("VLLM::Worker").pid, signal.SIGKILL)  # and of EngineCore: tests/engine
    assert run.wait(40) == 1, run.text()
    assert "error: the vLLM engine process died" in run.text()
    assert f"run directory: {run.run_dir}" in run.text()
    assert run.left_behind() == []


def test_a_killed_rank_ends_the_run_with_an_error_that_says_so(start: Any, tmp_path: Path) -> None:
    """Without an engine, whose start takes longer than all the rest."""
    run = start(tmp_path / "run", "--num_steps", "1000", algorithm="sft")
    run.wait_for_steps(2)
    os.kill(run.find("spawn_main").pid, signal.SIGKILL)
    assert run.wait(40) == 1, run.text()
    assert "error: trainer rank 0 was killed by SIGKILL" in run.text()
    assert f"run directory: {run.run_dir}" in run.text()
    assert run.left_behind() == []
