"""Checkpoints are written whole or not at all, and verified before they are believed.

    <run_dir>/checkpoints/.tmp-step_000017-<random>/   being written; ignored by all readers
    <run_dir>/checkpoints/step_000017/                 adapter/  state/  ledger.json  manifest.json  <others>/
    <run_dir>/latest -> checkpoints/step_000017

The manifest names every other file with its size and SHA-256 and is written last; only then does the folder get its
name.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from anyio import CancelScope, to_thread

from rlloop.errors import CheckpointError, RankDied, RlloopError

_FORMAT = 1
_LEDGER = "ledger.json"
_MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint that was verified."""

    step: int
    folder: Path
    """Holds `adapter/` and `state/`, as `Trainer.load` reads them; an adapter beside the policy's has them in a folder of its
    name."""
    ledger: dict[str, Any]
    """What `Ledger.restore` reads."""
    manifest: dict[str, Any]
    passed_over: tuple[str, ...]
    """Newer checkpoints that are broken, each with what is wrong with it: tell the user."""


async def write_checkpoint(
    root: Path,
    step: int,
    save: Callable[[Path], Awaitable[None]],
    ledger_state: Mapping[str, Any],
    meta: Mapping[str, Any],
    keep: int = 2,
) -> Path:
    """Write the checkpoint of one step into the run directory `root`, then delete all but the `keep` newest.

    `save` writes the trainer's files into the folder that it is given. `meta` goes into the manifest (policy_version,
    config_sha256, ...). A sound checkpoint of the same step is left as it is. Returns the checkpoint's folder.

    Raises CheckpointError if the disk is full or `save` raises an OSError or RlloopError; RankDied comes as itself. However it
    ends, earlier checkpoints are untouched then and nothing half-written stays. It is not cancelled: a rank would go on writing.
    """
    folder = _folder(root) / f"step_{step:06d}"
    temporary = folder.with_name(f".tmp-{folder.name}-{secrets.token_hex(4)}")
    with CancelScope(shield=True):
        try:
            if not await to_thread.run_sync(_is_sound, folder):
                await to_thread.run_sync(_make_room, folder, temporary)
                await save(temporary)
                manifest = {"format": _FORMAT, "step": step, **meta, "versions": _versions()}
                await to_thread.run_sync(_seal, temporary, ledger_state, manifest)
                await to_thread.run_sync(_commit, temporary, folder)
            await to_thread.run_sync(_supersede, root, folder, keep)
        except RankDied:
            raise
        except (OSError, RlloopError) as error:
            raise CheckpointError(
                f"the checkpoint of step {step} could not be written to {folder.parent}: {error}. "
                "Earlier checkpoints are untouched; free some disk space if it is full"
            ) from error
        finally:
            await to_thread.run_sync(partial(shutil.rmtree, temporary, ignore_errors=True))
    return folder


def newest_checkpoint(root: Path) -> Checkpoint | None:
    """The newest checkpoint of a run directory that verifies; None if it has none at all.

    Raises CheckpointError if there are some and all of them are broken.
    """
    passed_over: list[str] = []
    for step, folder in sorted(_steps(root).items(), reverse=True):
        try:
            manifest = _verify(folder)
            ledger = json.loads((folder / _LEDGER).read_text())
        except (OSError, ValueError) as error:
            passed_over.append(f"{folder}: {error}")
        else:
            return Checkpoint(step, folder, ledger, manifest, tuple(passed_over))
    if passed_over:
        raise CheckpointError(f"no checkpoint is sound, so there is nothing to resume from: {'; '.join(passed_over)}")
    return None


def _folder(root: Path) -> Path:
    return root / "checkpoints"


def _steps(root: Path) -> dict[int, Path]:
    if not _folder(root).exists():
        return {}
    matches = ((re.fullmatch(r"step_(\d{6,})", entry.name), entry) for entry in _folder(root).iterdir())
    return {int(match[1]): entry for match, entry in matches if match}


def _make_room(folder: Path, temporary: Path) -> None:
    """Remove what earlier attempts left half-written, and a broken checkpoint of the same step."""
    for leftover in (*folder.parent.glob(".tmp-*"), folder):
        if leftover.exists():
            shutil.rmtree(leftover)
    temporary.mkdir(parents=True)


def _seal(folder: Path, ledger_state: Mapping[str, Any], manifest: Mapping[str, Any]) -> None:
    """Write the ledger and, last, the manifest; all is on the disk when this returns."""
    (folder / _LEDGER).write_text(json.dumps(ledger_state))
    paths = sorted(folder.rglob("*"))
    files = {str(path.relative_to(folder)): _describe(path) for path in paths if path.is_file()}
    for path in paths:
        _sync(path)
    (folder / _MANIFEST).write_text(json.dumps({**manifest, "files": files}, indent=1))
    _sync(folder / _MANIFEST)
    _sync(folder)


def _commit(temporary: Path, folder: Path) -> None:
    temporary.rename(folder)
    _sync(folder.parent)
    try:
        _verify(folder)
    except (OSError, ValueError) as error:
        shutil.rmtree(folder)
        raise CheckpointError(f"what was written reads back differently: {error}") from error


def point_to(root: Path, folder: Path) -> None:
    """Make this checkpoint the run directory's `latest`."""
    link = root / ".latest.tmp"
    link.unlink(missing_ok=True)
    link.symlink_to(folder.relative_to(root))
    link.replace(root / "latest")
    _sync(root)


def _supersede(root: Path, folder: Path, keep: int) -> None:
    """Point `latest` to the folder; delete older ones, and broken ones of later steps that a resume has passed over."""
    point_to(root, folder)
    steps = _steps(root)
    step = next(step for step, path in steps.items() if path == folder)
    kept = sorted(other for other in steps if other <= step)[-keep:]
    for other, path in steps.items():
        if other not in kept:
            shutil.rmtree(path)


def _verify(folder: Path) -> dict[str, Any]:
    """The manifest, if all that it lists is there unchanged. Raises OSError or ValueError."""
    text = (folder / _MANIFEST).read_text()
    try:
        manifest = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{_MANIFEST} is torn: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
        raise ValueError(f"{_MANIFEST} is not of format {_FORMAT}")
    for name, expected in manifest["files"].items():
        found = _describe(folder / name)
        if found != expected:
            raise ValueError(f"{name} is not what was written: expected {expected}, found {found}")
    return manifest


def _is_sound(folder: Path) -> bool:
    try:
        _verify(folder)
    except (OSError, ValueError):
        return False
    return True


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "size": file.tell()}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _versions() -> dict[str, str]:
    versions = {}
    for package in ("rlloop", "torch", "peft"):
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions
