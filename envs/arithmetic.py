"""Small sums, such as "What is 3 + 4?". A model of 135M parameters learns them within minutes on a laptop.

    rlloop grpo --env arithmetic --env-args '{"max_operand": 20, "operators": "+-"}'

The reward is 1 when the last number of the answer is right, else 0.
"""

from __future__ import annotations

import operator
import random
import re
from dataclasses import dataclass

from rlloop.environment import MessageEnvironment
from rlloop.types import Message, Rollout

_OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


@dataclass(frozen=True)
class Sum:
    """One task."""

    expression: str
    answer: int


class Arithmetic(MessageEnvironment):
    """`num_tasks` expressions of two operands in [0, `max_operand`], the same for the same `seed`.

    `operators` holds one or more of "+", "-" and "*".
    """

    def __init__(self, max_operand: int = 9, operators: str = "+", num_tasks: int = 1000, seed: int = 0) -> None:
        if max_operand < 0:
            raise ValueError(f"max_operand must be at least 0, got {max_operand}")
        if not operators or not set(operators) <= set(_OPERATORS):
            raise ValueError(f'operators must be some of "{"".join(_OPERATORS)}", got "{operators}"')
        self.max_operand = max_operand
        self.operators = operators
        self.num_tasks = num_tasks
        self.seed = seed

    def __len__(self) -> int:
        return self.num_tasks

    def task(self, index: int) -> Sum:
        """Depends on `seed` and `index` alone."""
        chosen = random.Random(f"{self.seed}/{index}")
        left, right = chosen.randint(0, self.max_operand), chosen.randint(0, self.max_operand)
        symbol = chosen.choice(self.operators)
        return Sum(f"{left} {symbol} {right}", _OPERATORS[symbol](left, right))

    def messages(self, task: Sum) -> list[Message]:
        """One question."""
        return [{"role": "user", "content": f"What is {task.expression}? Reply with the number only."}]

    def score(self, task: Sum, rollout: Rollout) -> float:
        """1 or 0."""
        return float(re.findall(r"-?\d+", rollout.text)[-1:] == [str(task.answer)])
