import json
import math
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from rlloop.tracking import jsonl
from rlloop.tracking.files import Files, read_metrics


def refuse(constant: str) -> None:
    raise AssertionError(f"not JSON: {constant}")


def test_one_strict_json_line_per_step(tmp_path: Path):
    files = Files(tmp_path, attempt=1)
    files.log(1, {"reward/mean": np.float32(0.5), "optim/grad_norm": math.nan, "a": math.inf, "b": -math.inf})
    line = (tmp_path / "metrics.jsonl").read_text()  # before close: a killed run has it
    assert line.endswith("\n")
    record = json.loads(line, parse_constant=refuse)
    assert record.pop("time") == pytest.approx(time.time(), abs=60)
    assert record == {
        "step": 1,
        "attempt": 1,
        "reward/mean": 0.5,
        "optim/grad_norm": "NaN",
        "a": "Infinity",
        "b": "-Infinity",
    }
    (read,) = read_metrics(str(tmp_path))
    assert math.isnan(read["optim/grad_norm"])
    assert (read["a"], read["b"]) == (math.inf, -math.inf)
    files.close()


def test_a_resumed_attempt_supersedes_the_steps_after_its_checkpoint(tmp_path: Path):
    # Attempt 1 reached step 6 and was killed; 2 resumed from step 3 and reached 5; 3 resumed from 4 and reached 5 again.
    for attempt, steps in ((1, range(1, 7)), (2, range(4, 6)), (3, range(5, 6))):
        files = Files(tmp_path, attempt)
        for step in steps:
            files.log(step, {"reward/mean": 10.0 * attempt + step})
        files.close()
    kept = [(line["step"], line["attempt"], line["reward/mean"]) for line in read_metrics(tmp_path)]
    assert kept == [(1, 1, 11.0), (2, 1, 12.0), (3, 1, 13.0), (4, 2, 24.0), (5, 3, 35.0)]


def test_a_half_written_line_is_skipped_and_swallows_nothing(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "attempt": 1}\n{"step": 2, "att')
    files = Files(tmp_path, attempt=2)
    files.log(2, {})
    files.close()
    assert [(line["step"], line["attempt"]) for line in read_metrics(tmp_path)] == [(1, 1), (2, 2)]


def test_completions_are_written_per_step_and_rewritten_by_a_resume(tmp_path: Path):
    old, new = Files(tmp_path, attempt=1), Files(tmp_path, attempt=2)
    old.completions(17, [{"text": "old"}] * 3)
    new.completions(17, [{"text": "größer\u2028\udc80", "reward": np.float32(math.nan), "tokens": np.arange(2)}])
    lines = (tmp_path / "completions" / "step_000017.jsonl").read_bytes().split(b"\n")
    assert lines.pop() == b""
    assert [json.loads(line, parse_constant=refuse) for line in lines] == [
        {"step": 17, "attempt": 2, "text": "größer\u2028\udc80", "reward": "NaN", "tokens": [0, 1]}
    ]
    old.close()
    new.close()


EVALUATION = {"eval/reward_mean": 0.5, "eval/reward_stderr": math.nan, "eval/prompts": 16.0}


def test_evaluations_have_a_file_of_their_own(tmp_path: Path):
    files = Files(tmp_path, attempt=2)
    files.log(7, {"reward/mean": 0.25})
    files.evaluation(4, EVALUATION)
    (line,) = (tmp_path / "evaluations.jsonl").read_text().splitlines()
    record = json.loads(line, parse_constant=refuse)
    assert (record["policy_version"], record["attempt"], record["eval/reward_mean"]) == (4, 2, 0.5)
    assert record["eval/reward_stderr"] == "NaN"
    assert [line["step"] for line in read_metrics(tmp_path)] == [7]
    files.close()


@contextmanager
def room_for(num_bytes: int) -> Iterator[None]:
    """As on a disk that becomes full within a line, for files of this process."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_is_full_for_a_while_costs_no_line(tmp_path: Path) -> None:
    files = Files(tmp_path, attempt=1)
    files.log(1, {"loss": 1.0})
    with room_for((tmp_path / "metrics.jsonl").stat().st_size + 10):
        for step in (2, 3):
            with pytest.raises(OSError, match="too large"):
                files.log(step, {"loss": float(step)})
    files.log(4, {"loss": 4.0})
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path)] == [(n, float(n)) for n in (1, 2, 3, 4)]
    with room_for(10), pytest.raises(OSError, match="too large"):
        files.evaluation(4, {"eval/reward": 0.5})
    files.close()
    assert [line["policy_version"] for line in jsonl.read(tmp_path / "evaluations.jsonl")] == [4]


def test_completions_are_there_whole_or_not_at_all(tmp_path: Path) -> None:
    files = Files(tmp_path, attempt=1)
    files.completions(1, [{"text": "one"}])
    with room_for(10):
        for step in (1, 2):
            with pytest.raises(OSError, match="too large"):
                files.completions(step, [{"text": "another"}])
    assert "one" in (tmp_path / "completions" / "step_000001.jsonl").read_text()
    assert not (tmp_path / "completions" / "step_000002.jsonl").exists()
    files.close()
