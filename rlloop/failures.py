"""Why rollouts failed: each reason is said once, for metrics only count them."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from rlloop.types import Failure

logger = logging.getLogger(__name__)

_MOST = 20
"""Reasons; those of a server may have a time or an id in each."""


class FailureLog:
    """Of one run."""

    def __init__(self) -> None:
        self._said: set[tuple[str, str]] = set()

    def report(self, index: int, failures: Iterable[Failure]) -> None:
        """Warn of those of a task's rollouts that are new."""
        for failure in failures:
            reason = failure.stage, failure.message
            if reason in self._said or len(self._said) == _MOST:
                continue
            self._said.add(reason)
            logger.warning(
                "a rollout of task %d has no reward: %s in %s: %s%s",
                index,
                failure.kind,
                failure.stage,
                failure.message,
                " (what else there is is only counted, in rollout/errors and rollout/timeouts)"
                if len(self._said) == _MOST
                else "",
            )
