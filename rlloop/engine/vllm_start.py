"""Starts vLLM's AsyncLLM in a thread: several of them side by side, and not for longer than someone waits for it."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from threading import Event, Lock
from typing import Any

import anyio

from rlloop.engine import vllm_compat
from rlloop.errors import EngineError, RlloopError, one_line
from rlloop.processes import blocked_signals, environment

_SPAWNING = Lock()
"""An engine's process inherits the environment, which is one engine's at a time. Once it is there, others may start beside it."""


async def start_llm(arguments: Mapping[str, Any], variables: Callable[[], Mapping[str, str]], log_path: Path) -> Any:
    """An AsyncLLM with these arguments, in whose processes these variables are set; they are asked for when the environment is no
    other engine's. Where the start is cancelled its processes end.

    Raises EngineError where vLLM refuses the arguments, or its processes, who log to `log_path`, fail.
    """
    start = _Start(arguments, variables, log_path)
    try:
        return await anyio.to_thread.run_sync(start.run, abandon_on_cancel=True)
    except anyio.get_cancelled_exc_class():
        start.abandon()
        raise


class _Start:
    """One that a thread runs, which cannot be stopped, but what it waits for."""

    def __init__(
        self, arguments: Mapping[str, Any], variables: Callable[[], Mapping[str, str]], log_path: Path
    ) -> None:
        self._arguments = arguments
        self._variables = variables
        self._log_path = log_path
        self._logged_before = log_path.stat().st_size if log_path.exists() else 0
        self._is_abandoned = Event()
        self._processes: list[Any] = []

    def run(self) -> Any:
        """Returns when the engine is ready. Raises EngineError."""
        try:
            return self._run()
        except RlloopError:
            raise
        except Exception as error:
            cause = self._first_error() or one_line(error)
            raise EngineError(f"vLLM could not start: {cause} (its log: {self._log_path})") from error

    def _run(self) -> Any:
        with ExitStack() as until_spawned:

            def spawned(processes: list[Any]) -> None:
                self._processes = processes
                until_spawned.close()
                if self._is_abandoned.is_set():
                    self.abandon()

            until_spawned.enter_context(_SPAWNING)
            # They go to the whole process group; the engine must outlive them, since it is the loop that stops the run.
            until_spawned.enter_context(blocked_signals(signal.SIGINT, signal.SIGHUP))
            until_spawned.enter_context(environment(**self._variables()))
            from vllm import AsyncEngineArgs
            from vllm.v1.engine.async_llm import AsyncLLM

            self._check()  # it may have waited for others, and vLLM's import takes seconds
            until_spawned.enter_context(vllm_compat.watched_spawn(self._check, spawned))
            arguments = AsyncEngineArgs(**self._arguments, disable_log_stats=True)
            llm = AsyncLLM.from_engine_args(arguments, stat_loggers=[vllm_compat.no_metrics()])
        if self._is_abandoned.is_set():
            llm.shutdown()
        return llm

    def abandon(self) -> None:
        """Nobody waits for it any more."""
        self._is_abandoned.set()
        for process in self._processes:
            process.terminate()

    def _first_error(self) -> str | None:
        """That its processes logged: vLLM itself only says that there was one."""
        logged = self._log_path.read_bytes()[self._logged_before :] if self._log_path.exists() else b""
        found = re.search(r"^Traceback .*\n(?:[ \t].*\n)+(\S.*)$", logged.decode(errors="replace"), re.MULTILINE)
        return found[1] if found else None

    def _check(self) -> None:
        if self._is_abandoned.is_set():
            raise EngineError("the start of an engine was cancelled before its process was spawned")
