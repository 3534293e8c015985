"""Signals go to a child process: pytest has handlers of its own."""

import os
import pty
import signal
import subprocess
import sys
import time

import anyio
import pytest

from rlloop.signals import stop_on_signals

PROGRAM = """
import sys, anyio
from rlloop.errors import EngineError, Stopped
from rlloop.signals import stop_on_signals

async def work():
    try:
        print("ready", flush=True)
        await anyio.sleep_forever()
    finally:
        print("cleaning up", flush=True)
        with anyio.CancelScope(shield=True):
            await anyio.sleep({cleanup})
        print("clean", flush=True)
        if {fails}:
            raise EngineError("the request failed, for the engine got the signal, too")

async def main():
    async with stop_on_signals():
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(work)

try:
    anyio.run(main, backend="{backend}")
except Stopped as stop:
    print(stop, repr(stop.__cause__), flush=True)
    sys.exit(stop.exit_code)
"""


def start(backend: str, cleanup: float = 0.0, *, fails: bool = False) -> subprocess.Popen[str]:
    program = PROGRAM.format(backend=backend, cleanup=cleanup, fails=fails)
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    return child


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("fails", [False, True])
def test_the_first_signal_ends_the_block_in_order(anyio_backend: str, number: signal.Signals, fails: bool) -> None:
    with start(anyio_backend, fails=fails) as child:
        child.send_signal(number)
        out, _ = child.communicate(timeout=20)
    cause = "EngineError('the request failed, for the engine got the signal, too')" if fails else None
    assert out.splitlines() == ["cleaning up", "clean", f"stopped by {number.name} {cause}"]
    assert child.returncode == 128 + number


def test_the_second_signal_ends_the_process_at_once(anyio_backend: str) -> None:
    with start(anyio_backend, cleanup=600) as child:
        child.send_signal(signal.SIGINT)
        assert child.stdout is not None
        assert child.stdout.readline() == "cleaning up\n"
        time.sleep(2.1)  # sooner it is the same stop
        started = time.monotonic()
        child.send_signal(signal.SIGINT)
        assert child.wait(timeout=20) == 130
        assert time.monotonic() - started < 5


def test_the_second_signal_ends_a_process_whose_event_loop_is_kept_busy(anyio_backend: str) -> None:
    program = PROGRAM.format(backend=anyio_backend, cleanup=0, fails=False)
    program = program.replace("await anyio.sleep_forever()", "import time; time.sleep(600)")
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        child.send_signal(signal.SIGTERM)
        time.sleep(2.1)
        assert child.poll() is None
        child.send_signal(signal.SIGTERM)
        assert child.wait(timeout=20) == 143


def test_the_second_signal_shows_a_terminals_cursor() -> None:
    terminal, child_end = pty.openpty()
    program = PROGRAM.format(backend="asyncio", cleanup=600, fails=False)
    with subprocess.Popen([sys.executable, "-c", program], stdout=child_end) as child:
        os.close(child_end)
        assert os.read(terminal, 99).startswith(b"ready")
        child.send_signal(signal.SIGTERM)
        time.sleep(2.1)
        child.send_signal(signal.SIGTERM)
        assert child.wait(timeout=20) == 143
    assert os.read(terminal, 99).endswith(b"\x1b[?25h")
    os.close(terminal)


def test_signals_that_come_at_once_are_one_stop(anyio_backend: str) -> None:
    """As `timeout` sends them."""
    with start(anyio_backend, cleanup=1.5) as child:
        child.send_signal(signal.SIGTERM)
        assert child.stdout is not None
        assert child.stdout.readline() == "cleaning up\n"
        child.send_signal(signal.SIGTERM)
        assert child.communicate(timeout=20)[0].splitlines() == ["clean", "stopped by SIGTERM None"]
        assert child.returncode == 143


def test_what_nohup_ignores_stays_ignored(anyio_backend: str) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # inherited
    try:
        child = start(anyio_backend)
    finally:
        signal.signal(signal.SIGHUP, before)
    with child:
        child.send_signal(signal.SIGHUP)
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(0.5)
        child.send_signal(signal.SIGTERM)
        assert child.communicate(timeout=20)[0].endswith("stopped by SIGTERM None\n")


def test_an_error_without_a_signal_is_itself(anyio_backend: str) -> None:
    async def main() -> None:
        async with stop_on_signals():
            raise KeyError("a bug")

    with pytest.raises(ExceptionGroup) as caught:
        anyio.run(main, backend=anyio_backend)
    assert caught.group_contains(KeyError, match="a bug")
