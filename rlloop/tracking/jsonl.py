"""JSON lines that every strict parser reads, whatever the values and however the writer died."""

from __future__ import annotations

import fcntl
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

_ENCODER = json.JSONEncoder(allow_nan=False, ensure_ascii=False)  # once: json.dumps makes one for each call


def encode(record: Mapping[str, Any]) -> bytes:
    """One line. Non-finite numbers become the strings "NaN", "Infinity" and "-Infinity", which float() reads back."""
    try:
        line = _ENCODER.encode(record)
    except (TypeError, ValueError):  # rare, so that the common record is not walked through twice
        line = _ENCODER.encode(_plain(record))
    return line.encode("utf-8", "backslashreplace") + b"\n"  # a lone surrogate becomes its JSON escape


class Lines:
    """A file to append lines to. Each `append` is one system call, so they stay together whoever else appends; what a full disk
    does not take is kept, and comes with the next."""

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = open(path, "ab", buffering=0)  # noqa: SIM115 - `close` closes it
        self._rest = memoryview(b"")
        with _locked(self._file, fcntl.LOCK_EX):  # or it might see the half of a line that another is writing
            if self._file.tell():
                with open(path, "rb") as existing:
                    existing.seek(-1, 2)
                    if existing.read(1) != b"\n":  # of a killed process, and would swallow the next line
                        self._file.write(b"\n")

    def append(self, lines: bytes) -> None:
        """Raises OSError when the disk is full."""
        self._rest = memoryview(bytes(self._rest) + lines)
        with _locked(self._file, fcntl.LOCK_SH):
            while self._rest:
                self._rest = self._rest[self._file.write(self._rest) :]

    def close(self) -> None:
        """What is kept gets a last chance."""
        try:
            self.append(b"")
        finally:
            self._file.close()


@contextmanager
def _locked(file: BinaryIO, kind: int) -> Iterator[None]:
    """Against openings of the same file; those that append do not wait for each other."""
    fcntl.flock(file, kind)
    try:
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a file; lines that a killed process left half written are skipped."""
    with open(path, encoding="utf-8", errors="replace", newline="\n") as file:  # one may be cut within a character
        for line in file:
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                continue


def _plain(value: Any) -> Any:
    """As JSON's own types: numpy scalars and arrays as numbers, the rest as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence | set | frozenset) and not isinstance(value, bytes):
        return [_plain(item) for item in value]
    return _plain(value.tolist()) if hasattr(value, "tolist") else str(value)
