"""TensorBoard event files, through tensorboardX (no TensorFlow)."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class TensorBoard:
    """Scalars in <run_dir>/tensorboard. Completions have no place there: they are in completions/."""

    def __init__(self, folder: Path):
        from tensorboardX import SummaryWriter  # takes seconds to import

        logging.getLogger("tensorboardX.x2num").setLevel(logging.ERROR)  # a NaN is no news: what a step has not, is one
        self._open = lambda step: SummaryWriter(logdir=str(folder), purge_step=step)
        self._writer: Any = None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add one point to each metric's curve; the first call hides what an earlier attempt wrote from its step on."""
        if self._writer is None:
            self._writer = self._open(step)
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def evaluation(self, policy_version: int, metrics: Mapping[str, float]) -> None:
        """Add one point to each metric's curve, at the step that made the version."""
        if self._writer is None:
            self._writer = self._open(policy_version + 1)  # an earlier attempt's point of that step stands
        self.log(policy_version, metrics)

    def completions(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Nothing: see above."""

    def close(self) -> None:
        """Write out what is buffered."""
        if self._writer is not None:
            self._writer.close()
