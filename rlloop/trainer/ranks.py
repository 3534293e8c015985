"""Rank processes: each builds one object and runs the methods that the event loop names, one call at a time.

    async with Ranks([RankSpec(factory), ...]) as ranks:
        answer = await ranks.call("forward_backward", ...)      # every rank runs it; rank 0's answer

A rank is spawned (never forked), ignores Ctrl-C, SIGTERM and SIGHUP (this process decides what happens then), and leaves when its
pipe closes, so also when this process dies. It is waited for through its pipe: nothing polls, and no thread waits.
"""

from __future__ import annotations

import ctypes
import importlib
import multiprocessing
import os
import signal
import traceback
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import TracebackType
from typing import Any

import anyio
import anyio.to_thread

from rlloop.errors import RankDied, RlloopError, TrainerError
from rlloop.processes import STOP_SIGNALS, blocked_signals, environment

_SPAWN = multiprocessing.get_context("spawn")
_FITS_INTO_PIPE = 2**15
"""Bytes that a pipe which is empty takes at once."""
_SECONDS_FOR_A_DEATH = 2.0
"""Until the pipe of a rank that died has closed, counted from another rank's error."""


class Interrupted(TrainerError):
    """The call was ended between two microbatches because somebody asked for it."""


@dataclass
class RankContext:
    """What a rank knows about itself."""

    rank: int
    num_ranks: int
    last_interrupted: Any
    """Calls up to this number shall end. In shared memory, without a lock that a killed process could hold."""
    call_number: int = 0
    """Of the call that runs; they count from 1."""

    @property
    def is_interrupted(self) -> bool:
        """Whether the event loop wants the running call to end."""
        return bool(self.call_number <= self.last_interrupted.value)

    def check_interrupt(self) -> None:
        """Raise Interrupted when `is_interrupted`."""
        if self.is_interrupted:
            raise Interrupted("the trainer's call was interrupted")


@dataclass(frozen=True)
class RankSpec:
    """How to start one rank."""

    factory: Callable[[RankContext], Any]
    """Picklable; called in the rank. The public methods of its result are what `call` names; `close()` is its last."""
    cores: frozenset[int] | None = None
    """Pins the rank to these cores, with as many torch threads; None leaves it to the system."""
    log_path: Path | None = None
    """Takes, appended, what the rank and its libraries print; None lets them print."""
    visible_gpus: str | None = None
    """The rank's CUDA_VISIBLE_DEVICES; None leaves it as it is here."""


@dataclass
class _Rank:
    process: SpawnProcess
    pipe: Connection
    num_owed: int = 1
    """Replies still to come. The first one says that the factory has returned."""
    is_built: bool = False


@dataclass(frozen=True, slots=True)
class _Reply:
    value: Any = None
    error: RlloopError | None = None


class Ranks:
    """The event loop's side. Entering it starts the processes and does not wait for their factories: the first call does."""

    def __init__(self, specs: Sequence[RankSpec]) -> None:
        self._specs = specs
        self._ranks: list[_Rank] = []
        self._lock = anyio.Lock()
        self._num_calls = 0
        self._one_failed = False
        """In a call to which others have not replied; they may wait for it until a timeout of theirs."""
        self._death: RankDied | None = None
        self._last_interrupted = _SPAWN.RawValue(ctypes.c_long, 0)

    async def __aenter__(self) -> Ranks:
        for rank, spec in enumerate(self._specs):
            ours, theirs = _SPAWN.Pipe()
            context = RankContext(rank, len(self._specs), self._last_interrupted)
            process = _SPAWN.Process(target=_run, args=(theirs, spec, context), name=f"trainer-{rank}", daemon=True)
            with blocked_signals(*STOP_SIGNALS), environment(**_environment(spec)):
                process.start()
            theirs.close()
            self._ranks.append(_Rank(process, ours))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def interrupt(self) -> None:
        """Make the calls that were made so far and have not answered, as far as they check, raise Interrupted."""
        self._last_interrupted.value = self._num_calls

    async def call(self, method: str, *args: Any) -> Any:
        """Run a method in every rank; -> rank 0's answer.

        An RlloopError that a rank raises arrives as itself, any other exception as TrainerError with the rank's traceback.
        A rank that dies raises TrainerError at once. Cancelling the call interrupts it, and its answer is discarded.
        """
        self._num_calls += 1
        number = self._num_calls
        async with self._lock:
            await self._discard_owed()
            try:
                payload = bytes(ForkingPickler.dumps((number, method, args)))
                if len(payload) <= _FITS_INTO_PIPE:
                    self._send(payload)
                else:
                    await anyio.to_thread.run_sync(self._send, payload)
                return await self._first_answer()
            except anyio.get_cancelled_exc_class():
                self._last_interrupted.value = max(self._last_interrupted.value, number)
                raise

    def kill(self) -> None:
        """After RankDied: those that are left may wait for the one that is gone, and others for them. Calls raise RankDied."""
        for rank in self._ranks:
            rank.process.kill()

    async def close(self, timeout: float = 10.0) -> None:
        """Interrupt what runs, close the pipes (a rank then leaves), wait for `timeout` seconds, kill what is left."""
        self.interrupt()
        ranks, self._ranks = self._ranks, []
        with anyio.CancelScope(shield=True):
            for rank in ranks:
                rank.pipe.close()
            with anyio.move_on_after(timeout):
                for rank in ranks:
                    await anyio.wait_readable(rank.process.sentinel)
            for rank in ranks:
                rank.process.kill()
                await anyio.to_thread.run_sync(rank.process.join)
                rank.process.close()

    def _send(self, payload: bytes) -> None:
        """Returns when the ranks have read so much that the rest fits into their pipes, which were empty."""
        for rank in self._ranks:
            with suppress(OSError):  # it died; waiting for its reply says how
                rank.pipe.send_bytes(payload)
            rank.num_owed += 1

    async def _discard_owed(self) -> None:
        """Take the replies of cancelled calls, and of the factories, whose errors nobody has seen yet."""
        if not self._ranks:
            raise TrainerError("the trainer is not running: use it within `async with`")

        async def discard(index: int) -> RlloopError | None:
            rank = self._ranks[index]
            while rank.num_owed:
                reply = await self._receive(index)
                if not rank.is_built and reply.error is not None:
                    return reply.error
                rank.is_built = True
                if reply.error is not None and not isinstance(reply.error, Interrupted):
                    self._one_failed = True
                    scope.deadline = min(scope.deadline, anyio.current_time() + _SECONDS_FOR_A_DEATH)
            return None

        if any(rank.num_owed for rank in self._ranks):  # seldom: a call need not start tasks to learn that
            with anyio.move_on_after(_SECONDS_FOR_A_DEATH if self._one_failed else None) as scope:
                await self._for_each(discard)
            if late := [str(index) for index, rank in enumerate(self._ranks) if rank.num_owed]:
                raise RankDied(f"trainer rank {', '.join(late)} still waits for one that has failed")
        self._one_failed = False

    async def _first_answer(self) -> Any:
        """Rank 0's answer when all have replied."""
        answers: dict[int, Any] = {}

        async def answer(index: int) -> RlloopError | None:
            reply = await self._receive(index)
            answers[index] = reply.value
            return reply.error

        await self._for_each(answer)
        return answers[0]

    async def _for_each(self, wait: Callable[[int], Awaitable[RlloopError | None]]) -> None:
        """Raise the first error of any rank: the others may then wait for it forever.

        A rank that is gone is the error, even where one that spoke to it has raised before.
        """
        deaths: list[RlloopError] = []
        errors: list[RlloopError] = []

        async def wait_for(index: int) -> None:
            try:
                error = await wait(index)
            except RankDied as death:
                deaths.append(death)
                tasks.cancel_scope.cancel()
                return
            if error is not None:
                errors.append(error)
                tasks.cancel_scope.deadline = anyio.current_time() + _SECONDS_FOR_A_DEATH

        async with anyio.create_task_group() as tasks:
            for index in range(len(self._ranks)):
                tasks.start_soon(wait_for, index)
        if deaths or errors:
            self._one_failed = True
            raise (deaths + errors)[0]

    async def _receive(self, index: int) -> _Reply:
        rank = self._ranks[index]
        try:
            await anyio.wait_readable(rank.pipe.fileno())
            os.set_blocking(rank.pipe.fileno(), True)  # `recv` must wait; uvloop makes what it watches non-blocking
            reply: _Reply = rank.pipe.recv()
        except (EOFError, OSError):
            await anyio.to_thread.run_sync(rank.process.join, 5.0)  # its pipe is closed, so it is about to be gone
            # The first is why, also where the others were ended because of it.
            self._death = self._death or _death(index, rank.process.exitcode, self._specs[index].log_path)
            raise self._death from None
        rank.num_owed -= 1
        return reply


def _death(index: int, exit_code: int | None, log_path: Path | None) -> RankDied:
    how = f"ended with exit code {exit_code}"
    if exit_code is not None and exit_code < 0:
        how = f"was killed by {signal.Signals(-exit_code).name}"
        if -exit_code == signal.SIGKILL:
            how += " (out of memory, if nobody did it)"
    return RankDied(f"trainer rank {index} {how}" + (f"; its output is in {log_path}" if log_path else ""))


def _environment(spec: RankSpec) -> dict[str, str]:
    """What OpenMP and CUDA read when a spawned process loads them, which may be before any of our code runs there."""
    wanted = {}
    if spec.cores is not None:
        # Passive: a thread that waits must not keep the core from the engine's.
        wanted = {"OMP_NUM_THREADS": str(len(spec.cores)), "OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}
    if spec.visible_gpus is not None:
        wanted["CUDA_VISIBLE_DEVICES"] = spec.visible_gpus
    return wanted


def _run(pipe: Connection, spec: RankSpec, context: RankContext) -> None:
    """The rank's process."""
    for number in STOP_SIGNALS:  # sent to the whole group; the run saves before it lets the ranks go
        signal.signal(number, signal.SIG_IGN)
    if spec.log_path is not None:
        spec.log_path.parent.mkdir(parents=True, exist_ok=True)
        log = os.open(spec.log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
    if spec.cores is not None:
        os.sched_setaffinity(0, spec.cores)
        importlib.import_module("torch").set_num_threads(len(spec.cores))
    target: Any = None

    def build() -> None:
        nonlocal target
        target = spec.factory(context)

    with suppress(EOFError, OSError):  # the event loop's process closed the pipe, or died
        _answer(pipe, context.rank, build)
        while target is not None:
            context.call_number, method, args = pipe.recv()
            _answer(pipe, context.rank, getattr(target, method), *args)
    if target is not None:
        target.close()


def _answer(pipe: Connection, rank: int, function: Callable[..., Any], *args: Any) -> None:
    """Of the others only that they are done, and their errors, for the value is rank 0's."""
    try:
        value = function(*args)
        reply = _Reply(value=value if rank == 0 else None)
    except RlloopError as error:
        reply = _Reply(error=error)
    except Exception:
        reply = _Reply(error=TrainerError(f"trainer rank {rank} raised\n{traceback.format_exc().rstrip()}"))
    pipe.send(reply)
