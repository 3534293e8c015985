import pickle

import numpy as np
import pytest
from rlloop.envs.arithmetic import Arithmetic, Sum

from rlloop.environment import load_environment
from rlloop.types import Rollout


def rollout(text: str) -> Rollout:
    return Rollout(np.zeros(1, np.int32), np.ones(1, np.bool_), np.zeros(1, np.float32), 0, "stop", 1, text)


def test_tasks_depend_on_seed_and_index_alone() -> None:
    def expressions(**args: int) -> list[str]:
        environment = Arithmetic(**args)
        return [environment.task(i).expression for i in range(50)]

    assert expressions() == expressions() == expressions(num_tasks=50)
    assert expressions() != expressions(seed=1)
    assert len(set(expressions())) > 30
    # They stay the same in later releases: a resumed run meets the tasks that it began with.
    assert expressions()[:3] == ["5 + 7", "9 + 7", "5 + 8"]


def test_operands_and_operators() -> None:
    environment = Arithmetic(max_operand=30, operators="+-*")
    tasks = [environment.task(i) for i in range(300)]
    assert {task.expression.split()[1] for task in tasks} == {"+", "-", "*"}
    for task in tasks:
        left, _, right = task.expression.split()
        assert 0 <= min(int(left), int(right)) <= max(int(left), int(right)) <= 30
        assert task.answer == eval(task.expression)
    assert pickle.loads(pickle.dumps(tasks)) == tasks


def test_the_question() -> None:
    assert Arithmetic().messages(Sum("3 + 4", 7)) == [
        {"role": "user", "content": "What is 3 + 4? Reply with the number only."}
    ]


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("7", 1.0),
        (" 7\n", 1.0),
        ("7.", 1.0),
        ("3 + 4 = 7", 1.0),
        ("3 + 4 is 7, not 8", 0.0),
        ("17", 0.0),
        ("-7", 0.0),
        ("seven", 0.0),
        ("", 0.0),
    ],
)
def test_score(text: str, reward: float) -> None:
    assert Arithmetic().score(Sum("3 + 4", 7), rollout(text)) == reward


def test_score_of_a_negative_answer() -> None:
    assert Arithmetic().score(Sum("3 - 4", -1), rollout("-1")) == 1.0
    assert Arithmetic().score(Sum("3 - 4", -1), rollout("It is -1")) == 1.0


@pytest.mark.parametrize("args", [{"operators": "/"}, {"operators": ""}, {"max_operand": -1}, {"num_tasks": 0}])
def test_bad_arguments(args: dict[str, object]) -> None:
    with pytest.raises(Exception, match=f"arithmetic .*{next(iter(args)) if 'num_tasks' not in args else 'no tasks'}"):
        load_environment("arithmetic", args)
