"""The files of a run directory that are always written: metrics.jsonl, completions/ and, of evaluations, evaluations.jsonl."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from rlloop.tracking import jsonl


class Files:
    """One line of metrics.jsonl per step, one file of completions/ per step.

    Written at once and in the caller's thread: this is the record that stays complete when everything else drops. A line for
    which the disk has no room comes with the next; the completions of that step are lost. Each line carries `attempt` (how
    often the run was started), since a resumed run repeats the steps after its checkpoint.
    """

    def __init__(self, run_dir: Path, attempt: int):
        self._attempt = attempt
        self._folder = run_dir / "completions"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._metrics = jsonl.Lines(run_dir / "metrics.jsonl")
        self._evaluations: jsonl.Lines | None = None
        self._run_dir = run_dir

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append {step, attempt, time (Unix, s), metric: value ...}."""
        self._metrics.append(self._line({"step": step}, metrics))

    def completions(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write completions/step_000017.jsonl, whole or not at all, over what an earlier attempt left of that step."""
        lines = b"".join(jsonl.encode({"step": step, "attempt": self._attempt, **row}) for row in rows)
        unfinished = self._folder / ".unfinished"
        unfinished.write_bytes(lines)
        unfinished.replace(self._folder / f"step_{step:06d}.jsonl")

    def evaluation(self, policy_version: int, metrics: Mapping[str, float]) -> None:
        """Append {policy_version, attempt, time, metric: value ...} to evaluations.jsonl."""
        if self._evaluations is None:
            self._evaluations = jsonl.Lines(self._run_dir / "evaluations.jsonl")
        self._evaluations.append(self._line({"policy_version": policy_version}, metrics))

    def _line(self, subject: Mapping[str, int], metrics: Mapping[str, float]) -> bytes:
        values = {name: float(value) for name, value in metrics.items()}
        return jsonl.encode({**subject, "attempt": self._attempt, "time": time.time(), **values})

    def close(self) -> None:
        """Close what it appends to."""
        with closing(self._metrics):
            if self._evaluations is not None:
                self._evaluations.close()


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """The run's metrics, one dict per step in rising order, as if it had never been interrupted.

    A line supersedes all earlier lines of its step and of later ones: an attempt computed those whose work after the
    restored checkpoint was thrown away. Non-finite values come back as floats.
    """
    kept: list[dict[str, Any]] = []
    for line in jsonl.read(Path(run_dir) / "metrics.jsonl"):
        while kept and kept[-1]["step"] >= line["step"]:
            kept.pop()
        kept.append({name: float(value) if isinstance(value, str) else value for name, value in line.items()})
    return kept
