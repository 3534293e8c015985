"""Prompts from a dataset, scored by reward functions as TRL takes them.

    pip install 'rlloop[datasets]'
    rlloop grpo --env dataset --env-args '{"path": "questions.jsonl"}' --rewards my_rewards:accuracy,my_rewards:brevity

A row needs the column `prompt`, a string (continued as it stands) or a list of messages (rendered by the chat template). A
reward function is called by keyword with lists of one: `prompts`, `completions` (strings, or lists of one message),
`completion_ids`, and every other column; it returns a list of one float, or of None where it does not apply. It may be
asynchronous, and holds one of `--environment.score-workers` while it waits. The reward is the sum of those that apply, each
times its weight. `trainer_state` is None.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import reprlib
import weakref
from collections.abc import Awaitable, Iterable, Sequence
from typing import Any

from rlloop.environment import MessageEnvironment, Policy, Trajectory, as_written
from rlloop.plugins import load_object
from rlloop.rows import load_rows
from rlloop.types import Message, Reward, Rollout

_RESERVED = ("prompts", "completions", "trainer_state", "log_extra", "log_metric")
"""Arguments of a reward function that are no column."""


class Dataset(MessageEnvironment):
    """`path` is a JSON, CSV or Parquet file, a pattern or a list of them, or what `datasets.load_dataset` takes, with its `name`
    and `split`; `weights` are 1 if not given."""

    def __init__(
        self,
        path: str | list[str],
        rewards: Sequence[str],
        weights: Sequence[float] | None = None,
        name: str | None = None,
        split: str = "train",
    ) -> None:
        self._functions = [load_object(function) for function in rewards]
        short = [path.rpartition(":")[2] for path in rewards]
        self._names = short if len(set(short)) == len(short) else list(rewards)
        self._weights = [1.0] * len(rewards) if weights is None else list(weights)
        if len(self._weights) != len(rewards) or not rewards:
            raise ValueError(
                f"expected a weight for each reward function, got {len(self._weights)} for {list(rewards)}"
            )
        if len(set(rewards)) < len(rewards):
            raise ValueError(f"expected each reward function once, got {list(rewards)}; weights make one count more")
        self._rows = load_rows(path, name, split)
        if "prompt" not in self._rows.column_names:
            raise ValueError(f"{path}: expected a column prompt, got {', '.join(self._rows.column_names)}")
        if len(self._rows) and not isinstance(first := self._rows[0]["prompt"], (str, list)):
            raise ValueError(f"{path}: expected prompts of text or of messages, got {first!r}")
        if taken := [name for name in self._rows.column_names if name in _RESERVED]:
            raise ValueError(
                f"{path}: expected no column {taken[0]}, which reward functions get of each answer; rename it"
            )
        self._runner = asyncio.Runner()  # one loop for all calls: a client that is kept belongs to that of its first
        weakref.finalize(self, self._runner.close)

    def __len__(self) -> int:
        return len(self._rows)

    def task(self, index: int) -> dict[str, Any]:
        """The row."""
        return dict(self._rows[index])

    def messages(self, task: dict[str, Any]) -> list[Message]:
        """Those of the row's prompt."""
        return as_written(task["prompt"])

    async def rollout(self, task: dict[str, Any], policy: Policy) -> Rollout:
        """One answer."""
        if not isinstance(task["prompt"], str):
            return await super().rollout(task, policy)
        trajectory = Trajectory()
        trajectory.observe(policy.tokenizer(task["prompt"])["input_ids"])
        completion = await policy.generate(trajectory.tokens)
        trajectory.act(completion)
        text = policy.tokenizer.decode(completion.tokens.tolist(), skip_special_tokens=True)
        return trajectory.finish(text, completion.finish_reason)

    def score(self, task: dict[str, Any], rollout: Rollout) -> Reward:
        """The weighted sum of the reward functions, and each. Raises ValueError when none applies: then there is no reward."""
        is_chat = not isinstance(task["prompt"], str)
        arguments = {
            "prompts": [task["prompt"]],
            "completions": [[{"role": "assistant", "content": rollout.text}] if is_chat else rollout.text],
            "completion_ids": [rollout.tokens[rollout.loss_mask].tolist()],
            **{name: [value] for name, value in task.items() if name not in ("prompt", "completion", "completion_ids")},
            "trainer_state": None,
            "log_extra": _ignore,
            "log_metric": _ignore,
        }
        found = [self._call(function, arguments) for function in self._functions]
        if all(reward is None for reward in found):
            raise ValueError("every reward function returned None: expected a number from one at least")
        total = math.fsum(
            weight * reward for weight, reward in zip(self._weights, found, strict=True) if reward is not None
        )
        named = zip(self._names, found, strict=True)
        return Reward(total, {name: reward for name, reward in named if reward is not None})

    def _call(self, function: Any, arguments: dict[str, Any]) -> float | None:
        answer = function(**arguments)
        if inspect.isawaitable(answer):
            answer = self._runner.run(_awaited(answer))
        rewards = list(answer) if isinstance(answer, Iterable) else []
        if len(rewards) != 1:
            name, got = getattr(function, "__name__", function), reprlib.repr(answer)
            raise ValueError(f"expected a list of one reward for one completion from {name}, got {got}")
        return None if rewards[0] is None else float(rewards[0])


async def _awaited(answer: Awaitable[Any]) -> Any:
    return await answer


def _ignore(*args: Any, **kwargs: Any) -> None:
    pass
