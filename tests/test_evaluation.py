"""What an evaluation says of its answers, against numbers worked out by hand."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import numpy as np
import pytest

from rlloop.environment import PromptTooLong
from rlloop.evaluation import Evaluation, _summarise
from rlloop.types import Failure, Group, Prompt, Rollout

ROLLOUT = Rollout(np.zeros(3, np.int32), np.array([False, True, True]), np.zeros(3, np.float32), 0, "stop", 1, "")


def group(ordinal: int, *rewards: float) -> Group:
    failures = () if rewards else (Failure("error", "score", "made up"),)
    return Group(Prompt(ordinal, ordinal, 0, None), (ROLLOUT,) * len(rewards), rewards, 0, failures)


def test_answers_to_one_prompt_are_no_independent_draws() -> None:
    found = _summarise(
        [group(0, 1.0, 1.0, 1.0, 0.0), group(1, 0.0, 0.0, 0.0, 0.0), group(2, 1.0, 1.0, 1.0, 1.0), group(3)]
    )
    assert found["eval/reward_mean"] == pytest.approx(7 / 12)
    # Means 3/4, 0 and 1: their variance is 13/48.
    assert found["eval/reward_stderr"] == pytest.approx(math.sqrt(13 / 48 / 3))
    assert (found["eval/prompts"], found["eval/failures"], found["eval/mean_length"]) == (4, 1, 2)


def test_the_error_is_that_of_the_mean_where_prompts_have_lost_answers() -> None:
    found = _summarise([group(0, 1.0, 1.0, 1.0, 1.0), group(1, 0.0)])
    assert found["eval/reward_mean"] == pytest.approx(0.8)
    # Off by 4 x 0.2 and by 0.8, of 5: sqrt(2 / 1 x 2 x 0.64) / 5.
    assert found["eval/reward_stderr"] == pytest.approx(0.32)


class FakeRefit:
    @asynccontextmanager
    async def pin(self) -> AsyncIterator[int]:
        yield 0


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_each_pass_through_the_event_loop_begins_one_prompt(backend: str) -> None:
    begun: list[int] = []
    found: list[float] = []

    async def sample(prompt: Prompt, version: int) -> Group:
        begun.append(prompt.ordinal)
        return group(prompt.ordinal, 1.0)

    async def evaluate() -> None:
        prompts = [Prompt(ordinal, ordinal, 0, None) for ordinal in range(16)]
        evaluation = Evaluation(prompts, sample, FakeRefit(), lambda _, m: found.append(m["eval/prompts"]))  # type: ignore[arg-type]
        async with anyio.create_task_group() as tasks:
            await evaluation.start(tasks)
            before = len(begun)
            for _ in range(4):
                await anyio.lowlevel.checkpoint()
            assert 1 <= len(begun) - before <= 5  # trio runs the tasks of a pass in any order
        assert found == [16]

    anyio.run(evaluate, backend=backend)


@pytest.mark.anyio
async def test_one_that_is_cut_off_is_not_lost_in_silence(anyio_backend: str, caplog: pytest.LogCaptureFixture) -> None:
    async def sample(prompt: Prompt, version: int) -> Group:
        await anyio.sleep_forever()
        raise AssertionError

    evaluation = Evaluation([Prompt(0, 0, 0, None)], sample, FakeRefit(), lambda *_: None)  # type: ignore[arg-type]
    async with anyio.create_task_group() as tasks:
        await evaluation.start(tasks)
        tasks.cancel_scope.cancel()
    assert caplog.messages == ["the evaluation of policy version 0 is lost: the run's end cut it off"]


@pytest.mark.anyio
async def test_the_next_one_waits_for_the_one_before(anyio_backend: str) -> None:
    gate, log = anyio.Event(), []

    async def sample(prompt: Prompt, version: int) -> Group:
        await gate.wait()
        return group(prompt.ordinal, 1.0)

    evaluation = Evaluation([Prompt(0, 0, 0, None)], sample, FakeRefit(), lambda *_: log.append("reported"))  # type: ignore[arg-type]

    async def begin_next() -> None:
        await evaluation.start(tasks)
        log.append("begun")

    async with anyio.create_task_group() as tasks:
        await evaluation.start(tasks)
        tasks.start_soon(begin_next)
        await anyio.wait_all_tasks_blocked()
        assert log == []
        gate.set()
    assert (log[0], sorted(log)) == ("reported", ["begun", "reported", "reported"])


@pytest.mark.anyio
async def test_prompts_without_room_are_left_out(anyio_backend: str) -> None:
    found: list[float] = []

    async def sample(prompt: Prompt, version: int) -> Group:
        if prompt.ordinal == 1:
            raise PromptTooLong("17 tokens")
        return group(prompt.ordinal, 1.0)

    prompts = [Prompt(ordinal, ordinal, 0, None) for ordinal in range(3)]
    evaluation = Evaluation(prompts, sample, FakeRefit(), lambda _, m: found.append(m["eval/prompts"]))  # type: ignore[arg-type]
    async with anyio.create_task_group() as tasks:
        await evaluation.start(tasks)
    assert found == [2]
