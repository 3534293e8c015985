"""Ctrl-C and SIGTERM end a run in order: what runs in the block is cancelled, and cleans up behind itself."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from anyio import TASK_STATUS_IGNORED, CancelScope, create_task_group, open_signal_receiver
from anyio.abc import TaskStatus

from rlloop.errors import Stopped, first_error


@asynccontextmanager
async def stop_on_signals() -> AsyncIterator[None]:
    """Cancel the block at the first SIGINT or SIGTERM, and then raise Stopped; a second signal ends the process at once."""
    received: list[signal.Signals] = []

    async def watch(*, task_status: TaskStatus[None] = TASK_STATUS_IGNORED) -> None:
        with open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            task_status.started()
            async for number in signals:
                if received:
                    os._exit(128 + number)  # the guardian of rlloop.processes kills what is left
                received.append(number)
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
