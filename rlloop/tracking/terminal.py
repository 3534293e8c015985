"""What a person sees: a live table on a terminal, one plain line per step elsewhere."""

from __future__ import annotations

import math
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

NUM_ROWS = 10


class Terminal:
    """Step k of N with the time left, reward, loss, staleness, groups in flight, tokens per second and who is idle; what a run
    does not report, for it has no engine, is left out."""

    def __init__(self, run_dir: Path, num_steps: int, console: Console | None = None):
        self._run_dir = run_dir
        self._num_steps = num_steps
        self._console = console or Console()
        self._rows: deque[tuple[int, dict[str, str]]] = deque(maxlen=NUM_ROWS)
        self._seconds: deque[float] = deque(maxlen=NUM_ROWS)
        self._title = str(run_dir)
        self._status = ""
        self._live: Live | None = None
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            table, is_seen_here = self._table(), sys.stderr.isatty()  # and not `2> file`
            self._live = Live(table, console=self._console, refresh_per_second=4, redirect_stderr=is_seen_here)
            self._live.start()

    def status(self, text: str) -> None:
        """What the run is doing, while there is no step to show (`starting engine`)."""
        self._status = text
        self._show(text)

    def say(self, line: str) -> None:
        """A line that stays, above the table where there is one."""
        self._console.print(line, soft_wrap=True, markup=False, highlight=False)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One row or line."""
        if "time/step" in metrics:
            self._seconds.append(metrics["time/step"])
        cells = _cells(metrics)
        progress = f"step {step}/{self._num_steps}"
        left = f"  ETA {self._eta(step)}" if self._seconds and step < self._num_steps else ""
        self._rows.append((step, cells))
        self._title = f"{self._run_dir}  {progress}{left}"
        self._status = ""
        self._show(f"{progress}  " + "  ".join(f"{name} {text}" for name, text in cells.items()) + left)

    def completions(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Nothing: they are in completions/, and too long for a terminal."""

    def evaluation(self, policy_version: int, metrics: Mapping[str, float]) -> None:
        """One line, above the table where there is one."""
        if "eval/loss" in metrics:
            found = f"loss {metrics['eval/loss']:.4f} on held-out rows"
        else:
            reward, error = metrics["eval/reward_mean"], metrics["eval/reward_stderr"]
            found = f"reward {reward:.3f} ± {error:.3f} on {metrics['eval/prompts']:.0f} held-out prompts"
            if metrics.get("eval/failures"):
                found += f", {metrics['eval/failures']:.0f} rollouts failed"
        self.say(f"version {policy_version}: {found}")

    def close(self) -> None:
        """Leave the table as it stands."""
        self._status = ""
        if self._live:
            self._live.update(self._table())
            self._live.stop()

    def _show(self, line: str) -> None:
        if self._live:
            self._live.update(self._table())
        else:
            self.say(line)

    def _eta(self, step: int) -> timedelta:
        seconds_per_step = sum(self._seconds) / len(self._seconds)
        return timedelta(seconds=round(seconds_per_step * (self._num_steps - step)))

    def _table(self) -> RenderableType:
        spinner = Spinner("dots", text=Text(self._status)) if self._status else ""
        if not self._rows:
            return Group(Text(self._title), spinner)
        names = list(dict.fromkeys(name for _, cells in self._rows for name in cells))
        table = Table("step", *names, title=Text(self._title), title_justify="left")
        for column in table.columns:
            column.justify = "right"
        for step, cells in self._rows:
            table.add_row(str(step), *[cells.get(name, "") for name in names])
        return Group(table, spinner)


def _cells(metrics: Mapping[str, float]) -> dict[str, str]:
    # Where no group had anything to learn from, nothing was trained: NaN would look like a failure.
    trained = not math.isnan(metrics.get("perf/train_tokens_per_second", 0.0))

    def show(key: str, form: str) -> str:
        if key not in metrics:
            return ""
        return format(metrics[key], form) if trained or not math.isnan(metrics[key]) else "-"

    num_failed = metrics.get("rollout/errors", 0.0) + metrics.get("rollout/timeouts", 0.0)
    staleness = show("async/staleness_mean", ".1f")
    cells = {
        "reward": show("reward/mean", ".3f"),
        "loss": show("loss/policy", ".4f"),
        "grad norm": show("optim/grad_norm", ".3f"),
        "staleness": staleness and f"{staleness} (max {show('async/staleness_max', '.0f')})",
        "in flight": show("async/in_flight", ".0f"),
        "gen tok/s": show("perf/gen_tokens_per_second", ",.0f"),
        "train tok/s": show("perf/train_tokens_per_second", ",.0f"),
        "engine idle": show("time/engine_idle_frac", ".0%"),
        "trainer idle": show("time/trainer_idle_frac", ".0%"),
        "s/step": show("time/step", ".2f"),
        "failed": f"{num_failed:.0f}" if num_failed else "",
    }
    return {name: text for name, text in cells.items() if text}
