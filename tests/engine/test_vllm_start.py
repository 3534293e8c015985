"""Engines that start side by side, with a stand-in for the process that vLLM spawns and for the wait until it is ready."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import anyio.to_thread
import pytest

from rlloop.engine import vllm_compat, vllm_start
from rlloop.engine.vllm_start import start_llm
from rlloop.errors import EngineError

LOG = Path("/none/engine.log")
pytestmark = [pytest.mark.timeout(120), pytest.mark.filterwarnings("ignore")]  # of vLLM


@dataclass
class FakeProcess:
    """What vLLM spawns, and what it inherits."""

    variables: dict[str, str]
    blocked: set[int]
    is_ended: threading.Event = field(default_factory=threading.Event)

    def terminate(self) -> None:
        self.is_ended.set()


class Spawned:
    """The processes by name; `meet` is passed when so many wait for their engine to be ready."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
        from vllm.v1.engine import utils
        from vllm.v1.engine.async_llm import AsyncLLM

        self.processes: dict[str, FakeProcess] = {}
        self.meet = threading.Barrier(number, timeout=5)
        self.has_spawned = threading.Event()
        self.configuring: Callable[[], None] = lambda: None
        self.spawn = lambda manager: self._spawn(manager)
        monkeypatch.setattr(utils.CoreEngineProcManager, "__init__", self.spawn)
        monkeypatch.setattr(AsyncLLM, "from_engine_args", self._start)
        monkeypatch.setattr("vllm.AsyncEngineArgs", lambda **arguments: arguments)
        self.spawner = utils.CoreEngineProcManager

    def _spawn(self, manager: Any) -> None:
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        process = FakeProcess({name: os.environ[name] for name in ("NAME", "BOTH")}, {*mask})
        manager.processes = [process]
        self.processes[os.environ["NAME"]] = process
        self.has_spawned.set()

    def _start(self, arguments: dict[str, Any], stat_loggers: Any) -> Any:
        self.configuring()
        manager: Any = self.spawner()
        assert isinstance(manager, self.spawner)
        if arguments["model"] == "bad":
            raise ValueError("no such model")
        if arguments["model"] == "slow":
            manager.processes[0].is_ended.wait(5)
            raise RuntimeError("the engine's process ended")
        self.meet.wait()
        return manager


def variables(name: str) -> Callable[[], dict[str, str]]:
    return lambda: {"NAME": name, "BOTH": os.environ.get("BOTH", "") + name}


def check_nothing_is_left(spawned: Spawned) -> None:
    assert not {"NAME", "BOTH"} & {*os.environ}
    assert spawned.spawner.__init__ is spawned.spawn  # type: ignore[misc]
    assert not vllm_start._SPAWNING.locked()


def test_each_process_has_its_own_environment_and_they_start_together(monkeypatch: pytest.MonkeyPatch) -> None:
    spawned = Spawned(monkeypatch, 2)

    async def run() -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(start_llm, {"model": "good"}, variables("a"), LOG)
            tasks.start_soon(start_llm, {"model": "good"}, variables("b"), LOG)

    anyio.run(run)
    assert {name: each.variables for name, each in spawned.processes.items()} == {
        "a": {"NAME": "a", "BOTH": "a"},
        "b": {"NAME": "b", "BOTH": "b"},
    }
    assert all({signal.SIGINT, signal.SIGHUP} <= each.blocked for each in spawned.processes.values())
    check_nothing_is_left(spawned)


def test_where_one_fails_the_others_end_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    spawned = Spawned(monkeypatch, 1)

    async def run() -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(start_llm, {"model": "slow"}, variables("slow"), LOG)
            await anyio.to_thread.run_sync(spawned.has_spawned.wait)
            tasks.start_soon(start_llm, {"model": "bad"}, variables("bad"), LOG)

    with pytest.raises(ExceptionGroup) as raised:
        anyio.run(run)
    assert [str(error) for error in raised.value.exceptions] == [
        f"vLLM could not start: no such model (its log: {LOG})"
    ]
    assert spawned.processes["slow"].is_ended.is_set()
    check_nothing_is_left(spawned)


def test_what_its_processes_log_says_why_it_could_not_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    spawned, log = Spawned(monkeypatch, 1), tmp_path / "engine.log"
    traceback = "Traceback (most recent call last):\n  File\n    raise it\n"
    log.write_text(f"{traceback}ValueError: of an attempt before\n")

    def fail() -> None:
        with log.open("a") as file:
            file.write("WARNING DeprecationError: none\nSomeError: a warning\n")
            for error in ("triton.OutOfResources: no memory", "RuntimeError: a worker"):
                file.write(f"ERROR it failed\n{traceback}{error}\n\nDuring this, another:\n\n")
        raise OSError("See root cause above")

    spawned.configuring = fail
    with pytest.raises(
        EngineError, match=r"^vLLM could not start: triton\.OutOfResources: no memory \(its log: .*log\)$"
    ):
        anyio.run(start_llm, {"model": "good"}, variables("a"), log)
    check_nothing_is_left(spawned)


def test_what_is_cancelled_before_it_spawns_spawns_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    spawned = Spawned(monkeypatch, 1)
    configuring, cancelled = threading.Event(), threading.Event()

    def wait() -> None:
        configuring.set()
        cancelled.wait(5)

    spawned.configuring = wait

    async def run() -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(start_llm, {"model": "good"}, variables("a"), LOG)
            await anyio.to_thread.run_sync(configuring.wait)
            tasks.cancel_scope.cancel()
        cancelled.set()
        await anyio.to_thread.run_sync(vllm_start._SPAWNING.acquire)
        vllm_start._SPAWNING.release()

    anyio.run(run)
    assert spawned.processes == {}
    check_nothing_is_left(spawned)


def test_workers_start_with_what_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm import SamplingParams
    from vllm.v1.worker.gpu import model_runner

    lora, compilation = SimpleNamespace(max_loras=3), SimpleNamespace(cudagraph_specialize_lora=True)
    for owner, name in ((SamplingParams, "for_sampler_warmup"), (model_runner, "get_lora_capture_cases")):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # and back
    assert SamplingParams.for_sampler_warmup().top_k > 0
    assert model_runner.get_lora_capture_cases(lora, compilation) == [0, 4]
    vllm_compat.start_with_what_is_used()
    asked = SamplingParams.for_sampler_warmup()
    assert (asked.top_k, asked.top_p, asked.repetition_penalty, asked.logprobs) == (0, 1.0, 1.0, 0)
    assert model_runner.get_lora_capture_cases(lora, compilation) == [4]
    assert model_runner.get_lora_capture_cases(None, compilation) == [0]
