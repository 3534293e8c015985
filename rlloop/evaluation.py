"""Held-out prompts, answered by one policy version while training goes on."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from time import monotonic

import numpy as np
from anyio import TASK_STATUS_IGNORED, Semaphore, create_task_group, get_cancelled_exc_class
from anyio.abc import TaskGroup, TaskStatus
from anyio.lowlevel import checkpoint

from rlloop.environment import PromptTooLong
from rlloop.refit.publisher import Refit
from rlloop.types import Group, Metrics, Prompt

logger = logging.getLogger(__name__)


class Evaluation:
    """One at a time: `sample` answers and scores a prompt with a version, `report` gets what was found of each version."""

    def __init__(
        self,
        prompts: Sequence[Prompt],
        sample: Callable[[Prompt, int], Awaitable[Group]],
        refit: Refit,
        report: Callable[[int, Metrics], None],
    ) -> None:
        self._prompts = prompts
        self._sample = sample
        self._refit = refit
        self._report = report
        self._slot = Semaphore(1)

    async def start(self, tasks: TaskGroup) -> None:
        """Evaluate the newest version in the background, which keeps it loaded; first wait for the evaluation before."""
        await self._slot.acquire()
        await tasks.start(self._evaluate)

    async def _evaluate(self, *, task_status: TaskStatus[None] = TASK_STATUS_IGNORED) -> None:
        started = monotonic()
        try:
            async with self._refit.pin() as version:
                task_status.started()
                groups = await self._answers(version)
            self._report(version, _summarise(groups) | {"time/eval": monotonic() - started})
        finally:
            self._slot.release()

    async def _answers(self, version: int) -> list[Group]:
        groups: list[Group] = []

        async def answer(prompt: Prompt) -> None:
            with suppress(PromptTooLong):  # `eval/prompts` counts those that had room
                groups.append(await self._sample(prompt, version))

        try:
            async with create_task_group() as members:
                for prompt in self._prompts:
                    members.start_soon(answer, prompt)
                    await checkpoint()  # many at once would keep the event loop from all else
        except get_cancelled_exc_class():
            logger.warning("the evaluation of policy version %d is lost: the run's end cut it off", version)
            raise
        return groups


def _summarise(groups: Sequence[Group]) -> Metrics:
    rewards = np.array([reward for group in groups for reward in group.rewards])
    # Answers to one prompt are alike, so prompts are what is drawn independently; some have fewer answers, where one failed.
    off = [np.sum(group.rewards - rewards.mean()) for group in groups if group.rewards]
    nan = float("nan")
    stderr = float(np.sqrt(len(off) / (len(off) - 1)) * np.linalg.norm(off) / len(rewards)) if len(off) > 1 else nan
    lengths = [rollout.loss_mask.sum() for group in groups for rollout in group.rollouts]
    return {
        "eval/reward_mean": float(rewards.mean()) if len(rewards) else nan,
        "eval/reward_stderr": stderr,
        "eval/mean_length": float(np.mean(lengths)) if lengths else nan,
        "eval/prompts": float(len(groups)),
        "eval/failures": float(sum(len(group.failures) for group in groups)),
    }
