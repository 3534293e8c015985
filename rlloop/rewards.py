"""Scoring in worker processes that can be killed: a reward that hangs, even in C, costs one rollout and no more.

Own processes rather than `anyio.to_process`, because what a reward starts must be killed with it, and because the start
of a worker must not count against the timeout of the first rollout that it scores.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import pickle
import reprlib
import select
import subprocess
import sys
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from signal import SIGKILL, Signals
from traceback import extract_tb
from types import TracebackType
from typing import Any, BinaryIO, SupportsFloat

import anyio
from anyio.abc import Process
from anyio.streams.buffered import BufferedByteReceiveStream

from rlloop.environment import Environment, load_environment
from rlloop.errors import BadEnvironmentError
from rlloop.types import Failure, Reward, Rollout

START_TIMEOUT = 300.0
"""Seconds that a worker may take to import and build the environment."""
_DIED = (anyio.EndOfStream, anyio.IncompleteRead, anyio.BrokenResourceError)
# A worker searches modules where its parent does, so that both run the same code.
_WORKER = "import sys; lifeline, *sys.path[:] = sys.argv[1:]; from rlloop.rewards import serve; serve(int(lifeline))"


class Scorer:
    """Calls `environment.score` in `num_workers` processes, each of which builds the environment once, by name.

    Use as an asynchronous context manager; on exit no process is left. Workers start when they are first needed. What they print
    is added to the file `log_path`, or goes to standard error.
    """

    def __init__(
        self, name: str, args: Mapping[str, Any], *, num_workers: int, timeout: float, log_path: Path | None = None
    ) -> None:
        self._name = name
        self._args = dict(args)
        self._timeout = timeout
        self._log_path = log_path
        self._limiter = anyio.CapacityLimiter(num_workers)
        self._idle: list[_Worker] = []

    async def __aenter__(self) -> Scorer:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._idle:
            await self._idle.pop().kill()

    async def score(self, task: Any, rollout: Rollout) -> float | Failure:
        """The reward, or why there is none: it raised, took longer than the timeout, or was no finite number.

        Cancelling the call kills the worker. Raises BadEnvironmentError when a worker cannot build the environment, or
        cannot be sent the task.
        """
        try:
            request = pickle.dumps((task, rollout), pickle.HIGHEST_PROTOCOL)
        except Exception as error:
            raise BadEnvironmentError(f"environment {self._name}: a task must be picklable, but {error}") from error
        async with self._limiter:
            while self._idle and self._idle[-1].is_dead:  # of nothing that this rollout did
                await self._idle.pop().kill()
            worker = self._idle.pop() if self._idle else await _Worker.start(self._name, self._args, self._log_path)
            reusable = False
            try:
                with anyio.fail_after(self._timeout):
                    outcome = await worker.call(request)
                reusable = True
            except TimeoutError:
                return Failure("timeout", "score", f"no score after {self._timeout:g} s; its process was killed")
            except _DIED:
                return Failure("error", "score", f"the process that scored it died{await worker.cause_of_death()}")
            finally:
                if reusable:
                    self._idle.append(worker)
                else:
                    await worker.kill()
        if "error" in outcome:
            return Failure("error", "score", outcome["error"])
        return Reward(outcome["reward"], outcome["parts"]) if "parts" in outcome else outcome["reward"]


class _Worker:
    """One process: pickle in, JSON out, each after its length in 8 bytes. It ends when `lifeline` closes."""

    def __init__(self, process: Process, lifeline: int) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._process = process
        self._lifeline = lifeline
        self._stdin = process.stdin
        self._stdout = BufferedByteReceiveStream(process.stdout)

    @classmethod
    async def start(cls, name: str, args: Mapping[str, Any], log_path: Path | None) -> _Worker:
        """A worker that has built the environment. Raises BadEnvironmentError."""
        theirs, ours = os.pipe()
        command = [sys.executable, "-c", _WORKER, str(theirs), *sys.path]
        try:
            with log_path.open("ab") if log_path else nullcontext() as log:
                # A session of its own: killed with all that a reward starts, and deaf to the terminal's Ctrl-C.
                process = await anyio.open_process(
                    command, stdin=subprocess.PIPE, stderr=log, start_new_session=True, pass_fds=(theirs,)
                )
        except BaseException:
            os.close(ours)
            raise
        finally:
            os.close(theirs)
        worker = cls(process, ours)
        started = False
        try:
            with anyio.fail_after(START_TIMEOUT):
                reply = await worker.call(pickle.dumps((name, args)))
            if "error" in reply:
                raise BadEnvironmentError(f"in a process for scoring: {reply['error']}")
            started = True
        except TimeoutError as error:
            raise BadEnvironmentError(f"environment {name} was not built within {START_TIMEOUT:g} s") from error
        except _DIED as error:
            cause = await worker.cause_of_death()
            raise BadEnvironmentError(f"the process that builds environment {name} died{cause}") from error
        finally:
            if not started:
                await worker.kill()
        return worker

    async def call(self, request: bytes) -> dict[str, Any]:
        """Send, receive."""
        await self._stdin.send(len(request).to_bytes(8, "big") + request)
        num_bytes = int.from_bytes(await self._stdout.receive_exactly(8), "big")
        reply: dict[str, Any] = json.loads(await self._stdout.receive_exactly(num_bytes))
        return reply

    async def cause_of_death(self) -> str:
        """Once its pipes are closed."""
        with anyio.move_on_after(1):
            code = await self._process.wait()
            return f" of {Signals(-code).name}" if code < 0 else f" with exit code {code}"
        return ""

    @property
    def is_dead(self) -> bool:
        """Whether something has ended its process."""
        return self._process.returncode is not None

    async def kill(self) -> None:
        """End the process, with those that it has started."""
        with anyio.CancelScope(shield=True):
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, SIGKILL)
            await self._process.aclose()
            os.close(self._lifeline)


def explain(error: BaseException) -> str:
    """One line: what was raised, and where."""
    frames = extract_tb(error.__traceback__)
    place = f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"


def serve(lifeline: int) -> None:
    """Be a worker: build the environment that the first request names, score what the others hold, until stdin ends."""
    _die_with_parent(lifeline)
    # Only the protocol may use the pipes: neither a print() of a reward, nor the processes that it starts.
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    # Line by line: what was printed is there when the worker is killed, and lines of several workers stay whole.
    sys.stdout = os.fdopen(1, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)
    name, args = pickle.loads(_receive(requests))
    try:
        environment = load_environment(name, args)
    except BadEnvironmentError as error:
        _send(replies, {"error": str(error)})
        return
    _send(replies, {})
    while request := _receive(requests):
        _send(replies, _score(environment, request))


def _score(environment: Environment, request: bytes) -> dict[str, Any]:
    try:
        task, rollout = pickle.loads(request)
        value: object = environment.score(task, rollout)
        reward = float(value) if isinstance(value, SupportsFloat) else math.nan
        parts = {name: float(part) for name, part in value.parts.items()} if isinstance(value, Reward) else None
    except BaseException as error:  # a reward that calls sys.exit() has failed like any other
        return {"error": explain(error)}
    if not math.isfinite(reward):
        return {"error": f"score() must return a finite number, but returned {reprlib.repr(value)}"}
    return {"reward": reward} if parts is None else {"reward": reward, "parts": parts}


def _die_with_parent(lifeline: int) -> None:
    """The process and what it starts are ended when the parent is: even by SIGKILL, even in C code.

    Nobody writes to this pipe, so any change of it, for which O_ASYNC makes the kernel send SIGIO, means that the other end
    is gone. (The pipe of requests will not do: the kernel sends the signal of a write after the reader may have read it all.
    PR_SET_PDEATHSIG would follow the thread that started this process.)
    """
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
    if select.select([lifeline], [], [], 0)[0]:  # it was gone before
        sys.exit()


def _receive(requests: BinaryIO) -> bytes:
    return requests.read(int.from_bytes(requests.read(8), "big"))


def _send(replies: BinaryIO, reply: dict[str, Any]) -> None:
    line = json.dumps(reply).encode()
    replies.write(len(line).to_bytes(8, "big") + line)
    replies.flush()
