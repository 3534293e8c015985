"""One prompt -> one scored group: all members roll out and are scored at the same time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import anyio
from anyio import TaskHandle

from rlloop.config import RunSettings, SamplingSettings
from rlloop.engine import Engine
from rlloop.environment import Environment, PromptTooLong
from rlloop.errors import BadEnvironmentError, RlloopError
from rlloop.events import Events
from rlloop.ledger import derive_seed
from rlloop.rewards import Scorer, explain
from rlloop.types import Completion, Failure, GenerationRequest, Group, InFlight, Prompt, Rollout


@dataclass(slots=True)
class EnginePolicy:
    """See `rlloop.environment.Policy`. The seed of turn t derives from (`seed`, `member`, t)."""

    engine: Engine
    tokenizer: Any
    policy_version: int
    sampling: SamplingSettings
    max_model_len: int
    seed: int
    """The prompt's."""
    member: int
    """Of the group, from 0."""
    group: int
    """The prompt's ordinal."""
    in_flight: InFlight
    num_turns: int = field(default=0, init=False)

    async def generate(
        self, tokens: Sequence[int], *, max_tokens: int | None = None, stop: Sequence[str] = ()
    ) -> Completion:
        """See `Policy.generate`. Raises ValueError when a later turn has no room."""
        room = self.max_model_len - len(tokens)
        if room < 1:
            message = f"{len(tokens)} tokens leave no room for an answer within {self.max_model_len}"
            raise ValueError(message) if self.num_turns else PromptTooLong(message)
        request = GenerationRequest(
            tokens=tuple(tokens),
            policy_version=self.policy_version,
            max_tokens=min(room, max_tokens or self.sampling.max_tokens),
            temperature=self.sampling.temperature,
            seed=derive_seed(self.seed, self.member, self.num_turns),
            stop=tuple(stop),
            in_flight=self.in_flight,
            group=self.group,
        )
        self.num_turns += 1
        [completion] = await self.engine.generate(request)
        return completion


def make_task(environment: Environment, index: int) -> Any:
    """The environment's task, or, where its code raises, the Failure that all rollouts of it are."""
    try:
        return environment.task(index)
    except RlloopError:
        raise
    except (Exception, SystemExit) as error:
        return Failure("error", "task", explain(error))


async def sample_group(
    prompt: Prompt,
    *,
    environment: Environment,
    scorer: Scorer,
    engine: Engine,
    tokenizer: Any,
    policy_version: int,
    settings: RunSettings,
    in_flight: InFlight = "finish",
    events: Events,
    rolled_out: Callable[[], None] = lambda: None,
) -> Group:
    """Sample and score `settings.group_size` rollouts of the prompt with one policy version, or from that on.

    A member whose environment or reward raises, or takes too long, becomes one of `Group.failures`, as all do whose task is a
    Failure. What says nothing about the policy is raised: EngineError and every other RlloopError, PromptTooLong among them. Each
    member samples with seeds of its own. `rolled_out` is called when the last rollout has ended, before all are scored. Spans:
    `rollout` until then, `score` from when the first is scored.
    """
    scored: dict[int, tuple[Rollout, float]] = {}
    failures: dict[int, Failure] = {}
    errors: list[RlloopError] = []

    async def run(member: int) -> None:
        policy = EnginePolicy(
            engine=engine,
            tokenizer=tokenizer,
            policy_version=policy_version,
            sampling=settings.sampling,
            max_model_len=settings.engine.max_model_len,
            seed=prompt.seed,
            member=member,
            group=prompt.ordinal,
            in_flight=in_flight,
        )
        try:
            task = _own_copy(prompt.task)
            try:
                outcome = task if isinstance(task, Failure) else await _roll_out(environment, task, policy)
            finally:
                progress.rolled_out(member)
            if isinstance(outcome, Rollout):
                progress.scores()
                reward = await scorer.score(task, outcome)
                if not isinstance(reward, Failure):
                    scored[member] = outcome, reward
                    return
                outcome = reward
            failures[member] = outcome
        except RlloopError as error:
            errors.append(error)
            members.cancel_scope.cancel()

    timeout = settings.environment.rollout_timeout
    with _Progress(events, policy_version, prompt.ordinal, rolled_out) as progress:
        async with anyio.create_task_group() as members:
            for member in range(settings.group_size):
                progress.rolling[member] = members.start_soon(run, member)
            with anyio.move_on_after(timeout):  # one timer for all: one for each is a tenth of what the loop costs
                await progress.all_rolled_out.wait()
            for member, task in list(progress.rolling.items()):
                failures[member] = Failure("timeout", "rollout", f"not done after {timeout:g} s")
                task.cancel()
    if errors:
        # One member cannot be asked because none can; any other error is news.
        raise min(errors, key=lambda error: isinstance(error, PromptTooLong))
    return Group(
        prompt=prompt,
        rollouts=tuple(scored[member][0] for member in sorted(scored)),
        rewards=tuple(scored[member][1] for member in sorted(scored)),
        policy_version=policy_version,
        failures=tuple(failures[member] for member in sorted(failures)),
    )


def _own_copy(task: Any) -> Any:
    """For one member, which may keep what it does in it."""
    try:
        return deepcopy(task)
    except Exception as error:
        raise BadEnvironmentError(f"a task must be such that it can be copied and pickled, but {error}") from error


async def _roll_out(environment: Environment, task: Any, policy: EnginePolicy) -> Rollout | Failure:
    try:
        rollout = await environment.rollout(task, policy)
        _check(rollout)
    except anyio.get_cancelled_exc_class() as error:
        if anyio.current_effective_deadline() == -math.inf:
            raise
        return Failure("error", "rollout", explain(error))  # not this rollout was cancelled, but what it waited for
    except (Exception, SystemExit) as error:
        cause = _leaf(error)
        if isinstance(cause, RlloopError):
            raise cause from None
        return Failure("error", "rollout", explain(cause))
    return rollout


def _check(rollout: Any) -> None:
    """Raises BadEnvironmentError where nothing can be trained on what an environment returned."""
    if not isinstance(rollout, Rollout):
        raise BadEnvironmentError(f"an environment's rollout() must return a Rollout, but returned {rollout!r}")
    names = ("tokens", "loss_mask", "rollout_logprobs", "token_versions")
    lengths = {name: len(array) for name in names if (array := getattr(rollout, name)) is not None}
    if len({*lengths.values()}) > 1:
        raise BadEnvironmentError(f"a Rollout's arrays must be equally long, but an environment returned {lengths}")
    kind = str(getattr(rollout.loss_mask, "dtype", type(rollout.loss_mask).__name__))
    if kind != "bool":
        raise BadEnvironmentError(f"a Rollout's loss_mask must be an array of bool, but an environment returned {kind}")
    if lengths["tokens"] and rollout.loss_mask[0]:
        raise BadEnvironmentError(
            "a Rollout's first token cannot carry loss, for nothing predicts it; its loss_mask says so"
        )
    for name, value in rollout.metrics.items():
        try:
            math.isnan(value)  # what can be averaged; a string cannot
        except TypeError as error:
            message = f"a Rollout's metrics must be numbers, but an environment returned {name} {value!r}"
            raise BadEnvironmentError(message) from error


def _leaf(error: BaseException) -> BaseException:
    """The error that says most: of an environment's own task groups the first RlloopError, else the first of all."""
    if not isinstance(error, ExceptionGroup):
        return error
    leaves = [_leaf(inner) for inner in error.exceptions]
    return next((leaf for leaf in leaves if isinstance(leaf, RlloopError)), leaves[0])


class _Progress:
    """Which members of a group still roll out, and the spans of its two stages, which overlap."""

    def __init__(self, events: Events, policy_version: int, ordinal: int, rolled_out: Callable[[], None]) -> None:
        self.rolling: dict[int, TaskHandle[None, None]] = {}
        self.all_rolled_out = anyio.Event()
        self._say_rolled_out = rolled_out
        self._events = events
        self._fields: dict[str, Any] = {"policy_version": policy_version, "ordinal": ordinal}
        self._began = {"rollout": events.clock()}

    def __enter__(self) -> _Progress:
        return self

    def rolled_out(self, member: int) -> None:
        """The member needs the engine no more, however its rollout has ended."""
        del self.rolling[member]
        if not self.rolling:
            self._end("rollout", "engine")
            self._say_rolled_out()
            self.all_rolled_out.set()

    def scores(self) -> None:
        """A member is about to be scored."""
        self._began.setdefault("score", self._events.clock())

    def __exit__(self, *_: object) -> None:
        self._end("rollout", "engine")
        self._end("score", "rewards")

    def _end(self, name: str, resource: str) -> None:
        if (began := self._began.pop(name, None)) is not None:
            self._events.record(name, resource, began, self._events.clock(), **self._fields)
