import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlloop.environment import MessageEnvironment, Trajectory, load_environment, prompt_tokens, reply_tokens
from rlloop.errors import BadEnvironmentError
from rlloop.types import Completion, FinishReason, Message, Rollout

TEMPLATE = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|start|>system\nBe brief.<|end|>\n{% endif %}"
    "<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """A token per character: what is sampled is tokenised canonically, so a rollout can be compared with its text."""
    names = ["<|start|>", "<|end|>", "\n", *map(chr, range(32, 127))]
    characters = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="?"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    characters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=characters,
        eos_token="<|end|>",
        additional_special_tokens=["<|start|>"],
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def completion(
    tokens: Sequence[int], *, version: int = 0, logprob: float = -0.5, finish_reason: FinishReason = "stop"
) -> Completion:
    logprobs = np.full(len(tokens), logprob, dtype=np.float32)
    return Completion(np.array(tokens, dtype=np.int32), logprobs, version, finish_reason)


class Script:
    """A policy that says what it is told to, each answer ended by <|end|> unless `cut`."""

    def __init__(self, tokenizer: Any, answers: list[str], *, max_model_len: int = 1000, cut: bool = False) -> None:
        self.tokenizer = tokenizer
        self.max_model_len = max_model_len
        self.asked: list[str] = []
        self._answers = iter(answers)
        self._cut = cut

    async def generate(
        self, tokens: Sequence[int], *, max_tokens: int | None = None, stop: Sequence[str] = ()
    ) -> Completion:
        self.asked.append(self.tokenizer.decode(tokens))
        answer = next(self._answers) + ("" if self._cut else "<|end|>")
        sampled = self.tokenizer.encode(answer, add_special_tokens=False)
        return completion(sampled, version=len(self.asked), finish_reason="length" if self._cut else "stop")


class Guess(MessageEnvironment):
    """Guess a number: the user says higher or lower."""

    max_turns = 3

    def __len__(self) -> int:
        return 9

    def task(self, index: int) -> int:
        return index

    def messages(self, task: int) -> list[Message]:
        return [{"role": "user", "content": "Guess!"}]

    async def reply(self, task: int, messages: Sequence[Message]) -> Sequence[Message] | None:
        guess = int(messages[-1]["content"])
        return None if guess == task else [{"role": "user", "content": "higher" if guess < task else "lower"}]

    def score(self, task: int, rollout: Rollout) -> float:
        return float(rollout.text == str(task))


class Mirror(Guess):
    """One turn."""

    reply = MessageEnvironment.reply


def test_a_chat_is_rendered_once_for_its_group(tokenizer: Any) -> None:
    class Counting:
        num_rendered = 0

        def apply_chat_template(self, chat: Any, **options: Any) -> Any:
            self.num_rendered += 1
            return tokenizer.apply_chat_template(chat, **options)

    counting, chat = Counting(), [{"role": "user", "content": "a"}]
    wanted = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    for _ in range(8):
        found = prompt_tokens(counting, chat)
        assert found == wanted
        found.clear()  # nobody else's
    assert counting.num_rendered == 1
    chat[0]["content"] = "b"
    assert prompt_tokens(counting, chat) != wanted
    assert prompt_tokens(counting, [MappingProxyType({"role": "user", "content": "a"})]) == wanted  # cannot be pickled


def test_trajectory_keeps_what_was_sampled() -> None:
    trajectory = Trajectory()
    trajectory.observe([1, 2])
    trajectory.act(completion([3, 4], version=7, logprob=-1.0))
    assert trajectory.tokens == (1, 2, 3, 4)
    trajectory.observe([5])
    trajectory.act(completion([6], version=6, logprob=-2.0))
    rollout = trajectory.finish("six", "stop", {"guesses": 2.0})
    np.testing.assert_array_equal(rollout.tokens, [1, 2, 3, 4, 5, 6])
    np.testing.assert_array_equal(rollout.loss_mask, [False, False, True, True, False, True])
    np.testing.assert_array_equal(rollout.rollout_logprobs, [0, 0, -1, -1, 0, -2])
    dtypes = [array.dtype.name for array in (rollout.tokens, rollout.loss_mask, rollout.rollout_logprobs)]
    assert dtypes == ["int32", "bool", "float32"]
    assert (rollout.policy_version, rollout.num_turns, rollout.text) == (6, 2, "six")
    assert rollout.token_versions is not None
    assert rollout.token_versions.tolist() == [6, 6, 7, 7, 6, 6]
    assert (rollout.finish_reason, rollout.metrics) == ("stop", {"guesses": 2.0})


def test_a_trajectory_knows_the_version_of_each_token() -> None:
    one, hopped = Trajectory(), Trajectory()
    for trajectory in (one, hopped):
        trajectory.observe([1])
        trajectory.act(completion([3, 4], version=7, logprob=-1.0))
    assert one.finish("", "stop").token_versions is None
    hopped.act(replace(completion([3, 4, 5], version=7, logprob=-1.0), token_versions=np.array([7, 8, 8], np.int32)))
    rollout = hopped.finish("", "stop")
    assert rollout.token_versions is not None
    assert (rollout.policy_version, rollout.token_versions.tolist()) == (7, [7, 7, 7, 7, 8, 8])


def test_trajectory_refuses_what_is_no_rollout() -> None:
    trajectory = Trajectory()
    trajectory.observe([1])
    with pytest.raises(ValueError, match="before the policy acted"):
        trajectory.finish("", "stop")
    with pytest.raises(ValueError, match="2 tokens were sampled with 1 logprobs"):
        trajectory.act(Completion(np.array([1, 2], np.int32), np.array([-1.0], np.float32), 0, "stop"))


@pytest.mark.anyio
async def test_one_turn(tokenizer: Any) -> None:
    policy = Script(tokenizer, ["4"])
    rollout = await Mirror().rollout(4, policy)
    assert policy.asked == ["<|start|>system\nBe brief.<|end|>\n<|start|>user\nGuess!<|end|>\n<|start|>assistant\n"]
    assert tokenizer.decode(rollout.tokens) == policy.asked[0] + "4<|end|>"
    assert tokenizer.decode(rollout.tokens[rollout.loss_mask]) == "4<|end|>"
    assert (rollout.text, rollout.num_turns, rollout.finish_reason) == ("4", 1, "stop")


@pytest.mark.anyio
async def test_turns_are_the_tokens_of_the_whole_chat(tokenizer: Any) -> None:
    rollout = await Guess().rollout(5, Script(tokenizer, ["2", "7", "5"]))
    chat = [
        {"role": "user", "content": "Guess!"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "higher"},
        {"role": "assistant", "content": "7"},
        {"role": "user", "content": "lower"},
        {"role": "assistant", "content": "5"},
    ]
    whole = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True)["input_ids"]
    # All but the newline after the last answer, which the policy did not sample and nothing follows.
    assert rollout.tokens.tolist() == whole[:-1]
    assert tokenizer.decode(rollout.tokens[rollout.loss_mask]) == "2<|end|>7<|end|>5<|end|>"
    assert (rollout.text, rollout.num_turns, rollout.finish_reason, rollout.policy_version) == ("5", 3, "stop", 1)


def test_a_turn_that_a_stop_string_ended_is_closed_for_the_policy(tokenizer: Any) -> None:
    chat, reply = [{"role": "user", "content": "Guess!"}], [{"role": "user", "content": "higher"}]
    last = tokenizer.encode("2", add_special_tokens=False)[0]
    told = tokenizer.decode(reply_tokens(tokenizer, chat, reply, last))
    assert told == "<|end|>\n<|start|>user\nhigher<|end|>\n<|start|>assistant\n"


@pytest.mark.parametrize("space", [" ", "\n", " \n"])
def test_a_turn_whose_end_has_white_space_before_it_ends_once(tokenizer: Any, space: str) -> None:
    spaced = TEMPLATE.replace("}}<|end|>", "}}" + space + "<|end|>")
    own = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|end|>", chat_template=spaced
    )
    reply = [{"role": "user", "content": "higher"}]
    told = own.decode(reply_tokens(own, [{"role": "user", "content": "Guess!"}], reply, own.eos_token_id))
    assert told == f"\n<|start|>user\nhigher{space}<|end|>\n<|start|>assistant\n"


def test_a_template_that_rewrites_answers_is_refused(tokenizer: Any) -> None:
    upper = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    template = TEMPLATE.replace("m['content']", "m['content'] | upper")
    rewriting = PreTrainedTokenizerFast(tokenizer_object=upper, eos_token="<|end|>", chat_template=template)
    with pytest.raises(BadEnvironmentError, match="does not repeat answers"):
        reply_tokens(rewriting, [], [{"role": "user", "content": "higher"}], 1)


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("options", "turns", "finish_reason"),
    [
        ({}, 3, "max_turns"),
        ({"cut": True}, 1, "length"),
        # 44 tokens of prompt, 2 of answer, 26 until the next one
        ({"max_model_len": 72}, 1, "length"),
        ({"max_model_len": 74}, 2, "length"),
    ],
)
async def test_a_chat_ends(tokenizer: Any, options: Mapping[str, Any], turns: int, finish_reason: str) -> None:
    policy = Script(tokenizer, ["1", "2", "3", "4"], **options)
    rollout = await Guess().rollout(9, policy)
    assert (rollout.num_turns, rollout.finish_reason) == (turns, finish_reason)
    assert len(rollout.tokens) <= policy.max_model_len
    assert rollout.loss_mask[-1]


def test_load_by_name_and_by_class() -> None:
    for name in ("arithmetic", "rlloop.envs.arithmetic:Arithmetic"):
        environment = load_environment(name, {"num_tasks": 3, "max_operand": 20})
        assert len(environment) == 3


def test_the_example_is_short_and_found_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(__file__).parents[1] / "examples" / "custom_environment" / "backwards.py"
    code = [line for line in source.read_text().splitlines() if line.strip() and not line.strip().startswith('"""')]
    assert len(code) <= 20
    shutil.copy(source, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    environment = load_environment("backwards:Backwards", {})
    task = environment.task(0)
    assert [environment.score(task, spoken(text)) for text in ("pool", " Pool\n", "xyz")] == [1.0, 1.0, 0.0]


def spoken(text: str) -> Rollout:
    trajectory = Trajectory()
    trajectory.act(completion([1]))
    return trajectory.finish(text, "stop")


BROKEN = """
import rlloop.environment

class Empty(rlloop.environment.MessageEnvironment):
    def __len__(self): return 0
    def task(self, index): ...
    def messages(self, task): ...
    def score(self, task, rollout): ...

class Raises(Empty):
    def __init__(self, path="x"): raise FileNotFoundError(f"no file {path}")

class Half:
    def __len__(self): return 1
    def task(self, index): ...

class Abstract(rlloop.environment.MessageEnvironment):
    pass
"""


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        (
            "arithmetik",
            {},
            r"is called 'arithmetik' \(did you mean arithmetic\?\); there are arithmetic, dataset, reasoning_gym",
        ),
        ("pkg.module.Class", {}, "package.module:Class"),
        (":Class", {}, "no environment is called"),
        ("rlloop_missing:Env", {}, "have a module rlloop_missing"),
        ("rlloop.envs.missing:Env", {}, "have a module rlloop.envs.missing"),
        ("broken_import:Env", {}, "cannot be imported: ModuleNotFoundError: No module named 'missing_dependency'"),
        ("rlloop.envs.arithmetic:Arithmetik", {}, r"no function or class Arithmetik \(did you mean Arithmetic\?\)"),
        ("arithmetic", {"max_operands": 3}, r"'max_operands' \(did you mean max_operand\?\); it takes \(max_operand"),
        ("arithmetic", {"max_operand": -1}, "ValueError: max_operand must be at least 0, got -1"),
        ("reasoning_gym", {}, "missing a required argument: 'dataset'"),
        ("broken:Empty", {}, r"has no tasks: its len\(\) is 0"),
        ("broken:Raises", {}, "cannot be built: FileNotFoundError: no file x"),
        ("broken:Half", {}, "has no rollout, score"),
        ("broken:Abstract", {}, "abstract"),
    ],
)
def test_bad_environments_are_explained(
    name: str, args: Mapping[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken.py").write_text(BROKEN)
    (tmp_path / "broken_import.py").write_text("import missing_dependency")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "broken", raising=False)
    with pytest.raises(BadEnvironmentError, match=message):
        load_environment(name, args)
