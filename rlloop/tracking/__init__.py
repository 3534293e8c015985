"""Where metrics go. A tracker can neither slow nor stop the loop."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rlloop.errors import ConfigError
from rlloop.tracking.background import Background
from rlloop.tracking.files import Files
from rlloop.tracking.isolation import Isolated

if TYPE_CHECKING:
    from rlloop.config import TrainingSettings


logger = logging.getLogger(__name__)


class Tracker(Protocol):
    """One sink. Calls return at once; a sink that cannot keep up drops and counts."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """The metrics of one optimizer step."""
        ...

    def completions(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """What the policy wrote in the groups of one step; every row has the same keys."""
        ...

    def evaluation(self, policy_version: int, metrics: Mapping[str, float]) -> None:
        """What one policy version did on held-out prompts; later steps may have been logged before."""
        ...

    def close(self) -> None:
        """Flush, within a bounded time."""
        ...


class Trackers:
    """Several sinks as one. What one of them raises is counted and warned about once; the others and the loop go on."""

    def __init__(self, sinks: Mapping[str, Tracker], show_status: Callable[[str], None]):
        self._sinks = [(sink, Isolated(name)) for name, sink in sinks.items()]
        self._show_status = show_status

    def status(self, text: str) -> None:
        """Tell the terminal what the run is doing while it has no step to show (`starting engine`)."""
        self._show_status(text)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """The metrics of one optimizer step, to every sink."""
        self._each(lambda sink: sink.log(step, metrics))

    def completions(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """The completions of one step, to every sink."""
        self._each(lambda sink: sink.completions(step, rows))

    def evaluation(self, policy_version: int, metrics: Mapping[str, float]) -> None:
        """What one policy version did on held-out prompts, to every sink."""
        self._each(lambda sink: sink.evaluation(policy_version, metrics))

    def close(self) -> None:
        """Close every sink."""
        self._each(lambda sink: sink.close())
        for _, isolated in self._sinks:
            if isolated.failures:
                logger.warning("%s failed %d times", isolated.name, isolated.failures)

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for sink, isolated in self._sinks:
            with isolated:
                call(sink)


def check_trackers(settings: TrainingSettings) -> None:
    """Raises ConfigError when W&B is asked for and not installed."""
    if settings.tracking.wandb != "disabled" and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            f"--tracking.wandb {settings.tracking.wandb}: expected the package wandb, which is not installed; "
            "run `pip install rlloop[wandb]` or leave it disabled"
        )


def open_trackers(settings: TrainingSettings, run_dir: Path, attempt: int) -> Trackers:
    """Files and terminal always, W&B and TensorBoard as the settings say; returns without waiting for any of them.

    `attempt` counts the starts of this run directory.
    """
    from rlloop.tracking.terminal import Terminal

    terminal = Background("terminal", lambda: Terminal(run_dir, settings.num_steps))

    def show_status(text: str) -> None:
        terminal.submit(lambda sink: sink.status(text))

    sinks: dict[str, Tracker] = {"files": Files(run_dir, attempt), "terminal": terminal}
    if settings.tracking.wandb != "disabled":
        from rlloop.tracking.wandb import open_wandb

        def say(line: str) -> None:
            terminal.submit(lambda sink: sink.say(line))

        sinks["W&B"] = Background("W&B", lambda: open_wandb(settings, run_dir, say))
    if settings.tracking.tensorboard:
        from rlloop.tracking.tensorboard import TensorBoard

        sinks["TensorBoard"] = Background("TensorBoard", lambda: TensorBoard(run_dir / "tensorboard"))
    return Trackers(sinks, show_status)
