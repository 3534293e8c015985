import asyncio
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest

from rlloop.config import EngineSettings, EnvironmentSettings, RunSettings, SamplingSettings
from rlloop.environment import Policy, PromptTooLong, Trajectory
from rlloop.errors import BadEnvironmentError, EngineError
from rlloop.events import Events
from rlloop.rollouts import EnginePolicy, make_task, sample_group
from rlloop.tracking import jsonl
from rlloop.types import Completion, Failure, GenerationRequest, Group, Prompt, Rollout


class Engine:
    """Answers with the request's seed as its only token; `fail(request)` may raise."""

    def __init__(self, fail: Callable[[GenerationRequest], None] = lambda request: None) -> None:
        self.requests: list[GenerationRequest] = []
        self._fail = fail

    async def generate(self, request: GenerationRequest) -> list[Completion]:
        self.requests.append(request)
        await anyio.lowlevel.checkpoint()
        self._fail(request)
        assert request.seed is not None
        tokens = np.array([request.seed >> 1], np.int32)
        return [Completion(tokens, np.array([-1], np.float32), request.policy_version, "stop")]


class Environment:
    """Rolls out `num_turns` turns; `instead` is what the first members to begin do."""

    def __init__(self, *instead: str, num_turns: int = 1, prompt_length: int = 3) -> None:
        self._instead = [*instead, *[""] * 100]
        self._num_turns = num_turns
        self._prompt_length = prompt_length
        self.num_begun = 0

    async def rollout(self, task: Any, policy: Policy) -> Rollout:
        instead = self._instead[self.num_begun]
        self.num_begun += 1
        trajectory = Trajectory()
        trajectory.observe([0] * self._prompt_length)
        match instead:
            case "raise":
                raise KeyError("tool")
            case "time out itself":
                raise TimeoutError("tool")
            case "hang":
                await anyio.sleep_forever()
            case "exit":
                sys.exit(2)
            case "wait for what is cancelled":
                asyncio.get_running_loop().call_soon((reply := asyncio.Future[None]()).cancel)
                await reply
            case "be cancelled":
                task = asyncio.current_task()
                assert task is not None
                task.cancel()
                await asyncio.sleep(0)
            case "return None":
                return None  # type: ignore[return-value]
            case "sample twice at once":
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(policy.generate, [1])
                    tasks.start_soon(policy.generate, [2])
        for _ in range(self._num_turns):
            trajectory.act(await policy.generate(trajectory.tokens))
        return trajectory.finish(f"answer {instead}", "stop")

    def __len__(self) -> int:
        return 1

    def task(self, index: int) -> Any:
        return index

    def score(self, task: Any, rollout: Rollout) -> float:
        raise AssertionError("scoring is the scorer's")


class Scores:
    def __init__(self, outcome: float | Failure = 1.0) -> None:
        self._outcome = outcome

    async def score(self, task: Any, rollout: Rollout) -> float | Failure:
        await anyio.sleep(0.05)
        return self._outcome


PROMPT = Prompt(ordinal=5, index=2, seed=77, task="task")


def settings(**environment: float) -> RunSettings:
    return RunSettings(
        group_size=4,
        sampling=SamplingSettings(max_tokens=8, temperature=0.7),
        engine=EngineSettings(max_model_len=16),
        environment=EnvironmentSettings(**environment),
    )


async def sample(
    environment: Environment, engine: Engine | None = None, scores: Scores | None = None, **options: Any
) -> Group:
    return await sample_group(
        options.pop("prompt", PROMPT),
        environment=environment,
        scorer=scores or Scores(),  # type: ignore[arg-type]
        engine=engine or Engine(),  # type: ignore[arg-type]
        tokenizer=None,
        policy_version=3,
        settings=options.pop("settings", settings()),
        events=options.pop("events", Events(None)),
        **options,
    )


@pytest.mark.anyio
async def test_each_member_has_a_task_of_its_own_until_it_is_scored(anyio_backend: str) -> None:
    class Counting(Environment):
        async def rollout(self, task: Any, policy: Policy) -> Rollout:
            task["turns"] += 1
            return await super().rollout(task, policy)

    class Turns(Scores):
        async def score(self, task: Any, rollout: Rollout) -> float | Failure:
            return float(task["turns"])

    task = {"turns": 0}
    group = await sample(Counting(), scores=Turns(), prompt=replace(PROMPT, task=task))
    assert set(group.rewards) == {1.0}
    assert task == {"turns": 0}


@pytest.mark.anyio
async def test_a_task_that_cannot_be_copied_ends_the_run_and_says_so(anyio_backend: str) -> None:
    with pytest.raises(
        BadEnvironmentError, match=r"a task must be such that it can be copied and pickled, but cannot pickle"
    ):
        await sample(Environment(), prompt=replace(PROMPT, task=threading.Lock()))


@pytest.mark.anyio
async def test_a_group_is_scored_and_asked_as_the_settings_say() -> None:
    engine = Engine()
    group = await sample(Environment(), engine, Scores(0.25))
    assert (group.prompt, group.policy_version, group.failures) == (PROMPT, 3, ())
    assert group.rewards == (0.25,) * 4
    for request in engine.requests:
        assert (request.tokens, request.policy_version, request.n) == ((0, 0, 0), 3, 1)
        assert (request.max_tokens, request.temperature) == (8, 0.7)
        assert request.group == PROMPT.ordinal


@pytest.mark.anyio
async def test_seeds_depend_on_prompt_and_member_and_turn_alone() -> None:
    def tokens(group: Group) -> list[list[int]]:
        return [rollout.tokens.tolist() for rollout in group.rollouts]

    first = await sample(Environment(num_turns=2))
    again = await sample(Environment(num_turns=2))
    other = await sample(Environment(num_turns=2), prompt=Prompt(ordinal=6, index=2, seed=78, task="task"))
    assert tokens(first) == tokens(again)
    sampled = [token for row in tokens(first) + tokens(other) for token in row[3:]]
    assert len(set(sampled)) == len(sampled) == 16
    # Two members are the same when the others fail (which ones do, trio decides at random).
    fewer = await sample(Environment("raise", "raise", num_turns=2))
    in_order = iter(tokens(first))
    assert len(fewer.rollouts) == 2
    assert all(row in in_order for row in tokens(fewer))


@pytest.mark.anyio
async def test_an_environment_that_fails_gives_failures() -> None:
    environment = Environment("raise", "hang", "time out itself")
    with anyio.fail_after(1.1):
        group = await sample(environment, settings=settings(rollout_timeout=0.1))
    assert [rollout.text for rollout in group.rollouts] == ["answer "]
    assert {failure.stage for failure in group.failures} == {"rollout"}
    raised, timed_out_itself, timed_out = sorted((failure.kind, failure.message) for failure in group.failures)
    assert timed_out == ("timeout", "not done after 0.1 s")
    assert raised[0] == timed_out_itself[0] == "error"
    assert raised[1].startswith("KeyError: 'tool' (test_rollouts.py:")
    assert timed_out_itself[1].startswith("TimeoutError: tool (test_rollouts.py:")


@pytest.mark.anyio
async def test_a_rollout_that_exits_is_a_failure(anyio_backend: str) -> None:
    group = await sample(Environment("exit"))
    assert [(failure.stage, failure.message[:13]) for failure in group.failures] == [("rollout", "SystemExit: 2")]
    assert len(group.rollouts) == 3


@pytest.mark.parametrize("instead", ["wait for what is cancelled", "be cancelled"])
def test_what_is_cancelled_inside_a_rollout_costs_that_rollout(instead: str) -> None:
    """As a pending reply whose connection has closed. On trio nothing is cancelled but by scopes."""
    group = anyio.run(partial(sample, Environment(instead)))
    assert [(failure.stage, failure.message[:14]) for failure in group.failures] == [("rollout", "CancelledError")]
    assert len(group.rollouts) == 3


@pytest.mark.anyio
async def test_a_group_that_is_cancelled_ends_and_has_no_failures(anyio_backend: str) -> None:
    environment = Environment("hang", "hang", "hang", "hang")
    with anyio.move_on_after(0.05) as scope:
        await sample(environment)
    assert environment.num_begun == 4
    assert scope.cancelled_caught


def test_a_group_is_cancelled_by_asyncio_alone() -> None:
    async def run() -> None:
        task = asyncio.create_task(sample(Environment("hang", "hang", "hang", "hang")))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())


@pytest.mark.anyio
@pytest.mark.parametrize("kind", [ValueError, SystemExit])
async def test_a_task_that_cannot_be_made_is_a_failure_of_all_its_rollouts(kind: type[BaseException]) -> None:
    class Corrupt(Environment):
        def task(self, index: int) -> Any:
            raise kind(f"row {index} is corrupt")

    task = make_task(Corrupt(), 55)
    group = await sample(Corrupt(), prompt=replace(PROMPT, task=task))
    assert group.rollouts == ()
    [failure] = {*group.failures}
    assert len(group.failures) == 4
    assert (failure.kind, failure.stage) == ("error", "task")
    assert failure.message.startswith(f"{kind.__name__}: row 55 is corrupt (test_rollouts.py:")


@pytest.mark.anyio
async def test_a_reward_that_fails_gives_failures() -> None:
    failure = Failure("timeout", "score", "too slow")
    group = await sample(Environment(), scores=Scores(failure))
    assert (group.rollouts, group.failures) == ((), (failure,) * 4)


@pytest.mark.anyio
@pytest.mark.parametrize("instead", ["", "sample twice at once"])
async def test_an_engine_error_is_never_a_failure(instead: str) -> None:
    def die(request: GenerationRequest) -> None:
        raise EngineError("the engine died")

    with anyio.fail_after(2), pytest.raises(EngineError, match="the engine died"):
        await sample(Environment(instead, "hang"), Engine(die))


@pytest.mark.anyio
async def test_a_rollout_that_is_none_breaks_the_contract() -> None:
    with pytest.raises(BadEnvironmentError, match="must return a Rollout, but returned None"):
        await sample(Environment("return None"))


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda good: {"tokens": good.tokens[1:]}, r"must be equally long, but .*'tokens': \d+, 'loss_mask': \d+"),
        (lambda good: {"rollout_logprobs": good.rollout_logprobs[1:]}, "must be equally long"),
        (lambda good: {"token_versions": np.zeros(2, np.int32)}, "must be equally long"),
        (lambda good: {"loss_mask": good.loss_mask | True}, "first token cannot carry loss"),
        (lambda good: {"loss_mask": good.loss_mask.astype(np.int64)}, "loss_mask must be an array of bool, .* int64"),
        (lambda good: {"loss_mask": good.loss_mask.tolist()}, "loss_mask must be an array of bool, .* list"),
        (lambda good: {"metrics": {"won": None}}, "metrics must be numbers, but an environment returned won None"),
        (lambda good: {"metrics": {"won": "1"}}, "metrics must be numbers, but an environment returned won '1'"),
    ],
)
async def test_a_rollout_that_cannot_be_trained_breaks_the_contract(change: Any, message: str) -> None:
    class Changed(Environment):
        async def rollout(self, task: Any, policy: Policy) -> Rollout:
            good = await super().rollout(task, policy)
            return replace(good, **change(good))

    with pytest.raises(BadEnvironmentError, match=message):
        await sample(Changed())


@pytest.mark.anyio
@pytest.mark.parametrize(("length", "room"), [(9, 7), (15, 1), (16, None), (17, None)])
async def test_a_prompt_without_room_is_not_asked(length: int, room: int | None) -> None:
    engine, environment = Engine(), Environment(prompt_length=length)
    if room is None:
        with pytest.raises(PromptTooLong, match=f"{length} tokens leave no room"):
            await sample(environment, engine)
        assert not engine.requests
    else:
        group = await sample(environment, engine)
        assert len(group.rollouts) == 4
        assert {request.max_tokens for request in engine.requests} == {room}


@pytest.mark.anyio
async def test_a_later_turn_without_room_fails_that_rollout() -> None:
    group = await sample(Environment(num_turns=2, prompt_length=15))
    assert len(group.failures) == 4
    assert group.failures[0].message.startswith("ValueError: 16 tokens leave no room")


@pytest.mark.anyio
async def test_what_ends_the_run_comes_before_a_long_prompt() -> None:
    engine = Engine()

    class Mixed(Environment):
        async def rollout(self, task: Any, policy: Policy) -> Rollout:
            self.num_begun += 1
            if self.num_begun == 4:
                raise EngineError("the engine died")
            raise PromptTooLong("17 tokens")

    with pytest.raises(EngineError, match="the engine died"):
        await sample(Mixed(), engine)


@pytest.mark.anyio
async def test_the_spans_of_a_group_overlap(anyio_backend: str, tmp_path: Path) -> None:
    events = Events(tmp_path / "events.jsonl")
    await sample(Environment("", "raise", "hang"), settings=settings(rollout_timeout=0.2), events=events)
    events.close()
    rollout, score = jsonl.read(tmp_path / "events.jsonl")
    assert [(span["name"], span["resource"]) for span in (rollout, score)] == [
        ("rollout", "engine"),
        ("score", "rewards"),
    ]
    assert (rollout["policy_version"], rollout["fields"]) == (3, {"ordinal": 5})
    assert (score["policy_version"], score["fields"]) == (3, {"ordinal": 5})
    assert rollout["start"] <= score["start"] < score["start"] + 0.05 < rollout["end"] <= score["end"]


@pytest.mark.anyio
@pytest.mark.parametrize("last", ["", "hang"])
async def test_who_waits_for_the_rollouts_does_not_wait_for_their_scores(last: str, anyio_backend: str) -> None:
    """And waits for one that is timed out until it has let go of the engine."""
    log: list[str] = []

    class Logged(Environment):
        async def rollout(self, task: Any, policy: Policy) -> Rollout:
            try:
                return await super().rollout(task, policy)
            finally:
                log.append("rollout")

    class LoggedScores(Scores):
        async def score(self, task: Any, rollout: Rollout) -> float | Failure:
            await anyio.sleep(0.3)
            log.append("score")
            return 1.0

    environment = Logged("raise", "", "", last)
    await sample(
        environment,
        scores=LoggedScores(),
        settings=settings(rollout_timeout=0.1),
        rolled_out=lambda: log.append("rolled out"),
    )
    assert log == ["rollout"] * 4 + ["rolled out"] + ["score"] * (2 if last else 3)


@pytest.mark.anyio
async def test_a_policy_passes_on_what_the_environment_asks() -> None:
    engine = Engine()
    policy = EnginePolicy(
        engine, None, 1, SamplingSettings(max_tokens=8), 16, seed=1, member=0, group=5, in_flight="hop"
    )  # type: ignore[arg-type]
    await policy.generate([1, 2], max_tokens=3, stop=["\n"])
    await policy.generate([1, 2])
    first, second = engine.requests
    assert (first.max_tokens, first.stop, second.max_tokens, second.stop) == (3, ("\n",), 8, ())
    assert first.seed != second.seed
    assert (first.in_flight, second.in_flight) == ("hop", "hop")
    assert (first.group, second.group) == (5, 5), "so that one of several engines gets both"


def test_a_reward_stays_with_its_rollout_however_long_it_takes() -> None:
    class LastIsFirst(Scores):
        num_begun = 0

        async def score(self, task: Any, rollout: Rollout) -> float | Failure:
            self.num_begun += 1
            await anyio.sleep(0.2 - 0.04 * self.num_begun)
            return float(rollout.tokens[-1])

    async def run() -> Group:
        return await sample(Environment(), scores=LastIsFirst())

    group = anyio.run(run)  # on asyncio members begin in order
    assert group.rewards == tuple(float(rollout.tokens[-1]) for rollout in group.rollouts)
    assert len(set(group.rewards)) == 4


@pytest.mark.anyio
async def test_rollouts_are_asked_for_as_the_run_wants_them_in_flight(anyio_backend: str) -> None:
    engine = Engine()
    await sample(Environment(), engine, in_flight="hop")
    assert {request.in_flight for request in engine.requests} == {"hop"}
