import json
import math
import tomllib
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rlloop.checkpoint import newest_checkpoint
from rlloop.cli import main
from rlloop.tracking import jsonl
from rlloop.tracking.files import read_metrics
from rlloop.tracking.keys import DOCUMENTED, OPTIONAL

pytestmark = [pytest.mark.real, pytest.mark.timeout(900)]


def test_the_run_ends_well_and_leaves_nothing_behind(resumed: Any) -> None:
    assert resumed.second_status == 0, resumed.second.text()
    assert "Traceback" not in resumed.first.text() + resumed.second.text()
    assert resumed.second_left_behind == []


def test_every_line_has_every_documented_metric(resumed: Any) -> None:
    lines = list(jsonl.read(resumed.run_dir / "metrics.jsonl"))
    assert len(lines) >= resumed.num_steps
    for line in lines:
        assert set(DOCUMENTED) - set(line) == set()
        others = set(line) - set(DOCUMENTED) - {"step", "attempt", "time"}
        assert {"loss/value", "value/explained_variance"} <= others <= set(OPTIONAL)


def test_metrics_are_plausible(resumed: Any) -> None:
    checked = set()
    for line in read_metrics(resumed.run_dir):
        assert 0 <= line["reward/min"] <= line["reward/mean"] <= line["reward/max"] <= 1
        assert line["completions/mean_length"] <= 8
        assert line["optim/grad_norm"] > 0
        assert math.isfinite(line["loss/value"])
        assert line["optim/skipped_steps"] == 0
        if line["async/staleness_max"] == 0:  # then trainer and engine hold the same weights, in float32
            assert line["policy/sampler_kl_max"] < 1e-6
            assert line["policy/mismatch_ratio_max"] == pytest.approx(1, abs=1e-3)
        assert line["async/staleness_max"] <= 4
        if math.isfinite(line["refit/canary_difference"]):  # of the first version of each attempt, and of every 20th
            checked.add(line["step"] - 1)
            assert line["refit/canary_difference"] < 1e-4
            assert 0 < line["time/canary"] < line["time/step"]
        assert line["rollout/errors"] == line["rollout/timeouts"] == line["async/dropped_groups"] == 0
        if line["step"] != resumed.first_checkpoint.step:  # the signal may have interrupted its refit
            assert 0 < line["time/refit_stall"] < line["time/refit"] < line["time/step"]
    assert checked >= {0, resumed.first_checkpoint.step}


def test_events_are_spans_of_every_stage(resumed: Any) -> None:
    events = list(jsonl.read(resumed.run_dir / "events.jsonl"))
    spans = defaultdict(list)
    for event in events:
        assert event["start"] <= event["end"]
        spans[event["name"]].append(event)
    assert {"rollout", "score", "refit", "checkpoint"} <= set(spans)
    assert {event["resource"] for event in spans["rollout"]} == {"engine"}
    published = [event["policy_version"] for event in spans["refit"]]
    assert set(published) == set(range(resumed.num_steps + 1))
    # Starting vLLM anew takes longer than anything that a run does.
    gaps = [later["start"] - earlier["end"] for earlier, later in pairwise(spans["refit"])]
    restored = gaps.index(max(gaps)) + 1
    assert published[restored] == resumed.first_checkpoint.step, "the restored version was published before all others"


def test_completions_are_one_file_a_step(resumed: Any) -> None:
    for step in range(1, resumed.num_steps + 1):
        rows = list(jsonl.read(resumed.run_dir / "completions" / f"step_{step:06d}.jsonl"))
        assert len(rows) == 2 * 4
        for row in rows:
            assert row["step"] == step
            assert row["policy_version"] < step
            assert "Say" in row["prompt"]
            assert row["reward"] == pytest.approx(len(row["text"]) % 7 / 6)
            assert 1 <= row["num_tokens"] <= 8


def test_the_run_directory_is_the_contract(resumed: Any, capsys: pytest.CaptureFixture[str]) -> None:
    names = {path.name for path in resumed.run_dir.iterdir()}
    assert {"config.toml", "metrics.jsonl", "events.jsonl", "completions", "checkpoints", "latest", "logs"} <= names
    last = resumed.run_dir / "checkpoints" / f"step_{resumed.num_steps:06d}"
    assert (resumed.run_dir / "latest").resolve() == last.resolve()
    files = {str(path.relative_to(last)) for path in last.rglob("*") if path.is_file()}
    assert {"adapter/adapter_model.safetensors", "adapter/adapter_config.json", "ledger.json", "manifest.json"} <= files
    assert load_file(last / "critic" / "adapter" / "value_head.safetensors")["value_head.weight"].any()
    assert any(name.startswith("state/") for name in files)
    assert not list((resumed.run_dir / "checkpoints").glob(".tmp-*"))
    manifest = json.loads((last / "manifest.json").read_text())
    assert manifest["policy_version"] == manifest["step"] == resumed.num_steps
    assert main(["ppo", "--config", str(resumed.run_dir / "config.toml"), "--dry-run"]) == 0
    assert tomllib.loads(capsys.readouterr().out)["num_steps"] == resumed.num_steps
    assert (resumed.run_dir / "logs" / "engine.log").stat().st_size


def test_a_used_directory_is_refused(resumed: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ppo", "--run_dir", str(resumed.run_dir)]) == 2
    error = capsys.readouterr().err
    assert "--resume" in error
    assert "--overwrite" in error


@pytest.mark.filterwarnings("default")
def test_checkpoints_load_with_peft_alone_and_give_the_logprobs_that_the_engine_sampled_with(
    resumed: Any, tiny_llama: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    seen = defaultdict(list)
    for rollout in jsonl.read(resumed.note):
        seen[rollout["policy_version"]].append(rollout)
    versions = [version for version in seen if version > 0]
    assert len(versions) >= 4
    effects = []
    for version in versions:
        base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
        before = [_logprobs(base, rollout) for rollout in seen[version]]
        folder = resumed.run_dir / "checkpoints" / f"step_{version:06d}" / "adapter"
        if not folder.exists():  # the version that was current at the signal may have been saved by the other attempt
            continue
        model = PeftModel.from_pretrained(base, folder)
        for rollout, without in zip(seen[version], before, strict=True):
            found = _logprobs(model, rollout)
            np.testing.assert_allclose(found, _sampled(rollout), atol=1e-3)
            effects.append(np.abs(found - without).max())
    assert max(effects) > 0.05, "the adapter has changed nothing, so this test could not fail"


@torch.no_grad()
def _logprobs(model: Any, rollout: dict[str, Any]) -> np.ndarray:
    tokens = torch.tensor([rollout["tokens"]])
    every = model(tokens).logits[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0].numpy()
    return every[np.array(rollout["loss_mask"])[1:]]


def _sampled(rollout: dict[str, Any]) -> np.ndarray:
    return np.array(rollout["rollout_logprobs"])[np.array(rollout["loss_mask"])]


def test_sigterm_ends_the_run_within_seconds_with_a_checkpoint(resumed: Any) -> None:
    assert resumed.first_status == 143, resumed.first.text()
    assert resumed.first_seconds < 30  # 15 on a machine that does nothing else
    assert resumed.first_left_behind == []
    assert resumed.first_checkpoint.passed_over == ()
    done = max(line["step"] for line in jsonl.read(resumed.run_dir / "metrics.jsonl") if line["attempt"] == 1)
    assert done == resumed.first_checkpoint.step


def test_it_says_how_to_go_on(resumed: Any) -> None:
    assert "stopped by SIGTERM; continue with: rlloop ppo" in resumed.first.text()
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
