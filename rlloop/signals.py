"""Ctrl-C, SIGTERM and SIGHUP end a run in order: what runs in the block is cancelled, and cleans up behind itself."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from time import monotonic
from types import FrameType

from anyio import TASK_STATUS_IGNORED, CancelScope, create_task_group, open_signal_receiver
from anyio.abc import TaskStatus

from rlloop.errors import Stopped, first_error
from rlloop.processes import STOP_SIGNALS

_ONE_STOP = 2.0
"""Seconds within which signals are one: `timeout` and batch systems send theirs to a process and then to its whole group."""


@asynccontextmanager
async def stop_on_signals() -> AsyncIterator[None]:
    """Cancel the block at the first SIGINT, SIGTERM or, unless `nohup` has it ignored, SIGHUP, and then raise Stopped.

    A second one, some seconds later, ends the process at once.
    """
    is_deaf = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    caught = [number for number in STOP_SIGNALS if not (number == signal.SIGHUP and is_deaf)]
    received: list[signal.Signals] = []
    first_at: float | None = None

    def end_if_second(number: int, frame: FrameType | None) -> None:
        """Not by the event loop, which an environment may keep from all else."""
        nonlocal first_at
        now = monotonic()
        first_at = now if first_at is None else first_at
        if now - first_at > _ONE_STOP:
            if os.isatty(1):
                os.write(1, b"\x1b[?25h")  # the cursor, which the live table hides
            os._exit(128 + number)  # the guardian of rlloop.processes kills what is left

    async def watch(*, task_status: TaskStatus[None] = TASK_STATUS_IGNORED) -> None:
        with open_signal_receiver(*caught) as signals:
            for number in caught:
                _call_first(end_if_second, number)
            task_status.started()
            async for number in signals:
                if not received:
                    received.append(number)
                    logging.getLogger(__name__).warning(
                        "%s: the run ends and saves what it has done; once more, two seconds from now, ends it at once, unsaved",
                        number.name,
                    )
                    work.cancel()

    try:
        async with create_task_group() as tasks:
            with CancelScope() as work:
                await tasks.start(watch)
                yield
            tasks.cancel_scope.cancel()
    except Exception as error:
        if received:  # a signal to the whole process group ends the engine, too, and its requests then fail
            raise Stopped(received[0]) from first_error(error)
        raise
    if received:
        raise Stopped(received[0])


def _call_first(handler: Callable[[int, FrameType | None], None], number: signal.Signals) -> None:
    """Before the handler that there is."""
    then = signal.getsignal(number)

    def both(number: int, frame: FrameType | None) -> None:
        handler(number, frame)
        if callable(then):
            then(number, frame)

    signal.signal(number, both)
