"""No process outlives the run, whatever kills it. Linux; standard library only.

Everything that the run starts carries its mark, a random id, in one of two ways:

* the environment variable `RLLOOP_RUN_ID`, which every program started by a descendant inherits, and which
  /proc/<pid>/environ shows even after the process has been orphaned;
* an open memfd of that name, which a forked child inherits (what /proc shows as its environment is that of the
  program's start, without the variable).

`guard` kills what is left when its block ends. For a parent that dies without a chance to do so (SIGKILL, out of
memory) there is a guardian: this file run as a script, which waits for the end of a pipe that only the parent holds,
and then does the same.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Set
from multiprocessing import resource_tracker
from typing import NamedTuple

VARIABLE = "RLLOOP_RUN_ID"
"""Environment variable with the mark of the run."""

_KILL_SECONDS = 5.0
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""What ends a run in order. A terminal or a batch system may send them to every process of the job."""
_SHARED_MEMORY = "/dev/shm"


@contextlib.contextmanager
def guard(grace: float = 1.0) -> Iterator[str]:
    """Mark all that is started in the block; at its end, kill what is left of it. Yields the mark.

    Enter it before anything is started. Leftovers get `grace` seconds between SIGTERM and SIGKILL; if this process is
    killed itself, they are killed at once. Shared memory segments named `shared_memory_prefix(mark)...` are removed.
    """
    marker = uuid.uuid4().hex
    guardian = _start_guardian(marker)
    mark = os.memfd_create(f"rlloop-{marker}")
    # Without SPT_NOENV setproctitle, which vLLM uses, overwrites what /proc/<pid>/environ shows.
    variables = {VARIABLE: marker, "SPT_NOENV": "1"}
    try:
        with environment(**variables):
            yield marker
    finally:
        survivors = kill_marked(marker, grace)
        os.close(mark)
        assert guardian.stdin is not None
        guardian.stdin.close()
        guardian.wait()
        if survivors:
            logging.getLogger(__name__).error("processes %s of this run could not be killed", sorted(survivors))


def end_with_parent() -> None:
    """For a process that multiprocessing has spawned: end it when the one that did so has ended, maybe with its guardian,
    as by `pkill -9 -f rlloop`."""
    if (parent := multiprocessing.parent_process()) is not None:
        threading.Thread(target=_end_after, args=(parent.sentinel,), name="end_with_parent", daemon=True).start()


def _end_after(sentinel: int) -> None:
    from multiprocessing.connection import wait  # the guardian, which this file is, too, needs none

    wait([sentinel])
    os._exit(1)


def shared_memory_prefix(marker: str) -> str:
    """How the names of this run's shared memory segments begin."""
    return f"rlloop-{marker[:12]}-"


def kill_marked(marker: str, grace: float = 0.0) -> set[int]:
    """Kill every process that carries the mark, and all its descendants, except the caller. Returns what survived.

    With `grace`, SIGTERM first, and that many seconds for it. Zombies count as dead. Python's resource trackers are
    left alone: they end with the last process that uses them, and remove what those leaked.
    """
    alive = _marked(marker)
    for number, seconds in ((signal.SIGTERM, grace), (signal.SIGKILL, _KILL_SECONDS)):
        deadline = time.monotonic() + seconds
        told: set[_Process] = set()
        while alive and time.monotonic() < deadline:
            for process in alive - told:
                with contextlib.suppress(ProcessLookupError, PermissionError):  # it has ended; or is not ours to end
                    os.kill(process.pid, number)
            told |= alive
            time.sleep(0.01)  # nothing tells us when a process that is not our child ends, or has started another
            alive = _marked(marker, known=alive)
    return {process.pid for process in alive}


@contextlib.contextmanager
def environment(**variables: str) -> Iterator[None]:
    """These variables are set in the block, for what is started in it to inherit, and are then as they were before."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def blocked_signals(*signals: signal.Signals) -> Iterator[None]:
    """Block signals in this thread; what it starts in the block inherits that, and keeps it.

    So Ctrl-C, which a terminal sends to all processes at once, reaches only the one that stops the others.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        # Unblocks SIGINT and SIGTERM, which the tracker ignores (Python 3.11); multiprocessing would do so in the block.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_guardian(marker: str) -> subprocess.Popen[bytes]:
    # Inherited, so that they do not end it before it has said that it ignores them, nor the tracker at all.
    with blocked_signals(*STOP_SIGNALS):
        guardian = subprocess.Popen(
            # -I: this folder must not be on sys.path, where our types.py would hide Python's. -S: starts sooner.
            [sys.executable, "-I", "-S", __file__, marker],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={name: value for name, value in os.environ.items() if name != VARIABLE},
            cwd="/",
            start_new_session=True,  # out of reach of Ctrl-C
            bufsize=0,
        )
    assert guardian.stdin is not None
    # Programs do not inherit the pipe, but forked children do, and would keep it open when this process has died.
    os.register_at_fork(after_in_child=guardian.stdin.close)
    return guardian


class _Process(NamedTuple):
    pid: int
    start: int
    """When it started, in clock ticks: a pid alone may have become another process's."""


def _marked(marker: str, known: Set[_Process] = frozenset()) -> set[_Process]:
    """Those that carry the mark or are `known`, and their descendants; without the caller and resource trackers.

    A descendant without the mark is found through its parent, which may end first: hence `known`.
    """
    parents = _running()
    children: dict[int, list[_Process]] = {}
    for process, parent in parents.items():
        children.setdefault(parent, []).append(process)
    me = os.getpid()
    pending = [process for process in parents if process.pid != me and (process in known or _carries(process, marker))]
    found: set[_Process] = set()
    while pending:
        process = pending.pop()
        if process not in found:
            found.add(process)
            pending += children.get(process.pid, [])
    return {
        process
        for process in found
        if process.pid != me and b"multiprocessing.resource_tracker" not in _read(process.pid, "cmdline")
    }


def _running() -> dict[_Process, int]:
    """Every process that is no zombie, and its parent's pid."""
    parents = {}
    for pid in [int(name) for name in os.listdir("/proc") if name.isdigit()]:
        fields = _read(pid, "stat").rpartition(b")")[2].split()  # the name before ")" may hold anything
        if fields and fields[0] not in (b"Z", b"X"):
            parents[_Process(pid, start=int(fields[19]))] = int(fields[1])
    return parents


def _carries(process: _Process, marker: str) -> bool:
    pid = process.pid
    if f"{VARIABLE}={marker}".encode() in _read(pid, "environ").split(b"\0"):
        return True
    with contextlib.suppress(OSError):
        for fd in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{pid}/fd/{fd}").startswith(f"/memfd:rlloop-{marker}"):
                    return True
    return False


def _read(pid: int, name: str) -> bytes:
    """Empty if the process has ended, is a zombie, or belongs to another user."""
    try:
        with open(f"/proc/{pid}/{name}", "rb") as file:
            return file.read()
    except OSError:
        return b""


def _watch(marker: str) -> None:
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.buffer.read()  # ends when the parent closes its end of the pipe, or dies
    kill_marked(marker)
    for name in os.listdir(_SHARED_MEMORY):
        if name.startswith(shared_memory_prefix(marker)):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{_SHARED_MEMORY}/{name}")


if __name__ == "__main__":
    _watch(sys.argv[1])
