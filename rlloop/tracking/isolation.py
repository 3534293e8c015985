"""The one place where any exception of a sink is caught."""

from __future__ import annotations

import logging
from types import TracebackType

logger = logging.getLogger(__name__)


class Isolated:
    """`with isolated:` around a call of a sink: what it raises is counted, warned about once, and goes no further.

    A broad catch is right here and nowhere else: sinks are other people's libraries, disks and servers, which may raise
    anything at any time, and a curve that is not drawn must not cost the run that it describes.
    """

    def __init__(self, name: str):
        self.name = name
        self.failures = 0

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        if not isinstance(error, Exception):
            return False
        self.failures += 1
        if self.failures == 1:
            logger.warning("%s failed, the run goes on; later failures are only counted", self.name, exc_info=error)
        return True
