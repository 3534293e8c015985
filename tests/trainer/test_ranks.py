import functools
import importlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from time import monotonic

import anyio
import psutil
import pytest

from rlloop.errors import NonFiniteError, RankDied, TrainerError
from rlloop.trainer.ranks import Interrupted, Ranks, RankSpec

pytestmark = pytest.mark.anyio

MODULE = """
import functools, os, signal, sys, time
from rlloop.errors import NonFiniteError

class Rank:
    def __init__(self, context, farewell=None):
        self.context, self.farewell, self.calls = context, farewell, 0

    def close(self):
        if self.farewell:
            open(self.farewell, "w").close()

    def echo(self, *args):
        self.calls += 1
        return self.context.rank, self.calls, *args

    def file_of_others(self):
        return None if self.context.rank == 0 else sys.stdout

    def look(self):
        return (
            os.getpid(), os.environ.get("OMP_NUM_THREADS"), os.environ.get("OMP_WAIT_POLICY"), os.sched_getaffinity(0),
            sys.modules["torch"].get_num_threads() if "torch" in sys.modules else None,
            {signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)} == {signal.SIG_IGN},
        )

    def variable(self, name):
        return os.environ.get(name)

    def say(self, text):
        print(text, flush=True)
        os.system(f"echo {text} from a child >&2")

    def fail(self, kind):
        raise NonFiniteError("three in a row") if kind == "nonfinite" else KeyError("missing")

    def fail_on(self, rank):
        if self.context.rank == rank:
            time.sleep(0.5)
            raise KeyError("missing")
        time.sleep(30)

    def lose(self, rank):
        if self.context.rank == rank:
            time.sleep(0.3)
            self.die("kill")
        raise ConnectionError("peer is gone")

    def leave(self, rank):
        if self.context.rank == rank:
            self.die("kill")
        time.sleep(30)

    def die(self, how):
        os._exit(3) if how == "exit" else os.kill(os.getpid(), signal.SIGKILL)

    def work(self, started=None):
        if started:
            open(started, "w").close()
        for _ in range(3000):
            self.context.check_interrupt()
            time.sleep(0.01)

class Lost(Rank):
    def __init__(self, context):
        super().__init__(context)
        self.lose(1)

def broken(context):
    raise RuntimeError("no such model")
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    """Importable in the spawned process as well."""
    (tmp_path / "rank_under_test.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("rank_under_test", None)
    return importlib.import_module("rank_under_test")


async def until(happened: Callable[[], bool]) -> None:
    """For what another process does and nothing announces."""
    with anyio.fail_after(20):
        while not happened():  # noqa: ASYNC110
            await anyio.sleep(0.01)


async def test_answers_and_arguments(module) -> None:
    async with Ranks([RankSpec(module.Rank)]) as ranks:
        assert await ranks.call("echo") == (0, 1)
        large = os.urandom(5_000_000)  # far beyond what a pipe holds
        assert await ranks.call("echo", large, "b") == (0, 2, large, "b")


async def test_rank_zero_answers_for_all(module) -> None:
    async with Ranks([RankSpec(module.Rank)] * 2) as ranks:
        assert await ranks.call("echo", "x") == (0, 1, "x")
        assert await ranks.call("file_of_others") is None, "what others return need not be sent"
        assert len(multiprocessing.active_children()) == 2
    assert not multiprocessing.active_children()


async def test_concurrent_calls_run_one_after_the_other(module) -> None:
    async with Ranks([RankSpec(module.Rank)]) as ranks:
        answers = []

        async def call(number: int) -> None:
            answers.append(await ranks.call("echo", number))

        async with anyio.create_task_group() as tasks:
            for number in range(5):
                tasks.start_soon(call, number)
    assert sorted(count for _, count, _ in answers) == [1, 2, 3, 4, 5]


async def test_pinned_with_its_own_threads_and_deaf_to_what_ends_the_run(module) -> None:
    core = min(os.sched_getaffinity(0))
    before = os.environ.get("OMP_NUM_THREADS")
    async with Ranks([RankSpec(module.Rank, cores=frozenset({core}))]) as ranks:
        pid, *rest = await ranks.call("look")
        assert rest == ["1", "PASSIVE", {core}, 1, True]
        os.kill(pid, signal.SIGINT)
        os.kill(pid, signal.SIGHUP)
        assert (await ranks.call("echo"))[0] == 0
    assert os.environ.get("OMP_NUM_THREADS") == before


async def test_a_rank_sees_its_gpus_and_nobody_else_does(module) -> None:
    variable = "CUDA_VISIBLE_DEVICES"
    before = os.environ.get(variable)
    specs = [RankSpec(module.Rank, visible_gpus="2,3"), RankSpec(module.Rank)]
    async with Ranks(specs) as ranks:
        assert os.environ.get(variable) == before
        assert await ranks.call("variable", variable) == "2,3"
    async with Ranks(specs[1:]) as ranks:
        assert await ranks.call("variable", variable) == before


async def test_output_goes_to_the_log(module, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "logs" / "trainer.log"
    async with Ranks([RankSpec(module.Rank, log_path=log)]) as ranks:
        await ranks.call("say", "hello")
    assert log.read_text() == "hello\nhello from a child\n"
    assert "hello" not in "".join(capfd.readouterr())


async def test_errors(module) -> None:
    async with Ranks([RankSpec(module.Rank)]) as ranks:
        with pytest.raises(NonFiniteError, match="three in a row"):
            await ranks.call("fail", "nonfinite")
        with pytest.raises(TrainerError, match=r"rank 0 raised(?s:.*)in fail(?s:.*)KeyError: 'missing'"):
            await ranks.call("fail", "other")
        assert await ranks.call("echo") == (0, 1)  # and it lives


async def test_one_rank_that_fails_is_enough(module) -> None:
    async with Ranks([RankSpec(module.Rank)] * 2) as ranks:
        await ranks.call("echo")
        started = monotonic()
        with pytest.raises(TrainerError, match="rank 1 raised"):
            await ranks.call("fail_on", 1)
        with pytest.raises(RankDied, match="rank 0 still waits for one that has failed"):
            await ranks.call("echo")
        assert monotonic() - started < 20  # rank 0 sleeps for 30 s
        await ranks.close(timeout=0.1)
    assert not multiprocessing.active_children()


async def test_a_call_after_a_cancelled_one_does_not_wait_for_who_waits_for_one_that_failed(module) -> None:
    async with Ranks([RankSpec(module.Rank)] * 2) as ranks:
        await ranks.call("echo")
        with anyio.move_on_after(0.1):
            await ranks.call("fail_on", 1)
        with anyio.fail_after(20), pytest.raises(RankDied, match="rank 0 still waits for one that has failed"):
            await ranks.call("echo")
        await ranks.close(timeout=0.1)


async def test_a_rank_that_is_gone_explains_what_the_others_raise(module) -> None:
    async with Ranks([RankSpec(module.Rank)] * 3) as ranks:
        await ranks.call("echo")
        with pytest.raises(TrainerError, match="rank 1 was killed by SIGKILL"):
            await ranks.call("lose", 1)


async def test_those_that_wait_for_one_that_is_gone_can_be_ended(module) -> None:
    async with Ranks([RankSpec(module.Rank)] * 2) as ranks:
        with pytest.raises(RankDied, match="rank 1 was killed"):
            await ranks.call("leave", 1)
        started = monotonic()
        ranks.kill()
        with pytest.raises(RankDied, match="rank 1 was killed"):
            await ranks.call("echo")
        assert monotonic() - started < 5


async def test_a_rank_that_dies_while_it_is_built_explains_what_the_others_raise(module) -> None:
    async with Ranks([RankSpec(module.Lost)] * 2) as ranks:
        with pytest.raises(TrainerError, match="rank 1 was killed by SIGKILL"):
            await ranks.call("echo")


async def test_factory_that_fails(module) -> None:
    async with Ranks([RankSpec(module.broken)]) as ranks:
        with pytest.raises(TrainerError, match="no such model"):
            await ranks.call("echo")
        with pytest.raises(TrainerError, match="exit code 0"):
            await ranks.call("echo")


@pytest.mark.parametrize(("how", "message"), [("exit", "exit code 3"), ("kill", "killed by SIGKILL.*trainer.log")])
async def test_death_during_a_call(module, tmp_path: Path, how: str, message: str) -> None:
    async with Ranks([RankSpec(module.Rank, log_path=tmp_path / "trainer.log")]) as ranks:
        await ranks.call("echo")
        started = monotonic()
        with pytest.raises(TrainerError, match=message):
            await ranks.call("die", how)
        assert monotonic() - started < 3


async def test_death_between_calls(module) -> None:
    async with Ranks([RankSpec(module.Rank)]) as ranks:
        pid, *_ = await ranks.call("look")
        os.kill(pid, signal.SIGKILL)
        for _ in range(2):
            with pytest.raises(TrainerError, match="SIGKILL"):
                await ranks.call("echo")


async def test_cancelled_call_ends_soon_and_leaves_the_pipe_usable(module, tmp_path: Path) -> None:
    async with Ranks([RankSpec(module.Rank)]) as ranks:
        assert await ranks.call("echo", "before") == (0, 1, "before")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ranks.call, "work", str(tmp_path / "started"))
            await until((tmp_path / "started").exists)
            tasks.cancel_scope.cancel()
        started = monotonic()
        assert await ranks.call("echo", "after") == (0, 2, "after")  # not the reply of `work`
        assert monotonic() - started < 5  # `work` takes 30 s


async def test_interrupt_from_another_task(module, tmp_path: Path) -> None:
    async with Ranks([RankSpec(module.Rank)]) as ranks, anyio.create_task_group() as tasks:

        async def work() -> None:
            with pytest.raises(Interrupted):
                await ranks.call("work", str(tmp_path / "started"))

        tasks.start_soon(work)
        await until((tmp_path / "started").exists)
        ranks.interrupt()
        assert await ranks.call("echo") == (0, 1)


async def test_close_lets_the_rank_say_farewell(module, tmp_path: Path) -> None:
    async with Ranks([RankSpec(functools.partial(module.Rank, farewell=str(tmp_path / "bye")))]) as ranks:
        await ranks.call("echo")
    assert (tmp_path / "bye").exists()
    with pytest.raises(TrainerError, match="not running"):
        await ranks.call("echo")


async def test_close_kills_a_rank_that_hangs(module) -> None:
    async with Ranks([RankSpec(module.Rank)]) as ranks:
        pid, *_ = await ranks.call("look")
        os.kill(pid, signal.SIGSTOP)
        await ranks.close(timeout=0.2)
        assert not psutil.pid_exists(pid)


PARENT = """
import anyio, os, signal
from rank_under_test import Rank
from rlloop.trainer.ranks import Ranks, RankSpec

async def main():
    async with Ranks([RankSpec(Rank)]) as ranks:
        print((await ranks.call("look"))[0], flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    anyio.run(main)
"""


async def test_the_rank_leaves_when_its_parent_is_killed(module, tmp_path: Path) -> None:
    (tmp_path / "parent.py").write_text(PARENT)
    # PYTHONPATH, since the tests may run with PYTHONSAFEPATH, which leaves out the script's own folder.
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    result = await anyio.run_process([sys.executable, str(tmp_path / "parent.py")], check=False, env=environment)
    assert result.returncode == -signal.SIGKILL
    await until(lambda: not psutil.pid_exists(int(result.stdout)))
