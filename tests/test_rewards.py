import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from time import monotonic, sleep

import anyio
import numpy as np
import psutil
import pytest

from rlloop.errors import BadEnvironmentError
from rlloop.rewards import Scorer
from rlloop.types import Failure, Reward, Rollout

REWARDS = """
import os, re, subprocess, sys, time
import numpy as np
from rlloop.types import Reward

class Env:
    def __init__(self, bonus=0.0, seconds=0.0):
        time.sleep(seconds)
        self.bonus = bonus

    def __len__(self): return 1
    def task(self, index): return index
    async def rollout(self, task, policy): ...

    def score(self, task, rollout):
        match rollout.text:
            case "right": return 1 + self.bonus
            case "bool": return np.bool_(True)
            case "parts": return Reward(0.5, {"form": np.float32(1.0), "content": 0.0})
            case "part": return Reward(0.5, {"form": None})
            case "raise": return task["missing"]
            case "nan": return float("nan")
            case "string": return "1.0"
            case "none": return None
            case "complex": return 1j
            case "exit": sys.exit(3)
            case "read": return input()
            case "print": print("chatter"); return 0.25
            case "print much":
                for number in range(500): print("reward", os.getpid(), number)
                return 0.25
            case "crash": os.kill(os.getpid(), 11)
            case "regex": return re.match("(a+)+$", "a" * 60 + "b")
            case "power": return 9**9**9**9
            case "process": subprocess.run(["sleep", "61.7"])

class Dies(Env):
    def __init__(self): os._exit(3)
"""


@pytest.fixture(autouse=True)
def rewards_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "graders.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(tmp_path)
    BEFORE.clear()
    BEFORE.update(psutil.Process().children(recursive=True))
    yield
    assert not children()


BEFORE: set[psutil.Process] = set()
"""What other tests in this process have started: Python's resource tracker stays until the end."""


def children() -> list[psutil.Process]:
    """Processes that the test has started and that are alive."""
    family = set(psutil.Process().children(recursive=True)) - BEFORE
    return [process for process in family if process.status() != psutil.STATUS_ZOMBIE]


def rollout(text: str) -> Rollout:
    return Rollout(np.zeros(1, np.int32), np.ones(1, np.bool_), np.zeros(1, np.float32), 0, "stop", 1, text)


def scorer(
    name: str = "graders:Env",
    *,
    timeout: float = 20.0,
    num_workers: int = 1,
    log_path: Path | None = None,
    **args: float,
) -> Scorer:
    return Scorer(name, args, num_workers=num_workers, timeout=timeout, log_path=log_path)


@pytest.mark.anyio
async def test_what_rewards_print_is_in_the_log(
    anyio_backend: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for text in ("print", "print"):
        async with scorer(log_path=tmp_path / "rewards.log") as rewards:
            assert await rewards.score({}, rollout(text)) == 0.25
    assert (tmp_path / "rewards.log").read_text() == "chatter\nchatter\n"
    assert capfd.readouterr() == ("", "")


@pytest.mark.anyio
async def test_lines_of_several_workers_stay_whole(
    anyio_backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONUNBUFFERED", "1")  # as in many containers
    async with (
        scorer(log_path=tmp_path / "rewards.log", num_workers=2) as rewards,
        anyio.create_task_group() as tasks,
    ):
        for _ in range(2):
            tasks.start_soon(rewards.score, {}, rollout("print much"))
    lines = [line.split() for line in (tmp_path / "rewards.log").read_text().splitlines()]
    assert len(lines) == 1000
    assert len({process for _, process, _ in lines}) == 2


@pytest.mark.anyio
async def test_rewards_and_failures() -> None:
    expected = {
        "right": 1.5,
        "bool": 1.0,
        "print": 0.25,
        "raise": "KeyError: 'missing' (graders.py:",
        "nan": "returned nan",
        "string": "finite number, but returned '1.0'",
        "none": "returned None",
        "part": "TypeError",
        "complex": "returned 1j",
        "exit": "SystemExit: 3",
        "read": "EOFError",
        "crash": "died of SIGSEGV",
        "right ": "returned None",  # and the next call has a worker again
    }
    async with scorer(bonus=0.5) as rewards:
        for text, expectation in expected.items():
            outcome = await rewards.score({}, rollout(text))
            if isinstance(expectation, str):
                assert isinstance(outcome, Failure), text
                assert (outcome.kind, outcome.stage) == ("error", "score")
                assert expectation in outcome.message
            else:
                assert outcome == expectation
                assert type(outcome) is float


@pytest.mark.anyio
async def test_what_a_reward_is_made_of_comes_with_it() -> None:
    async with scorer() as rewards:
        outcome = await rewards.score({}, rollout("parts"))
    assert outcome == 0.5
    assert isinstance(outcome, Reward)
    assert outcome.parts == {"form": 1.0, "content": 0.0}


def test_a_reward_survives_a_process_boundary() -> None:
    reward = pickle.loads(pickle.dumps(Reward(0.5, {"form": 1.0})))
    assert (reward, reward.parts, type(reward)) == (0.5, {"form": 1.0}, Reward)


@pytest.mark.anyio
@pytest.mark.parametrize("hang", ["regex", "power", "process"])
async def test_a_hang_is_killed_in_time_and_costs_one_rollout(hang: str) -> None:
    outcomes: dict[str, float | Failure] = {}

    async def score(text: str) -> None:
        outcomes[text] = await rewards.score({}, rollout(text))

    async with scorer(timeout=1.0, num_workers=2) as rewards:
        async with anyio.create_task_group() as warm_up:
            for _ in range(2):
                warm_up.start_soon(score, "right")
        started = monotonic()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(score, hang)
            tasks.start_soon(score, "right")
        # It hangs forever; the margin is for a machine that does other things, too.
        assert 1.0 <= monotonic() - started < 4.0
    outcome = outcomes[hang]
    assert isinstance(outcome, Failure)
    assert (outcome.kind, outcome.stage) == ("timeout", "score")
    assert outcomes["right"] == 1.0


@pytest.mark.anyio
async def test_the_start_of_a_worker_does_not_count() -> None:
    async with scorer(timeout=0.3, seconds=0.6) as rewards:
        assert await rewards.score({}, rollout("right")) == 1.0


@pytest.mark.anyio
async def test_no_more_workers_than_asked_for_and_each_is_used_again() -> None:
    async with scorer(num_workers=2) as rewards:
        async with anyio.create_task_group() as tasks:
            for _ in range(20):
                tasks.start_soon(rewards.score, {}, rollout("right"))
        assert len(children()) == 2


@pytest.mark.anyio
async def test_a_worker_that_died_while_it_was_idle_costs_no_rollout() -> None:
    async with scorer() as rewards:
        await rewards.score({}, rollout("right"))
        [worker] = rewards._idle
        os.kill(worker._process.pid, signal.SIGKILL)
        await worker._process.wait()
        assert await rewards.score({}, rollout("right")) == 1.0


@pytest.mark.anyio
async def test_cancelling_kills_the_worker() -> None:
    async with scorer() as rewards:
        await rewards.score({}, rollout("right"))
        with anyio.move_on_after(0.2) as scope:
            await rewards.score({}, rollout("regex"))
        assert scope.cancelled_caught
        assert not children()


@pytest.mark.anyio
async def test_what_no_rollout_can_cause_is_raised() -> None:
    async with scorer() as rewards:
        with pytest.raises(BadEnvironmentError, match=r"a task must be picklable, but .*lambda"):
            await rewards.score(lambda: 0, rollout("right"))
    async with scorer(wrong=1.0) as rewards:
        with pytest.raises(BadEnvironmentError, match="unexpected keyword argument 'wrong'"):
            await rewards.score({}, rollout("right"))
    async with scorer("graders:Dies") as rewards:
        with pytest.raises(BadEnvironmentError, match="died with exit code 3"):
            await rewards.score({}, rollout("right"))


PARENT = """
import sys, anyio, numpy as np
from rlloop.rewards import Scorer
from rlloop.types import Rollout

async def main():
    rollout = Rollout(np.zeros(1, np.int32), np.ones(1, np.bool_), np.zeros(1, np.float32), 0, "stop", 1, sys.argv[2])
    async with Scorer("graders:Env", {}, num_workers=1, timeout=60) as scorer:
        await scorer.score({}, rollout)
        await anyio.sleep(60)

anyio.run(main, backend=sys.argv[1])
"""


@pytest.mark.parametrize("text", ["regex", "process", "right"])
def test_no_worker_outlives_a_parent_that_is_killed(text: str, anyio_backend: str, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    parent = subprocess.Popen([sys.executable, "-c", PARENT, anyio_backend, text], env=environment)
    try:
        deadline = monotonic() + 20
        while not (family := busy_descendants(parent.pid, text)):
            assert monotonic() < deadline
            sleep(0.02)
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    _, alive = psutil.wait_procs(family, timeout=5)
    for process in alive:
        process.kill()
    assert not alive


def busy_descendants(pid: int, text: str) -> list[psutil.Process]:
    """Once the worker is busy with what it hangs in: for a second of processor time, or with a process of its own."""
    family = psutil.Process(pid).children(recursive=True)
    if text == "process":
        return family if len(family) == 2 else []
    if not family:
        return []
    times = family[0].cpu_times()
    return family if text == "right" or times.user + times.system > 1.5 else []
