"""Every dataset of reasoning-gym (https://github.com/open-thought/reasoning-gym), generated offline.

    pip install 'rlloop[reasoning-gym]'
    rlloop grpo --env reasoning_gym --env-args '{"dataset": "gsm_symbolic", "size": 500, "difficulty": 1.0}'

The reward is the dataset's own `score_answer`, in [0, 1], of the final answer alone, since the default one gives
partial credit to any text that merely contains the right answer.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
from typing import Any

from rlloop.environment import MessageEnvironment
from rlloop.types import Message, Rollout

try:
    from reasoning_gym.factory import DATASETS, create_dataset
    from reasoning_gym.utils import extract_answer
except ModuleNotFoundError as error:
    raise ImportError("reasoning-gym is not installed: pip install 'rlloop[reasoning-gym]'") from error

# Some scorers (boxnet, coin_flip, game_of_life, prime_factorization) raise on an answer that they cannot read. It is
# wrong: as a failure it would be dropped, and the policy would never learn that.
_UNREADABLE = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
_BY_HASH = ("isomorphic_strings", "knight_swap", "polynomial_multiplication", "ransom_note", "word_ladder")
"""Datasets whose generators go through sets of strings, which Python orders otherwise in each process."""


class ReasoningGym(MessageEnvironment):
    """`size` tasks of a dataset; `params` are the settings of its generator, such as its difficulty."""

    def __init__(self, dataset: str, size: int = 1000, seed: int = 0, **params: Any) -> None:
        if dataset not in DATASETS:
            close = difflib.get_close_matches(dataset, DATASETS, n=3)
            hint = f" (did you mean {' or '.join(close)}?)" if close else ""
            raise ValueError(f"reasoning-gym has no dataset {dataset!r}{hint}; it has {', '.join(sorted(DATASETS))}")
        known = [setting.name for setting in dataclasses.fields(DATASETS[dataset][1])]
        if unknown := sorted(set(params) - set(known)):
            raise ValueError(f"dataset {dataset} has no setting {', '.join(unknown)}; it has {', '.join(known)}")
        if dataset in _BY_HASH and os.environ.get("PYTHONHASHSEED", "random") == "random":
            raise ValueError(
                f"dataset {dataset} makes other tasks in each process, so that no run could be resumed; set PYTHONHASHSEED=0"
            )
        self._dataset = create_dataset(dataset, size=size, seed=seed, **params)

    def __len__(self) -> int:
        return len(self._dataset)

    def task(self, index: int) -> dict[str, Any]:
        """`{"question": ..., "answer": ..., "metadata": ...}`"""
        item: dict[str, Any] = self._dataset[index]
        return item

    def messages(self, task: dict[str, Any]) -> list[Message]:
        """The question, and how to mark the answer."""
        return [{"role": "user", "content": f"{task['question']}\n\nGive the final answer as <answer>...</answer>."}]

    def score(self, task: dict[str, Any], rollout: Rollout) -> float:
        """What is within the last answer tags, or else on the last line, as the dataset scores it; nothing scores 0."""
        answer = extract_answer(rollout.text)
        if answer is None:
            answer = rollout.text.strip().rpartition("\n")[2]
        if not answer:
            return 0.0
        try:
            return float(self._dataset.score_answer(answer, task))
        except _UNREADABLE:
            return 0.0
