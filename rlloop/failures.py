"""Why rollouts failed: each reason is said once, for metrics only count them."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable

from rlloop.types import Failure

logger = logging.getLogger(__name__)

_MOST = 20
_VARIES = re.compile(r"0x[0-9a-f]+|\d+")
"""Addresses, times, ids: what is otherwise alike is one reason."""


class FailureLog:
    """Of one run."""

    def __init__(self) -> None:
        self._said: set[tuple[str, str]] = set()

    def report(self, index: int, failures: Iterable[Failure]) -> None:
        """Warn of those of a task's rollouts that are new."""
        for failure in failures:
            reason = failure.stage, _VARIES.sub("", failure.message)
            if reason in self._said or len(self._said) == _MOST:
                continue
            self._said.add(reason)
            logger.warning(
                "a rollout of task %d has no reward: %s in %s: %s%s",
                index,
                failure.kind,
                failure.stage,
                failure.message,
                " (other reasons are only counted)" if len(self._said) == _MOST else "",
            )
