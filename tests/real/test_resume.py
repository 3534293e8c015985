from collections import defaultdict
from typing import Any

import pytest

from rlloop.checkpoint import newest_checkpoint
from rlloop.tracking import jsonl
from rlloop.tracking.files import read_metrics

pytestmark = [pytest.mark.real, pytest.mark.timeout(900)]


def test_sigterm_ends_the_run_within_seconds_with_a_checkpoint(resumed: Any) -> None:
    assert resumed.first_status == 143, resumed.first.text()
    assert resumed.first_seconds < 30  # 15 on a machine that does nothing else
    assert resumed.first_left_behind == []
    assert resumed.first_checkpoint.passed_over == ()
    done = max(line["step"] for line in jsonl.read(resumed.run_dir / "metrics.jsonl") if line["attempt"] == 1)
    assert done == resumed.first_checkpoint.step


def test_it_says_how_to_go_on(resumed: Any) -> None:
    assert "stopped by SIGTERM; continue with: rlloop grpo" in resumed.first.text()
    assert resumed.first.text().rpartition("continue with: ")[2].splitlines()[0].endswith("--resume")


def test_the_second_attempt_goes_on_where_the_first_was_saved(resumed: Any) -> None:
    second = [line["step"] for line in jsonl.read(resumed.run_dir / "metrics.jsonl") if line["attempt"] == 2]
    assert second == list(range(resumed.first_checkpoint.step + 1, resumed.num_steps + 1))
    logged = {line["step"] for line in read_metrics(resumed.run_dir)}
    assert logged == set(range(1, resumed.num_steps + 1))
    for step in second:
        rows = jsonl.read(resumed.run_dir / "completions" / f"step_{step:06d}.jsonl")
        assert all(row["policy_version"] >= resumed.first_checkpoint.step for row in rows)


def test_every_prompt_is_trained_exactly_once(resumed: Any) -> None:
    trained_in = defaultdict(set)
    for step in range(1, resumed.num_steps + 1):
        for row in jsonl.read(resumed.run_dir / "completions" / f"step_{step:06d}.jsonl"):
            trained_in[row["ordinal"]].add(step)
    assert all(len(in_steps) == 1 for in_steps in trained_in.values())
    assert set(trained_in) <= set(range(2 * resumed.num_steps))
    assert len(trained_in) == 2 * resumed.num_steps
    checkpoint = newest_checkpoint(resumed.run_dir)
    assert checkpoint is not None
    assert checkpoint.ledger["counts"]["trained"] == 2 * resumed.num_steps
    assert (checkpoint.ledger["low_water"], checkpoint.ledger["done"]) == (2 * resumed.num_steps, [])
