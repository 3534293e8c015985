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


DATASET = Path(__file__).parents[2] / "examples" / "sft" / "questions.jsonl"


def test_a_killed_engine_ends_the_run_with_an_error_that_says_so(start: Any, tmp_path: Path) -> None:
    run = start(tmp_path / "run", "--num_steps", "1000")
    run.wait_for_steps(2)
    os.kill(run.find("VLLM::Worker").pid, signal.SIGKILL)  # and of EngineCore: tests/engine
    assert run.wait(40) == 1, run.text()
    assert "error: the vLLM engine process died" in run.text()
    assert f"run directory: {run.run_dir}" in run.text()
    assert run.left_behind() == []


def test_a_killed_rank_ends_the_run_with_an_error_that_says_so(
    start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without an engine, whose start takes longer than all the rest."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    run = start(tmp_path / "run", "--num_steps", "1000", "--dataset", str(DATASET), algorithm="sft")
    run.wait_for_steps(2)
    os.kill(run.find("spawn_main").pid, signal.SIGKILL)
    assert run.wait(40) == 1, run.text()
    assert "error: trainer rank 0 was killed by SIGKILL" in run.text()
    assert f"run directory: {run.run_dir}" in run.text()
    assert run.left_behind() == []


def test_ctrl_c_ends_a_run_with_a_critic(start: Any, tmp_path: Path) -> None:
    flags = ("--num_steps", "1000", "--checkpoint.every", "1000", "--dtype", "float32")
    run = start(tmp_path / "run", *flags, algorithm="ppo")
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
        if line["async/staleness_max"] == 0:  # then trainer and engine hold the same weights
            assert line["policy/sampler_kl_max"] < 1e-6
        assert isfinite(line["loss/value"])
