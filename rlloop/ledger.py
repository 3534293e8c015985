"""What became of each prompt, so that a resumed run trains every prompt exactly once per epoch.

A data loader's cursor advances when a prompt is drawn, not when it is trained; a resume from one loses what was in
flight, which is biased to long rollouts. The ledger counts what is *done* instead:

    next() ──▶ in flight ──▶ trained
                         └─▶ dropped (stale, failed, filtered, too_long; curriculum: passed over by next())

An *ordinal* counts prompts over the whole run: its epoch is ordinal // num_tasks, and its task is at place
ordinal % num_tasks of the epoch's seeded permutation. Saved are the low-water mark, below which everything is done,
and the few done ordinals above it. In-flight ordinals are not saved: after a resume they are admitted again, in order.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

import numpy as np

from rlloop.config import CurriculumSettings
from rlloop.errors import RunDirectoryError

DropReason = Literal["stale", "failed", "filtered", "too_long", "curriculum"]


def derive_seed(*parts: int) -> int:
    """A seed of 32 bits from numbers >= 0; the same on every machine, whatever else has been sampled."""
    # A tenth of the time that np.random.SeedSequence takes: at 10^5 samples in flight that shows.
    digest = hashlib.blake2b(":".join(map(str, parts)).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")


class Ledger:
    """Hands out the run's prompts in order, and records what became of each.

    `fingerprint` identifies the environment's tasks; see `fingerprint()`. With a curriculum, tasks whose pass rate is out of its
    bounds are passed over, most of the time.
    """

    def __init__(
        self, num_tasks: int, seed: int, fingerprint: str, curriculum: CurriculumSettings | None = None
    ) -> None:
        if num_tasks < 1:
            raise ValueError(f"num_tasks must be at least 1, got {num_tasks}")
        self.num_tasks = num_tasks
        self.seed = seed
        self.fingerprint = fingerprint
        self.low_water = 0
        """Every ordinal below is done."""
        self.counts: dict[str, int] = dict.fromkeys(("trained", *get_args(DropReason)), 0)
        """Prompts by what became of them, over the whole run."""
        self._step = 0
        self._next = 0  # every ordinal from here on is either done (before a resume) or has never been handed out
        self._done: set[int] = set()  # at or above low_water
        self._in_flight: set[int] = set()
        self._order: tuple[int, np.ndarray[Any, np.dtype[np.int64]]] | None = None
        self._curriculum = curriculum or CurriculumSettings()
        self._pass_rates: dict[int, tuple[int, float]] = {}
        """Task -> the last epoch in which it was answered, and how; kept where there is a curriculum."""

    @property
    def num_in_flight(self) -> int:
        """Prompts that were handed out and are not done."""
        return len(self._in_flight)

    def next(self) -> tuple[int, int, int]:
        """The next prompt: (ordinal, index of the task, seed in [0, 2^31))."""
        while True:
            self._next = max(self._next, self.low_water)  # what was done below it is not in `_done` any more
            while self._next in self._done:
                self._next += 1
            ordinal = self._next
            self._next += 1
            self._in_flight.add(ordinal)
            index, seed = self._index(ordinal), derive_seed(self.seed, ordinal) >> 1
            if self._is_wanted(ordinal, index, seed):
                return ordinal, index, seed
            self.dropped(ordinal, "curriculum")

    def answered(self, ordinal: int, index: int, pass_rate: float) -> None:
        """The mean reward of the group that answered this prompt, of this task."""
        epoch = ordinal // self.num_tasks
        if self._curriculum.keep < 1 and epoch >= self._pass_rates.get(index, (0, 0.0))[0]:  # not of a straggler
            self._pass_rates[index] = epoch, pass_rate

    def trained(self, ordinals: Iterable[int], step: int) -> None:
        """These prompts were trained on in this optimizer step.

        Raises ValueError, and records nothing, if one is not in flight or if the step is older than the last.
        """
        ordinals = list(ordinals)
        if step < self._step:
            raise ValueError(f"step {step} is recorded after step {self._step}")
        if len(set(ordinals)) != len(ordinals):
            raise ValueError(f"step {step} trains a prompt twice: {ordinals}")
        self._finish(ordinals, "trained")
        self._step = step

    def dropped(self, ordinal: int, reason: DropReason) -> None:
        """This prompt will not be trained on in this epoch. Raises ValueError if it is not in flight."""
        if reason not in get_args(DropReason):
            raise ValueError(f"a prompt is dropped as one of {', '.join(get_args(DropReason))}, not {reason!r}")
        self._finish([ordinal], reason)

    def state(self) -> dict[str, Any]:
        """All that a resume needs, as JSON. Take it at a step boundary, and save it with the weights of that step."""
        return {
            "seed": self.seed,
            "num_tasks": self.num_tasks,
            "fingerprint": self.fingerprint,
            "step": self._step,
            "low_water": self.low_water,
            "done": sorted(self._done),
            "counts": dict(self.counts),
            "pass_rates": [[index, *answered] for index, answered in sorted(self._pass_rates.items())],
        }

    @classmethod
    def restore(
        cls,
        state: Mapping[str, Any],
        num_tasks: int,
        seed: int,
        fingerprint: str,
        curriculum: CurriculumSettings | None = None,
    ) -> Ledger:
        """The ledger that `state` was taken from, with nothing in flight.

        Raises RunDirectoryError if the run's prompts are no longer the same, in number, order, or in what the fingerprint is of.
        """
        now = {"num_tasks": num_tasks, "seed": seed, "fingerprint": fingerprint}
        names = {"num_tasks": "the number of tasks", "seed": "--seed", "fingerprint": "the fingerprint of the tasks"}
        changes = [f"{names[key]} was {state[key]} and is {now[key]}" for key in now if state[key] != now[key]]
        if changes:
            raise RunDirectoryError(
                f"cannot resume, the run's prompts have changed: {'; '.join(changes)}. Restore the environment, its "
                "arguments and the seed that the run began with, or start a new run with another --run-dir"
            )
        ledger = cls(num_tasks, seed, fingerprint, curriculum)
        ledger.low_water = ledger._next = state["low_water"]
        ledger.counts.update(state["counts"])
        ledger._step = state["step"]
        ledger._done = set(state["done"])
        ledger._pass_rates = {index: (epoch, rate) for index, epoch, rate in state.get("pass_rates", [])}
        return ledger

    def _is_wanted(self, ordinal: int, index: int, seed: int) -> bool:
        bounds = self._curriculum
        # By an answer of this epoch only a prompt is judged that was wanted, and is asked again after a resume.
        epoch, rate = self._pass_rates.get(index, (ordinal // self.num_tasks, 0.0))
        if epoch == ordinal // self.num_tasks or bounds.above < rate < bounds.below:
            return True
        return seed < bounds.keep * 2**31

    def _finish(self, ordinals: list[int], what: str) -> None:
        if strangers := [ordinal for ordinal in ordinals if ordinal not in self._in_flight]:
            raise ValueError(f"prompts {strangers} cannot become {what}: they are not in flight")
        self._in_flight.difference_update(ordinals)
        self._done.update(ordinals)
        self.counts[what] += len(ordinals)
        while self.low_water in self._done:
            self._done.remove(self.low_water)
            self.low_water += 1

    def _index(self, ordinal: int) -> int:
        epoch, place = divmod(ordinal, self.num_tasks)
        if self._order is None or self._order[0] != epoch:
            # Not Generator.permutation, whose result may change between numpy releases; raw bits do not (NEP 19).
            keys = np.random.PCG64([self.seed, epoch]).random_raw(self.num_tasks)
            self._order = epoch, np.argsort(keys, kind="stable")
        return int(self._order[1][place])


def fingerprint(name: str, args: Mapping[str, Any], num_tasks: int, tasks: Iterable[Any]) -> str:
    """Hex SHA-256 that tells whether an environment still has the same tasks; equal in every process.

    `tasks` is a sample of them, always of the same indices. A task counts by its content: containers, arrays and
    attributes of objects recursively, anything else by its `repr` without memory addresses. Hash order does not matter.
    """
    return hashlib.sha256(_canonical([name, dict(args), num_tasks, list(tasks)]).encode()).hexdigest()


def _canonical(value: Any) -> str:
    if isinstance(value, str):
        return json.dumps(value)
    if isinstance(value, Mapping):
        return f"{{{','.join(sorted(f'{_canonical(key)}:{_canonical(item)}' for key, item in value.items()))}}}"
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_canonical, value))}]"
    if isinstance(value, set | frozenset):
        return f"{{{','.join(sorted(map(_canonical, value)))}}}"
    if isinstance(value, np.ndarray | np.generic):
        return f"{value.dtype}{_canonical(value.tolist())}"
    if not isinstance(value, type):
        name = type(value).__qualname__
        if dataclasses.is_dataclass(value):  # it may have slots
            fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
            return f"{name}{_canonical(fields)}"
        if attributes := getattr(value, "__dict__", None):
            return f"{name}{_canonical(attributes)}"
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))
