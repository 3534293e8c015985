import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import anyio
import pytest

from rlloop.checkpoint import write_checkpoint
from rlloop.config import RunSettings
from rlloop.errors import RunDirectoryError
from rlloop.flags import parse
from rlloop.run_directory import RunDirectory, open_run_directory


def settings(path: Path, **changes: Any) -> RunSettings:
    return RunSettings.model_validate({"run_dir": path / "run", **changes})


def start(path: Path, **changes: Any) -> RunDirectory:
    with open_run_directory(settings(path, **changes)) as run_directory:
        return run_directory


def test_a_new_directory(tmp_path):
    run = start(tmp_path, seed=3)
    assert run.attempt == 1
    assert sorted(entry.name for entry in run.path.iterdir()) == [
        "attempt", "checkpoints", "completions", "config.toml", "logs",
    ]  # fmt: skip
    again, _ = parse(RunSettings, ["--config", str(run.path / "config.toml")], "rlloop")
    assert again == settings(tmp_path, seed=3)
    assert run.config_sha256 == hashlib.sha256((run.path / "config.toml").read_bytes()).hexdigest()


def test_an_existing_empty_directory_can_be_used(tmp_path):
    (tmp_path / "run").mkdir()
    assert start(tmp_path).attempt == 1


@pytest.mark.parametrize("made", ["metrics.jsonl", "evaluations.jsonl", "checkpoints/step_000001"])
def test_a_used_directory_is_refused(made, tmp_path):
    (start(tmp_path).path / made).write_text("{}")
    with pytest.raises(RunDirectoryError, match="holds a run already: --resume continues it, --overwrite deletes it"):
        start(tmp_path)


def test_one_whose_start_failed_can_be_used_once_more(tmp_path):
    failed = start(tmp_path, seed=3).path
    (failed / "metrics.jsonl").touch()
    (failed / "wandb_run_id").write_text("1")
    again = start(tmp_path, seed=4)
    assert not (again.path / "wandb_run_id").exists(), "W&B would go on with what failed"
    assert again.attempt == 2
    assert "seed = 4" in (again.path / "config.toml").read_text()


def test_one_whose_start_failed_on_a_full_disk_can_be_used_once_more(tmp_path, monkeypatch):
    with monkeypatch.context() as full:
        full.setattr("os.fsync", lambda file: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(
            RunDirectoryError,
            match=r"run: expected a directory that can be read and written: \[Errno 28\] No space left",
        ):
            start(tmp_path)
    assert [entry.name for entry in (tmp_path / "run").iterdir()] == ["attempt"]
    assert start(tmp_path).attempt == 2


def test_one_whose_start_was_killed_can_be_used_once_more(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "attempt").write_text("1\n")
    (tmp_path / "run" / ".config.toml.tmp").write_text("seed = ")
    assert start(tmp_path).attempt == 2
    assert not list((tmp_path / "run").glob(".*"))


def test_resume_mends_latest(tmp_path):
    """A run may have been killed between a checkpoint and that."""

    async def save(folder: Path) -> None:
        (folder / "weights").write_text("w")

    run = start(tmp_path)
    for step in (1, 2):
        anyio.run(write_checkpoint, run.path, step, save, {}, {})
    (run.path / "latest").unlink()
    (run.path / "latest").symlink_to("checkpoints/step_000001")
    assert start(tmp_path, resume=True).checkpoint.step == 2
    assert os.readlink(run.path / "latest") == "checkpoints/step_000002"


def test_a_directory_that_was_replaced_is_noticed(tmp_path):
    with open_run_directory(RunSettings(run_dir=tmp_path / "run")) as run:
        run.check()
        (tmp_path / "run").rename(tmp_path / "gone")
        for _ in range(2):
            with pytest.raises(RunDirectoryError, match="run was deleted or replaced while the run used it"):
                run.check()
            if not (tmp_path / "run").exists():
                start(tmp_path)  # another run's
        assert (tmp_path / "run" / "attempt").exists()


def test_attempts_are_counted_past_nine_and_from_one_again(tmp_path):
    for attempt in range(1, 12):
        assert start(tmp_path).attempt == attempt
    run = start(tmp_path, overwrite=True)
    assert (run.attempt, (run.path / "attempt").read_text()) == (1, "1\n")


def test_a_broken_count_of_attempts_is_named(tmp_path):
    run = start(tmp_path)
    (run.path / "attempt").write_text("one")
    with pytest.raises(RunDirectoryError, match="attempt: expected the number of the last attempt, got 'one'"):
        start(tmp_path, resume=True)


def test_resume_counts_attempts_and_keeps_what_is_there(tmp_path):
    run = start(tmp_path, num_steps=5)
    (run.path / "checkpoints" / "file").touch()
    assert start(tmp_path, resume=True, num_steps=9).attempt == 2
    assert start(tmp_path, resume=True, num_steps=9).attempt == 3
    assert (run.path / "checkpoints" / "file").exists()
    config = (run.path / "config.toml").read_text()
    assert "num_steps = 9" in config
    assert "resume = false" in config


def test_nothing_to_resume(tmp_path):
    with pytest.raises(RunDirectoryError, match="run does not exist, so there is nothing to resume"):
        start(tmp_path, resume=True)
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    with pytest.raises(RunDirectoryError, match="run is empty, so there is nothing to resume"):
        start(tmp_path, resume=True)
    assert not list((tmp_path / "run").iterdir())


def test_resume_with_other_settings_names_each_flag_and_both_values(tmp_path):
    start(tmp_path, env_args={"level": 1}, lora={"rank": 8})
    with pytest.raises(RunDirectoryError) as caught:
        start(tmp_path, resume=True, env_args={"level": 2}, lora={"rank": 16, "targets": ["q_proj"]}, optim={"lr": 1.0})
    message = str(caught.value)
    assert "--env-args was {'level': 1} and is {'level': 2}" in message
    assert "--lora.rank was 8 and is 16" in message
    assert "--lora.targets was ['q_proj', " in message
    assert "--optim" not in message
    assert "attempt" not in message
    assert start(tmp_path, resume=True, env_args={"level": 1}, lora={"rank": 8}).attempt == 2


def test_resume_with_other_settings_that_may_change_says_so(tmp_path, caplog):
    start(tmp_path, optim={"lr": 3e-5}, sampling={"temperature": 0.7}, num_steps=5)
    start(tmp_path, resume=True, sampling={"temperature": 0.7}, num_steps=9)
    [warning] = caplog.messages
    assert warning == "the run goes on with other settings: --optim.lr was 3e-05 and is 0.0001"
    caplog.clear()
    start(tmp_path, resume=True, sampling={"temperature": 0.7}, num_steps=9)
    assert not caplog.messages


@pytest.mark.parametrize(
    ("setting", "value", "shown"),
    [
        *(("model", "other", "'other'"), ("env", "other", "'other'"), ("seed", 4, "4"), ("group_size", 4, "4")),
        ("rewards", ("module:other",), r"\['module:other'\]"),
    ],
)
def test_each_fixed_setting(tmp_path, setting, value, shown):
    start(tmp_path)
    changed = {setting: value}
    with pytest.raises(RunDirectoryError, match=f"--{setting.replace('_', '-')} was .* and is {shown}"):
        start(tmp_path, resume=True, **changed)


def test_a_run_that_did_not_know_a_setting_can_be_resumed(tmp_path):
    run = start(tmp_path)
    config = run.path / "config.toml"
    text = config.read_text()
    config.write_text(text.replace("\n[chat_template_kwargs]\n", "\n"))
    assert config.read_text() != text
    assert start(tmp_path, resume=True).attempt == 2


@pytest.mark.parametrize(("before", "now"), [({}, {"every": 10}), ({"every": 10}, {"every": 10, "num_prompts": 8})])
def test_as_many_tasks_are_held_out_as_before(tmp_path, before, now):
    start(tmp_path, evaluation=before)
    with pytest.raises(RunDirectoryError, match=r"--evaluation held out \d+ tasks and would hold out \d+"):
        start(tmp_path, resume=True, evaluation=now)
    assert start(tmp_path, resume=True, evaluation=before | ({"every": 5} if before else {})).attempt == 2


def test_resume_with_an_unreadable_config(tmp_path):
    run = start(tmp_path)
    (run.path / "config.toml").write_text("seed = ")
    with pytest.raises(RunDirectoryError, match=r"config\.toml cannot be read, so the run cannot be resumed"):
        start(tmp_path, resume=True)


def test_overwrite_starts_anew(tmp_path):
    run = start(tmp_path, lora={"rank": 8})
    start(tmp_path, resume=True, lora={"rank": 8})
    (run.path / "checkpoints" / "step_000001").mkdir()
    (run.path / "metrics.jsonl").touch()
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").touch()
    (run.path / "latest").symlink_to(outside)
    run = start(tmp_path, overwrite=True)
    assert run.attempt == 1
    assert not list((run.path / "checkpoints").iterdir())
    assert sorted(entry.name for entry in run.path.iterdir() if entry.is_file()) == ["attempt", "config.toml"]
    assert (outside / "file").exists()


def test_a_dataset_in_the_run_directory_is_not_deleted(tmp_path):
    rows = start(tmp_path).path / "rows.jsonl"
    rows.touch()
    with pytest.raises(RunDirectoryError, match=r"--overwrite would delete --env-args path .*rows\.jsonl"):
        start(tmp_path, overwrite=True, env_args={"path": str(rows), "split": "train"})
    assert rows.exists()


@pytest.mark.parametrize("pattern", ["*.jsonl", "**/*.jsonl", "?ows.jsonl"])
def test_a_pattern_of_what_lies_in_the_run_directory_is_not_deleted(tmp_path, pattern):
    rows = start(tmp_path).path / "rows.jsonl"
    rows.touch()
    with pytest.raises(RunDirectoryError, match=r"--overwrite would delete --env-args path "):
        start(tmp_path, overwrite=True, env_args={"path": ["elsewhere.jsonl", str(rows.parent / pattern)]})
    assert rows.exists()


def test_where_no_directory_can_be_is_said(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunDirectoryError, match=r"--run-dir .*run: expected a directory that can be read and written"):
        start(tmp_path / "file")


@pytest.mark.parametrize("setting", ["init_adapter", "model"])
def test_what_a_run_begins_with_is_not_deleted(tmp_path, setting):
    run = start(tmp_path)
    adapter = run.path / "checkpoints" / "step_000001" / "adapter"
    adapter.mkdir(parents=True)
    (run.path / "latest").symlink_to("checkpoints/step_000001")
    with pytest.raises(RunDirectoryError, match=f"--overwrite would delete --{setting.replace('_', '-')} .*latest"):
        start(tmp_path, overwrite=True, **{setting: str(run.path / "latest" / "adapter")})
    assert adapter.exists()


@pytest.mark.parametrize("flags", [{}, {"overwrite": True}, {"resume": True}])
@pytest.mark.parametrize("file", ["thesis.tex", "config.toml"])
def test_a_folder_of_something_else_is_never_touched(tmp_path, flags, file):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / file).write_text("mine")
    with pytest.raises(RunDirectoryError, match="holds files but is no run directory"):
        start(tmp_path, **flags)
    assert [entry.name for entry in (tmp_path / "run").iterdir()] == [file]


def test_a_file_is_no_directory(tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(RunDirectoryError, match="is not a directory"):
        start(tmp_path)


@pytest.mark.parametrize("flag", ["resume", "overwrite"])
def test_two_runs_cannot_use_one_directory(tmp_path, flag):
    code = (
        "import sys; from pathlib import Path; from rlloop.config import RunSettings;"
        "from rlloop.run_directory import open_run_directory as start;"
        "run = start(RunSettings(run_dir=Path(sys.argv[1]))); print('started', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "started\n"
        with pytest.raises(RunDirectoryError, match="in use by another run"):
            start(tmp_path, **{flag: True})
        other.kill()
    assert start(tmp_path, **{flag: True}).attempt == (2 if flag == "resume" else 1)
