"""The run directory: who may write into it, and which attempt this is.

    runs/<name>/  config.toml  attempt  logs/  completions/  checkpoints/  latest

`config.toml` holds the resolved settings; together with `attempt`, which counts how often the run was started and is
locked while it runs, it makes a folder a run directory. Nothing is ever deleted from a folder that lacks either.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import logging
import os
import shutil
import tomllib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from rlloop.checkpoint import Checkpoint, newest_checkpoint, point_to
from rlloop.config import TrainingSettings
from rlloop.errors import RunDirectoryError
from rlloop.tracking import wandb

logger = logging.getLogger(__name__)

CONFIG = "config.toml"
ATTEMPT = "attempt"
_UNFINISHED = ".config.toml.tmp"
FIXED = (
    *("model", "chat_template_kwargs", "env", "env_args", "rewards", "seed", "group_size", "init_adapter"),
    *("lora.rank", "lora.alpha", "lora.targets"),
    *("critic.lora.rank", "critic.lora.alpha", "critic.lora.targets"),
    *("dataset", "dataset_name", "split", "max_length"),
)
"""Settings that a resumed run must share with its checkpoints."""


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """A run directory that this process has to itself, until `close` or the process ends. A context manager."""

    path: Path
    attempt: int
    """1 for the first start; each that goes on there adds one. What a later attempt logs of a step supersedes earlier ones."""
    config_sha256: str
    """Of config.toml."""
    checkpoint: Checkpoint | None
    """From which a resumed run goes on."""
    _lock: IO[str]

    def check(self) -> None:
        """Before something is written: raises RunDirectoryError when the path leads elsewhere by now, maybe to another run's."""
        try:
            is_here = os.path.samestat(os.fstat(self._lock.fileno()), os.stat(self.path / ATTEMPT))
        except FileNotFoundError:
            is_here = False
        if not is_here:
            raise RunDirectoryError(
                f"--run-dir {self.path} was deleted or replaced while the run used it, so the run ends"
            )

    def close(self) -> None:
        """Let others use the directory."""
        self._lock.close()

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def open_run_directory(settings: TrainingSettings) -> RunDirectory:
    """Create `settings.run_dir`; with `overwrite` empty it first, with `resume` go on in it. One in which no step was made, for
    its start failed, may be used once more.

    A run that was started but has no checkpoint yet can be resumed: it begins anew, as its next attempt. Warns of settings that
    are others than before.

    Raises RunDirectoryError if the directory is used and neither flag is given, if it is no run directory, if it holds
    nothing to resume, or more steps than are asked for, or what the run is to begin with and `overwrite` would delete, if a
    setting of `FIXED` differs from that of the run to resume, or if another run is using it; CheckpointError if no checkpoint of
    the run to resume is sound.
    """
    path = settings.run_dir
    config = settings.model_copy(update={"resume": False, "overwrite": False}).to_toml().encode()
    try:
        _check(path, settings)  # before anything is written
        with ExitStack() as opened:
            path.mkdir(parents=True, exist_ok=True)
            lock = opened.enter_context(_lock(path))
            _check(path, settings)  # another run may have come first
            if settings.overwrite:
                _empty(path)
            checkpoint = None
            if settings.resume:
                checkpoint = newest_checkpoint(path)
                _check_settings(path, settings, checkpoint.step if checkpoint else 0)
                if checkpoint is not None:
                    point_to(path, checkpoint.folder)  # a run may have been killed before it did so
            else:
                (path / wandb.RUN_ID).unlink(missing_ok=True)  # of a start that failed
            attempt = 1 if settings.overwrite else _attempts(path, lock.read()) + 1
            lock.seek(0)
            lock.write(f"{attempt}\n")  # first, so that the file is never empty
            lock.truncate()
            _write_config(path, config)
            for folder in ("logs", "completions", "checkpoints"):
                (path / folder).mkdir(exist_ok=True)
            opened.pop_all()
    except OSError as error:
        raise RunDirectoryError(
            f"--run-dir {path}: expected a directory that can be read and written: {error}"
        ) from error
    return RunDirectory(path, attempt, hashlib.sha256(config).hexdigest(), checkpoint, lock)


def _attempts(path: Path, text: str) -> int:
    try:
        return int(text or 0)
    except ValueError as error:
        raise RunDirectoryError(f"{path / ATTEMPT}: expected the number of the last attempt, got {text!r}") from error


def _check(path: Path, settings: TrainingSettings) -> None:
    if path.exists() and not path.is_dir():
        raise RunDirectoryError(f"--run-dir {path} is not a directory")
    content = set(os.listdir(path)) if path.exists() else set()
    started = content >= {CONFIG, ATTEMPT}
    if content - {ATTEMPT, _UNFINISHED} and not started:
        raise RunDirectoryError(
            f"--run-dir {path} holds files but is no run directory (it lacks {CONFIG} or {ATTEMPT}): choose another one"
        )
    if settings.resume and not started:
        state = "is empty" if path.exists() else "does not exist"
        raise RunDirectoryError(f"--resume: --run-dir {path} {state}, so there is nothing to resume; start it without")
    if started and _has_steps(path) and not settings.resume and not settings.overwrite:
        raise RunDirectoryError(
            f"--run-dir {path} holds a run already: --resume continues it, --overwrite deletes it and starts anew, "
            "or choose another --run-dir"
        )
    needed = {
        f"--{name.replace('_', '-')}": getattr(settings, name, None) for name in ("model", "init_adapter", "dataset")
    }
    needed |= {f"--env-args {name}": value for name, value in getattr(settings, "env_args", {}).items()}
    files = [(flag, file) for flag, each in needed.items() for file in (each if isinstance(each, list) else [each])]
    for flag, file in files if settings.overwrite else ():
        if not isinstance(file, str | Path):
            continue
        names = [file] if os.path.exists(file) else glob.glob(str(file), recursive=True)  # both take any text
        if any(Path(name).resolve().is_relative_to(path.resolve()) for name in names):
            raise RunDirectoryError(
                f"--overwrite would delete {flag} {file} with all of --run-dir {path}: choose another --run-dir"
            )


def _has_steps(path: Path) -> bool:
    records = [path / "metrics.jsonl", path / "evaluations.jsonl"]
    return any(file.exists() and file.stat().st_size for file in records) or any(path.glob("checkpoints/*"))


def _lock(path: Path) -> IO[str]:
    file = os.fdopen(os.open(path / ATTEMPT, os.O_RDWR | os.O_CREAT, 0o666), "r+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise RunDirectoryError(
            f"--run-dir {path} is in use by another run: wait for its end, or choose another one"
        ) from None
    return file


def _empty(path: Path) -> None:
    # config.toml goes last: a directory that was emptied in part can be overwritten again.
    for entry in sorted(path.iterdir(), key=lambda entry: entry.name == CONFIG):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != ATTEMPT:
            entry.unlink()


def _check_settings(path: Path, settings: TrainingSettings, num_made: int) -> None:
    try:
        before = tomllib.loads((path / CONFIG).read_text())
    except ValueError as error:
        raise RunDirectoryError(f"{path / CONFIG} cannot be read, so the run cannot be resumed: {error}") from error
    if num_made > settings.num_steps:
        raise RunDirectoryError(
            f"--num-steps: expected at least the {num_made} steps that {path} has made, got {settings.num_steps}"
        )
    now = tomllib.loads(settings.to_toml())
    changes = _changes(before, now, FIXED)
    if (held_out := _held_out(now)) != _held_out(before):
        changes.append(f"--evaluation held out {_held_out(before)} tasks and would hold out {held_out}")
    if changes:
        raise RunDirectoryError(
            f"cannot resume {path} with other settings: {'; '.join(changes)}. Use those that the run began with "
            f"(--config {path / CONFIG}), or start a new run with another --run-dir"
        )
    may_differ = {"run_dir", "num_steps", "resume", "overwrite"}
    if others := _changes(before, now, sorted({*_names(before), *_names(now)} - may_differ)):
        logger.warning("the run goes on with other settings: %s", "; ".join(others))


def _changes(before: dict[str, Any], now: dict[str, Any], names: Iterable[str]) -> list[str]:
    return [
        f"--{name.replace('_', '-')} was {_get(before, name)!r} and is {_get(now, name)!r}"
        for name in names
        if (_get(before, name) or None) != (_get(now, name) or None)  # what is not set may not have been known
    ]


def _names(config: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted, of all settings."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _names(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def _held_out(config: dict[str, Any]) -> int:
    """Tasks, or rows, that are evaluated and not trained on."""
    evaluation = config.get("evaluation", {})
    return int(evaluation.get("num_prompts") or evaluation.get("num_rows") or 0) if evaluation.get("every") else 0


def _get(config: dict[str, Any], name: str) -> Any:
    """The setting with a dotted name, None if it is not there."""
    value: Any = config
    for key in name.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _write_config(path: Path, content: bytes) -> None:
    """Whole or not at all."""
    temporary = path / _UNFINISHED
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path / CONFIG)
    finally:
        temporary.unlink(missing_ok=True)  # of a full disk
