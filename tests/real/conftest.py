"""Whole runs: the command line in a process of its own, with real vLLM and the real trainer."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from rlloop.checkpoint import Checkpoint, newest_checkpoint

DATASET = Path(__file__).parents[2] / "examples" / "sft" / "questions.jsonl"
# Notes what it has seen of the engine, because completions/ has neither token ids nor logprobs.
TOY = """
import json
import anyio
from rlloop.environment import MessageEnvironment

class Toy(MessageEnvironment):
    def __init__(self, note, num_tasks=7, seconds=0.05):
        self.note, self.num_tasks, self.seconds = note, num_tasks, seconds

    def __len__(self):
        return self.num_tasks

    def task(self, index):
        return index

    def messages(self, task):
        return [{"role": "user", "content": f"Say {task}."}]

    async def rollout(self, task, policy):
        await anyio.sleep(self.seconds)
        rollout = await super().rollout(task, policy)
        seen = {name: getattr(rollout, name).tolist() for name in ("tokens", "loss_mask", "rollout_logprobs")}
        with open(self.note, "a") as file:
            file.write(json.dumps({"policy_version": rollout.policy_version, **seen}) + "\\n")
        return rollout

    def score(self, task, rollout):
        return len(rollout.text) % 7 / 6
"""


@dataclass
class RlloopProcess:
    """`rlloop ...`, leader of a process group of its own as under a terminal."""

    run_dir: Path
    popen: subprocess.Popen[str]
    output: Path
    processes: list[psutil.Process] = field(default_factory=list)
    """All that it had started when `wait_for_steps` returned, itself included."""
    segments: set[Path] = field(default_factory=set)
    """Of shared memory that those had mapped."""

    def text(self) -> str:
        """What it has printed, on both streams."""
        return self.output.read_text()

    def wait_for_steps(self, number: int, timeout: float = 300) -> None:
        """Until metrics.jsonl has so many lines."""
        metrics = self.run_dir / "metrics.jsonl"
        deadline = time.monotonic() + timeout
        while not metrics.exists() or metrics.read_bytes().count(b"\n") < number:
            assert self.popen.poll() is None, self.text()
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.05)
        me = psutil.Process(self.popen.pid)
        self.processes = [me, *me.children(recursive=True)]
        for process in self.processes:
            with suppress(FileNotFoundError):  # it has ended
                maps = Path(f"/proc/{process.pid}/maps").read_text()
                self.segments |= {Path(path) for path in re.findall(r"(/dev/shm/\S+)", maps)}

    def find(self, title: str) -> psutil.Process:
        """The one process of the run whose command line has this in it."""
        [found] = [process for process in self.processes if title in " ".join(process.cmdline())]
        return found

    def signal_group(self, number: signal.Signals) -> None:
        """As a terminal does on Ctrl-C."""
        os.killpg(self.popen.pid, number)

    def wait(self, timeout: float) -> int:
        """The exit status."""
        try:
            return self.popen.wait(timeout)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running after {timeout} s:\n{self.text()}")

    def left_behind(self, timeout: float = 5.0) -> list[str]:
        """Processes and shared memory that outlive the run by `timeout` seconds."""
        _, alive = psutil.wait_procs(self.processes, timeout=timeout)
        found = [str(process) for process in alive]
        return found + [str(segment) for segment in self.segments if segment.exists()]

    def kill(self) -> None:
        """For a test that has failed: the guardian ends the rest."""
        if self.popen.poll() is None:
            self.popen.kill()
            self.popen.wait()


Start = Callable[..., RlloopProcess]


@pytest.fixture(scope="session")
def start(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """start(run_dir, *flags, model=..., algorithm=...) -> RlloopProcess: small, on the toy environment unless flags say
    otherwise."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "toy.py").write_text(TOY)
    started: list[RlloopProcess] = []

    def start_one(run_dir: Path, *flags: str, model: str | Path = tiny_llama, algorithm: str = "grpo") -> RlloopProcess:
        output = folder / f"output-{len(started)}.txt"
        settings = {
            "model": model,
            "run_dir": run_dir,
            "optim.lr": 1e-2,
            "checkpoint.every": 1,
            "checkpoint.keep": 99,
        }
        if algorithm == "sft":
            settings |= {"dataset": DATASET}
        else:
            settings |= {
                "env": "toy:Toy",
                "env_args": f'{{"note": "{run_dir}.note.jsonl"}}',
                "groups_per_step": 2,
                "group_size": 4,
                "max_staleness": 1,
                "engine.max_model_len": 128,
                "engine.max_num_seqs": 32,
                "sampling.max_tokens": 8,
            }
        command = [sys.executable, "-m", "rlloop.cli", algorithm]
        given = {flag.removeprefix("--").replace("-", "_") for flag in flags[::2]}
        for name, value in settings.items():
            if name not in given:
                command += [f"--{name}", str(value)]
        with output.open("w") as file:
            popen = subprocess.Popen(
                [*command, *flags],
                cwd=folder,
                env={**os.environ, "HF_DATASETS_CACHE": str(folder / "cache")},
                stdout=file,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        started.append(RlloopProcess(run_dir, popen, output))
        return started[-1]

    yield start_one
    for process in started:
        process.kill()


@dataclass(frozen=True)
class ResumedRun:
    """A run with a critic that SIGTERM has ended, and that was resumed to its end."""

    run_dir: Path
    note: Path
    first: RlloopProcess
    first_status: int
    first_seconds: float
    """From the signal to the end of the process."""
    first_left_behind: list[str]
    first_checkpoint: Checkpoint
    second: RlloopProcess
    second_status: int
    second_left_behind: list[str]
    num_steps: int


@pytest.fixture(scope="session")
def resumed(start: Start, tmp_path_factory: pytest.TempPathFactory) -> ResumedRun:
    """Two starts of vLLM that many tests look at."""
    run_dir = tmp_path_factory.mktemp("runs") / "resumed"
    flags = ("--dtype", "float32", "--num_steps")
    first = start(run_dir, *flags, "1000", "--checkpoint.every", "1000", algorithm="ppo")
    first.wait_for_steps(3)
    signalled = time.monotonic()
    first.signal_group(signal.SIGTERM)
    status = first.wait(60)
    seconds = time.monotonic() - signalled
    left_behind = first.left_behind()
    checkpoint = newest_checkpoint(run_dir)
    assert checkpoint is not None, first.text()

    num_steps = checkpoint.step + 4
    second = start(run_dir, *flags, str(num_steps), "--resume", algorithm="ppo")
    second.wait_for_steps(checkpoint.step + 1)
    return ResumedRun(
        run_dir=run_dir,
        note=Path(f"{run_dir}.note.jsonl"),
        first=first,
        first_status=status,
        first_seconds=seconds,
        first_left_behind=left_behind,
        first_checkpoint=checkpoint,
        second=second,
        second_status=second.wait(120),
        second_left_behind=second.left_behind(),
        num_steps=num_steps,
    )
