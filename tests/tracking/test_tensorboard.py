from pathlib import Path

import pytest

from rlloop.config import RunSettings
from rlloop.tracking import open_trackers


def test_scalars_are_written(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    settings = RunSettings.model_validate({"tracking": {"tensorboard": True}})
    trackers = open_trackers(settings, tmp_path, attempt=1)
    trackers.log(1, {"reward/mean": 0.5, "optim/grad_norm": float("nan")})
    trackers.completions(1, [{"text": "x"}])
    trackers.evaluation(1, {"eval/reward_mean": 0.5, "eval/reward_stderr": 0.1, "eval/prompts": 16.0})
    trackers.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    assert b"reward/mean" in file.read_bytes()
    assert b"eval/reward_mean" in file.read_bytes()
    warnings = [record.message for record in caplog.records if record.name.startswith("rlloop")]
    assert not warnings, "a call that fails is warned about"
