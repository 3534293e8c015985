"""Environments: what the policy is asked, what it may do, and what that is worth.

An environment is any class with the four methods of `Environment`. Most derive from `MessageEnvironment`, which turns
chat messages into tokens; one that works on tokens collects them in a `Trajectory`. `load_environment` finds both.
"""

from __future__ import annotations

import inspect
import pickle
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from importlib.metadata import entry_points
from typing import Any, Protocol

import numpy as np

from rlloop.errors import BadEnvironmentError, ConfigError, RlloopError
from rlloop.plugins import is_path, load_object, suggest
from rlloop.types import Completion, Message, Rollout

ENTRY_POINTS = "rlloop.environments"


class PromptTooLong(RlloopError):  # an outcome of one prompt, which is dropped and counted, not an error of the run
    """A prompt leaves no room for an answer within the engine's `max_model_len`; it is never truncated."""


class Policy(Protocol):
    """One rollout's access to the engine: to the policy version that it began with, or those after it, and with its own seeds."""

    @property
    def tokenizer(self) -> Any:
        """The model's Hugging Face tokenizer."""
        ...

    @property
    def max_model_len(self) -> int:
        """Most tokens of the whole sequence."""
        ...

    async def generate(
        self, tokens: Sequence[int], *, max_tokens: int | None = None, stop: Sequence[str] = ()
    ) -> Completion:
        """Sample one completion of the tokens; `max_tokens` defaults to the run's setting, and is cut to what fits.

        Raises PromptTooLong when the first tokens of a rollout leave no room at all.
        """
        ...


class Environment(Protocol):
    """A set of tasks, how the policy meets one, and its score."""

    def __len__(self) -> int:
        """Tasks of one epoch."""
        ...

    def task(self, index: int) -> Any:
        """Task `index`, the same each time; picklable, since scoring runs in another process. If it raises, its rollouts fail."""
        ...

    async def rollout(self, task: Any, policy: Policy) -> Rollout:
        """Let the policy act until the task ends. An exception makes it a counted failure, never a zero reward.

        Each rollout has a copy of the task, which `score` gets as it was left. `self` is that of all rollouts that run.
        """
        ...

    def score(self, task: Any, rollout: Rollout) -> float:
        """The reward; a `rlloop.types.Reward` says what it is made of. Runs in a worker process that is killed when it takes too
        long."""
        ...


class Trajectory:
    """Collects a rollout token by token: the trainer sees what the policy sampled, never text tokenised anew."""

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._loss_mask: list[bool] = []
        self._logprobs: list[float] = []
        self._completions: list[Completion] = []

    @property
    def tokens(self) -> tuple[int, ...]:
        """All so far: what the policy continues."""
        return tuple(self._tokens)

    @property
    def num_turns(self) -> int:
        """How often the policy acted."""
        return len(self._completions)

    def observe(self, tokens: Sequence[int]) -> None:
        """Append what the policy is told: the prompt, a tool's answer. Carries no loss."""
        self._tokens += map(int, tokens)
        self._loss_mask += [False] * len(tokens)
        self._logprobs += [0.0] * len(tokens)

    def act(self, completion: Completion) -> None:
        """Append what the policy sampled after `tokens`."""
        if len(completion.tokens) != len(completion.logprobs):
            raise ValueError(f"{len(completion.tokens)} tokens were sampled with {len(completion.logprobs)} logprobs")
        self._tokens += completion.tokens.tolist()
        self._loss_mask += [True] * len(completion.tokens)
        self._logprobs += completion.logprobs.tolist()
        self._completions.append(completion)

    def finish(self, text: str, finish_reason: str, metrics: Mapping[str, float] | None = None) -> Rollout:
        """The rollout; `text` is what the policy wrote last. Raises ValueError when the policy was never asked."""
        if not self._completions:
            raise ValueError("the rollout ended before the policy acted")
        tokens = np.array(self._tokens, dtype=np.int32)
        loss_mask = np.array(self._loss_mask, dtype=np.bool_)
        assert np.array_equal(tokens[loss_mask], np.concatenate([c.tokens for c in self._completions]))
        oldest = min(c.policy_version for c in self._completions)
        versions = None
        if any(c.token_versions is not None or c.policy_version != oldest for c in self._completions):
            versions = np.full(len(tokens), oldest, np.int32)
            versions[loss_mask] = np.concatenate([c.versions for c in self._completions])
        return Rollout(
            tokens=tokens,
            loss_mask=loss_mask,
            rollout_logprobs=np.array(self._logprobs, dtype=np.float32),
            policy_version=oldest,
            finish_reason=finish_reason,
            num_turns=len(self._completions),
            text=text,
            metrics=metrics or {},
            token_versions=versions,
        )


class MessageEnvironment(ABC):
    """An environment in chat messages. For one question and one answer, `__len__`, `task`, `messages` and `score` do.

    For several turns add `reply`. The tokenizer's chat template makes the tokens; sampled turns stay as sampled.
    """

    max_turns: int = 8
    """A conversation ends after this many answers of the policy, if `reply` has not ended it."""

    @abstractmethod
    def __len__(self) -> int:
        """Tasks of one epoch."""

    @abstractmethod
    def task(self, index: int) -> Any:
        """Task `index`, the same each time; picklable."""

    @abstractmethod
    def messages(self, task: Any) -> list[Message]:
        """The chat that the policy answers first, such as `[{"role": "user", "content": "What is 1 + 1?"}]`."""

    @abstractmethod
    def score(self, task: Any, rollout: Rollout) -> float:
        """The reward, usually from `rollout.text`. Runs in another process, so it sees no state that a rollout left."""

    async def reply(self, task: Any, messages: Sequence[Message]) -> Sequence[Message] | None:
        """What the environment says to the chat so far, which the policy's answer ends; None when the task is over."""
        return None

    async def rollout(self, task: Any, policy: Policy) -> Rollout:
        """Alternate between the policy and `reply`.

        Finish reasons: `stop` (`reply` ended it), `max_turns`, `length` (of an answer, or of the whole chat).
        """
        tokenizer, chat, trajectory = policy.tokenizer, list(self.messages(task)), Trajectory()
        trajectory.observe(prompt_tokens(tokenizer, chat))
        while True:
            completion = await policy.generate(trajectory.tokens)
            trajectory.act(completion)
            text = tokenizer.decode(completion.tokens.tolist(), skip_special_tokens=True)
            if completion.finish_reason == "length":
                return trajectory.finish(text, "length")
            reply = await self.reply(task, [*chat, {"role": "assistant", "content": text}])
            if reply is None:
                return trajectory.finish(text, "stop")
            if trajectory.num_turns == self.max_turns:
                return trajectory.finish(text, "max_turns")
            told = reply_tokens(tokenizer, chat, reply, int(completion.tokens[-1]))
            if len(trajectory.tokens) + len(told) >= policy.max_model_len:
                return trajectory.finish(text, "length")
            trajectory.observe(told)
            chat += [{"role": "assistant", "content": text}, *reply]


def as_written(messages: Sequence[Message]) -> list[Message]:
    """Without the keys that datasets fills in with None where other rows have them."""
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


def prompt_tokens(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """The chat as the tokenizer's template writes it, up to where the policy's answer begins."""
    try:
        written = pickle.dumps(list(messages))
    except (TypeError, AttributeError, pickle.PicklingError):
        return _render(tokenizer, messages)
    return list(_rendered(tokenizer, written))


@lru_cache(maxsize=8)  # a group's members ask for the same one after another, and rendering takes 140 us
def _rendered(tokenizer: Any, messages: bytes) -> list[int]:
    return _render(tokenizer, pickle.loads(messages))


def _render(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    encoded = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=True, return_dict=True)
    return list(encoded["input_ids"])


_ANSWER = "<<rlloop-answer>>"


def reply_tokens(tokenizer: Any, messages: Sequence[Message], reply: Sequence[Message], last_token: int) -> list[int]:
    """What stands between an answer to `messages`, sampled up to `last_token`, and the answer to `reply`.

    The template is rendered around a stand-in for the answer, and only what follows that is tokenised. It begins with
    the end of the answer's turn, which is dropped where the policy has sampled it, with what white space is before it. Raises
    BadEnvironmentError when the template does not repeat answers as they are.
    """
    chat = [*messages, {"role": "assistant", "content": _ANSWER}, *reply]
    text: str = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    if text.count(_ANSWER) != 1:
        raise BadEnvironmentError("the chat template does not repeat answers as they are, so there is no second turn")
    after = text.partition(_ANSWER)[2]
    tokens: list[int] = tokenizer.encode(after, add_special_tokens=False)
    for number, token in enumerate(tokens, start=1):
        if token == last_token:
            return tokens[number:]
        if tokenizer.decode([token]).strip():
            break
    return tokens


def load_environment(name: str, args: Mapping[str, Any]) -> Environment:
    """Build the environment `name`: an entry point of the group `rlloop.environments`, or `package.module:Class`.

    The working directory is searched after the installed packages, so `my_env:MyEnv` finds `./my_env.py`. Raises
    BadEnvironmentError, which says what exists, what is wrong with the arguments, or which method is missing.
    """
    make = _find(name)
    _check_arguments(name, make, args)
    try:
        environment = make(**args)
        missing = [m for m in ("__len__", "task", "rollout", "score") if not callable(getattr(environment, m, None))]
        num_tasks = 0 if missing else len(environment)
    except ConfigError as error:
        raise BadEnvironmentError(f"environment {name} cannot be built: {error}") from error
    except Exception as error:
        raise BadEnvironmentError(f"environment {name} cannot be built: {type(error).__name__}: {error}") from error
    if missing:
        raise BadEnvironmentError(f"environment {name} has no {', '.join(missing)}: see rlloop.environment.Environment")
    if num_tasks < 1:
        raise BadEnvironmentError(f"environment {name} has no tasks: its len() is {num_tasks}")
    return environment


def _find(name: str) -> Callable[..., Environment]:
    registered = {entry.name: entry.value for entry in entry_points(group=ENTRY_POINTS)}
    path = registered.get(name, name)
    if not is_path(path):
        raise BadEnvironmentError(
            f"no environment is called {name!r}{suggest(name, registered)}; there are {', '.join(sorted(registered))} "
            "and any package.module:Class"
        )
    try:
        return load_object(path)
    except ConfigError as error:
        raise BadEnvironmentError(f"environment {error}") from error


def _check_arguments(name: str, make: Callable[..., Environment], args: Mapping[str, Any]) -> None:
    signature = inspect.signature(make)
    try:
        signature.bind(**args)
    except TypeError as error:
        unknown = [arg for arg in args if arg not in signature.parameters]
        hint = suggest(unknown[0], signature.parameters) if unknown else ""
        takes = f"it takes {signature}" if signature.parameters else "it takes none"
        raise BadEnvironmentError(f"arguments of environment {name}: {error}{hint}; {takes}") from error
