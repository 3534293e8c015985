import os
import pty
import re
import resource
import shlex
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest

from rlloop import __version__, cli
from rlloop.config import RunSettings
from rlloop.errors import EngineError, RefitError, Stopped
from rlloop.run_directory import open_run_directory

HEAVY = ("torch", "vllm", "transformers", "peft", "wandb")


@pytest.mark.parametrize(
    ("arguments", "seconds"), [(["--help"], 1.0), (["grpo", "--help"], 7.0), (["grpo", "--dry-run"], 7.0)]
)
def test_help_answers_at_once_and_imports_no_torch(arguments: list[str], seconds: float) -> None:
    program = (
        "import sys; from rlloop.cli import main\ntry:\n    main(sys.argv[1:])\nfinally:\n"
        f"    print('imported', [name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    child = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert child.stderr.strip() == "imported []"
    assert "grpo" in child.stdout or "group_size" in child.stdout
    # The processor's time, for a busy machine takes longer. 1.2 s on one core of 2026; 3.7 s on the slowest that was seen, where
    # torch takes 5.6 s more.
    assert (after.ru_utime - before.ru_utime) + (after.ru_stime - before.ru_stime) <= seconds


def test_help_lists_the_settings_of_library_and_algorithm(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["grpo", "--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    for flag in ("--engine.max-num-seqs", "--lora.rank", "--max-staleness", "--clip-low", "--config", "--dry-run"):
        assert flag in text


def test_usage_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    usage = capsys.readouterr().out
    assert "grpo" in usage
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"rlloop {__version__}\n"


def test_an_unknown_algorithm_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["grop"]) == 2
    assert "expected an algorithm (grpo, ppo, sft), got 'grop'" in capsys.readouterr().err


def fake_algorithm(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def main(settings: RunSettings) -> None:
        with open_run_directory(settings):
            raise error

    monkeypatch.setattr(cli, "_algorithm", lambda name: types.SimpleNamespace(Config=RunSettings, main=main))


def test_an_error_says_where_the_logs_are(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_algorithm(monkeypatch, EngineError("the vLLM engine process died"))
    assert cli.main(["grpo", "--run-dir", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "error: the vLLM engine process died" in error
    assert str(tmp_path) in error
    assert "Traceback" not in error


def test_an_error_before_the_run_begins_does_not_point_to_another_runs_logs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with open_run_directory(RunSettings(run_dir=tmp_path / "run")) as directory:
        (directory.path / "checkpoints" / "step_000001").touch()
    assert cli.main(["grpo", "--run_dir", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "holds a run already" in error
    assert "logs/" not in error


def test_a_directory_that_cannot_be_looked_at_is_explained(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_algorithm(monkeypatch, AssertionError("it began"))
    assert cli.main(["grpo", "--run-dir", str(tmp_path / ("long" * 99))]) == 2
    assert "expected a directory that can be read and written" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_stopped_run_says_how_to_go_on(
    number: str, status: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_algorithm(monkeypatch, Stopped(signal.Signals[number]))
    arguments = ["grpo", "--overwrite", "--run-dir", str(tmp_path), "--env-args", '{"max_operand": 20}']
    assert cli.main(arguments) == status
    error = capsys.readouterr().err
    assert error.startswith(f"stopped by {number}; continue with: rlloop grpo")
    # Copied into a shell, the hint is the same command, with --resume for --overwrite.
    hint = shlex.split(error.partition("continue with: rlloop ")[2])
    assert hint == [*[argument for argument in arguments if argument != "--overwrite"], "--resume"]


@pytest.mark.parametrize(
    "form", ["--overwrite", "--overwrite true", "--overwrite=true", "--no-resume", "--resume false", "--overwrite 1"]
)
def test_however_it_was_overwritten_it_is_not_again(form: str) -> None:
    assert cli._resumed(["grpo", *form.split(), "--seed", "1"]) == ["grpo", "--seed", "1", "--resume"]


@pytest.mark.parametrize(
    ("cause", "is_told"), [(RefitError("the canary disagrees"), True), (EngineError("the engine died"), False)]
)
def test_a_stop_does_not_hide_an_error_that_did_not_come_of_it(
    cause: Exception,
    is_told: bool,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stop = Stopped(signal.SIGTERM)
    stop.__cause__ = cause
    fake_algorithm(monkeypatch, stop)
    assert cli.main(["grpo", "--run-dir", str(tmp_path)]) == 143
    assert (f"it also failed, before or while it ended: {cause}" in capsys.readouterr().err) == is_told


@pytest.mark.parametrize(
    "flags",
    [
        *(["--env", "nosuch"], ["--engine.cpu_cores", "0-9999"], ["--model", "./missing"], ["--env_args", '{"x": 1}']),
        ["--tracking.wandb", "offline"],
        ["--evaluation.every", "5", "--evaluation.num-prompts", "99999999"],
    ],
)
def test_a_typo_leaves_no_run_directory_behind(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlloop.tracking.importlib.util.find_spec", lambda name: None)
    assert cli.main(["grpo", "--run_dir", str(tmp_path / "run"), *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "run directory" not in error
    assert not (tmp_path / "run").exists()


ON_A_TERMINAL = """
import sys, time
from pathlib import Path
from types import SimpleNamespace
from rlloop import cli
from rlloop.config import RunSettings
from rlloop.failures import FailureLog
from rlloop.tracking import open_trackers
from rlloop.types import Failure

def main(settings):
    trackers = open_trackers(settings, settings.run_dir, 1)
    trackers.status("starting")
    time.sleep(0.6)  # two refreshes of the table
    FailureLog().report(7, [Failure("error", "score", "KeyError: 'answer'")])
    time.sleep(0.6)
    trackers.log(1, {"reward/mean": 0.5})
    trackers.close()

cli._algorithm = lambda name: SimpleNamespace(Config=RunSettings, main=main)
sys.exit(cli.main(["grpo", "--run-dir", sys.argv[1]]))
"""


def on_screen(written: str) -> list[str]:
    """What a terminal that is high enough shows in the end of what a live table is drawn with."""
    lines, row = [""], 0
    for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|[\r\n]|[^\x1b\r\n]+", written):
        if part == "\n":
            row += 1
            lines += [""] * (row - len(lines) + 1)
        elif part.endswith("A") and part.startswith("\x1b"):
            row -= int(part[2:-1])
        elif part == "\x1b[2K":
            lines[row] = ""
        elif not part.startswith(("\x1b", "\r")):
            lines[row] += part
    return lines


@pytest.mark.parametrize("is_redirected", [False, True])
def test_a_warning_stays_on_the_terminal(is_redirected: bool, tmp_path: Path) -> None:
    """Above the live table, which is drawn over what anybody else writes; `2> file` gets it where it is asked for."""
    ours, theirs = pty.openpty()
    errors = tmp_path / "errors"
    with errors.open("w") as file, os.fdopen(theirs) as terminal:
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120", "LINES": "40"}
        command = [sys.executable, "-c", ON_A_TERMINAL, str(tmp_path)]
        child = subprocess.Popen(command, stdout=terminal, stderr=file if is_redirected else terminal, env=environment)
    written = b""
    with os.fdopen(ours, "rb", buffering=0) as screen:
        try:
            while part := screen.read(4096):
                written += part
        except OSError:  # Linux says so when the other end is closed
            pass
    assert child.wait() == 0
    lines = on_screen(written.decode())
    warning = "WARNING rlloop.failures: a rollout of task 7 has no reward: error in score: KeyError: 'answer'"
    assert lines.count(warning) == (not is_redirected)
    assert errors.read_text().splitlines().count(warning) == is_redirected
    assert any("0.500" in line for line in lines)
    assert "starting" not in " ".join(lines)
