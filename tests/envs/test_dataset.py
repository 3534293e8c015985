"""Prompts and rewards as TRL has them."""

import json
import sys
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest

from rlloop.environment import Environment, load_environment
from rlloop.errors import BadEnvironmentError
from rlloop.types import Completion, Rollout

EXAMPLE = Path(__file__).parents[2] / "examples" / "custom_rewards"
MODULE = """
import asyncio

seen = {}

def length(prompts, completions, completion_ids, answer, trainer_state, log_extra, log_metric):
    seen.update(prompts=prompts, completions=completions, completion_ids=completion_ids, answer=answer)
    log_metric("length", 1.0)
    return [float(len(completions[0]))]

async def right(completions, answer, **_):
    await asyncio.sleep(0)
    return [1.0 if completion == a else None for completion, a in zip(completions, answer)]

async def loop(completions, **_):
    return [float(id(asyncio.get_running_loop()))]

def two(completions, **_):
    return [1.0, 2.0]

def scalar(completions, **_):
    return 1.0

def wrapped(**arguments):  # as a decorator that tries again
    return right(**arguments)

class Judge:
    async def __call__(self, completions, **_):
        return [2.0]

judge = Judge()
"""
pytestmark = pytest.mark.filterwarnings("ignore")  # of datasets


def rollout(text: str) -> Rollout:
    tokens, mask = np.arange(5, dtype=np.int32), np.array([0, 0, 1, 1, 1], bool)
    return Rollout(tokens, mask, np.zeros(5, np.float32), 0, "stop", 1, text)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a dataset and rewards."""
    (tmp_path / "rows.jsonl").write_text(
        json.dumps({"prompt": "1 + 1 =", "answer": "2"}) + "\n" + json.dumps({"prompt": "2 + 2 =", "answer": "4"})
    )
    (tmp_path / "trl_style.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    sys.modules.pop("trl_style", None)
    return tmp_path


def load(*rewards: str, **args: Any) -> Environment:
    return load_environment("dataset", {"path": "rows.jsonl", "rewards": [f"trl_style:{r}" for r in rewards], **args})


def test_rewards_are_called_as_trl_calls_them() -> None:
    environment = load("length")
    task = environment.task(1)
    assert environment.score(task, rollout("four")) == 4.0
    assert sys.modules["trl_style"].seen == {
        "prompts": ["2 + 2 ="],
        "completions": ["four"],
        "completion_ids": [[2, 3, 4]],
        "answer": ["4"],
    }


def test_rewards_are_weighted_and_none_is_left_out() -> None:
    environment = load("length", "right", weights=[0.5, 10])
    assert environment.score(environment.task(0), rollout("2")) == 10.5
    assert environment.score(environment.task(0), rollout("2")).parts == {"length": 1.0, "right": 1.0}
    assert environment.score(environment.task(0), rollout("22")) == 1.0
    assert environment.score(environment.task(0), rollout("22")).parts == {"length": 2.0}
    with pytest.raises(ValueError, match="every reward function returned None"):
        load("right").score(environment.task(0), rollout("3"))
    with pytest.raises(ValueError, match=r"a list of one reward for one completion from two, got \[1\.0, 2\.0\]"):
        load("two").score(environment.task(0), rollout("3"))


def test_all_calls_of_asynchronous_rewards_run_in_one_loop() -> None:
    environment = load("loop")
    first, second = (environment.score(environment.task(index), rollout("2")) for index in range(2))
    assert first == second, "a client that is kept would be of a loop that is closed"


def test_rewards_are_lists_of_one_from_whatever_is_called() -> None:
    environment = load("wrapped", "judge")
    assert environment.score(environment.task(0), rollout("2")) == 3.0
    with pytest.raises(ValueError, match=r"a list of one reward for one completion from scalar, got 1\.0"):
        load("scalar").score(environment.task(0), rollout("2"))


def test_files_may_be_a_pattern_or_a_list(folder: Path) -> None:
    (folder / "more").mkdir()
    for number in range(2):
        (folder / "more" / f"{number}.jsonl").write_text(json.dumps({"prompt": f"{number}"}))
    for path in ("more/*.jsonl", ["more/0.jsonl", "more/1.jsonl"]):
        environment = load_environment("dataset", {"path": path, "rewards": ["trl_style:length"]})
        assert sorted(environment.task(index)["prompt"] for index in range(len(environment))) == ["0", "1"]


def test_a_column_that_would_hide_the_answers_is_refused(folder: Path) -> None:
    (folder / "rows.jsonl").write_text(json.dumps({"prompt": "1 + 1 =", "completions": "2"}))
    with pytest.raises(BadEnvironmentError, match="expected no column completions, which reward functions get"):
        load("length")


def test_a_reward_of_trls_own_on_a_conversation(folder: Path) -> None:
    pytest.importorskip("trl")
    messages = [{"role": "user", "content": "Think."}]
    named = [{"role": "user", "content": "Think.", "name": "Ada"}]  # so the other row's name is None
    (folder / "chat.jsonl").write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in (messages, named)))
    args = {"path": "chat.jsonl", "rewards": ["trl.rewards:think_format_reward"]}
    environment: Any = load_environment("dataset", args)
    assert [environment.messages(environment.task(index)) for index in range(2)] == [messages, named]
    assert environment.score(environment.task(0), rollout("<think>\nHm.\n</think>\nYes.")) == 1.0
    assert environment.score(environment.task(0), rollout("Yes.")) == 0.0


def test_a_string_is_continued_as_it_stands() -> None:
    class Tokenizer:
        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"1 + 1 =": {"input_ids": [7, 8]}}[text]

        def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
            return str(tokens)

    class Policy:
        tokenizer = Tokenizer()
        max_model_len = 99

        async def generate(self, tokens: tuple[int, ...]) -> Completion:
            assert tokens == (7, 8)
            return Completion(np.array([5], np.int32), np.array([-1.0], np.float32), 3, "length")

    environment = load("length")
    found = anyio.run(environment.rollout, environment.task(0), Policy())
    assert (found.tokens.tolist(), found.loss_mask.tolist(), found.text) == ([7, 8, 5], [False, False, True], "[5]")
    assert (found.finish_reason, found.policy_version) == ("length", 3)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"rewards": ["trl_style:wrong"]}, "module trl_style has no function or class wrong"),
        ({"rewards": []}, "expected a weight for each reward function, got 0"),
        ({"rewards": ["trl_style:two"], "weights": [1, 2]}, "expected a weight for each reward function, got 2"),
        ({"rewards": ["trl_style:length"] * 2}, "expected each reward function once"),
        ({"path": "other.jsonl"}, "other.jsonl: expected a column prompt, got question"),
        ({"path": "missing.jsonl"}, "missing.jsonl"),
        ({"path": "empty.jsonl"}, "empty.jsonl: expected rows, got an empty file"),
        ({"path": "numbers.csv"}, "numbers.csv: expected prompts of text or of messages, got 12"),
        ({"path": "tools.jsonl"}, "tools.jsonl: expected no tools, which prompts are not rendered with"),
    ],
)
def test_bad_arguments_are_explained(folder: Path, args: dict[str, Any], message: str) -> None:
    (folder / "other.jsonl").write_text(json.dumps({"question": "1 + 1 ="}))
    (folder / "empty.jsonl").touch()
    (folder / "numbers.csv").write_text("prompt\n12\n13\n")
    (folder / "tools.jsonl").write_text(json.dumps({"prompt": "1 + 1 =", "tools": [{"name": "calculator"}]}))
    with pytest.raises(BadEnvironmentError, match=message):
        load_environment("dataset", {"path": "rows.jsonl", "rewards": ["trl_style:length"], **args})


def test_the_example(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXAMPLE)
    sys.modules.pop("my_rewards", None)
    args = {"path": "questions.jsonl", "rewards": ["my_rewards:right", "my_rewards:brief"], "weights": [1.0, 0.2]}
    environment: Any = load_environment("dataset", args)
    assert len(environment) == 8
    assert environment.score(environment.task(0), rollout("Green grass")) == pytest.approx(1.1)
