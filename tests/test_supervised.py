"""What each of TRL's conventions becomes, token by token, under SmolLM2's chat template."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from rlloop.envs.arithmetic import Arithmetic, Sum

from rlloop.environment import prompt_tokens
from rlloop.errors import ConfigError
from rlloop.rows import load_rows
from rlloop.supervised import Example, Examples, make_samples, tokenise

EXAMPLE = Path(__file__).parents[1] / "examples" / "sft" / "questions.jsonl"
pytestmark = pytest.mark.filterwarnings("ignore")  # of datasets

# <|im_start|> is 1, <|im_end|> 2, a line break 198. The template says who the assistant is where no system message does.
SYSTEM = [
    1,
    9690,
    198,
    2683,
    359,
    253,
    5356,
    5646,
    11173,
    3365,
    3511,
    308,
    34519,
    28,
    7018,
    411,
    407,
    19712,
    8182,
    2,
    198,
]
QUESTION = [1, 4093, 198, 33, 1232, 216, 33, 47, 2, 198]  # user: 1 + 1?
OTHER = [1, 4093, 198, 104, 2, 198]  # user: x
TURN = [1, 520, 9531, 198]  # assistant:
LINE_BREAK = [198]


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2)


def read(rows: list[dict[str, Any]], tokenizer: Any, max_length: int = 512) -> Examples:
    return tokenise(Dataset.from_list(rows), tokenizer, max_length)


def one(row: dict[str, Any], tokenizer: Any) -> Example:
    (example,) = read([row], tokenizer).kept
    assert (example.tokens.dtype, example.loss_mask.dtype) == (np.int32, np.bool_)
    return example


def split(example: Example) -> list[tuple[list[int], bool]]:
    """Stretches of tokens that carry loss or do not."""
    found: list[tuple[list[int], bool]] = []
    for token, carries_loss in zip(example.tokens.tolist(), example.loss_mask.tolist(), strict=True):
        if not found or found[-1][1] != carries_loss:
            found.append(([], carries_loss))
        found[-1][0].append(token)
    return found


def test_of_a_prompt_and_its_completion_the_completion_carries_loss_with_the_end_of_its_turn(tokenizer: Any) -> None:
    row = {"prompt": [user("1 + 1?")], "completion": [assistant("2")], "answer": "2"}
    assert split(one(row, tokenizer)) == [([*SYSTEM, *QUESTION, *TURN], False), ([34, 2], True)]


def test_the_prompt_is_what_an_environment_would_ask(tokenizer: Any) -> None:
    prompt = [{"role": "system", "content": "Be brief."}, user("1 + 1?"), assistant("2"), user("x")]
    row = {"prompt": prompt, "completion": [assistant("3")]}
    asked = [1, 9690, 198, 6077, 5453, 30, 2, 198, *QUESTION, *TURN, 34, 2, 198, *OTHER, *TURN]
    assert prompt_tokens(tokenizer, prompt) == asked
    assert split(one(row, tokenizer)) == [(asked, False), ([35, 2], True)]


def test_of_a_chat_each_turn_of_the_assistant_carries_loss(tokenizer: Any) -> None:
    messages = [user("1 + 1?"), assistant("2"), user("x"), assistant("3")]
    example = one({"messages": messages}, tokenizer)
    assert split(example) == [
        ([*SYSTEM, *QUESTION, *TURN], False),
        ([34, 2], True),
        ([*LINE_BREAK, *OTHER, *TURN], False),
        ([35, 2], True),
    ]
    whole = tokenizer.apply_chat_template(messages, tokenize=True)["input_ids"]
    assert [*example.tokens.tolist(), *LINE_BREAK] == whole, "the tokens are the template's"
    assert split(one({"messages": [*messages, user("x")]}, tokenizer)) == split(example), "nobody answers the last"


def test_a_completion_may_be_several_turns(tokenizer: Any) -> None:
    row = {"prompt": [user("1 + 1?")], "completion": [assistant("2"), user("x"), assistant("3")]}
    chat = {"messages": row["prompt"] + row["completion"]}
    assert split(one(row, tokenizer)) == split(one(chat, tokenizer))


@pytest.mark.parametrize("end", ["", "<|im_end|>"])
def test_strings_end_with_the_end_of_sequence_token_once(end: str, tokenizer: Any) -> None:
    row = {"prompt": "1 + 1 =", "completion": f" 2{end}"}
    assert split(one(row, tokenizer)) == [([33, 1232, 216, 33, 446], False), ([216, 34, 2], True)]
    assert split(one({"text": f"one two{end}"}, tokenizer)) == [([537], False), ([827, 2], True)]


def test_a_prompt_keeps_its_own_tokens_where_they_would_merge_with_the_completions(tokenizer: Any) -> None:
    assert tokenizer("abc")["input_ids"] == [25276]
    assert split(one({"prompt": "ab", "completion": "c"}, tokenizer)) == [([369], False), ([83, 2], True)]


def test_an_empty_completion_teaches_to_stop(tokenizer: Any) -> None:
    assert split(one({"prompt": "ab", "completion": ""}, tokenizer)) == [([369], False), ([2], True)]


def test_keys_that_other_rows_have_are_not_seen_by_the_template(tokenizer: Any) -> None:
    strict = copy.copy(tokenizer)
    strict.chat_template = "{% if messages[0].name is defined %}{{ raise_exception('named') }}{% endif %}" + str(
        tokenizer.chat_template
    )
    rows = [{"messages": [user("x"), assistant("3")]}, {"messages": [user("x"), {**assistant("3"), "name": "a"}]}]
    assert len(read(rows, strict).kept) == 2


# --- Other chat templates -----------------------------------------------------------------------------------------------


def with_template(tokenizer: Any, answer: str, begin: str, end: str) -> Any:
    other = copy.copy(tokenizer)
    other.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        + answer
        + "{% else %}User: {{ m.content }}\n{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}" + begin + "{% endif %}" + end
    )
    return other


def test_a_turn_that_nothing_ends_gets_the_end_of_sequence_token(tokenizer: Any) -> None:
    other = with_template(tokenizer, "Assistant: {{ m.content }}\n", "Assistant:", "")
    row = {"prompt": [user("x")], "completion": [assistant("y")]}
    example = one(row, other)
    assert other.decode(example.tokens) == "User: x\nAssistant: y\n<|im_end|>"
    assert other.decode(example.tokens[example.loss_mask]) == " y\n<|im_end|>"


THINKING = (
    "Assistant:{% if loop.last %}{{ m.content }}{% else %}{{ m.content.split('</think>')[-1] }}{% endif %}<|im_end|>\n"
)


def test_a_template_that_forgets_earlier_thoughts_is_trained_as_it_is_sampled(tokenizer: Any) -> None:
    other = with_template(tokenizer, THINKING, "Assistant:", "")
    messages = [user("x"), assistant("<think>a</think>b"), user("y"), assistant("<think>c</think>d")]
    example = one({"messages": messages}, other)
    assert other.decode(example.tokens) == (
        "User: x\nAssistant:<think>a</think>b<|im_end|>\nUser: y\nAssistant:<think>c</think>d<|im_end|>"
    )
    learned = other.decode(example.tokens[example.loss_mask])
    assert learned == "<think>a</think>b<|im_end|><think>c</think>d<|im_end|>"


def test_a_template_that_answers_otherwise_than_it_asks_is_refused(tokenizer: Any) -> None:
    other = with_template(tokenizer, "Assistant:{{ m.content }}<|im_end|>\n", "Assistant:<think>\n", "")
    row = {"prompt": [user("x")], "completion": [assistant("y")]}
    with pytest.raises(
        ConfigError, match=r"row 0: expected the chat template .* ends with 'User: x\\nAssistant:<think>"
    ):
        read([row], other)


# --- Rows that are left out, and errors ---------------------------------------------------------------------------------


def test_rows_that_are_too_long_or_empty_are_left_out_and_counted(tokenizer: Any) -> None:
    rows = [{"text": text} for text in ("one two", "one", "one two one two", "")]  # 3, 2, 5 and 1 tokens
    found = read(rows, tokenizer, max_length=3)
    assert [len(example.tokens) for example in found.kept] == [3, 2]
    assert (found.num_too_long, found.num_empty) == (1, 1)


CHAT = [user("x"), assistant("y")]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": "x"}], "expected the columns prompt and completion, or messages, or text, got question"),
        ([{"prompt": "x"}], "expected the columns prompt and completion, .* got prompt"),
        ([{"text": "one two one"}] * 2, r"all 2 are longer than --max-length 3 tokens \(the shortest has 4\)"),
        ([{"text": ""}], "1 rows hold nothing to learn"),
        ([{"prompt": "x", "completion": CHAT}], "row 0: expected prompt and completion .* got str and list"),
        ([{"prompt": "", "completion": "y"}], "row 0: expected a prompt, got an empty string"),
        (
            [{"messages": CHAT}, {"messages": CHAT[:1]}],
            r"row 1: expected an assistant's message, got the roles \['user'\]",
        ),
        ([{"messages": "x"}], "row 0: expected messages to be a list of messages with role and content, got 'x'"),
        ([{"messages": [*CHAT[:1], {"role": "assistant"}]}], "row 0: TypeError|row 0: UndefinedError"),
        ([{"text": "x"}, {"text": None}], "row 1: expected text to be a string, got NoneType"),
        (
            [{"messages": [*CHAT[:1], {"role": "assistant", "content": "", "tool_calls": [{"name": "search"}]}]}],
            "row 0: expected a chat template that writes tool_calls",
        ),
    ],
)
def test_datasets_that_cannot_be_used_are_explained(rows: list[dict[str, Any]], message: str, tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match=message):
        read(rows, tokenizer, max_length=3 if "max-length" in message else 512)


def test_an_empty_dataset_is_explained(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="expected rows to train on, got none: it is empty"):
        tokenise(Dataset.from_dict({"text": []}), tokenizer, 512)


def test_a_tokenizer_without_an_end_is_refused(tokenizer: Any) -> None:
    other = copy.deepcopy(tokenizer)
    other.eos_token = None
    with pytest.raises(ConfigError, match="row 0: the tokenizer has no eos_token"):
        read([{"text": "one two"}], other)


def test_the_example(tokenizer: Any) -> None:
    found = tokenise(load_rows(str(EXAMPLE)), tokenizer, 512)
    assert (len(found.kept), found.num_too_long, found.num_empty) == (48, 0, 0)
    environment = Arithmetic(max_operand=20, operators="+-")
    answers = [tokenizer.decode(example.tokens[example.loss_mask]) for example in found.kept]
    for example, answer in zip(found.kept, answers, strict=True):
        left, symbol, right = tokenizer.decode(example.tokens).partition("What is ")[2].partition("?")[0].split()
        total = int(left) + int(right) if symbol == "+" else int(left) - int(right)
        assert answer == f"{total}<|im_end|>"
        asked = prompt_tokens(tokenizer, environment.messages(Sum(f"{left} {symbol} {right}", total)))
        assert example.tokens[~example.loss_mask].tolist() == asked


# --- Samples ------------------------------------------------------------------------------------------------------------


def test_every_token_of_a_batch_that_carries_loss_counts_the_same(tokenizer: Any) -> None:
    kept = read([{"text": "one two"}, {"text": "one two one two"}], tokenizer).kept
    samples = make_samples(kept, [7, 8])
    assert [sample.prompt_id for sample in samples] == [7, 8]
    for sample, example in zip(samples, kept, strict=True):
        assert sample.tokens is example.tokens
        np.testing.assert_array_equal(sample.loss_weights, np.full(len(example.tokens), 1 / 6, np.float32))
        assert not sample.rollout_logprobs.any()
        assert sample.old_logprobs is None


def test_the_fingerprint_is_of_tokens_and_of_what_carries_loss(tokenizer: Any) -> None:
    row = {"prompt": "one", "completion": " two"}
    prints = {
        read(rows, tokenizer).fingerprint
        for rows in (
            [row],
            [row, row],
            [{"prompt": "one", "completion": " two one"}],
            [{"prompt": "one two", "completion": ""}],
        )
    }
    assert len(prints) == 4
    assert read([row], tokenizer).fingerprint in prints
