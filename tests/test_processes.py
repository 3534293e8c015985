import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from rlloop import processes
from rlloop.processes import VARIABLE, blocked_signals, guard, kill_marked

# Starts processes in all the ways that could let one slip away; each ignores SIGTERM. Then ends as it is told.
PARENT = """
import multiprocessing, os, signal, subprocess, sys
from rlloop import processes
from rlloop.processes import guard, shared_memory_prefix

STAY = '''
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
sys.argv.append("")
if sys.argv[1] == "retitled":
    import setproctitle
    setproctitle.setproctitle("VLLM::EngineCore" * 20)
os.write(1, f"{sys.argv[1] or 'bare'} {os.getpid()}\\\\n".encode())
while True:
    time.sleep(0 if sys.argv[1] == "spinning" else 60)
'''

def stay(name):
    sys.argv[1:] = [name]
    exec(STAY)

def start(*arguments, **options):
    subprocess.Popen([sys.executable, "-c", *arguments], **options)

def main(end):
    with guard(grace=0.2) as marker:
        open(f"/dev/shm/{shared_memory_prefix(marker)}weights", "w").close()
        print("marker", marker, flush=True)
        start(STAY, "spinning")
        start(STAY, "session", start_new_session=True)
        start(STAY, "retitled")
        # A grandchild whose parent is gone; and one that does not inherit the environment.
        start(f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {STAY!r}, 'orphan'])")
        start(f"import subprocess, sys; subprocess.run([sys.executable, '-c', {STAY!r}, 'bare'], env={{}})")
        for method in ("fork", "spawn"):
            multiprocessing.get_context(method).Process(target=stay, args=[method], daemon=True).start()
        sys.stdin.readline()
        if end == "raise":
            raise RuntimeError("a stage has failed")
        if end == "sigkill":
            os.kill(os.getpid(), signal.SIGKILL)
    print("left guard", flush=True)
    sys.stdin.readline()

if __name__ == "__main__":
    main(sys.argv[1])
"""
CHILDREN = {"spinning", "session", "retitled", "orphan", "bare", "fork", "spawn"}


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until_gone(pids: set[int], seconds: float) -> set[int]:
    deadline = time.monotonic() + seconds
    while (alive := {pid for pid in pids if is_running(pid)}) and time.monotonic() < deadline:
        time.sleep(0.01)
    return alive


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "parent.py"  # a file, since multiprocessing's spawn imports it
    path.write_text(PARENT)
    return path


@contextlib.contextmanager
def running(script: Path, end: str) -> Iterator[tuple[subprocess.Popen[str], str, dict[str, int]]]:
    """The parent with all its children spinning: (process, mark, pids by name)."""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, script, end], stdin=pipe, stdout=pipe, stderr=pipe, text=True) as parent:
        assert parent.stdout is not None
        marker = parent.stdout.readline().split()[1]
        pids: dict[str, int] = {}
        try:
            while len(pids) < len(CHILDREN):
                name, pid = parent.stdout.readline().split()
                pids[name] = int(pid)
            yield parent, marker, pids
        finally:
            for pid in {parent.pid, *pids.values()}:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def guardians(marker: str) -> set[int]:
    found = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if marker in process.cmdline():
                found.add(process.pid)
    return found


@pytest.mark.parametrize("end", ["sigkill", "raise", "normal"])
def test_nothing_is_left(script, end):
    with running(script, end) as (parent, marker, pids):
        assert set(pids) == CHILDREN
        assert all(map(is_running, pids.values()))
        others = guardians(marker) | {child.pid for child in psutil.Process(parent.pid).children()} - set(pids.values())
        others = set(filter(is_running, others))
        assert len(others) >= 2  # the guardian and the resource tracker
        everything = others | set(pids.values())
        assert parent.stdin is not None
        assert parent.stdout is not None
        assert parent.stderr is not None
        parent.stdin.write("end\n")
        parent.stdin.flush()
        if end == "normal":  # all are gone when the block is left, not only when the process ends
            assert parent.stdout.readline() == "left guard\n"
            assert not [name for name, pid in pids.items() if is_running(pid)]
            assert not guardians(marker)
            parent.stdin.write("end\n")
            parent.stdin.flush()
        assert wait_until_gone(everything, 2.0) == set()
        assert parent.wait(2) == {"sigkill": -signal.SIGKILL, "raise": 1, "normal": 0}[end]
        assert ("RuntimeError: a stage has failed" in parent.stderr.read()) == (end == "raise")
        assert not list(Path("/dev/shm").glob(f"rlloop-{marker[:12]}*"))


def test_the_guardian_outlives_the_signals_that_end_a_job(script):
    with running(script, "sigkill") as (parent, marker, pids):
        (guardian,) = guardians(marker)
        assert os.getsid(guardian) != os.getsid(parent.pid)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(guardian, number)
        parent.kill()
        assert wait_until_gone({*pids.values(), guardian}, 2.0) == set()


def test_not_even_while_it_starts_do_signals_end_the_guardian() -> None:
    guardian = processes._start_guardian("a run's mark")
    assert guardian.stdin is not None
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        guardian.send_signal(number)
    guardian.stdin.close()
    assert guardian.wait(10) == 0
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


def test_a_process_may_end_within_the_grace(tmp_path):
    code = (
        "import signal, sys, time\n"
        "def stop(*_): open(sys.argv[1], 'a').write('clean '); sys.exit()\n"
        "signal.signal(signal.SIGTERM, stop); print(flush=True); time.sleep(60)"
    )
    with guard(grace=10):
        file = tmp_path / "ended"
        command = [sys.executable, "-c", code, str(file)]
        child = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert child.stdout is not None
        child.stdout.readline()
        begin = time.monotonic()
    assert time.monotonic() - begin < 5
    assert child.wait() == 0
    child.stdout.close()
    assert file.read_text() == "clean "


def test_only_what_was_started_in_the_block_is_killed(monkeypatch):
    monkeypatch.setenv(VARIABLE, "outer")
    sleep = ["sleep", "60"]
    with subprocess.Popen(sleep) as outer:
        try:
            with guard(grace=0) as marker:
                assert os.environ[VARIABLE] == marker
                inner = subprocess.Popen(sleep)
                assert kill_marked("another") == set()
                assert inner.poll() is None
            assert inner.wait() == -signal.SIGKILL
            assert outer.poll() is None
            assert os.environ[VARIABLE] == "outer"
        finally:
            outer.kill()


BLOCKED = """
import multiprocessing, signal, subprocess, sys
from rlloop import processes
from rlloop.processes import blocked_signals

def show(name):
    print(name, [line.split()[1] for line in open("/proc/self/status") if line.startswith("SigBlk")][0], flush=True)

if __name__ == "__main__":
    with blocked_signals(signal.SIGINT):
        process = multiprocessing.get_context("spawn").Process(target=show, args=["spawned"])
        process.start()
        process.join()
        subprocess.run([sys.executable, "-c", "import sys; sys.path.insert(0, sys.argv[1]); "
                        "from blocked import show; show('program')", sys.argv[1]], check=True)
    show("self")
"""


def test_what_is_started_with_a_blocked_signal_keeps_it(tmp_path):
    script = tmp_path / "blocked.py"
    script.write_text(BLOCKED)
    run = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True, check=True)
    masks = {name: int(mask, 16) for name, mask in (line.split() for line in run.stdout.splitlines())}
    sigint = 1 << (signal.SIGINT - 1)
    assert masks == {"spawned": sigint, "program": sigint, "self": 0}


TRACKED = """
from multiprocessing import resource_tracker
from rlloop.processes import guard

with guard():
    tracker = resource_tracker._resource_tracker._pid
    print(*[line.split()[1] for line in open(f"/proc/{tracker}/status") if line.startswith("SigBlk")])
"""


def test_the_end_of_a_terminal_does_not_end_who_removes_what_others_leave_behind():
    """Python's resource tracker ignores SIGINT and SIGTERM itself."""
    run = subprocess.run([sys.executable, "-c", TRACKED], capture_output=True, text=True, check=True)
    assert int(run.stdout, 16) & (1 << (signal.SIGHUP - 1))


def test_a_spawned_process_ends_with_its_parent_also_without_a_guardian(tmp_path):
    program = """
import multiprocessing, time
from rlloop.processes import end_with_parent

def stay():
    end_with_parent()
    print(multiprocessing.process.current_process().pid, flush=True)
    time.sleep(600)

if __name__ == "__main__":
    multiprocessing.get_context("spawn").Process(target=stay).start()
"""
    (tmp_path / "parent.py").write_text(program)
    with subprocess.Popen([sys.executable, tmp_path / "parent.py"], stdout=subprocess.PIPE, text=True) as parent:
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
        child.wait(timeout=20)


def test_blocked_signals_restores_the_mask():
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with blocked_signals(signal.SIGUSR1):
        assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before | {signal.SIGUSR1}
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
